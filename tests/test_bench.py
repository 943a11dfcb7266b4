"""bench/: the scripts run, and say what they claim to say."""

import itertools
import json
import re
import shutil
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, persona_rows, write_raw

sys.path.insert(0, str(ROOT / "bench"))
import bench_gpu
import dialect
import layers
import peers
import sweep

import bench
import eval_steering
from data_filter import DataOptions, filter_dataset, split_dataset
from evaluation.table import number_at
from hook_model import load_chat
from steering.files import read_json, write_json
from steering.finished import read_run
from steering.vector_file import VECTOR_FILE, load_vector, save_vector


@pytest.fixture(autouse=True)
def restore_the_learning_rate(monkeypatch):
    monkeypatch.setattr(sweep.train_steering, "AUTO_LR", 0.05)  # which a plan's lines set


def test_gpu_bench_prints_the_median_step_without_the_first_and_its_tokens_a_second(
    monkeypatch, capsys
):
    # Starts and ends of four steps in turns: the first one takes 100 s, the others 1, 2 and 9 s.
    clock = itertools.cycle([0, 100, 0, 1, 0, 2, 0, 9])
    fake_time = types.SimpleNamespace(perf_counter=clock.__next__, strftime=time.strftime)
    monkeypatch.setattr(bench_gpu, "matmul_rate", lambda *arguments: 1e12)
    monkeypatch.setattr(bench_gpu, "time", fake_time)
    flags = ["--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--steps", "3"]
    bench_gpu.main([*flags, "--rows", "4", "--length", "24", "--micro-batch-tokens", "48", "96"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("fp32 on cpu, torch") and first.endswith("matrix products 1.00 TFLOP/s")
    table = [line.split("|")[1:] for line in lines if line.startswith("| tiny")]
    assert [[cell.strip() for cell in row[1:6]] for row in table] == [
        ["full", "4", "48", "2.000", "48"], ["full", "4", "96", "2.000", "48"],
        ["cached", "4", "48", "2.000", "48"], ["cached", "4", "96", "2.000", "48"],
    ]  # fmt: skip


def test_bench_reports_our_steps_and_what_they_and_the_cache_take(
    data_root, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(bench, "ROWS_PER_MICRO_BATCH", 1)
    monkeypatch.setattr(bench, "ACCUMULATION", 1)
    flags = ["--model", tiny_folder, "--data-root", data_root, "--dtype", "fp32"]
    flags += ["--dataset", "src__role__pirate", "--layer", "1", "--epochs", "2"]
    for variant in ("ours", "cache off"):
        bench.main([*flags, "--variant", variant, "--report", str(tmp_path / f"{variant}.json")])
        (record,) = (tmp_path / "run").rglob("run.json")
        final = json.loads(record.read_text())["final"]
        lines = (record.parent / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        report = json.loads((tmp_path / f"{variant}.json").read_text())
        assert report["losses"] == [row["loss"] for row in rows] and len(rows) == final["steps"]
        prefix = report["seconds"] - sum(row["seconds"] for row in rows)
        assert prefix == pytest.approx(final["prefix_seconds"])
        assert report["tokens"] == sum(row["tokens"] for row in rows)
        assert report["first_step"] == rows[0]["time"]
        record.parent.rename(tmp_path / f"kept {variant}")
    bench.main([*flags, "--variant", "memory", "--report", str(tmp_path / "memory.json")])
    sizes = json.loads((tmp_path / "memory.json").read_text())
    cached = report["tokens"] / 2 * 32 * 4 / 2**30  # of each token of an epoch, fp32 states
    assert sizes["cache"] == pytest.approx(cached)
    assert sizes["weights"] == pytest.approx(3_176_736 * 4 / 2**30)
    # Either holds the logits of 50 label tokens at least, of a vocabulary of 49,152.
    logits = 50 * 49_152 * 4 / 2**30
    assert sizes["micro-batch"] > logits and sizes["cached epoch"] > sizes["cache"] + logits


@pytest.mark.full
def test_all_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path, capsys):
    flags = ["--all", "--shape", "tiny", "--device", "cpu", "--steps", "1", "--rows", "2", "4"]
    assert bench_gpu.main([*flags, "--length", "64", "--out", str(tmp_path / "all.json")]) == 0
    said = capsys.readouterr().out
    assert "7 of 7 checks passed" in said and "FAILED" not in said
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["path"] for row in found["steps"]] == [
        "full", "cached", "full", "cached", "checkpointing", "compiled"
    ]  # fmt: skip
    assert len(found["profile"]) == 10
    assert isinstance(found["attention"]["MATH"], float)  # of a kernel that fails, the error


def test_gpu_benchmark_notices_a_model_that_computes_something_else(monkeypatch):
    assert bench_gpu.compare_architecture("Llama", "cpu")["ok"]
    real = bench_gpu.SteerModel.set_vector
    seen = []

    def other(self, vector):  # on the device under test, twice the vector
        seen.append(vector)
        real(self, vector * len(seen))

    monkeypatch.setattr(bench_gpu.SteerModel, "set_vector", other)
    assert not bench_gpu.compare_architecture("Llama", "cpu")["ok"]


@pytest.fixture
def plan(tiny_folder, data_root, tmp_path):
    """A plan of two runs on the tiny model, of which one trains on few rows."""
    path = tmp_path / "plan.txt"
    model = f"--model {tiny_folder} --layer 1 --dataset src__role__pirate --device cpu"
    lines = [
        f"all | --data-root {data_root} --dtype fp32 {model}",
        "few | 0.5 --target-tokens 200 --num-epochs 1",
        "# no run | 0.1",
        "all-rows | 0.1 --num-epochs 1 --seed 3",
    ]
    path.write_text("\n".join(lines))
    return path


def test_sweep_scores_every_run_on_the_same_rows_of_questions_that_none_trained_on(
    plan, tmp_path, monkeypatch
):
    out = tmp_path / "runs"
    scored = []
    real = sweep.nll_under

    def spy(model, rows, limit):
        scored.append([row.row["question"] for row in rows])
        return real(model, rows, limit)

    monkeypatch.setattr(sweep, "nll_under", spy)
    sweep.run_plan(plan, out)
    assert len(scored) == 2 and scored[0] == scored[1] and len(scored[0]) >= 2
    for path in out.rglob("run.json"):
        run = read_run(path.parent)
        options = DataOptions.of(run.args)
        chat = load_chat(run.args["model"])
        splits = split_dataset(run.dataset, options.datasets(), chat, options, 10_000)
        others = {example.row["question"] for example in [*splits.train, *splits.heldout]}
        assert len(others) >= 2 and others.isdisjoint(scored[0])
    sweep.run_plan(plan, out)
    assert len(scored) == 2  # what is there is not done again


def test_table_of_a_sweep_shows_the_best_run_first_and_shares_of_its_gain(plan, tmp_path, capsys):
    out = tmp_path / "runs"
    sweep.run_plan(plan, out)
    paths = {path.parent.name: path for path in out.rglob("choice.json")}
    assert {*paths} == {"few", "all-rows"}
    for best, worse in (("few", "all-rows"), ("all-rows", "few")):
        write_json(paths[best], {"nll": 2.0, "vanilla": 4.0})
        write_json(paths[worse], {"nll": 3.0, "vanilla": 4.0})
        capsys.readouterr()
        sweep.print_table(out)
        table = capsys.readouterr().out.split("|---|\n")[-1]
        rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
        assert [(row[1], row[6], row[7]) for row in rows] == [
            (best, "2.0000", "1.000"), (worse, "3.0000", "0.500")
        ]  # fmt: skip


def test_methods_are_compared_at_the_same_divergence_and_by_words_of_the_persona(
    trained, finished, tmp_path, monkeypatch, capsys
):
    jobs = []

    def fit(tool, python, job, folder, *more):
        jobs.append(job)
        return torch.randn(32, generator=torch.Generator().manual_seed(len(tool))), 7.0

    monkeypatch.setattr(peers, "fit_with", fit)
    monkeypatch.setattr(peers, "LEVELS", (0.001, 0.002))
    other = shutil.copytree(finished, trained / "other" / finished.name)  # as of another seed
    vector, header = load_vector(other / VECTOR_FILE)
    save_vector(other / VECTOR_FILE, 3 * vector, header)
    flags = ["--run", str(finished), str(other), "--out", str(tmp_path), "--num-samples", "3"]
    flags += ["--max-new-tokens", "5"]
    peers.main(flags)
    (path,) = tmp_path.glob("*.result.json")
    methods = json.loads(path.read_text())["methods"]
    names = {
        "vanilla",
        "trained",
        "mean difference",
        *peers.PEERS,
        "prompted",
        "few_shot",
        "dataset",
    }
    assert {*methods} == names
    first, second = methods["trained"][:2], methods["trained"][2:]
    for one, two in zip(first, second, strict=True):  # three times the vector is the same one here
        assert one["kl"] == pytest.approx(two["kl"], rel=0.06)
    for each in (first, second, methods["mean difference"], *map(methods.get, peers.PEERS)):
        low, high = each
        assert (low["level"], high["level"]) == ("0.001", "0.002")
        assert 1.5 < high["kl"] / low["kl"] < 2.6  # on held-out rows, where it was not fitted
    assert methods["vanilla"][0]["nll_gain"] == 0.0 and methods["vanilla"][0]["kl"] is None
    assert methods["dataset"][0]["lexicon"] > 0.05 > methods["vanilla"][0]["lexicon"]

    # Other tools get the rows that we train on, each beside the plain row of its question.
    assert len(jobs) == 2 and jobs[0]["layer"] == 1
    numbers = []
    for persona, plain in jobs[0]["pairs"]:
        assert persona.endswith("Arr!") and "Be a pirate" not in persona
        both = [re.search(r"Question number (\d+)\?", text)[1] for text in (persona, plain)]
        assert plain.endswith(f"It is {both[1]}.")
        numbers.append(both)
    with_plain = {number for _, number in numbers}
    same = [ours == theirs for ours, theirs in numbers if ours in with_plain]
    assert all(same) and len(same) >= len(numbers) // 2
    table = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| 0.002 | repeng |") and line.endswith("| 7 |") for line in table)
    peers.main(flags)  # what is there is not done again
    assert len(jobs) == 2


def test_layers_are_compared_at_the_scale_and_on_the_rows_of_an_evaluation(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(layers, "BUDGET", 0.001)
    flags = ["--model", tiny_folder, "--data-root", data_root, "--dtype", "fp32"]
    flags += ["--dataset", "src__role__pirate", "--max-steps", "2", "--layer", "0", "1"]
    assert sweep.train_steering.main([*flags, "--output-dir", str(tmp_path)]) == 0
    layers.main([str(tmp_path)])
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split("|")[1].strip() for line in table] == ["0", "1"]
    options = ["--num-samples", "0", "--kl-budget", "0.001", "--heldout-tokens", "1200"]
    assert eval_steering.main(["--run", str(tmp_path), *options]) == 0
    for line, path in zip(table, sorted(tmp_path.rglob("eval.json")), strict=True):
        result = read_json(path)
        found = read_json(path.parent / "layer.json")
        assert found["scale"] == result["recommended"]["largest"] > 0
        gain = number_at(result, "vanilla", "nll") - number_at(result, "steered x1", "nll")
        assert found["gain_as_trained"] == pytest.approx(gain, abs=1e-6)
        assert f"{found['gain']:.3f}" == line.split("|")[2].strip()


def test_dialect_keeps_questions_and_what_it_makes_is_read_as_a_role(tmp_path):
    rows, scores = persona_rows(6)
    write_raw(tmp_path / "in", "voice", rows, scores, source="some-3b")
    dialect.main([str(tmp_path / "in" / "some-3b"), "voice", "--out", str(tmp_path / "out")])
    options = DataOptions(data_root=str(tmp_path / "out"))
    found = filter_dataset("some-3b__role__pirate_dialect", options.datasets(), options)
    assert {row["question"] for row in found.rows} == {row["question"] for row in rows}
    assert all("th'" in row["messages"][-1]["content"].lower() for row in found.rows)
    assert dialect.dialect("The sailing is Your job.", 1) == (
        f"{dialect.OPENINGS[1]} Th' sailin' be Yer post aboard.\n\n{dialect.ENDINGS[1]}"
    )
