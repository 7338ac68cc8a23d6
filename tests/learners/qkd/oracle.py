"""QKD written a second time: NumPy in float64, dense, and nothing of the package.

Written from docs/gate.md, docs/methods.md and the paper (arXiv 2604.11112, whose equations are
numbered), to be read beside the package as a second description of the method. Where the package
keeps sums, this keeps every image and computes means, covariances and rows from all of them anew.
Random numbers (initial adapters and head rows, dropout, pseudo-features) are given to it.

Symbols: B images, D width, L blocks, R bottleneck, T tasks, C classes. h is the feature of an image
under the first adapter, f_i that under adapter i, z^(i) its logits, W the rows that a task trains,
s their scale, F_i the factor of the covariance in slot i, c_i its centre, alpha the relevance.

Gradients are complex steps, Im g(p + i eps) / eps, exact to rounding, since nothing here but the
ReLU has a corner. What no gradient reaches stands in `Held`, apart from the parameters.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

# The default of every setting that is read here.
DEFAULTS = {
    "adapter.scale": 0.1,
    "adapter.start": "previous",
    "head.scale": 20.0,
    "head.prototypes": "drift",
    "head.whiten": True,
    "head.covariance": "all",
    "gate.kind": "quantum",
    "gate.copies": 3,
    "gate.ridge": 1e-3,
    "gate.encoding": "amplitude",
    "gate.angle_range": 3.141592653589793,
    "gate.states": "class",
    "gate.stack": "weights",
    "gate.rank": 12,
    "gate.score": "log_fidelity",
    "gate.temperature": 1.0,
    "gate.whiten": True,
    "gate.shrinkage": 0.0,
    "gate.prior": 0.5,
    "gate.freeze_after": -1,
    "gate.calibration_rate": 0.01,
    "gate.calibration_noise": 2.0,
    "distillation.weight": 1.0,
    "distillation.top_k": 0,
    "distillation.columns": "seen",
    "distillation.temperature": 1.0,
    "distillation.target": "logits",
    "fusion.frozen_weight": 0.25,
    "sparsity.kind": "entropy",
    "sparsity.weight": 0.05,
    "train.learning_rate": 0.05,
    "train.momentum": 0.9,
    "train.weight_decay": 0.0005,
}


# 1. The frozen transformer: CLIP's form, as the default backbone has it.


class Transformer(NamedTuple):
    """Weights (a nested dict) and constants of a pre-norm transformer with QuickGELU."""

    weights: dict
    heads: int
    patch: int
    eps: float
    mean: Any  # of the three channels
    deviation: Any

    @property
    def width(self):
        return len(self.weights["class_token"])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def layer_norm(layer, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * layer["scale"] + layer["bias"]


def attention(block, x, heads):
    """Every token attends to every token; each head has its own D / heads columns."""
    size = x.shape[-1] // heads
    mixed = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        q, k, v = (dense(block[name], x)[..., columns] for name in ("query", "key", "value"))
        weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(size))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    return dense(block["out"], np.concatenate(mixed, axis=-1))


def encode(vit, images, adapter, scale, kept=None):
    """Features [B, D] of the class token: x <- x + MLP(LN2(x)) + scale up(relu(down(x))).

    adapter: {"down.kernel": [L, D, R], "down.bias": [L, R], "up.kernel": [L, R, D], "up.bias"}.
      None = the frozen model.
    kept: dropout's factors [B, L, N, R] on the hidden units; None = no dropout.
    """
    w, pixels, side = vit.weights, (images - vit.mean) / vit.deviation, vit.patch
    corners = range(0, images.shape[1], side)
    patches = [pixels[:, r : r + side, c : c + side] for r in corners for c in corners]
    patches = np.stack([patch.reshape(len(images), -1) for patch in patches], axis=1)
    first = np.tile(w["class_token"], (len(images), 1, 1))
    x = np.concatenate([first, dense(w["patch"], patches)], axis=1)
    x = layer_norm(w["pre_norm"], x + w["position"], vit.eps)
    for index, block in enumerate(w["blocks"]):
        x = x + attention(block, layer_norm(block["norm1"], x, vit.eps), vit.heads)
        wide = dense(block["fc1"], layer_norm(block["norm2"], x, vit.eps))
        x_in, x = x, x + dense(block["fc2"], wide * sigmoid(1.702 * wide))
        if adapter is None:
            continue
        one = {name: array[index] for name, array in adapter.items()}
        hidden = x_in @ one["down.kernel"] + one["down.bias"]
        hidden = np.where(hidden.real > 0, hidden, 0) * (1 if kept is None else kept[:, index])
        x = x + scale * (hidden @ one["up.kernel"] + one["up.bias"])
    return layer_norm(w["norm"], x[:, 0], vit.eps)


# 2. Small parts.


def unit(x):
    """x [..., D] at length 1; the zero vector stays zero."""
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / np.where(length == 0, 1, length)


def log_softmax(x):
    x = x - x.real.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(teacher, student):
    """KL(softmax(teacher) || softmax(student)) over the last axis."""
    p, q = log_softmax(teacher), log_softmax(student)
    return (np.exp(p) * (p - q)).sum(-1)


def gradient(function, params, names):
    """d function / d params[name], for each of `names`."""
    slopes = {}
    for name in names:
        slopes[name] = np.zeros(np.shape(params[name]))
        for place in np.ndindex(slopes[name].shape):
            moved = np.array(params[name], complex)
            moved[place] += 1e-30j
            slopes[name][place] = function({**params, name: moved}).imag / 1e-30
    return slopes


# 3. The gate.


def rotation(angle):
    """RY(angle)."""
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    return np.array([[c, -s], [s, c]])


def on_qubits(matrix, first, num_qubits):
    """`matrix` on the qubits from `first` on, the identity on all others, as one dense matrix."""
    after = 2 ** (num_qubits - first) // len(matrix)
    return np.kron(np.kron(np.eye(2**first), matrix), np.eye(after))


CNOT = np.eye(4)[[0, 1, 3, 2]]


def circuit_state(angles, theta):
    """Eq. 6-9: |psi> [2^Q] of angles [Q] under theta [layers, Q], qubit 0 the most significant."""
    num_qubits = len(angles)
    psi = np.eye(2**num_qubits)[0]
    for row in theta:
        for j in range(num_qubits):
            psi = on_qubits(rotation(row[j]) @ rotation(angles[j]), j, num_qubits) @ psi
        for j in range(num_qubits - 1):
            psi = on_qubits(CNOT, j, num_qubits) @ psi
    return psi


def quantum_states(vectors, params, s):
    """The states [A, 2^Q] of vectors [A, D]: their own entries, or Eq. 5 and the circuit."""
    if s["gate.encoding"] == "amplitude":
        return unit(vectors)
    scaled = np.sqrt(vectors.shape[1]) * unit(vectors)
    angles = s["gate.angle_range"] * np.tanh(scaled @ params["gate.map"])
    return np.stack([circuit_state(a, params["gate.theta"]) for a in angles])


def pretty_good_measurement(s, query, anchors):
    """p [B, A] = <psi|phi>^k (G + ridge)^(-1/2), squared, with G the <phi|phi>^k of the anchors."""
    overlap = (unit(anchors) @ unit(anchors).T) ** s["gate.copies"]
    values, vectors = np.linalg.eigh(overlap + s["gate.ridge"] * np.eye(len(anchors)))
    root = (vectors / np.sqrt(values)) @ vectors.T
    return ((unit(query) @ unit(anchors).T) ** s["gate.copies"] @ root) ** 2


def relevance(params, s, query, anchors, owner, num_tasks):
    """(alpha [B, num_tasks], p [B, num_tasks]): Eq. 10 and 12.

    p of an anchor is |<psi(query)|phi(anchor)>|^2. The evidence of a task adds up over its anchors,
    sum_a exp(e_a / tau) with e = p or log(p + 1e-6); its own p is their mean. In a pretty good
    measurement both come from the sum over the task's classes.
    """
    if s["gate.kind"] == "measurement":
        mine = np.array(owner)[:, None] == np.arange(num_tasks)
        p = pretty_good_measurement(s, query, anchors) @ mine
        return (p + 1e-6) / (p + 1e-6).sum(1, keepdims=True), p
    fidelity = (quantum_states(query, params, s) @ quantum_states(anchors, params, s).T) ** 2
    evidence = np.log(fidelity + 1e-6) if s["gate.score"] == "log_fidelity" else fidelity
    mine = [np.array(owner) == task for task in range(num_tasks)]
    strength = np.exp(evidence / s["gate.temperature"])
    total = np.stack([strength[:, m].sum(1) for m in mine], axis=1)
    scores = np.stack([fidelity[:, m].mean(1) for m in mine], axis=1)
    return total / total.sum(1, keepdims=True), scores


def task_embedding(adapter, start, s):
    """Eq. 3-4: s = S^(r) 1 / |S^(r) 1|, S^(r) the best approximation of rank r of the stack S."""
    down, up = adapter["down.kernel"], adapter["up.kernel"]
    if s["gate.stack"] == "delta":
        down, up = down - start["down.kernel"], up - start["up.kernel"]
    if s["gate.stack"] == "product":
        parts = [u.T @ d.T for d, u in zip(down, up, strict=True)]
    else:
        parts = [*down, *(u.T for u in up)]
    u, sizes, v = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
    r = s["gate.rank"]
    return unit((u[:, :r] * sizes[:r]) @ v[:r].sum(1))


# 4. The learner.


class Task(NamedTuple):
    """A finished task: its data, the adapter at its start and end, and its trained head rows."""

    classes: tuple
    images: np.ndarray
    labels: np.ndarray
    start: dict
    adapter: dict
    W: np.ndarray


class Held(NamedTuple):
    """What the loss of a step reads and no gradient reaches.

    params: as the step finds them. teachers: f_i [B, D] of every old adapter. rows: [C, D] for each
    of these, and last for the student. relevance: params -> (alpha, p) of the old tasks.
    """

    params: dict
    teachers: list
    rows: list
    relevance: Any


class Learner:
    """QKD from the first task on. `s` are the settings, `params` what the current task trains."""

    def __init__(self, vit, changes, gate, num_classes):
        self.vit, self.s, self.num_classes = vit, DEFAULTS | changes, num_classes
        self.tasks, self.params, self.classes = [], dict(gate), ()

    # What finished tasks leave.

    def feature(self, images, slot):
        """f_slot of images, from the adapter of that slot."""
        return encode(self.vit, images, self.tasks[slot].adapter, self.s["adapter.scale"])

    def features_by_class(self, slot):
        """{class: features [n, D] in a slot} of all images of the tasks from `slot` on."""
        found = {}
        for task in self.tasks[slot:]:
            f = self.feature(task.images, slot)
            found |= {c: f[task.labels == c] for c in task.classes}
        return found

    def owner(self):
        """{class: its task}."""
        return {c: i for i, task in enumerate(self.tasks) for c in task.classes}

    def metric(self, slot):
        """(c_slot, F_slot): the mean of the class means, and F F^T = (1 - a) Sigma + a tr(Sigma)/D
        I with the covariance Sigma within the classes that the slot has seen, and with "all" within
        the older ones in their own slots. If the slot has seen one class, the centre is the mean of
        the rows of all classes in that slot. Without a fixed share, a = b D / (b D + n) after n
        images.
        """
        groups = self.features_by_class(slot)
        spreads = [f - f.mean(0) for f in groups.values()]
        if self.s["head.covariance"] == "all":
            for i, task in enumerate(self.tasks[:slot]):
                f = self.feature(task.images, i)
                own = [f[task.labels == c] for c in task.classes]
                spreads += [f - f.mean(0) for f in own]
        means = [f.mean(0) for f in groups.values()]
        if len(means) == 1:
            means = self.rows(slot)[sorted(self.owner())]
        return np.mean(means, axis=0), self.factor(spreads)

    def factor(self, spreads):
        """F of the features' offsets from their class means, [n, D] for each class."""
        spread, a = np.concatenate(spreads), self.s["gate.shrinkage"]
        sigma = spread.T @ spread / len(spread)
        if a == 0:
            images = self.s["gate.prior"] * len(sigma)
            a = images / (images + len(spread))
        return np.linalg.cholesky(
            (1 - a) * sigma + a * np.trace(sigma) / len(sigma) * np.eye(len(sigma))
        )

    def white(self, slot, vectors):
        """F^-1 (v - c) of vectors [..., D]."""
        centre, factor = self.metric(slot)
        return (vectors - centre) @ np.linalg.inv(factor).T

    def rows(self, slot):
        """[C, D]: the row of every class for features of a slot, zero for classes not seen."""
        kind, rows = self.s["head.prototypes"], np.zeros((self.num_classes, self.vit.width))
        means = [self.means(i) for i in range(len(self.tasks))]
        for c, i in self.owner().items():
            task = self.tasks[i]
            if kind == "none":
                rows[c] = task.W[task.classes.index(c)]
            elif kind == "own" or slot > i:
                rows[c] = means[i][c]
            else:
                rows[c] = means[slot][c]
            if kind == "drift" and i < slot < len(self.tasks):
                # The slot never saw the class: it moved as the classes that both slots saw did.
                later = list(means[slot])
                near = np.array([unit(means[i][c]) @ unit(means[i][k]) for k in later])
                moved = np.stack([means[slot][k] - means[i][k] for k in later])
                rows[c] += np.exp(log_softmax(20.0 * near)) @ moved
        return rows

    def means(self, slot):
        """{class: mean feature in a slot} of the classes that it has seen."""
        return {c: f.mean(0) for c, f in self.features_by_class(slot).items()}

    def anchors(self):
        """(vectors [A, D], the task of each): task embeddings, or class means as the gate reads
        them.
        """
        if self.s["gate.states"] == "weights":
            embeddings = [task_embedding(t.adapter, t.start, self.s) for t in self.tasks]
            return np.stack(embeddings), list(range(len(self.tasks)))
        return self.read(np.stack(list(self.means(0).values()))), list(self.owner().values())

    def read(self, vectors):
        """Features of slot 0 as the gate reads them."""
        return self.white(0, vectors) if self.s["gate.whiten"] else vectors

    # The three verbs.

    def begin(self, classes, adapter, W):
        """Opens a task with a new adapter and new rows; scale and gate are trained on."""
        if self.s["adapter.start"] == "previous" and self.tasks:
            adapter = self.tasks[-1].adapter
        self.classes, self.start = classes, {n: np.array(a) for n, a in adapter.items()}
        scale = self.params["head.scale"] if self.tasks else self.s["head.scale"]
        gate = {n: a for n, a in self.params.items() if n.startswith("gate.")}
        self.params = {f"adapter.{n}": a for n, a in self.start.items()} | gate
        self.params |= {"head.rows": np.array(W), "head.scale": np.float64(scale)}
        self.velocity = {n: np.zeros(np.shape(a)) for n, a in self.params.items()}

    def adapter(self, params):
        return {
            n.removeprefix("adapter."): a for n, a in params.items() if n.startswith("adapter.")
        }

    def hold(self, images):
        """What the loss on these images holds fixed."""
        t = len(self.tasks)
        teachers = [self.feature(images, i) for i in range(t)]
        rows = [self.rows(slot) for slot in range(t + 1)]
        if t == 0:
            nothing = np.zeros((len(images), 0))
            return Held(dict(self.params), teachers, rows, lambda params: (nothing, nothing))
        query, (anchors, owner) = self.read(teachers[0]), self.anchors()
        alpha = partial(relevance, s=self.s, query=query, anchors=anchors, owner=owner, num_tasks=t)
        return Held(dict(self.params), teachers, rows, alpha)

    def distillation(self, params, held, f, alpha):
        """Eq. 13: sum_i alpha_i KL(softmax z^(i) || softmax z^(t)), [B], on the chosen columns.

        `distillation.top_k`: the teachers of largest alpha of each image, alpha scaled to sum 1.
        """
        if held.teachers and 0 < self.s["distillation.top_k"] < len(held.teachers):
            order = np.argsort(-alpha.real, axis=1)
            chosen = np.argsort(order, axis=1) < self.s["distillation.top_k"]
            alpha = np.where(chosen, alpha, 0)
            alpha = alpha / alpha.sum(1, keepdims=True)
        total, owner, tau = 0.0, self.owner(), self.s["distillation.temperature"]
        s, frozen, columns = held.params["head.scale"], held.params["head.rows"], sorted(owner)
        size, kind = len(self.classes), self.s["distillation.columns"]
        for i, teacher in enumerate(held.teachers):
            if self.s["distillation.target"] == "features":
                gap = unit(teacher) - unit(f)
                total = total + alpha[:, i] * (gap * gap).sum(1)
                continue
            if kind == "own":
                columns = [c for c in owner if owner[c] == i]
            z_teacher = s * unit(teacher) @ unit(held.rows[i][columns]).T
            z_student = s * unit(f) @ unit(held.rows[-1][columns]).T
            if kind == "all":  # and the current classes, on the rows that are being trained
                now, fixed = (unit(rows[:size]) for rows in (params["head.rows"], frozen))
                z_teacher = np.concatenate([z_teacher, s * unit(teacher) @ fixed.T], axis=1)
                z_student = np.concatenate([z_student, s * unit(f) @ now.T], axis=1)
            total = total + alpha[:, i] * tau**2 * kl(z_teacher / tau, z_student / tau)
        return total

    def terms(self, params, held, images, labels, kept):
        """Eq. 15 and its parts, each the mean over the batch."""
        f = encode(self.vit, images, self.adapter(params), self.s["adapter.scale"], kept)
        W, places = params["head.rows"][: len(self.classes)], np.arange(len(labels))
        z = params["head.scale"] * unit(f) @ unit(W).T
        own = [self.classes.index(label) for label in labels]
        ce = -log_softmax(z)[places, own].mean()
        alpha, p = held.relevance(params)
        kd = np.mean(self.distillation(params, held, f, alpha))
        entropy = -(alpha * np.log(alpha)).sum(1).mean()
        kinds = {"l1_softmax": alpha.sum(1).mean(), "l1_scores": p.sum(1).mean()}
        sparse = (kinds | {"entropy": entropy})[self.s["sparsity.kind"]]
        loss = ce + self.s["distillation.weight"] * kd + self.s["sparsity.weight"] * sparse
        return {
            "loss": loss,
            "loss_ce": ce,
            "loss_kd": kd,
            "loss_sparsity": sparse,
            "gate_entropy": entropy,
            "train_accuracy": 100.0 * np.mean(z.real.argmax(1) == own),
        }

    def slopes(self, images, labels, kept, term="loss"):
        """The gradient of one of `terms`; zero for a gate that is frozen."""
        held = self.hold(images)
        last, names = self.s["gate.freeze_after"], list(self.params)
        if 0 <= last < len(self.tasks):
            names = [n for n in names if not n.startswith("gate.")]
        g = {n: np.zeros(np.shape(a)) for n, a in self.params.items()}
        one = lambda params: self.terms(params, held, images, labels, kept)[term]  # noqa: E731
        return g | gradient(one, self.params, names)

    def step(self, images, labels, kept, share):
        """One step of SGD with momentum, `share` of the task's steps being done; returns the terms.
        Kernels and rows decay, the gate never does.
        """
        terms = self.terms(self.params, self.hold(images), images, labels, kept)
        g = self.slopes(images, labels, kept)
        rate = self.s["train.learning_rate"] * (1 + np.cos(np.pi * share)) / 2
        for n, slope in g.items():
            decays = not n.startswith("gate.") and n.endswith(("kernel", "rows"))
            decay = self.s["train.weight_decay"] * self.params[n] if decays else 0.0
            self.velocity[n] = self.s["train.momentum"] * self.velocity[n] + slope + decay
            self.params[n] = self.params[n] - rate * self.velocity[n]
        return terms | {"learning_rate": rate}

    def end(self, images, labels, pseudo=()):
        """Freezes the task; the gate learns to route on `pseudo`, (classes [n], noise [n, D]) for
        each of its steps.
        """
        adapter = self.adapter(self.params)
        W = self.params["head.rows"]
        self.tasks.append(Task(self.classes, images, labels, self.start, adapter, W))
        last = self.s["gate.freeze_after"]
        if last < 0 or len(self.tasks) - 1 <= last:
            self.calibrate(pseudo)

    def calibrate(self, pseudo):
        """Adam on the cross-entropy of the true task, given a class mean plus noise with the
        covariance of h in the metric that the gate reads.
        """
        names = [n for n in self.params if n.startswith("gate.")]
        if not names or not pseudo:
            return
        owner, (anchors, of_anchor) = self.owner(), self.anchors()
        means = {c: self.read(m) for c, m in self.means(0).items()}
        factor = np.eye(self.vit.width) if self.s["gate.whiten"] else self.metric(0)[1]
        first, second = ({n: np.zeros(np.shape(self.params[n])) for n in names} for _ in range(2))
        for step, (classes, noise) in enumerate(pseudo, start=1):
            shift = np.stack([factor @ n for n in noise])
            query = np.stack([means[c] for c in classes]) + self.s["gate.calibration_noise"] * shift
            truth = [owner[c] for c in classes]

            def loss(params, query=query, truth=truth):
                alpha, _ = relevance(params, self.s, query, anchors, of_anchor, len(self.tasks))
                return -np.log(alpha[np.arange(len(truth)), truth]).mean()

            g = gradient(loss, self.params, names)
            for n in names:
                first[n] = 0.9 * first[n] + 0.1 * g[n]
                second[n] = 0.999 * second[n] + 0.001 * g[n] ** 2
                mean, size = first[n] / (1 - 0.9**step), second[n] / (1 - 0.999**step)
                move = self.s["gate.calibration_rate"] * mean / (np.sqrt(size) + 1e-8)
                self.params[n] = self.params[n] - move

    def score(self, images):
        """(z [B, C], alpha [B, T]): z = (1 - w) sum_i alpha_i z^(i) + w z^(frozen), -inf for
        classes not seen.
        """
        t, owner = len(self.tasks), self.owner()
        query, (anchors, of_anchor) = self.read(self.feature(images, 0)), self.anchors()
        alpha, _ = relevance(self.params, self.s, query, anchors, of_anchor, t)
        z, columns = np.full((len(images), self.num_classes), -np.inf), sorted(owner)
        shared = self.s["head.prototypes"] in ("none", "own")  # one set of rows, and one metric
        z[:, columns] = 0.0
        for i in range(t):
            f, rows = self.feature(images, i), self.rows(i)[columns]
            if self.s["head.whiten"]:
                slot = 0 if shared else i
                f, rows = self.white(slot, f), self.white(slot, rows)
            z[:, columns] += alpha[:, [i]] * self.params["head.scale"] * (unit(f) @ unit(rows).T)
        if w := self.s["fusion.frozen_weight"]:
            frozen = self.params["head.scale"] * self.frozen_cosines(images)
            z[:, columns] = (1 - w) * z[:, columns] + w * frozen
        return z, alpha

    def frozen_cosines(self, images):
        """[B, seen classes]: to the class means of all images, without an adapter."""
        groups = {}
        for task in self.tasks:
            f = encode(self.vit, task.images, None, None)
            groups |= {c: f[task.labels == c] for c in task.classes}
        means = np.stack([groups[c].mean(0) for c in sorted(groups)])
        feature = encode(self.vit, images, None, None)
        if self.s["head.whiten"]:
            inverse = np.linalg.inv(self.factor([f - f.mean(0) for f in groups.values()]))
            feature, means = ((v - means.mean(0)) @ inverse.T for v in (feature, means))
        return unit(feature) @ unit(means).T
