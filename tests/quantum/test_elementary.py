"""Any gate as Pauli rotations and Clifford gates: the same state up to a global phase."""

import jax
import jax.numpy as jnp
import numpy as np

from qkd_jax.quantum import Circuit, Gate, apply, elementary
from qkd_jax.quantum.elementary import CLIFFORDS, ROTATIONS
from qkd_jax.quantum.gates import GATE_KINDS


def test_every_gate_is_the_same_up_to_a_global_phase():
    """The whole matrix of each gate, on wires in the order that is not their own."""
    circuits = [
        Circuit(2, (Gate(name, (1, 0)[: kind.num_wires], 0 if kind.has_parameter else None),))
        for name, kind in GATE_KINDS.items()
    ]

    def matrices(angle):
        for circuit in circuits:
            parameters, parts = angle[: circuit.num_parameters], elementary(circuit)
            assert {gate.name for gate in parts.circuit.gates} <= {*CLIFFORDS, *ROTATIONS}
            yield tuple(
                jax.vmap(lambda state, c=c, p=p: apply(c, p, state))(jnp.eye(4))
                for c, p in ((circuit, parameters), (parts.circuit, parts.angles(parameters)))
            )

    found = jax.jit(lambda angle: list(matrices(angle)))(jnp.array([1.3]))
    for circuit, (whole, product) in zip(circuits, found, strict=True):
        # |tr(A B^dagger)| is 4 only if A and B are one unitary but for a phase.
        overlap = np.abs(np.vdot(np.asarray(whole), np.asarray(product)))
        np.testing.assert_allclose(overlap, 4, rtol=0, atol=4e-6, err_msg=str(circuit))


def test_angles_keep_their_parameters():
    gates = (Gate("CRX", (0, 1), 2), Gate("T", (0,)), Gate("RY", (1,), 0))
    parts = elementary(Circuit(2, gates))
    assert [len(group) for group in parts.groups] == [4, 1, 1]
    np.testing.assert_allclose(
        parts.angles(jnp.array([0.1, 9.0, 0.4])), [0.2, -0.2, np.pi / 4, 0.1], rtol=1e-6
    )
    assert elementary(Circuit(1, (Gate("T", (0,)),))).angles(jnp.zeros(0)).shape == (1,)
