"""Settings: parsing, refusals that help, presets, and the round trip through JSON."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd_jax.errors import ConfigError
from qkd_jax.learners.qkd.gate import GateSettings
from qkd_jax.learners.shape import learner_names
from qkd_jax.settings import methods
from qkd_jax.settings.config import (
    Config,
    Shapes,
    TrainConfig,
    apply_preset,
    changeable_settings,
    difference,
    every_setting,
    from_dict,
    override,
    readers_of,
    settings,
    to_dict,
)


def value_of(config, path):
    for part in path.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    "assignment, expected",
    [
        ("train.epochs=7", 7),
        (" train.epochs = 7 ", 7),
        ("train.learning_rate=0.25", 0.25),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=3", 3.0),
        ("data.augment=true", True),
        ("data.augment=False", False),
        ("data.augment=1", True),
        ("data.augment=0", False),
        ("data.path=/a/b=c", "/a/b=c"),
        ("data.path=", ""),
        ("gate.kind=cosine", "cosine"),
        ("gate.freeze_after=-1", -1),
        ("train.decay_leaves=kernel, rows", ("kernel", "rows")),
        ("train.decay_leaves=", ()),
        ("adapter.bottleneck=5", 5),
        ("seed=3", 3),
    ],
)
def test_override_parses_each_kind(assignment, expected):
    config = override(Config(), assignment)
    found = value_of(config, assignment.partition("=")[0].strip())
    assert found == expected and type(found) is type(expected)


def test_override_applies_in_order_and_leaves_the_rest():
    config = override(Config(), "train.epochs=1", "gate.rank=3", "train.epochs=2")
    assert (config.train.epochs, config.gate.rank) == (2, 3)
    original = Config()
    changed = {line.split(":")[0] for line in difference(original, config)}
    assert changed <= {"train.epochs", "gate.rank"}
    assert override(original) == original


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("train.epoch=3", ["train.epoch", "train.epochs"]),
        ("epochs=3", ["setting 'epochs': expected a known name", "train.epochs"]),
        ("gat.kind=cosine", ["gat.kind", "gate.kind"]),
        ("train=3", ["setting 'train': expected a known name"]),
        ("train.epochs.more=3", ["expected a known name"]),
        ("train.__class__=3", ["expected a known name"]),
        ("=3", ["expected a known name"]),
        ("train.epochs", ["expected key=value"]),
        ("train.epochs=many", ["train.epochs: expected a whole number, found 'many'"]),
        ("train.epochs=1.5", ["a whole number"]),
        ("train.learning_rate=fast", ["a number"]),
        ("train.learning_rate=nan", ["train.learning_rate", "a number"]),
        ("train.learning_rate=inf", ["train.learning_rate", "a number"]),
        ("data.augment=yes", ["true or false"]),
        ("gate.kind=cosin", ["one of quantum", "did you mean cosine"]),
        ("adapter.placement=above", ["one of parallel, sequential"]),
        ("adapter.bottleneck=0", ["adapter.bottleneck", "at least 1"]),
        ("ease.alpha=1", ["ease.alpha: expected a setting that qkd reads", "found one of ease"]),
        ("num_classes=3", ["num_classes: expected a setting, found an array shape", "shapes="]),
        ("shapes.max_tasks=3", ["shapes.max_tasks: expected a setting, found an array shape"]),
        ("method=ease", ["method: expected in --method NAME"]),
        (
            "train.adapter_start=previous",
            ["'train.adapter_start': expected its new name adapter.start"],
        ),
        ("simplecil.whiten=true", ["'simplecil.whiten': expected classifier.kind=whitened"]),
    ],
)
def test_override_refuses_with_the_name_and_a_hint(assignment, words):
    with pytest.raises(ConfigError) as caught:
        override(Config(), assignment)
    for word in words:
        assert word in str(caught.value)


def test_what_only_others_read_is_refused_or_left_out():
    config = Config(method="ease")
    with pytest.raises(
        ConfigError, match=r"gate\.kind: .* ease reads \(.*ease.*\), found one of qkd"
    ):
        override(config, "gate.kind=cosine")
    with pytest.raises(
        ConfigError, match=r"head\.whiten: .* \(head\.kind, head\.scale\), found one"
    ):
        override(config, "head.whiten=true")
    left = override(config, "gate.kind=x", "head.whiten=true", "head.scale=3", where_read=True)
    assert difference(config, left) == ["head.scale: 20.0 -> 3.0"]
    with pytest.raises(ConfigError, match=r"setting 'gate\.kin': expected a known name"):
        override(config, "gate.kin=cosine", where_read=True)
    with pytest.raises(AttributeError, match=r"config\.gate: expected a section that ease reads"):
        _ = config.gate
    assert readers_of("gate.kind") == ("qkd",) and readers_of("gate.kin") == ()
    assert set(readers_of("train.epochs")) == set(learner_names())


def test_an_unknown_method_is_named():
    with pytest.raises(
        ConfigError, match=r"method: expected one of aper, .*found 'qdk'; did you mean qkd"
    ):
        Config(method="qdk")
    with pytest.raises(ConfigError, match="make a new Config"):
        dataclasses.replace(Config(), method="ease")


@pytest.mark.parametrize("method", learner_names())
def test_a_config_is_copied_hashed_and_kept(method):
    config = override(Config(method=method, shapes=Shapes(max_tasks=3)), "train.epochs=3")
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert again == config and hash(again) == hash(config)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_section_of_a_method_may_not_have_a_shared_name(monkeypatch):
    odd = methods.Method({"train": TrainConfig}, (), {})
    monkeypatch.setitem(methods._METHODS, "odd", odd)
    with pytest.raises(ConfigError, match=r"odd: expected sections of other names .* found train"):
        Config(method="odd")


def test_joint_is_a_protocol_that_one_method_starts_with():
    assert Config(method="joint").protocol.kind == "joint"
    assert Config().protocol.kind == "incremental"
    apart = override(Config(method="joint"), "protocol.kind=incremental")
    assert from_dict(to_dict(apart)).protocol.kind == "incremental"


def test_files_of_earlier_versions_are_understood():
    """They had every method's settings, the shapes beside them, and one setting by another name."""
    now = to_dict(override(Config(shapes=Shapes(5, 3, 2, 9)), "adapter.start=previous"))
    then = {**now, **now.pop("shapes"), "ease": {"alpha": 0.5, "complement": True}}
    then["adapter"] = {name: v for name, v in now["adapter"].items() if name != "start"}
    then["train"] = {**now["train"], "adapter_start": "previous"}
    then["classifier"] = {"kind": "own", "shrinkage": 0.6}  # a default of before, not read
    then["simplecil"] = {"whiten": False, "shrinkage": 0.6}  # gone, and switched off
    del then["shapes"]
    assert to_dict(from_dict(then)) == to_dict(
        override(Config(shapes=Shapes(5, 3, 2, 9)), "adapter.start=previous")
    )
    del now["fusion"]["frozen_weight"], now["head"]["covariance"]  # then there were none
    assert (from_dict(now).fusion.frozen_weight, from_dict(now).head.covariance) == (0.0, "seen")
    read = from_dict({"classifier": {"kind": "whitened", "shrinkage": 0.6}})
    assert read.classifier.shrinkage == 0.6
    with pytest.raises(ConfigError, match=r"simplecil\.whiten.: expected classifier\.kind"):
        from_dict({"method": "simplecil", "simplecil": {"whiten": True, "shrinkage": 0.6}})
    ease = from_dict({**then, "method": "ease"})
    assert ease.ease.alpha == 0.5 and ease.shapes == Shapes(5, 3, 2, 9)
    assert {name for name, _ in ease.own} == {"adapter", "ease", "head"}
    assert from_dict({**then, "method": "joint"}).protocol.kind == "incremental"
    del then["protocol"]
    assert from_dict({**then, "method": "joint"}).protocol.kind == "joint"
    with pytest.raises(ConfigError, match=r"setting 'ease\.alfa': expected a known name"):
        from_dict({"ease": {"alfa": 1.0}})


