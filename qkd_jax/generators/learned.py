"""A small network that draws features, trained by a field; one for all classes.

A feature of class c is its mean, which is stored, plus what the network makes of noise,

    f_theta(eps, c) = mu_c + sigma_c g_theta(eps, c),

where sigma_c is the root mean square of the deviations of the class's features and g a perceptron
of three layers. While a task is present, the network is trained on its features, together with
draws of the network as it was before for all older classes: no feature of an old class is kept.
Labels are drawn evenly from all classes known. Its loss is one of `fields`: `drifting_loss`, as
published, or `gradient_flow_loss`.

What is ours: class means are stored and not learned, so that a network that has learned nothing
still draws around the right place; Adam along a cosine. Guidance, which sharpens samples at the
price of their variety, is off: a head is to be trained on what the classes are.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from qkd_jax.generators.bank import FeatureBank, add_to_bank, empty_bank, pick, rows_by_class
from qkd_jax.generators.fields import drifting_loss, gradient_flow_loss
from qkd_jax.generators.gaussian import ClassMoments, add_to_moments, empty_moments
from qkd_jax.generators.generator import Generator
from qkd_jax.nn.fit import cosine_factor, fit
from qkd_jax.nn.heads import unit
from qkd_jax.nn.layers import linear
from qkd_jax.settings.ranges import setting


@dataclass(frozen=True)
class DriftSettings:
    """A network that draws features: drifting (arXiv 2602.04770), gradient flow (2603.10592)."""

    steps: int = setting(1000, low=1)  # for each task
    learning_rate: float = setting(1e-3, above=0, end_rate="params")
    # Classes in a step, and for each of them as many samples and as many features.
    labels: int = setting(8, low=1)
    samples: int = setting(32, low=2)
    noise: int = setting(64, low=1)  # numbers in eps
    hidden: int = setting(256, low=1)  # width of the two hidden layers
    # Of `gradient_flow`: what the samples flow down, the bandwidth as a multiple of the median
    # distance (also half of it and twice it), and whether features are directions.
    divergence: Literal["kl_qp", "kl_pq", "chi2_qp", "mixed", "mmd"] = "mixed"
    bandwidth: float = setting(0.5, above=0)
    sphere: bool = False


@flax.struct.dataclass
class DrawingNetwork:
    """What is kept of all classes.

    Attributes:
      mean: [C, D].
      spread: [C], sigma.
      length: [C], mean length of a feature; draws on the sphere are given it.
      known: bool [C], the classes that the network has learned.
      params: of the network.
    """

    mean: jax.Array
    spread: jax.Array
    length: jax.Array
    known: jax.Array
    params: dict


@flax.struct.dataclass
class TaskFeatures:
    """The features of a task, with their moments.

    Attributes:
      bank: the features.
      moments: of each class, with variances.
    """

    bank: FeatureBank
    moments: ClassMoments

    @property
    def mean(self) -> jax.Array:
        """[M, D], of each class."""
        return self.moments.mean

    @property
    def count(self) -> jax.Array:
        """[M], of each class."""
        return self.moments.count


def learned(
    kind: Literal["drifting", "gradient_flow"], settings: DriftSettings, size: int
) -> Generator:
    """The generator whose memory is a `DrawingNetwork`, for tasks of at most `size` images."""
    return Generator(
        empty=partial(empty_network, settings=settings),
        statistics=partial(empty_features, size=size),
        add=add_features,
        fit=partial(fit_network, settings=settings, loss=loss_of(kind, settings)),
        draw=partial(draw_features, settings=settings, kind=kind),
    )


def empty_features(num_classes: int, width: int, *, size: int) -> TaskFeatures:
    """No feature yet."""
    return TaskFeatures(empty_bank(size, width), empty_moments(num_classes, width, "variance"))


def add_features(
    collected: TaskFeatures, features: jax.Array, positions: jax.Array, mask: jax.Array
) -> TaskFeatures:
    """`collected` with a batch added; arguments as for `add_to_moments`."""
    return TaskFeatures(
        add_to_bank(collected.bank, features, positions, mask),
        add_to_moments(collected.moments, features, positions, mask),
    )


def empty_network(num_classes: int, width: int, *, settings: DriftSettings) -> DrawingNetwork:
    """A network of zeros, which `fit_network` replaces in the first task."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), num_classes, width, settings))
    return DrawingNetwork(
        mean=jnp.zeros((num_classes, width)),
        spread=jnp.zeros(num_classes),
        length=jnp.zeros(num_classes),
        known=jnp.zeros(num_classes, bool),
        params=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    )


def init_params(key: jax.Array, num_classes: int, width: int, settings: DriftSettings) -> dict:
    """An embedding of each class, and three layers, normal with variance 1 / inputs or, behind a
    GELU, twice that: deviations start near unit size.
    """
    keys, sizes = jax.random.split(key, 4), (2 * settings.noise, settings.hidden, settings.hidden)
    layers = [
        {
            "kernel": ((1 + (i > 0)) / inputs) ** 0.5
            * jax.random.normal(keys[i], (inputs, outputs)),
            "bias": jnp.zeros(outputs),
        }
        for i, (inputs, outputs) in enumerate(zip(sizes, (*sizes[1:], width), strict=True))
    ]
    return {
        "embedding": jax.random.normal(keys[3], (num_classes, settings.noise)),
        "layers": layers,
    }


