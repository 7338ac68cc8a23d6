"""Every method on texts: what stands in the padding, and how much of it, changes nothing.

A method that forgot the token mask anywhere, in its features, moments or queries, would give other
scores. With other padding of the same length the same programs run, so no bit may differ. Longer
padding compiles other programs, whose rounding a few SGD steps amplify; one method shows it.
"""

import jax
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners.shape import learner_of
from qkd_jax.settings.methods import methods_reading
from qkd_jax.weights.load import tiny_random_text

WORDS = ("alpha", "bravo!", "car", "delta", "e 4", "(fox)", "gnu")
OWN = {
    "coda_prompt": ("coda_prompt.blocks=2", "coda_prompt.pool=8"),
    "dualprompt": ("dualprompt.general_blocks=1", "dualprompt.expert_blocks=1"),
    "qd_llm": ("qd_llm.teacher=none",),
    "ranpac": ("max_task_images=20", "ranpac.projection_dim=40"),
    "replay": ("max_task_images=20",),
}


def batch_of(backbone, task, seed):
    """Four texts of the task's classes, of several lengths, and one padded row."""
    generator = np.random.default_rng([task.index, seed])
    label = np.resize(task.classes, 5)
    texts = [f"{WORDS[k]} {'xyz'[generator.integers(3)] * generator.integers(3)}" for k in label]
    mask = np.arange(5) < 4
    return {**qkd_jax.tokenize(backbone, texts), "label": label, "mask": mask}


def scores_of(tiny, method, num_tokens, junk):
    """Scores of ten texts after three tasks; padding holds `junk`."""
    backbone = tiny_random_text(num_tokens)
    config = tiny.config(f"method={method}", *OWN.get(method, ()))

    def batch(task, seed):
        fields = batch_of(backbone, task, seed)
        fields["token_ids"] = np.where(fields["token_mask"], fields["token_ids"], junk)
        return fields

    state, learner = qkd_jax.init_state(jax.random.key(7), backbone, config), learner_of(config)
    for task in tiny.tasks:
        batches = [batch(task, seed) for seed in range(2)]
        surveyed = {"batches": batches} if learner.survey is not None else {}
        state = qkd_jax.begin_task(state, task, num_steps=2, **surveyed)
        if learner.loss is not None and learner.trains(config, task.index):
            for fields in batches:
                state, metrics = qkd_jax.train_task(state, fields)
                assert np.isfinite(float(metrics["loss"]))
        state = qkd_jax.end_task(state, batches)
    scores = []
    for task in tiny.tasks:
        fields = batch(task, 9)
        inputs = {name: fields[name] for name in backbone.spec.fields}
        scores.append(np.asarray(qkd_jax.predict(state, inputs))[fields["mask"]])
    return np.concatenate(scores)


# An adapter per task with a gate. Each of the others takes seconds to compile.
DEFAULT = ("qkd",)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if m in DEFAULT else pytest.mark.slow)
        for m in methods_reading(("token_ids", "token_mask"))
    ],
)
def test_the_content_of_padding_changes_no_bit(tiny, method):
    scores = scores_of(tiny, method, 10, junk=0)
    assert np.isfinite(scores).any(axis=1).all() and np.ptp(scores[np.isfinite(scores)]) > 1e-3
    np.testing.assert_array_equal(scores_of(tiny, method, 10, junk=42), scores)


@pytest.mark.slow
def test_longer_padding_changes_nothing(tiny):
    short, long = scores_of(tiny, "qkd", 10, junk=0), scores_of(tiny, "qkd", 13, junk=42)
    seen = np.isfinite(short)
    assert (seen == np.isfinite(long)).all()
    np.testing.assert_allclose(long[seen], short[seen], atol=1e-3 * np.ptp(short[seen]))
