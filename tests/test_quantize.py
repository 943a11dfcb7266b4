"""--quantize: a frozen model of 4 bits, under a vector that stays fp32."""

import json
import sys

import pytest
import torch
from conftest import the_folder

import eval_steering as ev
import export_vector as ex
import train_steering as ts
from data_filter import DataOptions, split_dataset
from hook_model import load_from_options, load_model
from steering.fast_path import FastPath
from steering.loading import LoadOptions
from steering.plan import Plan
from steering.vector_file import VECTOR_FILE, load_vector


def gradient_of(model, rows):
    """(mean loss, gradient) of a vector that is there already, on the fast path."""
    fast = FastPath(model)
    fast.cache_prefix(rows)
    loss = fast.losses(rows, ts.token_loss).mean()
    loss.backward()
    return loss.item(), model.steering.vector.grad, fast


# Measured: 0.75, and a loss 7.5% higher; a model of 135M parameters loses much.
def test_gradient_is_nearly_that_of_the_whole_model(smol, smol_chat):
    options = DataOptions("sample_data", target_tokens=600)
    rows = split_dataset("sample__role__pirate", options.datasets(), smol_chat, options).train
    found = {}
    for quantize in ("none", "4bit"):
        options = LoadOptions(smol, dtype="fp32", device="cpu", quantize=quantize)
        model = load_from_options(options, 12)
        start = torch.Generator().manual_seed(1)
        model.set_vector(2.0 * torch.randn(model.hidden_size, generator=start))
        found[quantize] = gradient_of(model, rows)
        assert model.steering.vector.dtype == torch.float32
    (loss, whole, _), (quantized_loss, quantized, fast) = found.values()
    assert torch.cosine_similarity(whole, quantized, dim=0) > 0.7
    assert quantized_loss == pytest.approx(loss, rel=0.1) and quantized_loss != loss
    assert torch.uint8 in {p.dtype for p in model.model.parameters()}
    assert model.fast_layers == {12: True}
    assert {states.dtype for states in fast.cache.values()} == {torch.float32}
    scales = [q.absmax for p in model.model.parameters() if (q := getattr(p, "quant_state", None))]
    taken = sum(tensor.nbytes for tensor in [*model.model.parameters(), *scales])
    plan = Plan(load_model(smol, 12, "fp32", "fake"), ts.token_loss)
    assert plan.weight_bytes("4bit") == pytest.approx(taken, rel=0.02)


def test_run_says_so_and_is_evaluated_on_either_model(data_root, tiny_folder, tmp_path, capsys):
    argv = ["--data-root", data_root, "--model", tiny_folder, "--output-dir", str(tmp_path)]
    argv += ["--dataset", "src__role__pirate", "--layer", "1", "--lr", "0.05", "--max-steps", "3"]
    argv += ["--dtype", "fp32", "--device", "cpu"]
    assert ts.main([*argv, "--quantize", "4bit"]) == 0
    folder = the_folder(tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["quantize"] == "4bit"
    assert load_vector(folder / VECTOR_FILE)[1]["quantize"] == "4bit"
    assert ts.main(argv) == 2  # the whole model is another setting
    assert "quantize: 4bit there, none here" in capsys.readouterr().out
    quick = ["--run", str(folder), "--num-samples", "1", "--heldout-tokens", "300"]
    quick += ["--max-new-tokens", "4", "--scales", "1"]
    nll, kept = {}, []
    for flags in ([], ["--quantize", "none"]):
        assert ev.main([*quick, *flags, "--restart"]) == 0
        nll[bool(flags)] = json.loads((folder / "eval.json").read_text())["likelihood"]
        kept.append(len((folder.parent / "kept_answers.jsonl").read_text().splitlines()))
    assert kept[1] == 2 * kept[0] > 0  # what one model answered is not the other's answer
    assert nll[False]["vanilla"]["nll"] != nll[True]["vanilla"]["nll"]
    assert nll[False]["vanilla"]["nll"] == pytest.approx(nll[True]["vanilla"]["nll"], rel=0.02)
    out = tmp_path / "exported"
    assert ex.main([str(folder), "--format", "safetensors", "--out", str(out)]) == 0
    assert ", frozen, 4bit in training" in next(out.rglob("README.md")).read_text()


def test_without_the_package_it_is_named(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_from_options(LoadOptions(tiny_folder, quantize="4bit"), 1)


def test_other_widths_are_no_choice(tiny_folder, capsys):
    for parse_args in (ts.parse_args, ev.parse_args):
        with pytest.raises(SystemExit):
            parse_args(["--dataset", "x", "--quantize", "8bit"])
        assert "invalid choice: '8bit'" in capsys.readouterr().err
