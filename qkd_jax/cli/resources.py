"""The commands about what there is to run with: list, doctor, weights, data, completion."""

import argparse

from qkd_jax.cli.arguments import FOLLOW_LINKS, add_command, path
from qkd_jax.errors import ConfigError
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
        "prepare a tensorflow-datasets set once, or check that every example reads",
        "check ~/photos",
        "check texts --path ~/reviews --text-column review",
        "prepare imagenet_r",
    )
    data.add_argument("action", choices=["prepare", "check"])
    data.add_argument("name", help="an image folder, or a source as in data.source")
    data.add_argument("--path", default="", help="a folder of texts, or of prepared data sets")
    data.add_argument("--split-file", default="", help="for a folder without train/ and test/")
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
    from qkd_jax.data.contents import told_leaks, verify
    from qkd_jax.data.sources import describe, load_split
    from qkd_jax.runs.plan import need_every_class
    from qkd_jax.runs.progress import counting

    folder = path(options.name)
    is_set = options.name.startswith("tfds:")
    is_folder = not is_set and (folder.is_dir() or len(folder.parts) > 1)
    split = load_split(
        "folder" if is_folder else options.name,
        path=folder if is_folder else options.path or None,
        split_file=options.split_file or None,
        follow_links=options.follow_links,
        text_column=options.text_column,
        label_column=options.label_column,
    )
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


def _completion(options: argparse.Namespace) -> None:
    from qkd_jax.cli.completion import completion

    print(completion(options.shell))
