"""The house: what may import what, and what stands nowhere. Read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qkd_jax

PACKAGE = Path(qkd_jax.__file__).parent
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name):
    """Every module that a file imports, in full and with the names taken from it."""
    package = ["qkd_jax", *name.split("/")[:-1]]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module, names):
    return any(module == name or module.startswith(name + ".") for name in names)


def dotted(node):
    """`a.b.c` of an attribute or a name, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def files(*rooms):
    return [name for name in TREES if name.split("/")[0] in rooms]


HEAVY = ("tensorflow", "tensorflow_datasets", "torch", "orbax", "matplotlib", "pennylane", "onnx")
HEAVY += ("onnxruntime", "projects", "ase", "diffpy", "xraydb", "debyecalculator")
HEAVY += ("starlette", "uvicorn", "tensorboardX", "wandb", "shtab")


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, qkd_jax; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_starts_no_backend():
    """No array is made at import: devices and flags can still be chosen afterwards."""
    code = (
        "import qkd_jax, jax; jax.config.update('jax_num_cpu_devices', 3);"
        "jax.config.update('jax_platforms', 'cpu'); print(len(jax.devices()))"
    )
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"


LOWEST = ("qkd_jax.errors", "qkd_jax.paths")


def test_settings_import_errors_and_paths_only():
    for name in files("settings"):
        ours = [m for m in imports(name) if within(m, ["qkd_jax"])]
        assert all(within(m, ["qkd_jax.settings", *LOWEST]) for m in ours), (name, ours)


def test_quantum_knows_nothing_of_learning():
    for name in files("quantum"):
        ours = [m for m in imports(name) if within(m, ["qkd_jax"])]
        assert all(within(m, ["qkd_jax.quantum", "qkd_jax.errors"]) for m in ours), (name, ours)


# From above to below: a room may import those after it, and of those in one line none another.
ORDER = (
    ("cli",),
    ("runs",),
    ("engine", "reports", "data", "weights"),
    ("learners",),
    ("generators", "protocol"),
    ("nn",),
    ("quantum", "settings"),
    ("npz", "paths"),
    ("errors",),
)
LEVEL = {room: level for level, line in enumerate(ORDER) for room in line}
# What stands between rooms of one line, or is left out although it would point down.
ALSO = {("engine", "weights")}
NEVER = {("reports", room) for room in ("learners", "generators", "nn", "quantum")} | {
    ("data", room) for room in ("learners", "generators", "nn", "quantum", "protocol")
}


def room_of(module):
    """The room of `qkd_jax.room.file`; "" for the package itself."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("name", TREES)
def test_every_arrow_points_down(name):
    here = room_of(f"qkd_jax.{name.removesuffix('.py').replace('/', '.')}")
    if here in ("__init__", "__main__"):
        return
    for there in {room_of(module) for module in imports(name) if within(module, ["qkd_jax"])}:
        if there in ("", here):
            continue
        assert there in LEVEL, f"{name} imports {there}, which is no room"
        allowed = LEVEL[here] < LEVEL[there] or (here, there) in ALSO
        assert allowed and (here, there) not in NEVER, f"{name}: {here} -> {there}"


def test_only_evaluation_tells_a_learner_the_task():
    """Neither the verbs nor anything else that predicts names what reads a true task."""
    told = {"score_with_task", "predict_with_task", "scores_with_task"}
    names = {
        name
        for name in files("engine", "runs", "cli")
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and node.attr in told
    }
    assert names == {"engine/engine.py", "runs/model.py", "runs/learning.py"}


CORE = ("nn", "learners", "quantum", "generators")
IMPURE = ("os", "io", "pathlib", "shutil", "tempfile", "time", "datetime", "logging", "urllib")
IMPURE += ("random", "socket", "subprocess", "threading", "multiprocessing", "signal", "json")


@pytest.mark.parametrize("name", files(*CORE))
def test_the_core_imports_no_file_no_clock_no_log(name):
    for module in imports(name):
        assert not within(module, IMPURE), f"{name} imports {module}"
    calls = {dotted(n.func) for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)}
    assert not calls & {"open", "print", "input"}, name


def test_protocol_needs_numpy_only():
    for name in files("protocol"):
        assert not [m for m in imports(name) if within(m, ["jax", "flax", "optax"])], name


def test_one_home_for_devices_and_one_for_checkpoints():
    for name in TREES:
        if name != "runs/checkpoint.py":
            assert not [m for m in imports(name) if within(m, ["orbax"])], name
        if name != "engine/engine.py":
            calls = {dotted(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)}
            assert "jax.pmap" not in calls, name


def test_reports_and_settings_never_import_jax():
    for name in files("reports", "settings"):
        assert not [m for m in imports(name) if within(m, ["jax"])], name


def test_nothing_is_unpickled_or_evaluated():
    for name, tree in TREES.items():
        assert not [m for m in imports(name) if within(m, ["pickle", "dill", "shelve", "marshal"])]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = dotted(node.func)
                assert called not in ("eval", "exec", "torch.load", "joblib.load"), (name, called)
                allowed = [
                    k.value.value
                    for k in node.keywords
                    if k.arg == "allow_pickle" and isinstance(k.value, ast.Constant)
                ]
                assert True not in allowed, f"{name} unpickles arrays in {called}"


def test_one_reader_of_arrays_in_files():
    """NumPy's own takes the memory that a header states."""
    for name, tree in TREES.items():
        used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"np.load", "numpy.load", "np.fromfile", "np.memmap"}, name


def test_only_the_public_jax_is_used():
    for name in TREES:
        assert not [m for m in imports(name) if within(m, ["jax._src", "jax.experimental"])], name
        attributes = [dotted(n) for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)]
        assert not [a for a in attributes if a.startswith("jax._src")], name


STATELESS = ("default_rng", "Generator", "RandomState", "SeedSequence", "PCG64", "Philox")


def test_no_global_random_numbers():
    """np.random.<draw> and np.random.seed share a hidden state; the class order's own generator is
    an object with its own seed, and stands in protocol/tasks.py alone."""
    for name, tree in TREES.items():
        assert "random" not in imports(name), name
        for node in ast.walk(tree):
            parts = dotted(node).split(".") if isinstance(node, ast.Attribute) else []
            if len(parts) >= 3 and parts[0] in ("np", "numpy") and parts[1] == "random":
                assert parts[2] in STATELESS, f"{name}: {'.'.join(parts)}"
                assert parts[2] != "RandomState" or name == "protocol/tasks.py", name


def test_no_file_is_called_utils():
    assert not [n for n in TREES if Path(n).stem in ("utils", "util", "helpers", "common", "misc")]
