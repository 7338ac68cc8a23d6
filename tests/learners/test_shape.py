"""What a method declares is what it has: its settings are read, each by a run of it."""

import dataclasses

import jax
import pytest

import qkd_jax
from qkd_jax.learners.shape import learner_names
from qkd_jax.learners.task_heads import HeadSettings
from qkd_jax.settings.methods import method_named

# What fits two blocks and few classes, and switches that make a method read all it has.
PROJECTED = ("gate.kind=pqk", "fusion.kind=routed")
LEARNED = ("max_task_images=8", "drift.steps=1", "alignment.generator=gradient_flow")
SETTINGS = {
    "coda_prompt": ("coda_prompt.blocks=2", "coda_prompt.pool=4", "coda_prompt.penalty=0.1"),
    "dualprompt": ("dualprompt.general_blocks=1", "dualprompt.expert_blocks=1"),
    "inflora": ("inflora.rank=2",),
    "l2p": ("l2p.form=gtripl", "l2p.length=4"),
    **dict.fromkeys(("care", "mos", "replay", "ssiat", "tuna"), LEARNED),
    "qkd": PROJECTED,
    "q_tuning": ("q_tuning.queue_size=2",),
    "ranpac": ("ranpac.projection_dim=16", "max_task_images=8"),
}


# Read where Gaussians draw, as in the other tests of these methods.
GAUSSIANS = {"alignment.statistics", "alignment.jitter"}
# Read by another gate: qkd/test_measurement.py and qkd/test_oracle.py.
MEASUREMENT = {"gate.copies", "gate.ridge"}


def settings_of(own):
    return {f"{name}.{field.name}" for name, part in own for field in dataclasses.fields(part)}


def recorder(name, section, read):
    """`section`, which adds to `read` each setting that is taken from it."""
    names = {field.name for field in dataclasses.fields(section)}

    class Recorder(type(section)):
        __eq__, __hash__ = object.__eq__, object.__hash__  # those of a dataclass read everything

        def __getattribute__(self, attribute):
            if attribute in names:
                read.add(f"{name}.{attribute}")
            return object.__getattribute__(self, attribute)

    return Recorder(**dataclasses.asdict(section))


def read_by(tiny, config, own):
    """The settings among `own` that one task and a prediction read."""
    read, task = set(), tiny.tasks[0]
    config = config.replace()
    recorders = tuple((name, recorder(name, section, read)) for name, section in own)
    object.__setattr__(config, "own", recorders)  # not by `replace`, whose check reads them all
    state = qkd_jax.init_state(jax.random.key(0), tiny.backbone, config)
    batch = tiny.batch(task)
    state = qkd_jax.begin_task(state, task, batches=[batch])
    if state.trainable:
        state, _ = qkd_jax.train_task(state, batch)
    state = qkd_jax.end_task(state, [batch])
    qkd_jax.predict(state, {name: batch[name] for name in tiny.backbone.spec.fields})
    return read


# Students share settings with their teachers, and no form of cdl reads all of them: see
# cdl/test_learner.py and test_qd_llm.py.
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name == "qkd" else pytest.mark.slow)
        for name in learner_names()
        if name not in ("cdl", "qd_llm")
    ],
)
def test_every_setting_that_a_method_declares_is_read(tiny, texts, method):
    tiny = texts if method_named(method).reads else tiny
    config = tiny.config(f"method={method}", *SETTINGS.get(method, ()))
    unread = settings_of(config.own) - read_by(tiny, config, config.own)
    assert unread == {LEARNED: GAUSSIANS, PROJECTED: MEASUREMENT}.get(SETTINGS.get(method), set())


def test_a_section_that_is_not_read_is_found(tiny):
    config = tiny.config("method=simplecil")
    own = (*config.own, ("head", HeadSettings()))
    unread = settings_of(own) - read_by(tiny, config, own)
    assert unread == {"head.kind", "head.scale"}
