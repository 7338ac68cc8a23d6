"""A trained circuit as a program, whose comments promise what the run predicts, and with noise."""

import json
import re

import numpy as np
import pytest

import qkd_jax
from qkd_jax import cli
from qkd_jax.cli import measure_noise

pytestmark = [pytest.mark.usefixtures("compiled"), pytest.mark.slow]
TEXT = 'a "bird" that\nsings, größer'
SETTINGS = (
    *("backbone.name=tiny_random_text", "backbone.num_tokens=8", "data.source=texts"),
    *("data.num_classes=0", "train.epochs=40", "train.devices=1"),
    *("train.learning_rate=0.03",),
)


NAMES = ("birds", "to\\ols")


def texts_of(name, part):
    """Six texts of the class `name`."""
    return [f"{name} {'xyz'[n % 3] * n} {part}" for n in range(1, 7)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """student -> folder of a run on two classes of texts."""
    place = tmp_path_factory.mktemp("exported")
    for part in ("train", "test"):
        (place / "texts" / part).mkdir(parents=True)
        for name in NAMES:
            lines = "\n".join(texts_of(name, part))
            (place / "texts" / part / f"{name}.txt").write_text(lines, "utf-8")
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


def test_accuracies_with_noise_go_from_the_run_s_to_those_of_no_information(
    runs, tmp_path, monkeypatch
):
    """Where every bit is flipped half of the time, only the biases of the classes are left."""
    monkeypatch.setattr(measure_noise, "SHOTS", (1, 4096))
    monkeypatch.setattr(measure_noise, "READOUT", (0.0, 0.5))
    monkeypatch.setattr(measure_noise, "GATES", (0.0, 1.0))
    out = tmp_path / "new"
    assert cli.main(["noise", str(runs["circuit"]), "--texts", "100", "--out", str(out)]) == 0
    assert (out / "noise.png").stat().st_size > 1000
    found = json.loads((out / "noise.json").read_text())
    summary = json.loads((runs["circuit"] / "summary.json").read_text())
    assert (found["num_texts"], found["num_classes"], found["shots"]) == (12, 2, [1, 4096])
    assert found["exact"] == [round(summary["last_accuracy"], 4)] and found["exact"][0] > 80

    state = qkd_jax.load_run(runs["circuit"]).state
    texts = [text for name in NAMES for text in texts_of(name, "test")]
    scores = np.asarray(qkd_jax.predict(state, qkd_jax.tokenize(state.backbone, texts)))
    rows, bias = (np.asarray(state.memory[name]) for name in ("rows", "bias"))
    # 4096 shots: five standard deviations of each <Z> are 0.08, and of the scores at most the sum.
    reach = 0.08 * np.abs(rows[0] - rows[1]).sum()
    unclear = 100 * np.mean(np.abs(scores[:, 0] - scores[:, 1]) < reach)
    perfect, lost = (kind["accuracy"][0] for kind in found["readout"])
    assert abs(perfect[1] - found["exact"][0]) <= unclear < 60
    assert abs(found["gates"][0]["accuracy"][0] - found["exact"][0]) <= unclear
    # Half of the texts are of each class, and all are given the class of the larger bias. Flipped
    # bits are independent.
    assert abs(bias[0] - bias[1]) > 0.08 * np.linalg.norm(rows[0] - rows[1]) and lost[1] == 50.0


def test_noise_needs_runs_of_one_kind(runs, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "none")]
    assert cli.main(["noise", str(runs["circuit"]), str(runs["tanh"]), *arguments]) == 1
    expected = "expected a run of qkd, or a run of qd_llm with qd_llm.student=circuit, found tanh"
    assert expected in capsys.readouterr().err
    assert cli.main(["noise", str(runs["circuit"]), "--texts", "0", *arguments]) == 1
    assert "--texts: expected 1 or more, found 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
