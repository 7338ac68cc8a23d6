"""Sets of tensorflow-datasets, of images or texts, read from array_record files without TensorFlow.

TensorFlow is needed once, to download and convert (`prepare`); after that never again.
"""

import contextlib
import http.client
import json
import os
import pathlib
import shlex
import urllib.error
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qkd_jax.data.examples import Split, counted
from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.labelled_set import LabelledSet
from qkd_jax.data.scan import Splitter
from qkd_jax.data.splits import fifth_to_test, summarise
from qkd_jax.data.text_set import TextSet
from qkd_jax.errors import DataError, QkdError

RECORDS_AT_ONCE = 512
DOWNLOAD_RETRIES = 2
ID_FEATURES = ("file_name", "image/filename", "filename", "id")
# Sets whose texts are in several parts, which are joined by spaces in this order.
TEXT_PARTS = {"ag_news_subset": ("title", "description")}


def open_tfds(
    name: str, path: str | os.PathLike | None = None, splitter: Splitter | None = None
) -> Split:
    """Opens a prepared data set that has an image and a class label, or a text and a class label.

    A set with images and texts is one of images. Of several texts the supervised one is taken, or
    the parts that `TEXT_PARTS` names.

    Its own train and test splits are used, or the validation split if there is no test split or
    one without labels. A `splitter` divides the examples of both together. A set with only one
    split is divided by it, or by `splits.fifth_to_test`. Examples without a label (-1 in
    tensorflow-datasets) are left out, and the name of the set says how many. Labels are renumbered
    to the classes that occur (ImageNet-R declares 1000 and has 200).

    Ids are the names of examples in the set, or `<split>/<position>` if names repeat.

    Args:
      name: in tensorflow-datasets, such as `caltech_birds2011` or `domainnet/real`.
      path: the data folder; by default that of tensorflow-datasets.
      splitter: (ids [N], labels [N]) -> bool [N], True for test.

    Raises:
      DataError: the set is not prepared, not array_record, has no images or texts with class
        labels, or no label in a split.
    """
    builder = _builder(name, path)
    if not builder.info.splits:
        raise DataError(_how_to_prepare(name, path, "is not prepared"))
    features = _keys(builder, name)
    declared = builder.info.features[features.label].names
    parts = _labelled_parts(builder, name, features, splitter is not None)
    occurring = np.unique(np.concatenate([part.labels for part in parts]))
    if occurring[-1] >= len(declared):
        raise DataError(
            f"tfds:{name}: expected labels below {len(declared)}, found {occurring[-1]}"
        )
    class_names = tuple(declared[label] for label in occurring)

    def as_set(*parts: _Part, name: str) -> LabelledSet:
        return _as_set(parts, features, name, occurring, class_names)

    if splitter is None and len(parts) == 2:
        problems = [
            f"class {declared[label]!r} is not in {part.split}"
            for part in parts
            for label in np.setdiff1d(occurring, part.labels)
        ]
        if problems:
            count = counted(len(problems), "problem")
            raise DataError(f"tfds:{name}: {count}:{summarise(problems)}")
        return Split(*(as_set(part, name=f"tfds:{name}/{part.split}") for part in parts))
    everything = as_set(*parts, name=f"tfds:{name}")
    is_test = (splitter or fifth_to_test)(everything.ids, everything.labels)
    return Split(
        train=everything.take(np.flatnonzero(~is_test), f"{everything.name}/train"),
        test=everything.take(np.flatnonzero(is_test), f"{everything.name}/test"),
    )


def prepare(name: str, path: str | os.PathLike | None = None) -> pathlib.Path:
    """Downloads a data set and writes it as array_record; returns its folder.

    Archives in `downloads/manual` of the data folder, under their own names, are used instead of a
    download.

    Raises:
      DataError: TensorFlow, which the builders of tensorflow-datasets need for this, is missing; a
        file cannot be downloaded (the message says which to put where) or is not the expected one.
      OSError: the disk is full or cannot be written.
    """
    import requests
    from tensorflow_datasets.core.download import download_manager, downloader, util

    builder = _builder(name, path)
    retries = downloader.MAX_RETRIES
    # With the ten retries of tensorflow-datasets, a machine without a network waits four minutes.
    downloader.MAX_RETRIES = DOWNLOAD_RETRIES
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise DataError(
            f"tfds:{name}: preparing needs TensorFlow once ({error}): pip install 'qkd_jax[tfds]', "
            f"then {_command(name, path)}"
        ) from error
    except (
        requests.exceptions.RequestException,
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        util.DownloadError,
        download_manager.NonMatchingChecksumError,
    ) as error:
        raise DataError(_how_to_download(builder, name, path, error)) from error
    except AssertionError as error:
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS is None:
            raise
        raise DataError(
            f"tfds:{name}: expected files that only you can fetch. {error}\n"
            f"Then {_command(name, path)}"
        ) from error
    finally:
        downloader.MAX_RETRIES = retries
    return pathlib.Path(builder.data_dir)