def test_all_that_cannot_be_read_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        override(Config(), "train.epochs=many", "epochs=3", "seed=1", "gate.kind=cosin")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "found 'many'" in lines[0] and "'epochs'" in lines[1]


def test_all_range_problems_are_listed_at_once():
    bad = {
        "seed": -1,
        "protocol.increment": 0,
        "protocol.base": -1,
        "gate.num_qubits": 21,
        "gate.num_layers": 0,
        "gate.rank": 0,
        "gate.temperature": 0.0,
        "gate.shrinkage": 1.5,
        "gate.calibration_steps": -1,
        "gate.calibration_batch": 0,
        "distillation.temperature": -1.0,
        "fusion.top_k": 0,
        "train.epochs": -1,
        "train.later_epochs": -1,
        "train.batch_size": 0,
        "train.eval_batch_size": 0,
        "train.checkpoint_every": 0,
        "train.learning_rate": -0.1,
        "train.devices": -1,
    }
    with pytest.raises(ConfigError) as caught:
        override(Config(), *(f"{key}={value}" for key, value in bad.items()))
    for key in bad:
        assert f"\n  {key}: expected" in str(caught.value)
    with pytest.raises(ConfigError, match=r"max_tasks: expected at least 1.*\n.*max_task_images"):
        Config(shapes=Shapes(max_tasks=0, max_task_images=-1))


