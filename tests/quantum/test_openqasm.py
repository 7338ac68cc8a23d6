"""OpenQASM 3 as golden text, read back by a reader of its own, and by ours from hostile hands."""

import re
import tracemalloc

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from qkd_jax.errors import DataError
from qkd_jax.quantum import (
    Circuit,
    FeatureMap,
    Gate,
    apply,
    feature_circuit,
    fidelity,
    from_openqasm,
    openqasm,
    separate_parameters,
    to_openqasm,
)
from tests.quantum.example_circuits import ALL_GATES, ANGLES, circuits


def test_openqasm_text():
    assert to_openqasm(ALL_GATES, ANGLES) == (
        "OPENQASM 3.0;\n"
        'include "stdgates.inc";\n'
        "gate rzz(theta) a, b { cx a, b; rz(theta) b; cx a, b; }\n"
        "qubit[3] q;\n"
        "h q[0];\n"
        "rx(0.1) q[1];\n"
        "rzz(-0.25) q[2], q[0];\n"
        "rz(-0.25) q[1];\n"
        "cx q[2], q[0];\n"
        "cz q[1], q[2];\n"
        "x q[0];\n"
        "ry(1e-09) q[2];\n"
    )


def read_openqasm(text):
    """A reader of the statements that OpenQASM 3 calls gate calls and gate definitions.

    A defined gate is expanded into the gates of its body, so its definition is tested too.
    """
    names = {"rx": "RX", "ry": "RY", "rz": "RZ", "h": "H", "x": "X", "cx": "CNOT", "cz": "CZ"}
    assert text.startswith('OPENQASM 3.0;\ninclude "stdgates.inc";\n')
    definitions = {
        name: (variable, formal.split(", "), body)
        for name, variable, formal, body in re.findall(
            r"^gate (\w+)\((\w+)\) ([\w, ]+?) \{ (.*) \}$", text, re.MULTILINE
        )
    }
    (num_qubits,) = re.findall(r"^qubit\[(\d+)\] q;$", text, re.MULTILINE)
    gates, parameters = [], []

    def call(name, angle, wires):
        if name in definitions:
            variable, formal, body = definitions[name]
            wire_of = dict(zip(formal, wires, strict=True))
            for inner, inner_angle, operands in re.findall(r"(\w+)(?:\((\w+)\))? ([\w, ]+);", body):
                assert inner_angle in ("", variable)
                inner_wires = tuple(wire_of[operand] for operand in operands.split(", "))
                call(inner, angle if inner_angle else None, inner_wires)
            return
        if angle is not None:
            parameters.append(angle)
        gates.append(Gate(names[name], wires, None if angle is None else len(parameters) - 1))

    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\(([-+.e\d]+)\))? (q\[\d+\](?:, q\[\d+\])*);", line)
        if match:
            name, angle, operands = match.groups()
            wires = tuple(int(wire) for wire in re.findall(r"\d+", operands))
            call(name, float(angle) if angle else None, wires)
    return Circuit(int(num_qubits), tuple(gates)), np.array(parameters, np.float32)


@pytest.mark.parametrize("define_gates", [True, False])
@pytest.mark.parametrize("circuit", [ALL_GATES, feature_circuit(FeatureMap(4, 2, last_axis="z"))])
def test_openqasm_read_back_gives_the_same_state(circuit, define_gates):
    values = np.random.default_rng(0).uniform(-3, 3, circuit.num_parameters).astype(np.float32)
    text = to_openqasm(circuit, values, define_gates=define_gates)
    assert ("gate rzz" in text) == (circuit is ALL_GATES and define_gates)
    read, read_values = read_openqasm(text)
    assert set(read_values) <= set(values), "an angle lost digits"
    expected = apply(circuit, jnp.asarray(values))
    # Fewer than 40 gates of error eps = 1.2e-7 each.
    np.testing.assert_allclose(
        apply(read, jnp.asarray(read_values)), expected, rtol=0, atol=40 * 1.2e-7
    )


def test_angles_of_every_real_type_are_written_with_every_digit():
    tenth = np.float32(0.1)
    expected = to_openqasm(ALL_GATES, [float(tenth), 2.0, -1.0])
    assert f"rx({float(tenth)!r})" in expected and "rzz(2.0)" in expected and "ry(-1.0)" in expected
    for parameters in (
        [tenth, 2, np.int8(-1)],
        [jnp.float32(0.1), jnp.array(2), np.array(-1.0)],
        np.array([tenth, 2, -1]),
        jnp.array([0.1, 2, -1], jnp.float32),
    ):
        assert to_openqasm(ALL_GATES, parameters) == expected
    whole = to_openqasm(ALL_GATES, range(3))
    assert whole == to_openqasm(ALL_GATES, jnp.arange(3))
    assert whole == to_openqasm(ALL_GATES, jnp.arange(3, dtype=jnp.bfloat16))


