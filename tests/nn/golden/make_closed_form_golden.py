"""Write `closed_form.npz`, the golden arrays of `tests/nn/test_golden_closed_form.py`: what the
authors' code of klda, anacp, lr_rgda and rls (ACIL) computes on small drawn features.

The authors' code is read from folders and none of it is kept here. Run it in an environment of its
own, never in the tests: `pip install torch numpy`, then

    python tests/nn/golden/make_closed_form_golden.py ANACP RGDA ACIL

ANACP is a checkout of SalehMomeni/AnaCP at 7801c59284e2880c0c911bb6e0c7afc0b15f1df7: models/klda.py
`KLDA` and models/anacp.py `AnaCP`. RGDA is one of raoxuan98-hash/lr_rgda_hopdc at
387bf2d2816e9dfac129b13979264fe5df936222: classifier/gaussian_classifier.py `LowRankGaussianDA` on
compensator/gaussian_statistics.py `GaussianStatistics`, with `torch.cov` as its collector does.
ACIL is one of ZHUANGHP/Analytic-continual-learning at 0afd6bf87622e808ce7f730f8556e78229b9e758:
analytic/AnalyticLinear.py `RecursiveLinear`, one `fit` for each task.

Sizes: features of width 8, five classes of 12 images, three test images; M = 24. Two tasks (classes
0, 1 and 2, 3, 4) for klda and rls; one for anacp, whose covariance depends on the tasks' order in
theirs, and for lr_rgda, whose statistics belong to single classes.

What is replaced in the authors' code, and nothing else: torch's default type is float64, and
`torch.tensor(..., dtype=float32)` gives it too; random numbers are rounded to float32; for anacp
the last row of Vh in `torch.linalg.svd` is zero (it belongs to singular value 0, is arbitrary
there, and is left out here), and the noise of its draws is kept as it is drawn: normal numbers
times a Cholesky factor.

The arrays: features [60, 8], labels [60], queries [3, 8]; then under each name its random numbers,
and what it computed, under our names (see the test).
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

WIDTH, SIZE, CLASSES, EACH = 8, 24, 5, 12


def inputs():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(CLASSES, WIDTH))
    labels = np.repeat(np.arange(CLASSES), EACH)
    features = centres[labels] + 0.7 * generator.normal(size=(len(labels), WIDTH))
    queries = centres[:3] + 0.7 * generator.normal(size=(3, WIDTH))
    return np.float32(features), labels, np.float32(queries)


def in_float64():
    torch.set_default_dtype(torch.float64)
    given = torch.tensor

    def tensor(data, *args, **kwargs):
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return given(data, *args, **kwargs)

    torch.tensor = tensor
    for name in ("randn", "rand"):
        draw = getattr(torch, name)
        setattr(torch, name, lambda *a, draw=draw, **k: draw(*a, **k).float().to(torch.float64))


def klda(features, labels, queries):
    from models.klda import KLDA

    model = KLDA(D=SIZE, gamma=0.05, reg=0.01, seed=0, device="cpu")
    for task in (labels < 2, labels >= 2):
        model.update(features[task], labels[task])
    model.predict(queries)
    means = torch.stack([model.class_means[c] for c in range(CLASSES)])
    gap = model._compute_rff(torch.tensor(queries, dtype=torch.float32))[:, None] - means
    distances = torch.einsum("ncd,df,ncf->nc", gap, model.sigma_inv, gap)
    return {"projection": model.W, "phase": model.b, "scores": -0.5 * distances}


def anacp(features, labels, queries):
    from models.anacp import AnaCP

    svd, normal, drawn = torch.linalg.svd, torch.distributions.MultivariateNormal, {}

    def without_the_null_direction(matrix, full_matrices):
        left, values, right = svd(matrix, full_matrices=full_matrices)
        right[-1] = 0.0
        return left, values, right

    class Kept(normal):
        def sample(self, shape):
            noise = torch.randn(*shape, self.loc.shape[0])
            drawn["noise"], drawn["covariance"] = noise, self.covariance_matrix
            return noise @ torch.linalg.cholesky(self.covariance_matrix).T

    torch.linalg.svd, torch.distributions.MultivariateNormal = without_the_null_direction, Kept
    model = AnaCP(
        D=SIZE, reg=0.5, num_heads=3, seed=0, device="cpu", samples_per_class=100, shared_cov=True
    )
    model.update(features, labels)
    torch.linalg.svd, torch.distributions.MultivariateNormal = svd, normal
    means = torch.stack([model.class_means[c] for c in range(CLASSES)])
    torch.linalg.svd = without_the_null_direction
    targets = model._spread_means(means, model.shared_cov)
    torch.linalg.svd = svd
    units = model._normalize(torch.tensor(queries, dtype=torch.float32))
    answers = torch.stack([layer.forward(units) for layer in model.layers]).mean(dim=0)
    hidden = torch.nn.functional.gelu(answers @ model.W.T)
    return {
        "projection": torch.stack([layer.W.T for layer in model.layers]),
        "second": model.W.T,
        "noise": drawn["noise"].reshape(CLASSES, -1, WIDTH),
        "covariance": drawn["covariance"],
        "targets": targets,
        "layers": torch.stack([layer.theta for layer in model.layers]),
        "scores": hidden @ model.theta,
    }


def lr_rgda(features, labels, queries):
    from classifier.gaussian_classifier import LowRankGaussianDA
    from compensator.gaussian_statistics import GaussianStatistics

    features, queries = (torch.tensor(a, dtype=torch.float32) for a in (features, queries))
    statistics = {}
    for c in range(CLASSES):
        own = features[labels == c]
        statistics[c] = GaussianStatistics(own.mean(0), torch.cov(own.T))
    torch.Tensor.float = torch.Tensor.double
    # Of rank 8 nothing is left out, so that the randomised SVD is exact.
    model = LowRankGaussianDA(
        statistics,
        rank=WIDTH,
        qda_reg_alpha1=0.2,
        qda_reg_alpha2=2.0,
        qda_reg_alpha3=0.5,
        device="cpu",
    )
    return {"scores": model(queries)}


def rls(features, labels, queries):
    # By its path: the package around it imports much more.
    path = f"{sys.path[0]}/analytic/AnalyticLinear.py"
    spec = importlib.util.spec_from_file_location("analytic_linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    projection = torch.randn(WIDTH, SIZE)
    model = module.RecursiveLinear(SIZE, gamma=0.1)
    for task, seen in ((labels < 2, 2), (labels >= 2, CLASSES)):
        hidden = torch.relu(torch.tensor(features[task], dtype=torch.float32) @ projection)
        model.fit(hidden, torch.nn.functional.one_hot(torch.tensor(labels[task]), seen))
    hidden = torch.relu(torch.tensor(queries, dtype=torch.float32) @ projection)
    return {"projection": projection, "rows": model.weight.T, "scores": model(hidden)}


def main(anacp_folder, rgda_folder, acil_folder):
    in_float64()
    torch.manual_seed(0)
    features, labels, queries = inputs()
    arrays = {"features": features, "labels": labels, "queries": queries}
    for folder, functions in (
        (anacp_folder, (klda, anacp)),
        (rgda_folder, (lr_rgda,)),
        (acil_folder, (rls,)),
    ):
        sys.path.insert(0, folder)
        for function in functions:
            for name, array in function(features, labels, queries).items():
                stored = np.asarray(array.detach())
                if name in ("projection", "phase", "second", "noise"):
                    stored = np.float32(stored)
                arrays[f"{function.__name__}/{name}"] = stored
        sys.path.remove(folder)
        for module in [m for m in sys.modules if m.split(".")[0] in ("models", "classifier")]:
            del sys.modules[module]
    np.savez_compressed(Path(__file__).parent / "closed_form.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
