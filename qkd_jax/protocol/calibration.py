"""Whether the probabilities of a classifier are what they say, as is and after one temperature.

Probabilities are the softmax of scores [N, C] over all classes seen; scores of others are -inf. See
Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599.
"""

from typing import Any

import numpy as np

BINS = 15
# Temperatures that are looked for: scores may be cosines, and half of the images without an error.
COLDEST, HOTTEST = 1e-4, 1e4


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """float64 [N, C]: the logarithms of probabilities, -inf where the score is."""
    wide = np.asarray(scores, np.float64)
    centred = wide - wide.max(axis=1, keepdims=True)
    return centred - np.log(np.exp(centred).sum(axis=1, keepdims=True))


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The expected calibration error in percent: the mean over images of how far the accuracy of a
    bin is from its mean confidence, 100 * sum_b n_b / N * |accuracy_b - confidence_b|.

    There are 15 bins of equal width, the first [0, 1/15], the others without their lower end.

    Args:
      confidence: [N], the probability of the predicted class.
      correct: bool [N].
    """
    bins = np.clip(np.ceil(BINS * confidence).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(100.0 * np.abs(gaps).sum() / len(confidence))


def fitted_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature t, from 1e-4 to 1e4, with the largest likelihood of softmax(s / t).

    The log-likelihood is concave in 1 / t, so that its slope has one root, which is bisected on a
    logarithmic scale to all digits. If every image is right there is none, and t is the warmest
    temperature at which all probabilities round to 1.

    Args:
      scores: [N, C].
      labels: int [N], of classes with a finite score.
    """
    scores = np.asarray(scores, np.float64)
    finite = np.where(np.isfinite(scores), scores, 0.0)
    own = scores[np.arange(len(labels)), labels]
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(60):  # 18.4 / 2^60 is below the last digit
        middle = (low + high) / 2
        expected = (np.exp(log_softmax(scores * np.exp(middle))) * finite).sum(axis=1)
        # The slope of the log-likelihood in 1 / t.
        if np.mean(own - expected) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def calibration(scores: np.ndarray, labels: np.ndarray, halves: np.ndarray) -> dict[str, Any]:
    """How well the probabilities fit, as is and after a temperature fitted on the other half of the
    images: a diagnostic, which sees the labels of test images.

    Args:
      scores: [N, C].
      labels: int [N].
      halves: bool [N], which images are in the one half.

    Returns:
      `nll`, the mean of -log p of the true class, in nats, and `ece` (`calibration_error`), as is;
      `nll_tempered`, `ece_tempered` and `temperatures`, fitted on the images outside and inside of
      `halves` and used on the others, all None where a half is empty.
    """
    found = _measured(scores, labels)
    parts = (halves, ~halves)
    if not all(part.any() for part in parts):
        return found | dict.fromkeys(("nll_tempered", "ece_tempered", "temperatures"))
    temperatures = [fitted_temperature(scores[~part], labels[~part]) for part in parts]
    divided = np.asarray(scores, np.float64) / np.where(halves, *temperatures)[:, None]
    tempered = {f"{name}_tempered": value for name, value in _measured(divided, labels).items()}
    return found | tempered | {"temperatures": temperatures}


def _measured(scores, labels):
    log_p = log_softmax(scores)
    predicted, rows = log_p.argmax(axis=1), np.arange(len(labels))
    confidence = np.exp(log_p[rows, predicted])
    return {
        "nll": float(-log_p[rows, labels].mean()),
        "ece": calibration_error(confidence, predicted == labels),
    }
