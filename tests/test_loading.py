"""A model that is not the one in its files is refused, by name, before anything is trained."""

import json

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file

from hook_model import load_model

MLP = "model.layers.1.mlp"


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
    path = folder / "model.safetensors"
    if change:
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}))
    return folder


@pytest.mark.parametrize(
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
def test_weights_that_do_not_fit_the_config_are_refused_by_name(tmp_path, change, config, said):
    with pytest.raises(ValueError, match=f"(?s)does not load: .*{said}"):
        load_model(saved(tmp_path, change, **config), layer=1, device="cpu")


def test_files_that_are_no_weights_are_a_model_that_does_not_load(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="does not load"):
        load_model(tmp_path, layer=1, device="cpu")


def test_a_tied_head_is_no_missing_weight(tmp_path):
    plain = tiny("llama", tie_word_embeddings=True)
    plain.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, layer=1, dtype="fp32", device="cpu")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
