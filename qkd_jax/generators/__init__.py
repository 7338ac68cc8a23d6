"""Generators of the features of classes whose images are gone: fit, then draw."""
