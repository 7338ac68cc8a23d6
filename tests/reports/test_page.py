"""Reports from a fake run folder whose every number is known."""

import ast
import io
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from qkd_jax.errors import DataError
from qkd_jax.protocol import metrics
from qkd_jax.reports import charts, facts, figures
from qkd_jax.reports import run_page as report
from qkd_jax.reports.files import read_records, read_run
from qkd_jax.reports.results import write_results
from qkd_jax.reports.tables import comparison_table, console_table
from tests.reports.fake_run import CIRCUIT, write_run


def shape_of_png(data):
    """(width, height) in pixels, from the header."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


ALL_FIGURES = {"accuracy_curve", "accuracy_matrix", "relevance", "routing", "loss", "circuit"}


def test_report_has_every_figure_and_the_page_every_number(tmp_path):
    folder = tmp_path / "seed1"
    write_run(folder)
    page = report.write_report(folder)
    pictures = {path.stem: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert pictures.keys() == ALL_FIGURES
    for data in pictures.values():
        width, height = shape_of_png(data)
        assert 400 <= width <= 2400 and 150 <= height <= 1600

    text = page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # self-contained
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert "<td>average_accuracy</td><td>87.50</td>" in text  # 7 of 8 right in every task
    assert "<td>trainable_parameters</td><td>1,189,632</td>" in text
    # Task 1: 2 classes, 8 images, learned, best and last 87.5, no forgetting, routed rightly.
    values = (1, 2, 8, 87.5, 87.5, 87.5, 0, 100)
    row = "".join(rf'<td class="number" data-value="{value:.1f}">[\d.]+</td>' for value in values)
    assert re.search(row, text)
    assert "not finished" not in text
    assert not list(folder.rglob("*.part"))


def test_report_warns_of_leaked_and_removed_images(tmp_path):
    """The names are a user's own, so they are escaped."""
    folder = tmp_path / "seed1"
    write_run(folder)
    leaked = [["train/a/<1>.png", "test/a/2.png"], ["train/b/1.png", "test/b/1.png"]]
    told = {"leaked_test_images": leaked, "removed_images": ["train/c/9.png"]}
    (folder / "environment.json").write_text(json.dumps(told))
    text = report.write_report(folder).read_text()
    assert "Images that are both trained and tested on: 2, the first" in text
    assert "train/a/&lt;1&gt;.png = test/a/2.png" in text
    assert "removed between sessions of the run: 1, the first of them train/c/9.png" in text
    (folder / "environment.json").write_text(json.dumps({"leaked_test_images": []}))
    assert 'class="warning"' not in report.write_report(folder).read_text()


def test_report_of_an_interrupted_run_shows_what_there_is(tmp_path):
    folder = tmp_path / "seed1"
    correct, total = write_run(folder)
    correct[2], total[2] = 0, 0
    (folder / "matrix.json").write_text(
        json.dumps({"correct": correct.tolist(), "total": total.tolist()})
    )
    (folder / "summary.json").unlink()
    (folder / "predictions/after_task_2.npz").unlink()
    text = report.write_report(folder).read_text(encoding="utf-8")
    assert "not finished: 2 tasks were evaluated" in text
    assert "<td>average_accuracy</td><td>87.50</td>" in text
    assert {path.stem for path in (folder / "figures").iterdir()} == ALL_FIGURES


def test_report_of_an_empty_folder_and_of_none(tmp_path):
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "0 tasks were evaluated" in text and "<img" not in text
    with pytest.raises(DataError, match=r"nowhere: expected a run folder"):
        report.write_report(tmp_path / "nowhere")


def test_methods_without_relevance_have_no_gate_figures(tmp_path):
    folder = tmp_path / "seed1"
    write_run(folder, relevance=False)
    (folder / "circuit.txt").unlink()
    report.write_report(folder)
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert drawn == ALL_FIGURES - {"relevance", "routing", "circuit"}


@pytest.mark.parametrize("num_tasks", [1, 25])
def test_one_task_and_many_tasks_can_be_drawn(tmp_path, num_tasks):
    folder = tmp_path / "seed1"
    write_run(folder, num_tasks=num_tasks)
    report.write_report(folder)
    assert {path.stem for path in (folder / "figures").iterdir()} == ALL_FIGURES


