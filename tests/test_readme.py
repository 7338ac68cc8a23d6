"""README.md and the pages beside it say what is true: their code runs, what they name exists."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qkd_jax.learners.shape import learner_names
from qkd_jax.settings import config as configuration
from qkd_jax.settings.experiments import experiment_names

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "docs/quickstart.md"
ABOUT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ABOUT, *sorted((ROOT / "docs").glob("*.md"))]
LONG = ("api.md", "distillation.md", "generators.md", "quantum.md")
SETTINGS = configuration.every_setting()
ROOMS = ("qkd_jax/", "docs/", "tests/", "experiments/", "notebooks/", "benchmarks/")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fences(text, language=None):
    """(line number, content) of the fenced blocks, of one language if given."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        (text[: match.start()].count("\n") + 1, match[2])
        for match in found
        if language in (None, match[1])
    ]


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text):
    """What stands between single backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def run_code(page, folder, ending=""):
    """Runs the page's python blocks, in order, in one namespace and a process of its own."""
    program = [
        "import pathlib",
        "text, namespace = pathlib.Path('code.txt').read_text(), {'__name__': '__main__'}",
        "for block in text.split('\\0'):",
        f"    exec(compile(block, {page.name!r}, 'exec'), namespace)",
        ending,
    ]
    # Blank lines in front: an error names the line of the page.
    blocks = ["\n" * line + code for line, code in fences(page.read_text(), "python")]
    (folder / "code.txt").write_text("\0".join(blocks))
    # As a user runs it: without the strict settings of the tests.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster, same meaning
    return subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def test_code_of_the_quickstart_ends_in_scores(tmp_path):
    ending = (
        "scores, state, images = (namespace[name] for name in ('scores', 'state', 'images'))\n"
        "print(tuple(scores.shape) == (len(images), state.config.shapes.num_classes))"
    )
    done = run_code(QUICKSTART, tmp_path, ending)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in LONG else [], id=page.name)
        for page in PAGES
        if page != QUICKSTART and fences(page.read_text(), "python")
    ],
)
def test_code_of_the_docs_runs(page, tmp_path):
    done = run_code(page, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


def commands(text):
    """Every `make ...` that stands in a code block or between backticks."""
    lines = [line.strip() for _, block in fences(text) for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += spans(text)
    return [line.split("#")[0] for line in lines if re.match(r"make( |$)", line)]


@every_page
def test_make_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([A-Za-z][\w-]*):", makefile, re.MULTILINE))
    tfds = re.search(r"^TFDS_EXPERIMENTS := (.*)$", makefile, re.MULTILINE)[1].split()
    targets |= {f"prepare-{name}" for name in tfds}
    for command in commands(page.read_text()):
        words = shlex.split(command)[1:]
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                if re.fullmatch(r"[a-z][\w-]*", word):
                    assert word in targets, f"{command!r}: no target {word!r}"
                continue
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"{command!r}: no {name}"
            known = {"EXP": experiment_names(), "METHOD": learner_names()}.get(name)
            if known and re.fullmatch(r"\w+", value):
                assert value in known, command


def anchors(page):
    """The anchors that headings get."""
    heads = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@every_page
def test_no_word_of_a_page_is_lost_as_a_tag(page):
    """Of "the mean <Z>" a reader sees "the mean"."""
    # Indented blocks are code too.
    text = re.sub(r"^ {4}.*$|`[^`]*`", "", prose(page.read_text()), flags=re.MULTILINE)
    tags = re.findall(
        r"<(?!https?:|!--|/?(?:img|picture|source|p|br|sub|sup)\b)[^ <>=][^<>]*>", text
    )
    assert not tags


def test_every_page_stands_in_the_contents_of_the_site():
    contents = re.findall(
        r"^```\{toctree\}\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.M | re.S
    )
    named = {line for block in contents for line in block.splitlines() if re.match(r"[a-z]", line)}
    assert named == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}


@every_page
def test_named_files_and_names_exist(page):
    for span in spans(page.read_text()):
        if span.startswith(ROOMS) and re.fullmatch(r"[\w./-]+", span):
            assert (ROOT / span).exists(), f"{page.name}: {span}"
        elif match := re.match(r"qkd_jax((?:\.\w+)+)", span):
            assert resolves(match[1][1:].split(".")), f"{page.name}: {span}"


def resolves(names):
    """Whether qkd_jax.<names> is a module or something in one."""
    for cut in range(len(names), -1, -1):
        try:
            found = importlib.import_module(".".join(["qkd_jax", *names[:cut]]))
        except ModuleNotFoundError:
            continue
        for name in names[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@every_page
def test_named_settings_exist_and_take_the_value(page):
    rooms = {path.partition(".")[0] for path in SETTINGS if "." in path}
    for span in re.findall(r"`(?:--set )?([a-z]+\.\w+(?:=[^\s`]+)?)`", page.read_text()):
        room, name = span.partition("=")[0].split(".")
        if room not in rooms or name in ("md", "py", "json"):
            continue
        assert f"{room}.{name}" in SETTINGS, f"{page.name}: {span}"
        if "=" in span and not span.partition("=")[2].isupper():
            reader = configuration.readers_of(f"{room}.{name}")[0]
            configuration.override(configuration.Config(method=reader), span)
