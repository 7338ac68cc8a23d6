"""Every setting of a run: how it is read from text, checked, compared and kept as JSON.

A `Config` is a tree of frozen dataclasses: hashable, so it is a static argument of jitted
functions, and printable as JSON, so a run folder is enough to run it again. It has the sections
that every method reads (`settings.sections`) and those of the chosen method, which stand beside the
code that reads them: `config.ease.alpha`, `config.adapter.bottleneck`. `override(config,
"train.epochs=5")` is what the command line does with `--set`.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from qkd_jax.errors import ConfigError
from qkd_jax.settings.methods import method_named, method_names, nearest, preset_method
from qkd_jax.settings.ranges import Conflicts, problems_of, rule_of, setting
from qkd_jax.settings.sections import (
    BackboneConfig,
    ClassifierConfig,
    DataConfig,
    LogConfig,
    ProtocolConfig,
    TrainConfig,
)

# Settings that had another name in earlier versions.
RENAMED = {"train.adapter_start": "adapter.start"}
# Settings that are gone, and those that do the same. Files that had them switched off are read.
REPLACED = {
    "simplecil.whiten": "classifier.kind=whitened",
    "simplecil.shrinkage": "classifier.shrinkage, with classifier.kind=whitened",
}
# Settings that came later, and what runs of before did.
BEFORE = {"head.covariance": "seen", "fusion.frozen_weight": 0.0}


@dataclass(frozen=True)
class Shapes:
    """The numbers that fix every array shape. They follow from data and protocol, so they are not
    settings: a run fills them in.
    """

    num_classes: int = setting(100, low=1)
    max_tasks: int = setting(10, low=1)
    max_task_classes: int = setting(10, low=1)
    # Training images of the largest task; 0 = not known (ranpac needs it).
    max_task_images: int = setting(0, low=0, zero="not known")
    # The width of queries, where another backbone gives them.
    query_width: int = setting(0, low=0, zero="the backbone's")
    # The width of a student's teacher.
    teacher_width: int = setting(0, low=0, zero="the backbone's")

    def conflicts(self) -> Conflicts:
        if self.max_task_classes > self.num_classes:
            yield "max_task_classes", f"1 to num_classes ({self.num_classes})"


@dataclass(frozen=True)
class Config:
    """One run: the shared sections, the array shapes, and the sections that `method` declares,
    which are attributes like the others.

    Attributes:
      own: (name, section) of each section that the method declares; None = its defaults.
    """

    experiment: str = "custom"
    method: str = "qkd"
    seed: int = setting(1993, low=0, high=2**32 - 1)
    shapes: Shapes = field(default_factory=Shapes)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    log: LogConfig = field(default_factory=LogConfig)
    own: tuple[tuple[str, Any], ...] | None = None

    def __post_init__(self):
        if self.own is None:
            method = method_named(self.method)
            own = tuple((name, section()) for name, section in method.sections.items())
            object.__setattr__(self, "own", own)
            if method.defaults:
                complete = override(self, *method.defaults)
                for name, value in vars(complete).items():
                    object.__setattr__(self, name, value)
        validate(self)

    def __getattr__(self, name: str) -> Any:
        """One of the method's own sections; Python asks here for names that are not fields."""
        own = dict(vars(self).get("own") or ())
        if name not in own:
            raise AttributeError(
                f"config.{name}: expected a section that {vars(self).get('method')} reads "
                f"({', '.join([*own, *_SHARED])}), found none of this name"
            )
        return own[name]

    def replace(self, **changes: Any) -> "Config":
        """`dataclasses.replace` that takes the method's own sections too."""
        own = tuple((name, changes.pop(name, section)) for name, section in self.own)
        return dataclasses.replace(self, own=own, **changes)


_SHARED = ("backbone", "data", "protocol", "train", "classifier", "log")


def apply_preset(config: Config, name: str) -> Config:
    """`config` with the settings of the preset `name`.

    Raises:
      ConfigError: unknown preset, or one of another method.

    Example:
      >>> apply_preset(Config(method="qkd"), "paper").gate.encoding
      'angle'
    """
    if preset_method(name) != config.method:
        raise ConfigError(
            f"preset {name}: expected method {preset_method(name)}, found {config.method}"
        )
    return override(config, *method_named(config.method).presets[name])


def override(config: Config, *assignments: str, where_read: bool = False) -> Config:
    """`config` with `"section.key=value"` applied, in order, then checked as a whole.

    Args:
      where_read: pass over settings that only other methods read, in lists meant for many methods.

    Raises:
      ConfigError: an unknown key (the nearest known ones are named), one that the method does not
        read, an ill-typed value, or a combination that does not fit.

    Example:
      >>> config = override(Config(method="qkd"), "train.epochs=3", "gate.kind=cosine")
      >>> config.train.epochs, config.gate.kind
      (3, 'cosine')
      >>> override(Config(), "train.epoch=3")
      Traceback (most recent call last):
      qkd_jax.errors.ConfigError: setting 'train.epoch': expected a known name, ...epochs, ...
    """
    kinds = _kinds(config.method)
    changes: dict[str, Any] = {}
    problems = []
    for assignment in assignments:
        try:
            key, text = key_and_text(assignment)
            if key in kinds:
                changes[key] = _parse(key, text, kinds[key])
            elif not (where_read and readers_of(key)):
                raise not_read(key, [config.method])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join(problems))
    return _changed(config, changes)


