"""L2P and DualPrompt against the three public code bases.

The arrays of golden/l2p.npz and golden/dualprompt.npz come from golden/make_l2p_golden.py and
golden/make_dualprompt_golden.py, which run, on four random images and one random transformer each
(8 px, patch 4, 2 heads; L2P 2 blocks of width 16, DualPrompt 5 blocks of width 8), task 1 of two
tasks with two classes:

- google/: google-research/l2p, commit dd8836e6e372df29f03d83bf3dc3a806114e9d8e, models/vit.py
  `VisionTransformer` with models/prompt.py `Prompt` and models/prefix_attention.py, under today's
  flax in float32, its tanh GELU replaced by the exact one; `batchwise_prompt` off, then on
  (`voted_`), and with the prompt mask that its training step makes for task 1 (`masked_`).
- pilot/: LAMDA-CL/LAMDA-PILOT, commit 5240714d3d6071aca824f8aed4a92a46ac6f883c, in float64:
  backbone/vit_l2p.py and vit_dualprompt.py `VisionTransformer` inside utils/inc_net.py
  `PromptVitNet`; loss and gradients from `Learner._init_train` of models/l2p.py (lambda 0.5) and
  models/dualprompt.py (lambda 0.1) with one batch and rate 0; `batchwise_prompt` off.
- gtripl/: GT-RIPL/CODA-Prompt, commit 6417d4f68754be68b697c7ca2323ee61e791e1a3, in float64:
  models/zoo.py `L2P` ("deep", pool 6, length 4) and `DualPrompt` (pool 2, E 6, G 4) inside `ViTZoo`
  and models/vit.py; loss and gradients from `Prompt.update_model` of learners/prompt.py, rate 0.

Where they differ from each other: PILOT adds the class token's position to every L2P prompt, a
constant that the prompts absorb (the google arrays and ours have it added). Its DualPrompt port
reshapes [key or value, image] to [image, key or value] without exchanging the axes, so a batch of
one is the only right one: its arrays are means over four such batches, and `batch_logits` holds the
batch of four. Its loss has -lambda cos where ours has lambda (1 - cos): a constant.

Error budget: ours computes in float32; features near 1 and sums of 32 terms in 5 blocks, 100 eps =
1.2e-5 of the largest value; bound 3e-5.
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qkd_jax
from qkd_jax.learners import dualprompt, l2p
from qkd_jax.learners.prompted import feature_of
from qkd_jax.learners.shape import Context, learner_of
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.inputs import Raw
from qkd_jax.nn.vit import ViTSpec
from qkd_jax.weights.load import assemble

GOLDEN = Path(__file__).parent / "golden"
BUDGET = 3e-5
HOSTS = {"l2p": l2p.HOST, "dualprompt": dualprompt.HOST}
SMALL = dict(num_heads=2, patch_size=4, image_size=8, grid=2)
SPECS = {
    "l2p": ViTSpec(width=16, depth=2, mlp_width=32, **SMALL),
    "dualprompt": ViTSpec(width=8, depth=5, mlp_width=16, **SMALL),
}
L2P = ("l2p.pool=6", "l2p.top_k=3", "l2p.length=2", "l2p.key_weight=0.5")
DUAL = ("dualprompt.general_length=2", "dualprompt.expert_length=3", "dualprompt.key_weight=0.1")


def close(found, expected):
    """Within the budget of the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= BUDGET * np.abs(expected).max()


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def run(name, arrays, source, trainable, memory, *settings):
    """Loss terms, mean gradient, choices and scores of our learner on the golden arrays."""
    spec = SPECS[name]
    weights = {k[8:]: v for k, v in arrays.items() if k.startswith("weights/")}
    backbone = Backbone(assemble(weights, "timm_safetensors", spec, name), spec)
    shapes = qkd_jax.Shapes(num_classes=4, max_tasks=2, max_task_classes=2)
    config = qkd_jax.Config(method=name, shapes=shapes)
    config = qkd_jax.override(config, "backbone.image_size=8", *settings)
    state = qkd_jax.init_state(jax.random.key(0), backbone, config)
    rows, bias = arrays[f"{source}/head_rows"], arrays[f"{source}/head_bias"]
    trainable = trainable | {"head": {"rows": rows[2:], "bias": bias[2:]}}
    memory = memory | {"rows": rows, "bias": bias}
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)  # noqa: E731
    expected = jax.tree.map(jnp.shape, (state.trainable, state.memory))
    trainable, memory = single(trainable), {**state.memory, **single(memory)}
    assert jax.tree.map(jnp.shape, (trainable, memory)) == expected
    state = state.replace(
        trainable=trainable,
        memory=memory,
        task=jnp.int32(1),
        task_classes=jnp.array([2, 3], jnp.int32),
        task_of_class=jnp.array([0, 0, 1, 1], jnp.int32),
    )
    images = Raw({"image": jnp.asarray(arrays["images"])})
    query = jnp.asarray(arrays["query"], jnp.float32)
    features = jnp.zeros((4, 3, spec.width)).at[:, 0].set(query)
    batch = {"label": jnp.asarray(arrays["labels"], jnp.int32), "features": features}
    real = Context(jax.random.split(jax.random.key(1), 4), jnp.ones(4, bool), lambda x: x)

    @jax.jit
    def everything(trainable, state):
        def objective(trainable):
            terms = learner_of(config).loss(trainable, state, images, batch, real)
            return jnp.mean(terms["loss"]), terms

        (loss, terms), gradient = jax.value_and_grad(objective, has_aux=True)(trainable)
        host = HOSTS[name]
        feature = feature_of(host, state, images, host.learned(state, query))
        filled = features.at[:, 2].set(feature)
        scores, relevance = learner_of(config).score(state, filled)
        return {
            "loss": loss,
            "terms": terms,
            "gradient": gradient,
            "feature": feature,
            "scores": scores,
            "relevance": relevance,
        }

    return SimpleNamespace(**everything(trainable, state))


