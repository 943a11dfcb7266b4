"""A model that is not the one in its files is refused, by name, before anything is trained."""

import argparse
import dataclasses
import json
import shutil

import pytest
import torch
from conftest import QUICK, command, tiny
from safetensors.torch import load_file, save_file

import eval_steering as ev
import train_steering as ts
from hook_model import load_from_options, load_model
from steering.loading import LoadOptions, add_load_arguments

MLP = "model.layers.1.mlp"
FILE = "model.safetensors"
IDS = torch.arange(1, 9)[None]


def renamed(weights):
    return {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}


def without_head(weights):
    return {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}


def without_one_mlp(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(MLP)}


def narrow_head(weights):
    return {**weights, "lm_head.weight": weights["lm_head.weight"][:100].contiguous()}


def saved(folder, change=None, **config_changes):
    """The folder of a tiny Llama whose weights or config are changed after it was saved."""
    tiny("llama", tie_word_embeddings=False).save_pretrained(folder)
    path = folder / FILE
    if change:
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}))
    return folder


PARTIAL = pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (renamed, {}, r"lack 39 weights.*instead 39 weights \(_orig_mod\."),
        (without_head, {}, r"lack 1 weight \(lm_head.weight\)"),
        (without_one_mlp, {}, rf"lack 3 weights \({MLP}.down_proj.weight"),
        (narrow_head, {}, r"another shape of 1 weight \(lm_head.weight \[100, 32\]"),
        (None, {"num_hidden_layers": 2}, r"layers that its config does not 18 .*layers\.2\."),
        (None, {"num_hidden_layers": 6}, r"lack 18 weights \(model\.layers\.4\."),
        (None, {"hidden_size": 64}, "another shape"),
    ],
)


@PARTIAL
def test_weights_that_do_not_fit_the_config_are_refused_by_name(tmp_path, change, config, said):
    with pytest.raises(ValueError, match=f"(?s)does not load: .*{said}"):
        load_model(saved(tmp_path, change, **config), layer=1, device="cpu")


@PARTIAL
@pytest.mark.parametrize("how", [{"quantize": "4bit"}, {"device_map": {"": "cpu"}}])
def test_they_are_refused_in_4_bits_and_on_a_device_map_too(tmp_path, change, config, said, how):
    options = LoadOptions(str(saved(tmp_path, change, **config)), device="cpu", **how)
    with pytest.raises(ValueError, match=f"(?s)does not load: .*{said}"):
        load_from_options(options, 1)


@pytest.mark.parametrize("how", [{"quantize": "4bit"}, {"device_map": {"": "cpu"}}])
def test_whole_files_load_in_4_bits_and_on_a_device_map(tmp_path, how):
    options = LoadOptions(str(saved(tmp_path)), dtype="fp32", device="cpu", **how)
    model = load_from_options(options, 1)
    logits = load_model(tmp_path, 1, "fp32", "cpu")(input_ids=IDS).logits
    exact = torch.equal(model(input_ids=IDS).logits, logits)
    assert exact == ("device_map" in how)
    assert torch.allclose(model(input_ids=IDS).logits, logits, atol=0.1)
    assert torch.equal(model.model.lm_head.weight, load_file(tmp_path / FILE)["lm_head.weight"])


@pytest.mark.full
def test_the_gguf_of_the_package_loads(packaged_gguf):
    model = load_model(str(packaged_gguf), 0, dtype="fp32", device="cpu")
    assert (len(model.layers), model.hidden_size) == (30, 576)
    assert not any(parameter.is_meta for parameter in model.model.parameters())
    assert model.name == str(packaged_gguf)


def broken_copy(folder, out):
    """A copy of a model's folder, tokenizer and all, whose weights lack one matrix."""
    shutil.copytree(folder, out)
    weights = load_file(out / FILE)
    del weights[f"{MLP}.up_proj.weight"]
    save_file(weights, out / FILE, metadata={"format": "pt"})
    return str(out)


def test_training_on_them_exits_2_and_leaves_no_run(data_root, tiny_folder, tmp_path, capsys):
    broken = broken_copy(tiny_folder, tmp_path / "tiny-llama")
    for flags in ([], ["--quantize", "4bit"]):
        code = None
        try:
            code = ts.main(command(data_root, broken, tmp_path / "runs", *flags))
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        said = capsys.readouterr()
        assert f"{broken} does not load" in said.out + said.err
        assert f"lack 1 weight ({MLP}.up_proj.weight)" in said.out + said.err
    written = {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert written <= {"train.log"}


def test_evaluating_on_them_exits_2_and_writes_nothing(finished, tiny_folder, tmp_path, capsys):
    broken = broken_copy(tiny_folder, tmp_path / "tiny-llama")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for flags in ([], ["--restart"]):
        assert ev.main(["--run", str(finished), "--model", broken, *QUICK, *flags]) == 2
        assert f"lack 1 weight ({MLP}.up_proj.weight)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------- the options of loading


def options_of(parser):
    """{dest: flag} of a parser."""
    return {action.dest: action.option_strings[0] for action in parser._actions}


@pytest.mark.parametrize("script", [ts, ev])
def test_every_load_option_is_an_option_of_both_scripts(script):
    flags = options_of(script.make_parser())
    for field in dataclasses.fields(LoadOptions):
        if field.name == "tensor_parallel" and script is ev:  # an evaluation is one process
            continue
        assert flags[field.name] == f"--{field.name.replace('_', '-')}"


def test_defaults_of_training_are_those_of_the_dataclass_and_an_evaluation_has_none():
    parsed = vars(ts.make_parser().parse_args([]))
    assert LoadOptions.of(parsed) == LoadOptions()
    parsed = vars(ev.make_parser().parse_args([]))
    names = {field.name for field in dataclasses.fields(LoadOptions)} - {"tensor_parallel"}
    assert {name: parsed[name] for name in names} == dict.fromkeys(names)


VALUES = {
    "model": "some/model", "dtype": "fp16", "device": "cuda:1", "device_map": "auto",
    "trust_remote_code": True, "quantize": "4bit", "tensor_parallel": True,
}  # fmt: skip


def test_what_is_given_on_the_command_line_is_what_is_loaded():
    assert {*VALUES} == {field.name for field in dataclasses.fields(LoadOptions)}
    assert all(getattr(LoadOptions(), name) != value for name, value in VALUES.items())
    parser = argparse.ArgumentParser()
    add_load_arguments(parser)
    for name, value in VALUES.items():
        words = [f"--{name.replace('_', '-')}"]
        if value is not True:
            words.append(value)
        given = LoadOptions.of(vars(parser.parse_args(words)))
        assert given == dataclasses.replace(LoadOptions(), **{name: value})
        if name != "tensor_parallel":  # an evaluation takes it in place of the run's own
            words = ["--run", "x", *words]
            assert ev.changes_of(ev.parse_args(words)) == {name: value}


def test_files_that_are_no_weights_are_a_model_that_does_not_load(tmp_path):
    saved(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="does not load"):
        load_model(tmp_path, layer=1, device="cpu")


def test_a_tied_head_is_no_missing_weight(tmp_path):
    plain = tiny("llama", tie_word_embeddings=True)
    plain.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / FILE)
    model = load_model(tmp_path, layer=1, dtype="fp32", device="cpu")
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