def from_dict(values: Any) -> Config:
    """The inverse of `to_dict`; reads the config.json of earlier versions too.

    Those held every method's settings, and the shapes beside the sections; settings that the method
    does not read are left out, and so are those of a classifier where the method has its own.

    Raises:
      ConfigError: unknown keys or ill-typed values.
    """
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(f"config: expected an object of settings, found {found}")
    config = Config(method=values.get("method", Config.method))
    kinds = _kinds(config.method) | {f"shapes.{name}": int for name in _types(Shapes)}
    known = (*every_setting(), *kinds, *REPLACED)
    sections = {key.partition(".")[0] for key in known if "." in key}
    changes: dict[str, Any] = {}
    problems = []

    def read(key: str, value: Any) -> None:
        key = RENAMED.get(key, f"shapes.{key}" if key in _types(Shapes) else key)
        value = tuple(value) if isinstance(value, list) else value
        if key in REPLACED:
            if value is True:
                problems.append(str(not_read(key, [config.method])))
        elif key not in kinds:
            if not readers_of(key):
                problems.append(str(not_read(key, [config.method])))
        elif not _fits(value, kinds[key]):
            problems.append(f"{key}: expected {_describe(kinds[key])}, found {value!r}")
        else:
            changes[key] = value

    for name, value in values.items():
        if name in sections and isinstance(value, dict):
            for key, inner in value.items():
                read(f"{name}.{key}", inner)
        elif name in sections:
            found = type(value).__name__
            problems.append(f"{name}: expected an object of settings, found {found}")
        elif name != "method":
            read(str(name), value)
    if problems:
        raise ConfigError("bad settings:\n  " + "\n  ".join(problems))
    for key, value in BEFORE.items():
        section, _, leaf = key.partition(".")
        if key in kinds and section in values and leaf not in values[section]:
            changes[key] = value
    if changes.get("classifier.kind", "own") == "own":
        changes = {key: v for key, v in changes.items() if not key.startswith("classifier.")}
    return _changed(config, changes)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, ready for JSON."""
    values = {name: getattr(config, name) for name in ("experiment", "method", "seed")}
    sections = {name: dataclasses.asdict(section) for name, section in _sections(config)}
    return json.loads(json.dumps(values | sections))


def difference(old: Config, new: Config) -> list[str]:
    """Lines `key: old -> new` for every setting that differs."""
    left, right = ({key: value for key, value, _ in _leaves(config)} for config in (old, new))
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in {**left, **right}
        if left.get(key) != right.get(key)
    ]


def digest(config: Config) -> str:
    """A short hash of all settings that can change a result, but for the seed."""
    left_out = changeable_settings() | {"seed", "experiment"}
    if config.classifier == ClassifierConfig():  # which changes nothing, and once was no setting
        left_out |= {f"classifier.{name}" for name in _types(ClassifierConfig)}
    kept = [(key, value) for key, value, _ in _leaves(config) if key not in left_out]
    return hashlib.sha256(json.dumps(sorted(kept)).encode()).hexdigest()[:16]


def changeable_settings() -> frozenset[str]:
    """Settings that cannot change a result, so that a run may continue with other values."""
    return frozenset(
        f"{name}.{field.name}"
        for method in method_names()
        for name, section in _section_types(method).items()
        for field in dataclasses.fields(section)
        if rule_of(field).may_change
    )


def end_rate(config: Config, path: str) -> str:
    """The name of the learning rate that trains an array when a task ends; "" for none.

    `path`: of the array, names with dots between them.
    """
    rates = {
        rule_of(declared).end_rate: f"{name}.{declared.name}"
        for name, section in config.own
        for declared in dataclasses.fields(section)
    }
    return next((rates[name] for name in (*path.split("."), "*") if name in rates), "")


def settings(config: Config, *, has_steps: bool = True) -> list[tuple[str, Any, str]]:
    """(key, value, what it accepts) of every setting that the method reads.

    `has_steps`: whether it has optimisation steps.
    """
    rules = {
        f"{name}.{field.name}": rule_of(field)
        for name, section in _section_types(config.method).items()
        for field in dataclasses.fields(section)
    } | {field.name: rule_of(field) for field in dataclasses.fields(Config)}
    values = {key: value for key, value, _ in _leaves(config)}
    return [
        (key, values[key], _describe(kind) + f", {rules[key]}" * rules[key].bounded)
        for key, kind in _kinds(config.method).items()
        if has_steps or not rules[key].of_steps
    ]


def every_setting() -> frozenset[str]:
    """The keys of all methods."""
    return frozenset(key for method in method_names() for key in _kinds(method))


def readers_of(key: str) -> tuple[str, ...]:
    """The methods that read a setting; empty where there is no such setting."""
    return tuple(method for method in method_names() if key in _kinds(method))


def not_read(key: str, methods: Iterable[str]) -> ConfigError:
    """The error for a key that none of `methods` reads."""
    section, _, leaf = key.rpartition(".")
    shapes = _types(Shapes)
    if key in RENAMED:
        return ConfigError(f"setting {key!r}: expected its new name {RENAMED[key]}, found the old")
    if key in REPLACED:
        return ConfigError(f"setting {key!r}: expected {REPLACED[key]}, which does the same now")
    if key == "method":
        return ConfigError(
            "method: expected in --method NAME or Config(method=NAME), since it decides which "
            "settings there are; found among the settings"
        )
    if key in shapes or section == "shapes":
        return ConfigError(
            f"{key}: expected a setting, found an array shape, which follows from the data; in "
            "Python give Config(shapes=Shapes(...))"
        )
    if readers := readers_of(key):
        names = [name for method in methods for name in _kinds(method)]
        own = [name for name in names if name.startswith(f"{section}.")]
        reads = own or [name.rpartition(".")[0] for name in names if "." in name]
        return ConfigError(
            f"{key}: expected a setting that {' or '.join(methods)} reads "
            f"({', '.join(dict.fromkeys(reads))}), found one of {', '.join(readers)}"
        )
    known = sorted(every_setting())
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    close += [name for name in known if name.split(".")[-1] == leaf and name not in close]
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return ConfigError(f"setting {key!r}: expected a known name, found another{hint}")


def validate(config: Config) -> None:
    """Checks types, ranges and combinations.

    Raises:
      ConfigError: lists every setting that is wrong, not only the first.
    """
    declared = method_named(config.method).sections
    if taken := declared.keys() & _types(Config).keys():
        raise ConfigError(
            f"{config.method}: expected sections of other names than the shared ones, found "
            f"{', '.join(sorted(taken))}"
        )
    if {name: type(section) for name, section in config.own} != dict(declared):
        raise ConfigError(
            f"method: expected the one whose sections this config has "
            f"({', '.join(dict(config.own))}), found {config.method}; make a new "
            f"Config(method={config.method!r})"
        )
    problems: list[str] = []
    for path, value, kind in _leaves(config):
        if not _fits(value, kind):
            problems.append(f"{path}: expected {_describe(kind)}, found {value!r}")
    if not problems:
        problems += problems_of(config, "")
        for name, section in _sections(config):
            problems += problems_of(section, f"{name}.")
    if problems:
        raise ConfigError("bad settings:\n  " + "\n  ".join(problems))


@functools.cache
def _types(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _section_types(method: str) -> dict[str, type]:
    """The sections of settings that a method reads, the shared ones first."""
    return {name: _types(Config)[name] for name in _SHARED} | dict(method_named(method).sections)


def _kinds(method: str) -> dict[str, Any]:
    """The type of every setting that a method reads."""
    kinds: dict[str, Any] = {name: _types(Config)[name] for name in ("experiment", "seed")}
    for name, section in _section_types(method).items():
        kinds |= {f"{name}.{leaf}": kind for leaf, kind in _types(section).items()}
    return kinds


def _sections(config: Config) -> list[tuple[str, Any]]:
    """(name, section) of every section, shapes included."""
    return [(name, getattr(config, name)) for name in ("shapes", *_SHARED)] + list(config.own)


def _leaves(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, type) of every setting; a section of a wrong type is given as it is."""
    for name in ("experiment", "method", "seed"):
        yield name, getattr(config, name), _types(Config)[name]
    for name, section in _sections(config):
        if not dataclasses.is_dataclass(section):
            yield name, section, _types(Config)[name]
            continue
        for leaf, kind in _types(type(section)).items():
            yield f"{name}.{leaf}", getattr(section, leaf), kind


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with these values by key, such as {"seed": 1, "train.epochs": 5}."""
    parts: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        if section:
            before = parts.get(section, getattr(config, section))
            value = dataclasses.replace(before, **{leaf: value})
        parts[section or leaf] = value
    return config.replace(**parts)


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    if kind is float:
        return (
            isinstance(value, float | int)
            and not isinstance(value, bool)
            and abs(value) < float("inf")
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.GenericAlias):
        return "names separated by commas"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "an object of settings")


def key_and_text(assignment: str) -> tuple[str, str]:
    """The two sides of "train.epochs=5".

    Raises:
      ConfigError: no equals sign.
    """
    key, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--set: expected key=value, as in train.epochs=5, found {assignment!r}")
    return key.strip(), text.strip()


def _parse(path: str, text: str, kind: Any) -> Any:
    try:
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            if text not in options:
                raise ConfigError(
                    f"{path}: expected {_describe(kind)}, found {text!r}{nearest(text, options)}"
                )
            return text
        if typing.get_origin(kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: expected {_describe(kind)}, found {text!r}") from None
