"""The experiment files give the settings that the runs in results/ were recorded with.

A rate that is changed in an experiment, in `published.py` or as a default fails here, so that what
`make run` does stays what the tables report.
"""

import json
from pathlib import Path

import pytest

from qkd_jax.settings.config import changeable_settings, difference, from_dict, override
from qkd_jax.settings.experiments import load_experiment

ROOT = Path(__file__).parents[2] / "results"
RUNS = sorted({path.parents[1] for path in ROOT.glob("*/*/seed*/config.json")})
# What the command of docs/results.md sets for every run of an experiment.
EVERYWHERE = {"folder": "data.num_classes=50 train.epochs=1 train.batch_size=8"}
FLOW = "alignment.generator=gradient_flow drift.divergence"
INCREMENTAL = "protocol.kind=incremental train.learning_rate=0.01"
FOUR = "data.num_classes=4"
# Of QKD with other defaults than today's: of its metrics and its answer, and of its adapters too.
BEFORE = "gate.shrinkage=0.6 head.covariance=seen fusion.frozen_weight=0"
LATE = f"adapter.first_block=6 adapter.start=random gate.temperature=0.3 {BEFORE}"
# Of the students of `cdl`: the rates of a host's teacher, and of its forms.
CDL_RATES = {
    "coda_prompt": (0.004, {"none": 0.004, "kd": 0.004, "kd_token": 0.004, "kdp": 0.016}),
    "dualprompt": (0.004, {"none": 0.004, "kd": 0.004, "kd_token": 0.004, "kdp": 0.004}),
    "apt": (0.012, {"none": 0.016, "kd": 0.016, "kd_token": 0.016, "kdp": 0.016}),
    "l2p": (0.0075, {"none": 0.004, "kd": 0.016, "kd_token": 0.016, "kdp": 0.016}),
}
# What sets a variant apart, by the name of its folder.
VARIANTS = {
    "qkd-bfloat16": f"backbone.compute_dtype=bfloat16 {LATE}",
    "qkd-late": LATE,
    "qkd-uniform": "gate.kind=uniform",
    "qkd-before-uniform": f"gate.kind=uniform {BEFORE}",
    "qkd-before": BEFORE,
    "simplecil-whitened": "classifier.kind=whitened",
    "simplecil-whitened-fixed": "classifier.kind=whitened classifier.shrinkage=0.6",
    "replay-class-means": "alignment.statistics=mean",
    "replay-covariance": "",
    "replay-shared": "alignment.statistics=shared",
    # Without epochs its rate plays no part.
    "replay-nearest-mean": "alignment.epochs=0 alignment.learning_rate=0.005",
    "replay-none": "replay.old=none alignment.learning_rate=0.05",
    "replay-drifting": "alignment.generator=drifting",
    **{f"replay-{f}": f"{FLOW}={f}" for f in ("kl_pq", "kl_qp", "chi2_qp", "mixed", "mmd")},
    **{
        f"cdl-{host}-{form}": f"cdl.host={host} cdl.form={form} train.learning_rate={rate}"
        + f" cdl.teacher_rate={teacher}" * (form != "none")
        for host, (teacher, rates) in CDL_RATES.items()
        for form, rate in rates.items()
    },
    "q_tuning-fifo": "q_tuning.eviction=fifo",
    "q_tuning-random": "q_tuning.eviction=random",
    "q_tuning-final": "q_tuning.evaluation=final",
    "q_tuning-no-prefix": "q_tuning.prefix_length=0 q_tuning.retention_weight=0",
    "q_tuning-no-retention": "q_tuning.retention_weight=0",
    "q_tuning-no-reweighting": "q_tuning.reweight=none",
    "q_tuning-queue5": "q_tuning.queue_size=5",
    "qd_llm-cos": "qd_llm.student=cos",
    "qd_llm-tanh": "qd_llm.student=tanh train.learning_rate=0.003",
    "qd_llm-four": FOUR,
    "qd_llm-four-cos": f"{FOUR} qd_llm.student=cos train.learning_rate=0.3",
    "qd_llm-four-tanh": f"{FOUR} qd_llm.student=tanh train.learning_rate=0.1",
    "qd_llm-incremental": f"{INCREMENTAL} qd_llm.teacher_rate=0.01",
    "qd_llm-incremental-cos": f"{INCREMENTAL} qd_llm.teacher_rate=0.01 qd_llm.student=cos",
    "qd_llm-incremental-tanh": f"{INCREMENTAL} qd_llm.teacher_rate=0.01 qd_llm.student=tanh",
}


def assignments(experiment, name):
    """What the recorded command set, as `--set` takes it; an "-alone" student has no teacher."""
    variant = name.removesuffix("-alone")
    texts = EVERYWHERE.get(experiment, ""), VARIANTS[variant] if "-" in variant else ""
    given = " ".join(texts).split()
    if variant == name:
        return given
    return [text for text in given if "teacher" not in text] + ["qd_llm.teacher=none"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}-{run.name}")
def test_the_experiment_is_as_recorded(run):
    experiment = run.parent.name
    for path in run.glob("seed*/config.json"):
        recorded = from_dict(json.loads(path.read_text()))
        assert path.parent.name == f"seed{recorded.seed}"
        config = load_experiment(experiment).get_config(recorded.method)
        config = override(config, *assignments(experiment, run.name), f"seed={recorded.seed}")
        unequal = [line.split(":")[0] for line in difference(recorded, config)]
        free = changeable_settings() | {"experiment"}
        assert not [key for key in unequal if key not in free and not key.startswith("shapes.")]


def test_no_variant_is_stale():
    names = {run.name.removesuffix("-alone") for run in RUNS}
    assert set(VARIANTS) <= names
