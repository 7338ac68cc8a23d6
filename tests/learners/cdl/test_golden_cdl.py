"""CDL against the authors' code: losses, gradients and predictions of teacher and student.

`tests/learners/golden/make_cdl_golden.py` made the arrays and says how: repository, commits, sizes,
and the names of the arrays. One update in the second of two tasks, three classes each, with two
random transformers: the teacher has width 12 and 7 blocks, the student width 8 and 6 blocks.

Where the two differ, as the arrays were made: the APT teacher's prompt is not merged yet while the
student learns, so the test gives it the prompt of the first task; the keys of the July 2024 version
(`cdl_prompt`) are pulled by sums, which is a setting here.

Error budget: 7 blocks in float32 with activations near 1 that grow to about 5; logits are sums of
at most 12 products: 200 eps of the largest value = 2.4e-5, doubled for the way through the teacher.
Gradients have the same error relative to the largest entry of the array, and gradients of prompts
are sums over four images and five tokens: 2e-4.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.learners.state import LearnerState
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.weights.load import assemble

BUDGET, GRADIENTS = 5e-5, 2e-4
SMALL = dict(patch_size=4, image_size=8, grid=2)
SPECS = {
    "teacher": ViTSpec(width=12, depth=7, num_heads=3, mlp_width=24, **SMALL),
    "student": ViTSpec(width=8, depth=6, num_heads=2, mlp_width=16, **SMALL),
}
SETTINGS = (
    *("backbone.image_size=8", "teacher.image_size=8"),
    *("l2p.pool=6", "l2p.length=4", "dualprompt.general_length=4", "dualprompt.expert_length=6"),
    *("coda_prompt.pool=5", "coda_prompt.length=4", "coda_prompt.form=published"),
)
# Of the mapper's components, those of one of two tasks.
MAPPED = {"l2p": (3, ("l2p.key_loss=gtripl_sum",)), "coda_prompt": (2, ())}
PAIRS = (
    *(("kdp", host) for host in ("l2p", "dualprompt", "coda_prompt", "apt")),
    *(("kd", host) for host in ("coda_prompt", "apt")),
    *((form, "coda_prompt") for form in ("kd_token", "dkd", "fitnets", "reviewkd")),
    *(("cdl_prompt", host) for host in MAPPED),
)


@pytest.fixture(scope="module")
def arrays():
    with np.load(Path(__file__).parents[1] / "golden" / "cdl.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def backbones(arrays):
    found = {}
    for role, spec in SPECS.items():
        weights = {}
        for name, value in arrays.items():
            if not name.startswith(f"weights/{role}/"):
                continue
            name = name.removeprefix(f"weights/{role}/")
            for block, part in enumerate(value) if "*" in name else [(0, value)]:
                weights[name.replace("*", str(block))] = part
        found[role] = Backbone(assemble(weights, "timm_safetensors", spec, role), spec)
    return found


def assert_near(found, expected, budget=BUDGET):
    """Within the budget of the largest expected value."""
    found, expected = np.float64(found), np.float64(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=budget * np.abs(expected).max())


def inputs_of(arrays, host, role):
    """The authors' name of an array -> its value before the update."""

    def read(name):
        part, _, rest = name.partition(".")
        if part == "prompt":
            return arrays[f"host/{host}/{role}/{rest}"]
        if part == "project_fc_layers":
            return arrays[f"host/{host}/mapper/{rest}"]
        return arrays[f"head/{role}/{rest}" if part == "last" else f"extra/{name}"]

    # They call the token feat.add_T_token, and kd_prompt.kd_p_0 is kept as kd_prompt/kd_p_0.
    def find(name):
        name = name.removeprefix("feat.")
        try:
            return read(name)
        except KeyError:
            return read(name.replace(".", "/", 1))

    return find


