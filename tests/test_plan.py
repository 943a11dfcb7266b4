"""--plan: what is said of a model that is not there, against what the real one takes."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import QUICK, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import eval_steering as ev
import train_steering as ts
from evaluation import plan as ep
from hook_model import SteerModel, load_model
from steering import plan as pl
from steering.fast_path import checkpoint_layers
from steering.files import read_json
from steering.vector_file import VECTOR_FILE


def allocated_peak(function):
    """The most bytes that torch's allocator has given out at once while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def planned_model(whole, folder):
    """A SteerModel of a model's config alone."""
    whole.config.save_pretrained(folder)
    return load_model(folder, 1, "fp32", "fake")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gpt2"])
def test_bytes_are_those_that_a_real_step_takes(architecture, checkpointing, tmp_path):
    whole = tiny(architecture, hidden_size=128)
    real = SteerModel(whole, 1)
    fake = planned_model(whole, tmp_path)
    if checkpointing:
        checkpoint_layers(real)
        checkpoint_layers(fake)
    step = pl.Plan(real, ts.token_loss).step(1024)
    step()
    planned = pl.Plan(fake, ts.token_loss)
    assert planned.step_bytes(1024) == pytest.approx(allocated_peak(step), rel=0.15)
    weights = sum(p.numel() * 4 for p in whole.parameters())
    assert planned.weight_bytes() == pytest.approx(weights, rel=0.01)


def test_operations_are_those_of_a_real_step_attention_included(tmp_path):
    whole = tiny("llama")  # so narrow that attention is half of the work
    planned = pl.Plan(planned_model(whole, tmp_path), ts.token_loss)
    step = pl.Plan(SteerModel(whole, 1), ts.token_loss).step(1024)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()  # plain products, of which the backward pass recomputes none: 4 instead of 5
    counted = counter.get_total_flops()
    attention = 3 * 4 * 1024 * 256 * 32 * 2  # layers 2 and 3: 2 products forward, 4 backward
    assert counted < planned.step_flops(1024) == pytest.approx(counted, rel=0.15)
    assert attention > 0.3 * counted


def test_micro_batch_is_the_largest_that_fits(tmp_path):
    plan = pl.Plan(planned_model(tiny("llama", hidden_size=128), tmp_path), ts.token_loss)
    for tokens in (16384, 2048, 512):
        exact = plan.step_bytes(tokens)
        assert plan.micro_batch(1.1 * exact)[1] == tokens
        assert plan.micro_batch(0.9 * exact)[1] == tokens // 2
    assert plan.micro_batch(1000)[1] == 0


def test_plan_is_printed_without_data_or_weights(tiny_folder, tmp_path, capsys):
    AutoConfig.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    (tmp_path / "roles.txt").write_text("a\nb\n")

    def plan(flags="", code=0):
        where = ["--model", str(tmp_path), "--list-file", str(tmp_path / "roles.txt")]
        assert ts.main([*where, "--plan", "--layer", "1", *flags.split()]) == code
        return "".join(capsys.readouterr())

    said = plan()
    assert "3,176,736 parameters, bfloat16, 4 layers" in said
    assert "80 GiB   --micro-batch-tokens 16384, or --micro-batch-tokens 16384 --grad" in said
    assert "2 epochs" in said and "2 of them" in said
    said = plan("--seeds 3 --max-steps 250")  # twice as many steps as 100,000 tokens have
    assert "2 epochs" in said and "6 of them" in said
    assert "too small, 2 GiB are needed" in plan("--plan-memory 0.5")
    assert "--layer 99 is out of range" in plan("--layer 99", code=2)
    for wrong in ("--plan-tflops 0", "--plan-memory nan", "--tensor-parallel"):
        with pytest.raises(SystemExit):
            plan(wrong)


def test_automatic_micro_batches_fit_into_memory_and_stay(training, tiny_folder, monkeypatch):
    plan = pl.Plan(load_model(tiny_folder, 1, "fp32", "fake"), ts.token_loss)
    room = plan.step_bytes(2048) / 0.89
    monkeypatch.setattr(pl, "free_memory", lambda device: room)

    def train():
        training("--micro-batch-tokens auto")
        return torch.load(last, weights_only=True)["state"]["micro_batch_tokens"]

    training("--micro-batch-tokens much", code=2)
    training("--micro-batch-tokens auto")
    last = training.folder / "checkpoint-00006.pt"
    used = train()
    assert used == plan.micro_batch(room * 0.9)[1] and used != 1024

    # A run that goes on keeps to it, whatever fits by then.
    vector = training.vector
    (training.folder / VECTOR_FILE).unlink()
    last.unlink()
    monkeypatch.setattr(pl, "free_memory", lambda device: 1e12)
    assert train() == used
    assert torch.equal(training.vector, vector)


def test_calls_of_generate_are_those_of_an_evaluation(trained, written_at_once):
    folders = sorted(path.parent for path in (trained / "runs").rglob(VECTOR_FILE))
    argv = ["--run", *map(str, folders), *QUICK, "--num-samples", "3"]
    assert ev.main(argv) == 0  # The plain model's answers are kept from here on.
    written_at_once.clear()
    argv += ["--restart", "--batch-size", "20"]
    assert ev.main(argv) == 0
    asked = replace(ep.answers_asked(ev.parse_args(argv)), prompted=0, few_shot=0)
    result = read_json(folders[0] / "eval.json")
    assert len(result["recommended"]["candidates"]) == 4 and asked.tried == 12
    assert sum(map(len, written_at_once)) == 2 * (asked.tried + asked.steered)
    assert len(written_at_once) == ep.decoding_calls(asked, runs=2, rows=20)


def test_a_plan_of_evaluating_is_from_the_config_alone_and_less_side_by_side(tmp_path, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    argv = ["--plan", "--model", str(tmp_path), "--layer", "1", "--plan-runs", "100"]

    def planned(*more):
        assert ev.main([*argv, *more]) == 0
        said = capsys.readouterr().out
        steps, runs = re.search(r"(\d+) decoding steps, (\d+) runs", said).groups()
        assert "100 of them" in said and runs == "4"
        return int(steps), float(re.search(r"([\d.e-]+) PFLOP", said)[1])

    assert planned()[0] < planned("--batch-size", "16")[0]
    assert planned("--heldout-tokens", "40000")[1] > planned()[1]
    assert planned("--num-samples", "0")[0] == 0
    with pytest.raises(SystemExit):
        ev.main(argv[:3])
    assert "--plan: --model, --layer" in capsys.readouterr().err
