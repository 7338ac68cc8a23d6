# %% [markdown]
# # Anatomy of the gate
#
# QKD asks, for every image and every task learned so far, how much that task matters to the image. The answer is the
# fidelity of two quantum states. This notebook takes the gate apart: its circuit, what a fidelity looks like, why one
# layer does nothing, what shots do to it, and what is left of it beside a classical gate with as many parameters.

# %% [markdown]
# ## The circuit
#
# Every layer encodes the data once more (RY by the image's angles), rotates by trained angles theta, and entangles
# neighbours. `docs/quantum.md` and `docs/gate.md` have the conventions.

# %%
import jax.numpy as jnp
import numpy as np

from qkd_jax import quantum

feature_map = quantum.FeatureMap(num_qubits=4, num_layers=2)
circuit = quantum.feature_circuit(feature_map)
print(quantum.draw(circuit))
print(quantum.resources(circuit))

# %% [markdown]
# ## What a fidelity looks like
#
# p = |<psi(a)|phi(b)>|² of one image's angles a against those of an anchor b. Two of the angles move, the others are
# equal. With one layer it is a product of cosines, one for each qubit, whatever theta is; with two layers theta bends it.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

grid = np.linspace(-np.pi, np.pi, 61, dtype=np.float32)
moved = np.zeros((61, 61, 4), np.float32)
moved[..., 0], moved[..., 1] = np.meshgrid(grid, grid, indexing="ij")
anchor = jnp.zeros((1, 4))
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for axis, (layers, scale) in zip(axes, ((1, 1.0), (2, 0.1), (2, 6.28))):
    shape = quantum.FeatureMap(num_qubits=4, num_layers=layers)
    theta = quantum.init_theta(jax.random.key(1), shape, scale)
    p = quantum.fidelity_matrix(shape, jnp.asarray(moved.reshape(-1, 4)), anchor, theta).reshape(61, 61)
    drawn = axis.imshow(p, extent=(-np.pi, np.pi) * 2, origin="lower", vmin=0, vmax=1)
    axis.set(title=f"{layers} layer(s), theta in [0, {scale}]", xlabel="angle 2", ylabel="angle 1")
figure.colorbar(drawn, ax=axes, label="fidelity")
plt.show()

# %% [markdown]
# ## Why one layer is inert
#
# Both states pass through the same theta and the same entangling gates. A fidelity does not change when both states are
# rotated alike, so with one layer theta cancels: the gradient is exactly zero, and training cannot move the gate.

# %%
rng = np.random.default_rng(0)
images, anchors = (jnp.asarray(rng.uniform(-2, 2, (5, 4)), jnp.float32) for _ in range(2))
for layers in (1, 2, 3):
    shape = quantum.FeatureMap(num_qubits=4, num_layers=layers)
    theta = quantum.init_theta(jax.random.key(0), shape, 1.0)
    slope = jax.grad(lambda theta: quantum.fidelity_matrix(shape, images, anchors, theta).sum())(theta)
    sizes = [f"{float(jnp.abs(row).max()):.3f}" for row in slope]
    print(f"{layers} layer(s): largest gradient of theta in each layer: {', '.join(sizes)}")
closed = jnp.prod(jnp.cos((images[:, None] - anchors[None]) / 2) ** 2, axis=-1)
one = quantum.fidelity_matrix(quantum.FeatureMap(num_qubits=4, num_layers=1), images, anchors, jnp.ones((1, 4)))
print(f"one layer is prod cos²((a - b) / 2): off by at most {float(jnp.abs(one - closed).max()):.1e}")

# %% [markdown]
# The last layer is dead for the same reason, unless `gate.theta_side` or `gate.last_axis` tell the two states apart.
# QKD's default therefore does not train a circuit at all: the feature itself, whitened, is the state (*amplitude
# states*), and the fidelity is the squared cosine.

# %% [markdown]
# ## Shots
#
# A quantum computer does not give p; it gives how often all qubits were found in zero. The error falls with the root of
# the number of shots.

# %%
psi, phi = (quantum.amplitude_state(jnp.asarray(rng.normal(size=16), jnp.float32), 4) for _ in range(2))
exact = quantum.fidelity(psi, phi)
for shots in (10, 100, 1_000, 10_000):
    keys = jax.random.split(jax.random.key(shots), 200)
    found = np.asarray(jax.vmap(lambda key: quantum.sample_fidelity(key, exact, shots))(keys))
    expected = float(jnp.sqrt(exact * (1 - exact) / shots))
    print(f"{shots:6} shots: {found.mean():.4f} ± {found.std():.4f} (exact {exact:.4f}, binomial ± {expected:.4f})")

# %% [markdown]
# ## Relevance, image by image
#
# A run of QKD; then, for images of the test set, how much each task's adapter has to say.

# %%
from qkd_jax.cli import main
from qkd_jax.runs.plan import plan

