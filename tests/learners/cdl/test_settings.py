"""Settings of CDL: what teacher, student alone and hosts get from them, and what is refused."""

import jax
import pytest

import qkd_jax
from qkd_jax.errors import ConfigError
from qkd_jax.learners.cdl.settings import CdlSettings
from qkd_jax.learners.shape import learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.parameters import init_random
from qkd_jax.nn.vit import ViTSpec


def test_teachers_settings():
    config = qkd_jax.override(
        qkd_jax.Config(method="cdl"),
        *("cdl.host=apt", "apt.merge=0.2", "teacher.image_size=224", "teacher.name=dinov2_vit_s14"),
        *("train.learning_rate=0.1", "train.epochs=3", "seed=5", "data.augment=true"),
    )
    teacher = learner_of(config).teacher.config(config)
    assert (teacher.method, teacher.seed, teacher.apt.merge) == ("apt", 5, 0.2)
    assert teacher.backbone == config.teacher and teacher.backbone.image_size == 224
    assert teacher.train == config.train and teacher.data.augment
    assert teacher.shapes == qkd_jax.Shapes()
    config = qkd_jax.override(config, "cdl.teacher_rate=0.02")
    assert learner_of(config).teacher.config(config).train.learning_rate == 0.02


def test_the_student_that_learns_alone_is_the_same_for_all_that_are_taught(cdl):
    """By it the report finds the run to compare with."""
    teacher = learner_of(cdl.config("l2p", "kdp")).teacher
    expected = teacher.alone(cdl.config("l2p", "none"))
    assert expected.cdl == CdlSettings(host="l2p", form="none")
    for settings in (("cdl.alpha=0.3",), ("teacher.name=augreg", "cdl.teacher_rate=0.1")):
        assert teacher.alone(cdl.config("l2p", "dkd", *settings)) == expected
    assert teacher.alone(cdl.config("l2p", "kdp", "l2p.pool=7")) != expected
    assert teacher.alone(cdl.config("apt", "kdp")) != expected


def test_hosts_start_as_in_the_code_of_coda_prompt():
    config = qkd_jax.Config(method="cdl")
    l2p, dual, coda = config.l2p, config.dualprompt, config.coda_prompt
    assert (l2p.form, l2p.pool, l2p.length, l2p.top_k, l2p.blocks) == ("gtripl", 30, 20, 5, 1)
    assert (dual.form, dual.expert_length, dual.general_length) == ("gtripl", 20, 6)
    assert (coda.pool, coda.length, coda.penalty) == (100, 8, 0.0)
    assert (l2p.start, dual.start, l2p.key_loss, dual.key_loss) == ("unit", "unit", "mean", "mean")


def test_settings_that_do_not_fit_are_named(cdl, tiny):
    def start(*settings):
        config = qkd_jax.override(cdl.config("coda_prompt", "kdp"), *settings)
        return cdl.start(config)

    for settings, message in (
        (("cdl.form=cdl_prompt", "cdl.host=apt"), "cdl.host: expected l2p, dualprompt or coda"),
        (("cdl.form=cdl_prompt", "cdl.query=own"), "cdl.query: expected student"),
        (("cdl.kd_length=3",), "cdl.kd_length: expected an even number"),
        (("cdl.map_length=3",), "cdl.map_length: expected an even number"),
        (("cdl.test_weight=-0.5",), "cdl.test_weight: expected -1"),
        (("cdl.temperature=0",), "cdl.temperature: expected above 0"),
        (
            ("cdl.form=cdl_prompt", "cdl.host=l2p", "l2p.form=official"),
            "l2p.form: expected gtripl.* found official",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            start(*settings)
    # Tokens that cannot be compared one by one, told before the teacher learns anything.
    small = dict(width=16, num_heads=2, mlp_width=16, image_size=8)
    for form, spec, message in (
        (
            "fitnets",
            ViTSpec(depth=3, patch_size=2, grid=4, **small),
            r"teacher.image_size: expected .* \(5\).* found 17",
        ),
        (
            "reviewkd",
            ViTSpec(depth=1, patch_size=4, grid=2, **small),
            r"teacher.name: expected at least 2 blocks.* found 1",
        ),
    ):
        config = qkd_jax.override(cdl.config("coda_prompt", "kdp"), f"cdl.form={form}")
        teacher = Backbone(init_random(jax.random.key(5), spec), spec)
        with pytest.raises(ConfigError, match=message):
            qkd_jax.init_state(jax.random.key(7), tiny.backbone, config, teacher=teacher)