def test_newest_predictions_are_chosen_by_number_not_by_name(tmp_path):
    write_run(tmp_path / "seed1", num_tasks=12)
    run = read_run(tmp_path / "seed1")
    assert run.predictions["after_task"] == 11  # as text, after_task_9 comes last
    assert len(run.predictions["label"]) == 12 * 8


def test_records_survive_a_crash_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "images_seen": 32, "loss": 3.0},
        {"step": 2, "images_seen": 64, "loss": 2.0},
        {"event": "resumed"},
        {"step": 2, "images_seen": 64, "loss": 2.5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "images_se')
    records = read_records(path)
    assert [(record["step"], record["loss"]) for record in records] == [(1, 3.0), (2, 2.5)]
    path.write_text('{"step": 1, "im\n{"step": 2, "images_seen": 64}\n')
    with pytest.raises(DataError, match="line 1: expected valid JSON"):
        read_records(path)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary.json: expected valid JSON"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object, found a list"):
        read_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "matrix.json").write_text('{"correct": [[1]], "total": [[1, 0], [1, 1]]}')
    with pytest.raises(DataError, match="two square matrices"):
        read_run(tmp_path)


def test_figures_show_the_numbers_they_are_given():
    matrix = np.array([[91.26, np.nan], [72.0, 88.0]])
    figure = figures.heat_map(matrix, "t", "x", "y", "%", 1, (60.0, 100.0))
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {"91.3", "72.0", "88.0"}
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), matrix)

    figure = figures.accuracy_curve({"a": [90.0, 80.25], "b": [99.0, 80.5]}, "t")
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    assert texts.keys() == {"a  80.25", "b  80.50"}
    assert texts["a  80.25"].xy == (2, 80.25)  # the thin line leads to the curve's end
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert [90.0, 80.25] in drawn and [99.0, 80.5] in drawn


