"""Methods and data sets from outside the package, by the very files of docs/your-own-method.md."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from qkd_jax import cli
from qkd_jax.data import sources
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.learners import shape
from qkd_jax.settings import methods, plugins

PAGE = Path(__file__).parents[2] / "docs/your-own-method.md"


@pytest.fixture(autouse=True)
def forgets(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    monkeypatch.setattr(shape, "_REGISTRY", dict(shape._REGISTRY))
    monkeypatch.setattr(sources, "_OWN", {})
    yield
    for name in [name for name in sys.modules if name.startswith(plugins.PREFIX)]:
        del sys.modules[name]


@pytest.fixture
def files(tmp_path):
    """my_method.py and my_data.py of the page."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    named = {"my_method.py": blocks[0], "my_data.py": blocks[2]}
    for name, code in named.items():
        (tmp_path / name).write_text(code)
    return [tmp_path / name for name in named]


def call(capsys, *arguments):
    """(exit code, stdout, stderr)."""
    code = cli.main([str(part) for part in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_method_and_a_data_set_of_ones_own_from_list_to_prediction(files, tmp_path, capsys):
    given = [f"--plugin={file}" for file in files]
    code, _, error = call(capsys, "list", "--settings", "--method", "nearest_mean")
    assert code == 1 and "one of your own is loaded by --plugin FILE" in error
    code, out, _ = call(capsys, "list", "--settings", "--method", "nearest_mean", *given)
    assert code == 0 and "nearest_mean.power = 2.0" in out
    assert "stripes" in call(capsys, "list", *given)[1]
    code, out, _ = call(capsys, "data", "check", "stripes", *given)
    assert code == 0 and "32 train and 32 test images of 4 classes" in out
    settings = ("data.source=stripes", "data.num_classes=0", "nearest_mean.power=1")
    chosen = [part for setting in settings for part in ("--set", setting)]
    run = ["run", "smoke", "--method", "nearest_mean", *chosen, "--set", "train.devices=1", *given]
    assert call(capsys, *run, "--no-report", "--out", tmp_path / "runs")[0] == 0
    folder = tmp_path / "runs/smoke/nearest_mean/seed1993"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["last_accuracy"] > 90
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["plugins"].keys() == {"my_method.py", "my_data.py"}
    split = sources.load_split("stripes")
    [pixels] = split.test.fetch([0])
    Image.fromarray(pixels).save(tmp_path / "two.png")
    code, out, _ = call(capsys, "predict", folder, tmp_path / "two.png", "--top", 1, *given)
    assert code == 0 and out.rstrip().endswith("two")


def test_a_comparison_gives_the_plugins_to_its_runs(files):
    from qkd_jax.cli.arguments import config_of
    from qkd_jax.cli.main import new_parser
    from qkd_jax.cli.training import _run_arguments

    plugins.load_plugins(files)
    given = [f"--plugin={file}" for file in files]
    options = new_parser().parse_args(["compare", "smoke", *given])
    arguments = _run_arguments(options, config_of(options, "nearest_mean", 1, where_read=True))
    assert new_parser().parse_args(arguments).plugin == [str(file) for file in files]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("x = 1\ny = nowhere\n", "line 2: NameError: name 'nowhere' is not defined"),
        ("x = (\n", "line 1: SyntaxError"),
        ("import qkd_jax_nowhere\n", "line 1: ModuleNotFoundError"),
        (
            "from qkd_jax.learners.shape import _REGISTRY, register\n"
            "register(_REGISTRY['simplecil'])\n",
            "expected a method of a new name, found 'simplecil'",
        ),
    ],
)
def test_a_plugin_that_fails_is_told_with_its_line(tmp_path, capsys, code, told):
    (tmp_path / "mine.py").write_text(code)
    code, _, error = call(capsys, "list", "--plugin", tmp_path / "mine.py")
    assert code == 1 and error.startswith("error: ") and "mine.py" in error and told in error


def test_a_plugin_that_is_not_there(tmp_path, capsys):
    assert "expected a Python file, found none" in call(capsys, "list", "--plugin", "no.py")[2]


def test_a_source_of_the_library_keeps_its_name():
    with pytest.raises(DataError, match="found one of the library's"):
        sources.register_source("renditions", lambda path: None)


class Entry:
    """An entry point of an installed package."""

    name, value, dist = "theirs", "theirs.method", SimpleNamespace(name="theirs", version="2")

    def __init__(self, load, module="theirs.method"):
        self.load, self.module = load, module


def test_installed_plugins_are_loaded_and_broken_ones_left_out(monkeypatch, caplog):
    loaded = []

    def broken():
        raise ZeroDivisionError("of a package")

    entries = {plugins.GROUP: [Entry(broken), Entry(lambda: loaded.append(1))]}
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries[group])
    plugins.load_plugins()
    assert (
        loaded == [1] and "plugin theirs (theirs.method) is left out: of a package" in caplog.text
    )
    assert plugins.loaded_plugins() == {}  # its module was never imported
    entries[plugins.GROUP] = [Entry(lambda: None, module="json")]
    assert plugins.loaded_plugins() == {"theirs": "2"}


def test_an_installed_plugin_replaces_no_method(monkeypatch):
    entry = Entry(lambda: shape.register(shape._REGISTRY["simplecil"]))
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match=r"plugin theirs .*of a new name, found 'simplecil'"):
        plugins.load_plugins()


def test_a_file_is_loaded_once(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("print('loaded')\n")
    for way in (tmp_path / "mine.py", tmp_path / ".." / tmp_path.name / "mine.py"):
        plugins.load_plugins([way])
    assert capsys.readouterr().out == "loaded\n"
    assert plugins.loaded_plugins().keys() == {"mine.py"}
