"""Teacher and student against the authors' code: losses, gradients, what is distilled, scores.

golden/make_cdl_golden.py made the arrays of golden/cdl.npz and says how: the second of two tasks
with three classes, four images, a student of 6 blocks of width 8 and a teacher of 7 blocks of width
12, in float64.

Where ours differs by intent: APT's teacher is given the merged prompt of the first task here, which
the authors' still has while the student learns. Their gradients of old classes' rows are zero.

Error budget: ours computes in float32. A block adds a few eps to a stream whose entries are near
10, and its attention and LayerNorms carry that on: 7 blocks give 400 eps = 5e-5 of the largest
value; gradients go the same way back: 1e-4.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import passes
from qkd_jax.learners.shape import Context, feature_width, learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.weights.load import assemble

BUDGET, GRADIENT_BUDGET = 5e-5, 1e-4
SMALL = dict(patch_size=4, image_size=8, grid=2)
SPECS = {
    "student": ViTSpec(width=8, depth=6, num_heads=2, mlp_width=16, **SMALL),
    "teacher": ViTSpec(width=12, depth=7, num_heads=3, mlp_width=24, **SMALL),
}
SETTINGS = (
    *("backbone.image_size=8", "l2p.pool=6", "l2p.length=4", "dualprompt.expert_length=6"),
    *("dualprompt.general_length=4", "coda_prompt.pool=5", "coda_prompt.length=4"),
    "cdl.map_length=4",
)
REAL = Context(jax.random.split(jax.random.key(1), 4), jnp.ones(4, bool), lambda x: x)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "cdl.npz") as arrays:
        return dict(arrays)


def close(found, expected, budget=BUDGET):
    """Within the budget of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= budget * np.abs(expected).max()


def backbone_of(golden, role):
    weights = {}
    for name, array in golden.items():
        if name.startswith(f"weights/{role}/"):
            name = name.removeprefix(f"weights/{role}/")
            each = {name.replace("*", str(i)): block for i, block in enumerate(array)}
            weights |= each if "*" in name else {name: array}
    return Backbone(assemble(weights, "timm_safetensors", SPECS[role], role), SPECS[role])


