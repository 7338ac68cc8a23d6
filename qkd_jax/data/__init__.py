"""Sets of images and texts, crops and batches: `sources.py` opens a set by its name, and new ones
belong there.

What a set must offer to be learned from is the protocol in `examples.py`.
"""
