"""Every setting of a run, its default and its check; the only home of defaults.

A `Config` is a tree of frozen dataclasses: hashable, so it is a static argument of jitted
functions, and printable as JSON, so a run folder is enough to run it again. `override(config,
"train.epochs=5")` is what the command line does with `--set`. The presets are `qkd` (the default:
what we judge to work) and `paper` (every literal choice of the QKD paper, arXiv 2604.11112).
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from qkd_jax.errors import ConfigError
from qkd_jax.nn.adapters import AdapterSpec
from qkd_jax.settings.ranges import problems_of, rule_of, setting
from qkd_jax.settings.sections import (
    AlignmentConfig,
    AptConfig,
    BackboneConfig,
    CodaPromptConfig,
    DataConfig,
    DistillationConfig,
    DualPromptConfig,
    EaseConfig,
    FusionConfig,
    GateConfig,
    HeadConfig,
    InfloraConfig,
    L2pConfig,
    MosConfig,
    MoteConfig,
    ProtocolConfig,
    RanpacConfig,
    SimplecilConfig,
    SparsityConfig,
    SsiatConfig,
    TrainConfig,
    TunaConfig,
)


@dataclass(frozen=True)
class Config:
    """One run. `num_classes`, `max_tasks`, `max_task_classes` and `max_task_images` fix every array
    shape.
    """

    experiment: str = "custom"
    method: str = "qkd"
    seed: int = setting(1993, low=0, high=2**32 - 1)
    num_classes: int = setting(100, low=1)
    max_tasks: int = setting(10, low=1)
    max_task_classes: int = setting(10, low=1)
    # Training images of the largest task; 0 = not known (ranpac needs it).
    max_task_images: int = setting(0, low=0, zero="not known")
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    head: HeadConfig = field(default_factory=HeadConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    ease: EaseConfig = field(default_factory=EaseConfig)
    ranpac: RanpacConfig = field(default_factory=RanpacConfig)
    simplecil: SimplecilConfig = field(default_factory=SimplecilConfig)
    apt: AptConfig = field(default_factory=AptConfig)
    coda_prompt: CodaPromptConfig = field(default_factory=CodaPromptConfig)
    inflora: InfloraConfig = field(default_factory=InfloraConfig)
    l2p: L2pConfig = field(default_factory=L2pConfig)
    dualprompt: DualPromptConfig = field(default_factory=DualPromptConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    mos: MosConfig = field(default_factory=MosConfig)
    tuna: TunaConfig = field(default_factory=TunaConfig)
    mote: MoteConfig = field(default_factory=MoteConfig)
    ssiat: SsiatConfig = field(default_factory=SsiatConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        validate(self)

    def conflicts(self):
        if self.max_task_classes > self.num_classes:
            yield "max_task_classes", f"1 to num_classes ({self.num_classes})"


PRESETS: dict[str, tuple[str, ...]] = {
    "qkd": (),
    # Literal choices: qkd.md section 2. Fidelity scores at temperature 1, never-taught gate,
    # constant L1.
    "paper": (
        "gate.encoding=angle",
        "gate.num_qubits=9",
        "gate.whiten=false",
        "head.whiten=false",
        "gate.theta_scale=6.283185307179586",
        "gate.states=weights",
        "gate.score=fidelity",
        "gate.temperature=1.0",
        "gate.calibration_steps=0",
        "sparsity.kind=l1_softmax",
        "head.prototypes=own",
    ),
}


def apply_preset(config: Config, name: str) -> Config:
    """`config` with the settings of the preset `name`.

    Raises:
      ConfigError: unknown preset; the message names the known ones.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}; known: {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    return override(config, *PRESETS[name])


def override(config: Config, *assignments: str) -> Config:
    """`config` with `"section.key=value"` applied, in order, then checked as a whole.

    Raises:
      ConfigError: an unknown key (the nearest known ones are named), an ill-typed value, or a
        combination that does not fit.
    """
    changes: dict[str, Any] = {}
    problems = []
    for assignment in assignments:
        try:
            _assign(config, changes, assignment)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n  ".join(problems))
    return _replace(config, changes)


def _assign(config: Config, changes: dict[str, Any], assignment: str) -> None:
    """Puts the value of `"section.key=value"` into the nested `changes`."""
    path, separator, text = assignment.partition("=")
    path = path.strip()
    if not separator:
        raise ConfigError(f"--set {assignment!r}: expected key=value, as in train.epochs=5")
    owner: Any = config
    *sections, leaf = path.split(".")
    for section in sections:
        inner = getattr(owner, section, None) if section in _field_types(owner) else None
        if not dataclasses.is_dataclass(inner):
            raise _unknown_key(path)
        owner = inner
        changes = changes.setdefault(section, {})
    kinds = _field_types(owner)
    if leaf not in kinds or dataclasses.is_dataclass(getattr(owner, leaf)):
        raise _unknown_key(path)
    changes[leaf] = _parse(path, text.strip(), kinds[leaf])


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`, as read from a run's config.json.

    Raises:
      ConfigError: unknown keys or ill-typed values.
    """
    problems: list[str] = []

    def read(owner: Any, node: Any, path: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            found = type(node).__name__
            problems.append(f"{path or 'config'}: expected an object of settings, found {found}")
            return {}
        kinds, changes = _field_types(owner), {}
        for name, value in node.items():
            key = f"{path}.{name}" if path else str(name)
            if name not in kinds:
                problems.append(str(_unknown_key(key)))
                continue
            inner = getattr(owner, name)
            value = tuple(value) if isinstance(value, list) else value
            if dataclasses.is_dataclass(inner):
                changes[name] = read(inner, value, key)
            elif not _fits(value, kinds[name]):
                problems.append(f"{key}: expected {_describe(kinds[name])}, found {value!r}")
            else:
                changes[name] = value
        return changes

    default = Config()
    changes = read(default, values, "")
    if problems:
        raise ConfigError("bad settings:\n  " + "\n  ".join(problems))
    return _replace(default, changes)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def difference(old: Config, new: Config) -> list[str]:
    """Lines `key: old -> new` for every setting that differs."""
    left, right = dict(_leaves(to_dict(old))), dict(_leaves(to_dict(new)))
    return [f"{k}: {left[k]!r} -> {right[k]!r}" for k in left if left[k] != right[k]]


def changeable_settings() -> frozenset[str]:
    """Settings that cannot change a result, so that a run may continue with other values."""
    return frozenset(
        f"{name}.{field.name}"
        for name, section in _sections(Config())
        for field in dataclasses.fields(section)
        if rule_of(field).may_change
    )


def settings(config: Config) -> list[tuple[str, Any, str]]:
    """(key, value, what it accepts) of every setting."""
    return [(path, value, _describe(kind)) for path, value, kind in _typed_leaves(config, "")]


def validate(config: Config) -> None:
    """Checks ranges and combinations.

    Raises:
      ConfigError: lists every setting that is wrong, not only the first.
    """
    problems: list[str] = []
    for path, value, kind in _typed_leaves(config, ""):
        if not _fits(value, kind):
            problems.append(f"{path}: expected {_describe(kind)}, found {value!r}")
    if not problems:
        problems += problems_of(config, "")
        for name, section in _sections(config):
            problems += problems_of(section, f"{name}.")
    if problems:
        raise ConfigError("bad settings:\n  " + "\n  ".join(problems))


def _replace(node: Any, changes: dict[str, Any]) -> Any:
    new = {
        k: _replace(getattr(node, k), v) if isinstance(v, dict) else v for k, v in changes.items()
    }
    return dataclasses.replace(node, **new)


def _field_types(node: Any) -> dict[str, Any]:
    return typing.get_type_hints(type(node))


def _sections(config: Config) -> list[tuple[str, Any]]:
    """(name, section) of every section."""
    named = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return [(name, value) for name, value in named if dataclasses.is_dataclass(value)]


def _typed_leaves(node: Any, prefix: str):
    for name, kind in _field_types(node).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            yield from _typed_leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, kind


def _leaves(node: dict, prefix: str = ""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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


def _parse(path: str, text: str, kind: Any) -> Any:
    try:
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            if text not in options:
                raise ConfigError(
                    f"{path}={text}: expected {_describe(kind)}{nearest(text, options)}"
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
        raise ConfigError(f"{path}={text}: expected {_describe(kind)}") from None


def nearest(word: str, known) -> str:
    """'; did you mean ...?' with the closest of `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _unknown_key(path: str) -> ConfigError:
    known = [name for name, _, _ in _typed_leaves_of_default()]
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.4)
    leaf = path.split(".")[-1]
    close += [k for k in known if k.split(".")[-1] == leaf and k not in close]
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return ConfigError(f"unknown setting {path!r}{hint}")


def _typed_leaves_of_default():
    return _typed_leaves(Config(), "")