def drawn_boxes(figure):
    """Pixel boxes (y0, y1) of the labels, from below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text  # an Annotation's own box has its line in it

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [Text.get_window_extent(t, canvas.get_renderer()) for t in figure.axes[0].texts]
    return sorted((box.y0, box.y1) for box in boxes), figure.bbox.height


@pytest.mark.parametrize("count", [2, 15, 22])
def test_many_curves_have_styles_of_their_own_and_labels_that_do_not_touch(count):
    rng = np.random.default_rng(count)
    last = 80 + rng.uniform(0, 3, count)
    curves = {f"method_{n}": [95.0, float(value)] for n, value in enumerate(last)}
    figure = figures.accuracy_curve(curves | {"joint": [91.5]}, "t")
    axes = figure.axes[0]
    styles = [(line.get_color(), str(line.get_linestyle()), line.get_marker())
              for line in axes.lines]  # fmt: skip
    assert len(set(styles)) == count + 1
    level = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert [line.get_ydata() for line in level] == [[91.5, 91.5]]  # the whole width
    boxes, height = drawn_boxes(figure)
    assert len(boxes) == count + 1 and boxes[0][0] > 0 and boxes[-1][1] < height
    # Text boxes have a margin of a pixel or two, so two may share that much.
    assert all(above[0] - below[1] > -3 for below, above in itertools.pairwise(boxes))
    ends = sorted(axes.texts, key=lambda text: text.xy[1])
    heights = [text.get_position()[1] for text in ends]
    assert heights == sorted(heights)


def test_labels_move_no_more_than_they_must():
    assert figures._spread([1.0, 5.0, 9.0], 1.0, 0.0, 10.0) == [1.0, 5.0, 9.0]
    assert figures._spread([4.0, 4.0, 4.0], 1.0, 0.0, 10.0) == [3.0, 4.0, 5.0]
    assert figures._spread([9.9, 10.0], 2.0, 0.0, 10.0) == [8.0, 10.0]  # stay inside
    assert figures._spread([0.0, 0.0], 2.0, 0.0, 10.0) == [0.0, 2.0]


def test_running_mean_equals_brute_force():
    values = np.random.default_rng(0).normal(size=17)
    smooth = figures._running_mean(values, 3)
    for n in range(17):
        window = values[max(0, n - 3) : n + 4]
        # Differences of running sums of 17 numbers near 1: rounding below 17 * 2**-50.
        assert smooth[n] == pytest.approx(window.mean(), abs=1e-13)


def test_losses_are_smoothed_within_tasks_only_and_bad_values_left_out():
    records = [
        {"step": n, "task": n // 4, "images_seen": n, "loss": value, "loss_ce": value}
        for n, value in enumerate([1.0, 1.0, 1.0, 1.0, 5.0, math.nan, 5.0, 5.0])
    ]
    figure = figures.loss_curves(records, "t")
    lines = [line for line in figure.axes[0].lines if line.get_linewidth() > 1.5]
    assert [line.get_ydata().tolist() for line in lines] == [[1.0] * 4, [5.0] * 3]
    assert figures.loss_curves([{"images_seen": 1, "loss": math.nan}], "t") is None


def test_circuit_becomes_wires_boxes_and_controls():
    axes = figures.circuit(CIRCUIT, "t").axes[0]
    boxes = [text.get_text() for text in axes.texts if text.get_bbox_patch()]
    assert boxes == ["RY(0.10)", "RY(0.20)", "RY(0.30)"]
    controls = [line for line in axes.lines if line.get_marker() == "o"]
    targets = [line for line in axes.lines if line.get_marker() == "+"]
    verticals = [
        line for line in axes.lines if line.get_marker() == "None" and np.ptp(line.get_ydata())
    ]
    assert len(targets) == 2 and len(controls) == 4  # a target is a ring and a cross
    ends = [line.get_xdata()[0] for line in verticals]
    # Two connections, half of each on each of its wires; and a bracket of three pieces.
    assert sorted(ends) == [15, 15, 18, 18, 22, 22, 22]
    wires = [line for line in axes.lines if line.get_marker() == "None"]
    assert len(wires) - len(verticals) == 3


WIDE_CIRCUIT = """
0: ─╭●─────────╭RZZ───────┤
1: ─│──────────╰RZZ(0.40)─┤
2: ─╰RX(-1.10)────────────┤
"""


def test_lines_meet_wide_boxes_in_the_middle():
    axes = figures.circuit(WIDE_CIRCUIT, "t").axes[0]
    boxes = {
        text.get_text(): text.get_position()[0] for text in axes.texts if text.get_bbox_patch()
    }
    # RX(-1.10) fills columns 5 to 13, RZZ(0.40) 16 to 24.
    assert boxes == {"RZZ": 20, "RZZ(0.40)": 20, "RX(-1.10)": 9}
    (control,) = (line for line in axes.lines if line.get_marker() == "o")
    assert control.get_xdata().tolist() == [9]
    uprights = [line for line in axes.lines if np.ptp(line.get_ydata())]
    assert sorted(line.get_xdata()[0] for line in uprights) == [9, 9, 9, 20, 20]


def columns(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_results_average_finished_seeds_only(tmp_path):
    experiment = tmp_path / "toy"
    values = {1: 80.0, 2: 82.0, 3: 87.0}
    for seed, value in values.items():
        write_run(experiment / f"qkd/seed{seed}", average_accuracy=value, seed=seed)
    write_run(experiment / "qkd/seed4", average_accuracy=1.0, seed=4, finished=False)
    write_run(experiment / "qkd-gate-cosine/seed1", average_accuracy=90.0, routing_accuracy=None)
    (experiment / "ease/seed1").mkdir(parents=True)
    (experiment / "ease/notes").mkdir()
    (experiment / "finetune/seed1").mkdir(parents=True)
    (experiment / "finetune/seed1/summary.json").write_text('{"finis')

    table = write_results(experiment).read_text(encoding="utf-8")
    results = json.loads((experiment / "results.json").read_text(encoding="utf-8"))
    row = results["methods"]["qkd"]
    assert (row["n"], row["seeds"]) == (3, [1, 2, 3])
    # Two divisions and a root of numbers near 100: relative rounding below 1e-14.
    assert row["average_accuracy"]["mean"] == pytest.approx(83.0, rel=1e-12)
    sd = statistics.stdev(values.values())
    assert row["average_accuracy"]["sd"] == pytest.approx(sd, rel=1e-12)
    assert row["average_accuracy"]["values"] == [80.0, 82.0, 87.0]
    assert results["methods"]["qkd-gate-cosine"]["average_accuracy"]["sd"] is None
    assert results["unfinished"] == ["ease/seed1", "qkd/seed4"]
    assert list(results["damaged"]) == ["finetune/seed1"]
    assert "- finetune/seed1: summary.json: expected valid JSON" in table

    lines = [columns(line) for line in table.splitlines() if line.startswith("|")]
    assert lines[0][:4] == ["method", "n", "average accuracy", "last accuracy"]
    assert lines[2][:3] == ["qkd-gate-cosine", "1", "90.00"]  # best first, one seed has no sd
    assert lines[2][5] == "–"  # no routing number
    assert lines[3][:3] == ["qkd", "3", f"83.00 ± {sd:.2f}"]
    assert lines[3][6] == "1,189,632"
    assert all(len(line) == len(lines[0]) for line in lines)
    for run in results["unfinished"]:
        assert f"- {run}\n" in table
    assert "differ" not in table


def test_results_warn_when_seeds_were_run_with_different_settings(tmp_path):
    for seed, epochs in ((1, 5), (2, 20)):
        folder = tmp_path / f"qkd/seed{seed}"
        write_run(folder, seed=seed)
        config = {"method": "qkd", "seed": seed, "train": {"epochs": epochs}}
        (folder / "config.json").write_text(json.dumps(config))
    table = write_results(tmp_path).read_text(encoding="utf-8")
    assert "**qkd: seeds differ in `train.epochs`**" in table


def test_a_run_of_an_earlier_version_does_not_differ_by_form_or_by_what_is_not_read(tmp_path):
    """Its file has every method's settings, and the shapes beside the sections."""
    now = {"method": "ease", "shapes": {"max_tasks": 3}, "train": {"epochs": 5}}
    then = {"method": "ease", "max_tasks": 3, "train": {"epochs": 5}, "fusion": {"top_k": 7}}
    for seed, config in enumerate((now, then)):
        write_run(tmp_path / f"ease/seed{seed}", seed=seed)
        path = tmp_path / f"ease/seed{seed}/config.json"
        path.write_text(json.dumps(config | {"seed": seed}))
    assert "differ" not in write_results(tmp_path).read_text(encoding="utf-8")


