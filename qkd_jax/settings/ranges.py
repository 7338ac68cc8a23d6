"""Ranges of settings, declared beside the defaults and checked in one place.

    epochs: int = setting(20, low=0)

A section may also define `conflicts(self)`, which yields (name, what was expected) for each
setting that does not fit another one.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Conflicts = Iterator[tuple[str, str]]  # (name of the setting, what was expected)

KEY = "qkd_jax"  # key of the `Rule` in a field's metadata


@dataclass(frozen=True)
class Rule:
    """The rules for a setting beside its type.

    Attributes:
      low, high: the least and the largest value.
      above, below: exclusive bounds.
      zero: what 0 stands for, such as "all"; error messages say so.
      may_change: True where another value cannot change a result, so that a run may continue with
        it: paths, devices, batch sizes of evaluation.
      end_rate: of a learning rate that is used when a task ends: a name on the paths of the arrays
        that it trains; "*" for all that no other such rate trains.
      of_steps: True for what only methods with optimisation steps read.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    zero: str = ""
    may_change: bool = False
    end_rate: str = ""
    of_steps: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a value is in the range; anything but a number always is."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        return self.low <= value <= self.high and self.above < value < self.below

    @property
    def bounded(self) -> bool:
        """Whether there is a range at all."""
        return self != Rule(zero=self.zero, may_change=self.may_change)

    def __str__(self) -> str:
        """The range in words, such as "0 (all) or more"."""
        zero = f"0 ({self.zero})" if self.zero else "0"
        low = zero if self.low == 0 else str(self.low)
        if self.high < math.inf or self.below < math.inf:
            to = f"{self.high}" if self.high < math.inf else f"below {self.below}"
            if self.low > -math.inf:
                return f"{low} to {to}"
            return f"above {self.above} to {to}" if self.above > -math.inf else f"at most {to}"
        if self.low > -math.inf:
            return f"{low} or more" if self.low == 0 else f"at least {low}"
        return f"above {self.above}"


def setting(default: Any, **rule: Any) -> Any:
    """A field of a settings dataclass with its `Rule`."""
    return dataclasses.field(default=default, metadata={KEY: Rule(**rule)})


def rule_of(field: dataclasses.Field) -> Rule:
    """The rule of one setting; a setting without one may be anything of its type."""
    return field.metadata.get(KEY, Rule())


def problems_of(section: Any, prefix: str) -> Iterator[str]:
    """A line for each setting of one section that is out of its range or does not fit another."""
    in_range = True
    for field in dataclasses.fields(section):
        value, rule = getattr(section, field.name), rule_of(field)
        if not rule.allows(value):
            in_range = False
            yield f"{prefix}{field.name}: expected {rule}, found {value!r}"
    if in_range and hasattr(section, "conflicts"):
        for name, expected in section.conflicts():
            yield f"{prefix}{name}: expected {expected}, found {getattr(section, name)!r}"
