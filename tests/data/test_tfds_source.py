"""tensorflow-datasets without TensorFlow, on tiny sets that the test builds as array_record."""

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import urllib.error
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qkd_jax.data.folder import open_folder
from qkd_jax.data.sources import BENCHMARKS, describe, fingerprint, load_split, prepare
from qkd_jax.data.splits import fifth_to_test
from qkd_jax.data.tfds_source import open_tfds
from qkd_jax.errors import DataError

requests = pytest.importorskip("requests")
tfds = pytest.importorskip("tensorflow_datasets")


def at(side):
    """As much of a backbone as an image set reads."""
    return SimpleNamespace(spec=SimpleNamespace(input_size=side))


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
                shown = f"n{label:08d}" if label >= 0 else -1
                example = {"image": jpeg(label, index), "label": shown}
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


class MiniHiddenTest(Mini, skip_registration=True):
    name = "mini_hidden_test"
    parts = {"train": {3: 3, 7: 3}, "test": {-1: 4}, "validation": {3: 2, 7: 2}}  # noqa: RUF012


class MiniHidden(Mini, skip_registration=True):
    name = "mini_hidden"
    parts = {"train": {3: 10, 7: 10}, "test": {-1: 4}}  # noqa: RUF012


class MiniSome(Mini, skip_registration=True):
    name = "mini_some"
    parts = {"train": {-1: 3, 3: 10, 7: 10}}  # noqa: RUF012
    with_names = False


class MiniNone(Mini, skip_registration=True):
    name = "mini_none"
    parts = {"train": {-1: 3}, "test": {3: 2}}  # noqa: RUF012


class MiniRepeated(Mini, skip_registration=True):
    """Each class counts its files from 0, and so does each split."""

    name = "mini_repeated"
    parts = {"train": {3: 3, 7: 3}, "test": {3: 2, 7: 2}}  # noqa: RUF012

    def _examples(self, counts):
        for key, example in super()._examples(counts):
            yield key, example | {"file_name": key.split("/")[1]}


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


