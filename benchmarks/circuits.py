"""Circuits of other people: one state of 12 qubits, gate by gate, in moments, and by PennyLane.

    python -m benchmarks.circuits [--qubits 12] [--layers 6] [--gates 150] [--pairs 9]

Three forms: layers of RY, RZ and a chain of CNOTs; QAOA on a ring, RZZ and RX; and gates drawn at
random on random wires. Ours is the fused path (`quantum.apply_fused`), complex64, jitted. The peers
are our own gate-by-gate path (`quantum.apply`), which a random circuit may prefer, and PennyLane's
default.qubit, jitted with its JAX interface. All states are compared with ours before they are
timed. What it takes to compile is not counted; the notes say how long.
"""

import argparse
import time
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gate import blocking
from benchmarks.pairs import Row, check, compare, table
from qkd_jax.quantum import Circuit, Gate, apply, apply_fused, to_pennylane

ROTATIONS, FIXED = ("RX", "RY", "RZ", "RZZ", "CRY"), ("H", "CNOT", "CZ", "SWAP")
ON_TWO = ("RZZ", "CRY", "CNOT", "CZ", "SWAP")


def circuit_of(num_qubits: int, gates: list[tuple[str, tuple[int, ...]]]) -> Circuit:
    """A circuit in which every rotation has a parameter of its own."""
    found, parameters = [], 0
    for name, wires in gates:
        rotates = name in ROTATIONS
        found.append(Gate(name, wires, parameters if rotates else None))
        parameters += rotates
    return Circuit(num_qubits, tuple(found))


def layers(num_qubits: int, num_layers: int) -> Circuit:
    """RY and RZ on every wire, then CNOT(j -> j + 1)."""
    turns = [(name, (j,)) for name in ("RY", "RZ") for j in range(num_qubits)]
    chain = [("CNOT", (j, j + 1)) for j in range(num_qubits - 1)]
    return circuit_of(num_qubits, num_layers * (turns + chain))


def qaoa(num_qubits: int, num_layers: int) -> Circuit:
    """H on every wire, then RZZ along a ring and RX on every wire."""
    ring = [("RZZ", (j, (j + 1) % num_qubits)) for j in range(num_qubits)]
    mixer = [("RX", (j,)) for j in range(num_qubits)]
    start = [("H", (j,)) for j in range(num_qubits)]
    return circuit_of(num_qubits, start + num_layers * (ring + mixer))


def drawn(num_qubits: int, num_gates: int) -> Circuit:
    """Gates in no order."""
    generator = np.random.default_rng(0)
    names = generator.choice(ROTATIONS + FIXED, num_gates)
    wires = [generator.permutation(num_qubits)[: 1 + (name in ON_TWO)] for name in names]
    pairs = zip(names, wires, strict=True)
    return circuit_of(num_qubits, [(str(name), tuple(map(int, on))) for name, on in pairs])


def rows(num_qubits: int, num_layers: int, num_gates: int, pairs: int) -> Iterator[Row]:
    forms = {
        f"{num_layers} layers of RY, RZ, CNOT": layers(num_qubits, num_layers),
        f"QAOA on a ring, {num_layers} layers": qaoa(num_qubits, num_layers),
        f"{num_gates} random gates": drawn(num_qubits, num_gates),
    }
    for name, circuit in forms.items():
        angles = np.random.default_rng(1).uniform(-3, 3, circuit.num_parameters)
        parameters = jnp.asarray(angles, jnp.float32)
        mine = jax.jit(lambda parameters, circuit=circuit: apply_fused(circuit, parameters))
        began = time.perf_counter()
        expected = jax.block_until_ready(mine(parameters))
        compiled = time.perf_counter() - began
        for peer, call in (
            ("ours, gate by gate, jit", lambda p, circuit=circuit: apply(circuit, p)),
            ("PennyLane default.qubit, jit", to_pennylane(circuit, interface="jax")),
        ):
            theirs = jax.jit(call)
            began = time.perf_counter()
            found = jax.block_until_ready(theirs(parameters))
            took = time.perf_counter() - began
            check(peer, found, expected)
            row = compare(
                f"{name}, {num_qubits} qubits",
                blocking(mine, (parameters,)),
                blocking(theirs, (parameters,)),
                peer,
                goal=0.0,
                pairs=pairs,
                warm=True,
            )
            yield row._replace(note=f"first call {took:.0f} s, ours {compiled:.0f} s")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qubits", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--gates", type=int, default=150, help="of the random circuit")
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # PennyLane's
    found = list(rows(options.qubits, options.layers, options.gates, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
