"""--plan: what is said of a model that is not there, against what the real one takes."""

import pytest
import torch
from conftest import command, read_vector, the_folder, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import train_steering as ts
from hook_model import SteerModel, load_model
from steering import plan as pl
from steering.fast_path import checkpoint_layers
from steering.vector_file import VECTOR_FILE


def allocated_peak(function):
    """The most bytes that torch's allocator has given out at once while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gpt2"])
def test_bytes_are_those_that_a_real_step_takes(architecture, checkpointing, tmp_path):
    real = tiny(architecture, hidden_size=128)
    real.config.save_pretrained(tmp_path)
    models = SteerModel(real, 1), load_model(tmp_path, 1, "fp32", "fake")
    for model in models if checkpointing else ():
        checkpoint_layers(model)
    step, planned = (pl.Plan(model, ts.token_loss) for model in models)
    step = step.step(1024)
    step()
    assert planned.step_bytes(1024) == pytest.approx(allocated_peak(step), rel=0.15)
    weights = sum(p.numel() * 4 for p in real.parameters())
    assert planned.weight_bytes() == pytest.approx(weights, rel=0.01)


def test_operations_are_those_of_a_real_step_attention_included(tmp_path):
    real = SteerModel(tiny("llama"), 1)  # so narrow that attention is half of the work
    real.config.save_pretrained(tmp_path)
    planned = pl.Plan(load_model(tmp_path, 1, "fp32", "fake"), ts.token_loss)
    step = pl.Plan(real, ts.token_loss).step(1024)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()  # plain products, of which the backward pass recomputes none: 4 instead of 5
    attention = 3 * 4 * 1024 * 256 * 32 * 2  # layers 2 and 3: 2 products forward, 4 backward
    assert counter.get_total_flops() < planned.step_flops(1024)
    assert planned.step_flops(1024) == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert attention > 0.3 * counter.get_total_flops()


def test_micro_batch_is_the_largest_that_fits(tmp_path):
    tiny("llama", hidden_size=128).config.save_pretrained(tmp_path)
    plan = pl.Plan(load_model(tmp_path, 1, "fp32", "fake"), ts.token_loss)
    for tokens, smaller in ((16384, 8192), (2048, 1024), (512, 256)):
        exact = plan.step_bytes(tokens)
        assert plan.micro_batch(1.1 * exact)[1] == tokens
        assert plan.micro_batch(0.9 * exact)[1] == smaller
    assert plan.micro_batch(1000)[1] == 0


def test_plan_is_printed_without_data_or_weights(tiny_folder, tmp_path, capsys):
    AutoConfig.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    (tmp_path / "roles.txt").write_text("a\nb\n")
    argv = ["--model", str(tmp_path), "--list-file", str(tmp_path / "roles.txt"), "--plan"]
    assert ts.main([*argv, "--layer", "1"]) == 0
    said = capsys.readouterr().out
    assert "3,176,736 parameters, bfloat16, 4 layers" in said
    assert "80 GiB   --micro-batch-tokens 16384, or --micro-batch-tokens 16384 --grad" in said
    assert "2 epochs" in said and "2 of them" in said
    assert ts.main([*argv, "--layer", "1", "--seeds", "3", "--max-steps", "250"]) == 0
    said = capsys.readouterr().out  # twice as many steps as 100,000 tokens have
    assert "2 epochs" in said and "6 of them" in said
    for wrong in (["--plan-tflops", "0"], ["--plan-memory", "nan"], ["--tensor-parallel"]):
        with pytest.raises(SystemExit):
            ts.main([*argv, "--layer", "1", *wrong])
    capsys.readouterr()
    assert ts.main([*argv, "--layer", "1", "--plan-memory", "0.5"]) == 0
    assert "too small, 2 GiB are needed" in capsys.readouterr().out
    assert ts.main([*argv, "--layer", "99"]) == 2
    assert "--layer 99 is out of range" in capsys.readouterr().err


def test_automatic_micro_batches_fit_into_memory(data_root, tiny_folder, tmp_path, monkeypatch):
    plan = pl.Plan(load_model(tiny_folder, 1, "fp32", "fake"), ts.token_loss)
    room = plan.step_bytes(2048)
    monkeypatch.setattr(pl, "free_memory", lambda device: room / 0.89)
    argv = command(data_root, tiny_folder, tmp_path, "--micro-batch-tokens")
    assert ts.main([*argv, "auto"]) == 0
    (path,) = the_folder(tmp_path).glob("checkpoint-00006.pt")
    used = torch.load(path, weights_only=True)["state"]["micro_batch_tokens"]
    assert used == plan.micro_batch(room / 0.89 * 0.9)[1] and used != 1024

    # A run that goes on keeps to it, whatever fits by then.
    vector = read_vector(tmp_path)
    for file in (VECTOR_FILE, path.name):
        (the_folder(tmp_path) / file).unlink()
    monkeypatch.setattr(pl, "free_memory", lambda device: 1e12)
    assert ts.main([*argv, "auto"]) == 0
    assert torch.load(path, weights_only=True)["state"]["micro_batch_tokens"] == used
    assert torch.equal(read_vector(tmp_path), vector)
    with pytest.raises(SystemExit):
        ts.parse_args([*argv, "much"])
