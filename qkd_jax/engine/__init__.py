"""The compiled functions for one device or many, and the five verbs, their one-device form.

`jax.jit` and `jax.pmap` are in `engine.py`, arrays divided over devices in `sharding.py`.
"""
