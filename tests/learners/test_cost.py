"""What is carried from task to task, and the passes of an input, by hand and against the arrays."""

import jax
import pytest

import qkd_jax
from qkd_jax.learners.cost import kept_bytes, passes_per_input
from qkd_jax.learners.shape import learner_names
from qkd_jax.settings.methods import method_named

SETTINGS = {
    "cdl": ("cdl.host=l2p",),
    "coda_prompt": ("coda_prompt.blocks=2", "coda_prompt.pool=8"),
    "dualprompt": ("dualprompt.general_blocks=1", "dualprompt.expert_blocks=1"),
    **dict.fromkeys(("care", "mos", "tuna", "ssiat", "replay"), ("max_task_images=8",)),
    "ranpac": ("ranpac.projection_dim=16", "max_task_images=8"),
    # A queue shorter than the tasks; of a longer one the models of all tasks grow too.
    "q_tuning": ("q_tuning.prompt_length=2", "q_tuning.queue_size=2"),
}
D, R, L, C, T, M = 12, 3, 2, 7, 4, 2  # see `SETTINGS` of conftest.py
ADAPTER = 4 * L * (2 * D * R + R + D)


def settings_of(tiny, method, *changes):
    return tiny.config(f"method={method}", *SETTINGS.get(method, ()), *changes)


def shapes_of(tiny, config):
    """The state before the first task, of which no array is made."""
    teacher = tiny.backbone if config.method in ("cdl", "qd_llm") else None

    def new():
        return qkd_jax.init_state(jax.random.key(0), tiny.backbone, config, teacher=teacher)

    return jax.eval_shape(new)


def arrays_of(tiny, config):
    """Bytes of what a state keeps, but for frozen parts and the optimiser's state."""
    state = shapes_of(tiny, config)
    kept = jax.tree.leaves((state.memory, state.trainable, state.classifier))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def kept_by(tiny, config):
    state = shapes_of(tiny, config)
    return kept_bytes(state.replace(frozen={**state.frozen, "backbone": tiny.backbone}))


@pytest.mark.parametrize("method", learner_names())
def test_one_class_or_task_more_takes_what_is_said(tiny, texts, method):
    tiny = texts if method_named(method).reads == "token_ids" else tiny
    config = settings_of(tiny, method)
    found = kept_by(tiny, config)
    assert found["kept_bytes"] == arrays_of(tiny, config)
    assert min(found.values()) >= 0
    grows = C * found["kept_bytes_per_class"] + T * found["kept_bytes_per_task"]
    assert found["kept_bytes_constant"] + grows >= found["kept_bytes"]
    wider = settings_of(tiny, method, f"num_classes={C + 1}")
    assert arrays_of(tiny, wider) - found["kept_bytes"] == found["kept_bytes_per_class"]
    longer = settings_of(tiny, method, f"max_tasks={T + 1}")
    # One divides a pool among its tasks, one has routers over experts, tasks x tasks.
    if method not in ("coda_prompt", "care"):
        assert arrays_of(tiny, longer) - found["kept_bytes"] == found["kept_bytes_per_task"]


HEAD = 4 * (M * D + 1)  # the rows that a task trains, and their scale
# Method -> bytes of (constant, for each class, for each task).
BY_HAND = {
    "simplecil": (0, 4 * D, 0),
    "finetune": (ADAPTER + HEAD, 4 * D, 0),
    # A row for each class in each slot is counted for both.
    "ease": (ADAPTER + HEAD, 4 * D * T, ADAPTER + 4 * D * C),
    "mote": (ADAPTER + HEAD, 4 * D, ADAPTER),
}


@pytest.mark.parametrize("method", BY_HAND)
def test_bytes_by_hand(tiny, method):
    found = kept_by(tiny, settings_of(tiny, method))
    names = ("kept_bytes_constant", "kept_bytes_per_class", "kept_bytes_per_task")
    assert tuple(found[name] for name in names) == BY_HAND[method]


def test_a_classifier_in_closed_form_is_counted(tiny):
    """Sums and rows of `whitened` grow with classes, its second moments do not."""
    plain, headed = (
        kept_by(tiny, settings_of(tiny, "simplecil", f"classifier.kind={kind}"))
        for kind in ("own", "whitened")
    )
    # A Gram matrix in two float32 numbers each.
    assert headed["kept_bytes_constant"] >= plain["kept_bytes_constant"] + 2 * 4 * D * D
    assert headed["kept_bytes_per_class"] > plain["kept_bytes_per_class"]


PASSES = {
    "qkd": T + 1,  # the frozen model's pass
    "ease": T,
    "mos": T,
    "tuna": T + 1,
    "aper": 2,
    "ssiat": 1,
    "simplecil": 1,
    "dualprompt": 2,
    "apt": 1,
    "joint": 1,
}


@pytest.mark.parametrize("method", PASSES)
def test_passes_are_the_slots_that_are_read(tiny, method):
    assert passes_per_input(settings_of(tiny, method), L) == PASSES[method]


def test_blocks_before_the_first_adapter_are_counted_once(tiny):
    adapters = "fusion.frozen_weight=0"
    config = settings_of(tiny, "qkd", "adapter.first_block=1", adapters)
    assert passes_per_input(config, L) == (1 + T) / L
    mixed = settings_of(tiny, "qkd", "adapter.first_block=1", "fusion.kind=block_mix", adapters)
    assert passes_per_input(mixed, L) == (1 + 2) / L
    # The frozen model's own pass shares nothing with an adapter's.
    assert passes_per_input(settings_of(tiny, "aper", "adapter.first_block=1"), L) == 2


@pytest.mark.parametrize("top_k, passes", [(1, 3), (2, 4), (9, 2 + T)])
def test_a_routed_image_takes_k_passes_beside_those_of_gate_and_frozen_model(tiny, top_k, passes):
    config = settings_of(tiny, "qkd", "fusion.kind=routed", f"fusion.top_k={top_k}")
    assert passes_per_input(config, L) == passes