@pytest.mark.parametrize(
    "assignment",
    [
        "ranpac.projection_dim=0",
        "mos.merge_rate=1.0",
        "tuna.scale=0.0",
        "alignment.jitter=0.0",
        "mote.others=1.5",
        "ssiat.kernel_width=0.0",
        "coda_prompt.length=0",
        "prompt_per_task.temperature=0.0",
    ],
)
def test_ranges_of_single_methods(assignment):
    key = assignment.partition("=")[0]
    for method in readers_of(key):
        with pytest.raises(ConfigError, match=f"{key}: expected"):
            override(Config(method=method), assignment)


def test_ranges_include_their_ends_and_nothing_beyond():
    for good in ("train.epochs=0", "gate.shrinkage=1", "data.validation=0"):
        override(Config(), good)
    override(Config(method="mos"), "mos.merge_rate=0")
    for bad, words in (
        ("data.validation=1", "0 (none) to below 1"),
        ("gate.num_qubits=21", "1 to 20"),
        ("gate.temperature=0", "above 0"),
        ("train.clip_norm=-1", "0 (never) or more"),
        ("protocol.order_seed=4294967296", "0 to 4294967295"),
        ("train.batch_size=0", "at least 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            override(Config(), bad)
        assert f"{bad.partition('=')[0]}: expected {words}, found" in str(caught.value)


def test_what_may_change_while_a_run_goes_on():
    assert changeable_settings() == {
        *("backbone.weights", "teacher.weights", "data.store_gib"),
        *("data.path", "data.split_file", "data.follow_links"),
        *("train.eval_batch_size", "train.task_chunk", "train.checkpoint_every"),
        *("train.devices", "train.model_devices", "log.tensorboard", "log.wandb"),
    }


def test_combinations_are_checked():
    with pytest.raises(ConfigError, match="max_task_classes"):
        Config(shapes=Shapes(num_classes=4, max_task_classes=5))
    with pytest.raises(ConfigError, match=r"l2p\.top_k: expected at most l2p\.pool"):
        override(Config(method="l2p"), "l2p.top_k=11")


@pytest.mark.parametrize(
    "build",
    [
        lambda: Config(seed="1"),
        lambda: Config(seed=True),
        lambda: Config(seed=1.0),
        lambda: Config(train=None),
        lambda: Config(train=TrainConfig(decay_leaves=["kernel"])),
        lambda: Config(shapes=None),
        lambda: Config().replace(gate=GateSettings(kind=["quantum"])),
        lambda: Config().replace(gate=GateSettings(reupload=1)),
        lambda: Config().replace(gate=None),
    ],
)
def test_ill_typed_values_in_the_constructor(build):
    with pytest.raises(ConfigError, match="expected"):
        build()


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([])
)
GARBAGE = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["train", "gate", "kind", "adapter", "bottleneck", "seed"]),
                st.text(max_size=4),
                st.integers(),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@given(GARBAGE)