def deviations(params: dict, labels: jax.Array, noise: jax.Array) -> jax.Array:
    """g(eps, c) [..., D] of noise [..., E] for labels [...]."""
    hidden = jnp.concatenate([noise, params["embedding"][labels]], axis=-1)
    *inner, last = params["layers"]
    for layer in inner:
        hidden = jax.nn.gelu(linear(layer, hidden, hidden.dtype))
    return linear(last, hidden, hidden.dtype)


def _draw(network: DrawingNetwork, params: dict, labels: jax.Array, noise: jax.Array) -> jax.Array:
    """mu_c + sigma_c g(eps, c) [..., D]."""
    return network.mean[labels] + network.spread[labels][..., None] * deviations(
        params, labels, noise
    )


def on_sphere(kind: str, settings: DriftSettings) -> bool:
    """Whether draws are directions times the mean length of their class."""
    return kind == "gradient_flow" and settings.sphere


def draw_features(
    network: DrawingNetwork,
    key: jax.Array,
    labels: jax.Array,
    *,
    settings: DriftSettings,
    kind: str,
) -> jax.Array:
    """One feature for each of labels [N]: [N, D]."""
    noise = jax.random.normal(key, (*labels.shape, settings.noise))
    drawn = _draw(network, network.params, labels, noise)
    if on_sphere(kind, settings):
        drawn = network.length[labels][:, None] * unit(drawn)
    return drawn


def loss_of(kind: str, settings: DriftSettings):
    """(generated [L, G, D], features [L, P, D], means [L, G, D]) -> losses [L]."""
    if kind == "drifting":  # distances do not change when both are moved
        return lambda generated, data, mean: drifting_loss(generated - mean, data - mean)
    options = {
        "factors": tuple(settings.bandwidth * factor for factor in (0.5, 1.0, 2.0)),
        "divergence": settings.divergence,
        "sphere": settings.sphere,
    }
    if settings.sphere:
        return lambda generated, data, mean: gradient_flow_loss(
            unit(generated), unit(data), **options
        )
    return lambda generated, data, mean: gradient_flow_loss(
        generated - mean, data - mean, **options
    )


def fit_network(
    network: DrawingNetwork,
    collected: TaskFeatures,
    columns: jax.Array,
    key: jax.Array,
    *,
    settings: DriftSettings,
    loss: Any,
) -> DrawingNetwork:
    """`network` trained on the features of a task, and on its own draws of all older classes."""
    num_classes, before = len(network.known), network
    network = _with_moments(network, collected, columns)
    key_init, key_steps = jax.random.split(key)
    fresh = init_params(key_init, num_classes, network.mean.shape[1], settings)
    start = jax.tree.map(
        lambda new, old: jnp.where(jnp.any(before.known), old, new), fresh, before.params
    )
    # Known classes first; where each stands in the task, -1 for the older ones.
    classes, num_known = jnp.argsort(~network.known, stable=True), jnp.sum(network.known)
    positions = jnp.full(num_classes, -1).at[columns].set(jnp.arange(len(columns)), mode="drop")
    places = rows_by_class(collected.bank, len(columns))
    shape = (settings.labels, settings.samples)

    def batch(step):
        """labels [L, P], features [L, P, D], noise [L, G, E], with as many samples as features."""
        keys = jax.random.split(jax.random.fold_in(key_steps, step), 4)
        labels = classes[jax.random.randint(keys[0], (settings.labels, 1), 0, num_known)]
        labels = jnp.broadcast_to(labels, shape)
        own = pick(places, keys[1], positions[labels])
        old = _draw(
            before, before.params, labels, jax.random.normal(keys[2], (*shape, settings.noise))
        )
        features = jnp.where((positions[labels] >= 0)[..., None], own, old)
        return labels, features, jax.random.normal(keys[3], (*shape, settings.noise))

    def objective(params, batch):
        labels, features, noise = batch
        generated = _draw(network, params, labels, noise)
        return jnp.mean(loss(generated, features, network.mean[labels]))

    optimiser = optax.chain(
        optax.clip_by_global_norm(2.0),
        optax.adamw(
            lambda step: settings.learning_rate * cosine_factor(step, settings.steps),
            b1=0.9,
            b2=0.95,
            weight_decay=0.01,
        ),
    )
    params, _ = fit(start, optimiser.init(start), objective, batch, optimiser, settings.steps)
    return network.replace(params=params)


def _with_moments(
    network: DrawingNetwork, collected: TaskFeatures, columns: jax.Array
) -> DrawingNetwork:
    """`network` with what is stored of each class of a task."""
    bank, moments = collected.bank, collected.moments
    counts = jnp.maximum(moments.count, 1.0)
    spread = jnp.sqrt(jnp.mean(moments.scatter, axis=-1) / counts)
    filled = (jnp.arange(len(bank.features)) < bank.count).astype(jnp.float32)
    lengths = (
        jnp.zeros(len(columns))
        .at[bank.position]
        .add(filled * jnp.linalg.norm(bank.features, axis=-1))
    )
    return network.replace(
        mean=network.mean.at[columns].set(moments.mean, mode="drop"),
        spread=network.spread.at[columns].set(spread, mode="drop"),
        length=network.length.at[columns].set(lengths / counts, mode="drop"),
        known=network.known.at[columns].set(True, mode="drop"),
    )