EXPERIMENT = "smoke" if SMOKE else "renditions"
if main(["run", EXPERIMENT, "--out", RUNS, "--no-report"]):
    raise RuntimeError("Stopped; the reason stands above. Running this cell again continues the run.")
state, class_names, config = qkd_jax.load_run(Path(RUNS) / EXPERIMENT / "qkd" / "seed1993")
test = plan(config).data.test
task_of = np.asarray(state.task_of_class)

relevance = []
for start in range(0, len(test), 50):
    fields = test.load(range(start, min(start + 50, len(test))), state.backbone)
    relevance.append(np.asarray(qkd_jax.predict_with_relevance(state, fields["image"])[1]))
relevance = np.concatenate(relevance)
tasks = task_of[test.labels]
mean = np.stack([relevance[tasks == task].mean(axis=0) for task in range(relevance.shape[1])])
figure, axis = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
figure.colorbar(axis.imshow(mean, vmin=0, cmap="Blues"), label="mean relevance")
axis.set(xlabel="relevance given to task", ylabel="true task", title="Do images find their task?")
plt.show()
print(f"most relevant task is the true one: {100 * np.mean(relevance.argmax(axis=1) == tasks):.1f} %")

# %% [markdown]
# ## Quantum against classical, with equal parameters
#
# Each gate gets what the run has stored, class means and covariance, no image; those with parameters learn to route on
# pseudo-features, as a run teaches them when a task ends. A gate of angles has a map from 768 numbers to nine, which
# starts at random, or here also at the nine principal directions of the class means, and then is not taught. All of them
# route the test images. The numbers are of one test set: read differences of two or three points as nothing.

# %%
from qkd_jax.engine.verbs import slot_features
from qkd_jax.learners.qkd import fusion, gate, measurement

query = []
for start in range(0, len(test), 50):
    fields = test.load(range(start, min(start + 50, len(test))), state.backbone)
    query.append(np.asarray(slot_features(state, fields, (0,))[:, 0]))
query = fusion.gate_inputs(state, jnp.asarray(np.concatenate(query)))
vectors, owner = fusion.anchors(state)
width, num_tasks = vectors.shape[1], relevance.shape[1]
every = jnp.ones(num_tasks, bool)
# Vectors are scaled to length sqrt(D) before the map; a tenth of that spreads most angles over (-pi, pi).
principal = 0.1 * jnp.linalg.svd(vectors[owner >= 0])[2][:9].T  # [D, 9]
untaught = {"encoding": "angle", "num_qubits": 9, "calibration_steps": 0}

qubits = config.gate.num_qubits
for name, changes in {
    "quantum, amplitude states": {},
    "cosine of the same vectors": {"kind": "cosine", "temperature": 0.06},
    "pretty good measurement": {"kind": "measurement"},
    "quantum, 9 angles, 1 layer": {"encoding": "angle", "num_qubits": 9, "num_layers": 1},
    "quantum, 9 angles, 2 layers": {"encoding": "angle", "num_qubits": 9, "num_layers": 2},
    "cosine of 9 angles": {"kind": "cosine", "encoding": "angle", "num_qubits": 9, "temperature": 0.1},
    "1 layer, principal angles": {"num_layers": 1} | untaught,
    "2 layers, principal angles": {"num_layers": 2} | untaught,
    "cosine of principal angles": {"kind": "cosine", "temperature": 0.1} | untaught,
    "MLP, 9 units": {"kind": "mlp", "num_qubits": 9, "temperature": 1.0},
    "attention, 2 x 4 columns": {"kind": "attention", "num_qubits": 9, "temperature": 1.0},
}.items():
    settings = gate.GateSettings(**{"num_qubits": qubits} | changes)
    params = gate.init_gate(jax.random.key(0), settings, width, num_tasks)
    if "principal" in name:
        params["map"] = principal
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params)) if settings.calibration_steps else 0
    if settings.kind == "measurement":
        root = measurement.root(vectors, owner >= 0, settings.copies, settings.ridge)
        found = measurement.relevance(root, settings, query, vectors, owner, every)
    else:
        taught = gate.calibrate(
            jax.random.key(1), params, settings, vectors, owner, jnp.eye(width), vectors, owner, num_tasks
        )
        found = gate.relevance(taught, settings, query, vectors, owner, every)
    right = 100 * np.mean(np.asarray(found.weights).argmax(axis=1) == tasks)
    print(f"{name:28} {numbers:6,} trained numbers   routes {right:5.1f} % to their task (chance {100 / num_tasks:.0f} %)")

# %% [markdown]
# **What to take along.** Whitened class means carry the routing, by whatever rule they are compared: the amplitude gate,
# the cosine and the measurement rank them alike. Nine angles lose much of the feature. From a random map, the 200 steps of
# calibration that every trained gate had here leave the circuits at chance, where a cosine of the same angles learns. The
# map is what was wrong, not the circuit: at the principal directions one layer routes about as well as the taught cosine,
# and nothing is trained. A better route can only help where the adapters differ; `docs/results.md` measures how much.
