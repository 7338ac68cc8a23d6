"""Sets compared by content, and a check that every example can be read.

The content of an example is its bytes as they are stored, without its place and name. So data that
was moved is the same data, and other pixels or words under the same names are not.
"""

import concurrent.futures
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qkd_jax.data.examples import Examples, Split, counted
from qkd_jax.data.splits import summarise
from qkd_jax.errors import DataError

DIGEST_BYTES = 16
Advance = Callable[[int], None]  # called with the number of examples done since the last call


class Contents(NamedTuple):
    """The contents of one set, in its order.

    Attributes:
      ids: str [N].
      labels: int32 [N].
      digests: uint8 [N, 16], the first half of the sha256 of each stored example.
    """

    ids: np.ndarray
    labels: np.ndarray
    digests: np.ndarray

    def take(self, rows: np.ndarray) -> "Contents":
        """The examples at `rows`, indices or a mask."""
        return Contents(*(field[rows] for field in self))

    def keys(self) -> list[tuple[int, bytes]]:
        """(label, digest) of each example, by which sets are compared."""
        return [(int(k), d.tobytes()) for k, d in zip(self.labels, self.digests, strict=True)]


class SplitContents(NamedTuple):
    """The contents of both sides of a split, and its class names."""

    train: Contents
    test: Contents
    class_names: tuple[str, ...]

    def digests_of(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, 16] for each side of a split of these examples, also where some of them
        stand on the other side than here.
        """
        sides = [dict(zip(s.ids.tolist(), s.digests, strict=True)) for s in (self.train, self.test)]
        known = (sides[1] | sides[0], sides[0] | sides[1])  # of an id on both sides, the own one
        train, test = (
            np.array([digests[text] for text in examples.ids.tolist()], np.uint8).reshape(
                -1, DIGEST_BYTES
            )
            for digests, examples in zip(known, split, strict=True)
        )
        return train, test

    def sha256(self) -> str:
        """One fingerprint of everything, which does not depend on the order of the examples."""
        digest = hashlib.sha256(repr(self.class_names).encode("utf-8", "surrogatepass"))
        for side in (self.train, self.test):
            digest.update(len(side.labels).to_bytes(8, "big"))
            for label, content in sorted(side.keys()):
                digest.update(label.to_bytes(4, "big") + content)
        return digest.hexdigest()


def ignore(count: int) -> None:
    """An `Advance` that shows nothing."""


def read_contents(split: Split, advance: Advance = ignore) -> SplitContents:
    """Reads the stored bytes of every example, without decoding them.

    Raises:
      DataError: examples that cannot be read; shows the first ten, and the number of all.
    """
    sides = []
    for examples in split:
        digests = np.zeros((len(examples), DIGEST_BYTES), np.uint8)
        problems = []
        for index, found in enumerate(_digests(examples, examples.stored, advance)):
            if isinstance(found, bytes):
                digests[index] = np.frombuffer(found[:DIGEST_BYTES], np.uint8)
            else:
                problems.append(found)
        _refuse(problems, examples.noun)
        sides.append(Contents(examples.ids, examples.labels, digests))
    return SplitContents(*sides, split.train.class_names)


class Repeated(NamedTuple):
    """Groups of examples that look the same to a learner, even if they are stored differently; an
    entry names one group.

    Attributes:
      leaked: groups with examples on both sides, which are both trained and tested on.
      copies: the other groups.
    """

    leaked: list[list[str]]
    copies: list[list[str]]


def verify(split: Split, advance: Advance = ignore) -> Repeated:
    """Decodes every example; returns those that occur more than once.

    Raises:
      DataError: examples that cannot be read; shows the first ten, and the number of all.
    """
    problems: list[str] = []
    same: dict[bytes, list[tuple[int, str]]] = defaultdict(list)
    for side, examples in enumerate(split):
        for index, found in enumerate(_digests(examples, examples.seen, advance)):
            if isinstance(found, bytes):
                same[found].append((side, f"{examples.name}: {examples.ids[index]}"))
            else:
                problems.append(found)
    _refuse(problems, split.train.noun)
    repeated = Repeated([], [])
    for group in same.values():
        names = [name for _, name in group]
        if len({side for side, _ in group}) == 2:
            repeated.leaked.append(names)
        elif len(group) > 1:
            repeated.copies.append(names)
    return repeated


def told_leaks(leaked: list[list[str]], examples: Examples) -> str:
    """One sentence about the groups of `Repeated.leaked`, and the first ten of them; `examples`:
    one of the two sets.
    """
    groups = [" = ".join(group) for group in leaked]
    what = f"{counted(len(leaked), examples.noun)} {'is' if len(leaked) == 1 else 'are'}"
    return f"{what} both trained and tested on (the same {examples.substance}):{summarise(groups)}"


def told_cut(cut: Sequence[int], split: Split, size: int) -> str:
    """One sentence about the texts of each side that are longer than `size` tokens."""
    train, test = (f"{n} of {len(part)}" for n, part in zip(cut, split, strict=True))
    return (
        f"{train} {split.train.noun}s to train on and {test} to test on are longer than {size} "
        "tokens and are cut; --set backbone.num_tokens=N reads more"
    )


def joined(split: SplitContents) -> Contents:
    """The contents of both sides as one, the training side first."""
    pairs = zip(split.train, split.test, strict=True)
    return Contents(*(np.concatenate(pair) for pair in pairs))


def rows_of(then: Contents, now: Contents) -> tuple[np.ndarray, list[str]]:
    """Finds the examples of an earlier reading in a newer one, by label and content.

    Returns:
      (rows int64 [N] of `now` for each example of `then`, -1 where it is gone; the ids of `now`
      that are new). Among copies of one example, the one with the same id is taken first, then the
      others in order.
    """
    places: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for row, key in enumerate(now.keys()):
        places[key].append(row)
    keys, here = then.keys(), now.ids.tolist()
    rows = np.full(len(keys), -1, np.int64)
    for index, (key, name) in enumerate(zip(keys, then.ids.tolist(), strict=True)):
        same = [row for row in places[key] if here[row] == name]
        if same:
            rows[index] = same[0]
            places[key].remove(same[0])
    for index in np.flatnonzero(rows < 0):
        if places[keys[index]]:
            rows[index] = places[keys[index]].pop(0)
    return rows, [here[row] for row in sorted(row for left in places.values() for row in left)]


def arrays_of(contents: SplitContents) -> dict[str, np.ndarray]:
    """The contents as arrays to store; `contents_of` is the inverse."""
    return {
        f"{side}_{name}": array
        for side in ("train", "test")
        for name, array in getattr(contents, side)._asdict().items()
    } | {"class_names": np.array(contents.class_names, str)}


# What `arrays_of` gives: kinds of dtype and number of axes, as `qkd_jax.npz.read_npz` takes them.
FIELDS = {
    f"{side}_{name}": form
    for side in ("train", "test")
    for name, form in (("ids", ("U", 1)), ("labels", ("i", 1)), ("digests", ("u", 2)))
} | {"class_names": ("U", 1)}


def contents_of(arrays: dict[str, np.ndarray]) -> SplitContents:
    """The contents that `arrays_of` gave, from arrays of these `FIELDS`.

    Raises:
      DataError: lengths that differ, or labels of no class.
    """
    sides = []
    for side in ("train", "test"):
        ids, labels, digests = (arrays[f"{side}_{name}"] for name in Contents._fields)
        size = len(arrays["class_names"])
        if len(ids) != len(labels) or digests.shape != (len(ids), DIGEST_BYTES):
            raise DataError(
                f"expected as many ids, labels and digests of {DIGEST_BYTES} bytes, found "
                f"{len(ids)}, {len(labels)} and {list(digests.shape)}"
            )
        if ((labels < 0) | (labels >= size)).any() or digests.dtype != np.uint8:
            raise DataError(f"expected labels of {size} classes and digests in bytes, found others")
        sides.append(Contents(ids, labels, digests))
    return SplitContents(*sides, tuple(arrays["class_names"].tolist()))


def _digests(
    examples: Examples, read: Callable[[int], bytes], advance: Advance
) -> Iterator[bytes | str]:
    """sha256 of what `read` gives of every example, in a pool of threads; an error gives its
    text.
    """

    def one(index: int) -> bytes | str:
        try:
            return hashlib.sha256(read(index)).digest()
        except DataError as error:
            return str(error)
        except OSError as error:
            name = f"{examples.name}: {examples.ids[index]}"
            return f"{name}: cannot be read ({error.strerror or error})"

    # After Ctrl-C, closing the iterator of `map` cancels the remaining examples.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(one, range(len(examples))):
            advance(1)
            yield found


def _refuse(problems: list[str], noun: str) -> None:
    if problems:
        raise DataError(f"{counted(len(problems), noun)} cannot be read:{summarise(problems)}")
