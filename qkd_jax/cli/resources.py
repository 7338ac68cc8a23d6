"""The commands about what there is to run with: list, doctor, weights, data, completion."""

import argparse
import shlex
from typing import Any

import numpy as np

from qkd_jax.cli.arguments import FOLLOW_LINKS, add_command, path
from qkd_jax.data.examples import Split
from qkd_jax.errors import ConfigError, DataError
from qkd_jax.settings import config as configuration
from qkd_jax.settings.config import Config
from qkd_jax.settings.experiments import experiment_names
from qkd_jax.settings.methods import method_names, presets


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands of this file."""
    listing = add_command(
        commands,
        "list",
        _list,
        "experiments, methods, presets, data, backbones and settings",
        "",
        "--settings --method ease",
    )
    listing.add_argument(
        "--settings", action="store_true", help="every setting that --method reads"
    )
    listing.add_argument("--method", default="qkd")

    add_command(
        commands,
        "doctor",
        _doctor,
        "what this machine has, what is cached, what is missing and how to get it",
        "",
    )

    weights = add_command(
        commands,
        "weights",
        _weights,
        "fetch and check a backbone's weights",
        "",
        "vit_b16_in21k_augreg",
    )
    weights.add_argument("name", nargs="?", default="clip_vit_b16")

    data = add_command(
        commands,
        "data",
        _data,
        "check that every example reads, divide a set, or prepare one of tensorflow-datasets",
        "check ~/photos",
        "split ~/birds --split-file birds.tsv",
        "check texts --path ~/reviews --text-column review",
        "prepare imagenet_r",
    )
    data.add_argument("action", choices=["check", "split", "prepare"])
    data.add_argument("name", help="an image folder, or a source as in data.source")
    data.add_argument("--path", default="", help="a folder of texts, or of prepared data sets")
    data.add_argument(
        "--split-file", default="", help="for a set without train/ and test/; `split` writes it"
    )
    data.add_argument("--follow-links", action="store_true", help=FOLLOW_LINKS)
    data.add_argument("--text-column", default="text", help="of a table of texts")
    data.add_argument("--label-column", default="label", help="of a table of texts")

    completion = add_command(
        commands,
        "completion",
        _completion,
        "what a shell needs to complete commands, options, experiments and methods",
        "bash > ~/.local/share/bash-completion/completions/qkd-jax",
        "zsh > ~/.zfunc/_qkd-jax",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _list(options: argparse.Namespace) -> None:
    from qkd_jax.data.sources import source_names
    from qkd_jax.weights.load import TINY_RANDOM
    from qkd_jax.weights.registry import names

    if options.settings:
        from qkd_jax.learners.shape import learner_of

        config = Config(method=options.method)
        has_steps = learner_of(config).loss is not None
        for path, value, accepts in configuration.settings(config, has_steps=has_steps):
            print(f"{path} = {value!r}   ({accepts})")
        return
    print("experiments:", ", ".join(experiment_names()))
    print("methods:    ", ", ".join(method_names()))
    print("presets:    ", ", ".join(presets()))
    print("data:       ", ", ".join(source_names()))
    print("backbones:  ", ", ".join([*names(), TINY_RANDOM]))


def _doctor(options: argparse.Namespace) -> None:
    from qkd_jax.cli.doctor import report

    for line in report():
        print(line)


def _weights(options: argparse.Namespace) -> None:
    from qkd_jax.weights.fetch import fetch
    from qkd_jax.weights.registry import lookup

    print(fetch(options.name))
    if lookup(options.name).tokenizer is not None:
        print(fetch(options.name, tokenizer=True))


def _data(options: argparse.Namespace) -> None:
    if options.action == "prepare":
        from qkd_jax.data.sources import BENCHMARKS, prepare

        name = BENCHMARKS.get(options.name, options.name.removeprefix("tfds:"))
        if name is None:
            raise ConfigError(
                f"data prepare: expected a set of tensorflow-datasets, found {options.name}; give "
                "its image folder to the run: --data PATH with train/<class>/* and test/<class>/*"
            )
        print(prepare(name, options.path or None))
        return
    if options.action == "split":
        _split(options)
        return
    from qkd_jax.data.contents import told_leaks, verify
    from qkd_jax.data.sources import describe
    from qkd_jax.runs.plan import need_every_class
    from qkd_jax.runs.progress import counting

    split = _opened(options, split_file=options.split_file or None)
    print(describe(split))
    with counting("checking", len(split.train) + len(split.test)) as advance:
        found = verify(split, advance)
    need_every_class(split)
    noun = split.train.noun
    print(f"every {noun} can be read, and every class has {noun}s to train and to test on")
    for copies in found.copies:
        print(f"the same {split.train.substance}: {' = '.join(copies)}")
    if found.leaked:
        print(f"warning: {told_leaks(found.leaked, split.test)}")


def _opened(options: argparse.Namespace, **division: Any) -> Split:
    """The set that is named, divided by a file or a rule if one is given."""
    from qkd_jax.data.sources import load_split

    folder = path(options.name)
    is_set = options.name.startswith("tfds:")
    is_folder = not is_set and (folder.is_dir() or len(folder.parts) > 1)
    return load_split(
        "folder" if is_folder else options.name,
        path=folder if is_folder else options.path or None,
        follow_links=options.follow_links,
        text_column=options.text_column,
        label_column=options.label_column,
        **division,
    )


def _split(options: argparse.Namespace) -> None:
    """Writes a split file that tests on a fifth of a set, if every example can be read."""
    from qkd_jax.data.contents import verify
    from qkd_jax.data.sources import describe
    from qkd_jax.data.splits import fifth_to_test, split_lines
    from qkd_jax.reports.writing import write_atomically
    from qkd_jax.runs.progress import counting

    file = path(options.split_file)
    if not options.split_file or file.exists():
        found = f"{file}, which exists" if options.split_file else "none"
        raise ConfigError(
            f"data split: expected --split-file with a new file to write, found {found}"
        )
    split = _opened(options, splitter=fifth_to_test)
    ids = [*split.train.ids.tolist(), *split.test.ids.tolist()]
    if broken := [name for name in ids if "\n" in name]:
        raise DataError(f"{broken[0]!r}: expected a name of one line, since a split file has lines")
    with counting("checking", len(ids)) as advance:
        verify(split, advance)
    write_atomically(file, split_lines(ids, np.arange(len(ids)) >= len(split.train)).encode())
    print(describe(split))
    print(f"written to {file}; give it to a run: --set data.split_file={shlex.quote(str(file))}")


def _completion(options: argparse.Namespace) -> None:
    from qkd_jax.cli.completion import completion

    print(completion(options.shell))
