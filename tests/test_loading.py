"""A model that is not the one in its files is refused, by name, before anything is trained."""

import argparse
import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK, tiny
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedModel

import eval_steering as ev
import train_steering as ts
from hook_model import load_from_options, load_model
from steering.files import read_json, write_json
from steering.loading import LoadOptions, add_load_arguments, longest_text

MLP = "model.layers.1.mlp"
FILE = "model.safetensors"
IDS = torch.arange(1, 9)[None]


def renamed(weights):
    return {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}


def without(start):
    """A change that takes weights away, by how their names start."""

    def change(weights):
        return {name: tensor for name, tensor in weights.items() if not name.startswith(start)}

    return change


def narrow_head(weights):
    return {**weights, "lm_head.weight": weights["lm_head.weight"][:100].contiguous()}


def change_weights(folder, change):
    """Change the weights that are saved in a folder; the config stays as it is."""
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


def saved(folder, change=None, **config_changes):
    """The folder of a tiny Llama whose weights or config are changed after it was saved."""
    tiny("llama", tie_word_embeddings=False).save_pretrained(folder)
    if change:
        change_weights(folder, change)
    write_json(folder / "config.json", read_json(folder / "config.json") | config_changes)
    return folder


WAYS = [{}, {"quantize": "4bit"}, {"device_map": {"": "cpu"}}]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (renamed, {}, r"lack 39 weights.*instead 39 weights \(_orig_mod\."),
        (without("lm_head"), {}, r"lack 1 weight \(lm_head.weight\)"),
        (without(MLP), {}, rf"lack 3 weights \({MLP}.down_proj.weight"),
        (narrow_head, {}, r"another shape of 1 weight \(lm_head.weight \[100, 32\]"),
        (None, {"num_hidden_layers": 2}, r"layers that its config does not 18 .*layers\.2\."),
        (None, {"num_hidden_layers": 6}, r"lack 18 weights \(model\.layers\.4\."),
        (None, {"hidden_size": 64}, "another shape"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(
    tmp_path, change, config, said, way
):
    options = LoadOptions(str(saved(tmp_path, change, **config)), device="cpu", **way)
    with pytest.raises(ValueError, match=f"(?s)does not load: .*{said}"):
        load_from_options(options, 1)


@pytest.mark.parametrize("way", WAYS)
def test_whole_files_load(tmp_path, way):
    options = LoadOptions(str(saved(tmp_path)), dtype="fp32", device="cpu", **way)
    model = load_from_options(options, 1)
    logits = tiny("llama", tie_word_embeddings=False)(input_ids=IDS).logits
    found = model(input_ids=IDS).logits
    assert torch.equal(found, logits) == ("quantize" not in way)
    assert torch.allclose(found, logits, atol=0.1)
    assert torch.equal(model.model.lm_head.weight, load_file(tmp_path / FILE)["lm_head.weight"])


def test_a_tied_head_is_no_missing_weight(tmp_path):
    plain = tiny("llama", tie_word_embeddings=True)
    plain.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / FILE)
    model = load_model(tmp_path, layer=1, dtype="fp32", device="cpu")
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("name", [FILE, "pytorch_model.bin"])
def test_files_that_are_no_weights_are_a_model_that_does_not_load(tmp_path, name):
    saved(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="does not load"):
        load_model(tmp_path, layer=1, device="cpu")


def write_gguf(path, change):
    """The tiny Llama as a GGUF file, its weights changed."""
    gguf = pytest.importorskip("gguf")
    model = tiny("llama", tie_word_embeddings=False)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = tensor
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in change(weights).items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


UP = "blk.1.ffn_up.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict, None),
        (without("output."), None),  # a tied head
        (without(UP), rf"lack 1 weight \({MLP}.up_proj.weight"),
        (renamed, "lack 39 weights"),
        (lambda w: w | {UP: w[UP][:10]}, rf"another shape of 1 weight \({MLP}.up_proj.weight"),
    ],
)
def test_gguf_files_that_do_not_fit_are_refused_by_name(tmp_path, change, said):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, change)
    options = LoadOptions(str(path), dtype="fp32", device="cpu")
    if said is None:
        assert len(load_from_options(options, 1).layers) == 4
        return
    with pytest.raises(ValueError, match=f"does not load: .*{said}"):
        load_from_options(options, 1)


