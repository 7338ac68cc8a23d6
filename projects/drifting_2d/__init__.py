"""Drifting models and gradient flows in two dimensions."""
