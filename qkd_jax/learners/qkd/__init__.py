"""QKD: its gate, its fusion and its learner."""
