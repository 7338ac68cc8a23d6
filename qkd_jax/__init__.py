"""Class-incremental learning on a frozen vision transformer."""
