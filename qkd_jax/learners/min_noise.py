"""MIN: mixtures of learned noise behind every block, and recursive least squares on top.

Jiang, Shi, Zhang, Zhang and Li, "Mixture of Noise for Pre-Trained Model-Based Class-Incremental
Learning", NeurIPS 2025, arXiv 2509.16738; the authors' code is ASCIIJK/MiN-NeurIPS2025. Every task
adds a noise generator to every block; what is added to the block's output is the sum of all tasks'
noise (`nn.noise`), with weights that are the softmax of the cosines between the mean feature of the
new task and those of all tasks. The classifier is ridge regression on h = relu(f W), f the feature
and W [D, M] fixed and random, over the images of all tasks. A task

- adds its images to the sums G = sum h h^T and C = sum h y^T of the ridge regression, three times,
  under the noise so far;
- trains its generator and an auxiliary linear head on h, which starts at zero, by cross-entropy
  over all classes seen on the sum of both heads' logits; no gradient passes the ridge regression's,
  so what is learned is its residual;
- drops the auxiliary head and adds its images once more, under the new noise.

The first task has no sums yet, and adds its images four times in the end. In it a dense layer
behind every block and all LayerNorms are tuned as well (`min.first_session`), then frozen.

Published (configs/model_configs/*.json): R 192, M 16,384, ridge 100 (ImageNet-R 500); SGD at 1e-3,
momentum 0.9, constant, decay 5e-4 on every leaf, batch 128, 10 epochs.

Where we differ from the authors' code (its state of September 2025, 34b94ef):
- Its weights are computed one step too early: before the mean feature of the new task is known, so
  that of the last task stands in, and those of the first two tasks are zero, whose noise is never
  trained. `min.weights=previous` is theirs; with ours, `current`, every task's noise is trained.
- Noise is not random there: eps is 1. Weights are not trained, though they are marked so, since no
  optimiser is given them. Both are as theirs here.
- Its recursion for (G + ridge I)^-1 gives, but for rounding, the solution of the sums, which is
  what is computed here, in float32: beside a ridge of 100 that is enough.
- The sums before training, and the mean features, see each image as at test; theirs see random
  crops, three times another one for the sums.
- The auxiliary head has a bias in the first task alone, there and here.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qkd_jax.learners.features import pooled_feature
from qkd_jax.learners.ranpac import project as hidden_of
from qkd_jax.learners.ranpac import ridge_solution
from qkd_jax.learners.shape import NO_SUMS, Learner, Slots, Survey, register
from qkd_jax.learners.state import seen_classes
from qkd_jax.learners.task_heads import mask_unseen
from qkd_jax.nn.backbone import norms_of, with_norms
from qkd_jax.nn.inserts import Inserts
from qkd_jax.nn.losses import cross_entropy
from qkd_jax.nn.noise import NoiseSpec, mixture, mixture_weights, new_linear, projections
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class MinSettings:
    """MIN (arXiv 2509.16738): mixture of noise, recursive least squares."""

    bottleneck: int = setting(192, low=1)  # R
    # M; its Gram matrix takes 4 M^2 bytes. Published: 16,384, with 24,000 images or more.
    projection_dim: int = setting(2048, low=1)
    ridge: float = setting(100.0, above=0)
    # How often a task's images are in the sums as they were before its training.
    fits: int = setting(3, low=0)
    first_session: bool = True  # tune dense layers and LayerNorms in the first task
    # Whose mean feature the weights compare: the new task's, or the last one's, as in the authors'
    # code, where the first two tasks have no noise.
    weights: Literal["current", "previous"] = "current"


def new_generator(backbone, config):
    """The generator of a new task, which adds nothing until it is trained."""
    one = new_linear(backbone.spec.depth, config.min.bottleneck)
    return {"mean": one, "spread": one}


def new_auxiliary(config):
    classes = config.shapes.num_classes
    return {"rows": jnp.zeros((classes, config.min.projection_dim)), "bias": jnp.zeros(classes)}


def init(key, backbone, config):
    settings, spec, shapes = config.min, backbone.spec, config.shapes
    size, keys = settings.projection_dim, jax.random.split(key)
    generator = new_generator(backbone, config)
    shared = {"dense": new_linear(spec.depth, spec.width), "norms": norms_of(backbone.params)}
    memory = {
        **shared,
        **projections(keys[0], spec.depth, spec.width, settings.bottleneck),
        "generators": jax.tree.map(lambda a: jnp.stack([a] * shapes.max_tasks), generator),
        "weights": jnp.zeros(shapes.max_tasks),
        "prototypes": jnp.zeros((shapes.max_tasks, spec.width)),
        "projection": jax.random.uniform(
            keys[1], (spec.width, size), jnp.float32, minval=-(size**-0.5), maxval=size**-0.5
        ),
        "gram": jnp.zeros((size, size)),
        "moments": jnp.zeros((size, shapes.num_classes)),
        "rows": jnp.zeros((shapes.num_classes, size)),
    }
    return {"noise": generator, **shared, "head": new_auxiliary(config)}, memory


def begin(state, key):
    trainable = {
        "noise": new_generator(state.backbone, state.config),
        "dense": state.memory["dense"],
        "norms": state.memory["norms"],
        "head": new_auxiliary(state.config),
    }
    return trainable, state.memory


def with_noise(state, noise):
    """The generators in memory with `noise` in the current task's place."""
    return jax.tree.map(
        lambda all_, one: all_.at[state.task].set(one), state.memory["generators"], noise
    )