def halved(rows):
    """[..., L, D] -> [..., 2, L / 2, D]: key rows, then value rows."""
    return rows.reshape(*rows.shape[:-2], 2, rows.shape[-2] // 2, rows.shape[-1])


def stack(read, name, blocks):
    return np.stack([read(f"prompt.{name}_{block}") for block in blocks])


def pool_of(host, read):
    """The authors' prompts and keys as this library holds them, all tasks."""
    if host == "l2p":
        return {"prompts": stack(read, "e_p", [0]), "keys": stack(read, "e_k", [0])}
    if host == "dualprompt":
        return {
            "general": halved(stack(read, "g_p", (0, 1))),
            "experts": np.moveaxis(halved(stack(read, "e_p", (2, 3, 4))), 1, 0),
            "keys": np.moveaxis(stack(read, "e_k", (2, 3, 4)), 1, 0),
        }
    if host == "apt":
        tokens = read("prompt.prompt_tokens")
        return {"key": tokens[0::2], "value": tokens[1::2]}
    names = {"components": "e_p", "keys": "e_k", "attention": "e_a"}
    pool = {ours: stack(read, theirs, range(5))[:, :4] for ours, theirs in names.items()}
    return {name: rows.reshape(5, 2, 2, *rows.shape[2:]) for name, rows in pool.items()}


def head_of(host, read, name):
    """A head with all rows."""
    head = {"rows": read(f"{name}.weight")}
    return head if host == "apt" else {**head, "bias": read(f"{name}.bias")}


def new(head):
    """The rows of the second task's classes."""
    return {name: values[3:] for name, values in head.items()}


def trainable_of(host, read):
    """What the host trains in the second task."""
    pool, head = pool_of(host, read), new(head_of(host, read, "last"))
    if host == "l2p":
        return {**pool, "head": head}
    if host == "dualprompt":
        own = {"expert": pool["experts"][1], "keys": pool["keys"][1]}
        return {"general": pool["general"], **own, "head": head}
    return {"prompt": pool if host == "apt" else {n: a[:, 1] for n, a in pool.items()}} | {
        "head": head
    }


def memory_of(host, read):
    """What finished tasks leave, and the rows of the second task as well."""
    pool, head = pool_of(host, read), head_of(host, read, "last")
    if host == "l2p":
        return {**head, "chosen": np.zeros((1, 6))}
    if host == "dualprompt":
        return {**head, "experts": pool["experts"], "keys": pool["keys"]}
    if host == "apt":
        merged = read("prompt.global_merged_prompt")
        pool = {"key": merged[0::2], "value": merged[1::2]}
    return {**head, "prompt": pool}


def linear(read, name):
    return {"kernel": read(f"{name}.weight").T, "bias": read(f"{name}.bias")}


def norm(read, name):
    return {"scale": read(f"{name}.weight"), "bias": read(f"{name}.bias")}


def parts_of(form, host, read):
    """What the form trains beside the host."""
    parts = {}
    if form == "kdp":
        parts["token"] = read("kd_prompt.kd_p_0")
        parts["prompts"] = np.stack([read(f"kd_prompt.kd_p_{block}") for block in range(1, 6)])
    if form == "kd_token":
        parts["token"] = read("feat.add_T_token")[0]
    if form == "cdl_prompt":
        size, blocks = MAPPED[host][0], 1 if host == "l2p" else 5
        for ours, theirs in (("keys", "k"), ("attention", "a"), ("components", "p")):
            rows = [read(f"project_fc_layers.e_{theirs}_{block}")[:size] for block in range(blocks)]
            parts.setdefault("mapper", {})[ours] = np.stack(rows)
    if form == "fitnets":
        parts["projection"] = linear(read, "project_t_s.proj")
    if form == "reviewkd":
        names = {"in": "proj1", "out": "proj2", "gate": "projz"}
        norms = {"in_norm": "norm1", "gate_norm": "normz", "fused_norm": "norm2"}

        def layer(number):
            prefix, own = f"ReviewKD_layers.abfs.{number}", {}
            for ours, theirs in names.items():
                if number or ours != "gate":
                    own[ours] = linear(read, f"{prefix}.{theirs}")
            for ours, theirs in norms.items():
                if number or ours == "in_norm":
                    own[ours] = norm(read, f"{prefix}.{theirs}")
            return own

        parts["fusion"] = [layer(number) for number in reversed(range(6))]
    if form in ("kdp", "kd_token", "cdl_prompt"):
        parts["head"] = new(head_of(host, read, "kd_last"))
    return parts


def state_of(config, backbone, trainable, memory, **frozen):
    """In the second task, with the shapes that the learner makes itself."""
    key = jax.random.key(0)
    expected = learner_of(config).init(key, backbone, config)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (trainable, memory))
    assert jax.tree.map(jnp.shape, single) == jax.tree.map(jnp.shape, expected)
    return LearnerState(
        frozen={"backbone": backbone, **frozen},
        config=config,
        key=key,
        task=jnp.int32(1),
        step=jnp.int32(0),
        num_steps=jnp.int32(0),
        task_classes=jnp.array([3, 4, 5], jnp.int32),
        task_of_class=jnp.array([0, 0, 0, 1, 1, 1], jnp.int32),
        trainable=single[0],
        opt_state=None,
        memory=single[1],
    )