def halved(rows):
    """[..., L, D] -> [..., 2, L / 2, D]: key rows, then value rows."""
    return rows.reshape(*rows.shape[:-2], 2, rows.shape[-2] // 2, rows.shape[-1])


def stacked(of, letters, blocks):
    return np.stack([of(f"{letters}_{i}") for i in blocks])


def by_task(rows):
    """CODA-Prompt's rows [K, 5, ...] as [K, T, n, ...]; the fifth is in no task."""
    return rows[:, :4].reshape(rows.shape[0], 2, 2, *rows.shape[2:])


def prompts_of(host, of):
    """The host's prompts in our shapes, all tasks of them, from the authors' by name."""
    if host == "l2p":
        return {"prompts": of("e_p_0")[None], "keys": of("e_k_0")[None]}
    if host == "dualprompt":
        experts = halved(stacked(of, "e_p", (2, 3, 4)))
        return {
            "general": halved(stacked(of, "g_p", (0, 1))),
            "expert": experts.swapaxes(0, 1),
            "keys": stacked(of, "e_k", (2, 3, 4)).swapaxes(0, 1),
        }
    if host == "coda_prompt":
        letters = {"components": "e_p", "keys": "e_k", "attention": "e_a"}
        return {n: by_task(stacked(of, letter, range(5))) for n, letter in letters.items()}
    rows = of("prompt_tokens")
    return {"key": rows[0::2], "value": rows[1::2]}


def own_of(host, prompts):
    """(what is trained, what memory holds) of a host in its second task."""
    if host == "l2p":
        return prompts, {}
    if host == "dualprompt":
        trained = {**prompts, "expert": prompts["expert"][1], "keys": prompts["keys"][1]}
        return trained, {"experts": prompts["expert"], "keys": prompts["keys"]}
    if host == "coda_prompt":
        return {"prompt": {n: rows[:, 1] for n, rows in prompts.items()}}, {"prompt": prompts}
    return {"prompt": prompts}, {}


def head_of(host, rows, bias):
    return {"rows": rows} if host == "apt" else {"rows": rows, "bias": bias}


def parts_of(golden, form, host):
    """What a form trains beside the host, in our shapes."""
    extra = lambda name: golden[f"extra/{name}"]  # noqa: E731
    if form == "kdp":
        prompts = np.stack([extra(f"kd_prompt/kd_p_{i}") for i in range(1, 6)])
        return {"token": extra("kd_prompt/kd_p_0"), "prompts": prompts}
    if form == "kd_token":
        return {"token": extra("add_T_token")[0]}
    if form == "fitnets":
        return {"projection": linear_of(extra, "project_t_s/proj")}
    if form == "reviewkd":
        return {"fusion": fusion_of(lambda name: extra(f"ReviewKD_layers/{name}"))}
    if form == "cdl_prompt":
        return {"mapper": mapper_of(host, lambda name: golden[f"host/{host}/mapper/{name}"])}
    return {}


def linear_of(of, name):
    return {"kernel": of(f"{name}.weight").T, "bias": of(f"{name}.bias")}


def fusion_of(of):
    """Their abfs.0 is of the last block, abfs.5 of the first."""

    def layer(index, linears, norms):
        found = {ours: linear_of(of, f"abfs.{index}.{name}") for ours, name in linears.items()}
        for ours, name in norms.items():
            scale, bias = (of(f"abfs.{index}.{name}.{part}") for part in ("weight", "bias"))
            found[ours] = {"scale": scale, "bias": bias}
        return found

    linears, norms = {"in": "proj1", "out": "proj2"}, {"in_norm": "norm1"}
    last = layer(0, linears, norms)
    linears |= {"gate": "projz"}
    norms |= {"gate_norm": "normz", "fused_norm": "norm2"}
    others = [layer(5 - block, linears, norms) for block in range(5)]
    return {"last": last, "others": jax.tree.map(lambda *rows: np.stack(rows), *others)}


def mapper_of(host, of):
    """Only the first half of their components is used; for L2P only block 0."""
    blocks, size = (range(1), 3) if host == "l2p" else (range(5), 2)
    letters = {"components": "e_p", "keys": "e_k", "attention": "e_a"}
    return {n: stacked(of, letter, blocks)[:, :size] for n, letter in letters.items()}


def second_task(golden, role, host, state, kd=None):
    """`state` in the second task, with the arrays of the authors; as if the task had ended too."""
    of = lambda name: golden[f"host/{host}/{role}/{name}"]  # noqa: E731
    rows, bias = (golden[f"head/{role}/{part}"] for part in ("weight", "bias"))
    trained, kept = own_of(host, prompts_of(host, of))
    if host == "apt":
        merged = of("global_merged_prompt")
        kept = {"prompt": {"key": merged[0::2], "value": merged[1::2]}}
    trained |= {"head": head_of(host, rows[3:], bias[3:])}
    kept |= head_of(host, rows, bias)
    if kd is not None:
        rows, bias = (golden[f"extra/kd_last/{part}"] for part in ("weight", "bias"))
        trained |= {"kd": kd}
        if "kd" in state.memory:
            kd |= {"head": head_of(host, rows[3:], bias[3:])}
            kept |= {"kd": head_of(host, rows, bias)}
    single = partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    trained, kept = single(trained), {**state.memory, **single(kept)}
    expected = jax.tree.map(jnp.shape, (state.trainable, state.memory))
    assert jax.tree.map(jnp.shape, (trained, kept)) == expected
    return state.replace(
        trainable=trained,
        memory=kept,
        task=jnp.int32(1),
        task_classes=jnp.array([3, 4, 5], jnp.int32),
        task_of_class=jnp.array([0, 0, 0, 1, 1, 1], jnp.int32),
    )


def student_of(golden, host, form):
    """The student in the second task, with its teacher."""
    size = 3 if host == "l2p" else 2
    sums = ("l2p.key_loss=gtripl_sum",) if form == "cdl_prompt" else ()
    shapes = qkd_jax.Shapes(num_classes=6, max_tasks=2, max_task_classes=3)
    config = qkd_jax.override(
        qkd_jax.Config(method="cdl", shapes=shapes),
        *(f"cdl.host={host}", f"cdl.form={form}", f"cdl.map_components={size}", *SETTINGS, *sums),
    )
    backbones = backbone_of(golden, "student"), backbone_of(golden, "teacher")
    state = qkd_jax.init_state(jax.random.key(0), backbones[0], config, teacher=backbones[1])
    kd = None if form == "none" else parts_of(golden, form, host)
    state = second_task(golden, "student", host, state, kd)
    if state.teacher is None:
        return state
    return state.taught_by(second_task(golden, "teacher", host, state.teacher))


def merged(state):
    """The state with what the end of the task leaves of APT's prompt."""
    return passes.freeze(state) if "prompt" in state.memory else state


@jax.jit
def everything(state, images, labels):
    """Mean losses and their gradient in a step, the teacher's outputs, and scores at the end."""
    learner, inputs = learner_of(state.config), Raw({"image": images})
    batch = {"label": labels}
    if state.teacher is not None:
        batch["teacher"] = passes.teach(state, inputs)

    def objective(trainable):
        terms = learner.loss(trainable, state, inputs, batch, REAL)
        return jnp.mean(terms["loss"]), jax.tree.map(jnp.mean, terms)

    gradient, terms = jax.grad(objective, has_aux=True)(state.trainable)
    state = merged(state)
    size = learner.num_slots(state.config)
    features = jnp.zeros((len(labels), size, feature_width(state)))
    slots = jnp.array(learner.slots.score(1), jnp.int32)
    features = passes.extract(state, inputs, features, slots, jnp.int32(len(slots)))
    return terms, gradient, batch.get("teacher"), passes.score(state, features)[0]


def check(golden, prefix, host, state):
    """All that the authors have under `prefix`; returns the teacher's outputs and the gradient."""
    images, labels = jnp.asarray(golden["images"]), jnp.asarray(golden["labels"], jnp.int32)
    terms, gradient, taught, scores = everything(state, images, labels)
    expected = lambda name: golden[f"{prefix}/{name}"]  # noqa: E731
    close(scores, expected("scores"))
    close(terms["loss"], expected("loss"))
    close(terms["loss_ce"], expected("loss_ce"))
    if host in ("l2p", "dualprompt"):
        close(terms["loss_key"], expected("loss_key"))
    theirs = lambda name: expected(f"gradient/{name}")  # noqa: E731
    reference, _ = own_of(host, prompts_of(host, lambda name: theirs(f"prompt.{name}")))
    rows, bias = theirs("last.weight"), theirs("last.bias")
    assert not rows[:3].any() and not bias[:3].any()
    reference |= {"head": head_of(host, rows[3:], bias[3:])}
    for name, part in reference.items():
        jax.tree.map(partial(close, budget=GRADIENT_BUDGET), gradient[name], part)
    return taught, gradient, terms


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("host", ["l2p", *slow(["dualprompt"], ["coda_prompt"], ["apt"])])
def test_teacher_and_student_alone(golden, host):
    check(golden, f"teacher/{host}", host, student_of(golden, host, "kd").teacher)
    check(golden, f"alone/{host}", host, student_of(golden, host, "none"))


@pytest.mark.parametrize(
    ("form", "host"),
    [
        ("kdp", "apt"),
        *slow(("cdl_prompt", "coda_prompt")),
        *slow(("kdp", "coda_prompt"), ("fitnets", "coda_prompt"), ("kd_token", "coda_prompt")),
        *slow(("kdp", "l2p"), ("kdp", "dualprompt"), ("dkd", "coda_prompt")),
        *slow(("reviewkd", "coda_prompt")),
        *slow(("cdl_prompt", "l2p"), ("kd_token", "l2p"), ("kd_token", "dualprompt")),
        *slow(*(("kd", host) for host in ("l2p", "dualprompt", "coda_prompt", "apt"))),
    ],
)
def test_taught_student(golden, form, host):
    prefix = f"student/{form}/{host}"
    taught, gradient, terms = check(golden, prefix, host, student_of(golden, host, form))
    close(taught["logits"][:, 3:], golden[f"teacher/{host}/distilled"])
    close(0.5 * terms["loss_distillation"], golden[f"{prefix}/loss_soft"])
    theirs = lambda name: golden[f"{prefix}/gradient/{name}"]  # noqa: E731
    expected = {}
    if form == "kdp":
        prompts = np.stack([theirs(f"kd_prompt.kd_p_{i}") for i in range(1, 6)])
        expected = {"token": theirs("kd_prompt.kd_p_0"), "prompts": prompts}
    elif form == "kd_token":
        expected = {"token": theirs("feat.add_T_token")[0]}
    elif form == "fitnets":
        expected = {"projection": linear_of(theirs, "project_t_s.proj")}
        close(0.1 * terms["loss_tokens"], golden[f"{prefix}/loss_feature"])
    elif form == "reviewkd":
        expected = {"fusion": fusion_of(lambda name: theirs(f"ReviewKD_layers.{name}"))}
        close(0.2 * terms["loss_tokens"], golden[f"{prefix}/loss_feature"])
    elif form == "cdl_prompt":
        expected = {"mapper": mapper_of(host, lambda name: theirs(f"project_fc_layers.{name}"))}
    if f"{prefix}/kd_logits" in golden:
        rows, bias = theirs("kd_last.weight"), theirs("kd_last.bias")
        expected |= {"head": head_of(host, rows[3:], bias[3:])}
    assert set(expected) == set(gradient["kd"])
    jax.tree.map(partial(close, budget=GRADIENT_BUDGET), gradient["kd"], expected)
