"""A trained circuit as a program: what its comments promise is what the run predicts."""

import json
import re

import numpy as np
import pytest

import qkd_jax
from qkd_jax import cli

pytestmark = pytest.mark.usefixtures("compiled")
TEXT = 'a "bird" that\nsings, größer'
SETTINGS = (
    *("backbone.name=tiny_random_text", "backbone.num_tokens=8", "data.source=texts"),
    *("data.num_classes=0", "train.epochs=1", "train.devices=1"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """student -> folder of a run on two classes of texts."""
    place = tmp_path_factory.mktemp("exported")
    for part in ("train", "test"):
        (place / "texts" / part).mkdir(parents=True)
        for name in ("birds", "to\\ols"):
            lines = [f"{name} {'xyz'[n % 3] * n} {part}" for n in range(1, 7)]
            (place / "texts" / part / f"{name}.txt").write_text("\n".join(lines), "utf-8")
    found = {}
    for method, student in (("qd_llm", "circuit"), ("qd_llm", "tanh"), ("linear_probe", "")):
        own = ("qd_llm.qubits=5", f"qd_llm.student={student}", "protocol.kind=joint")
        settings = [f"--set={s}" for s in (*SETTINGS, *(own if student else ()))]
        arguments = ["run", "smoke", "--method", method, "--data", str(place / "texts"), *settings]
        variant = ["--variant", student] if student else []
        assert cli.main([*arguments, *variant, "--out", str(place), "--no-report"]) == 0
        (summary,) = place.glob(f"smoke/{method}{'-' * bool(student)}{student}/seed*/config.json")
        found[student or method] = summary.parent
    return found


def test_measured_bits_become_the_scores_of_the_run(runs, tmp_path, capsys):
    file = tmp_path / "new" / "text.qasm"
    arguments = ["export-circuit", str(runs["circuit"]), "--text", TEXT]
    assert cli.main([*arguments, "--out", str(file)]) == 0
    program = file.read_text("utf-8")
    capsys.readouterr()
    assert cli.main(arguments) == 0 and capsys.readouterr().out == program

    trained = qkd_jax.load_run(runs["circuit"])
    scores = qkd_jax.predict(trained.state, qkd_jax.tokenize(trained.state.backbone, [TEXT]))[0]
    measured = np.array(json.loads(re.search(r"^// exact m: (.*)$", program, re.MULTILINE)[1]))
    lines = re.findall(
        r"^// class (\".*\"): bias (\S+), weights (\[.*\]), exact score (\S+)$",
        program,
        re.MULTILINE,
    )
    assert [json.loads(name) for name, *_ in lines] == list(trained.class_names)
    for (_, bias, weights, score), expected in zip(lines, scores, strict=True):
        # Numbers with six digits behind the point, six of them with weights below 1.
        found = float(bias) + np.dot(json.loads(weights), measured)
        np.testing.assert_allclose([found, float(score)], float(expected), rtol=0, atol=1e-5)
    answer = json.loads(re.search(r"^// answer: (.*)$", program, re.MULTILINE)[1])
    assert answer == trained.class_names[int(np.argmax(scores))]
    # The text of the program is one comment, whatever is in it, and then OpenQASM.
    lines = program.splitlines()
    first = lines.index("OPENQASM 3.0;")
    assert all(line.startswith("//") for line in lines[:first])
    assert lines[first + 1 : first + 3] == ['include "stdgates.inc";', "qubit[5] q;"]


@pytest.mark.filterwarnings("ignore")  # PennyLane's own deprecations
def test_pennylane_measures_what_the_comments_say(runs, capsys):
    pytest.importorskip("openqasm3", reason="what PennyLane reads OpenQASM 3 with")
    import pennylane as qml

    capsys.readouterr()
    assert cli.main(["export-circuit", str(runs["circuit"]), "--text", TEXT]) == 0
    program = capsys.readouterr().out
    read = qml.from_qasm3(program.replace('include "stdgates.inc";\n', ""))
    wires = [f"q[{j}]" for j in range(5)]

    @qml.qnode(qml.device("default.qubit", wires=wires))
    def run():
        read()
        return [qml.expval(qml.Z(wire)) for wire in wires]

    measured = json.loads(re.search(r"^// exact m: (.*)$", program, re.MULTILINE)[1])
    np.testing.assert_allclose(run(), measured, rtol=0, atol=1e-5)


@pytest.mark.parametrize("student", ["tanh", "linear_probe"])
def test_a_run_without_a_circuit_is_refused(runs, capsys, student):
    assert cli.main(["export-circuit", str(runs[student]), "--text", TEXT]) == 1
    expected = f"expected a run of qd_llm with qd_llm.student=circuit, found {student}"
    assert expected in capsys.readouterr().err
