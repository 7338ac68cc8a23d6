"""The commands about trained circuits: export-circuit, noise."""

import argparse

from qkd_jax.cli.arguments import add_command, path
from qkd_jax.errors import ConfigError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands of this file."""
    export = add_command(
        commands,
        "export-circuit",
        _export_circuit,
        "a trained circuit for one text, as OpenQASM 3",
        "runs/ag_news/qd_llm/seed1993 --text 'shares fell' --out circuit.qasm",
    )
    export.add_argument("folder", type=path, help="the folder of a run of qd_llm")
    export.add_argument("--text", required=True)
    export.add_argument("--out", type=path, help="a file to write; empty = print")
    export.add_argument("--weights", default="", help="the encoder's weight file")

    noise = add_command(
        commands,
        "noise",
        _noise,
        "accuracy of trained circuits against shots, readout and gate errors",
        "runs/ag_news/qd_llm/seed1993 --out noise",
    )
    noise.add_argument(
        "folders", type=path, nargs="+", help="runs of qd_llm or qkd, one for each seed"
    )
    noise.add_argument(
        "--texts", "--images", default=300, type=int, help="how many test texts or images"
    )
    noise.add_argument("--data", default="", help="folder of the data, if it has moved")
    noise.add_argument("--seed", default=0, type=int, help="of texts or images, shots and errors")
    noise.add_argument("--out", required=True, type=path, help="a folder for figure and numbers")
    noise.add_argument("--weights", default="", help="the encoder's weight file")


def _export_circuit(options: argparse.Namespace) -> None:
    from qkd_jax.cli.export_circuit import export_circuit
    from qkd_jax.reports.writing import write_atomically

    text = export_circuit(options.folder, options.text, weights=options.weights or None)
    if options.out is None:
        print(text, end="")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, text.encode())
    print(options.out)


def _noise(options: argparse.Namespace) -> None:
    from qkd_jax.cli.measure_noise import measure_noise, write_noise

    if options.texts < 1:
        raise ConfigError(f"--texts: expected 1 or more, found {options.texts}")
    measured = measure_noise(
        options.folders,
        options.texts,
        options.seed,
        data=options.data or None,
        weights=options.weights or None,
    )
    print(write_noise(measured, options.out))
