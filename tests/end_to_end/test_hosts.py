"""Several hosts: two processes of two simulated devices over loopback, against one process.

Parameters: float32 sums in another order, 1e-5 relative after all tasks, as for devices.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qkd_jax.engine import hosts as joined_hosts
from qkd_jax.errors import ConfigError
from qkd_jax.reports.files import read_run
from qkd_jax.runs.load import load_run
from qkd_jax.runs.loop import run, run_folder
from qkd_jax.settings.config import override
from qkd_jax.settings.experiments import load_experiment
from qkd_jax.weights.load import load_backbone


def settings_of(method):
    more = ("head.scale=10.0",) if method == "ease" else ()
    return ("train.epochs=2", "train.checkpoint_every=2", *more)


def config(method):
    return override(load_experiment("smoke").get_config(method), *settings_of(method))


def start_hosts(method, out, compiled, num_hosts=2):
    """The processes of one run, which find one another at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        # The same compiler as here: the random weights of a tiny backbone must be the same bits.
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "qkd_jax", "run", "smoke", "--method", method]
    command += [f"--set={setting}" for setting in settings_of(method)] + [
        "--out",
        str(out),
        "--bare",
    ]
    command += [f"--coordinator=127.0.0.1:{port}", f"--num-hosts={num_hosts}"]
    return [
        subprocess.Popen(
            [*command, f"--host-id={host}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(num_hosts)
    ]


def end(hosts):
    """(exit codes, what each printed); none is left behind."""
    try:
        printed = [host.communicate(timeout=300)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [host.returncode for host in hosts], printed


def check_equal(method, found, expected):
    """Two runs of one method, in the folders `found` and `expected`."""
    a, b = (run_folder(out, config(method)) for out in (found, expected))
    np.testing.assert_array_equal(read_run(a).correct, read_run(b).correct)
    np.testing.assert_array_equal(read_run(a).total, read_run(b).total)
    one, other = (load_run(folder).state for folder in (a, b))
    for part in ("trainable", "memory"):
        pairs = zip(*(jax.tree.leaves(getattr(s, part)) for s in (one, other)), strict=True)
        gap = sum(float(np.sum(np.square(np.float64(x) - np.float64(y)))) for x, y in pairs)
        size = sum(
            float(np.sum(np.square(np.float64(x)))) for x in jax.tree.leaves(getattr(one, part))
        )
        assert gap <= (1e-5) ** 2 * size, part
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (a, b)]
    assert len(logs[0]) == len(logs[1]) > 0


@pytest.fixture(scope="module")
def one_process(compiled, tmp_path_factory):
    """An uninterrupted run on four devices of this process."""
    out = tmp_path_factory.mktemp("one")
    backbone = load_backbone("tiny_random", image_size=32)
    run(override(config("ease"), "train.devices=4"), backbone, out)
    return out


@pytest.mark.slow
def test_two_hosts_are_one_run(one_process, compiled, tmp_path):
    codes, printed = end(start_hosts("ease", tmp_path, compiled))
    assert codes == [0, 0], printed
    assert "on 4 cpu devices of 2 hosts" in printed[0] and "task 3/3" in printed[0]
    assert "task" not in printed[1]  # one host speaks
    check_equal("ease", tmp_path, one_process)


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_and_another_number_continues(
    one_process, compiled, tmp_path
):
    hosts = start_hosts("ease", tmp_path, compiled)
    checkpoints = run_folder(tmp_path, config("ease")) / "checkpoints"
    until = time.monotonic() + 240
    while not any(checkpoints.glob("1000*")) and time.monotonic() < until:
        assert all(host.poll() is None for host in hosts), end(hosts)
        time.sleep(0.02)
    hosts[1].send_signal(signal.SIGTERM)
    codes, printed = end(hosts)
    assert codes == [130, 130], printed
    backbone = load_backbone("tiny_random", image_size=32)
    summary = run(config("ease"), backbone, tmp_path)  # eight devices of one process
    assert summary["finished"] and summary["devices"] == 8
    check_equal("ease", tmp_path, one_process)


@pytest.mark.slow
def test_a_method_that_surveys_images_on_two_hosts(compiled, tmp_path):
    codes, printed = end(start_hosts("inflora", tmp_path / "two", compiled))
    assert codes == [0, 0], printed
    run(config("inflora"), load_backbone("tiny_random", image_size=32), tmp_path / "one")
    check_equal("inflora", tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("given", [("a:1", 0, -1), ("", 2, 0), ("a:1", 2, 2), ("a:1", 2, -1)])
def test_half_an_address_is_refused(given):
    with pytest.raises(ConfigError, match="--coordinator ADDRESS:PORT --num-hosts N --host-id I"):
        joined_hosts.connect(*given)


def test_a_pod_is_joined_without_being_asked(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert joined_hosts.connect() == 0 and joined == []
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2")
    joined_hosts.connect()
    assert joined == [()]
