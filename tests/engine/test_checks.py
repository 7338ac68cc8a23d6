"""What the verbs take: one contract for training, ending, beginning and predicting, whoever made
the arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.engine.checks import check_batch
from qkd_jax.errors import DataError, ProtocolError

pytestmark = pytest.mark.floor


@pytest.fixture(scope="module")
def surveying(tiny):
    """A state whose method looks at the images before training."""
    return qkd_jax.init_state(jax.random.key(0), tiny.backbone, tiny.config("method=inflora"))


def images_of(change):
    """Good images [4, 8, 8, 3], spoiled."""
    image = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    return change(image)


def with_pixel(value):
    def change(image):
        image[2, 0, 0, 0] = value
        return image

    return change


BAD_IMAGES = {
    "no channels": (lambda x: x[..., 0], "[B, 8, 8, 3]"),
    "four channels": (lambda x: x[..., [0, 1, 2, 2]], "[B, 8, 8, 3]"),
    "wrong size": (lambda x: x[:, :6], "backbone.image_size=8"),
    "channels first": (lambda x: x.transpose(0, 3, 1, 2), "[B, 8, 8, 3]"),
    "one image alone": (lambda x: x[0], "[B, 8, 8, 3]"),
    "no image": (lambda x: x[:0], "at least one image"),
    "a list": (lambda x: x.tolist(), ", found list"),
    "int32": (lambda x: (255 * x).astype(np.int32), "uint8 or floats in [0, 1], found int32"),
    "uint16": (lambda x: (65535 * x).astype(np.uint16), "found uint16"),
    "int8": (lambda x: (127 * x).astype(np.int8), "found int8"),
    "bool": (lambda x: x > 0.5, "found bool"),
    "complex": (lambda x: x.astype(np.complex64), "found complex64"),
    "0 to 255": (lambda x: 255 * x, "floats in [0, 1], found"),
    "normalised": (lambda x: (x - 0.45) / 0.22, "do not normalise"),
    "a single pixel above": (with_pixel(1.01), "found"),
    "a single pixel below": (with_pixel(-0.01), "in image 2 of the batch"),
    "NaN": (with_pixel(np.nan), "found NaN or infinite ones in image 2 of the batch"),
    "infinite": (with_pixel(-np.inf), "found NaN or infinite ones in image 2 of the batch"),
    "float16 above": (lambda x: (2 * x).astype(np.float16), "floats in [0, 1], found"),
    "bfloat16 NaN": (lambda x: with_pixel(np.nan)(x).astype(jnp.bfloat16), "found NaN"),
}


def arrays_as(kind, images):
    return jnp.asarray(images) if kind == "jax" and not isinstance(images, list) else images


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_all_verbs_refuse_the_same_images_in_the_same_words(tiny, begun, surveying, case, kind):
    change, words = BAD_IMAGES[case]
    images = arrays_as(kind, images_of(change))
    batch = {"image": images, "label": np.resize(tiny.tasks[0].classes, len(images))}
    verbs = {
        "train_task": lambda: qkd_jax.train_task(begun, batch),
        "end_task": lambda: qkd_jax.end_task(begun, [batch]),
        "begin_task": lambda: qkd_jax.begin_task(surveying, tiny.tasks[0], 0, [batch]),
        "predict": lambda: qkd_jax.predict(begun, images),
    }
    for verb, call in verbs.items():
        with pytest.raises(DataError) as caught:
            call()
        assert words in str(caught.value), verb
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32"])
def test_what_is_promised_is_taken(tiny, begun, dtype, kind):
    """The whole range, its ends and the rounding of a resize included."""
    image = np.linspace(0, 1, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3)
    image = np.round(255 * image) if dtype == "uint8" else image + 5e-4
    image = arrays_as(kind, image.astype(jnp.dtype(dtype)))
    label = np.resize(tiny.tasks[0].classes, 4)
    state, metrics = qkd_jax.train_task(tiny.copy(begun), {"image": image, "label": label})
    assert np.isfinite(metrics["loss"])
    assert qkd_jax.predict(state, image).shape == (4, 7)


BAD_FIELDS = {
    "no image": (lambda b: {"label": b["label"]}, "expected 'image' and 'label', found ['label']"),
    "no label": (lambda b: {"image": b["image"]}, "found ['image']"),
    "foreign label": (lambda b: {**b, "label": np.array([4, 1, 2, 4])}, "found [2]"),
    "label -1": (lambda b: {**b, "label": np.array([4, 1, -1, 4])}, "found [-1]"),
    "fewer labels": (lambda b: {**b, "label": b["label"][:3]}, "shape [4], found [3]"),
    "float labels": (lambda b: {**b, "label": b["label"] * 1.0}, "whole numbers, found float"),
    "one-hot labels": (lambda b: {**b, "label": np.eye(4, dtype=int)}, "shape [4], found [4, 4]"),
    "short mask": (lambda b: {**b, "mask": np.ones(3, bool)}, "mask: expected bool [4]"),
    "number mask": (lambda b: {**b, "mask": np.ones(4)}, "mask: expected bool"),
    "only padding": (lambda b: {**b, "mask": np.zeros(4, bool)}, "at least one image"),
    "ragged labels": (lambda b: {**b, "label": [[4], [1, 4], [1], [4]]}, "expected an array"),
    "listed features": (lambda b: {**b, "features": [1, 2]}, "features: expected [4,"),
    "odd names": (lambda b: {b"image": b["image"], 1: 2}, "expected 'image' and 'label', found"),
    "short features": (lambda b: {**b, "features": np.ones((3, 4, 12))}, "features: expected [4,"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_training_and_ending_refuse_the_same_batches(tiny, begun, case):
    change, words = BAD_FIELDS[case]
    batch = change(tiny.batch(tiny.tasks[0]))
    for call in (
        lambda: qkd_jax.train_task(begun, batch),
        lambda: qkd_jax.end_task(begun, [batch]),
    ):
        with pytest.raises(DataError) as caught:
            call()
        assert words in str(caught.value)


def test_what_is_no_list_of_batches(tiny, begun):
    for batches in (tiny.batch(tiny.tasks[0]), None, 3):
        with pytest.raises(DataError, match="expected a list or iterator of batches, found"):
            qkd_jax.end_task(begun, batches)
    with pytest.raises(DataError, match="expected a dict with 'image' and 'label', found str"):
        qkd_jax.end_task(begun, ["image"])


def test_other_byte_orders_and_widths_are_the_same_numbers(tiny, begun):
    """As files hold them (IDX labels are big-endian); jax itself takes none of them."""
    batch = tiny.batch(tiny.tasks[0])
    expected = qkd_jax.train_task(tiny.copy(begun), batch)[1]["loss"]
    for image, label in (
        (batch["image"].astype(">f4"), batch["label"].astype(">i4")),
        (batch["image"].astype(np.longdouble), batch["label"].astype(np.uint8)),
        (jnp.asarray(batch["image"]), batch["label"].tolist()),
    ):
        given = {"image": image, "label": label, "id": ["a", "b", "c", "d"]}
        assert qkd_jax.train_task(tiny.copy(begun), given)[1]["loss"] == expected
        np.testing.assert_array_equal(
            qkd_jax.predict(begun, image), qkd_jax.predict(begun, batch["image"])
        )


@pytest.mark.parametrize("num_steps", [-1, 2.5, "3", True])
def test_the_length_of_a_schedule_is_a_whole_number(tiny, fresh, num_steps):
    with pytest.raises(ProtocolError, match="num_steps: expected"):
        qkd_jax.begin_task(fresh, tiny.tasks[0], num_steps)


def test_classes_are_whole_numbers(fresh):
    with pytest.raises(ProtocolError, match="a task's class: expected a whole number"):
        qkd_jax.begin_task(fresh, qkd_jax.Task(0, ("4", 1.0)))


def test_steps_are_checked_one_by_one_and_only_in_training(tiny, begun):
    good = tiny.batch(tiny.tasks[0])
    steps = {name: np.stack([value] * 2) for name, value in good.items()}
    check_batch(begun, steps, of_steps=True)
    with pytest.raises(DataError, match=r"expected \[B, 8, 8, 3\] .* found \[2, 4, 8, 8, 3\]"):
        qkd_jax.end_task(begun, [steps])
    for change, words in (
        (("label", (1, 3), 6), r"found \[6\]"),
        (("image", (1, 2), 7.0), r"image \[1, 2\] of the batch"),
    ):
        name, place, value = change
        spoiled = {key: array.copy() for key, array in steps.items()}
        spoiled[name][place] = value
        with pytest.raises(DataError, match=words):
            qkd_jax.train_task(begun, spoiled)
    mask = np.ones((2, 4), bool)
    mask[1] = False
    with pytest.raises(DataError, match="found only padding"):
        qkd_jax.train_task(begun, {**steps, "mask": mask})


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_padding_may_hold_foreign_labels_and_any_pixel(tiny, begun, kind):
    batch = tiny.batch(tiny.tasks[0])
    mask = np.array([True, True, True, False])
    for value in (np.nan, 255.0, -1.0):
        batch["image"][3], batch["label"][3] = value, 99
        check_batch(begun, {**batch, "image": arrays_as(kind, batch["image"]), "mask": mask})


def test_before_the_first_task(tiny, fresh):
    batch = tiny.batch(tiny.tasks[0])
    for call in (
        lambda: qkd_jax.train_task(fresh, batch),
        lambda: qkd_jax.end_task(fresh, [batch]),
    ):
        with pytest.raises(ProtocolError, match="no task has begun: call begin_task first"):
            call()


def test_predict_can_be_traced(tiny, begun):
    """Inside a user's own jit there are no values to look at; shapes are checked all the same."""
    images = tiny.batch(tiny.tasks[0])["image"]
    predict = jax.jit(lambda x: qkd_jax.predict(begun, x))
    # One program or three: float32 sums of a dozen numbers in another order.
    np.testing.assert_allclose(
        predict(images), qkd_jax.predict(begun, images), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(DataError, match=r"backbone\.image_size=8"):
        predict(images[:, :6])
