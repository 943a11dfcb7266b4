"""report.csv, what the page says of vectors, and eval.png: of evaluations that are made up."""

import base64
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import plots, report
from evaluation.table import Measure, add_column
from steering.files import write_json
from steering.vector_file import VECTOR_FILE, save_vector

SHOUTS = Measure("shouts", "answers", "{:.2f}", "signs", "lower")


def evaluation(gain, **more):
    """An eval.json whose vector lowers vanilla's NLL by `gain`, with a measure of no output's."""
    result = {
        "dataset": "src__role__$5_or_$6",
        "measures": {},
        "conditions": {"vanilla": {}, "steered x1": {"scale": 1.0}, "steered x1.2": {"scale": 1.2}},
        "heldout": {"rows": 12, "questions": 9},
        "recommended": {"scale": 1.2, "kl_budget": 1, "chosen_on": "questions", "candidates": []},
        "probe": {"withheld": "too few rows"},
        "missing": {},
        "recovered_undefined": None,
        "samples": [],
        "identity": [],
        "flags": [],
    }
    paired = {"mean": -gain, "low": -gain - 0.1, "high": -gain + 0.1, "n": 9}
    add_column(result, Measure("steered_minus", "likelihood", "{:+.3f}"), {"vanilla": paired})
    add_column(result, Measure("nll", "likelihood", "{:.4f}"), {"steered x1": 3.0})
    add_column(result, SHOUTS, {"vanilla": 0.25, "steered x1.2": 10 * gain})
    return result | more


def make_run(folder, seed=0, vector=None, result=None, **record):
    """A run folder; returns it."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "lr": "auto"}
    final = {"ratio": 0.3, "best_val": 3.5}
    record = {"dataset": f"src__role__{folder.name}", "config": config, "final": final, **record}
    write_json(folder / "run.json", {"status": "done", **record})
    if result is not None:
        write_json(folder / "eval.json", result)
    if vector is not None:
        save_vector(folder / VECTOR_FILE, torch.tensor(vector), {})
    return folder


def lines_of(folder):
    with open(folder / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def page_of(folder):
    """The data of the page's table."""
    page = (folder / "report.html").read_text()
    text = page.split('id="index">')[1].split("</script>")[0]
    return json.loads(text)


def test_csv_has_a_line_for_each_run_and_condition_the_largest_gain_first(tmp_path):
    runs = [
        make_run(tmp_path / "new"),
        make_run(tmp_path / "nan", result=evaluation(math.nan)),
        make_run(tmp_path / "low", result=evaluation(0.2)),
        make_run(tmp_path / "older", result={"likelihood": {"steered": {"nll": 1.0}}}),
        make_run(tmp_path / "high", result=evaluation(0.9)),
    ]
    assert report.write_report(tmp_path, runs) == ["report.csv", "report.html"]
    lines = lines_of(tmp_path)
    names = [Path(line["run"]).name for line in lines]
    assert names == ["high"] * 3 + ["low"] * 3 + ["new"] + ["nan"] * 3 + ["older"]
    conditions = [line["condition"] for line in lines[:3]]
    assert conditions == ["vanilla", "steered x1", "steered x1.2"]
    vanilla, as_trained, recommended = lines[3:6]
    assert vanilla["steered_minus"] == vanilla["nll_gain"] == "-0.2"
    assert float(vanilla["steered_minus_low"]) == pytest.approx(-0.3)
    assert float(vanilla["steered_minus_high"]) == pytest.approx(-0.1)
    assert [line["shouts"] for line in lines[3:6]] == ["0.25", "", "2.0"]
    assert "shouts_low" not in vanilla  # no run has an interval of it
    assert [line["scale"] for line in lines[3:6]] == ["", "1.0", "1.2"]
    assert recommended["recommended"] == "True"
    assert vanilla["recommended"] == as_trained["recommended"] == "False"
    assert lines[6]["condition"] == lines[-1]["condition"] == lines[-1]["nll"] == ""


def test_flags_name_the_status_the_evaluation_and_the_code(tmp_path):
    crashed = make_run(tmp_path / "crashed", status="failed", final={})
    assert report.report_row(crashed)["flags"] == "failed"
    assert "norm" in report.report_row(make_run(tmp_path / "new", final={}))["flags"]
    result = evaluation(0.2, flags=["collapse at x1", "NaN"])
    old = make_run(tmp_path / "old", result=result, final={}, code={"hook_model.py": "0"})
    assert report.report_row(old)["flags"] == "collapse at x1; NaN; other code"


def test_table_of_a_sweep_has_the_held_out_nll_and_tells_runs_of_a_dataset_apart(tmp_path, capsys):
    first = make_run(tmp_path / "a", dataset="src__role__x", result=evaluation(0.2))
    second = make_run(tmp_path / "b", dataset="src__role__x", status="failed")
    report.print_table([report.report_row(first), report.report_row(second)])
    _, evaluated, failed = capsys.readouterr().out.splitlines()
    assert evaluated.split()[0] == "src__role__x/a"
    assert "3.5000" in evaluated and "3.0000" in evaluated
    assert failed.split()[0] == "src__role__x/b" and failed.endswith("failed")


