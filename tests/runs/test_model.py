"""A run's model against the public verbs, and where its copies lie."""

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.data.image_set import from_arrays
from qkd_jax.data.text_set import TextSet
from qkd_jax.errors import ConfigError
from qkd_jax.runs.model import Model


@pytest.fixture(scope="module")
def images(tiny):
    batches = [tiny.batch(task, size=6) for task in tiny.tasks[:2]]
    pixels = np.concatenate([np.uint8(255 * np.clip(b["image"], 0, 1)) for b in batches])
    labels = np.concatenate([b["label"] for b in batches])
    return from_arrays(pixels, labels, [f"class {n}" for n in range(7)], name="noise")


def learned(tiny, images, *settings):
    """Two tasks without optimisation steps, and the features of all images."""
    config = tiny.config(*settings, "train.devices=1", "train.eval_batch_size=5")
    model = Model.new(config, tiny.backbone)
    everything = model.features_of(images)
    for task in tiny.tasks[:2]:
        features = model.features_of(
            images.take(np.flatnonzero(np.isin(images.labels, task.classes)))
        )
        model.open(task, 0, features)
        model.freeze(features)
        slots = model.learner.slots.at_end(task.index)
        features.fill(model.everywhere, slots, task.classes)
        model.finish(features)
    everything.fill(model.everywhere, model.slots_read(1), range(7))
    return model, everything


@pytest.mark.parametrize(
    "settings",
    [
        ("method=inflora",),
        pytest.param(("method=qkd", "fusion.kind=routed"), marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_predict(tiny, images, settings):
    """From slot features and from images; float32 sums of other batches, 1e-5 of scores near 5."""
    model, features = learned(tiny, images, *settings)
    rows = np.arange(len(images))[::-1]
    batches = [(np.asarray(s)[m], m.sum()) for s, _, m in model.scores(features, rows)]
    assert [count for _, count in batches] == [5, 5, 2]
    found = np.concatenate([scores for scores, _ in batches])
    pixels = images.load(rows, tiny.backbone)
    expected = np.asarray(qkd_jax.predict(model.state, pixels))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.isfinite(found[:, [0, 1, 4]]).all() and (found[:, [2, 3]] == -np.inf).all()


def test_a_backbone_of_another_kind_of_data_is_refused(tiny):
    texts = TextSet("texts", np.array([0]), np.array(["a"]), ("x",), ("some words",))
    model = Model.new(tiny.config("method=simplecil"), tiny.backbone)
    message = r"backbone\.name: expected a backbone that reads texts, .* which reads image$"
    with pytest.raises(qkd_jax.ConfigError, match=message):
        model.features_of(texts)


def test_every_device_has_the_newest_state(tiny):
    model = Model.new(tiny.config("method=qkd", "train.devices=2"), tiny.backbone)
    first = model.everywhere
    assert model.everywhere is first  # placed once
    assert len(jax.tree.leaves(first.trainable)[0].devices()) == 2
    model.take(model.state.replace(step=model.state.step + 3))
    assert int(model.everywhere.step) == 3 and len(model.state.step.devices()) == 1


def test_parameters_are_counted_by_part(tiny):
    """Two blocks of adapters 12 x 3 with biases, a head of two classes and its scale."""
    model = Model.new(tiny.config("method=finetune"), tiny.backbone)
    assert model.parameters() == {
        "adapter": 2 * (12 * 3 + 3 + 3 * 12 + 12),
        "head": 2 * 12 + 1,
    }
    assert Model.new(tiny.config("method=simplecil"), tiny.backbone).parameters() == {}


def test_adapters_on_the_host_are_refused_with_several_devices(tiny):
    config = tiny.config("method=qkd", "adapter.memory=host", "train.devices=2")
    with pytest.raises(ConfigError, match=r"only one device fetches adapters from the host"):
        Model.new(config, tiny.backbone)
