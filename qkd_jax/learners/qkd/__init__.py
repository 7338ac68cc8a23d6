"""QKD: its gate (relevance), its fusion (relevance at test time), its learner (the loss), and what
it keeps of a task (`finish`).

The gate learns to route when a task ends: `gate.calibrate` has that loss and its optimiser.
"""
