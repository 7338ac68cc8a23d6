"""The student of QD-LLM: <Z> of its 11 qubits for a batch of texts, value and gradient.

    python -m benchmarks.quantum_student [--batch 256] [--pairs 5]

Value and gradient of sum_bj w_bj <Z_j>_b with respect to the texts' angles and the 144 trained
ones, float32. The peers run the circuit gate by gate on a statevector, as published: PennyLane with
broadcast angles, TensorCircuit-NG with `vmap`. A third row is our own statevector simulator, gate
by gate too. Ours passes a matrix along a chain instead (`quantum.classifier_circuit`), which is
exact for this circuit and for few others. All are checked against ours before they are timed. What
the peers take to compile is not counted; the notes say how long.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gate import blocking
from benchmarks.pairs import Row, check, compare, table
from qkd_jax.quantum import (
    angle_shapes,
    apply,
    circuit_parameters,
    classifier_circuit,
    classifier_expectations,
    expectation_z,
)

QUBITS, BATCH = 11, 256
LAYERS, REPEATS = 2, 3


def inputs(batch: int, num_qubits: int = QUBITS) -> tuple[tuple[jax.Array, dict], jax.Array]:
    """((data angles [B, Q], trained angles), weights [B, Q])."""
    generator = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(generator.normal(0.0, scale, shape), jnp.float32)

    angles = {name: draw(*shape) for name, shape in angle_shapes(num_qubits).items()}
    return (draw(batch, num_qubits, scale=3.0), angles), draw(batch, num_qubits)


def objective(expectations: Callable, weights: jax.Array) -> Callable:
    """Value and gradient of the weighted sum of expectations [B, Q]."""
    return jax.value_and_grad(lambda x, a: jnp.sum(weights * expectations(x, a)), argnums=(0, 1))


def gate_by_gate(inputs: jax.Array, angles: dict) -> jax.Array:
    """Our own statevector simulator."""
    circuit = classifier_circuit(inputs.shape[1])
    return jax.vmap(lambda x: expectation_z(apply(circuit, circuit_parameters(x, angles))))(inputs)


def pennylane(num_qubits: int) -> Callable:
    """default.qubit with broadcast angles, differentiated by JAX."""
    import pennylane as qml

    @qml.qnode(
        qml.device("default.qubit", wires=num_qubits), interface="jax", diff_method="backprop"
    )
    def run(inputs, angles):
        for j in range(num_qubits):
            qml.RX(inputs[:, j], wires=j)
        for layer in range(LAYERS):
            for j in range(num_qubits - 1):
                for repeat in range(REPEATS):
                    qml.RY(angles["ry"][layer, repeat, j], wires=j)
                if j != num_qubits - 2:
                    qml.IsingZZ(angles["rzz"][layer, j], wires=[j + 1, j + 2])
            for j in range(num_qubits):
                for repeat in range(REPEATS):
                    qml.RZ(angles["rz"][layer, repeat, j], wires=j)
            qml.CNOT(wires=[num_qubits - 1, 0])
            for k in range(1, num_qubits - 2):
                qml.CNOT(wires=[k, k + 1])
                qml.CNOT(wires=[k, k - 1])
        return [qml.expval(qml.Z(j)) for j in range(num_qubits)]

    return lambda inputs, angles: jnp.stack(run(inputs, angles), axis=1)


def tensorcircuit(num_qubits: int) -> Callable:
    import tensorcircuit

    tensorcircuit.set_backend("jax")

    def one(inputs, angles):
        circuit = tensorcircuit.Circuit(num_qubits)
        for j in range(num_qubits):
            circuit.rx(j, theta=inputs[j])
        for layer in range(LAYERS):
            for j in range(num_qubits - 1):
                for repeat in range(REPEATS):
                    circuit.ry(j, theta=angles["ry"][layer, repeat, j])
                if j != num_qubits - 2:
                    circuit.rzz(j + 1, j + 2, theta=angles["rzz"][layer, j])
            for j in range(num_qubits):
                for repeat in range(REPEATS):
                    circuit.rz(j, theta=angles["rz"][layer, repeat, j])
            circuit.cnot(num_qubits - 1, 0)
            for k in range(1, num_qubits - 2):
                circuit.cnot(k, k + 1)
                circuit.cnot(k, k - 1)
        return jnp.stack([jnp.real(circuit.expectation_ps(z=[j])) for j in range(num_qubits)])

    return jax.vmap(one, in_axes=(0, None))


def rows(batch: int, num_qubits: int, pairs: int) -> Iterator[Row]:
    arguments, weights = inputs(batch, num_qubits)
    mine = jax.jit(objective(classifier_expectations, weights))
    began = time.perf_counter()
    expected = jax.block_until_ready(mine(*arguments))
    compiled = time.perf_counter() - began
    run = blocking(mine, arguments)
    name = f"student, value and gradient, {num_qubits} qubits, batch {batch}"
    for peer, form, goal in (
        ("ours, gate by gate, jit", gate_by_gate, 0.0),
        ("TensorCircuit-NG, jit", tensorcircuit(num_qubits), 2.0),
        ("PennyLane default.qubit, jit", pennylane(num_qubits), 10.0),
    ):
        theirs = jax.jit(objective(form, weights))
        began = time.perf_counter()
        found = jax.block_until_ready(theirs(*arguments))
        took = time.perf_counter() - began
        check(peer, found, expected)
        row = compare(name, run, blocking(theirs, arguments), peer, goal, pairs=pairs, warm=True)
        yield row._replace(note=f"first call {took:.0f} s, ours {compiled:.0f} s")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--qubits", type=int, default=QUBITS)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # PennyLane's
    found = list(rows(options.batch, options.qubits, options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
