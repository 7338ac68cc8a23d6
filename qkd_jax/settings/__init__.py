"""Every setting of a run, its default, its range and its check."""
