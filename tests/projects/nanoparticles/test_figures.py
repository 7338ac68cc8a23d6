"""Pictures hold what they are given: lines, names, numbers."""

import numpy as np

from projects.nanoparticles.figures import atoms_figure, decoders_figure, pdf_figure
from projects.nanoparticles.laplacian import NoiseStudy


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_pdfs_stand_with_their_residual(tmp_path):
    r = np.linspace(1, 10, 90)
    measured = np.sin(3 * r)
    figure = pdf_figure(r, measured, {"best": 0.9 * measured, "median": 0 * r})
    best, median = figure.axes
    assert texts(best) == ["measured", "best, R$_w$ = 0.10", "difference"]
    assert "median, R$_w$ = 1.00" in texts(median)
    np.testing.assert_array_equal(best.lines[1].get_ydata(), 0.9 * measured)
    np.testing.assert_allclose(np.diff(best.lines[3].get_ydata()), 0.1 * np.diff(measured))
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_atoms_are_turned_onto_the_truth(tmp_path):
    truth = np.random.default_rng(0).normal(size=(9, 3)) * 3
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    figure = atoms_figure(truth, {"best": truth @ turn + 8, "fewer atoms": truth[:7]})
    assert [axes.get_title() for axes in figure.axes] == ["truth", "best", "fewer atoms"]
    drawn = [np.transpose(axes.collections[0]._offsets3d) for axes in figure.axes]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-9)
    assert drawn[2].shape == (7, 3)
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert len(atoms_figure(None, {"one": truth, "two": truth}).axes) == 2


def test_decoders_are_drawn_relative_to_the_first(tmp_path):
    levels = np.array([0.0, 0.01, 0.1])
    base = np.outer([1e-6, 0.1, 1.0], np.ones(5))
    figure = decoders_figure(NoiseStudy(levels, {"first": base, "second": 3 * base}))
    whole, ratio = figure.axes
    assert texts(whole) == ["first", "second"]
    np.testing.assert_allclose(whole.lines[1].get_xydata(), [[0.01, 0.3], [0.1, 3.0]])
    np.testing.assert_allclose(ratio.lines[1].get_ydata(), [3, 3])
    figure.savefig(tmp_path / "a.png")
