"""tensorflow-datasets without TensorFlow, on tiny sets that the test builds as array_record."""

import importlib.util
import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.folder import open_folder
from qkd_jax.data.sources import BENCHMARKS, describe, fingerprint, load_split, prepare
from qkd_jax.data.splits import fifth_to_test
from qkd_jax.data.tfds_source import open_tfds
from qkd_jax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")

CLASSES = {3: 10, 500: 25, 999: 12}  # label: images, as ImageNet-R a few of 1000 declared classes
SIZE = (12, 9)


def jpeg(label, index):
    file = io.BytesIO()
    Image.new("RGB", SIZE, (label % 256, 5 * index, 40)).save(file, "JPEG", quality=95)
    file.seek(0)
    return file


class Mini(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the tiny sets: `parts` maps a split to the images of each label."""

    VERSION = tfds.core.Version("1.0.0")
    parts = ()
    with_names = True

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=[f"n{k:08d}" for k in range(1000)]),
        }
        if self.with_names:
            features["file_name"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, download_manager):
        return {split: self._examples(counts) for split, counts in self.parts.items()}

    def _generate_examples(self):
        raise NotImplementedError

    def _examples(self, counts):
        for label, number in counts.items():
            for index in range(number):
                name = f"n{label:08d}/art_{index}.jpg"
                example = {"image": jpeg(label, index), "label": f"n{label:08d}"}
                yield name, example | ({"file_name": name} if self.with_names else {})


class MiniTestOnly(Mini, skip_registration=True):
    name = "mini_test_only"
    parts = {"test": CLASSES}  # noqa: RUF012


class MiniBoth(Mini, skip_registration=True):
    name = "mini_both"
    parts = {"train": {3: 4, 7: 5}, "test": {3: 2, 7: 3}}  # noqa: RUF012
    with_names = False


class MiniUneven(Mini, skip_registration=True):
    name = "mini_uneven"
    parts = {"train": {3: 4, 7: 5}, "test": {3: 2}}  # noqa: RUF012


class MiniPrepared(Mini):
    name = "mini_prepared"
    parts = {"train": {3: 2, 7: 2}, "test": {3: 1, 7: 1}}  # noqa: RUF012


class MiniLabelless(Mini, skip_registration=True):
    name = "mini_labelless"

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._texts()}

    def _texts(self):
        yield "a", {"text": "b"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for kind in (MiniTestOnly, MiniBoth, MiniUneven, MiniLabelless):
        kind(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_test_only_set_is_renumbered_and_split_by_the_rule(data):
    split = load_split("tfds:mini_test_only", path=data)
    assert "tensorflow" not in sys.modules
    assert (
        split.train.class_names == split.test.class_names == ("n00000003", "n00000500", "n00000999")
    )
    assert np.bincount(split.test.labels).sum() == sum(CLASSES.values()) // 5
    for images in split:
        assert images.labels.dtype == np.int32
        names = [images.class_names[label] for label in images.labels]
        assert names == [name.split("/")[0] for name in images.ids.tolist()]
    ids = [f"n{k:08d}/art_{i}.jpg" for k, number in CLASSES.items() for i in range(number)]
    labels = np.repeat(np.arange(3), list(CLASSES.values()))
    tested = {name for name, test in zip(ids, fifth_to_test(ids, labels), strict=True) if test}
    assert set(split.test.ids.tolist()) == tested
    assert set(split.train.ids.tolist()) == set(ids) - tested


def test_images_belong_to_their_ids(data):
    train = load_split("tfds:mini_test_only", path=data).train
    indices = [5, 0, 30]
    loaded = train.load(indices, 8)
    for image, name in zip(loaded, train.ids[indices], strict=True):
        label, index = int(name[1:9]), int(name.split("_")[1][:-4])
        # JPEG of one colour is exact to a few levels.
        assert np.abs(image.astype(int) - [label % 256, 5 * index, 40]).max() <= 4


def test_the_same_split_from_a_folder_and_from_tfds(data, tmp_path):
    for label, number in CLASSES.items():
        for index in range(number):
            file = tmp_path / f"n{label:08d}" / f"art_{index}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(jpeg(label, index).read())
    folder = load_split("imagenet_r", path=tmp_path)
    prepared = load_split("tfds:mini_test_only", path=data)
    assert fingerprint(folder) == fingerprint(prepared)
    assert fingerprint(folder) in describe(prepared)
    assert "38 train and 9 test images of 3 classes" in describe(prepared)
    # The same division made into folders has the same fingerprint.
    divided = tmp_path / "divided"
    for part, images in zip(("train", "test"), folder, strict=True):
        for name in images.ids.tolist():
            file = divided / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((tmp_path / name).read_bytes())
    assert fingerprint(open_folder(divided)) == fingerprint(folder)


def test_own_splits_are_used(data):
    train, test = open_tfds("mini_both", data)
    assert (len(train), len(test)) == (9, 5)
    assert np.bincount(train.labels).tolist() == [4, 5]
    assert sorted(test.ids.tolist()) == [f"test/{index:07d}" for index in range(5)]


def test_a_split_file_joins_all_images(data, tmp_path):
    ids = [*(f"train/{i:07d}" for i in range(9)), *(f"test/{i:07d}" for i in range(5))]
    file = tmp_path / "split.tsv"
    file.write_text("".join(f"{name}\t{('train', 'test')[i % 2]}\n" for i, name in enumerate(ids)))
    split = load_split("tfds:mini_both", path=data, split_file=file)
    assert split.train.ids.tolist() == ids[::2] and split.test.ids.tolist() == ids[1::2]
    own = open_tfds("mini_both", data)
    whole = np.concatenate([part.load(range(len(part)), 8) for part in own])
    loaded = split.test.load(range(7), 8)
    np.testing.assert_array_equal(loaded, whole[1::2])
    np.testing.assert_array_equal(split.test.labels, np.concatenate([p.labels for p in own])[1::2])


def test_classes_must_agree(data):
    with pytest.raises(DataError, match=r"class 'n00000007' is not in test"):
        open_tfds("mini_uneven", data)


def test_a_set_without_images_is_refused(data):
    with pytest.raises(DataError, match=r"needs an image and a class label, found .*text"):
        open_tfds("mini_labelless", data)


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    (tmp_path / "cifar100").mkdir()
    with pytest.raises(DataError) as caught:
        load_split("cifar100", path=tmp_path)
    assert "pip install 'qkd_jax[tfds]'" in str(caught.value)
    assert f"python -m qkd_jax data prepare cifar100 --path {tmp_path}" in str(caught.value)


def test_an_unknown_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="tfds:nonesuch: tensorflow-datasets has no set"):
        load_split("tfds:nonesuch", path=tmp_path)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS.values() if name])
def test_benchmarks_exist_in_tensorflow_datasets(name):
    assert tfds.builder_cls(name).name == name


def test_prepare_writes_what_is_read(tmp_path):
    folder = prepare("mini_prepared", tmp_path)
    assert list(folder.glob("*.array_record*"))
    train, test = load_split("tfds:mini_prepared", path=tmp_path)
    assert (len(train), len(test)) == (4, 2)


class MiniStock(Mini):
    """Reads files through TensorFlow, as the builders of tensorflow-datasets do."""

    name = "mini_stock"
    parts = {"train": {3: 1}}  # noqa: RUF012

    def _examples(self, counts):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

        tensorflow.io.gfile.listdir(".")
        yield from super()._examples(counts)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
)
def test_prepare_of_a_stock_set_names_what_is_missing(tmp_path):
    with pytest.raises(DataError) as caught:
        prepare("mini_stock", tmp_path)
    message = str(caught.value)
    assert "preparing needs TensorFlow once (No module named 'tensorflow')" in message
    assert "pip install 'qkd_jax[tfds]'" in message
    with pytest.raises(DataError, match="mini_stock is not prepared"):
        load_split("tfds:mini_stock", path=tmp_path)


def test_another_file_format_is_named(data, tmp_path):
    shutil.copytree(data / "mini_both", tmp_path / "mini_both")
    (info,) = tmp_path.glob("mini_both/*/dataset_info.json")
    text = info.read_text()
    assert "array_record" in text
    info.write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="is prepared in another format"):
        load_split("tfds:mini_both", path=tmp_path)