@pytest.fixture(scope="module")
def both(arrays, backbones):
    """(teacher or None, student) of a form and a host."""

    def make(form, host):
        shapes = qkd_jax.Shapes(num_classes=6, max_tasks=2, max_task_classes=3)
        config = qkd_jax.Config(method="cdl", shapes=shapes)
        config = qkd_jax.override(config, f"cdl.form={form}", f"cdl.host={host}", *SETTINGS)
        if form == "cdl_prompt":
            size, changes = MAPPED[host]
            mapper = (f"cdl.map_components={size}", "cdl.map_length=4")
            config = qkd_jax.override(config, *mapper, *changes)
        config = config.replace(shapes=replace(config.shapes, teacher_width=12))
        read = inputs_of(arrays, host, "student")
        trainable, memory = trainable_of(host, read), memory_of(host, read)
        teaching = learner_of(config).teacher.config(config)
        if teaching is None:
            return None, state_of(config, backbones["student"], trainable, memory)
        teaching = teaching.replace(shapes=replace(teaching.shapes, query_width=8))
        theirs = inputs_of(arrays, host, "teacher")
        teacher = state_of(
            teaching,
            backbones["teacher"],
            trainable_of(host, theirs),
            memory_of(host, theirs),
            query=backbones["student"],
        )
        parts = parts_of(form, host, read)
        if "head" in parts:
            memory = {**memory, "kd": head_of(host, read, "kd_last")}
        trainable = {**trainable, "kd": parts}
        return teacher, state_of(config, backbones["student"], trainable, memory, teacher=teacher)

    return make


def update(state, arrays):
    """(terms, gradient of the mean loss, teacher's outputs)."""
    images, labels = Raw({"image": jnp.asarray(arrays["images"])}), jnp.asarray(arrays["labels"])
    context = Context(jax.random.split(jax.random.key(1), 4), jnp.ones(4, bool), lambda x: x)

    def run(state):
        learner, batch = learner_of(state.config), {"label": labels}
        if state.teacher is not None:
            batch["teacher"] = learner.teacher.outputs(state, images)

        def objective(trainable):
            terms = learner.loss(trainable, state, images, batch, context)
            return jnp.mean(terms["loss"]), terms

        gradient, terms = jax.grad(objective, has_aux=True)(state.trainable)
        return {n: jnp.mean(v) for n, v in terms.items()}, gradient, batch.get("teacher")

    return run(state)


def scores_of(state, images):
    """Predictions [B, C] once the second task is frozen."""
    learner, inputs = learner_of(state.config), Raw({"image": images})
    state = learner.freeze(state)
    slots = learner.slots.score(1)
    features = jnp.zeros((4, max(slots) + 1, state.feature_width))
    for slot in slots:
        found = learner.extract(state, inputs, jnp.int32(slot), features)
        features = features.at[:, slot].set(found)
    return learner.score(state, features)[0]


def check_gradient(found, expected, arrays, prefix):
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        own = found
        for step in path:
            own = own[getattr(step, "key", getattr(step, "idx", None))]
        assert_near(own, value, GRADIENTS)
    for name, value in arrays.items():
        if name.startswith(prefix) and name.endswith("last.weight"):
            assert not value[:3].any()  # rows of the first task's classes


@pytest.mark.parametrize(("form", "host"), PAIRS)
def test_student(arrays, both, form, host):
    state, prefix = both(form, host)[1], f"student/{form}/{host}"
    terms, gradient, outputs = update(state, arrays)
    assert_near(outputs["logits"][:, 3:], arrays[f"teacher/{host}/distilled"])
    assert_near(terms["loss_ce"], arrays[f"{prefix}/loss_ce"])
    assert_near(0.5 * terms["loss_distillation"], arrays[f"{prefix}/loss_soft"], 1e-3)
    if form in ("fitnets", "reviewkd"):
        weight = {"fitnets": 0.1, "reviewkd": 0.2}[form]
        assert_near(weight * terms["loss_tokens"], arrays[f"{prefix}/loss_feature"])
    assert_near(terms["loss"], arrays[f"{prefix}/loss"])
    read = lambda name: arrays[f"{prefix}/gradient/{name}"]  # noqa: E731
    expected = {**trainable_of(host, read), "kd": parts_of(form, host, read)}
    check_gradient(gradient, expected, arrays, prefix)
    assert_near(scores_of(state, jnp.asarray(arrays["images"])), arrays[f"{prefix}/scores"])


@pytest.mark.parametrize("host", ("l2p", "dualprompt", "coda_prompt", "apt"))
def test_teacher(arrays, both, host):
    """With queries of the student's transformer."""
    state, prefix = both("kdp", host)[0], f"teacher/{host}"
    terms, gradient, _ = update(state, arrays)
    assert_near(terms["loss"], arrays[f"{prefix}/loss"])
    read = lambda name: arrays[f"{prefix}/gradient/{name}"]  # noqa: E731
    check_gradient(gradient, trainable_of(host, read), arrays, prefix)
    assert_near(scores_of(state, jnp.asarray(arrays["images"])), arrays[f"{prefix}/scores"])


def test_student_alone(arrays, both):
    state, prefix = both("none", "coda_prompt")[1], "alone/coda_prompt"
    terms, gradient, _ = update(state, arrays)
    assert_near(terms["loss"], arrays[f"{prefix}/loss"])
    read = lambda name: arrays[f"{prefix}/gradient/{name}"]  # noqa: E731
    check_gradient(gradient, trainable_of("coda_prompt", read), arrays, prefix)
    assert_near(scores_of(state, jnp.asarray(arrays["images"])), arrays[f"{prefix}/scores"])
