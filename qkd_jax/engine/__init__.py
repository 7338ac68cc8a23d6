"""The compiled functions for one device or many, and the five verbs, their one-device form."""
