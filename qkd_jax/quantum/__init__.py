"""A statevector simulator and the circuits built on it; it knows nothing of learning."""

from qkd_jax.quantum.amplitude import amplitude_circuit, amplitude_parameters, prepared_state
from qkd_jax.quantum.circuits import (
    FeatureMap,
    feature_circuit,
    feature_state,
    fidelity_matrix,
    init_theta,
)
from qkd_jax.quantum.classifier_circuit import (
    angle_shapes,
    circuit_parameters,
    classifier_circuit,
    classifier_expectations,
    init_angles,
)
from qkd_jax.quantum.elementary import Elementary, elementary
from qkd_jax.quantum.export import Resources, draw, resources, to_pennylane
from qkd_jax.quantum.fused import apply_fused
from qkd_jax.quantum.gradients import circuit_gradient, gradient_variance, parameter_shift
from qkd_jax.quantum.measure import (
    amplitude_state,
    bloch_vectors,
    expectation_z,
    fidelity,
    projected_kernel,
    sample,
    sample_expectation_z,
    sample_fidelity,
)
from qkd_jax.quantum.noise import Noise, after_readout, noisy_expectations
from qkd_jax.quantum.noisy_fidelity import noisy_fidelities
from qkd_jax.quantum.openqasm import Program, from_openqasm, to_openqasm
from qkd_jax.quantum.pauli import pauli_expectations, sample_pauli_expectations
from qkd_jax.quantum.statevector import Circuit, Gate, apply, separate_parameters, zero_state

__all__ = [
    "Circuit",
    "Elementary",
    "FeatureMap",
    "Gate",
    "Noise",
    "Program",
    "Resources",
    "after_readout",
    "amplitude_circuit",
    "amplitude_parameters",
    "amplitude_state",
    "angle_shapes",
    "apply",
    "apply_fused",
    "bloch_vectors",
    "circuit_gradient",
    "circuit_parameters",
    "classifier_circuit",
    "classifier_expectations",
    "draw",
    "elementary",
    "expectation_z",
    "feature_circuit",
    "feature_state",
    "fidelity",
    "fidelity_matrix",
    "from_openqasm",
    "gradient_variance",
    "init_angles",
    "init_theta",
    "noisy_expectations",
    "noisy_fidelities",
    "parameter_shift",
    "pauli_expectations",
    "prepared_state",
    "projected_kernel",
    "resources",
    "sample",
    "sample_expectation_z",
    "sample_fidelity",
    "sample_pauli_expectations",
    "separate_parameters",
    "to_openqasm",
    "to_pennylane",
    "zero_state",
]
