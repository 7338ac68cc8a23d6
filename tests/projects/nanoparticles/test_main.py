"""The command line: everything at once on tiny networks, and bad arguments."""

import json
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from projects.nanoparticles import __main__ as command
from projects.nanoparticles import networks, scattering
from projects.nanoparticles.__main__ import main
from projects.nanoparticles.diffusion import Diffusion
from projects.nanoparticles.training import Training

TINY = {
    "atoms": 16,
    "matrix_width": 16,
    "matrix_blocks": 1,
    "prior_widths": (8,),
    "pdf_channels": 4,
    "denoiser_channels": 8,
    "attention_heads": 2,
}
COARSE = {"q_max": 10.0, "q_step": 0.15, "r_max": 9.0, "r_step": 0.2}


@pytest.fixture
def tiny(monkeypatch):
    for package in ("ase", "xraydb", "diffpy.utils"):
        pytest.importorskip(package)
    monkeypatch.setattr(networks, "Sizes", partial(networks.Sizes, **TINY))
    monkeypatch.setattr(scattering, "PdfSettings", partial(scattering.PdfSettings, **COARSE))


def arguments(out, *more):
    text = f"--out {out} --clusters 12 --test-clusters 2 --pdf-steps 2 --matrix-steps 2 "
    text += "--denoiser-steps 2 --batch 4 --stride 100 --candidates 2"
    return [*text.split(), *more]


@pytest.mark.slow
def test_everything_runs_from_nothing_to_a_report_and_once_more(tiny, tmp_path, capsys):
    assert main(arguments(tmp_path)) == 0
    said = capsys.readouterr().out
    recorded = json.loads((tmp_path / "results.json").read_text())
    rows = recorded["results"][0]["rows"]
    assert [row["calls"] for row in rows] == [0, 0, 10, 9, 6]
    assert all(np.isfinite([row["rmsd_chosen"], row["residual_all"]]).all() for row in rows)
    assert (tmp_path / "table.md").read_text() in said
    for name in ("pdf.png", "atoms.png", "decoders.png", "sample/pdf.png", "sample/atoms.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    for name in ("candidate_1.xyz", "candidate_2.cif", "given.gr", "truth.xyz"):
        assert (tmp_path / "sample" / name).exists()

    # What is done is not done again, and a file of one's own is sampled.
    given, truth = tmp_path / "sample" / "given.gr", tmp_path / "sample" / "truth.xyz"
    assert main(["train", *arguments(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already trained") == 3
    own = ["--gr", str(given), "--element", "Pt", "--truth", str(truth)]
    assert main(["sample", *arguments(tmp_path, *own)]) == 0
    assert "taking the first test cluster" not in capsys.readouterr().out

    # Other settings than those of the folder are refused.
    assert main(["data", *arguments(tmp_path, "--noise", "0.5")]) == 2
    assert "noise: 0.02 there, 0.5 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sample", "--gr", "nowhere.gr"], "nowhere.gr"),
        (["--element", "Qq"], "found Qq"),
        (["--stride", "7"], "stride: expected a divisor"),
        (["--skip", "950"], "skip: expected a multiple"),
        (["--seeds", "a b"], "--seeds: expected different numbers"),
        (["--seeds", "1 1"], "--seeds: expected different numbers"),
        (["--matrix-steps", "0"], "matrix_steps: expected 1 or more"),
        (["--candidates", "99"], "--candidates: expected at most the 12"),
        (["--noise", "2"], "--noise: expected 0 to below 1"),
        (["sample", "--truth", "a.xyz"], "--truth: expected a --gr file"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tiny, tmp_path, capsys, given, message):
    out = tmp_path / "never"
    words, options = [g for g in given[:1] if g in command.WORDS], given
    options = given[len(words) :]
    assert main([*words, *arguments(out, *options)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_word_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["learn"])
    assert "invalid choice" in capsys.readouterr().err


def test_sampling_without_a_training_says_what_to_do(tiny, tmp_path, capsys):
    assert main(["sample", *arguments(tmp_path)]) == 2
    assert "run `train` first" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_way_to_install_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "NEEDED", ("json", "no_such_package.part"))
    assert main(["data", "--out", str(tmp_path / "never")]) == 2
    said = capsys.readouterr().err
    assert "no_such_package.part" in said and "[nanoparticles]" in said and "json," not in said


def test_defaults_of_the_command_are_those_of_the_trainings():
    given = vars(command._parser().parse_args([]))
    training = asdict(Training())
    names = ("pdf_steps", "matrix_steps", "denoiser_steps", "batch")
    assert {name: given[name] for name in names} == {name: training[name] for name in names}
    assert (given["stride"], given["eta"]) == (Diffusion().stride, Diffusion().eta)