def check_head(found, arrays, source):
    """Gradients of the head; the reference's old rows get none."""
    for name in ("rows", "bias"):
        expected = arrays[f"{source}/grad_{name}"]
        assert not expected[:2].any()
        close(found.gradient["head"][name], expected[2:])


@pytest.fixture(scope="module")
def pool():
    return load("l2p")


@pytest.fixture(scope="module")
def dual():
    return load("dualprompt")


def official(pool):
    """Pool of one block, with what PILOT adds to every prompt: the class token's position."""
    prompts = pool["pilot/prompts"] + pool["weights/pos_embed"][0, 0]
    return {"prompts": prompts[None], "keys": pool["pilot/keys"][None]}


def test_l2p_equals_google_and_pilot(pool):
    found = run("l2p", pool, "pilot", official(pool), {}, *L2P)
    close(found.feature, pool["pilot/feature"])
    close(found.scores, pool["pilot/logits"])
    close(found.scores, pool["google/logits"])
    chosen = np.argsort(-pool["pilot/similarity"], axis=1)[:, :3]
    np.testing.assert_array_equal(chosen, pool["pilot/chosen"])
    np.testing.assert_array_equal(chosen, pool["google/chosen"])
    close(found.terms["loss_key"].mean(), 3.0 - pool["google/reduce_sim"])
    close(found.loss, pool["pilot/loss"] + 0.5 * 3.0)
    close(found.gradient["prompts"][0], pool["pilot/grad_prompts"])
    close(found.gradient["keys"][0], pool["pilot/grad_keys"])
    check_head(found, pool, "pilot")


def test_l2p_task_mask_equals_google(pool):
    found = run("l2p", pool, "pilot", official(pool), {}, *L2P, "l2p.diversify=task")
    logits = np.float64(pool["google/masked_logits"])[:, 2:]
    shifted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    close(found.terms["loss_ce"], -shifted[np.arange(4), pool["labels"] - 2])
    close(found.terms["loss_key"].mean(), 3.0 - pool["google/masked_reduce_sim"])


def test_l2p_plus_plus_equals_gtripl_with_its_sum_over_wrong_pairs(pool):
    trained = {
        name: np.stack([pool[f"gtripl/prompt/e_{letter}_{i}"] for i in (0, 1)])
        for name, letter in (("prompts", "p"), ("keys", "k"))
    }
    settings = ("l2p.form=gtripl", "l2p.pool=6", "l2p.top_k=5", "l2p.length=4", "l2p.blocks=2")
    loss = ("l2p.key_loss=gtripl_sum", "l2p.key_weight=1")
    found = run("l2p", pool, "gtripl", trained, {}, *settings, *loss)
    close(found.feature, pool["gtripl/feature"])
    close(found.scores, pool["gtripl/logits"])
    close(found.loss, pool["gtripl/loss"])
    for i in (0, 1):
        close(found.gradient["prompts"][i], pool[f"gtripl/grad/e_p_{i}"])
        close(found.gradient["keys"][i], pool[f"gtripl/grad/e_k_{i}"])
    check_head(found, pool, "gtripl")