def test_what_a_run_does_not_have_is_a_dash(tmp_path):
    """Nothing trained; and a folder of before there were these keys."""
    write_run(tmp_path / "simplecil/seed1", training_images_per_second=None, trainable_parameters=0)
    write_run(tmp_path / "old/seed1")
    summary = tmp_path / "old/seed1/summary.json"
    old = json.loads(summary.read_text())
    old["train_images_per_second"] = old.pop("training_images_per_second")
    summary.write_text(json.dumps(old))
    write_run(tmp_path / "new/seed1", inference_images_per_second=41.26, peak_memory_mb=1234.5)
    table = write_results(tmp_path).read_text(encoding="utf-8")
    header, _, *lines = [columns(line) for line in table.splitlines() if line.startswith("|")]
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert rows["simplecil"]["training images/s"] == rows["old"]["training images/s"] == "–"
    assert rows["simplecil"]["trainable parameters"] == "0"
    assert rows["new"]["training images/s"] == "800.0"
    assert rows["new"]["inference images/s"] == "41.3"
    assert rows["new"]["peak memory, MiB"] == "1,234"
    assert rows["old"]["inference images/s"] == rows["old"]["peak memory, MiB"] == "–"


def test_routing_and_cost_have_a_table_of_their_own_where_they_were_measured(tmp_path):
    costs = {"passes_per_image": 5.5, "kept_bytes_per_class": 3072, "kept_bytes_per_task": 1500}
    costs |= {"kept_bytes_constant": 12, "kept_bytes": 2000000}
    for seed, rate in ((1, 10.0), (2, 40.0)):
        routed = {"oracle_accuracy": 90.0 + seed, "routing_recall_at_2": 95.5}
        write_run(tmp_path / f"qkd/seed{seed}", inference_images_per_second=rate, **costs, **routed)
    costs |= {"passes_per_image": 1, "nll": 1.23456, "ece": 12.3, "ece_tempered": None}
    write_run(tmp_path / "simplecil/seed1", oracle_accuracy=None, **costs)
    write_run(tmp_path / "old/seed1", inference_images_per_second=20.0)
    table = write_results(tmp_path).read_text(encoding="utf-8")
    first, second = table.split("## Routing and cost")
    second, third = second.split("## Calibration")
    rows = [columns(line) for line in third.splitlines() if line.startswith("|")]
    assert rows[2:] == [["simplecil", "1", "1.235", "12.30", "–", "–"]]
    assert "| old |" in first and "| old |" not in second
    rows = [columns(line) for line in second.splitlines() if line.startswith("|")]
    names, (qkd, simplecil) = rows[0], rows[2:]
    shown = dict(zip(names, qkd, strict=True))
    assert shown["last accuracy, oracle routing"] == "91.50 ± 0.71"
    assert shown["ms per image"] == "62.5 ± 53.0"  # the mean of 100 and 25, not of rates
    assert shown["passes per image"] == "5.50" and shown["routing recall at 2"] == "95.50 ± 0.00"
    assert shown["kept per class, bytes"] == "3,072" and shown["kept in all, bytes"] == "2,000,000"
    shown = dict(zip(names, simplecil, strict=True))
    assert shown["last accuracy, oracle routing"] == shown["ms per image"] == "–"
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert "inference_milliseconds" not in results["methods"]["old"]


