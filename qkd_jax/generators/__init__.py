"""Generators of features: what stands in for the images of old classes."""
