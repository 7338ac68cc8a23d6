"""Routed experts: in every block several small adapters, of which each input uses a few.

Beside a block's MLP, with x [N, D] the residual stream after attention and x_0 its class token:

    expert i       E_i(x) = scale_i * up_i(dropout(relu(down_i(LN_i(x)))))
    perceptron i   c_i = linear(LN(E_i(x_0))), logits over the classes that came with expert i
    router i       r_i = linear(E_i(x_0)), one logit for each of the experts 0 to i

The M routers whose own perceptron has the least entropy, each a softmax over its K largest logits,
weigh the experts; the block adds sum_i w_i E_i(x) + S(x), where S is one more adapter of the same
form that all inputs use. While an expert is trained, its router is always one of the M.

Source: bi-level routing, CaRE, arXiv 2602.03473 (authors' code LMMMEng/CaRE).

All experts are computed for all tokens, as one wide adapter: a router's weight is a factor on the
hidden units of its expert, and each LN's scale and bias are folded into the kernel behind it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.nn.layers import as_row, at_least_float32, matmul_trainable, standardize
from qkd_jax.nn.losses import MASKED, entropy

EPS = 1e-5  # of these LayerNorms
SPREAD = 0.02  # deviation of new routers and of the perceptrons' LayerNorm scales


@dataclass(frozen=True)
class ExpertsSpec:
    """Static settings of a mixture; an `adapters.BlockInsert`.

    An adapter set is {"experts", "shared", "class_mask", "newest", "forced"}, every leaf with a
    leading axis of blocks: "experts" a stack of `new_expert` along a second axis of T, "shared" of
    `new_adapter`, "class_mask" bool [T, M] the classes of each expert, "newest" int the last
    expert that may be used, "forced" bool, whether its router is always one of the M.

    Attributes:
        num_experts: T, for which there is room.
        expert_bottleneck, shared_bottleneck: hidden units of an expert and of S.
        routers_per_input, experts_per_router: M and K.
        dropout: rate inside every bottleneck, used only when dropout keys are given.
        first_block: mixtures sit in blocks first_block, first_block + 1, ...
    """

    num_experts: int
    expert_bottleneck: int
    shared_bottleneck: int
    routers_per_input: int
    experts_per_router: int
    dropout: float
    first_block: int = 0
    placement = "parallel"
    input = "residual"

    @property
    def bottleneck(self) -> int:
        """Hidden units of all experts and of S."""
        return self.num_experts * self.expert_bottleneck + self.shared_bottleneck

    def apply(self, adapter_block, x, dropout_mask, compute_dtype):
        """(What the mixture adds, {"logits": [B, M] of the newest perceptron, "weights": [B, T] of
        the experts}); see `adapters.BlockInsert.apply`.
        """
        wide = at_least_float32(compute_dtype)
        experts, (down, up) = adapter_block["experts"], _joined(adapter_block)
        normed = standardize(x, EPS).astype(compute_dtype)
        hidden = matmul_trainable(normed, down["kernel"].astype(compute_dtype))
        hidden = jax.nn.relu(hidden + as_row(down["bias"].astype(compute_dtype), hidden))
        if dropout_mask is not None:
            hidden = hidden * dropout_mask.astype(compute_dtype)

        count = self.num_experts * self.expert_bottleneck
        of_class_token = hidden[:, 0, :count].reshape(len(x), self.num_experts, -1)
        outputs = _outputs(experts["expert"], of_class_token.astype(wide))
        logits = perceptron_logits(experts["perceptron"], outputs)
        weights = self.weights(adapter_block, outputs, logits)

        factors = jnp.repeat(weights, self.expert_bottleneck, axis=1)
        factors = jnp.pad(factors, ((0, 0), (0, self.shared_bottleneck)), constant_values=1.0)
        mixed = hidden * factors[:, None].astype(compute_dtype)
        added = matmul_trainable(mixed, up["kernel"].astype(compute_dtype))
        bias = jnp.pad(weights, ((0, 0), (0, 1)), constant_values=1.0) @ up["bias"]
        newest = lax.dynamic_index_in_dim(logits, adapter_block["newest"], 1, keepdims=False)
        observed = {"logits": newest, "weights": weights}
        return added.astype(wide) + bias[:, None], observed

    def weights(self, adapter_block: dict, outputs: jax.Array, logits: jax.Array) -> jax.Array:
        """[B, T]: the weights of the experts, which sum to the number of routers in use.

        Args:
            outputs: [B, T, D], of every expert for the class token.
            logits: [B, T, M], of every perceptron.
        """
        newest, order = adapter_block["newest"], jnp.arange(self.num_experts)
        logits = jnp.where(adapter_block["class_mask"][None], logits, MASKED)
        doubt = jnp.where((order <= newest)[None], entropy(jax.nn.softmax(logits)), jnp.inf)
        first = adapter_block["forced"] & (order == newest)
        doubt = jnp.where(first[None], -jnp.inf, doubt)
        _, chosen = lax.top_k(-doubt, min(self.routers_per_input, self.num_experts))

        router = adapter_block["experts"]["router"]
        votes = jnp.einsum("btd,tde->bte", outputs, router["kernel"]) + router["bias"][None]
        votes = jnp.take_along_axis(votes, chosen[:, :, None], axis=1)
        known = order[None, None] <= chosen[:, :, None]
        votes = jnp.where(known, votes, MASKED)
        _, best = lax.top_k(votes, min(self.experts_per_router, self.num_experts))
        kept = known & jax.nn.one_hot(best, self.num_experts, dtype=bool).any(axis=2)
        shares = jax.nn.softmax(jnp.where(kept, votes, MASKED))
        # With fewer than M experts so far, the routers chosen last belong to coming tasks.
        return jnp.sum(jnp.where((chosen <= newest)[:, :, None], shares, 0.0), axis=1)


def _folded(adapter):
    """(down, up) of an adapter [..., D, R] with LN scale and bias, and output scale, folded in."""
    norm, down, up, scale = (adapter[name] for name in ("norm", "down", "up", "scale"))
    into = {
        "kernel": norm["scale"][..., :, None] * down["kernel"],
        "bias": jnp.einsum("...d,...dr->...r", norm["bias"], down["kernel"]) + down["bias"],
    }
    back = {"kernel": up["kernel"] * scale[..., None, :], "bias": up["bias"] * scale}
    return into, back


def _joined(adapter_block):
    """(down, up) of the wide adapter: the hidden units of expert 0, 1, ... and of S; the up-biases
    stay apart, [T + 1, D].
    """
    experts = _folded(adapter_block["experts"]["expert"])
    (down, up), (down_shared, up_shared) = experts, _folded(adapter_block["shared"])
    columns = jnp.moveaxis(down["kernel"], 0, 1).reshape(down["kernel"].shape[1], -1)
    rows = up["kernel"].reshape(-1, columns.shape[0])
    return (
        {
            "kernel": jnp.concatenate([columns, down_shared["kernel"]], axis=1),
            "bias": jnp.concatenate([down["bias"].reshape(-1), down_shared["bias"]]),
        },
        {
            "kernel": jnp.concatenate([rows, up_shared["kernel"]]),
            "bias": jnp.concatenate([up["bias"], up_shared["bias"][None]]),
        },
    )


def _outputs(expert, hidden):
    """E_i [B, T, D] of hidden units [B, T, R]."""
    _, up = _folded(expert)
    return jnp.einsum("btr,trd->btd", hidden, up["kernel"]) + up["bias"][None]


def perceptron_logits(perceptron: dict, outputs: jax.Array) -> jax.Array:
    """Logits [B, T, M] of the class perceptrons for expert outputs [B, T, D]."""
    norm = perceptron["norm"]
    normed = standardize(outputs, EPS) * norm["scale"][None] + norm["bias"][None]
    return jnp.einsum("btd,tdm->btm", normed, perceptron["kernel"]) + perceptron["bias"][None]


def _uniform(key, shape, bound):
    return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)


def new_adapter(key: jax.Array, blocks: int, width: int, bottleneck: int) -> dict:
    """An adapter in each of L blocks: LN, down and up, uniform in +-1 / sqrt(inputs) with biases of
    zero, and an output scale [L, D] of zero, so that it adds nothing.
    """
    keys = jax.random.split(key)
    return {
        "norm": {"scale": jnp.ones((blocks, width)), "bias": jnp.zeros((blocks, width))},
        "down": {
            "kernel": _uniform(keys[0], (blocks, width, bottleneck), width**-0.5),
            "bias": jnp.zeros((blocks, bottleneck)),
        },
        "up": {
            "kernel": _uniform(keys[1], (blocks, bottleneck, width), bottleneck**-0.5),
            "bias": jnp.zeros((blocks, width)),
        },
        "scale": jnp.zeros((blocks, width)),
    }


def new_expert(
    key: jax.Array, spec: ExpertsSpec, blocks: int, width: int, num_classes: int
) -> dict:
    """{"expert", "perceptron", "router"} for each of L blocks, with logits for M classes."""
    keys = jax.random.split(key, 5)

    def small(key, shape):
        return SPREAD * jax.random.truncated_normal(key, -2.0, 2.0, shape)

    return {
        "expert": new_adapter(keys[0], blocks, width, spec.expert_bottleneck),
        "perceptron": {
            "norm": {"scale": small(keys[1], (blocks, width)), "bias": jnp.zeros((blocks, width))},
            "kernel": _uniform(keys[2], (blocks, width, num_classes), width**-0.5),
            "bias": _uniform(keys[3], (blocks, num_classes), width**-0.5),
        },
        "router": {
            "kernel": small(keys[4], (blocks, width, spec.num_experts)),
            "bias": jnp.zeros((blocks, spec.num_experts)),
        },
    }
