"""Every image set behind one call: `load_split("renditions")`, a folder, tensorflow-datasets."""

import os

from qkd_jax.data import packaged
from qkd_jax.data.image_set import ImageSet, Split, from_arrays
from qkd_jax.errors import DataError

__all__ = ["ImageSet", "Split", "from_arrays", "load_split"]


def load_split(
    source: str, *, path: str | os.PathLike | None = None, split_file: str | None = None, **options
) -> Split:
    """Opens an image set by name."""
    if source == "renditions":
        return packaged.renditions()
    if source == "synthetic":
        return packaged.synthetic(**options)
    raise DataError(f"unknown source {source!r}; known: renditions, synthetic")
