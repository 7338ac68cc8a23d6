"""Small changes to valid files, such as a broken disk or an attacker would make."""

import copy
import json
import struct
from typing import Any

import numpy as np

EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 1e308, 10**400, 2**63, float("nan"), float("inf"))
ODD += ("", "x", "\ud800", "../../x", "/dev/zero", "a" * 300, [], [[]], {}, [None], {"": 0})


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes after one to four changes: bits, numbers, pieces cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not changed:
            break
        at, length = int(rng.integers(len(changed))), int(rng.integers(1, 64))
        kind = rng.integers(7)
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at] = int(rng.integers(256))
        elif kind == 2:
            order = "<>"[rng.integers(2)]
            number = struct.pack(f"{order}I", EDGES[rng.integers(len(EDGES))])
            changed[at : at + 4] = number
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        elif kind == 5:
            changed[at:at] = rng.bytes(length)
        else:
            del changed[at:]
    return bytes(changed)


def mutated_json(data: bytes, rng: np.random.Generator) -> bytes:
    """The JSON with one to three values replaced, removed or added; one in four as bytes."""
    if rng.random() < 0.25:
        return mutated(data, rng)
    value = json.loads(data)
    for _ in range(rng.integers(1, 4)):
        value = _changed(value, rng)
    return json.dumps(value).encode()


def _changed(value: Any, rng: np.random.Generator) -> Any:
    odd = copy.deepcopy(ODD[rng.integers(len(ODD))])
    places: list[Any] = []
    if isinstance(value, dict):
        places = list(value)
    elif isinstance(value, list):
        places = list(range(len(value)))
    if not places or rng.random() < 0.1:
        return odd
    place = places[rng.integers(len(places))]
    action = rng.random()
    if action < 0.1:
        del value[place]
    elif action < 0.2 and isinstance(value, dict):
        value[f"{place}x"] = odd
    else:
        value[place] = _changed(value[place], rng)
    return value