def test_names_are_as_long_as_they_must_be_to_differ():
    def names(*runs):
        return report.short_names([{"dataset": "m__role__poet", "run": run} for run in runs])

    assert names("m/layer1/a") == ["poet"]
    assert names("m/layer1/a", "m/layer2/a") == ["layer1/a", "layer2/a"]
    assert names("m/layer1/a", "n/layer1/a") == ["m/layer1/a", "n/layer1/a"]


def test_runs_that_differ_in_their_seed_alone_are_compared(tmp_path):
    same = {"dataset": "src__role__poet"}
    runs = [
        make_run(tmp_path / "s0", 0, [1.0, 0.0], evaluation(0.2), **same),
        make_run(tmp_path / "s1", 1, [0.6, 0.8], evaluation(0.4), **same),
        make_run(tmp_path / "s2", 2, [0.0, 1.0], **same),
        make_run(tmp_path / "other", config={"seed": 5, "lr": 1.0}, vector=[1.0, 1.0]),
    ]
    report.write_report(tmp_path, runs)
    _, heads, line = page_of(tmp_path)["seeds"].splitlines()
    assert "shouts" in heads
    assert line.startswith("src__role__poet") and " 3 " in line
    assert "0.467 (0.000)" in line  # the cosines are 0.6, 0.8 and 0
    assert "3.00 +- 1.414" in line  # shouts of the two that are evaluated
    report.write_report(tmp_path, runs[2:])
    assert page_of(tmp_path)["seeds"] == ""


def test_cosines_say_who_is_alike_and_leave_out_what_has_no_direction(tmp_path):
    vectors = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 3.0], "zero": [0.0, 0.0]}
    runs = [make_run(tmp_path / name, vector=vector) for name, vector in vectors.items()]
    report.write_report(tmp_path, [*runs, make_run(tmp_path / "none")])
    (heat,) = page_of(tmp_path)["heat"]
    assert heat["names"] == ["a", "b", "c"]
    assert "mean 0.47, lowest 0.00 (a and c), highest 0.80 (b and c)" in heat["note"]


def test_specificity_marks_the_diagonals_that_are_not_the_best_and_nan_never_is():
    nll = [[3.0, 4.0, 2.0], [2.5, math.nan, math.nan], [math.nan, 1.0, 1.5]]
    about = {"model": "org/m", "layer": 3, "names": ["a", "b", "c"], "vanilla": [4.0, 4.0, 4.0]}
    heat = report.specificity_map(about | {"nll": nll})
    assert heat["lost"] == [0, 1] and heat["title"] == "Specificity, m, layer 3"
    assert "1 of 3" in heat["note"]
    assert "not a (better by b), b (better by c)" in heat["note"]


def panels_of(result, steps=()):
    """{measure: axis} of eval.png; and of the losses, "training"."""
    figure = plots.draw(result, steps)
    return {axis.get_title().split("\n")[0]: axis for axis in figure.axes}


def test_picture_has_a_panel_for_each_measure_of_two_conditions(tmp_path):
    result = evaluation(0.2)
    result["conditions"]["vanilla"]["nll"] = {"mean": 3.5, "low": 3.25, "high": 3.75, "n": 9}
    result["conditions"]["steered x1"]["steered_minus"] = math.nan
    steps = [{"step": 0, "val_loss": 4.0}, {"step": 1, "loss": 3.0}]
    panels = panels_of(result, steps)
    assert panels.keys() == {"nll", "shouts", "training"}  # steered_minus has one number
    assert panels["shouts"].get_title() == "shouts\nsigns (lower is better)"
    drawn = [line.get_xydata().tolist() for line in panels["nll"].lines]
    assert [[3.5, 0.0]] in drawn and [[3.25, 0.0], [3.75, 0.0]] in drawn and [[3.0, 1.0]] in drawn
    drawn = [line.get_xydata().tolist() for line in panels["training"].lines]
    assert drawn == [[[1.0, 3.0]], [[0.0, 4.0]]]
    colors = [
        {line.get_color() for line in panels[name].lines if line.get_ydata()[0] == 0}
        for name in ("nll", "shouts")
    ]
    assert colors[0] == colors[1] and len(colors[0]) == 1

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')  # as a kill leaves it
    assert plots.plot_run(tmp_path / "eval.png", result, metrics) == ["eval.png"]
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("broken", ["evaluation", "matplotlib"])
def test_a_picture_that_fails_is_said_in_a_line(broken, tmp_path, monkeypatch, capsys):
    result = evaluation(0.2)
    if broken == "evaluation":
        del result["flags"]
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.plot_run(tmp_path / "eval.png", result, tmp_path / "none") == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no eval.png: it needs matplotlib (pip install matplotlib): ")
    assert not (tmp_path / "eval.png").exists()


def test_numbers_of_a_heat_map_are_as_exact_as_the_page_shows_them():
    matrix = np.array([[1.0, -0.237], [math.nan, 0.918]])
    heat = report.heat_map("Title", "Note", ["a", "b"], matrix)
    again = np.frombuffer(base64.b64decode(heat["cells"]), "<f2").reshape(2, 2)
    assert again == pytest.approx(matrix, abs=0.0005, nan_ok=True)
