"""What runs share on disk: found by content, whole or computed again, and bounded."""

import os
import shutil
import zlib

import jax
import numpy as np
import pytest

from qkd_jax.runs import evaluation, slot_features
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.runs.store import Store
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone

LIKE = {
    "a": jax.ShapeDtypeStruct((1, 2, 3), np.float32),
    "b": jax.ShapeDtypeStruct((1, 5), np.int32),
}
ROW_BYTES = 6 * 4 + 5 * 4 + 4


def digests(*numbers):
    return np.array([[number] * 16 for number in numbers], np.uint8)


class Source:
    """Computes rows from the digests of inputs, and remembers which."""

    def __init__(self, inputs):
        self.inputs, self.asked = inputs, []

    def __call__(self, positions):
        numbers = self.inputs[positions, 0]
        self.asked += numbers.tolist()
        ones = np.ones((len(numbers), 2, 3), np.float32)
        return {"a": numbers[:, None, None] * ones, "b": np.repeat(numbers[:, None], 5, 1)}


def read(shelf, *numbers):
    """(what is found, which inputs had to be computed)."""
    inputs = digests(*numbers)
    source = Source(inputs)
    found = shelf.rows(inputs, LIKE, source)
    for name in ("a", "b"):
        assert found[name].dtype == LIKE[name].dtype
        assert found[name].reshape(len(numbers), -1).tolist() == [
            [number] * found[name][0].size for number in numbers
        ]
    return source.asked


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, 2**20, "weights")


def test_a_row_is_computed_once_for_all(store):
    assert read(store.shelf("stem", 1), 3, 1, 2) == [3, 1, 2]
    again = Store(store.folder, store.limit, "weights").shelf("stem", 1)
    assert read(again, 2, 3) == []
    assert read(again, 4, 1) == [4]


@pytest.mark.parametrize("backbone, what", [("others", ("stem", 1)), ("weights", ("stem", 2))])
def test_what_follows_from_something_else_is_elsewhere(store, backbone, what):
    read(store.shelf("stem", 1), 1)
    other = Store(store.folder, store.limit, backbone).shelf(*what)
    assert read(other, 1) == [1]


@pytest.mark.parametrize("damage", ["cut", "changed", "longer", "gone"])
def test_a_damaged_row_is_computed_and_written_again(store, damage):
    shelf = store.shelf("stem", 1)
    read(shelf, 1, 2)
    path = shelf.folder / digests(1)[0].tobytes().hex()
    content = path.read_bytes()
    assert len(content) == ROW_BYTES and zlib.crc32(content[:-4]).to_bytes(4, "big") == content[-4:]
    if damage == "gone":
        path.unlink()
    else:
        wrong = {"cut": content[:-7], "longer": content + b"x"}
        path.write_bytes(wrong.get(damage, bytes([content[0] ^ 1]) + content[1:]))
    assert read(store.shelf("stem", 1), 1, 2) == [1]
    assert path.read_bytes() == content


def test_it_stays_below_its_limit_and_old_folders_go_first(tmp_path):
    store = Store(tmp_path, 8 * ROW_BYTES, "weights")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_bytes(b"0" * 9 * ROW_BYTES)
    os.utime(tmp_path / "thesis", (0, 0))
    for age, name in enumerate(("oldest", "older", "new")):
        shelf = store.shelf(name)
        read(shelf, *range(3))
        os.utime(shelf.folder, (age, age))
    # Nine rows would be too many: there were six when the last folder was made.
    left = {name for name in ("oldest", "older", "new") if store.shelf(name).folder.exists()}
    assert left == {"older", "new"}
    full = store.shelf("full")
    assert read(full, *range(20)) == list(range(20))  # all are computed, some are kept
    assert (tmp_path / "thesis" / "chapter").exists()  # not the store's
    shutil.rmtree(tmp_path / "thesis")
    held = sum(file.stat().st_size for folder in tmp_path.iterdir() for file in folder.iterdir())
    assert 0 < held <= store.limit
    assert not [file for file in full.folder.iterdir() if file.name.startswith(".")]


def test_where_nothing_can_be_written_everything_is_computed(tmp_path):
    (tmp_path / "file").write_text("in the way")
    shelf = Store(tmp_path / "file", 2**20, "weights").shelf("stem")
    assert read(shelf, 1, 2) == [1, 2]
    assert read(shelf, 1, 2) == [1, 2]


@pytest.fixture
def ends(compiled, tmp_path, monkeypatch):
    """What a run says and predicts, and which features it asked the engine for."""
    from qkd_jax.engine.engine import Engine

    monkeypatch.setenv("QKD_JAX_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(evaluation, "INFERENCE_SECONDS", 1e9)  # the whole test set is timed
    backbone = load_backbone("tiny_random", image_size=32)
    asked, shared, frozen = [], Engine.shared, Engine.frozen_feature

    def counted_frozen(self, state, inputs):
        asked.append("frozen")
        return frozen(self, state, inputs)

    def counted_shared(self, state, inputs):
        asked.append("shared")
        return shared(self, state, inputs)

    monkeypatch.setattr(Engine, "frozen_feature", counted_frozen)
    monkeypatch.setattr(Engine, "shared", counted_shared)

    def ends(name, method, **settings):
        asked.clear()
        config = override(
            load_experiment("smoke").get_config(method),
            *(f"{key.replace('__', '.')}={value}" for key, value in settings.items()),
        )
        summary = run(config, backbone, tmp_path / name)
        kept = ("average_accuracy", "extracted_features", "nll", "kept_bytes")
        folder = run_folder(tmp_path / name, config)
        predicted = [path.read_bytes() for path in sorted(folder.glob("predictions/*.npz"))]
        assert len(predicted) == 3
        return ({key: summary[key] for key in kept}, predicted), list(asked)

    return ends


def test_a_second_run_computes_no_frozen_feature_and_ends_the_same(ends):
    """Another method, which shares what the frozen model says of each image. All that is predicted
    is the same to the last byte.
    """
    first, computed = ends("first", "simplecil")
    second, computed_again = ends("second", "simplecil")
    # What is left are the passes whose speed is measured when a run ends.
    timed = len(computed_again)
    assert second == first and 0 < timed < len(computed)
    alone, everything = ends("alone", "aper", data__store_gib=0)
    shares, fewer = ends("shares", "aper")
    assert shares == alone
    assert fewer.count("frozen") == timed < everything.count("frozen")


@pytest.mark.slow
def test_a_second_run_computes_no_stem_and_ends_the_same(ends, monkeypatch):
    """The stem of block 0 is the same for all methods with adapters from there on."""
    ends("first", "aper")
    alone, everything = ends("qkd alone", "qkd", data__store_gib=0)
    shares, fewer = ends("qkd shares", "qkd")
    assert shares == alone
    assert 0 < fewer.count("shared") < everything.count("shared")
    # A set that does not fit in memory is read from the disk, or computed in every pass.
    monkeypatch.setattr(slot_features, "KEEP_BYTES", 0)
    shares, again = ends("large qkd shares", "qkd")
    assert shares == alone
    assert again.count("shared") == fewer.count("shared")
    shares, again = ends("large qkd", "qkd", data__store_gib=0)
    assert shares == alone
    assert again.count("shared") > everything.count("shared")