@pytest.mark.parametrize("cut", [100, 20_000])
def test_torn_pickles_do_not_load_and_nobody_is_told_to_trust_them(tmp_path, cut):
    saved(tmp_path)
    (tmp_path / FILE).unlink()
    torch.save(tiny("llama").state_dict(), tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[:cut])
    with pytest.raises(ValueError, match="does not load") as error:
        load_model(tmp_path, layer=1, device="cpu")
    assert "weights_only" not in str(error.value)


def test_a_text_is_too_long_that_would_change_the_embeddings_of_other_rows():
    long = {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32, **long}
    for parameters, limit in (
        (None, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (rope, 32),
    ):
        config = LlamaConfig(max_position_embeddings=128, rope_parameters=parameters)
        assert longest_text(config) == limit
    # Older versions of transformers have the first limit beside the parameters.
    older = {"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 128}
    config = SimpleNamespace(**older, original_max_position_embeddings=32)
    config.get_text_config = lambda: config
    assert longest_text(config) == 32


@pytest.mark.full
def test_the_gguf_of_the_package_loads(packaged_gguf):
    model = load_model(str(packaged_gguf), 0, dtype="fp32", device="cpu")
    assert (len(model.layers), model.hidden_size) == (30, 576)
    assert not any(parameter.is_meta for parameter in model.model.parameters())
    assert model.name == str(packaged_gguf)


def test_a_model_that_the_device_has_no_room_for_does_not_load(tiny_folder, monkeypatch):
    def no_room(model, *device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", no_room)
    with pytest.raises(ValueError, match="does not load: CUDA out of memory"):
        load_from_options(LoadOptions(tiny_folder, device="cpu"), 1)


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, tokenizer and all, whose weights lack one matrix."""
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny-llama")
    change_weights(folder, without(f"{MLP}.up_proj"))
    return str(folder)


@pytest.mark.parametrize("flags", ["", "--quantize 4bit"])
def test_training_on_them_exits_2_and_leaves_no_run(training, broken, flags):
    said = training(f"--model {broken} {flags}", code=2)
    assert f"error: --model {broken} does not load" in said
    assert f"lack 1 weight ({MLP}.up_proj.weight)" in said
    written = {path.name for path in training.output.rglob("*") if path.is_file()}
    assert written <= {"train.log"}


def test_evaluating_on_them_exits_2_and_writes_nothing(finished, broken, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for flags in ([], ["--restart"]):
        assert ev.main(["--run", str(finished), "--model", broken, *QUICK, *flags]) == 2
        assert f"lack 1 weight ({MLP}.up_proj.weight)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------- the options of loading

VALUES = {
    "model": "some/model", "dtype": "fp16", "device": "cuda:1", "device_map": "auto",
    "trust_remote_code": True, "quantize": "4bit", "tensor_parallel": True,
}  # fmt: skip


def test_defaults_of_training_are_those_of_the_dataclass_and_an_evaluation_has_none():
    assert LoadOptions.of(vars(ts.make_parser().parse_args([]))) == LoadOptions()
    assert ev.changes_of(ev.parse_args(["--run", "x"])) == {}


@pytest.mark.parametrize("field", dataclasses.fields(LoadOptions), ids=lambda field: field.name)
def test_what_is_given_on_either_command_line_is_what_is_loaded(field):
    value = VALUES[field.name]
    assert value != getattr(LoadOptions(), field.name)
    words = [f"--{field.name.replace('_', '-')}"]
    if value is not True:
        words.append(value)
    parser = argparse.ArgumentParser()
    add_load_arguments(parser)
    for parsed in (parser.parse_args(words), ts.make_parser().parse_args(words)):
        expected = dataclasses.replace(LoadOptions(), **{field.name: value})
        assert LoadOptions.of(vars(parsed)) == expected
    if field.name != "tensor_parallel":  # an evaluation is one process, and takes it instead
        changes = ev.changes_of(ev.parse_args(["--run", "x", *words]))
        assert changes == {field.name: value}
