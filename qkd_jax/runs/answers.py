"""The best classes for one image or text, by a trained learner."""

from typing import NamedTuple

import numpy as np

from qkd_jax.data.image_set import ImageSet
from qkd_jax.data.images import Encoded
from qkd_jax.data.sources import has_margin
from qkd_jax.engine.verbs import predict
from qkd_jax.errors import ConfigError
from qkd_jax.nn.tokens import tokenize
from qkd_jax.runs.load import LoadedRun

Fields = dict[str, np.ndarray]


class Answer(NamedTuple):
    """One class that an input may be of.

    Attributes:
      name: of the class.
      task: the task that brought it, from 1.
      score: as `predict` gives it.
      probability: softmax of the scores over all classes learned.
    """

    name: str
    task: int
    score: float
    probability: float

    def as_json(self) -> dict[str, str | int | float]:
        """The fields as they are written for other programs."""
        fields = self._asdict()
        return {"class": fields.pop("name"), **fields}


def reads_texts(trained: LoadedRun) -> bool:
    """Whether inputs are texts, and not images."""
    return trained.state.reader.spec.unit == "tokens"


def image_fields(trained: LoadedRun, image: Encoded, name: str) -> Fields:
    """One image in the test view of the data that was learned, as `best_classes` takes it.

    Args:
      image: a path, the bytes of a file, or pixels uint8 [H, W, 3].
      name: of the image, in errors.

    Raises:
      ConfigError: the learner reads texts.
      DataError: the image cannot be read.
    """
    if reads_texts(trained):
        raise ConfigError("input: expected a text, as this learner reads them, found an image")
    alone = ImageSet(
        name="image",
        labels=np.zeros(1, np.int32),
        ids=np.array([name]),
        class_names=("unknown",),
        fetch=lambda _: [image],
        margin=has_margin(trained.config.data.source),
    )
    return alone.load([0], trained.state.reader)


def text_fields(trained: LoadedRun, text: str) -> Fields:
    """One text as `best_classes` takes it; one that is too long is cut.

    Raises:
      ConfigError: the learner reads images.
    """
    if not reads_texts(trained):
        raise ConfigError("input: expected an image, as this learner reads them, found a text")
    return tokenize(trained.state.reader, [text])


def blank_fields(trained: LoadedRun) -> Fields:
    """An input of which nothing is known, to compile everything before the first real one."""
    if reads_texts(trained):
        return text_fields(trained, "")
    return image_fields(trained, np.zeros((8, 8, 3), np.uint8), "blank")


def best_classes(trained: LoadedRun, fields: Fields, top: int = 5) -> list[Answer]:
    """The `top` classes of one input, or as many as were learned, the best one first."""
    state = trained.state
    scores = np.asarray(predict(state, fields))[0].astype(np.float64)
    tasks = np.asarray(state.task_of_class)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    order = np.argsort(-scores, kind="stable")[:top]
    return [
        Answer(trained.class_names[c], int(tasks[c]) + 1, float(scores[c]), float(shares[c]))
        for c in order.tolist()
        if tasks[c] >= 0
    ]
