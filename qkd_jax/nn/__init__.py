"""Frozen transformers as pure functions, and what is inserted in them: adapters, prompts, branches.

`encode.py` is the forward pass of every architecture, and where the last block computes only the
rows that are read; `backbone.py` says what an architecture must offer, such as a text encoder.
`losses.py` has cross-entropy and distillation, `fit.py` the loop for what trains on statistics.
"""
