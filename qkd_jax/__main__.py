"""`python -m qkd_jax`."""

import sys

from qkd_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
