"""A small run, and what `export` makes of it, for the commands that use what was learned."""

import pytest

from qkd_jax import cli


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
    """The folder of a finished run of QKD, with all logs: two tasks of two classes each."""
    out = tmp_path_factory.mktemp("learned")
    settings = ["train.devices=1", "train.epochs=1", "data.num_classes=4"]
    settings += ["log.tensorboard=true", "log.wandb=true"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    arguments = ["run", "smoke", *chosen, "--no-report", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)  # nothing is sent anywhere
        assert cli.main(arguments) == 0
    return out / "smoke/qkd/seed1993"


@pytest.fixture(scope="session")
def exported(learned, tmp_path_factory):
    """What `export` wrote of that run."""
    target = tmp_path_factory.mktemp("exported") / "mine"
    assert cli.main(["export", str(learned), str(target), "--licence", "apache-2.0"]) == 0
    return target


@pytest.fixture(scope="session")
def learned_texts(tmp_path_factory):
    """The folder of a run on texts that trains nothing: two tasks of two classes each."""
    out = tmp_path_factory.mktemp("texts")
    settings = ["train.devices=1", "data.num_classes=4", "data.source=glosses"]
    settings += ["backbone.name=tiny_random_text", "train.eval_batch_size=100"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    arguments = ["run", "smoke", "--method", "simplecil", *chosen, "--no-report"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    return out / "smoke/simplecil/seed1993"