def test_runs_on_other_weights_or_data_are_named(tmp_path):
    for method, weights in (("qkd", "a"), ("ease", "a"), ("mos", "b")):
        folder = tmp_path / f"{method}/seed1"
        write_run(folder)
        environment = {"weights_fingerprint": weights, "data_fingerprint": "d"}
        (folder / "environment.json").write_text(json.dumps(environment))
    write_run(tmp_path / "old/seed1")  # did not record them
    table = write_results(tmp_path).read_text(encoding="utf-8")
    assert "**Not all runs have the same weights**; others than most: mos/seed1." in table
    assert "the same data" not in table


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_comparison_fits_the_console(tmp_path, width):
    from rich.console import Console

    for method, value in (("qkd", 80.0), ("coda_prompt", 90.0), ("left_out", 70.0)):
        for seed in (1, 2):
            write_run(tmp_path / f"{method}/seed{seed}", average_accuracy=value + seed, seed=seed)
    write_results(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(results, {"qkd", "coda_prompt"}, width))
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    rows = [line.split() for line in lines if "±" in line and "mean" not in line]
    assert [row[:5] for row in rows] == [
        ["coda_prompt", "2", "91.50", "±", "0.71"],
        ["qkd", "2", "81.50", "±", "0.71"],
    ]
    assert ("12.5" in "".join(lines)) == (width == 200)  # seconds: where there is room


def test_results_without_runs(tmp_path):
    table = write_results(tmp_path).read_text(encoding="utf-8")
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2
    with pytest.raises(DataError, match="expected an experiment's folder"):
        write_results(tmp_path / "nowhere")


@pytest.mark.parametrize("num_tasks", [3, 12])
def test_console_table_prints_every_stage_and_the_summary(tmp_path, num_tasks):
    from rich.console import Console

    correct, total = write_run(tmp_path / "run", num_tasks=num_tasks)
    summary = metrics.summarise(correct, total) | {"routing_accuracy": 61.234}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(summary, correct, total))
    text = console.export_text()
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*t\d+\s+\d", line)]
    assert [row[0] for row in rows] == [f"t{i}" for i in range(1, num_tasks + 1)]
    assert all(row[1] == "87.50" for row in rows)
    assert all(cell == "87.5" for row in rows for cell in row[2:])
    assert ("new" not in text) == (num_tasks <= 10) and "…" not in text
    assert "average 87.50   last 87.50   forgetting 0.00   routing 61.23" in text