@st.composite
def programs(draw):
    """A circuit, and finite angles for it."""
    circuit = draw(circuits(4, 8, 3))
    angles = st.floats(allow_nan=False, allow_infinity=False)
    return circuit, draw(st.lists(angles, min_size=4, max_size=4))[: circuit.num_parameters]


@given(programs())
def test_what_is_written_is_read_back_to_the_last_digit(case):
    circuit, parameters = case
    read = from_openqasm(to_openqasm(circuit, parameters))
    expected, index = separate_parameters(circuit)
    assert read.circuit == expected and read.measured == ()
    np.testing.assert_array_equal(read.parameters, np.array(parameters)[list(index)])


def test_a_defined_gate_and_its_standard_gates_are_the_same():
    gates = (Gate("RY", (0,), 0), Gate("RXX", (1, 0), 1), Gate("RYY", (0, 2), 2))
    circuit = Circuit(3, (Gate("H", (2,)), *gates, Gate("RZZ", (2, 1), 0)))
    program = from_openqasm(to_openqasm(circuit, [0.5, -1.2, 2.0], define_gates=False))
    assert {gate.name for gate in program.circuit.gates} == {"H", "RX", "RY", "RZ", "CNOT"}
    states = [
        apply(c, jnp.asarray(p, jnp.float32))
        for c, p in ((circuit, [0.5, -1.2, 2.0]), (program.circuit, program.parameters))
    ]
    # 30 gates of error eps = 1.2e-7 each, and a fidelity doubles it.
    np.testing.assert_allclose(fidelity(*states), 1, rtol=0, atol=60 * 1.2e-7)


HEADER = "OPENQASM 3.0;\n"


def read(body):
    return from_openqasm(HEADER + body)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pi", np.pi),
        ("-π/2", -np.pi / 2),
        ("tau", 2 * np.pi),
        ("2*(pi + 1.5)/3", 2 * (np.pi + 1.5) / 3),
        ("1 - 2 - 3", -4.0),
        ("8.0/2/2", 2.0),
        ("2 + 3*4 - 1", 13.0),
        ("-(-(.5e1))", 5.0),
        ("2*-pi", -2 * np.pi),
        ("-2*3 + +1", -5.0),
        ("((((1.))))", 1.0),
        ("-2*-(3 - 4*(1 + 1))", -10.0),
    ],
)
def test_angles_are_expressions(text, value):
    assert read(f"qubit q;\nrx({text}) q;").parameters.tolist() == [value]


def test_what_other_writers_write_is_read():
    program = read(
        """
        include "stdgates.inc"; // the standard gates
        /* two
           registers */ qubit[3] reg;
        bit[3] c;
        h reg; id reg[0]; CX reg[0], reg[1];
        u3(0.1, 0.2, 0.3) reg[2]; u2(0.4, 0.5) reg[2]; u1(0.6) reg[2]; cphase(0.7) reg[2], reg[0];
        c[1] = measure reg[2];
        measure reg[0];
        """
    )
    names = " ".join(gate.name for gate in program.circuit.gates)
    assert names == "H H H CNOT P RY P P RY P P CP"
    np.testing.assert_array_equal(
        program.parameters, [0.3, 0.1, 0.2, 0.5, np.pi / 2, 0.4, 0.6, 0.7]
    )
    assert program.measured == (2, 0)
    assert read("qubit[2] q; bit[2] c; c = measure q;").measured == (0, 1)


