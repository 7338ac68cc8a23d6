"""Weight files, from a name (`registry.py`) or a path to a checked backbone (`load.py`)."""