def test_from_dict_of_anything_gives_a_config_or_a_config_error(garbage):
    try:
        assert isinstance(from_dict(garbage), Config)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "garbage, words",
    [
        ([1], ["expected an object", "list"]),
        (None, ["NoneType"]),
        (3, ["int"]),
        ({"train": 3}, ["train: expected an object", "int"]),
        ({"train": {"epochs": None}}, ["train.epochs: expected a whole number, found None"]),
        ({"train": {"epochs": {"a": 1}}}, ["train.epochs: expected a whole number"]),
        ({"train": {"decay_leaves": [1]}}, ["names separated by commas"]),
        (
            {"gate": {"kind": 3}, "sed": 1},
            ["gate.kind: expected one of", "setting 'sed'", "nearest: seed"],
        ),
        ({3: 4}, ["setting '3': expected a known name"]),
    ],
)
def test_from_dict_names_what_is_wrong(garbage, words):
    with pytest.raises(ConfigError) as caught:
        from_dict(garbage)
    for word in words:
        assert word in str(caught.value)


TEXT = st.text(max_size=12)


@st.composite
def configs(draw):
    """Valid configs that differ from the defaults in settings of every kind."""
    config = Config(
        experiment=draw(TEXT),
        seed=draw(st.integers(0, 2**32 - 1)),
        shapes=Shapes(
            num_classes=draw(st.integers(20, 300)), max_task_classes=draw(st.integers(1, 20))
        ),
    )
    train = dataclasses.replace(
        config.train,
        learning_rate=draw(st.floats(0, 1e6) | st.integers(0, 9)),
        decay_leaves=tuple(draw(st.lists(TEXT, max_size=3))),
        optimizer=draw(st.sampled_from(["sgd", "adam"])),
    )
    gate = dataclasses.replace(
        config.gate,
        temperature=draw(st.floats(1e-30, 1e30)),
        reupload=draw(st.booleans()),
        freeze_after=draw(st.integers(-1, 9)),
    )
    data = dataclasses.replace(config.data, path=draw(TEXT), augment=draw(st.booleans()))
    return config.replace(train=train, gate=gate, data=data)


@given(configs())
def test_round_trip_through_json(config):
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)
    assert difference(config, again) == []


def test_difference_and_settings_name_every_leaf():
    old = override(Config(), "train.epochs=1", "gate.kind=quantum")
    new = override(old, "train.epochs=2", "gate.kind=mlp")
    assert sorted(difference(old, new)) == [
        "gate.kind: 'quantum' -> 'mlp'",
        "train.epochs: 1 -> 2",
    ]
    listed = {path: (value, accepts) for path, value, accepts in settings(new)}
    assert listed["train.epochs"] == (2, "a whole number, 0 or more")
    assert listed["gate.kind"][0] == "mlp" and "pqk" in listed["gate.kind"][1]
    assert listed["train.batch_size"][1] == "a whole number, at least 1"
    assert all(value_of(new, path) == value for path, (value, _) in listed.items())
    assert set(listed) < every_setting()


def test_presets():
    base = override(Config(), "seed=5", "gate.temperature=0.5")
    assert apply_preset(base, "qkd") == base
    paper = apply_preset(base, "paper")
    assert paper.seed == 5
    # The literal choices of the paper: theta in [0, 2 pi), SVD states, fidelity scores at
    # temperature 1, a gate that is never taught, the constant L1.
    assert paper.gate.kind == "quantum" and paper.gate.encoding == "angle"
    assert abs(paper.gate.theta_scale - 2 * 3.141592653589793) < 1e-12
    assert (paper.gate.states, paper.gate.stack, paper.gate.rank) == ("weights", "weights", 12)
    assert (paper.gate.score, paper.gate.temperature) == ("fidelity", 1.0)
    assert paper.gate.calibration_steps == 0 and paper.gate.reupload
    assert (paper.sparsity.kind, paper.sparsity.weight) == ("l1_softmax", 0.05)
    assert paper.distillation.columns == "seen" and paper.distillation.temperature == 1.0


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError) as caught:
        apply_preset(Config(), "papr")
    assert all(name in str(caught.value) for name in methods.presets())
    assert "did you mean paper" in str(caught.value)
    with pytest.raises(ConfigError, match="preset paper: expected method qkd, found ease"):
        apply_preset(Config(method="ease"), "paper")
