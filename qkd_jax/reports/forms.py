"""The form of each JSON file of a run folder: what is in it, of which type.

A form is a function (value, place) -> a sentence about what is wrong in it, or "". A file may be
valid JSON and still hold a list where everybody expects a number; this is found where it is read,
and not by whoever computes with it.
"""

import math
from collections.abc import Callable
from typing import Any

Form = Callable[[Any, str], str]

MOST = 2**53  # of counts: what a float holds exactly


def problem(name: str, value: Any) -> str:
    """What is wrong in a file of this name: the field, what was expected and found; or ""."""
    return FORMS.get(name, plain)(value, "")


def problem_of_line(record: Any) -> str:
    """The same of one line of metrics.jsonl."""
    return _LINE(record, "")


def _a(expected: str, fits: Callable[[Any], bool]) -> Form:
    def form(value: Any, place: str) -> str:
        return (
            ""
            if fits(value)
            else f"{place or 'the file'}: expected {expected}, found {_short(value)}"
        )

    return form


def _short(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    shown = kinds.get(type(value)) or ascii(value)
    return shown if len(shown) < 50 else f"{shown[:50]}..."


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST
    return whole or (isinstance(value, float) and math.isfinite(value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)


number = _a("a finite number", _is_number)
count = _a("a whole number of 0 or more", _is_count)
text = _a("a text", _is_text)
truth = _a("true or false", lambda value: isinstance(value, bool))
_table = _a("an object", lambda value: isinstance(value, dict))
_list = _a("a list", lambda value: isinstance(value, list))


def maybe(form: Form) -> Form:
    """The form, or null."""
    return lambda value, place: "" if value is None else form(value, place)


def many(form: Form, size: int | None = None, least: int = 0) -> Form:
    """A list of values of one form; of `size`, or of `least` or more."""

    def of_list(value: Any, place: str) -> str:
        if wrong := _list(value, place):
            return wrong
        if len(value) != (len(value) if size is None else size) or len(value) < least:
            return f"{place}: expected {size or f'{least} or more'} values, found {len(value)}"
        return _first(form(part, f"{place}[{index}]") for index, part in enumerate(value))

    return of_list


def fields(needed: tuple[str, ...] = (), **forms: Form) -> Form:
    """An object with `forms` of some of its fields; the others are `plain`."""

    def of_table(value: Any, place: str) -> str:
        if wrong := _table(value, place):
            return wrong
        before = f"{place}." if place else ""
        for name in needed:
            if name not in value:
                return f"{before}{name}: expected it, found none"
        return _first(forms.get(k, plain)(part, f"{before}{k}") for k, part in value.items())

    return of_table


def plain(value: Any, place: str) -> str:
    """Anything, but no number that is not finite."""
    if isinstance(value, dict):
        return _first(
            plain(part, f"{place}.{name}" if place else name) for name, part in value.items()
        )
    if isinstance(value, list):
        return _first(plain(part, f"{place}[{index}]") for index, part in enumerate(value))
    return number(value, place) if isinstance(value, float) else ""


def _first(problems: Any) -> str:
    return next((problem for problem in problems if problem), "")


def _square(value: Any, place: str) -> str:
    """Counts [T, T]."""
    if wrong := many(many(count))(value, place):
        return wrong
    widths = {len(row) for row in value}
    if widths - {len(value)}:
        return f"{place}: expected {len(value)} rows of {len(value)} counts, found rows of others"
    return ""


_NUMBERS = (
    *("average_accuracy", "last_accuracy", "average_accuracy_task_mean", "last_accuracy_task_mean"),
    *("forgetting", "forgetting_clipped", "forgetting_just_learned", "bwt"),
    *("within_task_average_accuracy", "within_task_last_accuracy", "routing_accuracy"),
    *("routing_accuracy_task_mean", "wall_seconds", "train_seconds", "eval_seconds"),
    *("training_images_per_second", "inference_images_per_second", "peak_memory_mb"),
    *("draws_energy_distance", "trainable_parameters", "gate_parameters", "compilations"),
    *("devices", "train_images", "extracted_features", "oracle_accuracy", "routing_recall_at_2"),
    *("passes_per_image", "kept_bytes", "kept_bytes_constant", "kept_bytes_per_class"),
    *("kept_bytes_per_task", "nll", "ece", "nll_tempered", "ece_tempered"),
)
_CURVES = ("accuracy_curve", "accuracy_curve_task_mean", "within_task_accuracy_curve")
# null: a task without images so far.
_PER_TASK = ("last_accuracy_per_task", "routing_accuracy_per_task")
_TAUGHT = ("average_accuracy", "last_accuracy")  # what tables need of teachers and students
_OF_LEARNER = {name: maybe(number) for name in _NUMBERS} | {name: many(number) for name in _CURVES}
_OF_LEARNER |= {name: many(maybe(number)) for name in _PER_TASK}
_OF_LEARNER["temperatures"] = maybe(many(number, size=2))
_SUMMARY = fields(
    **_OF_LEARNER,
    experiment=text,
    method=text,
    variant=text,
    student=text,
    seed=count,
    num_tasks=count,
    finished=truth,
    teacher=fields(("accuracy_curve",), **_OF_LEARNER),
)


def _summary(value: Any, place: str) -> str:
    wrong = _SUMMARY(value, place)
    if wrong or "teacher" not in value or not value.get("finished"):
        return wrong
    own = fields(("student", *_TAUGHT), **dict.fromkeys(_TAUGHT, number))
    return own(value, place) or fields(_TAUGHT, **dict.fromkeys(_TAUGHT, number))(
        value["teacher"], "teacher"
    )


_EXAMPLE = fields(
    ("id", "class", "predicted"),
    **dict.fromkeys(("id", "class", "predicted", "text", "image"), text),
    task=count,
    most_relevant_task=count,
)


def _example(value: Any, place: str) -> str:
    wrong = _EXAMPLE(value, place)
    if wrong or "most_relevant_task" not in value:
        return wrong
    return fields(("task",))(value, place)


FORMS: dict[str, Form] = {
    "summary.json": _summary,
    "matrix.json": fields(correct=_square, total=_square),
    "environment.json": fields(
        weights_fingerprint=text,
        teacher_fingerprint=text,
        data_fingerprint=text,
        data_content=text,
        examples=text,
        leaked_test_images=many(many(text, least=1)),
        removed_images=many(text),
        cut_texts=many(count, size=2),
    ),
    "class_order.json": fields(order=many(count), class_names=many(text), tasks=many(many(count))),
    "examples.json": fields(test=many(_example)),
}
_LINE = fields(images_seen=number, task=count, step=count)