class MiniTexts(Mini, skip_registration=True):
    """Texts with a label, as `parts` says; `texts` names their parts."""

    name = "mini_texts"
    parts = {"train": {0: 3, 2: 3}, "test": {0: 2, 2: 2}}  # noqa: RUF012
    texts = ("text",)
    supervised = None

    def _info(self):
        features = {name: tfds.features.Text() for name in self.texts}
        features["label"] = tfds.features.ClassLabel(names=["World", "Sports", "Business", "Sci"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=self.supervised,
        )

    def _examples(self, counts):
        for label, number in counts.items():
            for index in range(number):
                texts = {name: f"{name} Nº {index} von {label} 🐈" for name in self.texts}
                yield f"{label}_{index}", texts | {"label": label}


class MiniPairs(MiniTexts, skip_registration=True):
    name = "mini_pairs"
    texts = ("hypothesis", "premise")


class MiniSupervised(MiniPairs, skip_registration=True):
    name = "mini_supervised"
    supervised = ("premise", "label")


class MiniNews(MiniTexts, skip_registration=True):
    """The features of the set of this name in tensorflow-datasets."""

    name = "ag_news_subset"
    texts = ("description", "title")
    supervised = ("description", "label")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    kinds = (MiniTestOnly, MiniBoth, MiniUneven, MiniLabelless)
    kinds += (MiniHiddenTest, MiniHidden, MiniSome, MiniNone, MiniRepeated)
    kinds += (MiniTexts, MiniPairs, MiniSupervised, MiniNews)
    for kind in kinds:
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
    loaded = train.load(indices, at(8))["image"]
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
    whole = np.concatenate([part.load(range(len(part)), at(8))["image"] for part in own])
    loaded = split.test.load(range(7), at(8))["image"]
    np.testing.assert_array_equal(loaded, whole[1::2])
    np.testing.assert_array_equal(split.test.labels, np.concatenate([p.labels for p in own])[1::2])


def test_classes_must_agree(data):
    with pytest.raises(DataError, match=r"class 'n00000007' is not in test"):
        open_tfds("mini_uneven", data)


def test_a_set_without_images_is_refused(data):
    with pytest.raises(DataError, match=r"expected an image or a text and .* label, found .*text"):
        open_tfds("mini_labelless", data)


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    (tmp_path / "cifar100").mkdir()
    with pytest.raises(DataError) as caught:
        load_split("cifar100", path=tmp_path)
    assert "pip install 'qkd_jax[tfds]'" in str(caught.value)
    assert f"python -m qkd_jax data prepare cifar100 --path {tmp_path}" in str(caught.value)


def test_an_unknown_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="tfds:nonesuch: expected the name of a set"):
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


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "a list"])
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "mini_both-train*"])
def test_a_damaged_file_of_a_set_is_one_error(data, tmp_path, file, damage):
    shutil.copytree(data / "mini_both", tmp_path / "mini_both")
    (path,) = tmp_path.glob(f"mini_both/*/{file}")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        for place in range(len(content) // 3, len(content), 97):
            content[place] ^= 0xFF
    path.write_bytes(
        {"cut": content[: len(content) // 2], "emptied": b"", "a list": b"[[]]"}.get(
            damage, content
        )
    )
    message = "expected (valid JSON|the files of a prepared set)|not prepared|cannot be read"
    with pytest.raises(DataError, match=message):
        split = load_split("tfds:mini_both", path=tmp_path)
        for index in range(len(split.train)):
            split.train.load([index], at(8))


@pytest.mark.parametrize("key", ["pythonClassName", "type"])
def test_no_module_is_imported_because_a_file_of_a_set_names_it(data, tmp_path, monkeypatch, key):
    shutil.copytree(data / "mini_both", tmp_path / "other_set")
    (tmp_path / "trap_module.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (path,) = tmp_path.glob("other_set/*/features.json")
    assert '"pythonClassName"' in path.read_text()
    path.write_text(json.dumps({key: "trap_module.Feature", "content": {}}))
    with pytest.raises(
        DataError, match=r"features\.json: expected features of .*found 'trap_modul"
    ):
        load_split("tfds:other_set", path=tmp_path)


def colour_of(images, index):
    return images.load([index], at(8))["image"][0, 0, 0].astype(int)


def test_a_test_split_without_labels_gives_way_to_validation(data):
    train, test = load_split("tfds:mini_hidden_test", path=data)
    assert train.class_names == test.class_names == ("n00000003", "n00000007")
    assert (len(train), len(test)) == (6, 4) and test.name == "tfds:mini_hidden_test/validation"


def test_a_split_without_labels_is_named(data, tmp_path):
    for name, split, number in (("mini_hidden", "test", 4), ("mini_none", "train", 3)):
        with pytest.raises(DataError) as caught:
            load_split(f"tfds:{name}", path=data)
        message = f"tfds:{name}/{split}: expected images with a label, found none among {number}"
        assert message in str(caught.value) and "label -1: no label" in str(caught.value)
    # What has labels can still be divided by hand.
    ids = [f"n{k:08d}/art_{i}.jpg" for k in (3, 7) for i in range(10)]
    file = tmp_path / "split.tsv"
    file.write_text("".join(f"{name}\t{('train', 'test')[i % 2]}\n" for i, name in enumerate(ids)))
    train, test = load_split("tfds:mini_hidden", path=data, split_file=file)
    assert (len(train), len(test)) == (10, 10)


def test_images_without_a_label_are_left_out_and_counted(data):
    split = load_split("tfds:mini_some", path=data)
    assert split.train.class_names == ("n00000003", "n00000007")
    assert (len(split.train), len(split.test)) == (16, 4)
    assert "(3 without a label left out)" in split.train.name
    for images in split:
        for index, label in enumerate(images.labels.tolist()):
            # JPEG of one colour is exact to a few levels.
            assert abs(colour_of(images, index)[0] - (3, 7)[label]) <= 2


def test_names_that_repeat_are_replaced_by_positions(data, tmp_path):
    train, test = load_split("tfds:mini_repeated", path=data)
    assert sorted(train.ids.tolist()) == [f"train/{i:07d}" for i in range(6)]
    assert sorted(test.ids.tolist()) == [f"test/{i:07d}" for i in range(4)]
    file = tmp_path / "split.tsv"
    ids = [*train.ids.tolist(), *test.ids.tolist()]
    file.write_text("".join(f"{name}\t{('train', 'test')[i % 2]}\n" for i, name in enumerate(ids)))
    joined = load_split("tfds:mini_repeated", path=data, split_file=file)
    whole = np.concatenate([part.load(range(len(part)), at(8))["image"] for part in (train, test)])
    np.testing.assert_array_equal(joined.test.load(range(5), at(8))["image"], whole[1::2])


URL = "https://downloads.invalid/mini.zip"


class MiniDownloaded(Mini):
    name = "mini_downloaded"
    fault = None

    def _split_generators(self, download_manager):
        if self.fault is not None:
            raise self.fault
        archive = download_manager.download(URL)
        with zipfile.ZipFile(archive) as file:
            counts = {3: int(file.read("number"))}
        return {"train": self._examples(counts)}


def url_infos(content=b""):
    digest = hashlib.sha256(content).hexdigest()
    return {
        URL: tfds.core.download.checksums.UrlInfo(
            size=len(content), checksum=digest, filename="mini.zip"
        )
    }


@pytest.mark.parametrize(
    "fault",
    [
        requests.exceptions.ConnectionError("no route"),
        requests.exceptions.ReadTimeout("no answer"),
        urllib.error.URLError("no route"),
        tfds.core.download.util.DownloadError("Failed to get url: 404"),
        ConnectionResetError("reset"),
    ],
)
def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(MiniDownloaded, "fault", fault)
    monkeypatch.setattr(MiniDownloaded, "url_infos", url_infos())
    before = tfds.core.download.downloader.MAX_RETRIES
    with pytest.raises(DataError) as caught:
        prepare("mini_downloaded", tmp_path)
    message = str(caught.value)
    assert message.startswith("tfds:mini_downloaded: cannot download: ") and str(fault) in message
    assert f"mini.zip from {URL}" in message
    assert str(tmp_path / "downloads" / "manual") in message
    assert f"python -m qkd_jax data prepare mini_downloaded --path {tmp_path}" in message
    assert tfds.core.download.downloader.MAX_RETRIES == before


def test_downloads_are_tried_few_times(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        MiniDownloaded,
        "_split_generators",
        lambda self, manager: seen.append(tfds.core.download.downloader.MAX_RETRIES) or {},
    )
    with contextlib.suppress(Exception):
        prepare("mini_downloaded", tmp_path)
    assert seen == [2]


def test_a_full_disk_stays_an_error_of_the_disk(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(MiniDownloaded, "fault", full)
    with pytest.raises(OSError, match="No space left"):
        prepare("mini_downloaded", tmp_path)


def test_an_archive_in_the_manual_folder_is_taken(tmp_path, monkeypatch):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    with zipfile.ZipFile(manual / "mini.zip", "w") as file:
        file.writestr("number", "7")
    monkeypatch.setattr(MiniDownloaded, "url_infos", url_infos((manual / "mini.zip").read_bytes()))
    prepare("mini_downloaded", tmp_path)
    assert sum(map(len, load_split("tfds:mini_downloaded", path=tmp_path))) == 7
    # Another archive of that name is not believed.
    again = tmp_path / "again"
    shutil.copytree(manual, again / "downloads" / "manual")
    monkeypatch.setattr(MiniDownloaded, "url_infos", url_infos(b"another"))
    with pytest.raises(DataError, match=r"cannot download: .*wrong checksum"):
        prepare("mini_downloaded", again)


def test_a_set_of_texts_is_read_with_its_own_splits(data):
    split = load_split("tfds:mini_texts", path=data)
    assert "tensorflow" not in sys.modules
    assert split.train.class_names == split.test.class_names == ("World", "Business")
    assert (len(split.train), len(split.test)) == (6, 4) and split.train.noun == "text"
    for texts in split:
        expected = [f"von {2 * label} 🐈" for label in texts.labels]
        assert [text.split("Nº ")[1][2:] for text in texts.texts] == expected
    assert sorted(split.test.ids.tolist()) == [f"test/{i:07d}" for i in range(4)]


def test_a_split_file_joins_all_texts(data, tmp_path):
    own = load_split("tfds:mini_texts", path=data)
    ids = [*own.train.ids.tolist(), *own.test.ids.tolist()]
    file = tmp_path / "split.tsv"
    file.write_text("".join(f"{name}\t{('train', 'test')[i % 2]}\n" for i, name in enumerate(ids)))
    divided = load_split("tfds:mini_texts", path=data, split_file=file)
    assert divided.test.texts == (*own.train.texts, *own.test.texts)[1::2]


def test_ag_news_is_title_and_description(data):
    split = load_split("ag_news", path=data)
    assert split.train.class_names == ("World", "Business")
    assert "title Nº 0 von 0 🐈 description Nº 0 von 0 🐈" in split.train.texts
    assert tfds.builder_cls("ag_news_subset").name == BENCHMARKS["ag_news"]


def test_of_several_texts_the_supervised_one_is_taken(data):
    assert all(
        "premise" in t and "hyp" not in t for t in open_tfds("mini_supervised", data)[0].texts
    )
    with pytest.raises(DataError, match="of which 2 are texts and none is the supervised one"):
        open_tfds("mini_pairs", data)
