"""TensorBoard and Weights & Biases get what a run writes to metrics.jsonl."""

import importlib.util
import json
import struct

import pytest
import wandb
from tensorboardX.proto.event_pb2 import Event

from qkd_jax.errors import ConfigError
from qkd_jax.runs.tracking import need_trackers, new_trackers
from qkd_jax.settings.config import Config, override


def events(folder):
    """The events of all files in a folder: records of length, checksum, content, checksum."""
    found = []
    for file in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def scalars(folder):
    """(step, name) -> value."""
    return {
        (event.step, value.tag): value.simple_value
        for event in events(folder)
        for value in event.summary.value
    }


def test_tensorboard_has_every_line_by_examples_seen(learned):
    lines = [json.loads(line) for line in (learned / "metrics.jsonl").read_text().splitlines()]
    found = scalars(learned / "tensorboard")
    assert len(lines) == len({line["images_seen"] for line in lines}) == 10
    for line in lines:
        assert {"step", "task", "epoch", "images_seen", "loss"} <= line.keys()
        for name, value in line.items():
            assert found[line["images_seen"], f"train/{name}"] == pytest.approx(value, rel=1e-6)
    summary = json.loads((learned / "summary.json").read_text())
    last = lines[-1]["images_seen"]
    assert found[last, "test/accuracy"] == pytest.approx(summary["last_accuracy"])
    assert found[last, "test/routing"] == pytest.approx(summary["routing_accuracy"])
    assert found[last, "test/task"] == lines[-1]["task"] == 1


def test_weights_and_biases_has_them_offline(learned):
    [file] = learned.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in (b"train/loss", b"train/step", b"train/epoch", b"images_seen", b"test/accuracy"):
        assert name in content
    assert b"tiny_random" in content  # the settings


def test_a_continued_run_takes_back_what_an_earlier_session_wrote_later(tmp_path):
    config = override(Config(), "log.tensorboard=true")
    for seen in (0, 16):
        [tracker] = new_trackers(config, tmp_path, "", seen)
        tracker.log("train", {"loss": 1.0}, seen + 8)
        tracker.close()
    found = events(tmp_path / "tensorboard")
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [17]  # TensorBoard drops steps from here on that came before


def test_a_log_that_cannot_begin_is_told(tmp_path, monkeypatch):
    """It shall send what it is given, and has no account."""

    def refused(**_):
        raise wandb.errors.UsageError("no account")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(
        ConfigError, match=r"log\.wandb: expected a run to begin, found: no account"
    ):
        new_trackers(override(Config(), "log.wandb=true"), tmp_path, "", 0)


def test_by_default_there_are_none(tmp_path):
    assert new_trackers(Config(), tmp_path, "", 0) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_with_its_extra(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    need_trackers(Config())
    with pytest.raises(ConfigError, match=rf'log.{name}: .* pip install "qkd_jax\[{name}\]"'):
        need_trackers(override(Config(), f"log.{name}=true"))