def test_the_rim_needs_only_numpy_when_imported():
    """Plots and consoles are imported where they are used, and the trainer never is."""
    package = Path(report.__file__).parents[1]
    rooms = ("reports", "protocol", "settings")
    paths = [path for room in rooms for path in package.glob(f"{room}/*.py")]
    for path in [*paths, *(package / "runs" / f"{name}.py" for name in ("progress", "display"))]:
        found = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # the top level only
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module != "qkd_jax.runs.display":
                parts = node.module.split(".")
                found.add(".".join(parts[: 2 if parts[0] == "qkd_jax" else 1]))
        ours = {name for name in found if name.startswith("qkd_jax.")}
        allowed = {f"qkd_jax.{room}" for room in ("errors", "npz", "paths", *rooms)}
        assert ours <= allowed, path
        assert found - ours <= {"numpy"} | sys.stdlib_module_names, path


def test_the_headline_says_what_was_measured(tmp_path):
    """3 tasks of 8 images, one wrong in each: 87.5 %, with a standard error of 6.8 points."""
    write_run(tmp_path / "seed1", within_task_last_accuracy=95.5, oracle_accuracy=91.25)
    found = facts.headline_of(read_run(tmp_path / "seed1"))
    shown = [(number["text"], number["meaning"]) for number in found["numbers"]]
    assert shown == [
        ("87.5 %", "of 24 test images right after 3 tasks"),
        ("87.5 %", "right on average over the tasks"),
        ("0.0", "points forgotten of the best on older tasks"),
        ("100.0 %", "routed to the true task (chance: 33 %)"),
    ]
    words = " ".join(found["words"])
    assert "standard error of this share is 6.8 points" in words
    assert "95.5 % would be right: the rest of the mistakes (8.0 points) are between" in words
    assert "With the true task in the place of its own choice it would be right for 91.2 %" in words
    assert "1,189,632 numbers were trained for each task" in words
    assert facts.headline_of(read_run(tmp_path)) is None
    # Found by changing files at random: what a summary leaves open follows from the matrix.
    left_open = dict.fromkeys(("last_accuracy", "average_accuracy", "forgetting"))
    write_run(tmp_path / "seed2", **left_open)
    again = facts.headline_of(read_run(tmp_path / "seed2"))
    assert again["numbers"] == found["numbers"]


def test_what_was_forgotten_is_counted_from_the_best_until_then():
    nan = math.nan
    matrix = np.array([[50.0, nan, nan], [80.0, 90.0, nan], [70.0, 95.0, 60.0]])
    expected = [[0, nan, nan], [0, 0, nan], [10, 0, 0]]
    np.testing.assert_array_equal(facts.forgotten(matrix), expected)


def test_classes_and_confusions_name_what_went_wrong(tmp_path):
    """Image 0 of every even class is taken for the class after it, learned in the same task."""
    write_run(tmp_path / "seed1")
    names = ["ape", "bee", "cat", "dog", "eel", "fox"]
    run = read_run(tmp_path / "seed1")
    found = facts.class_rows(run, names)
    assert found["words"] == "Of 6 classes 3 are always named rightly and 0 never."
    first, *_, last = found["rows"]
    assert first[0] == "ape" and first[3] == {"value": 75.0, "text": "75.0"}
    assert first[4] == "bee (1)" and last[4] == ""
    confused = facts.confusion_rows(run, names)
    assert [(row[0], row[1], row[2]["value"], row[3]) for row in confused] == [
        ("ape", "bee", 1.0, "yes"), ("cat", "dog", 1.0, "yes"), ("eel", "fox", 1.0, "yes"),
    ]  # fmt: skip
    assert facts.confusion_rows(run, [])[0][0] == "class 0"


def test_seconds_of_a_task_that_two_sessions_made_are_not_told(tmp_path):
    write_run(tmp_path / "seed1")
    lines = [(0, 1.0), (0, 4.5), (1, 7.0), (1, 2.0), (1, 9.0), (2, 11.0)]
    (tmp_path / "seed1/metrics.jsonl").write_text(
        "".join(
            json.dumps({"task": t, "step": n, "images_seen": n, "wall_s": s}) + "\n"
            for n, (t, s) in enumerate(lines)
        )
    )
    assert facts.seconds_of_tasks(read_run(tmp_path / "seed1")) == {0: 3.5}


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (86.8, 97.5, [85, 90, 95, 100]),
        (0.0013, 0.0031, [0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035]),
        (5.0, 5.0, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low, high, expected):
    found = charts.nice_ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    if low < high:
        assert found == expected


