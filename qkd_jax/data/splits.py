"""Which examples are trained on and which are tested on, for sets that ship without a split.

The rule depends on the ids alone, so that everyone gets the same split without a list;
`split_sha256` is the fingerprint to quote with a number.
"""

import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Iterable

import numpy as np

from qkd_jax.data.examples import counted
from qkd_jax.errors import DataError

SHOWN = 10

# Fingerprints of splits that numbers were published on. The ids are `<class>/<file>`. The list of
# the CODA-Prompt code base is a pair of YAML files; `read_split_file` takes it after
#   sed -n 's|^- data/imagenet-r/\(.*\)|\1\ttrain|p' imagenet-r_train.yaml > split.tsv
#   sed -n 's|^- data/imagenet-r/\(.*\)|\1\ttest|p' imagenet-r_test.yaml >> split.tsv
KNOWN_SPLITS = {
    "50aae8cea9256f855a6a3c1debab502f193b757537eef39ac9bf9cc8401bdd6b": (
        "ImageNet-R 24,000 / 6,000, the rule of this library"
    ),
    "1dbd8ce6259f23b969c2f43e0d6d5649c0dbd366c02c43f591526d7edc0d2e73": (
        "ImageNet-R 24,000 / 6,000, the list of the CODA-Prompt code base"
    ),
}

# Beside a message that asks for a split file; texts are named by `texts --path FOLDER`.
HOW_TO_SPLIT = "to write one: python -m qkd_jax data split FOLDER --split-file FILE"


def summarise(problems: list[str]) -> str:
    """The first ten problems, one per line, and the number of the others."""
    more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "".join(f"\n  {problem}" for problem in problems[:SHOWN]) + more


def fifth_to_test(ids: Iterable[str], labels: np.ndarray) -> np.ndarray:
    """Which examples to test on: a fifth of all, from every class in proportion.

    N // 5 examples are apportioned to the classes by largest remainder (ties go to the smaller
    label), at least one and not all of a class; within a class those with the lowest sha256(id)
    are taken. ImageNet-R's 30,000 images become 24,000 and 6,000.

    Args:
      ids: N unique ids.
      labels: integers [N].

    Returns:
      bool [N], True for test.

    Raises:
      DataError: a class has fewer than two examples.
    """
    ids, labels = list(ids), np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if (counts < 2).any():
        label = classes[np.argmin(counts)]
        raise DataError(f"class {label}: expected two examples or more to split, found one")
    quota = np.maximum(counts // 5, 1)
    remainder = np.where(counts >= 5, counts % 5, -1)
    for index in np.argsort(-remainder, kind="stable")[: max(0, len(ids) // 5 - int(quota.sum()))]:
        quota[index] += remainder[index] >= 0
    digests = np.array([hashlib.sha256(name.encode()).hexdigest() for name in ids])
    is_test = np.zeros(len(ids), bool)
    for label, number in zip(classes, quota, strict=True):
        members = np.flatnonzero(labels == label)
        is_test[members[np.argsort(digests[members])[:number]]] = True
    return is_test


def last_of_each_class(ids: Iterable[str], labels: np.ndarray, fraction: float) -> np.ndarray:
    """Which training examples to hold out for choosing settings, so that the test set stays unseen.

    These are the last `fraction` of the examples of every class in the order of their ids, rounded,
    at least one and not all. If ids start with a style or a source, whole styles are held out.

    Args:
      ids: N unique ids.
      labels: integers [N].
      fraction: above 0 and below 1.

    Returns:
      bool [N], True for held out.

    Raises:
      DataError: a class has a single example.
    """
    ids, labels = np.asarray(list(ids)), np.asarray(labels)
    held_out = np.zeros(len(ids), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {label}: expected two examples or more to hold one out, found one"
            )
        number = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[np.argsort(ids[members])[-number:]]] = True
    return held_out


def first_of_each_class(ids: Iterable[str], labels: np.ndarray, number: int) -> np.ndarray:
    """bool [N]: the first `number` examples of every class in the order of their ids, or all that
    there are.

    Args:
      ids: N unique ids.
      labels: integers [N].
      number: 1 or more.
    """
    ids, labels = np.asarray(list(ids)), np.asarray(labels)
    kept = np.zeros(len(ids), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept[members[np.argsort(ids[members])[:number]]] = True
    return kept


def split_sha256(ids: Iterable[str], is_test: np.ndarray) -> str:
    """Fingerprint of a split: sha256 of its lines (`split_lines`)."""
    return hashlib.sha256(split_lines(ids, is_test).encode()).hexdigest()


def split_lines(ids: Iterable[str], is_test: np.ndarray) -> str:
    """The content of a split file: lines `id<TAB>train|test`, sorted."""
    return "".join(
        sorted(
            f"{name}\t{'test' if test else 'train'}\n"
            for name, test in zip(ids, is_test, strict=True)
        )
    )


def read_split_file(path: str | os.PathLike, ids: Iterable[str]) -> np.ndarray:
    """Reads a user's split: lines `id<TAB>train` or `id<TAB>test`.

    A line that starts with `#` is a comment, unless the text before its last tab is an id of the
    set. Accents may be composed differently from those in the ids.

    Args:
      path: the file, UTF-8, lines ended by LF or CRLF.
      ids: the N ids of the set; each must be named once.

    Returns:
      bool [N], True for test.

    Raises:
      DataError: lists all problems: ids that are named twice, on both sides, unknown or left out;
        lines of another form.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{path}: expected a split file, found {found}") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: expected UTF-8 text, one 'id<TAB>train|test' per line, found other bytes"
        ) from None
    ids = list(ids)
    sides, problems = _parse(text, ids)
    if problems:
        raise DataError(f"{path}: {counted(len(problems), 'problem')}:{summarise(problems)}")
    return np.array([sides[name] == "test" for name in ids], bool)


def _parse(text: str, ids: list[str]) -> tuple[dict[str, str], list[str]]:
    """(the side of each id, all problems of the file)."""
    known = set(ids)
    sides: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        name, tab, side = line.rpartition("\t")
        if name not in known:
            name = unicodedata.normalize("NFC", name)
        if not line.strip() or (line.startswith("#") and name not in known):
            continue
        if not tab or side.strip() not in ("train", "test"):
            problems.append(f"line {number}: expected 'id<TAB>train|test', found {line!r}")
        elif name not in sides:
            sides[name] = side.strip()
        elif sides[name] == side.strip():
            problems.append(f"line {number}: {name!r} is named twice")
        else:
            problems.append(f"line {number}: {name!r} is in both train and test")
    problems += [f"{name!r} is not in the set" for name in sides if name not in known]
    problems += [f"{name!r} of the set is not named" for name in ids if name not in sides]
    return sides, problems
