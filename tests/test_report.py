"""report.csv, what the page says of vectors, and eval.png: of evaluations that are made up."""

import base64
import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from evaluation import plots, report, summary
from evaluation.table import Measure, add_column
from interop.card import card
from interop.formats import Source
from steering.command_line import exit_code
from steering.files import read_json_lines, write_json
from steering.process import log, log_file
from steering.run_folder import trim_metrics
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
    report.write_report(tmp_path, runs)
    lines = lines_of(tmp_path)
    names = [Path(line["run"]).name for line in lines]
    assert names == ["high"] * 3 + ["low"] * 3 + ["new"] + ["nan"] * 3 + ["older"]
    conditions = [line["condition"] for line in lines[:3]]
    assert conditions == ["vanilla", "steered x1", "steered x1.2"]
    vanilla, as_trained, recommended = lines[3:6]
    assert vanilla["steered_minus"] == vanilla["minus_vanilla"] == "-0.2"
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
    assert report.read_entry(crashed).facts["flags"] == "failed"
    assert "norm" in report.read_entry(make_run(tmp_path / "new", final={})).facts["flags"]
    result = evaluation(0.2, flags=["collapse at x1", "NaN"])
    old = make_run(tmp_path / "old", result=result, final={}, code={"hook_model.py": "0"})
    assert report.read_entry(old).facts["flags"] == "collapse at x1; NaN; other code"


def test_table_of_a_sweep_has_the_held_out_nll_and_tells_runs_of_a_dataset_apart(tmp_path, capsys):
    first = make_run(tmp_path / "a", dataset="src__role__x", result=evaluation(0.2))
    second = make_run(tmp_path / "b", dataset="src__role__x", status="failed")
    report.print_table([report.read_entry(first).facts, report.read_entry(second).facts])
    _, evaluated, failed = capsys.readouterr().out.splitlines()
    assert evaluated.split()[0] == str(first)
    assert "3.5000" in evaluated and "3.0000" in evaluated
    assert failed.split()[0] == str(second) and failed.endswith("failed")


def test_layers_of_a_dataset_are_told_apart_in_the_table_of_a_sweep(tmp_path, capsys):
    runs = []
    for layer in ("layer1", "layer2"):  # as --layer 1 and --layer 2 leave them
        runs.append(make_run(tmp_path / layer / "src__role__x"))
    report.print_table([report.read_entry(run).facts for run in runs])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(run) for run in runs]


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("m__role__pirate", "pirate"),
        ("m__role__foo__bar", "foo__bar"),
        ("m__role__pirate+m__role__noir_detective", "pirate+noir_detective"),
        ("m__role__rock+roll+m__trait__evil", "rock+roll+evil"),
        ("a__b", "a__b"),
        ("imported.pt", "imported.pt"),
    ],
)
def test_short_name_of_a_run_is_its_whole_persona(dataset, name):
    assert report.short_names([{"dataset": dataset, "run": "runs/a"}]) == [name]


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
    assert "shouts" in heads and line.endswith(str(runs[1]))  # the first: of the largest gain
    assert line.startswith("src__role__poet") and " 3 " in line
    assert "0.467 (0.000)" in line  # the cosines are 0.6, 0.8 and 0
    assert "3.00 +- 1.414" in line  # shouts of the two that are evaluated
    report.write_report(tmp_path, runs[2:])
    assert page_of(tmp_path)["seeds"] == ""


