"""A campaign of planted mistakes: what tests hold is killed, what they do not look at survives."""

import subprocess

import pytest

from benchmarks import mutants

MODULE = """
def add(a: int | None, b: int) -> int | None:
    return a + b


def double(a):
    return 2 * a
"""


def commit(root):
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for words in (["add", "."], [*identity, "commit", "-q", "-m", "tiny"]):
        subprocess.run(["git", *words], cwd=root, check=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One module with a test of its first function only."""
    root = tmp_path / "repository"
    (root / "qkd_jax").mkdir(parents=True)
    (root / "qkd_jax/__init__.py").touch()
    (root / "qkd_jax/tiny.py").write_text(MODULE)
    test = "from qkd_jax.tiny import add\n\n\ndef test_add():\n    assert add(2, 5) == 7\n"
    (root / "test_tiny.py").write_text(test)
    (root / "pytest.ini").write_text("[pytest]\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    commit(root)
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "MODULES", {"tiny": "test_tiny.py"})
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # given back afterwards
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.slow
def test_what_no_test_looks_at_survives(repository, tmp_path):
    found = mutants.campaign("tiny", 100, 0, tmp_path / "campaign")
    # a + b, and in the other function the number and its product; types are no places.
    assert (found["tried"], found["killed"]) == (3, 1) and found["mutants"] > 20
    assert [survivor["place"].split(",")[0] for survivor in found["survivors"]] == ["double"] * 2
    assert all(s["diff"].startswith("- return 2 * a\n+ return ") for s in found["survivors"])

    # What a killed campaign has left in its tree changes nothing, nor is anything tried again.
    (tmp_path / "campaign/tree/qkd_jax/tiny.py").write_text(MODULE.replace("+", "-"))
    again = mutants.campaign("tiny", 100, 0, tmp_path / "campaign")
    assert again | {"seconds": 0} == found | {"seconds": 0}

    # A test of the other function is committed: its mutants are tried again, and only they.
    test = repository / "test_tiny.py"
    more = "\n\n\ndef test_double():\n    assert double(3.5) == 7\n"
    test.write_text(test.read_text().replace("import add", "import add, double") + more)
    commit(repository)
    one, _ = found["survivors"]
    some = mutants.campaign("tiny", 100, 0, tmp_path / "campaign", settled=[one["diff"]])
    assert (some["tried"], some["killed"], some["survivors"]) == (3, 2, [one])
    later = mutants.campaign("tiny", 100, 0, tmp_path / "campaign", settled=())
    assert (later["tried"], later["killed"], later["survivors"]) == (3, 3, [])

    (repository / "qkd_jax/tiny.py").write_text(MODULE.replace("2 * a", "a + a"))
    commit(repository)
    with pytest.raises(RuntimeError, match=r"tiny\.py has changed since its mutants were drawn"):
        mutants.campaign("tiny", 100, 0, tmp_path / "campaign", settled=())


def test_unchanged_tests_must_pass(repository, tmp_path):
    test = repository / "test_tiny.py"
    test.write_text(test.read_text().replace("7", "8"))
    commit(repository)
    with pytest.raises(RuntimeError, match="the tests fail without any mutant"):
        mutants.campaign("tiny", 1, 0, tmp_path / "campaign")


def test_every_module_and_its_tests_are_there():
    for module, tests in mutants.MODULES.items():
        paths = [f"qkd_jax/{module}.py", *tests.split()]
        assert all((mutants.ROOT / path).exists() for path in paths), module


def test_reasons_stay_with_their_survivors_and_are_counted():
    before = [{"diff": "- a\n+ b", "reason": "the same program: one column"}, {"diff": "- c\n+ d"}]
    now = [{"diff": "- c\n+ d"}, {"diff": "- a\n+ b"}, {"diff": "- e\n+ f"}]
    mutants.keep_reasons(now, before)
    assert [s.get("reason") for s in now] == [None, "the same program: one column", None]
    shown = mutants.table({"nn/tiny": {"tried": 20, "killed": 17, "survivors": now}})
    assert shown.splitlines()[-1] == "| `nn/tiny.py` | 20 | 17 | 1 | 2 |"


def test_survivors_are_listed_with_their_reasons():
    survivors = [
        {"diff": "- a = b or c\n+ a = b | c", "reason": "the same program: no bits"},
        {"diff": "- x\n+ y"},
    ]
    assert mutants.reasons({"nn/tiny": {"survivors": survivors}}).splitlines()[2:] == [
        r"| `nn/tiny.py` | `a = b or c` | `a = b \| c` | the same program: no bits |",
        "| `nn/tiny.py` | `x` | `y` | not read |",
    ]
