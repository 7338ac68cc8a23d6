"""QKD: gate, fusion and learner."""