def at_layer(folder, layer, persona, validation, points, probe_layer=2, spent=0.49, **record):
    """A run folder at a layer, evaluated by a probe, whose vector spends its KL budget at x1.6."""
    result = evaluation(0.1 * layer)
    result["config"] = {"kl_budget": 0.5, "probe_layer": probe_layer}
    found = {"scale": 1.0, "largest": 1.6, "kl_budget": 0.5, "chosen_on": "questions"}
    found["candidates"] = [
        {"scale": 1.0, "persona": 0.9, "kl": 0.2, "collapsed": False},
        {"scale": 1.6, "persona": validation, "kl": spent, "collapsed": False},
    ]
    result["recommended"] = found
    for name in ("probe", "kl", "kl_p95", "repeated"):
        add_column(result, Measure(name, "answers", "{:.2f}"), {})
    rows = {"vanilla": {"probe": 0.1, "nll": 4.0}}
    for scale, (kl, probe) in points.items():
        about = {"scale": scale, "kl": {"mean": kl, "low": None, "high": None, "n": 9}}
        more = {"probe": probe, "repeated": 0.2, "kl_p95": 2.5, "nll": 4.0 - kl - 0.1 * layer}
        rows[f"steered x{scale:g}"] = about | more
    rows["vanilla"] |= result["conditions"]["vanilla"]
    result["conditions"] = rows
    args = {"model": "org/m", "layer": layer}
    folder = folder / f"layer{layer}" / persona
    record = {"args": args, "dataset": f"src__role__{persona}", **record}
    return make_run(folder, result=result, **record)


def test_layers_are_compared_where_they_spend_the_same_budget(tmp_path, capsys):
    runs = []
    for i, persona in enumerate(("a", "b", "c", "d")):
        low = {1.0: (0.25, 0.3), 1.6: (0.5, 0.5 + 0.01 * i)}
        high = {1.0: (0.25, 0.5), 1.6: (0.5, 0.7 - 0.01 * i)}
        runs.append(at_layer(tmp_path, 4, persona, 0.4, low))
        runs.append(at_layer(tmp_path, 9, persona, 0.6, high))
        runs.append(at_layer(tmp_path, 12, persona, 0.5, {**high, 1.6: (0.5, 0.625 + 0.03 * i)}))
    runs.append(at_layer(tmp_path, 4, "alone", 0.0, {1.6: (0.5, 0.0)}))  # of one layer only
    report.write_report(tmp_path, runs)
    (found,) = page_of(tmp_path)["layers"]
    assert found["title"] == "Layers of org/m, 4 personas"
    printed = capsys.readouterr().out
    _, heads, *rows = found["text"].splitlines()
    assert all(line in printed for line in rows)
    table = {row.split()[0]: dict(zip(heads.split(), row.split(), strict=True)) for row in rows[:3]}
    assert table["4"] == {
        "layer": "4", "chosen_on": "0.400", "persona": "0.515", "kl": "0.50", "kl_p95": "2.50",
        "nll_gain": "+0.900", "repeated": "0.20", "won": "0%",
    }  # fmt: skip
    assert table["9"]["won"] == "50%" and table["12"]["won"] == "50%"

    # Chosen by validation, and compared with the others on held-out answers, paired by persona.
    assert "questions: layer 9" in rows[3]
    first, second, left_out = rows[4:]
    assert left_out.startswith("Left out (1), such as src__role__alone")
    # Student's t of 3 degrees of freedom; this jackknife divides by 3 where a mean's error has 4.
    half = 3.182 * np.std([0.2, 0.18, 0.16, 0.14], ddof=1) / math.sqrt(3)
    mean, low, high, gain, *_ = map(float, re.findall(r"[-+][\d.]+", first))
    assert mean == pytest.approx(0.17, abs=1e-3) and gain == 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.02)
    assert "no difference" in second and "no difference" not in first

    curves = dict(found["lines"])
    assert list(curves) == ["4", "9", "12"]
    assert curves["9"][0] == [0.0, 0.1] and curves["9"][-1] == pytest.approx([0.5, 0.685])
    kl, persona = curves["9"][3]  # a quarter of the way, in the middle of the first stretch
    assert (kl, persona) == pytest.approx((0.125, 0.3))