def test_a_chart_puts_values_where_they_belong_and_leaves_gaps():
    chart = charts.line_chart("t", {"a": [0.0, 10.0, None, 5.0], "b": [math.nan]}, list("wxyz"))
    # The drawing is 720 x 300: 654 across from 52, 242 up from 256.
    assert chart.places == (52.0, 270.0, 488.0, 706.0)
    assert chart.lines[0].path == "M52 256L270 14M706 135h0"
    assert chart.lines[0].end == (706.0, 135.0)
    assert chart.lines[1].path == "" and chart.lines[1].end is None
    assert json.loads(chart.data)["lines"][0]["values"] == [0.0, 10.0, None, 5.0]
    assert charts.line_chart("t", {"a": [math.nan]}, ["w"]) is None


def test_the_page_of_a_comparison_has_teachers_and_students(tmp_path):
    teacher = {"average_accuracy": 90.0, "last_accuracy": 90.0, "accuracy_curve": [90.0] * 3}
    write_run(tmp_path / "toy/cdl/seed1", teacher=teacher, student="same")
    write_results(tmp_path / "toy")
    text = (tmp_path / "toy/report.html").read_text()
    section = text.split("<h2>Teachers and students</h2>")[1].split("</section>")[0]
    assert '<td>cdl</td><td class="number" data-value="1.0">1</td>' in section
    assert '<td class="number" data-value="90.0">90.00</td>' in section
    assert '<td class="number" data-value="">–</td>' in section  # no student learned alone


def test_the_page_of_a_comparison_ranks_those_that_can_be(tmp_path):
    """Two methods with the same images and seeds; one of another seed; a second stream."""
    for stream in ("toy", "more"):
        for method, seeds in (("a", (1, 2)), ("b", (1, 2)), ("c", (1,))):
            for seed in seeds:
                write_run(tmp_path / f"{stream}/{method}/seed{seed}", seed=seed)
        write_results(tmp_path / stream)
    text = (tmp_path / "more/report.html").read_text()
    assert "so not ranked: c." in text
    assert "Average accuracy over more, toy, with" in text
    assert "more than 1.39 apart (Nemenyi)." in text
    assert "Nemenyi" not in (tmp_path / "toy/report.html").read_text()  # of one stream
    assert "<td>a</td>" in text
    # Of one stream alone: two methods that are ranked, and the 12.5 % that both get wrong.
    assert re.search(r'data-value="87.5">87.5 \[[\d.]+, [\d.]+\]', text)
    assert "<td>c</td>" in text.split("<h2>Ranks")[0]


def test_a_large_matrix_is_drawn_cell_by_cell():
    """Every cell lies in exactly one rectangle, and its shade is nearest to its value."""
    matrix = np.random.default_rng(0).integers(0, 101, (40, 40)).astype(float)
    matrix[np.triu_indices(40, 1)] = np.nan
    drawn = charts.heat_map("t", matrix, "after task", "task", (0.0, 100.0), "")
    assert drawn.rows == () and drawn.size == 40 and drawn.ticks == (5, 10, 15, 20, 25, 30, 35, 40)
    found = np.full((40, 40), np.nan)
    for share, path in drawn.shades:
        for column, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            cells = found[int(row), int(column) : int(column) + int(width)]
            assert np.isnan(cells).all()
            cells[:] = 100 * share
    np.testing.assert_array_equal(np.isnan(found), np.isnan(matrix))
    assert np.nanmax(np.abs(found - matrix)) <= 50 / charts.SHADES


def test_a_page_of_a_hundred_tasks_is_small(tmp_path):
    write_run(tmp_path / "seed1", num_tasks=100)
    page = report.write_report(tmp_path / "seed1").read_text(encoding="utf-8")
    assert page.count('<svg class="shades') == 4 and len(page) < 400_000
