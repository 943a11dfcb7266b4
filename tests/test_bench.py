"""bench/: the scripts run, and say what they claim to say."""

import json
import sys

import pytest
import torch
from conftest import ROOT, persona_rows, write_raw

sys.path.insert(0, str(ROOT / "bench"))
import aims
import bench_gpu
import dialect
import sweep

from data_filter import DataOptions, filter_dataset, split_dataset
from evaluation.answers import Sampling, generate_answers
from hook_model import load_chat, load_model
from steering.fast_path import FastPath
from steering.run_state import read_run


@pytest.fixture(autouse=True)
def restore_the_learning_rate(monkeypatch):
    monkeypatch.setattr(sweep.train_steering, "AUTO_LR", 0.05)  # which a plan's lines set


def test_gpu_bench_runs_on_a_cpu_with_a_tiny_shape(capsys):
    flags = ["--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--steps", "1"]
    bench_gpu.main([*flags, "--rows", "4", "--length", "24", "--micro-batch-tokens", "48", "96"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fp32 on cpu, torch") and "matrix products" in lines[0]
    table = [line.split("|")[1:] for line in lines if line.startswith("| tiny")]
    assert [[cell.strip() for cell in row[1:4]] for row in table] == [
        ["full", "4", "48"], ["full", "4", "96"], ["cached", "4", "48"], ["cached", "4", "96"]
    ]  # fmt: skip
    assert all(float(row[4]) > 0 for row in table)


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
    assert len(found["profile"]) == 10 and found["attention"]["MATH"] > 0


def test_gpu_benchmark_notices_a_model_that_computes_something_else(monkeypatch):
    assert bench_gpu.compare_architecture("Llama", "cpu")["ok"]
    real, seen = bench_gpu.SteerModel.set_vector, []

    def other(self, vector):  # on the device under test, twice the vector
        seen.append(vector)
        real(self, vector * len(seen))

    monkeypatch.setattr(bench_gpu.SteerModel, "set_vector", other)
    assert not bench_gpu.compare_architecture("Llama", "cpu")["ok"]


def test_sweep_scores_every_run_on_the_same_rows_of_questions_that_none_trained_on(
    tiny_folder, data_root, tmp_path, capsys, monkeypatch
):
    plan, out, scored = tmp_path / "plan.txt", tmp_path / "runs", []
    model = f"--model {tiny_folder} --layer 1 --dataset src__role__pirate --device cpu"
    few = "0.5 --target-tokens 200 --num-epochs 1"
    lines = [f"all | --data-root {data_root} --dtype fp32 {model}", f"few | {few}", "# no run"]
    plan.write_text("\n".join([*lines, "all-rows | 0.1 --num-epochs 1 --seed 3"]))
    real = sweep.mean_nll

    def spy(model, rows, vectors, limit):
        scored.append([row.row["question"] for row in rows])
        return real(model, rows, vectors, limit)

    monkeypatch.setattr(sweep, "mean_nll", spy)
    sweep.run_plan(plan, out)
    assert scored[0] == scored[1] and len(scored[0]) >= 2
    for path in out.rglob("run.json"):
        run = read_run(path.parent)
        splits = split_dataset(run.dataset, *data_of(run))
        assert not {*scored[0]} & {e.row["question"] for e in [*splits.train, *splits.heldout]}
    sweep.run_plan(plan, out)
    assert len(scored) == 2  # what is there is not done again
    capsys.readouterr()
    sweep.table(out)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "| 0." in line]
    assert {row[1].strip() for row in rows} == {"few", "all-rows"}
    assert float(rows[0][6]) <= float(rows[1][6]) and float(rows[0][7]) == 1.0


def data_of(run):
    options = DataOptions.of(run.args)
    return options.datasets(), load_chat(run.args["model"]), options, 10_000


def test_dialect_keeps_questions_and_what_it_makes_is_read_as_a_role(tmp_path, monkeypatch):
    rows, scores = persona_rows(6)
    write_raw(tmp_path / "in", "voice", rows, scores, source="some-3b")
    flags = [str(tmp_path / "in" / "some-3b"), "voice", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["dialect.py", *flags])
    dialect.main()
    options = DataOptions(data_root=str(tmp_path / "out"))
    found = filter_dataset("some-3b__role__pirate_dialect", options.datasets(), options)
    assert {row["question"] for row in found.rows} == {row["question"] for row in rows}
    assert all("th'" in row["messages"][-1]["content"].lower() for row in found.rows)
    assert dialect.dialect("The sailing is Your job.", 1) == (
        f"{dialect.OPENINGS[1]} Th' sailin' be Yer post aboard.\n\n{dialect.ENDINGS[1]}"
    )


@pytest.fixture
def aimed(tiny_folder):
    """(tiny model with a RowHook and a vector, its chat)."""
    model, chat = load_model(tiny_folder, 1, "fp32", "cpu"), load_chat(tiny_folder)
    model.steering = aims.RowHook(32)
    model.set_layer(1)
    model.set_vector(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    return model, chat


def rows_of(chat, count=3):
    rows = [
        {**row, "messages": [turn for turn in row["conversation"] if turn["role"] != "system"]}
        for row in persona_rows(count)[0]
    ]
    return chat.encode(rows), chat.encode(rows, prompted=True)


def log_probs(model, example):
    """Of the plain forward, at the label tokens of an example: (N, V)."""
    logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    return logits[[i for i, label in enumerate(example.labels[1:]) if label >= 0]]


def test_a_teachers_divergence_and_its_gradient_are_those_of_plain_forwards(aimed):
    model, chat = aimed
    examples, prompted = rows_of(chat)
    fast = FastPath(model)
    teacher = aims.teacher_states(model, fast, chat, examples, "prompted")
    reference = torch.cat([teacher[id(e)] for e in examples])
    mine = aims.divergence(fast, examples, reference).sum()
    slow = 0
    for with_prompt, without in zip(prompted, examples, strict=True):
        with torch.no_grad(), model.steering_off():
            before = log_probs(model, with_prompt)
        slow = slow + (before.exp() * (before - log_probs(model, without))).sum()
    assert mine.item() == pytest.approx(slow.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(mine, model.steering.vector)
    (expected,) = torch.autograd.grad(slow, model.steering.vector)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_answers_at_several_scales_at_once_are_those_of_one_scale_at_a_time(aimed):
    model, chat = aimed
    model.model.get_output_embeddings().weight.data.mul_(50)  # or every token is as likely
    turns = [[{"role": "user", "content": text}] for text in ("Who are you?", "Where?")]
    together = aims.answers_at(model, chat, turns, [0.5, 2.0])
    for scale, texts in zip([0.5, 2.0], together, strict=True):
        with model.scaled(scale):
            alone = generate_answers(model, chat, turns, Sampling(aims.NEW_TOKENS, 0.7, 0, 2))
        assert texts == alone
    assert together[0] != together[1]


def test_positions_of_the_prompt_alone_get_the_vector(aimed):
    model, chat = aimed
    examples, _ = rows_of(chat, 2)
    model.steering.only_prompt = True
    aims.masked(model, examples)
    starts = [next(i for i, t in enumerate(e.labels) if t >= 0) for e in examples]
    mask = model.steering.mask[..., 0]
    for row, start in zip(mask, starts, strict=True):
        assert row.nonzero().flatten().tolist() == [0, 1, start - 2, start - 1]
    states = torch.zeros(2, mask.shape[1], 32)
    assert torch.equal(model.steering(states), mask[..., None] * model.steering.vector)
    one_token = torch.zeros(2, 1, 32)  # as generation goes on
    assert torch.equal(model.steering(one_token), one_token)
