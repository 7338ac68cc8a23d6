"""The gate's circuit: fidelities of B samples with T task states, and their gradient.

    python -m benchmarks.gate [--qubits 4 8] [--pairs 7]

Value and gradient of sum_ij w_ij p_ij with respect to sample angles, task angles and theta, for the
feature map of QKD with two layers, B = 128, T = 20, float32. The peers prepare B + T whole states
and multiply them. Ours leaves out the last layer's CNOTs and thetas, which cancel in a fidelity
(`cut_tail`; a user of the peers could do so by hand), and multiplies states out from two halves; a
row shows ours without the cut. Lightning is different: its adjoint method differentiates
expectation values only, so each fidelity is a circuit of its own, `compute` then `uncompute`, in
float64; a few are timed and the rest is counted, as the row says. All are checked against ours
before they are timed.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.floors import bandwidth, floor_note, matmul_rate
from benchmarks.pairs import Row, check, compare, table
from qkd_jax.quantum import FeatureMap, fidelity_matrix

SAMPLES, TASKS, LAYERS = 128, 20, 2
QUBITS = (4, 6, 8, 9, 10, 12)
# Of Lightning's 2,560 circuits, how many are run.
LIGHTNING_CIRCUITS = 10

Inputs = tuple[jax.Array, jax.Array, jax.Array]


def inputs(num_qubits: int) -> tuple[Inputs, jax.Array]:
    """((sample angles [B, Q], task angles [T, Q], theta [L, Q]), weights [B, T])."""
    generator = np.random.default_rng(num_qubits)

    def draw(*shape, scale=1.0):
        return jnp.asarray(generator.normal(0.0, scale, shape), jnp.float32)

    arguments = draw(SAMPLES, num_qubits), draw(TASKS, num_qubits), draw(LAYERS, num_qubits)
    return arguments, draw(SAMPLES, TASKS)


def objective(fidelities: Callable, weights: jax.Array) -> Callable:
    """Value and gradient of the weighted sum of fidelities [B, T]."""
    return jax.value_and_grad(lambda *a: jnp.sum(weights * fidelities(*a)), argnums=(0, 1, 2))


def from_states(state: Callable) -> Callable:
    """Fidelities from `state(angles [Q], theta) -> [2**Q]`, each state prepared once."""

    def fidelities(samples, tasks, theta):
        prepare = jax.vmap(state, in_axes=(0, None))
        overlap = prepare(samples, theta) @ jnp.conj(prepare(tasks, theta)).T
        return jnp.square(jnp.abs(overlap))

    return fidelities


def ours(num_qubits: int, cut_tail: bool = True) -> Callable:
    feature_map = FeatureMap(num_qubits=num_qubits, num_layers=LAYERS, cut_tail=cut_tail)
    return lambda samples, tasks, theta: fidelity_matrix(feature_map, samples, tasks, theta)


def pennylane(num_qubits: int) -> Callable:
    """default.qubit with broadcast parameters, differentiated by JAX."""
    import pennylane as qml

    @qml.qnode(
        qml.device("default.qubit", wires=num_qubits), interface="jax", diff_method="backprop"
    )
    def state(angles, theta):  # [N, Q]
        for layer in range(LAYERS):
            for wire in range(num_qubits):
                qml.RY(angles[:, wire], wires=wire)
                qml.RY(theta[layer, wire], wires=wire)
            for wire in range(num_qubits - 1):
                qml.CNOT(wires=[wire, wire + 1])
        return qml.state()

    def fidelities(samples, tasks, theta):
        overlap = state(samples, theta) @ jnp.conj(state(tasks, theta)).T
        return jnp.square(jnp.abs(overlap))

    return fidelities


def tensorcircuit(num_qubits: int) -> Callable:
    import tensorcircuit

    tensorcircuit.set_backend("jax")

    def state(angles, theta):
        circuit = tensorcircuit.Circuit(num_qubits)
        for layer in range(LAYERS):
            for wire in range(num_qubits):
                circuit.ry(wire, theta=angles[wire])
                circuit.ry(wire, theta=theta[layer, wire])
            for wire in range(num_qubits - 1):
                circuit.cnot(wire, wire + 1)
        return circuit.state()

    return from_states(state)


def qujax(num_qubits: int) -> Callable:
    import qujax

    gates, wires, parameters = [], [], []
    for layer in range(LAYERS):
        for wire in range(num_qubits):
            # Angles first, then the thetas of all layers, in units of pi.
            for parameter in (wire, num_qubits * (1 + layer) + wire):
                gates.append("Ry")
                wires.append([wire])
                parameters.append([parameter])
        for wire in range(num_qubits - 1):
            gates.append("CX")
            wires.append([wire, wire + 1])
            parameters.append([])
    run = qujax.get_params_to_statetensor_func(gates, wires, parameters, num_qubits)

    def state(angles, theta):
        return run(jnp.concatenate([angles, theta.reshape(-1)]) / jnp.pi).reshape(-1)

    return from_states(state)


def lightning(num_qubits: int, arguments: Inputs) -> Callable[[], object]:
    """A few fidelities and their adjoint gradients, one circuit each."""
    import pennylane as qml
    from pennylane import numpy as tracked

    def layers(angles, theta):
        for layer in range(LAYERS):
            for wire in range(num_qubits):
                qml.RY(angles[wire], wires=wire)
                qml.RY(theta[layer, wire], wires=wire)
            for wire in range(num_qubits - 1):
                qml.CNOT(wires=[wire, wire + 1])

    @qml.qnode(qml.device("lightning.qubit", wires=num_qubits), diff_method="adjoint")
    def fidelity(sample, task, theta):
        layers(sample, theta)
        qml.adjoint(layers)(task, theta)
        return qml.expval(qml.Projector([0] * num_qubits, wires=range(num_qubits)))

    gradient = qml.grad(fidelity, argnums=(0, 1, 2))
    samples, tasks, theta = (tracked.array(np.float64(a), requires_grad=True) for a in arguments)

    def call():
        found = [gradient(samples[i], tasks[i], theta) for i in range(LIGHTNING_CIRCUITS)]
        return tuple(np.stack(part) for part in zip(*found, strict=True))

    return call


def own_gradients(num_qubits: int, arguments: Inputs) -> tuple[jax.Array, ...]:
    """What `lightning` computes: gradients of p_ii for the first few i."""
    samples, tasks, theta = arguments
    fidelities = ours(num_qubits)

    def one(sample, task):
        single = jax.grad(lambda a, b, c: fidelities(a[None], b[None], c)[0, 0], argnums=(0, 1, 2))
        return single(sample, task, theta)

    return jax.vmap(one)(samples[:LIGHTNING_CIRCUITS], tasks[:LIGHTNING_CIRCUITS])


def blocking(function: Callable, arguments: Inputs) -> Callable[[], object]:
    return lambda: jax.block_until_ready(function(*arguments))


def rows(qubits: tuple[int, ...], pairs: int) -> Iterator[Row]:
    peak, speed = matmul_rate(592), bandwidth()
    for num_qubits in qubits:
        arguments, weights = inputs(num_qubits)
        mine = jax.jit(objective(ours(num_qubits), weights))
        expected, run = mine(*arguments), blocking(mine, arguments)
        name = f"gate, value and gradient, {num_qubits} qubits"
        large = num_qubits >= 8
        floor = floor_note(mine, arguments, peak, speed)
        for peer, build, goal in (
            ("PennyLane default.qubit, jit", pennylane, 15.0),
            ("TensorCircuit-NG, jit", tensorcircuit, 3.0),
            ("qujax, jit", qujax, 15.0),
        ):
            theirs = jax.jit(objective(build(num_qubits), weights))
            check(peer, theirs(*arguments), expected)
            row = compare(name, run, blocking(theirs, arguments), peer, goal * large, pairs=pairs)
            yield row._replace(note="" if build is not pennylane else floor)
        whole = jax.jit(objective(ours(num_qubits, cut_tail=False), weights))
        check("ours without the cut", whole(*arguments), expected)
        yield compare(
            name, run, blocking(whole, arguments), "ours, nothing left out", 0.0, pairs=pairs
        )
        eager = objective(pennylane(num_qubits), weights)
        check("PennyLane default.qubit, eager", eager(*arguments), expected)
        yield compare(
            name,
            run,
            blocking(eager, arguments),
            "PennyLane default.qubit, eager",
            500.0 * large,
            pairs=3,
        )
        share = LIGHTNING_CIRCUITS / (SAMPLES * TASKS)
        circuits = lightning(num_qubits, arguments)
        check("PennyLane lightning.qubit", circuits(), own_gradients(num_qubits, arguments))
        yield compare(
            name,
            run,
            circuits,
            "PennyLane lightning.qubit, adjoint, float64",
            1000.0 * large,
            pairs=3,
            peer_share=share,
            note=f"{LIGHTNING_CIRCUITS} of {SAMPLES * TASKS:,} circuits timed, the rest counted",
        )


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qubits", type=int, nargs="+", default=QUBITS)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # PennyLane's, on every eager call
    found = list(rows(tuple(options.qubits), options.pairs))
    print(table(found), flush=True)
    return found


if __name__ == "__main__":
    main()
