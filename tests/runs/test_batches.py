"""Training batches: every image once, the same again from any step on, padding told."""

from types import SimpleNamespace

import numpy as np

from qkd_jax.data.crops import crop_draws
from qkd_jax.nn.inputs import Raw
from qkd_jax.runs.batches import training_batches
from qkd_jax.settings.config import Config, override


class Images:
    """Ten images; what is loaded of one are its row and the draws of its crop."""

    labels = np.arange(10) + 20

    def __len__(self):
        return 10


def cropped(rows, draws):
    return Raw({"image": np.concatenate([np.asarray(rows)[:, None], draws], axis=1)})


def features_of(*settings, taught=None):
    """As much of `SlotFeatures` as batches need."""
    return SimpleNamespace(
        config=override(Config(), "train.batch_size=4", "seed=3", *settings),
        set=Images(),
        values=100.0 * np.arange(10)[:, None],
        inputs=lambda state, rows: Raw({"image": rows[:, None]}),
        raw=cropped,
        taught=lambda rows: None if taught is None else taught[rows],
    )


def drawn(features, **place):
    return list(training_batches(features, None, **({"task": 1, "epoch": 0} | place)))


def image_of(batch):
    return batch["inputs"].fields["image"]


def test_every_image_comes_once_with_its_own_label():
    batches = drawn(features_of("data.augment=false"))
    assert [images for _, images in batches] == [4, 4, 2]
    rows = np.concatenate([image_of(batch)[batch["mask"], 0] for batch, _ in batches])
    labels = np.concatenate([batch["label"][batch["mask"]] for batch, _ in batches])
    assert sorted(rows.tolist()) == list(range(10)) != rows.tolist()
    np.testing.assert_array_equal(labels, rows + 20)
    assert labels.dtype == np.int32 and "features" not in batches[0][0]


def test_a_stopped_epoch_goes_on_with_the_same_batches():
    features = features_of("data.augment=false")
    whole, rest = drawn(features), drawn(features, start_step=2)
    assert len(rest) == 1 and rest[0][1] == whole[2][1]
    np.testing.assert_array_equal(image_of(rest[0][0]), image_of(whole[2][0]))
    other = drawn(features, epoch=1)
    assert any(
        (a["label"] != b["label"]).any() for (a, _), (b, _) in zip(whole, other, strict=True)
    )


def test_rows_are_padded_for_the_devices_and_only_images_are_counted():
    batches = drawn(features_of("data.augment=false"), padded_to=6)
    assert [(len(b["label"]), int(b["mask"].sum()), n) for b, n in batches] == [
        *((6, 4, 4), (6, 4, 4), (6, 2, 2))
    ]


def test_crops_follow_from_seed_task_epoch_and_image():
    for batch, _ in drawn(features_of("data.augment=true"), epoch=2):
        rows = image_of(batch)[:, 0].astype(int)
        expected = crop_draws(rows, seed=3, task=1, epoch=2)
        np.testing.assert_array_equal(image_of(batch)[:, 1:], expected)


def test_features_come_with_their_images():
    batches = drawn(features_of("data.augment=false"), with_features=True)
    for batch, _ in batches:
        assert batch.keys() == {"inputs", "features", "label", "mask"}
        np.testing.assert_array_equal(batch["features"][:, 0], 100.0 * (batch["label"] - 20))


def test_what_a_teacher_said_comes_with_its_images_unless_they_are_varied():
    said = -1.0 * np.arange(10)
    for batch, _ in drawn(features_of("data.augment=false", taught=said)):
        np.testing.assert_array_equal(batch["teacher"], 20.0 - batch["label"])
    for batch, _ in drawn(features_of("data.augment=true", taught=said)):
        assert "teacher" not in batch