def _how_to_download(builder, name: str, path: str | os.PathLike | None, error: Exception) -> str:
    files = {info.filename: url for url, info in (builder.url_infos or {}).items() if info.filename}
    told = f"tfds:{name}: cannot download: {str(error) or type(error).__name__}. "
    if not files:
        return f"{told}Repeat with a network: {_command(name, path)}"
    manual = pathlib.Path(builder.data_dir_root, "downloads", "manual")
    listed = summarise([f"{file} from {url}" for file, url in sorted(files.items())])
    return (
        f"{told}Repeat with a network, or fetch elsewhere what is needed of{listed}\n"
        f"put it into {manual} under that name, then {_command(name, path)}"
    )


def _how_to_prepare(name: str, path: str | os.PathLike | None, state: str) -> str:
    return (
        f"tfds:{name} {state}. Once, with internet: pip install 'qkd_jax[tfds]' and "
        f"{_command(name, path)}"
    )


def _command(name: str, path: str | os.PathLike | None) -> str:
    where = f" --path {shlex.quote(os.fspath(path))}" if path is not None else ""
    return f"python -m qkd_jax data prepare {name}{where}"


def _builder(name: str, path: str | os.PathLike | None):
    import tensorflow_datasets as tfds

    folder = None if path is None else os.path.expanduser(path)
    where = pathlib.Path(os.path.expanduser(folder or tfds.core.constants.DATA_DIR))
    try:
        _refuse_foreign_classes(where / name.partition(":")[0])
        return tfds.builder(name, data_dir=folder, file_format="array_record")
    except (QkdError, OSError, ImportError):
        raise
    except tfds.core.DatasetNotFoundError:
        raise DataError(
            f"tfds:{name}: expected the name of a set of tensorflow-datasets"
            + (f" or of one in {folder}" if folder else "")
            + ", found another"
        ) from None
    except ValueError as error:
        if "file_format" not in str(error) and "file format" not in str(error):
            raise _damage(name, error) from error
        raise DataError(
            _how_to_prepare(name, "OTHER_FOLDER", f"is prepared in another format ({error})")
        ) from error
    except Exception as error:  # tensorflow-datasets raises many types on damaged files
        raise _damage(name, error) from error


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns what tensorflow-datasets raises on damaged records into a DataError."""
    try:
        yield
    except (QkdError, OSError, ImportError):
        raise
    except Exception as error:
        raise _damage(name, error) from error


def _damage(name: str, error: Exception) -> DataError:
    return DataError(
        f"tfds:{name}: expected the files of a prepared set, found damage "
        f"({type(error).__name__}: {str(error)[:300]}). Remove its folder and prepare it again"
    )


def _refuse_foreign_classes(folder: pathlib.Path) -> None:
    """Refuses descriptions of features that name classes of other packages.

    tensorflow-datasets would import the module of any name.
    """
    for file in sorted(folder.rglob("features.json")) if folder.is_dir() else ():
        try:
            classes = list(_classes_in(json.loads(file.read_bytes())))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}: expected valid JSON, found {error}. Prepare it again"
            ) from None
        foreign = [kind for kind in classes if not kind.startswith("tensorflow_datasets.")]
        if foreign:
            raise DataError(
                f"{file}: expected features of tensorflow-datasets, found {foreign[0]!r}, whose "
                "module would be imported"
            )


def _classes_in(described: Any) -> Iterator[str]:
    """The Python classes that a description of features names, at any depth."""
    if isinstance(described, list):
        for value in described:
            yield from _classes_in(value)
    elif isinstance(described, dict):
        # Files of older versions call it "type", a word that others may use for something else.
        keys = ["pythonClassName"] + ["type"] * ("content" in described)
        yield from (described[key] for key in keys if isinstance(described.get(key), str))
        for value in described.values():
            yield from _classes_in(value)


class _Features(NamedTuple):
    """Names of what a set has: an image, or else one or several parts of a text."""

    image: str | None
    texts: tuple[str, ...]
    label: str
    name: str | None

    @property
    def noun(self) -> str:
        return TextSet.noun if self.image is None else ImageSet.noun


class _Part(NamedTuple):
    """The labelled examples of one split.

    Attributes:
      split: the name of the split.
      rows: int64 [n], the positions of the examples in the split.
      labels: int64 [n], as the set declares them.
      names: n names from the set, which may repeat; None if it has none.
      texts: n texts; none for images, which are read when they are loaded.
      left_out: number of examples without a label.
      source: the records.
    """

    split: str
    rows: np.ndarray
    labels: np.ndarray
    names: list[str] | None
    texts: list[str]
    left_out: int
    source: Any


def _keys(builder, name: str) -> _Features:
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())

    def of_kind(kind: type) -> list[str]:
        return [key for key, feature in features.items() if isinstance(feature, kind)]

    images, labels = of_kind(tfds.features.Image), of_kind(tfds.features.ClassLabel)
    texts = [key for key in of_kind(tfds.features.Text) if key not in ID_FEATURES]
    supervised = builder.info.supervised_keys or ()
    image_key = next((key for key in (*supervised, "image") if key in images), None)
    label_key = next((key for key in (*supervised, "label") if key in labels), None)
    only = texts if len(texts) == 1 else []
    text_key = next((key for key in (*supervised, *only) if key in texts), None)
    parts = TEXT_PARTS.get(builder.name, (text_key,) if text_key and not images else ())
    if (image_key is None and not parts) or label_key is None:
        several = f", of which {len(texts)} are texts and none is the supervised one"
        raise DataError(
            f"tfds:{name}: expected an image or a text and a class label, found the features "
            f"{sorted(features)}{several * (len(texts) > 1 and label_key is not None)}"
        )
    name_key = next((key for key in ID_FEATURES if key in features), None)
    return _Features(image_key, parts, label_key, name_key)


def _labelled_parts(builder, name: str, features: _Features, any_will_do: bool) -> list[_Part]:
    """The split to train on and, if there is another one with labels, the split to test on."""
    splits = [split for split in ("train", "test", "validation") if split in builder.info.splits]
    if not splits:
        raise DataError(
            f"tfds:{name}: expected a split train, test or validation, found "
            f"{sorted(builder.info.splits)}"
        )
    parts, bare = [], []
    for split in splits:
        part = _read(builder, split, features)
        (parts if len(part.rows) else bare).append(part)
        if len(parts) == 2:  # with train and test, the validation split is not used
            break
    wrong = bare and not (parts and any_will_do)
    if wrong and (len(parts) < 2 or bare[0].split == splits[0]):
        raise DataError(
            f"tfds:{name}/{bare[0].split}: expected {features.noun}s with a label, found none "
            f"among {bare[0].left_out} (label -1: no label). Those of other splits can be divided "
            "by a split file (data.split_file)"
        )
    return parts


def _records(source, indices: range | list[int]) -> Iterator[dict]:
    for start in range(0, len(indices), RECORDS_AT_ONCE):
        yield from source.__getitems__(list(indices[start : start + RECORDS_AT_ONCE]))


def _read(builder, split: str, features: _Features) -> _Part:
    import tensorflow_datasets as tfds

    decoders = {features.image: tfds.decode.SkipDecoding()} if features.image else None
    names, texts = [], []
    with _reading(f"{builder.name}/{split}"):
        source = builder.as_data_source(split, decoders=decoders)
        labels = np.zeros(len(source), np.int64)
        for index, record in enumerate(_records(source, range(len(source)))):
            labels[index] = record[features.label]
            if features.name is not None and labels[index] >= 0:
                names.append(_text(record[features.name]))
            if features.texts and labels[index] >= 0:
                texts.append(" ".join(_text(record[part]) for part in features.texts))
    rows = np.flatnonzero(labels >= 0)
    return _Part(
        split=split,
        rows=rows,
        labels=labels[rows],
        names=None if features.name is None else names,
        texts=texts,
        left_out=len(source) - len(rows),
        source=source,
    )


def _text(found: Any) -> str:
    text = found.decode("utf-8", "backslashreplace") if isinstance(found, bytes) else found
    return str(text)


def _as_set(
    parts: tuple[_Part, ...],
    features: _Features,
    name: str,
    occurring: np.ndarray,
    class_names: tuple[str, ...],
) -> LabelledSet:
    """The examples of all parts in one set."""
    ids = [text for part in parts for text in part.names or [""]]
    if len(set(ids)) < len(ids) or "" in ids:
        ids = [f"{part.split}/{row:07d}" for part in parts for row in part.rows.tolist()]
    left_out = sum(part.left_out for part in parts)
    rows = np.concatenate([part.rows for part in parts])
    owners = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])

    def fetch(indices):
        indices = np.asarray(indices, np.int64)
        fetched = [None] * len(indices)
        for number, part in enumerate(parts):
            places = np.flatnonzero(owners[indices] == number)
            with _reading(f"{name}/{part.split}"):
                records = _records(part.source, rows[indices[places]].tolist())
                for place, record in zip(places, records, strict=True):
                    fetched[place] = record[features.image]
        return fetched

    labels = np.concatenate([part.labels for part in parts])
    common = {
        "name": name + (f" ({left_out} without a label left out)" if left_out else ""),
        "labels": np.searchsorted(occurring, labels).astype(np.int32),
        "ids": np.array(ids, str),
        "class_names": class_names,
    }
    if features.image is None:
        return TextSet(**common, texts=tuple(text for part in parts for text in part.texts))
    return ImageSet(**common, fetch=fetch)
