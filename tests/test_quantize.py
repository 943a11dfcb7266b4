"""--quantize: a frozen model of 4 bits, under a vector that stays fp32."""

import sys

import pytest
import torch
from conftest import export

import eval_steering as ev
import train_steering as ts
from data_filter import DataOptions, split_dataset
from evaluation.table import number_at
from hook_model import load_from_options, load_model
from steering.fast_path import FastPath
from steering.files import read_json
from steering.loading import LoadOptions
from steering.plan import Plan
from steering.vector_file import VECTOR_FILE, load_vector


# Measured on 600 tokens: 0.75, and a loss 7.5% higher; a model of 135M parameters loses much.
def test_gradient_is_nearly_that_of_the_whole_model(smol, smol_chat):
    options = DataOptions("sample_data", target_tokens=600)
    rows = split_dataset("sample__role__pirate", options.datasets(), smol_chat, options).train
    losses = []
    gradients = []
    for quantize in ("none", "4bit"):
        options = LoadOptions(smol, dtype="fp32", device="cpu", quantize=quantize)
        model = load_from_options(options, 12)
        start = torch.Generator().manual_seed(1)
        model.set_vector(2.0 * torch.randn(model.hidden_size, generator=start))
        assert model.steering.vector.dtype == torch.float32
        fast = FastPath(model)
        fast.cache_prefix(rows)
        loss = fast.losses(rows, ts.token_loss).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.steering.vector.grad)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.7
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[1] != losses[0]
    assert model.fast_layers == {12: True}
    assert {states.dtype for states in fast.cache.values()} == {torch.float32}

    # The plan knows what the weights take: packed into bytes, and a scale for each block of them.
    tensors = list(model.model.parameters())
    assert torch.uint8 in {tensor.dtype for tensor in tensors}
    tensors += [tensor.quant_state.absmax for tensor in tensors if hasattr(tensor, "quant_state")]
    taken = sum(tensor.nbytes for tensor in tensors)
    plan = Plan(load_model(smol, 12, "fp32", "fake"), ts.token_loss)
    assert plan.weight_bytes("4bit") == pytest.approx(taken, rel=0.02)


def test_run_says_so_and_is_evaluated_on_either_model(training, tmp_path):
    training("--quantize 4bit")
    folder = training.folder
    assert training.record["config"]["quantize"] == "4bit"
    assert load_vector(folder / VECTOR_FILE)[1]["quantize"] == "4bit"
    assert "quantize: 4bit there, none here" in training(code=2)  # another setting
    quick = "--num-samples 1 --heldout-tokens 300 --max-new-tokens 4 --scales 1 --restart"
    nlls = []
    answers = []
    for flags in ([], ["--quantize", "none"]):
        assert ev.main(["--run", str(folder), *quick.split(), *flags]) == 0
        nlls.append(number_at(read_json(folder / "eval.json"), "vanilla", "nll"))
        answers += (folder.parent.parent / "kept_answers.jsonl").read_text().splitlines()
    # What one model answered is not the other's answer: the second time, there are twice as many.
    assert len(answers) == len({*answers}) // 2 * 3 > 0
    assert nlls[0] != nlls[1] == pytest.approx(nlls[0], rel=0.02)
    assert export(folder, "--format", "safetensors", "--out", tmp_path / "exported") == 0
    card = next((tmp_path / "exported").rglob("README.md"))
    assert ", frozen, 4bit in training" in card.read_text()


def test_without_the_package_it_is_named(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_from_options(LoadOptions(tiny_folder, quantize="4bit"), 1)


@pytest.mark.parametrize("script", [ts, ev])
def test_other_widths_are_no_choice(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--dataset", "x", "--quantize", "8bit"])
    assert "invalid choice: '8bit'" in capsys.readouterr().err
