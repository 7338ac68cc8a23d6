"""The table of published settings fits the methods and the experiments that there are."""

import pytest

from qkd_jax.learners.shape import learner_names
from qkd_jax.settings.experiments import experiment_names, load_experiment
from qkd_jax.settings.methods import methods_reading
from qkd_jax.settings.published import (
    BOTTLENECK,
    FORM,
    RUNS,
    SPECIAL,
    STANDS_IN,
    published,
    source_of,
)

DATA_SETS = ("cifar100", "cub200", "imagenet_r", "imagenet_a", "vtab")


def test_every_peer_has_a_row_and_every_row_a_method():
    # qkd has the experiments' own settings; two have no steps; the data sets are of images.
    assert set(RUNS) == set(methods_reading(("image",))) - {"qkd", "replay", "simplecil"}
    assert set(FORM) <= set(RUNS) and set(BOTTLENECK) <= set(RUNS)
    for method, data_set in SPECIAL:
        assert data_set in RUNS[method], (method, data_set)
    for method in RUNS:
        assert set(RUNS[method]) <= set(DATA_SETS)
        for data_set in DATA_SETS:
            assert source_of(method, data_set) in (data_set, *STANDS_IN.get(data_set, ()))


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_takes_every_method(name):
    """Unknown keys, ill-typed values and settings that do not fit would raise."""
    experiment = load_experiment(name)
    for method in learner_names():
        config = experiment.get_config(method)
        assert (config.experiment, config.method) == (name, method)


@pytest.mark.parametrize(
    ("method", "data_set", "rate", "batch", "epochs", "bottleneck"),
    [
        ("ease", "cifar100", 0.025, 48, 20, 64),  # exps/ease_cifar_in21k.json
        ("ease", "vtab", 0.03, 16, 45, 16),
        ("mos", "imagenet_a", 0.05, 32, 10, 16),  # exps/mos_ina_in21k.json
        ("mote", "imagenet_a", 0.1, 32, 20, 64),  # exps/ina/mote_in21k.json
        ("tuna", "imagenet_r", 0.02, 32, 10, 16),  # exps/tuna_imgr.json
        ("l2p", "imagenet_a", 0.001875, 32, 10, None),  # ImageNet-R's: exps/l2p_inr.json
        ("linear_probe", "imagenet_a", 0.01, 128, 30, None),  # CIFAR-100's
    ],
)
def test_experiments_have_the_published_numbers(method, data_set, rate, batch, epochs, bottleneck):
    config = load_experiment(data_set).get_config(method)
    train = config.train
    assert (train.learning_rate, train.batch_size, train.epochs) == (rate, batch, epochs)
    assert bottleneck is None or config.adapter.bottleneck == bottleneck
    # A factor of the paper's own on one data set wins over what holds on all.
    assert load_experiment("imagenet_a").get_config("ssiat").ssiat.margin == 0.3
    assert load_experiment("imagenet_r").get_config("apt").apt.merge == 0.2


def test_methods_without_a_row_have_no_settings():
    assert published("qkd", "cifar100") == published("simplecil", "vtab") == ()
