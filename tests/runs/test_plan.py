"""What a run fixes before its first step."""

import numpy as np
import pytest

from qkd_jax.data.examples import Split
from qkd_jax.data.image_set import from_arrays
from qkd_jax.data.sources import load_split
from qkd_jax.errors import DataError
from qkd_jax.runs.plan import plan
from qkd_jax.settings.config import Config, override

SMALL = (
    *("data.source=synthetic", "data.num_classes=6", "protocol.increment=2"),
    "train.batch_size=8",
)


def test_a_run_can_hold_out_training_styles_instead_of_testing():
    config = override(Config(), "data.source=renditions", "data.validation=0.34")
    data = plan(config).data
    assert len(data.train) == 400 and len(data.test) == 200
    styles = [{name.split("/")[0] for name in part.ids} for part in data]
    assert [len(s) for s in styles] == [4, 2] and not styles[0] & styles[1]
    assert not {name for name in load_split("renditions").test.ids} & set(data.test.ids)


def test_joint_learning_has_one_task_however_the_classes_would_be_cut():
    """Its first task may be larger than all classes, since it is not read."""
    changes = (*SMALL, "protocol.kind=joint", "protocol.base=7", "protocol.increment=9")
    planned = plan(override(Config(), *changes))
    assert [task.classes for task in planned.tasks] == [tuple(planned.order)]
    assert len(planned.order) == 6


def test_shapes_come_from_the_largest_task():
    """Six classes in tasks of four: 4, 2; synthetic classes have equally many images."""
    config = override(
        Config(), "data.source=synthetic", "data.num_classes=6", "protocol.increment=4"
    )
    planned = plan(config)
    per_class = np.bincount(planned.data.train.labels)
    assert planned.config.shapes.num_classes == 6 and planned.config.shapes.max_tasks == 2
    assert planned.config.shapes.max_task_classes == 4
    assert planned.config.shapes.max_task_images == per_class[list(planned.tasks[0].classes)].sum()


def test_each_class_may_have_fewer_examples():
    """What is held out for choosing settings comes from the examples that are kept."""
    cut = override(Config(), *SMALL, "data.train_per_class=4", "data.test_per_class=2")
    whole, kept = plan(override(Config(), *SMALL)).data, plan(cut).data
    for number, all_of_part, part in zip((4, 2), whole, kept, strict=True):
        assert np.bincount(part.labels).tolist() == 6 * [number]
        assert set(part.ids) < set(all_of_part.ids)
    trained, held_out = plan(override(cut, "data.validation=0.5")).data
    assert sorted([*trained.ids, *held_out.ids]) == sorted(kept.train.ids)


@pytest.mark.parametrize("later, expected", [(0, [2, 2, 2]), (1, [2, 1, 1])])
def test_later_tasks_may_have_fewer_epochs(later, expected):
    """Two classes of 20 images in each task, five steps of 8 in an epoch."""
    changes = ("train.epochs=2", f"train.later_epochs={later}")
    planned = plan(override(Config(method="ssiat"), *SMALL, *changes))
    assert [planned.epochs(task) for task in planned.tasks] == expected
    assert [planned.steps(task) for task in planned.tasks] == [5 * n for n in expected]
    assert [planned.images(task) for task in planned.tasks] == [40 * n for n in expected]


def test_only_tasks_that_are_trained_have_steps():
    """APER trains in the first task, SimpleCIL in none; batches of 16 leave a part of one."""
    for method, expected in (("aper", [6, 0, 0]), ("simplecil", [0, 0, 0])):
        changes = ("train.epochs=2", "train.batch_size=16")
        planned = plan(override(Config(method=method), *SMALL, *changes))
        assert [planned.steps(task) for task in planned.tasks] == expected
        assert [len(planned.rows(task)) for task in planned.tasks] == [40, 40, 40]


def test_a_class_without_training_images_is_named(monkeypatch):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    train = from_arrays(
        images, np.array([0, 0, 2, 2]), ["crow", "finch", "owl"], name="birds/train"
    )
    monkeypatch.setattr("qkd_jax.runs.plan.load_split", lambda *_, **__: Split(train, train))
    with pytest.raises(DataError, match=r"birds/train: .* training image .* none of .finch"):
        plan(override(Config(), "protocol.increment=1"))
