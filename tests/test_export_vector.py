"""export_vector.py: every format holds the same vector at the same layer; no code is run."""

import json
import math
import os
import pickle
import resource
import shutil
import sys

import gguf
import pytest
import torch
from conftest import IDS, QUICK, VECTOR, block_outputs, command, export, snippets, the_folder
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import eval_steering as ev
import export_vector as ex
import hook_model as hm
import train_steering as ts
from interop.formats import VECTOR_ALONE, read_vector
from steering.run_folder import lock_folder
from steering.vector_file import VECTOR_FILE, load_vector, save_vector


def convert(path, model, out, *more):
    """The exit code of `--from path` for a model, as a file of ours."""
    return export("--from", path, "--model", model, "--out", out, "--format", "safetensors", *more)


def write_gguf(path, architecture, tensors, **fields):
    """Write a GGUF file of {name: tensor}."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_string(f"{architecture}.{name}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edit_json(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def evaluated(trained):
    """The root of two finished tiny runs at layer 1, one of them evaluated."""
    assert ev.main(["--run", str(the_folder(trained / "runs")), *QUICK]) == 0
    return trained


@pytest.fixture
def a_run(evaluated, tmp_path):
    """A copy of the evaluated run."""
    folder = tmp_path / "src__role__pirate"
    shutil.copytree(the_folder(evaluated / "runs"), folder)
    return folder


@pytest.fixture
def layer_1(tmp_path):
    """A file of VECTOR for layer 1."""
    torch.save(VECTOR, tmp_path / "layer_1.pt")
    return tmp_path / "layer_1.pt"


# ---------------------------------------------------------------- formats and layers


@pytest.mark.parametrize("name", VECTOR_ALONE)
def test_every_format_reads_back_bit_for_bit_at_its_layer_and_no_other(
    name, tiny_folder, tmp_path, capsys
):
    for layer in (1, 2):
        path = tmp_path / f"layer_{layer}.pt"
        torch.save(VECTOR, path)
        model = ["--model", tiny_folder, "--format", name]
        assert export("--from", path, *model, "--out", tmp_path / f"{layer}") == 0
        assert convert(tmp_path / f"{layer}", tiny_folder, tmp_path / f"back {layer}") == 0
        vector, header = load_vector(tmp_path / f"back {layer}" / VECTOR_FILE)
        assert torch.equal(vector, VECTOR) and header["layer"] == str(layer)
        assert convert(tmp_path / f"{layer}", tiny_folder, tmp_path / "no", "--layer", 3) == 2
        assert f"has layer {layer}: say which with --layer (now: 3)" in capsys.readouterr().err


def test_files_hold_what_other_tools_look_for(layer_1, tiny_folder, tmp_path):
    out = tmp_path / "out"
    base = ["--model", tiny_folder, "--format", "all", "--out", out]
    assert export("--from", layer_1, *base, "--scale", 2) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "layer_1.pt",
        "steering_config.json",
        "steering_vector.gguf",
        "steering_vector.pt",
        "steering_vector.safetensors",
    ]
    reader = gguf.GGUFReader(out / "steering_vector.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "controlvector"
    assert values["controlvector.model_hint"] == "llama"
    assert values["controlvector.layer_count"] == 1
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, tensor.data.ndim) == ("direction.1", "F32", 1)
    assert torch.equal(torch.from_numpy(tensor.data.copy()), 2 * VECTOR)
    assert torch.equal(torch.load(out / "layer_1.pt", weights_only=True), 2 * VECTOR)
    state = torch.load(out / "steering_vector.pt", weights_only=True)
    assert [*state] == ["steering_vector"] and torch.equal(state["steering_vector"], 2 * VECTOR)
    config = json.loads((out / "steering_config.json").read_text())
    assert config == {"model_name": tiny_folder, "target_layer": 1, "init_scale": 0.0}
    vector, header = load_vector(out / VECTOR_FILE)
    assert torch.equal(vector, 2 * VECTOR) and header["scale"] == "2.0"

    # The scale of an export of an export is of the original vector.
    more = ["--scale", "-1.5"]
    assert convert(out, tiny_folder, tmp_path / "again", *more) == 0
    vector, header = load_vector(tmp_path / "again" / VECTOR_FILE)
    assert torch.equal(vector, -3 * VECTOR) and header["scale"] == "-3.0"
    card = (tmp_path / "again" / "README.md").read_text()
    assert "hold -3 x the vector as imported" in card


def test_rows_of_other_projects_files_are_of_the_layers_that_made_them(tiny_folder, tmp_path):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    rows = [output.mean(dim=(0, 1)) for _, output in sorted(block_outputs(model, IDS).items())]
    with torch.no_grad():  # as persona-vectors collects them: embeddings, then every block
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    theirs = [state.mean(dim=(0, 1)) for state in states]
    axis = {"vector": torch.stack(rows).bfloat16(), "type": "pos_3", "role": "pirate"}
    torch.save(torch.stack(theirs), tmp_path / "persona-vectors.pt")
    torch.save(axis, tmp_path / "assistant-axis.pt")
    for kind, close in (("persona-vectors", 1e-6), ("assistant-axis", 1e-3)):
        for layer, row in enumerate(rows):
            out = tmp_path / f"{kind} {layer}"
            code = convert(tmp_path / f"{kind}.pt", tiny_folder, out, "--layer", layer)
            if kind == "persona-vectors" and layer == 3:  # their last row is after the final norm
                assert code == 2
                continue
            vector, header = load_vector(out / VECTOR_FILE)
            assert torch.allclose(vector, row, atol=close, rtol=0.01)
            assert header["layer"] == str(layer) and header["model"] == tiny_folder
            assert kind in header["imported_from"]


def test_a_file_that_does_not_say_which_layer_must_be_told(tiny_folder, tmp_path, capsys):
    vectors = {f"direction.{layer}": VECTOR * layer for layer in (1, 2, 3)}
    write_gguf(tmp_path / "v.gguf", "controlvector", vectors, model_hint="mistral")
    torch.save(VECTOR, tmp_path / "v.pt")
    for name, layer, message in (
        ("v.gguf", None, "has layer 1, 2, 3: say which with --layer"),
        ("v.gguf", 0, "has layer 1, 2, 3: say which with --layer"),
        ("v.pt", None, "has layer unknown: say which with --layer"),
        ("v.pt", 4, "--layer 4 is out of range"),
    ):
        more = [] if layer is None else ["--layer", layer]
        assert convert(tmp_path / name, tiny_folder, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err
    assert convert(tmp_path / "v.gguf", tiny_folder, tmp_path / "out", "--layer", 2) == 0
    assert "is for a 'mistral', not a 'llama'" in capsys.readouterr().out
    assert torch.equal(load_vector(tmp_path / "out" / VECTOR_FILE)[0], 2 * VECTOR)
    for layer in (1, 2):
        torch.save(VECTOR, tmp_path / f"layer_{layer}.pt")
    (tmp_path / "v.gguf").rename(tmp_path / "other.gguf")
    assert convert(tmp_path, tiny_folder, tmp_path / "no") == 2
    assert "2 files layer_<k>.pt" in capsys.readouterr().err


def test_layer_is_counted_from_zero_and_gguf_has_no_zero(tiny_folder, tmp_path, capsys):
    torch.save(VECTOR, tmp_path / "layer_0.pt")
    base = ["--from", tmp_path / "layer_0.pt", "--model", tiny_folder, "--out", tmp_path / "out"]
    assert export(*base, "--format", "all") == 2
    assert "layer 0: --format gguf can hold layers 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(*base, "--format", "pt", "--format", "chatspace") == 0
    assert read_vector(tmp_path / "out" / "layer_0.pt", 4, 32).layer == 0


# ---------------------------------------------------------------- what is refused


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(tiny_folder, tmp_path, capsys):
    mark = tmp_path / "was run"
    for value in (Hostile(mark), {"vector": Hostile(mark)}, [VECTOR, Hostile(mark)]):
        torch.save(value, tmp_path / "zip.pt")
        torch.save(value, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        (tmp_path / "plain.bin").write_bytes(pickle.dumps(value))
        for name, why in (
            ("zip.pt", f"it imports {os.mkdir.__module__}.mkdir"),
            ("old.pth", f"it imports {os.mkdir.__module__}.mkdir"),
            ("plain.bin", "not a readable torch file"),
        ):
            assert convert(tmp_path / name, tiny_folder, tmp_path / "out", "--layer", 1) == 2
            error = capsys.readouterr().err
            assert why in error and "nothing in it was run" in error and error.count("\n") == 1
            assert not mark.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)  # it would have been run
    assert mark.exists()


NEEDS = "32 floating-point numbers belong"
ROWS = "the model has 4 layers, so [n], [4, n]"
TENSORS = {  # what torch.save is given: what the error says
    "wide": (torch.ones(33), NEEDS),
    "nan": (torch.full((32,), math.nan), "NaN or infinity"),
    "rows": (torch.ones(7, 32), ROWS),
    "number": (torch.tensor(3.0), ROWS),
    "whole": (torch.ones(32, dtype=torch.long), NEEDS),
    "sparse": (torch.ones(32).to_sparse(), "a dense tensor"),
    "meta": (torch.ones(32, device="meta"), "a dense tensor"),
    "keys": ({"weight": torch.ones(32)}, "a dict with keys ['weight']"),
    "axis": ({"vector": torch.ones(5, 32), "type": "x"}, ROWS),
    "axis_wide": ({"vector": torch.ones(4, 31), "type": "x"}, NEEDS),
    "array": ({"steering_vector": [1.0] * 32}, "a list, where"),
}
CONTROL_VECTORS = {  # name of the tensor, the tensor: what the error says
    "names": ("direction.x", torch.ones(32), "'direction.x'"),
    "flat": ("direction.1", torch.ones(1, 32), "of shape [1, 32]"),
    "wide": ("direction.1", torch.ones(64), NEEDS),
    "far": ("direction.4", torch.ones(32), "has layer 4"),
    "nan": ("direction.1", torch.full((32,), math.nan), "NaN or infinity"),
}


def bad_files(folder):
    """[(path of a file that is no vector of the tiny model, what the error says)]."""
    found = []
    for name, (value, message) in TENSORS.items():
        torch.save(value, folder / f"{name}.pt")
        found.append((folder / f"{name}.pt", message))
    for name, (tensor_name, tensor, message) in CONTROL_VECTORS.items():
        write_gguf(folder / f"{name}.gguf", "controlvector", {tensor_name: tensor})
        found.append((folder / f"{name}.gguf", message))
    write_gguf(folder / "model.gguf", "llama", {"token_embd.weight": torch.ones(4, 32)})
    write_gguf(folder / "none.gguf", "controlvector", {})
    save_file({"vector": torch.ones(32)}, folder / "names.safetensors")
    save_file({"steering_vector": torch.ones(32, 2)}, folder / "flat.safetensors")
    save_vector(folder / "wide.safetensors", torch.ones(31), {"layer": 1})
    save_vector(folder / "scale.safetensors", torch.ones(32), {"layer": 1, "scale": "big"})
    for whole in ("rows.pt", "flat.gguf", "wide.safetensors"):
        data = (folder / whole).read_bytes()
        (folder / f"torn_{whole}").write_bytes(data[: len(data) // 2])
    (folder / "text.pt").write_text("hello")
    (folder / "vector.npy").write_bytes(b"\x93NUMPY")
    for name, message in (
        ("model.gguf", "architecture 'llama', not 'controlvector'"),
        ("none.gguf", "without a direction.<k>"),
        ("names.safetensors", "no finite 1-D float tensor"),
        ("flat.safetensors", "no finite 1-D float tensor"),
        ("wide.safetensors", NEEDS),
        ("scale.safetensors", "'big'"),
        ("torn_rows.pt", "not a readable torch file"),
        ("torn_flat.gguf", "not a readable GGUF file"),
        ("torn_wide.safetensors", "not a readable safetensors file"),
        ("text.pt", "not a readable torch file"),
        ("vector.npy", "not a vector file (allowed: .safetensors, .gguf"),
        ("missing.pt", "no such file or folder"),
    ):
        found.append((folder / name, message))
    return found


def test_malformed_and_foreign_files_are_one_clear_line(tiny_folder, tmp_path, capsys):
    for path, message in bad_files(tmp_path):
        assert convert(path, tiny_folder, tmp_path / "out", "--layer", 1) == 2, path.name
        error = capsys.readouterr().err
        assert message in error and path.name in error, f"{path.name}: {error}"
        assert error.startswith("error: ") and error.count("\n") == 1, f"{path.name}: {error}"
        assert not (tmp_path / "out").exists()


def test_the_layer_and_model_in_chatspaces_config_are_checked(
    layer_1, tiny_folder, tmp_path, capsys
):
    out = tmp_path / "theirs"
    base = ["--from", layer_1, "--model", tiny_folder, "--format", "chatspace"]
    assert export(*base, "--out", out) == 0
    for changes, message in (
        ({"target_layer": "1"}, "target_layer '1' is not a whole number"),
        ({"target_layer": 4}, "layer 4: the model has 0..3"),
        ({"target_layer": -1}, "layer -1: the model has 0..3"),
        ({"target_layer": 1, "model_name": "org/x"}, "is for model org/x, not"),
    ):
        edit_json(out / "steering_config.json", **changes)
        assert convert(out, tiny_folder, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert convert(out, tiny_folder, tmp_path / "out", "--any-model") == 0
    assert load_vector(tmp_path / "out" / VECTOR_FILE)[1]["model"] == tiny_folder


def test_words_of_a_foreign_file_cannot_write_the_card(tiny_folder, tmp_path):
    header = {"layer": 1, "model": tiny_folder, "dataset": "x\n\n<script>a</script>\n# hi | there"}
    save_vector(tmp_path / "v.safetensors", VECTOR, header)
    assert convert(tmp_path / "v.safetensors", tiny_folder, tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Steering vector: x &lt;script&gt;a&lt;/script&gt; # hi \\| there\n" in text
    assert "<script>" not in text and "\n# hi" not in text


# ---------------------------------------------------------------- runs and their cards


def test_exported_run_is_the_run_and_its_card_says_so(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(a_run, "--format", "all", "--out", out) == 0
    assert f"exported {out}: steering_vector.safetensors" in capsys.readouterr().out
    trained_vector = load_vector(a_run / VECTOR_FILE)[0]
    for name in ("steering_vector.safetensors", "steering_vector.gguf", "layer_1.pt"):
        assert torch.equal(read_vector(out / name, 4, 32).vector, trained_vector)
    text = (out / "README.md").read_text()
    assert "base_model" not in ModelCard(text).data.to_dict()  # it is a local folder
    record = json.loads((a_run / "run.json").read_text())
    result = json.loads((a_run / "eval.json").read_text())
    for fact in (
        "# Steering vector: src__role__pirate",
        "decoder block 1 (counted from 0)",
        "hold 1 x the vector as trained",
        record["counts"]["summary"],
        "at least 3 of 3 (roles)",
        f"{record['final']['steps']} steps",
        f"{result['conditions']['steered x1']['nll']['mean']:.4f}",
        result["samples"][0]["answers"]["steered x1"],
        *("### hook_model.py", "### llama.cpp", "### repeng", "### steering-vectors"),
        *("### transformers alone", "### chatspace"),
    ):
        assert fact in text, fact


def test_card_snippets_that_need_no_other_tool_give_the_steered_model(
    a_run, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert export(a_run, "--format", "all", "--out", out, "--scale", 3) == 0
    codes = snippets((out / "README.md").read_text())
    monkeypatch.chdir(out)
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


def test_the_recommended_scale_is_that_of_the_evaluation(a_run, evaluated, tmp_path, capsys):
    result = json.loads((a_run / "eval.json").read_text())
    vector = load_vector(a_run / VECTOR_FILE)[0]
    wanted = ["--format", "pt", "--scale", "recommended"]
    for scale, code in ((0.5, 0), (None, 2)):
        recommended = {**result["recommended"], "scale": scale, "why": "none is good"}
        edit_json(a_run / "eval.json", recommended=recommended)
        assert export(a_run, *wanted, "--out", tmp_path / f"{scale}") == code
    assert torch.equal(read_vector(tmp_path / "0.5", 4, 32).vector, 0.5 * vector)
    assert "no recommended scale (none is good)" in capsys.readouterr().err
    sailor = the_folder(evaluated / "runs", "src__role__sailor")
    assert export(sailor, *wanted, "--out", tmp_path / "none") == 2
    assert "no recommended scale (eval_steering.py finds one)" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["1e39", "1e-60"])
def test_scale_that_leaves_no_vector_is_refused(layer_1, tiny_folder, tmp_path, capsys, scale):
    assert convert(layer_1, tiny_folder, tmp_path / "out", "--scale", scale) == 2
    assert "is zero or infinite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_of_runs_is_exported_run_by_run_past_a_broken_one(evaluated, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(evaluated / "runs", runs)
    (the_folder(runs, "src__role__sailor") / VECTOR_FILE).write_bytes(b"torn")
    assert export(runs, "--format", "pt", "--out", tmp_path / "out") == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    (written,) = (tmp_path / "out").rglob("layer_1.pt")
    assert written.parent == tmp_path / "out" / the_folder(runs).relative_to(runs)


def test_unfinished_and_unreadable_runs_are_clear_errors(a_run, tiny_folder, tmp_path, capsys):
    def refused(folder, message):
        assert export(folder, "--format", "pt", "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "nowhere", "no finished run below it")
    (a_run / VECTOR_FILE).rename(tmp_path / VECTOR_FILE)
    refused(a_run, "this run has not finished")
    (tmp_path / VECTOR_FILE).rename(a_run / VECTOR_FILE)
    edit_json(a_run / "eval.json", samples=[1])
    refused(a_run, f"{a_run}: run.json or eval.json is not as this version writes it")
    (a_run / "eval.json").unlink()
    edit_json(a_run / "run.json", final=[1])
    refused(a_run, f"{a_run}: run.json or eval.json is not as this version writes it")
    (a_run / "run.json").write_text("{}")
    refused(a_run, "no readable run.json (no args, config, config_hash, dataset)")
    assert convert(a_run, tiny_folder, tmp_path / "out") == 2
    assert "is a run folder: name it without --from" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["torn", "of another vector", "by an older version"])
def test_evaluation_of_something_else_is_left_out(a_run, tmp_path, capsys, fault):
    path = a_run / "eval.json"
    if fault == "torn":
        path.write_text(path.read_text()[:500])
    elif fault == "by an older version":
        path.write_text(path.read_text().replace('"conditions"', '"likelihood"'))
    else:
        vector, header = load_vector(a_run / VECTOR_FILE)
        save_vector(a_run / VECTOR_FILE, vector * 1.01, header)
    assert export(a_run, "--format", "pt", "--out", tmp_path / "out") == 0
    assert "eval.json left out" in capsys.readouterr().out
    assert "No evaluation is at hand." in (tmp_path / "out" / "README.md").read_text()


def test_run_on_a_local_copy_can_name_the_model_as_others_know_it(a_run, tmp_path, capsys):
    hub = ["--format", "all", "--model", "org/Tiny-Llama"]
    assert export(a_run, *hub, "--out", tmp_path / "a") == 0
    assert "NOTE" not in capsys.readouterr().out
    text = (tmp_path / "a" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "org/Tiny-Llama"
    assert str(tmp_path.parent) not in text  # no path of this machine
    config = json.loads((tmp_path / "a" / "steering_config.json").read_text())
    assert config["model_name"] == "org/Tiny-Llama"
    assert load_vector(tmp_path / "a" / VECTOR_FILE)[1]["model"] == "org/Tiny-Llama"
    assert export(a_run, *hub[:-1], "org/other", "--out", tmp_path / "b") == 2
    assert "tiny-llama, not org/other (--any-model" in capsys.readouterr().err
    assert export(a_run, *hub[:-1], "org/other", "--out", tmp_path / "b", "--any-model") == 0


def test_folder_on_this_machine_is_never_taken_for_a_name_on_the_hub(a_run, tmp_path, capsys):
    record = json.loads((a_run / "run.json").read_text())
    edit_json(a_run / "run.json", args={**record["args"], "model": "models/tiny-llama"})
    assert export(a_run, "--format", "pt", "--out", tmp_path / "out") == 0  # there is none here
    assert "give its public name with --model" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`models/tiny-llama`" in text and "base_model" not in ModelCard(text).data.to_dict()


# ---------------------------------------------------------------- what is there already


def test_folder_holds_one_vector_and_nothing_in_it_is_lost(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    pt = [a_run, "--format", "pt", "--out", out]
    assert export(*pt) == 2
    assert "has another README.md: --overwrite replaces" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["README.md"]
    assert export(*pt, "--overwrite") == 0
    assert export(*pt) == 0  # the same again

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for more, message in (
        (["--scale", 2], "has another layer_1.pt, README.md: --overwrite replaces"),
        (["--format", "gguf"], "has another README.md: --overwrite replaces"),
    ):
        assert export(*pt, *more) == 2
        assert message in capsys.readouterr().err
    assert export(a_run, "--format", "gguf", "--out", out, "--scale", 2, "--overwrite") == 2
    assert "must hold the same vector: --format gguf --format pt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    torch.save(VECTOR, out / "layer_2.pt")
    assert export(*pt) == 2
    assert "has another layer_2.pt: --overwrite" in capsys.readouterr().err
    assert export(*pt, "--format", "gguf", "--scale", 2, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {*before, "steering_vector.gguf"}
    for name in ("layer_1.pt", "steering_vector.gguf"):
        vector = read_vector(out / name, 4, 32).vector
        assert torch.equal(vector, 2 * load_vector(a_run / VECTOR_FILE)[0])

    assert export(a_run, "--format", "safetensors", "--out", a_run, "--overwrite") == 2
    assert "is a run folder" in capsys.readouterr().err
    assert export(a_run, "--format", "pt", "--out", out / "README.md") == 2
    assert "README.md cannot be written" in capsys.readouterr().err


def test_second_process_on_an_export_folder_is_refused(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    with lock_folder(out):
        assert export(a_run, "--format", "pt", "--out", out) == 2
        assert "another process is writing there" in capsys.readouterr().err
    assert not list(out.iterdir())
    assert export(a_run, "--format", "pt", "--out", out) == 0


def test_full_disk_is_one_line_and_leaves_whole_files_only(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        code = export(a_run, "--format", "all", "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    written = {path.name for path in out.iterdir()}
    assert "steering_vector.gguf" in written
    assert written <= {"steering_vector.safetensors", "steering_vector.gguf"}  # the card comes last
    for name in written:
        assert read_vector(out / name, 4, 32).layer == 1
    assert export(a_run, "--format", "all", "--out", out) == 0


def test_missing_gguf_package_is_named(monkeypatch, a_run, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(a_run, "--format", "gguf", "--out", tmp_path / "out") == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert export(a_run, "--format", "pt", "--out", tmp_path / "out") == 0


def test_bad_flags_are_reported_all_at_once(capsys):
    for arguments, messages in (
        ("--from a.pt --scale nan", ["--from needs --model", "--scale nan"]),
        ("--from a.pt --format lora --scale 0", ["needs --data-root and --dataset", "--scale 0.0"]),
        ("run --layer 3 --dataset d", ["--layer goes with --from", "--dataset goes with --from"]),
        ("", ["name either RUN_DIR or --from"]),
    ):
        with pytest.raises(SystemExit, match="2"):
            export(*arguments.split(), "--format", "pt", "--out", "o")
        error = capsys.readouterr().err
        assert all(message in error for message in messages)


# ---------------------------------------------------------------- imported vectors at work


@pytest.fixture
def imported(a_run, evaluated, tiny_folder, tmp_path):
    """(run folder of an exported vector, the command that evaluated it there)."""
    assert export(a_run, "--format", "pt", "--out", tmp_path / "theirs") == 0
    data = ["--data-root", str(evaluated / "data"), "--dataset", "src__role__pirate"]
    model = ["--model", tiny_folder, "--dtype", "fp32", "--device", "cpu"]
    here = [
        "--vector",
        str(tmp_path / "theirs" / "layer_1.pt"),
        "--out",
        str(tmp_path / "in" / "x"),
    ]
    evaluation = [*data, *model, *here, *QUICK]
    assert ev.main(evaluation) == 0
    return tmp_path / "in" / "x", evaluation


def test_vector_from_elsewhere_is_evaluated_as_it_is_and_is_then_a_run(
    imported, a_run, tmp_path, capsys, monkeypatch
):
    folder, evaluation = imported
    vector = load_vector(a_run / VECTOR_FILE)[0]
    assert torch.equal(load_vector(folder / VECTOR_FILE)[0], vector)
    ours = json.loads((a_run / "eval.json").read_text())
    theirs = json.loads((folder / "eval.json").read_text())
    assert theirs["conditions"]["steered x1"]["nll"] == ours["conditions"]["steered x1"]["nll"]
    assert "norm out of range" not in theirs["flags"]  # those of ours are of its training
    monkeypatch.setattr(ev, "load_from_options", None)  # nothing below needs the model
    monkeypatch.setattr(ex, "load_from_options", None)
    assert ev.main(evaluation) == 0
    assert ev.main(["--run", str(tmp_path / "in"), "--report-only"]) == 0
    assert "imported" in (tmp_path / "in" / "report.csv").read_text().splitlines()[1]
    assert export(folder, "--format", "pt", "--out", tmp_path / "card") == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert "# Steering vector: layer_1.pt (bare tensor" in text  # not the data's name
    assert "| training | none here |" in text and "| data |" not in text
    assert "hold 1 x the vector as imported" in text
    for path, message in (  # what is there is not replaced
        (tmp_path / "theirs" / "layer_1.pt", "holds another run or vector"),
        (folder, "is a run folder"),
    ):
        torch.save(2 * vector, tmp_path / "theirs" / "layer_1.pt")
        capsys.readouterr()
        assert ev.main([*evaluation, "--vector", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_training_goes_on_from_a_vector_from_elsewhere(
    imported, a_run, evaluated, tiny_folder, tmp_path
):
    start = ["--init-vector", str(imported[0] / VECTOR_FILE), "--lr", "0.01"]
    base = command(str(evaluated / "data"), tiny_folder, tmp_path / "runs", *start)
    assert ts.main(base) == 0
    lines = (the_folder(tmp_path / "runs") / "metrics.jsonl").read_text().splitlines()
    best = json.loads((a_run / "run.json").read_text())["final"]["best_val"]
    assert json.loads(lines[0]) == {"step": 0, "val_loss": pytest.approx(best, rel=1e-5)}


def test_run_of_no_steps_names_the_new_way(capsys):
    with pytest.raises(SystemExit, match="2"):
        ts.main([*command("d", "m", "r"), "--init-vector", "x", "--max-steps", "0"])
    assert "eval_steering.py --vector FILE" in capsys.readouterr().err