def test_layers_are_not_compared_by_probes_of_their_own_or_where_personas_differ(tmp_path):
    points = {1.6: (0.5, 0.5)}
    runs = []
    for layer in (1, 2):
        runs.append(at_layer(tmp_path / "own", layer, "a", 0.5, points, probe_layer=None))
    report.write_report(tmp_path, runs)
    (found,) = page_of(tmp_path)["layers"]
    assert "--probe-layer K" in found["text"] and not found["lines"]
    others = [at_layer(tmp_path / "other", i, f"p{i}", 0.5, points) for i in (1, 2)]
    report.write_report(tmp_path, others)
    (found,) = page_of(tmp_path)["layers"]
    assert found["text"].startswith("Left out (2), such as src__role__p1")
    others.append(make_run(tmp_path / "bare", result=evaluation(0.2)))
    for layer in (1, 2):  # where vanilla's answers were all empty, the probe had none to score
        silent = at_layer(tmp_path / "silent", layer, "a", 0.5, points)
        result = json.loads((silent / "eval.json").read_text())
        del result["conditions"]["vanilla"]["probe"]
        write_json(silent / "eval.json", result)
        others.append(silent)
    weak = {"a": 0.2, "b": 0.48}  # a's vector does not spend the budget at any scale
    for persona, spent in weak.items():
        others.append(at_layer(tmp_path / "weak", 1, persona, 0.5, points, spent=spent))
        others.append(at_layer(tmp_path / "weak", 2, persona, 0.5, points))
    report.write_report(tmp_path, others)
    (found,) = page_of(tmp_path)["layers"]
    assert found["title"] == "Layers of org/m, 1 personas"
    assert found["text"].splitlines()[-1].startswith("Left out (3), such as src__role__a")


def test_layers_of_other_settings_and_imported_vectors_are_not_compared(tmp_path):
    points = {1.6: (0.5, 0.5)}
    runs = [
        at_layer(tmp_path / "one", 1, "a", 0.5, points),
        at_layer(tmp_path / "lr", 2, "a", 0.5, points, config={"seed": 0, "lr": 1.0}),
        at_layer(tmp_path / "blend", 3, "a", 0.5, points, status="imported"),
    ]
    report.write_report(tmp_path, runs)
    assert page_of(tmp_path)["layers"] == []
    runs.append(at_layer(tmp_path / "two", 2, "a", 0.7, points))
    report.write_report(tmp_path, runs)
    (found,) = page_of(tmp_path)["layers"]
    assert list(dict(found["lines"])) == ["1", "2"] and "layer 2" in found["text"]


def test_layers_are_compared_seed_by_seed_and_seeds_are_no_more_personas(tmp_path):
    runs = []
    for seed in range(4):
        config = {"seed": seed, "lr": "auto"}
        for layer in (1, 2):
            points = {1.6: (0.5, 0.3 * layer + 0.05 * seed)}
            folder = tmp_path / f"s{seed}"
            runs.append(at_layer(folder, layer, "a", 0.1 * layer, points, config=config))
    runs.append(at_layer(tmp_path / "s4", 1, "a", 0.9, points, config={"seed": 4, "lr": "auto"}))
    report.write_report(tmp_path, runs)
    (found,) = page_of(tmp_path)["layers"]
    assert found["title"].endswith(", 1 personas")
    rows = [line.split() for line in found["text"].splitlines()[2:4]]
    assert [row[:3] for row in rows] == [["1", "0.100", "0.375"], ["2", "0.200", "0.675"]]
    assert "persona +0.300 (no interval of less than 4 personas)" in found["text"]


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
    assert heat["lost"] == [0, 1] and heat["title"] == "Specificity, org/m, layer 3"
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
    why = "KeyError('flags')"
    if broken == "evaluation":
        del result["flags"]
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        why = "it needs matplotlib (pip install matplotlib): "
    assert plots.plot_run(tmp_path / "eval.png", result, tmp_path / "none") == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"no eval.png: {why}")
    assert not (tmp_path / "eval.png").exists()


def test_numbers_of_a_heat_map_are_as_exact_as_the_page_shows_them():
    matrix = np.array([[1.0, -0.237], [math.nan, 0.918]])
    heat = report.heat_map("Title", "Note", ["a", "b"], matrix)
    again = np.frombuffer(base64.b64decode(heat["cells"]), "<f2").reshape(2, 2)
    assert again == pytest.approx(matrix, abs=0.0005, nan_ok=True)


# ---------------------------------------------------------------- text is no markup

