"""Classifiers in closed form: sums over features, and a formula that turns them into a classifier.

Nothing is trained. Sums over the inputs of several tasks add up, so the result does not depend on
how classes are cut into tasks, nor on the order in which they come. In the table, h is a feature,
z(h) what sums are kept of, m_c the mean of z over class c, and S the scatter of z within classes.

    kind      z(h)                      score of class c
    whitened  h                         the cosine of h and m_c in the metric of the shrunk S
    rls       relu(h W)                 ridge regression on one-hot labels, a fixed ridge
    ranpac    relu(h W)                 the same; the ridge has the least error on held-out images
    klda      sqrt(2/M) cos(h W + b)    linear discriminant analysis with S + ridge I
    anacp     h/|h|, gelu(h/|h| W_i)    two layers of ridge regression, see `_solve_contrastive`
    lr_rgda   h                         log density of a Gaussian with covariance
                                        a_1 S_c (its leading directions) + a_2 mean_c S_c + a_3 I

Sources: whitened is QKD's head here (`nn.whitening`). rls is ACIL (Zhuang et al., NeurIPS 2022,
arXiv 2205.14922), whose recursion for the inverse gives the solution of the sums (Woodbury).
ranpac: McDonnell et al., NeurIPS 2023, arXiv 2307.02251. klda and anacp: Momeni et al. ("Continual
Learning Using a Kernel-Based Method Over Foundation Models", AAAI 2025; "AnaCP", NeurIPS 2025).
lr_rgda: "Analytic Exemplar-free Class-Incremental Learning ... via RGDA with Low-rank Factors",
authors' code raoxuan98-hash/lr_rgda_hopdc.

z is computed in float32, as it is at test. Sums and solutions are float64, on the host: a ridge of
0.1 beside eigenvalues of 1e8 is below the rounding of float32. The arrays of a state are float32,
so a sum is stored as a `moments.Pair`. What scores is float32 again.

Where they differ from the authors' code:
- klda centres each class at its own mean; theirs, where a class comes in several batches, at the
  mean so far. anacp weights tasks by their images; theirs counts the newest twice. Both would
  depend on the order.
- anacp leaves out the direction in which centred means have no extent: theirs adds an arbitrary
  vector there, the last row of the SVD.
- lr_rgda takes the leading directions from an exact SVD, not from a randomised one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from qkd_jax.nn.heads import head_logits, unit
from qkd_jax.nn.moments import add_moments, class_means, empty_moments, within_class_scatter
from qkd_jax.nn.whitening import Metric, isotropic_share, whiten
from qkd_jax.settings.sections import ClassifierConfig

ROWS = 1024  # of z at once, in float64
RIDGES = tuple(10.0**power for power in range(-8, 9))  # that RanPAC chooses from
FLOOR = 1e-4  # `anacp`: added to the variances of unit features
DRAWS = 100  # `anacp`: of each class, for its second layer

# As the authors publish them: the size of the projection, and the ridge.
PROJECTION_DIM = {"rls": 8192, "ranpac": 10_000, "klda": 5000, "anacp": 5000}
RIDGE = {"rls": 0.1, "klda": 1e-3, "anacp": 100.0}


def ridge_solution(gram: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """(G + ridge I)^-1 B [M, K] for B [M, K]; the ridge is raised to what float64 can tell from
    zero, and further while there is no Cholesky factor.
    """
    size = len(gram)
    eps = np.finfo(np.float64).eps
    ridge = max(ridge, eps * size**0.5 * max(np.trace(gram) / size, eps))
    while True:
        regular = gram.copy()
        regular.flat[:: size + 1] += ridge
        try:
            factor = scipy.linalg.cho_factor(regular, overwrite_a=True)
        except np.linalg.LinAlgError:
            ridge *= 10.0
            continue
        return scipy.linalg.cho_solve(factor, targets)


class ClosedForm(NamedTuple):
    """A classifier in closed form, as its parts. `drawn` and the rule are dicts of float32 arrays.

    Attributes:
      draw: (settings, key, width) -> drawn, what is drawn once and never changes.
      vectors: (drawn, features [N, W] float32) -> z for each of the moments, [N, M] float32.
      solve: (settings, drawn, sums, key) -> the rule, float64 arrays.
      scores: (drawn, rule, features [B, W]) -> [B, C].
      rule: (settings, C, W) -> the shape of each array of the rule.
      empty: (settings, drawn, C, W) -> sums before any input.
      add: (settings, drawn, sums, features [N, W], labels int [N], key) -> sums with one task
        added; every class comes in one task.
    """

    draw: Callable
    vectors: Callable
    solve: Callable
    scores: Callable
    rule: Callable
    empty: Callable
    add: Callable


def size_of(settings: ClassifierConfig) -> int:
    """M, the size of the random projection."""
    return settings.projection_dim or PROJECTION_DIM[settings.kind]


def ridge_of(settings: ClassifierConfig) -> float:
    """The fixed ridge of `rls`, `klda` and `anacp`."""
    return settings.ridge or RIDGE[settings.kind]


def _multiply(a, b):
    return jnp.matmul(a, b, precision="highest")


def _draws_nothing(settings, key, width):
    return {}


def _as_they_are(drawn, features):
    return (features,)


def _draw_projection(settings, key, width):
    return {"projection": jax.random.normal(key, (width, size_of(settings)))}


def _rectified(drawn, features):
    return (jax.nn.relu(_multiply(features, drawn["projection"])),)


def _draw_fourier(settings, key, width):
    size = size_of(settings)
    keys = jax.random.split(key)
    scale = jnp.float32(2.0 * settings.kernel_gamma) ** 0.5
    return {
        "projection": scale * jax.random.normal(keys[0], (width, size)),
        "phase": jax.random.uniform(keys[1], (size,), maxval=2.0 * jnp.pi),
    }


def _fourier(drawn, features):
    angles = _multiply(features, drawn["projection"]) + drawn["phase"][None]
    return (jnp.float32(2.0 / angles.shape[1]) ** 0.5 * jnp.cos(angles),)


def _draw_layers(settings, key, width):
    keys, size = jax.random.split(key), size_of(settings)
    return {
        "projection": jax.random.normal(keys[0], (settings.num_projections, width, size)),
        "second": jax.random.normal(keys[1], (width, size)),
    }


def _unit_and_hidden(drawn, features):
    directions = unit(features)
    return (directions, *_gelu_projections(drawn, directions))


def _gelu_projections(drawn, vectors):
    return [jax.nn.gelu(_multiply(vectors, p), approximate=False) for p in drawn["projection"]]


def _empty_sums(settings, drawn, num_classes, width, vectors):
    given = jax.ShapeDtypeStruct((1, width), jnp.float32)
    shapes = jax.eval_shape(vectors, drawn, given)
    return {"moments": tuple(empty_moments(num_classes, z.shape[1]) for z in shapes)}


def _add_vectors(settings, drawn, sums, features, labels, key, vectors):
    moments = sums["moments"]
    for start in range(0, len(labels), ROWS):
        part = slice(start, start + ROWS)
        moments = tuple(
            add_moments(m, np.asarray(z), labels[part])
            for m, z in zip(moments, vectors(drawn, jnp.asarray(features[part])), strict=True)
        )
    return {**sums, "moments": moments}


def _of_moments(draw, vectors, solve, scores, rule, **parts) -> ClosedForm:
    """A classifier whose sums are the moments of `vectors`."""

    def empty(*arguments):
        return _empty_sums(*arguments, vectors)

    def add(*arguments):
        return _add_vectors(*arguments, vectors)

    return ClosedForm(draw, vectors, solve, scores, rule, **{"empty": empty, "add": add, **parts})


def _solve_whitened(settings, drawn, sums, key):
    """As `nn.whitening.learned_metric`, in float64.

    Related: Deep SLDA (Hayes and Kanan, CVPRW 2020, arXiv 1909.01520) also has one running
    covariance, but scores by the linear discriminant, which depends on lengths; FeCAM (Goswami et
    al., NeurIPS 2023, arXiv 2309.14062) has a covariance for each class, a power transform of the
    feature, and scores by Mahalanobis distance.
    """
    (moments,) = sums["moments"]
    seen = moments.count > 0
    means, size = class_means(moments.count, moments.total), len(moments.outer)
    sigma = within_class_scatter(moments) / max(moments.count.sum(), 1.0)
    variance = max(np.trace(sigma) / size, 1e-6)
    share = isotropic_share(settings.shrinkage, settings.prior, moments.count.sum(), size)
    isotropic = max(share, 1e-3) * variance * np.eye(size)
    factor = np.linalg.cholesky((1.0 - share) * sigma + isotropic)
    whitener = scipy.linalg.solve_triangular(factor, np.eye(size), lower=True)
    centre = means[seen].sum(0) / max(seen.sum(), 1)
    return {"centre": centre, "whitener": whitener, "rows": (means - centre) @ whitener.T}


def _scores_whitened(drawn, rule, features):
    vectors = whiten(Metric(rule["centre"], rule["whitener"]), features)
    return head_logits(vectors, rule["rows"], jnp.float32(1.0), "cosine")


def _solve_ridge(settings, drawn, sums, key):
    (moments,) = sums["moments"]
    ridge = float(sums["ridge"]) if "ridge" in sums else ridge_of(settings)
    return {"rows": ridge_solution(moments.outer, moments.total.T, ridge).T}


def _scores_rectified(drawn, rule, features):
    return _multiply(_rectified(drawn, features)[0], rule["rows"].T)


def _empty_with_ridge(*arguments):
    return {**_empty_sums(*arguments, _rectified), "ridge": np.float64(1.0)}


def _add_and_choose_ridge(settings, drawn, sums, features, labels, key):
    """Also chooses the ridge anew, on the task's own images: the first 80 % of a random order are
    fitted and the rest held out. A task with a single image says nothing about the ridge.
    """
    sums = _add_vectors(settings, drawn, sums, features, labels, key, _rectified)
    if len(labels) < 2:
        return sums
    order = np.asarray(jax.random.permutation(key, len(labels)))
    (vectors,) = _rectified(drawn, jnp.asarray(features[order]))
    _, positions = np.unique(labels[order], return_inverse=True)
    errors = held_out_errors(np.float64(vectors), np.eye(positions.max() + 1)[positions])
    return {**sums, "ridge": np.float64(RIDGES[int(np.argmin(errors))])}


def held_out_errors(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean squared error [17] of ridge regressions with `RIDGES`, fitted on the first 80 % of
    vectors [N, M] and targets [N, K], over the other 20 %.
    """
    count = 4 * len(vectors) // 5
    left, values, right = np.linalg.svd(vectors[:count], full_matrices=False)
    inputs, answers = vectors[count:] @ right.T, left.T @ targets[:count]
    # A direction of length zero has no answer, whatever the ridge.
    known = values > np.finfo(np.float64).eps * max(vectors.shape) * values.max(initial=0.0)
    inputs, values, answers = inputs[:, known], values[known], answers[known]
    errors = []
    for ridge in RIDGES:
        shrunk = (values / (values * values + ridge))[:, None] * answers
        errors.append(np.mean((inputs @ shrunk - targets[count:]) ** 2))
    return np.asarray(errors)


