"""The compiled functions for one device or many, and the five verbs on one device."""
