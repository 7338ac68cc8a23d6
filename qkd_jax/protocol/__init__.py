"""What is learned in which order, and how it is measured; NumPy only."""