def linear_discriminant(
    factor: tuple, means: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(rows [C, M], bias [C]): h . row + bias is -1/2 the squared Mahalanobis distance to each
    mean, but for what all classes have in common. Zero for classes not seen.

    Args:
      factor: of the covariance, from `scipy.linalg.cho_factor`.
      means: [C, M].
    """
    centre = means[seen].sum(0) / max(seen.sum(), 1)
    rows = scipy.linalg.cho_solve(factor, (means - centre).T).T * seen[:, None]
    return rows, -0.5 * np.sum((means + centre) * rows, axis=1)


def _solve_kernel(settings, drawn, sums, key):
    (moments,) = sums["moments"]
    covariance = within_class_scatter(moments) + ridge_of(settings) * np.eye(len(moments.outer))
    means, seen = class_means(moments.count, moments.total), moments.count > 0
    rows, bias = linear_discriminant(scipy.linalg.cho_factor(covariance), means, seen)
    return {"rows": rows, "bias": bias}


def _scores_kernel(drawn, rule, features):
    return _multiply(_fourier(drawn, features)[0], rule["rows"].T) + rule["bias"][None]


def spread_means(means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """[K, D]: unit targets of K classes, from their means and the covariance they share.

    Centred means are whitened by V = Sigma^(-1/2), their singular values raised by 1, the result
    multiplied by V once more, and the mean of the means added.
    """
    values, vectors = np.linalg.eigh(covariance)
    whitener = (vectors / np.sqrt(values + 1e-8)) @ vectors.T
    centre = means.mean(0)
    left, lengths, right = np.linalg.svd((means - centre) @ whitener, full_matrices=False)
    extends = lengths > 1e-8 * lengths.max(initial=0.0)
    raised = (left[:, extends] * (lengths[extends] + 1.0)) @ right[extends]
    targets = raised @ whitener + centre
    return targets / np.linalg.norm(targets, axis=1, keepdims=True)


def _solve_contrastive(settings, drawn, sums, key):
    """Layer one: for each projection a ridge regression from its z to the unit targets of
    `spread_means`; their answers are scaled to length 1 and averaged. Layer two: a GELU projection
    of that and a ridge regression to one-hot labels, fitted on draws of every class seen from
    N(m_c, Sigma).
    """
    first, *hidden = sums["moments"]
    classes, ridge = np.flatnonzero(first.count), ridge_of(settings)
    size, width = len(hidden[0].outer), len(first.outer)
    means = class_means(first.count, first.total)
    sigma = within_class_scatter(first) / first.count.sum() + FLOOR * np.eye(width)
    targets = np.zeros_like(means)
    targets[classes] = spread_means(means[classes], sigma)
    layers = [ridge_solution(z.outer, z.total.T @ targets, ridge) for z in hidden]

    rule = {"layers": jnp.asarray(np.stack(layers), jnp.float32)}
    factor, gram = np.linalg.cholesky(sigma), np.zeros((size, size))
    totals = np.zeros((len(means), size))
    for start in range(0, len(classes), ROWS // DRAWS):
        group = classes[start : start + ROWS // DRAWS]
        draws = np.stack([means[c] + noise_of(key, c, width) @ factor.T for c in group])
        # As in theirs, draws are not scaled to length 1.
        hidden = _gelu_projections(drawn, jnp.asarray(draws.reshape(-1, width), jnp.float32))
        vectors = _second_layer(drawn, rule, hidden)
        # Next to a ridge of this size float32 would do, and on the device it is fast.
        gram += np.asarray(_multiply(vectors.T, vectors))
        totals[group] = np.float64(vectors).reshape(len(group), DRAWS, size).sum(1)
    return {"layers": np.stack(layers), "rows": ridge_solution(gram, totals.T, ridge).T}


def noise_of(key: jax.Array, label: int, width: int) -> np.ndarray:
    """Standard normal numbers [DRAWS, width] of one class, the same after every task."""
    noise = jax.random.normal(jax.random.fold_in(key, label), (DRAWS, width))
    return np.float64(noise)


def _second_layer(drawn, rule, hidden):
    answers = [unit(_multiply(z, layer)) for z, layer in zip(hidden, rule["layers"], strict=True)]
    mean = sum(answers) / jnp.float32(len(answers))
    return jax.nn.gelu(_multiply(mean, drawn["second"]), approximate=False)


def _scores_contrastive(drawn, rule, features):
    _, *hidden = _unit_and_hidden(drawn, features)
    return _multiply(_second_layer(drawn, rule, hidden), rule["rows"].T)


def _rank_of(settings, width):
    return min(settings.rank, width)


def _empty_gaussians(settings, drawn, num_classes, width):
    shapes = {
        "count": (num_classes,),
        "total": (num_classes, width),
        "covariance": (width, width),  # the sum over classes
        "factors": (num_classes, width, _rank_of(settings, width)),
    }
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def _add_gaussians(settings, drawn, sums, features, labels, key):
    """Of each class the covariance, and U sqrt(s) of its leading eigenvectors U and values s."""
    sums = {name: array.copy() for name, array in sums.items()}
    for label in np.unique(labels):
        own = np.float64(features[labels == label])
        centred = (own - own.mean(0)) / max(len(own) - 1, 1) ** 0.5
        _, values, vectors = np.linalg.svd(centred, full_matrices=False)
        leading = min(len(values), sums["factors"].shape[2])
        sums["count"][label] += len(own)
        sums["total"][label] += own.sum(0)
        sums["covariance"] += centred.T @ centred
        sums["factors"][label, :, :leading] = (values[:leading, None] * vectors[:leading]).T
    return sums


def _solve_gaussians(settings, drawn, sums, key):
    """The covariance of class c is B + F F^T with B shared by all, F [D, r]: by Woodbury

        (B + F F^T)^-1 = B^-1 - A^T A   with A = L^-1 F^T B^-1, L L^T = I + F^T B^-1 F,

    and its log determinant is that of B plus that of L L^T.
    """
    seen = sums["count"] > 0
    means, width = class_means(sums["count"], sums["total"]), len(sums["covariance"])
    shared = settings.shared_share * sums["covariance"] / max(seen.sum(), 1)
    shared = shared + settings.identity_share * np.eye(width)
    factor = scipy.linalg.cho_factor(shared)
    rows, bias = linear_discriminant(factor, means, seen)
    factors = settings.class_share**0.5 * sums["factors"]
    basis, offset = np.zeros(factors.transpose(0, 2, 1).shape), np.zeros(factors.shape[::2])
    for c in np.flatnonzero(seen):
        solved = scipy.linalg.cho_solve(factor, factors[c])
        lower = np.linalg.cholesky(np.eye(factors.shape[2]) + factors[c].T @ solved)
        basis[c] = scipy.linalg.solve_triangular(lower, solved.T, lower=True)
        offset[c] = basis[c] @ means[c]
        bias[c] -= np.log(np.diagonal(lower)).sum()  # half the log determinant
    return {"rows": rows, "bias": bias, "basis": basis, "offset": offset}


def _scores_gaussians(drawn, rule, features):
    gap = jnp.einsum("bd,crd->bcr", features, rule["basis"], precision="highest")
    gap = gap - rule["offset"][None]
    linear = _multiply(features, rule["rows"].T) + rule["bias"][None]
    return linear + 0.5 * jnp.sum(gap * gap, axis=2)


def _rows_rule(settings, num_classes, width):
    return {"rows": (num_classes, size_of(settings))}


HEADS = {
    "whitened": _of_moments(
        _draws_nothing,
        _as_they_are,
        _solve_whitened,
        _scores_whitened,
        lambda settings, c, w: {"centre": (w,), "whitener": (w, w), "rows": (c, w)},
    ),
    "rls": _of_moments(_draw_projection, _rectified, _solve_ridge, _scores_rectified, _rows_rule),
    "ranpac": _of_moments(
        _draw_projection,
        _rectified,
        _solve_ridge,
        _scores_rectified,
        _rows_rule,
        empty=_empty_with_ridge,
        add=_add_and_choose_ridge,
    ),
    "klda": _of_moments(
        _draw_fourier,
        _fourier,
        _solve_kernel,
        _scores_kernel,
        lambda settings, c, w: {**_rows_rule(settings, c, w), "bias": (c,)},
    ),
    "anacp": _of_moments(
        _draw_layers,
        _unit_and_hidden,
        _solve_contrastive,
        _scores_contrastive,
        lambda settings, c, w: {
            **_rows_rule(settings, c, w),
            "layers": (settings.num_projections, size_of(settings), w),
        },
    ),
    "lr_rgda": ClosedForm(
        _draws_nothing,
        _as_they_are,
        _solve_gaussians,
        _scores_gaussians,
        lambda settings, c, w: {
            "rows": (c, w),
            "bias": (c,),
            "basis": (c, _rank_of(settings, w), w),
            "offset": (c, _rank_of(settings, w)),
        },
        _empty_gaussians,
        _add_gaussians,
    ),
}
