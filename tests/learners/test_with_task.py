"""What a learner answers if it is told the task of each input, on states with random memory.

Both sides of a comparison are the same float32 operations, but for sums with weights 0 and 1, which
are exact, and products of another batch, whose 12 to 16 terms may be in another order: BUDGET is
some 50 roundings of scores of order 10.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import passes
from qkd_jax.learners.shape import feature_width, learner_names, learner_of
from qkd_jax.nn.inputs import Raw
from qkd_jax.settings.config import override
from qkd_jax.settings.methods import method_named

BUDGET = 1e-4
SETTINGS = {
    "care": ("max_task_images=8",),
    "coda_prompt": ("coda_prompt.blocks=2", "coda_prompt.pool=4"),
    "dualprompt": ("dualprompt.general_blocks=1", "dualprompt.expert_blocks=1"),
    "ranpac": ("ranpac.projection_dim=16", "max_task_images=8"),
    "replay": ("max_task_images=8",),
}
TEXTS = ("q_tuning", "prog_prompt", "prompt_per_task")
# Method -> the slots whose features its answer reads for task t, of those after the last task 2.
READS = {
    "qkd": lambda t: {t, 4},  # and the frozen model
    "ease": lambda t: {t},
    "mote": lambda t: {t},
    "mos": lambda t: {0, t},  # the prototypes stay
    "tuna": lambda t: {2 * t, 2 * 2 + 1},  # and so does the universal adapter
    **dict.fromkeys(TEXTS, lambda t: {t}),
}
TOLD_BY_INPUTS = {"dualprompt", "facet"}
DRAWN = ("step", "num_steps", "task_classes", "trainable", "memory")
OWNER = (0, 0, 1, 1, 2, 2, -1)  # the task of each class; the last is not seen


def state_after(tiny, texts, method, task, *changes):
    """A state with random memory in which tasks up to `task` are learned."""
    tiny = texts if method_named(method).reads else tiny
    config = tiny.config(f"method={method}", *SETTINGS.get(method, ()), *changes)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: qkd_jax.init_state(key, tiny.backbone, config))
    draw = np.random.default_rng(0)

    def random(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        drawn = draw.normal(size=leaf.shape) if floating else np.zeros(leaf.shape)
        return jnp.asarray(drawn.astype(leaf.dtype))

    owner = np.where(np.array(OWNER) <= task, OWNER, -1)
    return shapes.replace(
        frozen={"backbone": tiny.backbone},
        key=key,
        opt_state=(),
        **{name: jax.tree.map(random, getattr(shapes, name)) for name in DRAWN},
        task=jnp.int32(task),
        task_of_class=jnp.asarray(owner, jnp.int32),
    )


def features_of(state, seed=1):
    """Random features [6, S, W] of the slots that are read, zeros in the others."""
    learner = learner_of(state.config)
    size = learner.num_slots(state.config)
    drawn = np.random.default_rng(seed).normal(size=(6, size, feature_width(state)))
    read = np.isin(np.arange(size), list(learner.slots.score(int(state.task))))
    return jnp.asarray(drawn * read[None, :, None], jnp.float32)


SCORE, PREDICT_WITH_TASK = jax.jit(passes.score), jax.jit(passes.predict_with_task)
SCORE_WITH_TASK, EXTRACT = jax.jit(passes.score_with_task), jax.jit(passes.extract)


def told(state, features, tasks):
    return np.asarray(SCORE_WITH_TASK(state, features, jnp.asarray(tasks, jnp.int32)))


@pytest.mark.parametrize("method", learner_names())
def test_methods_that_choose_a_task_can_be_told_it(method):
    config = qkd_jax.Config(method=method)
    learner = learner_of(config)
    assert (learner.score_with_task is not None) == (method in READS)
    assert (learner.predict_with_task(config) is not None) == (method in TOLD_BY_INPUTS)


def test_a_classifier_in_closed_form_chooses_no_task():
    for method in (*READS, *TOLD_BY_INPUTS):
        config = override(qkd_jax.Config(method=method), "classifier.kind=ranpac")
        assert learner_of(config).score_with_task is None
        assert learner_of(config).predict_with_task(config) is None


@pytest.mark.parametrize("method", READS)
def test_after_one_task_there_is_nothing_to_choose(tiny, texts, method):
    state = state_after(tiny, texts, method, 0)
    features = features_of(state)
    scores, _ = SCORE(state, features)
    np.testing.assert_allclose(told(state, features, [0] * 6), scores, rtol=1e-6, atol=BUDGET)
    assert np.isfinite(scores[:, :2]).all() and np.isneginf(scores[:, 2:]).all()


@pytest.mark.parametrize("method", READS)
def test_only_the_slot_of_the_task_is_read(tiny, texts, method):
    """Other features in all other slots change nothing; in its own, they change the scores."""
    state, tasks = state_after(tiny, texts, method, 2), np.array([0, 1, 2, 2, 1, 0])
    features, others = features_of(state), features_of(state, seed=2)
    read = np.stack([np.isin(np.arange(features.shape[1]), list(READS[method](t))) for t in tasks])
    read = read[:, :, None]
    scores = told(state, features, tasks)
    np.testing.assert_allclose(told(state, jnp.where(read, features, others), tasks), scores)
    own = np.arange(features.shape[1])[None, :, None] == (
        tasks * (2 if method == "tuna" else 1)
    ).reshape(-1, 1, 1)
    changed = told(state, jnp.where(own, others, features), tasks)
    assert (np.abs(changed[:, :6] - scores[:, :6]).max(axis=1) > 0).all()
    assert np.isneginf(scores[:, 6]).all()  # the class that was not learned


@pytest.mark.parametrize("method", ["mos", "tuna", "mote"])
def test_the_task_that_a_method_chooses_by_itself_gives_its_own_scores(tiny, texts, method):
    changes = ("mote.merge=false",) if method == "mote" else ()
    state = state_after(tiny, texts, method, 2, *changes)
    features = features_of(state)
    scores, relevance = SCORE(state, features)
    chosen = np.asarray(relevance.argmax(axis=1))
    np.testing.assert_allclose(told(state, features, chosen), scores, rtol=1e-6, atol=BUDGET)
    assert len(set(chosen.tolist())) > 1


@pytest.mark.parametrize("kind", ["routed", "block_mix"])
def test_fused_adapters_are_those_of_the_given_task(tiny, texts, kind):
    """One adapter: the same as the logits of its slot, with the head rows that the kind reads."""
    state = state_after(
        tiny, texts, "qkd", 2, f"fusion.kind={kind}", "head.prototypes=own", "head.whiten=false"
    )
    inputs = Raw({"image": tiny.batch(tiny.tasks[0], size=6)["image"]})
    tasks = jnp.asarray([0, 1, 2, 2, 1, 0], jnp.int32)
    features = jnp.zeros((6, 5, feature_width(state)))
    # The three adapters that were learned, and the frozen model.
    features = EXTRACT(state, inputs, features, jnp.asarray([0, 1, 2, 4, 3]), jnp.int32(4))
    found = PREDICT_WITH_TASK(state, inputs, tasks)
    np.testing.assert_allclose(found, told(state, features, tasks), rtol=1e-5, atol=BUDGET)


@pytest.mark.parametrize(
    "method, settings",
    [("care", ("care.passes=every_task",)), ("facet", ("facet.routing=image",))],
)
def test_with_the_task_that_a_method_chooses_it_answers_the_same(tiny, texts, method, settings):
    state = state_after(tiny, texts, method, 2, *settings)
    inputs = Raw({"image": 5 * tiny.batch(tiny.tasks[0], size=6)["image"] ** 2})
    learner = learner_of(state.config)
    scores, relevance = jax.jit(learner.predict(state.config))(state, inputs)
    chosen = jnp.argmax(relevance, axis=1).astype(jnp.int32)
    found = PREDICT_WITH_TASK(state, inputs, chosen)
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=BUDGET)
    other = PREDICT_WITH_TASK(state, inputs, (chosen + 1) % 3)
    assert np.abs(other[:, :6] - scores[:, :6]).max() > 100 * BUDGET


@pytest.mark.parametrize("form", ["official", "gtripl"])
def test_prompts_are_those_of_the_given_task(tiny, texts, form):
    """DualPrompt with one set of keys chooses one task for each image; told it, it is the same."""
    changes = (
        f"dualprompt.form={form}",
        "dualprompt.general_length=2",
        "dualprompt.expert_length=2",
    )
    state = state_after(tiny, texts, "dualprompt", 2, *changes)
    inputs = Raw({"image": 5 * tiny.batch(tiny.tasks[0], size=6)["image"] ** 2})
    slots = learner_of(state.config).slots.score(2)
    features = jnp.zeros((6, 5, feature_width(state)))
    order = jnp.asarray([*slots, 0, 0, 0], jnp.int32)
    features = EXTRACT(state, inputs, features, order, jnp.int32(len(slots)))
    scores, relevance = SCORE(state, features)
    chosen = jnp.argmax(relevance, axis=1).astype(jnp.int32)
    found = PREDICT_WITH_TASK(state, inputs, chosen)
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=BUDGET)
    other = PREDICT_WITH_TASK(state, inputs, (chosen + 1) % 3)
    assert np.abs(other[:, :6] - scores[:, :6]).max() > 100 * BUDGET
