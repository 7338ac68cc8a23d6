"""Circuits as OpenQASM 3 programs, written and read.

What is read is what is written and a little more (`from_openqasm`); everything else is refused with
its place. A program is text from anywhere: the reader neither recurses nor evaluates, and its work
is bounded.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from qkd_jax.errors import DataError
from qkd_jax.quantum.export import finite_angles
from qkd_jax.quantum.gates import GATE_KINDS
from qkd_jax.quantum.statevector import Circuit, Gate

# Gate -> its name in OpenQASM. Those below are not among the standard gates.
_NAMES = {name: name.lower() for name in GATE_KINDS} | {"CNOT": "cx"}
# Name -> the standard gates that it stands for, with wires 0 and 1 for its own.
_DEFINED = {
    "RXX": "h 0; h 1; cx 0, 1; rz(theta) 1; cx 0, 1; h 0; h 1;",
    "RYY": "rx(pi/2) 0; rx(pi/2) 1; cx 0, 1; rz(theta) 1; cx 0, 1; rx(-pi/2) 0; rx(-pi/2) 1;",
    "RZZ": "cx 0, 1; rz(theta) 1; cx 0, 1;",
}


def to_openqasm(circuit: Circuit, parameters: Sequence[float], *, define_gates: bool = True) -> str:
    """The circuit with these angles as an OpenQASM 3 program, with all digits of the numbers.

    Args:
      circuit: the gates.
      parameters: [P] finite real angles in radians.
      define_gates: whether the program defines RXX, RYY and RZZ, which are no standard gates. False
        writes standard gates each time, for readers without gate definitions, such as hardware
        services. PennyLane 0.45 reads this form, once the line with `include` is left out.

    Raises:
      ConfigError: on a wrong number of parameters, or one that is not a finite real number.
    """
    angles = finite_angles(circuit, parameters)
    used = {gate.name for gate in circuit.gates}
    lines = ["OPENQASM 3.0;", 'include "stdgates.inc";']
    if define_gates:
        lines += [_definition(name) for name in _DEFINED if name in used]
    lines.append(f"qubit[{circuit.num_qubits}] q;")
    for gate in circuit.gates:
        angle = "" if gate.parameter is None else repr(angles[gate.parameter])
        wires = [f"q[{wire}]" for wire in gate.wires]
        if gate.name in _DEFINED and not define_gates:
            lines += [f"{call};" for call in _body(gate.name, angle, *wires)]
            continue
        lines.append(f"{_NAMES[gate.name]}{f'({angle})' * bool(angle)} {', '.join(wires)};")
    return "\n".join(lines) + "\n"


def _body(name: str, angle: str, first: str, second: str) -> list[str]:
    """The calls that a defined gate stands for, for these arguments."""
    wire = {"0": first, "1": second}
    calls = _DEFINED[name].rstrip(";").split("; ")
    heads, operands = zip(*(call.split(" ", 1) for call in calls), strict=True)
    return [
        f"{head.replace('theta', angle)} {', '.join(wire[w] for w in wires.split(', '))}"
        for head, wires in zip(heads, operands, strict=True)
    ]


def _definition(name: str) -> str:
    calls = "; ".join(_body(name, "theta", "a", "b"))
    return f"gate {_NAMES[name]}(theta) a, b {{ {calls}; }}"


class Program(NamedTuple):
    """A program as it was read.

    Attributes:
      circuit: with one parameter for each angle, in the order of the program.
      parameters: float64 [P] radians.
      measured: the wires that are measured, in order.
    """

    circuit: Circuit
    parameters: np.ndarray
    measured: tuple[int, ...]


MAX_CHARACTERS = 16 * 2**20
MAX_GATES = 2**17
MAX_QUBITS = 1024
MAX_WORD = 64  # characters of one number or name
MAX_EXPRESSION = 256  # words of one angle

_READ = {written: name for name, written in _NAMES.items()} | {
    "CX": "CNOT",
    "phase": "P",
    "u1": "P",
    "cphase": "CP",
}
# Gates with several angles or none, as (gate, which angle or a constant): in order of action.
_U3 = (("P", 2), ("RY", 0), ("P", 1))
_PRODUCTS = {
    "id": (0, ()),
    "u2": (2, (("P", 1), ("RY", math.pi / 2), ("P", 0))),
    "u3": (3, _U3),
    "U": (3, _U3),
}
_STATEMENTS = ("include", "qubit", "bit", "gate", "measure")
_CONSTANTS = {"pi": math.pi, "π": math.pi, "tau": math.tau, "τ": math.tau}
_WORDS = re.compile(
    r"(?P<space>[ \t\r\f\v]+|//[^\n]*)|(?P<line>\n)|(?P<comment>/\*)"
    r"|(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[^\W\d]\w*)"
    r"|(?P<text>\"[^\"\n]*\")|(?P<sign>[;,()\[\]{}=+\-*/@])|(?P<other>.)"
)


class _Word(NamedTuple):
    kind: str  # number, name, text, sign or end
    text: str
    line: int


def from_openqasm(text: str, name: str = "OpenQASM program") -> Program:
    """The circuit of an OpenQASM 3 program.

    Read are: the version 3, `include "stdgates.inc"`, one register of qubits and one of bits, the
    standard gates on one or two qubits except `cu`, `cswap` and `ccx`, the gates that `to_openqasm`
    defines, angles of numbers, `pi`, `tau`, + - * / and parentheses, a whole register as the
    operand of gates on one qubit, and measurements, after which a qubit is not used any more.
    `U`, `u2` and `u3` are read up to a global phase.

    Args:
      text: the program, at most 16 MiB, 1,024 qubits and 131,072 gates.
      name: what errors call the program, such as its file.

    Raises:
      DataError: on anything else; it names the program, the line and what stands there.
    """
    if not isinstance(text, str):
        raise DataError(f"{name}: expected the text of a program, found {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{name}: expected at most {MAX_CHARACTERS} characters, found {len(text)}")
    return _Reader(text, name).read()


class _Reader:
    """Reads one program, a word at a time and one ahead."""

    def __init__(self, text: str, name: str):
        self.name, self.qubits, self.bits = name, ("", 0), ("", 0)
        self.gates: list[Gate] = []
        self.parameters: list[float] = []
        self.measured: list[int] = []
        self.defined: set[str] = set()
        self.words = self._words(text)
        self.next = next(self.words)

    def read(self) -> Program:
        self._expect("OPENQASM")
        version = self._take()
        if version.text not in ("3", "3.0"):
            self._refuse("the version 3 or 3.0", version)
        self._expect(";")
        while self.next.kind != "end":
            self._statement()
        if not self.qubits[1]:
            self._refuse("a register such as qubit[2] q;", self.next)
        circuit = Circuit(self.qubits[1], tuple(self.gates))
        return Program(circuit, np.array(self.parameters), tuple(self.measured))

    def _statement(self) -> None:
        word = self._take()
        if word.kind != "name":
            self._refuse("a statement", word)
        if word.text == "include":
            if self.next.text != '"stdgates.inc"':
                self._refuse('"stdgates.inc"', self.next)
            self._take()
        elif word.text in ("qubit", "bit"):
            self._register(word)
        elif word.text == "gate":
            return self._gate_definition()
        elif word.text == "measure":
            self._measure()
        elif word.text == self.bits[0]:
            target = self._operand(self.bits, word)
            self._expect("=")
            self._expect("measure")
            self._measure(len(target), word)
        else:
            self._call(word)
        self._expect(";")
        return None

    def _register(self, kind: _Word) -> None:
        size = 1
        if self.next.text == "[":
            self._take()
            size = self._whole_number(1, MAX_QUBITS)
            self._expect("]")
        name = self._take()
        if name.kind != "name":
            self._refuse("the name of a register", name)
        if (self.qubits if kind.text == "qubit" else self.bits)[1]:
            self._refuse(f"one register of {kind.text}s", name)
        if name.text in (self.qubits[0], self.bits[0], *_STATEMENTS):
            self._refuse("a name that is not taken", name)
        if kind.text == "qubit":
            self.qubits = (name.text, size)
        else:
            self.bits = (name.text, size)

    def _gate_definition(self) -> None:
        """Only those that are written, word for word: what they stand for is known."""
        name = self._take()
        gate = _READ.get(name.text)
        if gate not in _DEFINED or gate in self.defined:
            self._refuse("one definition each of rxx, ryy or rzz", name)
        self.defined.add(gate)
        expected = [word.text for word in self._words(_definition(gate))][2:-1]
        for text in expected:
            self._expect(text, f"the definition {_definition(gate)!r}, there {text!r}")

    def _measure(self, bits: int | None = None, bit: _Word | None = None) -> None:
        wires = self._operand(self.qubits, self._take())
        if bits is not None and bits != len(wires):
            self._refuse(f"as many bits as the {len(wires)} qubit(s) that are measured", bit)
        if again := set(wires) & set(self.measured):
            self._refuse(f"one measurement of qubit {min(again)}", bit or self.next)
        self.measured += wires

    def _call(self, word: _Word) -> None:
        single = _READ.get(word.text)
        count, product = _PRODUCTS.get(word.text, (None, ()))
        if single is None and count is None:
            self._refuse("a gate on one or two qubits, or another statement that is read", word)
        if single in _DEFINED and single not in self.defined:
            self._refuse("the definition of this gate before it", word)
        num_wires, num_angles = 1, count
        if single is not None:
            kind = GATE_KINDS[single]
            num_wires, num_angles = kind.num_wires, int(kind.has_parameter)
            product = ((single, 0),)
        angles = self._angles() if self.next.text == "(" else []
        if len(angles) != num_angles:
            self._refuse(f"{num_angles} angle(s) for this gate and not {len(angles)}", word)
        operands = [self._operand(self.qubits, self._take())]
        while self.next.text == ",":
            self._take()
            operands.append(self._operand(self.qubits, self._take()))
        if len(operands) != num_wires or (num_wires > 1 and any(len(o) > 1 for o in operands)):
            self._refuse(f"{num_wires} single qubit(s) for this gate", word)
        places = [tuple(o[0] for o in operands)] if num_wires > 1 else [(w,) for w in operands[0]]
        for wires in places:
            self._add(word, product, wires, angles)

    def _add(self, word: _Word, product, wires: tuple[int, ...], angles: list[float]) -> None:
        if len(set(wires)) < len(wires):
            self._refuse("different qubits for this gate", word)
        if used := set(wires) & set(self.measured):
            self._refuse(f"no gate on qubit {min(used)} after its measurement", word)
        if len(self.gates) + len(product) > MAX_GATES:
            self._refuse(f"at most {MAX_GATES} gates", word)
        for gate, angle in product:
            index = None
            if GATE_KINDS[gate].has_parameter:
                index = len(self.parameters)
                self.parameters.append(angles[angle] if isinstance(angle, int) else angle)
            self.gates.append(Gate(gate, wires, index))

    def _operand(self, register: tuple[str, int], word: _Word) -> list[int]:
        """The places in a register that an operand stands for."""
        name, size = register
        if not size or word.text != name:
            self._refuse(f"the register {name}" if size else "a register before its use", word)
        if self.next.text != "[":
            return list(range(size))
        self._take()
        index = self._whole_number(0, size - 1)
        self._expect("]")
        return [index]

    def _whole_number(self, low: int, high: int) -> int:
        word = self._take()
        # A name may consist of digits such as "²", which `int` does not read.
        is_whole = word.kind == "number" and word.text.isdigit()
        if not (is_whole and low <= int(word.text) <= high):
            self._refuse(f"a whole number from {low} to {high}", word)
        return int(word.text)

    def _angles(self) -> list[float]:
        """The angles between parentheses."""
        self._expect("(")
        if self.next.text == ")":
            self._take()
            return []
        found = []
        while True:
            value, end = self._angle()
            found.append(value)
            if end.text == ")":
                return found
            if len(found) == 3:
                self._refuse("at most 3 angles", end)

    def _angle(self) -> tuple[float, _Word]:
        """One angle, and the comma or parenthesis that ends it: by two stacks (Dijkstra)."""
        first = self.next
        values: list[tuple[float, bool]] = []  # and whether it is a whole number
        signs: list[_Word] = []

        def reduce() -> None:
            sign = signs.pop()
            right, whole = values.pop()
            if sign.kind == "minus":
                values.append((-right, whole))
                return
            left, left_whole = values.pop()
            whole = whole and left_whole
            if sign.text == "/" and (whole or right == 0):
                found = "division of whole numbers" if whole else "division by 0"
                self._refuse(f"an angle without a {found}, such as pi/2 or 1.0/3", sign)
            value = {
                "+": lambda: left + right,
                "-": lambda: left - right,
                "*": lambda: left * right,
                "/": lambda: left / right,
            }[sign.text]()
            values.append((value, whole))

        def reduce_while(weakest: int) -> None:
            while signs and signs[-1].text != "(" and _strength(signs[-1]) >= weakest:
                reduce()

        for _ in range(MAX_EXPRESSION):
            word = self._take()
            while word.text in ("(", "+", "-"):  # before a value
                if word.text != "+":
                    signs.append(word._replace(kind="minus") if word.text == "-" else word)
                if len(signs) > MAX_EXPRESSION:
                    self._refuse("a shorter angle", word)
                word = self._take()
            if word.kind == "number":
                values.append((float(word.text), word.text.isdigit()))
            elif word.text in _CONSTANTS:
                values.append((_CONSTANTS[word.text], False))
            else:
                self._refuse("a number, pi or tau", word)
            end = self._take()
            while end.text == ")" and any(sign.text == "(" for sign in signs):
                reduce_while(0)
                signs.pop()
                end = self._take()
            if end.text in (",", ")"):
                if any(sign.text == "(" for sign in signs):
                    self._refuse("a closing parenthesis", end)
                reduce_while(0)
                ((value, _),) = values
                if not math.isfinite(value):
                    self._refuse("a finite angle", first)
                return value, end
            if end.text not in ("+", "-", "*", "/"):
                self._refuse("an operator, a comma or a closing parenthesis", end)
            reduce_while(_strength(end))
            signs.append(end)
        self._refuse("a shorter angle", first)

    def _take(self) -> _Word:
        word = self.next
        if word.kind != "end":
            self.next = next(self.words)
        return word

    def _expect(self, text: str, told: str = "") -> None:
        word = self._take()
        if word.text != text or word.kind == "end":
            self._refuse(told or repr(text), word)

    def _words(self, text: str) -> Iterator[_Word]:
        line, place = 1, 0
        while place < len(text):
            match = _WORDS.match(text, place)
            place, kind, found = match.end(), match.lastgroup, match.group()
            if kind == "line":
                line += 1
            elif kind == "comment":
                place = text.find("*/", match.end()) + 2
                if place < 2:
                    self._refuse("the end of the comment", _Word(kind, found, line))
                line += text.count("\n", match.end(), place)
            elif kind == "other" or (kind != "text" and len(found) > MAX_WORD and kind != "space"):
                self._refuse("a word of OpenQASM 3", _Word(kind, found, line))
            elif kind != "space":
                yield _Word(kind, found, line)
        yield _Word("end", "", line)

    def _refuse(self, expected: str, word: _Word) -> NoReturn:
        found = repr(word.text if len(word.text) <= MAX_WORD else word.text[:MAX_WORD] + "...")
        found = "the end" if word.kind == "end" else found
        raise DataError(f"{self.name}, line {word.line}: expected {expected}, found {found}")


def _strength(sign: _Word) -> int:
    """How strongly an operator binds: * and / more than + and -, a sign in front the most."""
    return 3 if sign.kind == "minus" else 2 if sign.text in "*/" else 1
