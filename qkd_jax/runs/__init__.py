"""A run: plan, loop, evaluation, books, checkpoints and the folder it leaves."""
