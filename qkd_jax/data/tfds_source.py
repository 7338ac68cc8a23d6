"""Image sets of tensorflow-datasets, read from array_record files without TensorFlow.

TensorFlow is needed once, to download and convert (`prepare`); after that never again.
"""

import os
import pathlib
from collections.abc import Iterator

import numpy as np

from qkd_jax.data.folder import Splitter
from qkd_jax.data.image_set import ImageSet, Split
from qkd_jax.data.splits import fifth_to_test, summarise
from qkd_jax.errors import DataError

RECORDS_AT_ONCE = 512
ID_FEATURES = ("file_name", "image/filename", "filename", "id")


def open_tfds(
    name: str, path: str | os.PathLike | None = None, splitter: Splitter | None = None
) -> Split:
    """Opens a prepared data set that has an `image` and a class label.

    Its own train and test (or validation) splits are used; a set that has only one split is divided
    by `splitter`, by default `splits.fifth_to_test`. With a `splitter`, all images are put together
    first. Labels are renumbered to the classes that occur (ImageNet-R declares 1000 and has 200).

    Args:
      name: as tensorflow-datasets calls it, `caltech_birds2011` or `domainnet/real`.
      path: its data folder; by default where tensorflow-datasets keeps data.
      splitter: (ids [N], labels [N]) -> bool [N], True for test.

    Raises:
      DataError: not prepared, not array_record, or not images with class labels.
    """
    builder = _builder(name, path)
    splits = [split for split in ("train", "test", "validation") if split in builder.info.splits]
    if not splits:
        raise DataError(_how_to_prepare(name, path, "is not prepared"))
    image_key, label_key = _keys(builder, name)
    # A set with train and test leaves its validation split alone.
    parts = [_read(builder, name, split, image_key, label_key) for split in splits[:2]]
    occurring = np.unique(np.concatenate([part.labels for part in parts]))
    declared = builder.info.features[label_key].names
    class_names = tuple(declared[label] for label in occurring)
    if splitter is None and len(parts) == 2:
        problems = [
            f"class {declared[label]!r} is not in {split}"
            for split, part in zip(splits, parts, strict=False)
            for label in np.setdiff1d(occurring, part.labels)
        ]
        if problems:
            raise DataError(f"tfds:{name}: {len(problems)} problems:{summarise(problems)}")
        train, test = (_renumber(part, occurring, class_names) for part in parts)
        return Split(train=train, test=test)
    everything = _renumber(_join(parts, f"tfds:{name}"), occurring, class_names)
    is_test = (splitter or fifth_to_test)(everything.ids, everything.labels)
    return Split(
        train=everything.take(np.flatnonzero(~is_test), f"tfds:{name}/train"),
        test=everything.take(np.flatnonzero(is_test), f"tfds:{name}/test"),
    )


def prepare(name: str, path: str | os.PathLike | None = None) -> pathlib.Path:
    """Downloads a data set and writes it as array_record; returns its folder.

    Raises:
      DataError: TensorFlow, which the builders of tensorflow-datasets need for this, is missing.
    """
    builder = _builder(name, path)
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise DataError(
            f"tfds:{name}: preparing needs TensorFlow once ({error}): pip install 'qkd_jax[tfds]', "
            f"then python -m qkd_jax data prepare {name}"
        ) from error
    return pathlib.Path(builder.data_dir)


def _how_to_prepare(name: str, path: str | os.PathLike | None, state: str) -> str:
    where = f" --path {os.fspath(path)}" if path is not None else ""
    return (
        f"tfds:{name} {state}. Once, with internet: pip install 'qkd_jax[tfds]' and "
        f"python -m qkd_jax data prepare {name}{where}"
    )


def _builder(name: str, path: str | os.PathLike | None):
    import tensorflow_datasets as tfds

    folder = None if path is None else os.fspath(path)
    try:
        return tfds.builder(name, data_dir=folder, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise DataError(
            f"tfds:{name}: tensorflow-datasets has no set of this name"
            + (f", nor has {folder}" if folder else "")
        ) from None
    except ValueError as error:
        if "file_format" not in str(error) and "file format" not in str(error):
            raise
        raise DataError(
            _how_to_prepare(name, "OTHER_FOLDER", f"is prepared in another format ({error})")
        ) from error


def _keys(builder, name: str) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    supervised = builder.info.supervised_keys or ()
    image_key = next((key for key in (*supervised, "image") if key in images), None)
    label_key = next((key for key in (*supervised, "label") if key in labels), None)
    if image_key is None or label_key is None:
        raise DataError(
            f"tfds:{name}: needs an image and a class label, found the features {sorted(features)}"
        )
    return image_key, label_key


def _records(source, indices: range | list[int]) -> Iterator[dict]:
    for start in range(0, len(indices), RECORDS_AT_ONCE):
        yield from source.__getitems__(list(indices[start : start + RECORDS_AT_ONCE]))


def _read(builder, name: str, split: str, image_key: str, label_key: str) -> ImageSet:
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    features = builder.info.features
    id_key = next((key for key in ID_FEATURES if key in features), None)
    labels = np.zeros(len(source), np.int32)
    ids = [f"{split}/{index:07d}" for index in range(len(source))]
    for index, record in enumerate(_records(source, range(len(source)))):
        labels[index] = record[label_key]
        if id_key is not None:
            found = record[id_key]
            ids[index] = found.decode() if isinstance(found, bytes) else str(found)
    return ImageSet(
        name=f"tfds:{name}/{split}",
        labels=labels,
        ids=np.array(ids, str),
        class_names=tuple(features[label_key].names),
        fetch=lambda indices: [record[image_key] for record in _records(source, indices)],
    )


def _renumber(images: ImageSet, occurring: np.ndarray, class_names: tuple[str, ...]) -> ImageSet:
    return ImageSet(
        name=images.name,
        labels=np.searchsorted(occurring, images.labels).astype(np.int32),
        ids=images.ids,
        class_names=class_names,
        fetch=images.fetch,
        margin=images.margin,
    )


def _join(parts: list[ImageSet], name: str) -> ImageSet:
    starts = np.cumsum([0, *map(len, parts)])
    ids = np.concatenate([part.ids for part in parts])
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"{name}: image ids are not unique, so the set cannot be split by id")

    def fetch(indices):
        indices = np.asarray(indices, np.int64)
        owner = np.searchsorted(starts, indices, side="right") - 1
        fetched = [None] * len(indices)
        for number, part in enumerate(parts):
            places = np.flatnonzero(owner == number)
            encoded = part.fetch((indices[places] - starts[number]).tolist())
            for place, image in zip(places, encoded, strict=True):
                fetched[place] = image
        return fetched

    return ImageSet(
        name=name,
        labels=np.concatenate([part.labels for part in parts]),
        ids=ids,
        class_names=parts[0].class_names,
        fetch=fetch,
    )
