"""A statevector simulator and the circuits built on it; it knows nothing of learning."""

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
from qkd_jax.quantum.export import Resources, draw, resources, to_openqasm, to_pennylane
from qkd_jax.quantum.measure import (
    amplitude_state,
    bloch_vectors,
    expectation_z,
    fidelity,
    parameter_shift,
    projected_kernel,
    sample,
    sample_expectation_z,
    sample_fidelity,
)
from qkd_jax.quantum.noise import Noise, after_readout, noisy_expectations
from qkd_jax.quantum.statevector import Circuit, Gate, apply, separate_parameters, zero_state

__all__ = [
    "Circuit",
    "FeatureMap",
    "Gate",
    "Noise",
    "Resources",
    "after_readout",
    "amplitude_state",
    "angle_shapes",
    "apply",
    "bloch_vectors",
    "circuit_parameters",
    "classifier_circuit",
    "classifier_expectations",
    "draw",
    "expectation_z",
    "feature_circuit",
    "feature_state",
    "fidelity",
    "fidelity_matrix",
    "init_angles",
    "init_theta",
    "noisy_expectations",
    "parameter_shift",
    "projected_kernel",
    "resources",
    "sample",
    "sample_expectation_z",
    "sample_fidelity",
    "separate_parameters",
    "to_openqasm",
    "to_pennylane",
    "zero_state",
]