def encode_with(state, generators, dense, norms, inputs):
    """Features [B, D] with the mixture of `generators`, a dense layer behind every block, and the
    LayerNorms `norms` in place of the backbone's.
    """
    memory = state.memory
    noise = {
        "down": memory["down"],
        "up": memory["up"],
        "dense": dense,
        "mixed": mixture(generators, memory["weights"]),
    }
    backbone = state.backbone.replace(params=with_norms(state.backbone.params, norms))
    inserts = Inserts(noise, NoiseSpec(state.config.min.bottleneck))
    return pooled_feature(state, inputs, inserts, backbone=backbone)


def loss(trainable, state, inputs, batch, context):
    labels, head, seen = batch["label"], trainable["head"], seen_classes(state)
    features = encode_with(
        state,
        with_noise(state, trainable["noise"]),
        trainable["dense"],
        trainable["norms"],
        inputs,
    )
    hidden = hidden_of(state, features)
    first = (state.task == 0).astype(jnp.float32)
    logits = hidden @ head["rows"].T + (first * head["bias"])[None]
    logits = logits + lax.stop_gradient(hidden @ state.memory["rows"].T)
    ce = cross_entropy(logits, labels, seen)
    correct = jnp.argmax(jnp.where(seen, logits, -jnp.inf), axis=1) == labels
    return {"loss": ce, "loss_ce": ce, "train_accuracy": 100.0 * correct.astype(jnp.float32)}


def project(trainable, state):
    """After a step, dense layers and LayerNorms are put back, except in the first session."""
    tuned = (state.task == 0) & state.config.min.first_session
    shared = {
        name: jax.tree.map(
            lambda own, kept: jnp.where(tuned, own, kept), trainable[name], state.memory[name]
        )
        for name in ("dense", "norms")
    }
    return {**trainable, **shared}


def freeze(state):
    trainable = state.trainable
    memory = {
        **state.memory,
        "generators": with_noise(state, trainable["noise"]),
        "dense": trainable["dense"],
        "norms": trainable["norms"],
    }
    return state.replace(memory=memory)


def extract(state, inputs, slot, features):
    memory = state.memory
    return encode_with(state, memory["generators"], memory["dense"], memory["norms"], inputs)


def add_images(state, inputs, labels, mask):
    """Sums over images: G, C, their features and their number."""
    features = extract(state, inputs, state.task, None)
    real = mask.astype(jnp.float32)[:, None]
    hidden = hidden_of(state, features) * real
    targets = jax.nn.one_hot(labels, state.config.shapes.num_classes) * real
    return {
        "gram": jnp.matmul(hidden.T, hidden, precision="highest"),
        "moments": jnp.matmul(hidden.T, targets, precision="highest"),
        "feature": jnp.sum(features * real, axis=0),
        "count": jnp.sum(real),
    }


def with_images(state, sums, times):
    """The state with a task's images `times` in the ridge regression, and their mean feature."""
    memory = state.memory
    gram = memory["gram"] + times * sums["gram"]
    moments = memory["moments"] + times * sums["moments"]
    solution, _ = ridge_solution(gram, moments, jnp.float32(state.config.min.ridge))
    mean = sums["feature"] / jnp.maximum(sums["count"], 1.0)
    prototypes = memory["prototypes"].at[state.task].set(mean)
    memory = {**memory, "gram": gram, "moments": moments, "prototypes": prototypes}
    return state.replace(memory={**memory, "rows": solution.T})


def before(state, sums, key):
    """The state with the images added under the noise so far, and with new mixture weights, which
    the task trains under.
    """
    settings, task = state.config.min, state.task
    state = with_images(state, sums, jnp.where(task > 0, 1.0 * settings.fits, 0.0))
    prototypes, last = state.memory["prototypes"], jnp.maximum(task - 1, 0)
    literal = settings.weights == "previous"
    weights = mixture_weights(prototypes, task, last if literal else task)
    if literal:
        weights = jnp.where(task > 1, weights, 0.0)
    return state.replace(memory={**state.memory, "weights": weights})


def after(state, sums):
    """The state with the images added once more, under the new noise. Those of the first task,
    which `before` left out, are added as often as a later task's are in all.
    """
    return with_images(state, sums, jnp.where(state.task > 0, 1.0, 1.0 + state.config.min.fits))


def score(state, features):
    hidden = hidden_of(state, features[:, state.task])
    scores = jnp.matmul(hidden, state.memory["rows"].T, precision="highest")
    return mask_unseen(state, scores), None


# Each task has a slot of its own, since its noise and the weights of all change the one feature.
LEARNER = register(
    Learner(
        name="min",
        init=init,
        begin=begin,
        loss=loss,
        freeze=freeze,
        finish=lambda state, sums, key: state,
        extract=extract,
        score=score,
        slots=Slots(score=lambda task: (task,), finish=lambda task: ()),
        sums=NO_SUMS,
        survey=Survey(add=add_images, before=before, after=after),
        project=project,
    ),
    min=MinSettings,
)