def test_the_reference_arrays_hold_a_majority_vote_that_overrules(pool, dual):
    """A check of the arrays: with `batchwise_prompt` both references give an image what its batch
    chose, and that changes scores where, and only where, the vote overrules an image. So the tests
    above, which compare ours with the scores without it, would see a vote in ours."""
    for source in ("pilot", "google"):
        own, voted = pool[f"{source}/chosen"], pool[f"{source}/voted_chosen"]
        assert (voted == voted[0]).all()
        overruled = (np.sort(own, 1) != np.sort(voted, 1)).any(1)
        change = np.abs(pool[f"{source}/voted_logits"] - pool["pilot/logits"]).max(1)
        assert overruled.any() and (change[overruled] > 0.01).all()
        assert (change[~overruled] < BUDGET).all()
    overruled = (dual["google/chosen"] != dual["google/voted_chosen"])[:, 0]
    change = np.abs(dual["google/voted_logits"] - dual["google/logits"]).max(1)
    assert overruled.any() and (change[overruled] > 0.01).all()
    # PILOT's reshape changes every image of a batch, without any vote.
    change = np.abs(dual["pilot/batch_logits"] - dual["pilot/logits"]).max(1)
    assert (change > 0.1).all()


def test_dualprompt_equals_google_and_pilot(dual):
    general = dual["pilot/general"].reshape(2, 2, 2, 8)
    experts = np.moveaxis(dual["pilot/experts"].reshape(3, 2, 2, 3, 8), 2, 0)
    keys = dual["pilot/keys"][:, None]
    trainable = {"general": general, "expert": experts[1], "keys": keys[1]}
    found = run("dualprompt", dual, "pilot", trainable, {"experts": experts, "keys": keys}, *DUAL)
    close(found.feature, dual["pilot/feature"])
    close(found.scores, dual["pilot/logits"])
    close(found.scores, dual["google/logits"])
    assert set(dual["pilot/chosen"].ravel()) == {0, 1}
    np.testing.assert_array_equal(found.relevance, np.eye(2)[dual["pilot/chosen"][:, 0]])
    np.testing.assert_array_equal(dual["google/chosen"], dual["pilot/chosen"])
    close(found.terms["loss"], dual["pilot/losses"] + 0.1)
    close(found.terms["loss_key"].mean(), 1.0 - dual["google/masked_reduce_sim"])
    close(found.gradient["general"], dual["pilot/grad_general"].reshape(2, 2, 2, 8))
    gradient = np.moveaxis(dual["pilot/grad_experts"].reshape(3, 2, 2, 3, 8), 2, 0)
    close(found.gradient["expert"], gradient[1])
    close(found.gradient["keys"][0], dual["pilot/grad_keys"][1])
    assert not gradient[0].any() and not dual["pilot/grad_keys"][0].any()
    check_head(found, dual, "pilot")


def halved(rows):
    """[..., L, D] -> [..., 2, L / 2, D]: key rows, then value rows."""
    return rows.reshape(*rows.shape[:-2], 2, rows.shape[-2] // 2, rows.shape[-1])


def test_dualprompt_with_keys_in_every_block_equals_gtripl(dual):
    def stacked(kind, letter, blocks):
        return np.stack([dual[f"gtripl/{kind}/{letter}_{i}"] for i in blocks])

    general = halved(stacked("prompt", "g_p", (0, 1)))
    experts = np.moveaxis(halved(stacked("prompt", "e_p", (2, 3, 4))), 1, 0)
    keys = np.moveaxis(stacked("prompt", "e_k", (2, 3, 4)), 1, 0)
    trainable = {"general": general, "expert": experts[1], "keys": keys[1]}
    found = run(
        "dualprompt",
        dual,
        "gtripl",
        trainable,
        {"experts": experts, "keys": keys},
        "dualprompt.form=gtripl",
        "dualprompt.general_length=4",
        "dualprompt.expert_length=6",
        "dualprompt.key_loss=sum",
    )
    close(found.feature, dual["gtripl/feature"])
    close(found.scores, dual["gtripl/logits"])
    close(found.loss, dual["gtripl/loss"])
    close(found.gradient["general"], halved(stacked("grad", "g_p", (0, 1))))
    gradient = np.moveaxis(halved(stacked("grad", "e_p", (2, 3, 4))), 1, 0)
    close(found.gradient["expert"], gradient[1])
    key_gradient = np.moveaxis(stacked("grad", "e_k", (2, 3, 4)), 1, 0)
    close(found.gradient["keys"], key_gradient[1])
    assert not gradient[0].any() and not key_gradient[0].any()
    check_head(found, dual, "gtripl")
    query, unit = dual["query"], lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    votes = [np.argmax(unit(query) @ unit(keys[:, i]).T, axis=1) for i in range(3)]
    shares = np.mean([np.eye(2)[vote] for vote in votes], axis=0)
    np.testing.assert_allclose(found.relevance, shares, atol=1e-6)
