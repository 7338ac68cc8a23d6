"""Which class comes in which task, and accuracy and forgetting (`metrics.py`); NumPy only."""