def test_u3_is_the_matrix_of_its_definition():
    theta, phi, lam = 0.7, -1.1, 2.3
    program = read(f"qubit q; u3({theta}, {phi}, {lam}) q;")
    columns = [
        apply(program.circuit, jnp.asarray(program.parameters, jnp.float32), state)
        for state in jnp.eye(2)
    ]
    c, s = np.cos(theta / 2), np.sin(theta / 2)
    expected = [
        [c, -np.exp(1j * lam) * s],
        [np.exp(1j * phi) * s, np.exp(1j * (phi + lam)) * c],
    ]
    np.testing.assert_allclose(np.stack(columns, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "line 2: expected a register such as qubit[2] q;, found the end"),
        ("qubit[2] q;\nccx q[0], q[1], q[0];", "line 3: expected a gate on one or two qubits"),
        ("qubit q;\n\n/* \n */ frob q;", "line 5: expected a gate"),
        ("qubit q;\nrx(0.1) q", "line 3: expected ';', found the end"),
        ("qubit[0] q;", "line 2: expected a whole number from 1 to 1024, found '0'"),
        ("qubit[1e3] q;", "found '1e3'"),
        ("qubit[9999999999999999999] q;", "found '9999999999999999999'"),
        ("qubit[2] q; qubit[2] r;", "expected one register of qubits, found 'r'"),
        ("bit[2] q; qubit[2] q;", "expected a name that is not taken, found 'q'"),
        ("qubit gate;", "expected a name that is not taken, found 'gate'"),
        ("h q[0];", "expected a register before its use, found 'q'"),
        ("qubit q; h r;", "expected the register q, found 'r'"),
        ("qubit[2] q; h q[2];", "expected a whole number from 0 to 1, found '2'"),
        ("qubit[2] q; h q[-1];", "found '-'"),
        ("qubit[²] q;", "expected a whole number from 1 to 1024, found '²'"),
        ("qubit[2] q; h q[٣];", "expected a word of OpenQASM 3, found '٣'"),
        ("qubit[2] q; cx q[0], q[0];", "expected different qubits for this gate, found 'cx'"),
        ("qubit[2] q; cx q, q;", "expected 2 single qubit(s) for this gate, found 'cx'"),
        ("qubit[2] q; cx q[0];", "expected 2 single qubit(s)"),
        ("qubit q; rx q;", "expected 1 angle(s) for this gate and not 0, found 'rx'"),
        ("qubit q; rx() q;", "expected 1 angle(s) for this gate and not 0, found 'rx'"),
        ("qubit q; h(1.0) q;", "expected 0 angle(s) for this gate and not 1, found 'h'"),
        ("qubit q; rx(1, 2, 3, 4) q;", "expected at most 3 angles, found ','"),
        ("qubit q; rx(1/2) q;", "expected an angle without a division of whole numbers"),
        ("qubit q; rx(pi/0) q;", "expected an angle without a division by 0"),
        ("qubit q; rx(1e308*10) q;", "expected a finite angle, found '1e308'"),
        ("qubit q; rx(theta) q;", "expected a number, pi or tau, found 'theta'"),
        ("qubit q; rx(__import__) q;", "expected a number, pi or tau, found '__import__'"),
        ("qubit q; rx(pi)) q;", "found ')'"),
        ("qubit q; rx((pi) q;", "expected an operator, a comma or a closing parenthesis"),
        ("qubit q; rx((pi, 2) q;", "expected a closing parenthesis, found ','"),
        ("qubit q; rx(2 pi) q;", "expected an operator"),
        ("qubit q; rx(2**3) q;", "expected a number, pi or tau, found '*'"),
        ("qubit[2] q; rzz(1) q[0], q[1];", "expected the definition of this gate before it"),
        ("gate foo a { h a; }", "expected one definition each of rxx, ryy or rzz, found 'foo'"),
        ("gate rzz(theta) a, b { cz a, b; }", "expected the definition 'gate rzz(theta) a, b {"),
        ("qubit[2] q; ctrl @ x q[0], q[1];", "found 'ctrl'"),
        ("include 'x';", 'expected a word of OpenQASM 3, found "\'"'),
        ('include "/etc/passwd";', 'expected "stdgates.inc", found \'"/etc/passwd"\''),
        ("for int i in [0:1] {}", "found 'for'"),
        ("qubit[2] q; measure q; h q[1];", "expected no gate on qubit 1 after its measurement"),
        ("qubit[2] q; measure q; measure q[1];", "expected one measurement of qubit 1"),
        ("qubit[2] q; bit c; c = measure q;", "expected as many bits as the 2 qubit(s)"),
        ("/* never", "expected the end of the comment, found '/*'"),
        ("\0", "expected a word of OpenQASM 3"),
        ("qubit " + "q" * 65 + ";", "expected a word of OpenQASM 3, found 'qqq"),
    ],
)
def test_what_is_not_read_is_told_with_its_place(body, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        from_openqasm(HEADER + body, "bad.qasm")
    assert str(caught.value).startswith("bad.qasm, line ") and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text", ["", "qubit q;", "OPENQASM 2.0;", "\ufeffOPENQASM 3;", b"OPENQASM 3;"]
)
def test_what_is_no_program_is_refused(text):
    with pytest.raises(DataError, match="expected"):
        from_openqasm(text)


MANY = 200_000


@pytest.mark.parametrize(
    "body",
    [
        "qubit q; rx(" + "(" * MANY,
        "qubit q; rx(" + "-" * MANY + "1) q;",
        "qubit q; rx(1" + "+1" * MANY + ") q;",
        "qubit q; rx(" + "9" * MANY + ") q;",
        "qubit q; rx(1" + ",1" * MANY + ") q;",
        "/*" * MANY,
        "qubit[1024] q;" + "h q;" * MANY,
        '"' * MANY,
        "qubit q; h q" + "[0" * MANY,
        " " * (16 * 2**20),
    ],
    ids=lambda body: body[:14],
)
def test_hostile_programs_end_in_one_error_and_little_memory(body, monkeypatch):
    monkeypatch.setattr(openqasm, "MAX_GATES", 5000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 300
    # The text once more, with the header, and at most the gates that are allowed.
    assert peak < len(body) + 4 * 2**20


@given(st.text(alphabet='qrx()[];,+-*/01 .pi\n"{}=@h', max_size=60))
def test_any_text_is_a_program_or_one_error(text):
    try:
        read("qubit[2] q;" + text)
    except DataError as error:
        assert str(error).startswith("OpenQASM program, line ")
