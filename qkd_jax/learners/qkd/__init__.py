"""QKD: its gate (relevance), its fusion (relevance at test time) and its learner (the loss).

The gate learns to route when a task ends: `gate.calibrate` has that loss and its optimiser.
"""
