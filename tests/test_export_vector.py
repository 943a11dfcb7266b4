"""export_vector.py: every format holds the same vector at the same layer; no code is run."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from conftest import tiny
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from test_eval_steering import QUICK, trained  # noqa: F401 (a fixture)
from test_hook_model import IDS, block_outputs
from test_train_steering import command, restore_signal_handlers, the_folder  # noqa: F401

import eval_steering as ev
import export_vector as ex
import hook_model as hm
import train_steering as ts
from interop import formats as vf
from interop.card import TEMPLATE
from steering.run_folder import lock_folder
from steering.vector_file import VECTOR_FILE, load_vector, save_vector

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3))
FILES = {
    "safetensors": "steering_vector.safetensors",
    "gguf": "steering_vector.gguf",
    "pt": "layer_1.pt",
    "chatspace": "steering_vector.pt",
}


def export(*arguments):
    return ex.main([*map(str, arguments)])


def convert(path, model, out, *more):
    """Run `--from path` for a model; returns the exit code."""
    return export("--from", path, "--model", model, "--out", out, "--format", "safetensors", *more)


def source(layer=1, **changes):
    """A Source of VECTOR, without a run behind it."""
    metadata = {"model": "org/model", "model_type": "llama", "layer": layer, "dataset": "d"}
    metadata |= {"model_is_local": False, **changes}
    return ex.Source(Path("x"), VECTOR, metadata)


@pytest.fixture(scope="module")
def evaluated(trained):  # noqa: F811
    """The root of two finished tiny runs, one of them evaluated; layer 1."""
    assert ev.main(["--run", str(the_folder(trained / "runs")), *QUICK]) == 0
    return trained


@pytest.fixture
def a_run(evaluated):
    return the_folder(evaluated / "runs")


# ---------------------------------------------------------------- round trips and layers


@pytest.mark.parametrize("name", ex.VECTOR_ALONE)
def test_every_format_reads_back_bit_for_bit_at_its_layer_and_no_other(name, tmp_path):
    model = hm.SteerModel(tiny("llama"), 1)
    logits = {}
    for layer in (1, 2):
        model.set_layer(layer)
        model.set_vector(VECTOR)
        logits[layer] = model(input_ids=IDS).logits.detach()
    assert not torch.allclose(logits[1], logits[2])
    for layer in (1, 2):
        out = tmp_path / str(layer)
        ex.export(source(layer), [name], out, 1.0, False)
        found = vf.read_vector(out, layers=4, width=32)
        assert found.layer == layer and torch.equal(found.vector, VECTOR)
        model.set_layer(found.layer)
        model.set_vector(found.vector)
        assert torch.equal(model(input_ids=IDS).logits, logits[layer])
        with pytest.raises(ValueError, match=f"--layer {layer + 1}: .* has layer {layer}"):
            vf.read_vector(out, layers=4, width=32, layer=layer + 1)


def test_files_hold_what_other_tools_look_for(tmp_path):
    assert ex.export(source(), ex.VECTOR_ALONE, tmp_path, 2.0, False) == [
        "steering_vector.safetensors", "steering_vector.gguf", "layer_1.pt",
        "steering_vector.pt", "steering_config.json", "README.md",
    ]  # fmt: skip
    reader = gguf.GGUFReader(tmp_path / "steering_vector.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "controlvector"
    assert values["controlvector.model_hint"] == "llama"
    assert values["controlvector.layer_count"] == 1
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, tensor.data.ndim) == ("direction.1", "F32", 1)
    assert torch.equal(torch.from_numpy(tensor.data.copy()), 2 * VECTOR)
    assert torch.equal(torch.load(tmp_path / "layer_1.pt", weights_only=True), 2 * VECTOR)
    state = torch.load(tmp_path / "steering_vector.pt", weights_only=True)
    assert [*state] == ["steering_vector"] and torch.equal(state["steering_vector"], 2 * VECTOR)
    config = json.loads((tmp_path / "steering_config.json").read_text())
    assert config == {"model_name": "org/model", "target_layer": 1, "init_scale": 0.0}
    vector, metadata = load_vector(tmp_path / "steering_vector.safetensors")
    assert torch.equal(vector, 2 * VECTOR) and metadata["scale"] == "2.0"


def test_persona_vectors_row_is_the_output_of_the_block_below_its_number(tiny_folder, tmp_path):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    with torch.no_grad():  # as persona-vectors collects them: embeddings, then every block
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    torch.save(torch.stack([state.mean(dim=(0, 1)) for state in states]), tmp_path / "v.pt")
    for layer, output in block_outputs(model, IDS).items():
        if layer == 3:  # the last one comes after the final norm in their file
            assert convert(tmp_path / "v.pt", tiny_folder, tmp_path / "3", "--layer", 3) == 2
            continue
        assert convert(tmp_path / "v.pt", tiny_folder, tmp_path / f"{layer}", "--layer", layer) == 0
        vector, metadata = load_vector(tmp_path / f"{layer}" / FILES["safetensors"])
        assert torch.allclose(vector, output.mean(dim=(0, 1)), atol=1e-6)
        assert metadata["layer"] == str(layer) and metadata["model"] == tiny_folder
        assert "persona-vectors" in metadata["imported_from"]


def test_assistant_axis_row_is_the_output_of_the_block_of_its_number(tiny_folder, tmp_path):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    rows = [state.mean(dim=(0, 1)) for _, state in sorted(block_outputs(model, IDS).items())]
    value = {"vector": torch.stack(rows).bfloat16(), "type": "pos_3", "role": "pirate"}
    torch.save(value, tmp_path / "pirate.pt")
    for layer in range(4):
        found = vf.read_vector(tmp_path / "pirate.pt", 4, 32, layer)
        assert found.kind == "assistant-axis" and found.vector.dtype == torch.float32
        assert torch.equal(found.vector, rows[layer].bfloat16().float())


def test_file_of_several_layers_needs_to_be_told_which(tiny_folder, tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    for layer in (1, 2, 3):
        writer.add_tensor(f"direction.{layer}", (VECTOR * layer).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert convert(tmp_path / "v.gguf", tiny_folder, tmp_path / "out") == 2
    assert "has layers 1..3: say which one with --layer" in capsys.readouterr().err
    assert convert(tmp_path / "v.gguf", tiny_folder, tmp_path / "out", "--layer", 0) == 2
    assert "--layer 0: " in capsys.readouterr().err
    assert convert(tmp_path / "v.gguf", tiny_folder, tmp_path / "out", "--layer", 2) == 0
    assert "is for a 'mistral', not a 'llama'" in capsys.readouterr().out
    assert torch.equal(load_vector(tmp_path / "out" / FILES["safetensors"])[0], 2 * VECTOR)


def test_layer_is_counted_from_zero_and_gguf_has_no_zero(tmp_path):
    with pytest.raises(ValueError, match="layer 0: --format gguf can hold layers 1"):
        ex.export(source(0), ex.FORMATS, tmp_path / "out", 1.0, False)
    assert not (tmp_path / "out").exists()
    ex.export(source(0), ["safetensors", "pt", "chatspace"], tmp_path / "out", 1.0, False)
    assert vf.read_vector(tmp_path / "out" / "layer_0.pt", 4, 32).layer == 0


# ---------------------------------------------------------------- what is refused


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(tiny_folder, tmp_path, capsys):
    mark = tmp_path / "was run"
    for i, value in enumerate((Hostile(mark), {"vector": Hostile(mark)}, [VECTOR, Hostile(mark)])):
        for suffix in (".pt", ".bin", ".pth"):
            path = tmp_path / f"{i}{suffix}"
            if suffix == ".bin":
                path.write_bytes(pickle.dumps(value))
            else:
                torch.save(value, path, _use_new_zipfile_serialization=suffix == ".pt")
            assert convert(path, tiny_folder, tmp_path / "out", "--layer", 1) == 2
            error = capsys.readouterr().err
            assert "nothing in it was run" in error
            assert suffix == ".bin" or f"it imports {os.mkdir.__module__}.mkdir" in error
            assert error.count("\n") == 1 and not mark.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "0.pt", weights_only=False)  # it would have been run
    assert mark.exists()


def bad_files(folder):
    """{file name: what the error says}, written to a folder."""

    def pt(name, value):
        torch.save(value, folder / name)

    def gguf_file(name, architecture, *tensors, dtype=None):
        writer = gguf.GGUFWriter(folder / name, architecture)
        for tensor_name, tensor in tensors:
            writer.add_tensor(tensor_name, tensor.numpy(), raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    pt("wide.pt", torch.ones(33))
    pt("nan.pt", torch.full((32,), math.nan))
    pt("rows.pt", torch.ones(7, 32))
    pt("cube.pt", torch.ones(4, 4, 32))
    pt("number.pt", torch.tensor(3.0))
    pt("whole.pt", torch.ones(32, dtype=torch.long))
    pt("sparse.pt", torch.ones(32).to_sparse())
    pt("meta.pt", torch.ones(32, device="meta"))
    pt("keys.pt", {"weight": torch.ones(32)})
    pt("list.pt", [torch.ones(32)])
    pt("axis.pt", {"vector": torch.ones(5, 32), "type": "x", "role": "y"})
    pt("axis_wide.pt", {"vector": torch.ones(4, 31), "type": "x", "role": "y"})
    pt("array.pt", {"steering_vector": [1.0] * 32})
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    (folder / "torn.pt").write_bytes((folder / "rows.pt").read_bytes()[:-99])
    gguf_file("model.gguf", "llama", ("token_embd.weight", torch.ones(4, 32)))
    gguf_file("none.gguf", "controlvector")
    gguf_file("names.gguf", "controlvector", ("direction.x", torch.ones(32)))
    gguf_file("flat.gguf", "controlvector", ("direction.1", torch.ones(1, 32)))
    gguf_file("wide.gguf", "controlvector", ("direction.1", torch.ones(64)))
    gguf_file("far.gguf", "controlvector", ("direction.4", torch.ones(32)))
    gguf_file("nan.gguf", "controlvector", ("direction.1", torch.full((32,), math.nan)))
    (folder / "text.gguf").write_text("hello")
    good = (folder / "flat.gguf").read_bytes()
    (folder / "torn.gguf").write_bytes(good[: len(good) // 2])
    save_file({"vector": torch.ones(32)}, folder / "names.safetensors")
    save_file({"steering_vector": torch.ones(32, 2)}, folder / "flat.safetensors")
    save_vector(folder / "wide.safetensors", torch.ones(31), {"layer": 1})
    (folder / "torn.safetensors").write_bytes((folder / "wide.safetensors").read_bytes()[:-4])
    save_vector(folder / "scale.safetensors", torch.ones(32), {"layer": 1, "scale": "big"})
    (folder / "vector.npy").write_bytes(b"\x93NUMPY")
    needs = "the model needs 32 floating-point numbers"
    rows = r"the model has 4 layers, so \[n\], \[4, n\]"
    broken = "not a readable torch file"
    return {
        "wide.pt": needs, "nan.pt": "NaN or infinity", "rows.pt": rows, "cube.pt": rows,
        "number.pt": rows, "whole.pt": needs, "sparse.pt": "a dense tensor",
        "meta.pt": "a dense tensor", "keys.pt": r"a dict with keys \['weight'\]",
        "list.pt": "a list, where", "axis.pt": r"\[4, n\] belongs", "axis_wide.pt": needs,
        "array.pt": "a list, where", "empty.pt": broken, "text.pt": broken, "torn.pt": broken,
        "model.gguf": "architecture 'llama', not 'controlvector'",
        "none.gguf": r"without a direction.<k>", "names.gguf": "'direction.x'",
        "flat.gguf": r"of shape \[1, 32\]", "wide.gguf": needs, "far.gguf": "has layer 4",
        "nan.gguf": "NaN or infinity", "text.gguf": "not a readable GGUF file",
        "torn.gguf": "not a readable GGUF file", "names.safetensors": "no finite 1-D float tensor",
        "flat.safetensors": "no finite 1-D float tensor", "wide.safetensors": needs,
        "torn.safetensors": "not a readable safetensors file",
        "scale.safetensors": "scale 'big' is not a finite number",
        "vector.npy": r"not a vector file \(allowed: .safetensors, .gguf",
        "missing.pt": "no such file or folder",
    }  # fmt: skip


def test_malformed_and_foreign_files_are_one_clear_line(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name, message in bad_files(folder).items():
        out = tmp_path / "out"
        assert convert(folder / name, tiny_folder, out, "--layer", 1) == 2, name
        error = capsys.readouterr().err
        assert re.search(message, error) and name in error, f"{name}: {error}"
        assert error.startswith("error: ") and error.count("\n") == 1, f"{name}: {error}"
        assert not out.exists()


def test_chatspace_config_is_checked(tiny_folder, tmp_path, capsys):
    ex.export(source(), ["chatspace"], tmp_path, 1.0, False)
    path, good = tmp_path / "steering_config.json", '{"target_layer": 1, "model_name": "org/x"}'
    for text, message in (
        ("{", "not readable"),
        ("[1]", "not readable"),
        (good.replace("1", '"1"'), "target_layer '1' is not a whole number"),
        (good.replace("1", "4"), "layer 4, where the model has 0..3"),
        (good.replace("1", "-1"), "layer -1, where the model has 0..3"),
        (good, "is for model org/x, not"),
    ):
        path.write_text(text)
        assert convert(tmp_path, tiny_folder, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert convert(tmp_path, tiny_folder, tmp_path / "out", "--any-model") == 0


def test_scales_of_an_export_of_an_export_multiply(tiny_folder, tmp_path):
    ex.export(source(model=tiny_folder), ["safetensors"], tmp_path / "a", 2.0, False)
    more = ["--any-model", "--scale", "-1.5"]
    assert convert(tmp_path / "a", tiny_folder, tmp_path / "b", *more) == 0
    vector, metadata = load_vector(tmp_path / "b" / FILES["safetensors"])
    assert torch.equal(vector, -3 * VECTOR) and metadata["scale"] == "-3.0"
    assert "hold -3 x the vector as trained" in (tmp_path / "b" / "README.md").read_text()


def test_vector_of_another_model_is_refused_unless_told(tiny_folder, tmp_path, capsys):
    ex.export(source(), ["safetensors"], tmp_path / "a", 1.0, False)
    assert convert(tmp_path / "a", tiny_folder, tmp_path / "b") == 2
    assert "is for model org/model, not" in capsys.readouterr().err
    assert convert(tmp_path / "a", tiny_folder, tmp_path / "b", "--any-model") == 0
    assert load_vector(tmp_path / "b" / FILES["safetensors"])[1]["model"] == tiny_folder


def test_folder_of_several_vectors_is_ambiguous(tiny_folder, tmp_path, capsys):
    for name in ("layer_1.pt", "layer_2.pt"):
        torch.save(VECTOR, tmp_path / name)
    assert convert(tmp_path, tiny_folder, tmp_path / "out") == 2
    assert "2 files layer_<k>.pt; name the file itself" in capsys.readouterr().err
    torch.save(VECTOR, tmp_path / "v.pt")
    assert convert(tmp_path / "v.pt", tiny_folder, tmp_path / "out") == 2
    assert "has no layer in it: say which one with --layer" in capsys.readouterr().err


# ---------------------------------------------------------------- the command


def test_exported_run_is_the_run_and_its_card_says_so(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(a_run, "--format", "all", "--out", out) == 0
    assert f"exported {out}: steering_vector.safetensors" in capsys.readouterr().out
    trained_vector = load_vector(a_run / VECTOR_FILE)[0]
    for name in FILES.values():
        assert torch.equal(vf.read_vector(out / name, 4, 32).vector, trained_vector)
    text = (out / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert "steering-vector" in front["tags"] and "base_model" not in front  # it is a local folder
    record = json.loads((a_run / "run.json").read_text())
    result = json.loads((a_run / "eval.json").read_text())
    for fact in (
        "# Steering vector: src__role__pirate",
        "decoder block 1 (counted from 0)",
        record["counts"]["summary"],
        "at least 3 of 3 (roles)",
        f"{record['final']['steps']} steps",
        f"{result['likelihood']['steered']['nll']:.4f}",
        result["samples"][0]["answers"]["steered x1"],
        *(
            f"### {tool}"
            for form in ex.VECTOR_ALONE
            for tool in re.findall(rf"^## {form}: (.*)$", TEMPLATE.read_text(), re.M)
        ),
    ):
        assert fact in text, fact


def test_card_names_a_model_of_the_hub_and_what_it_does_not_know(tmp_path):
    ex.export(source(imported_from="evil.pt (x)"), ["pt"], tmp_path, 0.5, False)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.base_model == "org/model"
    assert (
        "evil.pt" in text
        and "No evaluation is at hand." in text
        and "hold 0.5 x the vector as imported" in text
    )
    assert "### repeng" not in text and "### steering-vectors" in text


def snippets(text):
    """{tool: code} of a card."""
    section = r"^### (\S+)[^\n]*\n\n(?:[^`#]*\n\n)?```\w+\n(.*?)```"
    found = re.findall(section, text, re.MULTILINE | re.DOTALL)
    return dict(found)


def test_card_snippets_that_need_no_other_tool_give_the_steered_model(
    a_run, tmp_path, monkeypatch, capsys
):
    assert export(a_run, "--format", "all", "--out", tmp_path, "--scale", 3) == 0
    codes = snippets((tmp_path / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(codes["hook_model.py"], names)
    model = names["model"]
    assert capsys.readouterr().out.strip()
    assert torch.equal(model.steering.vector, 3 * load_vector(a_run / VECTOR_FILE)[0])
    logits = model(input_ids=IDS).logits
    plain = {}
    exec(codes["transformers"], plain)
    assert torch.equal(plain["model"].to(logits.dtype)(input_ids=IDS).logits, logits)
    with model.steering_off():
        assert not torch.allclose(model(input_ids=IDS).logits, logits)


def test_folder_of_runs_is_exported_run_by_run_past_a_broken_one(evaluated, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(evaluated / "runs", runs)
    torn = the_folder(runs, "src__role__sailor")
    (torn / "steering_vector.safetensors").write_bytes(b"torn")
    assert export(runs, "--format", "pt", "--out", tmp_path / "out") == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    (written,) = (tmp_path / "out").rglob("layer_1.pt")
    relative = the_folder(runs).relative_to(runs)
    assert written.parent == tmp_path / "out" / relative


def test_nothing_that_exists_is_lost(a_run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert export(a_run, "--format", "pt", "--out", tmp_path) == 2
    assert "has another README.md: --overwrite replaces" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert export(a_run, "--format", "pt", "--out", tmp_path, "--overwrite") == 0
    assert export(a_run, "--format", "pt", "--out", tmp_path) == 0  # the same again
    assert export(a_run, "--format", "pt", "--out", tmp_path, "--scale", 2) == 2
    assert export(a_run, "--format", "safetensors", "--out", a_run, "--overwrite") == 2
    assert "is a run folder" in capsys.readouterr().err
    assert export(a_run, "--format", "pt", "--out", tmp_path / "README.md") == 2
    assert "README.md cannot be written" in capsys.readouterr().err


def test_folder_holds_one_vector_however_formats_are_added(a_run, tmp_path, capsys):
    names = {"gguf": FILES["gguf"], "pt": FILES["pt"], "chatspace": FILES["chatspace"]}
    for name in names:
        assert export(a_run, "--format", name, "--out", tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert all(f"`{name}`" in text for name in names.values()) and "### repeng" in text
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert export(a_run, "--format", "pt", "--out", tmp_path, "--scale", 2) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names.values()) and "--overwrite" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert export(a_run, "--format", "pt", "--out", tmp_path, "--scale", 2, "--overwrite") == 0
    vector = 2 * load_vector(a_run / VECTOR_FILE)[0]
    for name in names.values():
        assert torch.equal(vf.read_vector(tmp_path / name, 4, 32).vector, vector)
    torch.save(VECTOR, tmp_path / "layer_2.pt")  # another vector
    assert export(a_run, "--format", "pt", "--out", tmp_path, "--scale", 2) == 2
    assert "has another layer_2.pt" in capsys.readouterr().err
    assert export(a_run, "--format", "pt", "--out", tmp_path, "--scale", 2, "--overwrite") == 0
    assert not (tmp_path / "layer_2.pt").exists()


def test_second_process_on_an_export_folder_is_refused(a_run, tmp_path, capsys):
    with lock_folder(tmp_path):
        assert export(a_run, "--format", "pt", "--out", tmp_path) == 2
        assert "another process is writing there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert export(a_run, "--format", "pt", "--out", tmp_path) == 0


def test_files_that_come_while_waiting_for_the_lock_are_seen(a_run, tmp_path, monkeypatch):
    def after_another_process(folder):
        monkeypatch.setattr(ex, "lock_folder", lock_folder)
        ex.export(source(), ["gguf"], folder, 1.0, False)  # another vector
        return lock_folder(folder)

    out = tmp_path / "out"
    monkeypatch.setattr(ex, "lock_folder", after_another_process)
    assert export(a_run, "--format", "pt", "--out", out, "--overwrite") == 0
    trained_vector = load_vector(a_run / VECTOR_FILE)[0]
    for name in (FILES["gguf"], FILES["pt"]):
        assert torch.equal(vf.read_vector(out / name, 4, 32).vector, trained_vector)


@pytest.mark.parametrize("scale", ["1e39", "1e-60"])
def test_scale_that_leaves_no_vector_is_refused(a_run, tmp_path, capsys, scale):
    assert export(a_run, "--format", "pt", "--out", tmp_path / "o", "--scale", scale) == 2
    assert "is zero or infinite" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_folder_on_this_machine_is_never_taken_for_a_name_on_the_hub(
    a_run, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(a_run, folder)
    vector, header = load_vector(folder / VECTOR_FILE)
    assert header["model_is_local"] == "True"
    save_vector(folder / VECTOR_FILE, vector, {**header, "model": "models/tiny-llama"})
    monkeypatch.chdir(tmp_path)  # where there is no models/tiny-llama
    assert export(folder, "--format", "pt", "--out", "out") == 0
    assert "give its public name with --model" in capsys.readouterr().out
    assert "base_model" not in ModelCard(Path("out/README.md").read_text()).data.to_dict()
    assert export(folder, "--format", "pt", "--out", "hub", "--model", "org/tiny-llama") == 0
    assert "NOTE" not in capsys.readouterr().out
    assert ModelCard(Path("hub/README.md").read_text()).data.base_model == "org/tiny-llama"


@pytest.mark.parametrize("fault", ["torn", "another vector", "another version"])
def test_evaluation_of_something_else_is_left_out(a_run, tmp_path, capsys, fault):
    folder = tmp_path / "run"
    shutil.copytree(a_run, folder)
    path, vector_path = folder / "eval.json", folder / VECTOR_FILE
    if fault == "torn":
        path.write_text(path.read_text()[:500])
    elif fault == "another version":
        path.write_text(path.read_text().replace('"format_version": "4"', '"format_version": "2"'))
    else:
        vector, header = load_vector(vector_path)
        save_vector(vector_path, vector * 1.01, header)
    assert export(folder, "--format", "pt", "--out", tmp_path / "out") == 0
    assert "eval.json left out" in capsys.readouterr().out
    assert "No evaluation is at hand." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "file, key", [("run.json", "args"), ("run.json", "final"), ("eval.json", "samples")]
)
def test_incomplete_records_are_one_line(a_run, tmp_path, capsys, file, key):
    folder = tmp_path / "run"
    shutil.copytree(a_run, folder)
    record = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**record, key: [1]}))
    assert export(folder, "--format", "pt", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    why = (
        "no readable run.json" if key == "args" else "run.json or eval.json is not as this version"
    )
    assert f"{folder}: {why}" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_words_of_a_foreign_file_cannot_write_the_card(tiny_folder, tmp_path):
    header = {"layer": 1, "model": tiny_folder, "dataset": "x\n\n<script>a</script>\n# hi | there"}
    save_vector(tmp_path / "v.safetensors", VECTOR, header)
    assert convert(tmp_path / "v.safetensors", tiny_folder, tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Steering vector: x &lt;script&gt;a&lt;/script&gt; # hi \\| there\n" in text
    assert "<script>" not in text and "\n# hi" not in text


def test_unfinished_and_unreadable_runs_are_clear_errors(a_run, tmp_path, capsys):
    (tmp_path / "run.json").write_text((a_run / "run.json").read_text())
    assert export(tmp_path, "--format", "pt", "--out", tmp_path / "out") == 2
    assert "this run has not finished" in capsys.readouterr().err
    shutil.copy(a_run / VECTOR_FILE, tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert export(tmp_path, "--format", "pt", "--out", tmp_path / "out") == 2
    assert "no readable run.json (no args, config, config_hash, dataset)" in capsys.readouterr().err
    assert export(tmp_path / "nowhere", "--format", "pt", "--out", tmp_path / "out") == 2
    assert "no finished run below it" in capsys.readouterr().err
    assert convert(a_run, "org/model", tmp_path / "out") == 2
    assert "is a run folder: name it without --from" in capsys.readouterr().err


def test_run_on_a_local_copy_can_name_the_model_as_others_know_it(a_run, tmp_path, capsys):
    hub = ["--format", "all", "--model", "org/Tiny-Llama"]
    assert export(a_run, *hub, "--out", tmp_path / "a") == 0
    text = (tmp_path / "a" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "org/Tiny-Llama"
    assert a_run.parts[-1] in text and str(tmp_path.parent) not in text  # no path of this machine
    config = json.loads((tmp_path / "a" / "steering_config.json").read_text())
    assert config["model_name"] == "org/Tiny-Llama"
    header = load_vector(tmp_path / "a" / VECTOR_FILE)[1]
    assert header["model"] == "org/Tiny-Llama"
    assert export(a_run, *hub[:-1], "org/other", "--out", tmp_path / "b") == 2
    assert "tiny-llama, not org/other (--any-model" in capsys.readouterr().err
    assert export(a_run, *hub[:-1], "org/other", "--out", tmp_path / "b", "--any-model") == 0


def test_full_disk_is_one_line_and_leaves_whole_files_only(a_run, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        code = export(a_run, "--format", "all", "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert "README.md" not in {path.name for path in tmp_path.iterdir()}  # the card comes last
    assert not (tmp_path / ".partial").exists()
    for path in tmp_path.glob("steering_vector.*"):
        assert vf.read_vector(path, 4, 32).layer == 1
    assert export(a_run, "--format", "all", "--out", tmp_path) == 0


def test_missing_gguf_package_is_named(monkeypatch, a_run, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(a_run, "--format", "gguf", "--out", tmp_path / "out") == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert export(a_run, "--format", "pt", "--out", tmp_path / "out") == 0


def test_bad_flags_are_reported_all_at_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        export("--format", "pt", "--out", "o", "--scale", "nan", "--from", "a.pt")
    error = capsys.readouterr().err
    assert "--from needs --model" in error and "--scale nan" in error
    with pytest.raises(SystemExit, match="2"):
        export("run", "--format", "pt", "--out", "o", "--layer", "3")
    assert "--layer goes with --from" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        export("--format", "pt", "--out", "o")
    assert "name either RUN_DIR or --from" in capsys.readouterr().err


# ---------------------------------------------------------------- imported vectors at work


def test_vector_from_elsewhere_is_evaluated_as_it_is_and_trained_on(
    evaluated, a_run, tiny_folder, tmp_path, capsys, monkeypatch
):
    assert export(a_run, "--format", "pt", "--out", tmp_path / "theirs") == 0
    theirs, data = str(tmp_path / "theirs" / "layer_1.pt"), str(evaluated / "data")
    place = ["--data-root", data, "--model", tiny_folder, "--dtype", "fp32", "--device", "cpu"]
    name = ["--dataset", "src__role__pirate"]
    here = ["--out", str(tmp_path / "imported")]
    assert ev.main(["--vector", theirs, *place, *name, *here, *QUICK]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "imported"
    vector = load_vector(a_run / VECTOR_FILE)[0]
    assert torch.equal(load_vector(folder / VECTOR_FILE)[0], vector)
    assert f"run: {folder} (eval.json, samples.md" in said
    ours, theirs_too = (json.loads((f / "eval.json").read_text()) for f in (a_run, folder))
    assert theirs_too["likelihood"]["steered"] == ours["likelihood"]["steered"]
    assert theirs_too["flags"] == []  # those of ours are of its training
    # From then on it is a run like others: evaluated already, in reports, exported with its origin.
    monkeypatch.setattr(ev, "load_from_options", None)
    monkeypatch.setattr(ex, "load_from_options", None)
    assert ev.main(["--vector", theirs, *place, *name, *here, *QUICK]) == 0
    assert ev.main(["--run", str(tmp_path), "--report-only"]) == 0
    assert "imported" in (tmp_path / "report.csv").read_text().splitlines()[1]
    assert export(folder, "--format", "pt", "--out", tmp_path / "card") == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert "# Steering vector: layer_1.pt (bare tensor" in text  # not the data's name
    assert "| training | none here |" in text and "| data |" not in text
    assert "hold 1 x the vector as imported" in text
    # Another vector is not put in its place; one for another model or layer is refused.
    torch.save(2 * vector, tmp_path / "layer_1.pt")
    for more, message in (
        (["--vector", str(tmp_path / "layer_1.pt"), *here], "holds another run or vector"),
        (["--vector", str(folder), *here], "is a run folder"),
        (["--vector", theirs, "--layer", "2"], "has layer 1"),
    ):
        capsys.readouterr()
        assert ev.main([*more, *place, *name, *QUICK]) == 2
        assert message in capsys.readouterr().err
    start = ["--init-vector", str(folder / VECTOR_FILE), "--run-name", "further", "--lr", "0.0001"]
    base = command(data, tiny_folder, tmp_path / "runs", *start)
    assert ts.main(base) in (0, 1)
    lines = (the_folder(tmp_path / "runs") / "further" / "metrics.jsonl").read_text().splitlines()
    best = json.loads((a_run / "run.json").read_text())["final"]["best_val"]
    assert json.loads(lines[0]) == {"step": 0, "val_loss": pytest.approx(best, rel=1e-5)}


def test_run_of_no_steps_names_the_new_way(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        ts.main([*command("d", "m", "r"), "--init-vector", "x", "--max-steps", "0"])
    assert "eval_steering.py --vector FILE" in capsys.readouterr().err