HOSTILE = [
    "a\r# heading",
    "a\u2028# heading\x0b# heading\x0c# heading\x85# heading",
    "![t](http://x.example/pixel) [t](http://x.example) <http://x.example>",
    "<img src=x>\n<b>b</b> &amp; R&D",
    "~~~\n````\n```\n# heading",
    "- item\n1. item\n> quote\n| a | b |\n|---|---|\n| 1 | 2 |",
    "*a* **b** __c__ _d_ ~~e~~ `f` ``g`` \\\\* $h$ C #",
    "[r]: http://x.example\n[r]",
    "    code\n***\ntitle\n=====",
    "",
]


def markdown(text):
    """(Types of what a page of Markdown holds, [its blocks of code], [its lines of text])."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    kinds = set()
    blocks = []
    lines = []
    for token in parser.enable(["table", "strikethrough"]).parse(text):
        kinds.add(token.type)
        if token.type == "fence":
            blocks.append(token.content)
        if token.type == "inline":
            kinds.update(child.type for child in token.children)
            lines.append("".join(child.content for child in token.children))
    return kinds, blocks, lines


def evaluated_with(texts, **more):
    """An evaluation in which all that comes from elsewhere is one of these texts."""
    samples = []
    for text in texts:
        answers = {"vanilla": text, "steered x1": text}
        samples.append({"question": text, "system_prompt": text, "answers": answers})
    result = evaluation(0.2, samples=samples, flags=["loses a|b `c`", *texts[2:]], **more)
    result["prompts"] = {"prompt 1": texts[0]}
    result["config"] = {"max_new_tokens": 9}
    return result


def as_code(text):
    return "".join(f"{line}\n" for line in text.splitlines() or [""])


def one_line(text):
    return " ".join(text.split())


def test_nothing_of_an_answer_is_markup_in_samples(tmp_path, capsys):
    result = evaluated_with(HOSTILE, dataset="R&D_x_ `a` |b| <i>")
    summary.write_evaluation(tmp_path, result)
    text = (tmp_path / "samples.md").read_bytes().decode()
    assert not any(end in text for end in "\r\x0b\x0c\x85\u2028")
    kinds, blocks, lines = markdown(text)
    headings = {"heading_open", "heading_close"}
    strong = {"strong_open", "strong_close"}  # of a condition's name
    paragraphs = {"paragraph_open", "paragraph_close"}
    assert kinds <= headings | strong | paragraphs | {"fence", "inline", "text", "text_special"}
    tables, prompt, *others = blocks
    assert "steered_minus" in tables and "```" in tables
    assert prompt == as_code(HOSTILE[0])
    assert others == [as_code(text) for text in HOSTILE for _ in range(3)]
    assert lines[0] == "R&D_x_ `a` |b| <i>"
    assert [one_line(text) for text in HOSTILE if text] == [
        line for line in lines[2:] if line not in ("persona prompt:", "vanilla", "steered x1", "")
    ]
    said = capsys.readouterr().out  # is no Markdown
    assert f"## {HOSTILE[0]}\n" in said and "R&D_x_ `a` |b| <i>" in said


def test_nothing_of_a_run_is_markup_in_its_card():
    dataset = "src__role__R&D _a_ |b `c` <i> C #"
    result = evaluated_with(HOSTILE, dataset=dataset)
    result["measures"]["shouts"]["about"] = "![t](http://x.example) a|b"
    metadata = {"model": "/my|models/R&D_`x`", "model_type": "llama", "model_is_local": True}
    record = {
        "dataset": dataset,
        "args": {"role_min_score": 3, "seed": 0},
        "counts": {"summary": "9 of 9 | rows", "train": 9},
        "final": {"steps": 1, "best_step": 1, "label_tokens": 9, "lr": 1.0, "ratio": 0.3},
    }
    metadata |= {"layer": 1, "dataset": dataset}
    source = Source(Path("x"), torch.ones(2), metadata, record=record, result=result)
    text = card(source, [], ["layer_1.pt"], "pirate").split("---\n", 2)[2]
    kinds, blocks, lines = markdown(text)
    assert not [kind for kind in kinds if kind.startswith(("image", "html", "link", "em_", "s_"))]
    assert lines[0] == f"Steering vector: {dataset}"
    assert "/my|models/R&D_`x` (llama), frozen" in lines
    assert f"{dataset}: 9 of 9 | rows" in lines
    assert "shouts: ![t](http://x.example) a|b" in lines
    assert blocks[1:] == [as_code(HOSTILE[0])] * 3


# ---------------------------------------------------------------- lines of JSON


def test_lines_that_are_no_objects_are_passed_over_by_all_who_read_them(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 3.0, "note": "a\u2028b\x85c"}'.encode(),
        b"12",
        b"[1]",
        b"null",
        b'"step"',
        b"\0\0\0",
        '{"step": 2, "note": "\u00e9'.encode()[:-1],  # torn within a letter
        b'{"step": 3, "loss": 2.0}\r',
        b'{"step": 4, "lo',
    ]
    metrics.write_bytes(b"\n".join(lines))
    rows = read_json_lines(metrics)
    assert [row["step"] for row in rows] == [1, 3]
    assert rows[0]["note"] == "a\u2028b\x85c"
    assert read_json_lines(tmp_path / "none") == []

    run = make_run(tmp_path / "run", result=evaluation(0.2))
    (run / "metrics.jsonl").write_bytes(metrics.read_bytes())
    report.write_report(tmp_path, [run])
    assert '"loss":[[1,3.0],[3,2.0]' in (tmp_path / "report.html").read_text()
    assert plots.plot_run(tmp_path / "eval.png", evaluation(0.2), metrics) == ["eval.png"]
    trim_metrics(metrics, 2)
    assert [row["step"] for row in read_json_lines(metrics)] == [1]


def test_an_evaluation_is_read_if_this_version_wrote_it(tmp_path):
    path = tmp_path / "eval.json"
    assert report.read_result(path) == {}
    for text in ('{"conditions": {', "[1]", '{"likelihood": {}}'):
        path.write_text(text)
        assert report.read_result(path) == {}
    result = evaluation(0.2)
    write_json(path, result)
    assert report.read_result(path) == result
    del result["flags"]  # it is still going on
    write_json(path, result)
    assert report.read_result(path) == result | {"flags": []}


# ---------------------------------------------------------------- what a console cannot show


def piped(code, **env):
    """stdout, as bytes, of a script whose `run` is this code; stdin is "a\\xffb"."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    script = "import sys\nfrom steering.command_line import exit_code\ndef run():\n"
    script += f"{lines}    return 0\nsys.exit(exit_code(run))\n"
    found = subprocess.run(
        [sys.executable, "-c", script], input=b"a\xffb\n", capture_output=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_an_emoji_on_a_console_that_has_none_does_not_stop_a_script():
    shown = piped(r"print('caf\xe9 \U0001f600')", PYTHONIOENCODING="latin-1")
    assert shown == b"caf\xe9 \\U0001f600\n"
    code = r"from steering.process import log, start_logging" + "\n"
    code += r"start_logging(); log.info('\U0001f600'); log.info('on')"
    assert piped(code, PYTHONIOENCODING="ascii") == b"\\U0001f600\non\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8:surrogateescape"])
def test_bytes_on_stdin_that_are_no_text_are_replaced(encoding):
    assert piped("print(ascii(input()))", PYTHONIOENCODING=encoding) == b"'a\\ufffdb'\n"


def test_a_script_runs_where_a_notebook_has_put_its_own_streams(monkeypatch):
    for stream in ("stdin", "stdout"):
        for other in (io.StringIO(), None):
            monkeypatch.setattr(sys, stream, other)
            assert exit_code(lambda: 5) == 5


def test_names_of_folders_that_are_no_text_stop_neither_log_nor_report(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "propagate", False)  # pytest could not pass such text on
    with log_file(tmp_path / "train.log"):
        log.warning("caf\udce9")
    assert (tmp_path / "train.log").read_text() == "caf\\udce9\n"
    report.write_report(tmp_path, [make_run(tmp_path / "caf\udce9", dataset="src__role__x")])
    (line,) = lines_of(tmp_path)
    assert line["run"].endswith("caf\\udce9")
