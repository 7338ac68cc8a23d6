"""Q-tuning and its two baselines: the queue of prompts, what is retained of it, the learners."""
