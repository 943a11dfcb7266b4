"""export_vector.py: every format holds the same vector at the same layer; no code is run."""

import json
import math
import os
import pickle
import resource
import shutil
import sys
import warnings

import gguf
import pytest
import torch
from conftest import IDS, QUICK, VECTOR, block_outputs, command, export, snippets, the_folder
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import eval_steering as ev
import export_vector as ex
import hook_model as hm
import train_steering as ts
from interop.formats import VECTOR_ALONE, file_names, import_vector
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


def record_of(folder):
    """The run.json of a folder."""
    return json.loads((folder / "run.json").read_text())


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
        torch.save(VECTOR, tmp_path / f"layer_{layer}.pt")
        source = ["--from", tmp_path / f"layer_{layer}.pt", "--model", tiny_folder]
        assert export(*source, "--format", name, "--out", tmp_path / f"{layer}") == 0
        path = tmp_path / f"{layer}" / file_names(layer)[name][0]
        assert convert(path, tiny_folder, tmp_path / f"back {layer}") == 0
        vector, header = load_vector(tmp_path / f"back {layer}" / VECTOR_FILE)
        assert torch.equal(vector, VECTOR) and header["layer"] == str(layer)
        assert convert(path, tiny_folder, tmp_path / "no", "--layer", 3) == 2
        assert f"has layer {layer}: say which with --layer (now: 3)" in capsys.readouterr().err


def test_files_hold_what_other_tools_look_for(layer_1, tiny_folder, tmp_path):
    out = tmp_path / "out"
    source = ["--from", layer_1, "--model", tiny_folder]
    assert export(*source, "--format", "all", "--out", out, "--scale", 2) == 0
    reader = gguf.GGUFReader(out / "steering_vector.gguf")
    for key, value in (
        ("general.architecture", "controlvector"),
        ("controlvector.model_hint", "llama"),
        ("controlvector.layer_count", 1),
    ):
        assert reader.get_field(key).contents() == value
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, tensor.data.ndim) == ("direction.1", "F32", 1)
    assert torch.equal(torch.from_numpy(tensor.data.copy()), 2 * VECTOR)
    assert torch.equal(torch.load(out / "layer_1.pt", weights_only=True), 2 * VECTOR)
    ((key, tensor),) = torch.load(out / "steering_vector.pt", weights_only=True).items()
    assert key == "steering_vector" and torch.equal(tensor, 2 * VECTOR)
    config = json.loads((out / "steering_config.json").read_text())
    assert config == {"model_name": tiny_folder, "target_layer": 1, "init_scale": 0.0}
    vector, header = load_vector(out / VECTOR_FILE)
    assert torch.equal(vector, 2 * VECTOR) and header["scale"] == "2.0"

    # The scale of an export of an export is of the original vector.
    assert convert(out / VECTOR_FILE, tiny_folder, tmp_path / "again", "--scale", "-1.5") == 0
    vector, header = load_vector(tmp_path / "again" / VECTOR_FILE)
    assert torch.equal(vector, -3 * VECTOR) and header["scale"] == "-3.0"
    assert "hold -3 x the vector as imported" in (tmp_path / "again" / "README.md").read_text()


def test_rows_of_other_projects_files_are_of_the_layers_that_made_them(tiny_folder, tmp_path):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    rows = [output.mean(dim=(0, 1)) for _, output in sorted(block_outputs(model, IDS).items())]
    with torch.no_grad():  # as persona-vectors collects them: embeddings, then every block
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    theirs = torch.stack([state.mean(dim=(0, 1)) for state in states])
    axis = {"vector": torch.stack(rows), "type": "pos_3", "role": "pirate"}
    for kind, value, layers in (("persona-vectors", theirs, 3), ("assistant-axis", axis, 4)):
        path = tmp_path / f"{kind}.pt"
        torch.save(value, path)
        for layer in range(layers):
            source = import_vector(path, tiny_folder, layer)
            assert torch.allclose(source.vector, rows[layer], atol=1e-6)
            assert (source.layer, source.metadata["model"]) == (layer, tiny_folder)
            assert source.metadata["imported_from"] == f"{kind}.pt ({kind})"
    # The last row of persona-vectors is taken after the final norm.
    assert convert(tmp_path / "persona-vectors.pt", tiny_folder, tmp_path, "--layer", 3) == 2


def test_a_file_that_does_not_say_which_layer_must_be_told(tiny_folder, tmp_path, capsys):
    vectors = {f"direction.{layer}": VECTOR * layer for layer in (1, 2, 3)}
    write_gguf(tmp_path / "v.gguf", "controlvector", vectors, model_hint="mistral")
    torch.save(VECTOR, tmp_path / "v.pt")
    for name, more, message in (
        ("v.gguf", [], "has layer 1, 2, 3: say which with --layer"),
        ("v.gguf", ["--layer", 0], "has layer 1, 2, 3: say which with --layer"),
        ("v.pt", [], "has layer unknown: say which with --layer"),
        ("v.pt", ["--layer", 4], "layer 4: the model has 0..3"),
    ):
        assert convert(tmp_path / name, tiny_folder, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err
    assert convert(tmp_path / "v.gguf", tiny_folder, tmp_path / "out", "--layer", 2) == 0
    assert "is for a 'mistral', not a 'llama'" in capsys.readouterr().out
    assert torch.equal(load_vector(tmp_path / "out" / VECTOR_FILE)[0], 2 * VECTOR)


def test_layer_is_counted_from_zero_and_gguf_has_no_zero(tiny_folder, tmp_path, capsys):
    torch.save(VECTOR, tmp_path / "layer_0.pt")
    base = ["--from", tmp_path / "layer_0.pt", "--model", tiny_folder, "--out", tmp_path / "out"]
    refused = f"error: {tmp_path / 'out'}: no gguf: layer 0: --format gguf can hold layers 1"
    assert export(*base, "--format", "gguf") == 2
    assert refused in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert export(*base, "--format", "all") == 2  # and those that can be written are
    assert refused in capsys.readouterr().err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    alone = [name for key, names in file_names(0).items() if key in VECTOR_ALONE for name in names]
    assert written == {*alone, "README.md"} - {"steering_vector.gguf"}
    assert "gguf" not in (tmp_path / "out" / "README.md").read_text()
    assert import_vector(tmp_path / "out" / "layer_0.pt", tiny_folder).layer == 0


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64],
)
def test_every_float_dtype_is_read_as_its_numbers_in_fp32(dtype, tiny_folder, tmp_path):
    vector = VECTOR.to(dtype)
    torch.save(vector, tmp_path / "layer_1.pt")
    torch.save(torch.nn.Parameter(vector[None].repeat(4, 1)), tmp_path / "rows.pt")
    save_file({"steering_vector": vector}, tmp_path / "v.safetensors")
    for name in ("layer_1.pt", "rows.pt", "v.safetensors"):
        found = import_vector(tmp_path / name, tiny_folder, 1).vector
        assert torch.equal(found, vector.float()) and found.dtype == torch.float32
        assert not found.requires_grad
    assert torch.equal(load_vector(tmp_path / "v.safetensors")[0], vector.float())


# ---------------------------------------------------------------- what is refused


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_refused_and_not_run(tiny_folder, tmp_path, capsys):
    mark = tmp_path / "was run"
    imports = f"it imports {os.mkdir.__module__}.mkdir"
    for value in (Hostile(mark), {"vector": Hostile(mark)}, [VECTOR, Hostile(mark)]):
        torch.save(value, tmp_path / "zip.pt")
        torch.save(value, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        (tmp_path / "plain.bin").write_bytes(pickle.dumps(value))
        for name, why in (("zip.pt", imports), ("old.pth", imports), ("plain.bin", "not a read")):
            assert convert(tmp_path / name, tiny_folder, tmp_path / "out", "--layer", 1) == 2
            error = capsys.readouterr().err
            assert why in error and "nothing in it was run" in error and error.count("\n") == 1
    assert not mark.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)  # it would have been run
    assert mark.exists()


NEEDS = "32 floating-point numbers belong"
ROWS = "the model has 4 layers, so [n], [4, n]"
TENSORS = [  # what torch.save is given, what the error says
    (torch.ones(33), NEEDS),
    (torch.full((32,), math.nan), "NaN or infinity"),
    (torch.ones(7, 32), ROWS),
    (torch.ones(32, dtype=torch.long), NEEDS),
    (torch.ones(32, dtype=torch.int8), f"torch.int8 of shape [32], where {NEEDS}"),
    (torch.ones(32, dtype=torch.bool), f"torch.bool of shape [32], where {NEEDS}"),
    (torch.ones(32, dtype=torch.complex64), f"torch.complex64 of shape [32], where {NEEDS}"),
    (torch.full((32,), 1e39, dtype=torch.float64), "torch.float64 with NaN or infinity as fp32"),
    (torch.full((32,), math.nan).to(torch.float8_e4m3fn), "float8_e4m3fn with NaN or infinity"),
    (torch.nested.nested_tensor([torch.ones(32)], layout=torch.jagged), "a dense tensor"),
    (torch.ones(32, device="meta"), "a dense tensor"),
    (torch.ones(32).to_sparse(), "a dense tensor"),
    ({"weight": torch.ones(32)}, "a dict with keys ['weight']"),
    ({"vector": torch.ones(5, 32), "type": "x"}, ROWS),
    ({"steering_vector": [1.0] * 32}, "a list, where"),
]
CONTROL_VECTORS = [  # the one tensor of a GGUF file, what the error says
    ({"direction.x": torch.ones(32)}, "'direction.x'"),
    ({"direction.1": torch.ones(1, 32)}, "of shape [1, 32]"),
    ({"direction.4": torch.ones(32)}, "has layer 4"),
    ({}, "without a direction.<k>"),
]


def bad_files(folder):
    """{name of a file that is no vector of the tiny model: what the error says}."""
    found = {"vector.npy": "no such file, or no vector file", "no.pt": "no such file"}
    with warnings.catch_warnings(action="ignore"):  # torch is about to drop these two kinds
        quantized = torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8)
        torch.save(quantized, folder / "quantized.pt")
        torch.save(torch.nested.nested_tensor([torch.ones(32)]), folder / "nested.pt")
    found["quantized.pt"] = f"torch.qint8 of shape [32], where {NEEDS}"
    found["nested.pt"] = "a dense tensor"
    (folder / "vector.npy").write_bytes(b"\x93NUMPY")
    for i, (value, message) in enumerate(TENSORS):
        torch.save(value, folder / f"{i}.pt")
        found[f"{i}.pt"] = message
    for i, (tensors, message) in enumerate(CONTROL_VECTORS):
        write_gguf(folder / f"{i}.gguf", "controlvector", tensors)
        found[f"{i}.gguf"] = message
    write_gguf(folder / "model.gguf", "llama", {"token_embd.weight": torch.ones(4, 32)})
    found["model.gguf"] = "architecture 'llama', not 'controlvector'"
    save_vector(folder / "wide.safetensors", torch.ones(31), {"layer": 1})
    found["wide.safetensors"] = NEEDS
    save_file({"steering_vector": torch.ones(32).double() * 1e39}, folder / "big.safetensors")
    found["big.safetensors"] = "(as fp32); found {'steering_vector': 'torch.float64 [32]'}"
    save_vector(folder / "scale.safetensors", torch.ones(32), {"layer": 1, "scale": "big"})
    found["scale.safetensors"] = "'big'"
    for whole, kind in (("0.pt", "torch"), ("1.gguf", "GGUF"), ("wide.safetensors", "safetensors")):
        data = (folder / whole).read_bytes()
        (folder / f"torn {whole}").write_bytes(data[: len(data) // 2])
        found[f"torn {whole}"] = f"not a readable {kind} file"
    return found


def test_malformed_and_foreign_files_are_one_clear_line(tiny_folder, tmp_path, capsys):
    for name, message in bad_files(tmp_path).items():
        assert convert(tmp_path / name, tiny_folder, tmp_path / "out", "--layer", 1) == 2, name
        error = capsys.readouterr().err
        assert message in error and error.count(name) == 1, f"{name}: {error}"
        assert error.startswith("error: ") and error.count("\n") == 1, f"{name}: {error}"
        assert not (tmp_path / "out").exists()


def test_the_layer_and_model_that_a_file_names_are_checked(layer_1, tiny_folder, tmp_path, capsys):
    base = ["--from", layer_1, "--model", tiny_folder, "--format", "chatspace"]
    assert export(*base, "--out", tmp_path / "theirs") == 0
    path = tmp_path / "theirs" / "steering_vector.pt"
    for changes, message in (
        ({"target_layer": "1"}, "target_layer '1' of steering_config.json is not a whole number"),
        ({"target_layer": 4}, "layer 4: the model has 0..3"),
        ({"target_layer": -1}, "layer -1: the model has 0..3"),
        ({"target_layer": 1, "model_name": "org/x"}, "is for model org/x, not"),
    ):
        edit_json(path.with_name("steering_config.json"), **changes)
        assert convert(path, tiny_folder, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert convert(path, tiny_folder, tmp_path / "out", "--any-model") == 0
    assert load_vector(tmp_path / "out" / VECTOR_FILE)[1]["model"] == tiny_folder


def test_words_of_a_foreign_file_cannot_write_the_card(tiny_folder, tmp_path):
    header = {"layer": 1, "model": tiny_folder, "dataset": "x\n\n<script>a</script>\n# hi | there"}
    save_vector(tmp_path / "v.safetensors", VECTOR, header)
    assert convert(tmp_path / "v.safetensors", tiny_folder, tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# Steering vector: x &lt;script&gt;a&lt;/script&gt; # hi \\| there\n" in text
    assert "<script>" not in text and "\n# hi" not in text


# ---------------------------------------------------------------- runs and their cards


def test_exported_run_is_the_run_and_its_card_says_so(a_run, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(a_run, "--format", "all", "--out", out) == 0
    assert f"exported {out}: steering_vector.safetensors" in capsys.readouterr().out
    for name in VECTOR_ALONE:
        source = import_vector(out / file_names(1)[name][0], tiny_folder)
        assert torch.equal(source.vector, load_vector(a_run / VECTOR_FILE)[0])
    text = (out / "README.md").read_text()
    assert "base_model" not in ModelCard(text).data.to_dict()  # it is a local folder
    record = record_of(a_run)
    result = json.loads((a_run / "eval.json").read_text())
    tools = "hook_model.py", "llama.cpp", "repeng", "steering-vectors", "transformers", "chatspace"
    for fact in (
        "# Steering vector: src__role__pirate",
        "decoder block 1 (counted from 0)",
        "hold 1 x the vector as trained",
        record["counts"]["summary"],
        "at least 3 of 3 (roles)",
        f"{record['final']['steps']} steps",
        f"{result['conditions']['steered x1']['nll']['mean']:.4f}",
        result["samples"][0]["answers"]["steered x1"],
        *(f"### {tool}" for tool in tools),
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


@pytest.mark.parametrize("scale", ["1e39", "1e-60"])
def test_scale_that_leaves_no_vector_is_refused(layer_1, tiny_folder, tmp_path, capsys, scale):
    assert convert(layer_1, tiny_folder, tmp_path / "out", "--scale", scale) == 2
    assert "is zero or infinite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_of_runs_is_exported_run_by_run_past_a_broken_one(evaluated, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(evaluated / "runs", runs)
    (the_folder(runs, "src__role__pirate") / VECTOR_FILE).write_bytes(b"torn")
    assert export(runs, "--format", "pt", "--out", tmp_path / "out") == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    (written,) = (tmp_path / "out").rglob("layer_1.pt")
    sailor = the_folder(runs, "src__role__sailor")
    assert written.parent == tmp_path / "out" / sailor.relative_to(runs)


def test_unfinished_and_unreadable_runs_are_clear_errors(a_run, tiny_folder, tmp_path, capsys):
    def refused(folder, message, *more):
        assert export(folder, "--format", "pt", "--out", tmp_path / "out", *more) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    edit_json(a_run / "eval.json", recommended={"scale": None, "why": "none is good"})
    refused(a_run, "no recommended scale (none is good)", "--scale", "recommended")
    odd = f"{a_run}: run.json or eval.json is not as this version writes it"
    edit_json(a_run / "eval.json", samples=[1])
    refused(a_run, odd)
    (a_run / "eval.json").unlink()
    edit_json(a_run / "run.json", final=[1])
    refused(a_run, odd)
    assert convert(a_run, tiny_folder, tmp_path / "out") == 2
    assert "is a run folder: name it without --from" in capsys.readouterr().err
    (a_run / VECTOR_FILE).unlink()
    refused(a_run, "this run has not finished")
    (a_run / "run.json").write_text("{}")
    refused(a_run, "no readable run.json (no args, config, config_hash, dataset)")
    refused(tmp_path / "nowhere", "no finished run below it")


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


def test_files_name_the_model_as_others_know_it_and_no_folder_of_this_machine(
    a_run, tmp_path, capsys
):
    hub = [a_run, "--format", "all", "--model", "org/Tiny-Llama"]
    assert export(*hub, "--out", tmp_path / "a") == 0
    assert "NOTE" not in capsys.readouterr().out
    text = (tmp_path / "a" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "org/Tiny-Llama"
    assert str(tmp_path.parent) not in text
    config = json.loads((tmp_path / "a" / "steering_config.json").read_text())
    assert config["model_name"] == "org/Tiny-Llama"
    assert load_vector(tmp_path / "a" / VECTOR_FILE)[1]["model"] == "org/Tiny-Llama"
    hub[-1] = "org/other"
    assert export(*hub, "--out", tmp_path / "b") == 2
    assert "tiny-llama, not org/other (--any-model" in capsys.readouterr().err
    assert export(*hub, "--out", tmp_path / "b", "--any-model") == 0
    # A folder may look like a name on the hub, and be of another working directory.
    args = {**record_of(a_run)["args"], "model": "models/tiny-llama"}
    edit_json(a_run / "run.json", args=args)
    assert export(*hub[:3], "--out", tmp_path / "c") == 0
    assert "give its public name with --model" in capsys.readouterr().out
    text = (tmp_path / "c" / "README.md").read_text()
    assert (
        "| models/tiny-llama (llama)" in text and "base_model" not in ModelCard(text).data.to_dict()
    )


# ---------------------------------------------------------------- what is there already


def test_folder_holds_one_vector_and_nothing_in_it_is_lost(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    pt = [a_run, "--format", "pt", "--out", out]

    def refused(message, *arguments):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert export(*arguments) == 2
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    refused("has another README.md: --overwrite replaces", *pt)
    assert export(*pt, "--overwrite") == 0
    assert export(*pt) == 0  # the same again
    refused("has another layer_1.pt, README.md: --overwrite replaces", *pt, "--scale", 2)
    gguf_alone = [a_run, "--format", "gguf", "--out", out, "--scale", 2, "--overwrite"]
    refused("has layer_1.pt, which must hold the same vector", *gguf_alone)
    assert export(*pt, *gguf_alone[1:]) == 0
    for path in (out / "layer_1.pt", out / "steering_vector.gguf"):
        vector = import_vector(path, record_of(a_run)["args"]["model"]).vector
        assert torch.equal(vector, 2 * load_vector(a_run / VECTOR_FILE)[0])
    torch.save(VECTOR, out / "layer_2.pt")
    refused("has layer_2.pt, which must hold the same vector", *pt, *gguf_alone[1:])
    refused("is a run folder", a_run, "--format", "safetensors", "--out", a_run, "--overwrite")
    refused("README.md cannot be written", *pt[:-1], out / "README.md")


def test_second_process_on_an_export_folder_is_refused(a_run, tmp_path, capsys):
    out = tmp_path / "out"
    with lock_folder(out):
        assert export(a_run, "--format", "pt", "--out", out) == 2
        assert "another process is writing there" in capsys.readouterr().err
    assert not list(out.iterdir())
    assert export(a_run, "--format", "pt", "--out", out) == 0


def test_full_disk_is_one_line_and_leaves_whole_files_only(a_run, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        code = export(a_run, "--format", "all", "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
    # What a .pt file needs is more than there was, and the card comes last.
    written = [path.name for path in sorted(out.iterdir())]
    assert written == ["steering_vector.gguf", "steering_vector.safetensors"]
    for name in written:
        assert import_vector(out / name, tiny_folder).layer == 1


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


def test_vector_from_elsewhere_is_evaluated_as_it_is_and_is_then_a_run(
    a_run, evaluated, tiny_folder, tmp_path, capsys, monkeypatch
):
    assert export(a_run, "--format", "pt", "--out", tmp_path / "theirs") == 0
    path = tmp_path / "theirs" / "layer_1.pt"
    folder = tmp_path / "imported"
    data = ["--data-root", str(evaluated / "data"), "--dataset", "src__role__pirate"]
    model = ["--model", tiny_folder, "--dtype", "fp32", "--device", "cpu", "--out", str(folder)]
    assert ev.main([*data, *model, *QUICK, "--vector", str(path)]) == 0
    vector = load_vector(a_run / VECTOR_FILE)[0]
    assert torch.equal(load_vector(folder / VECTOR_FILE)[0], vector)
    ours = json.loads((a_run / "eval.json").read_text())
    theirs = json.loads((folder / "eval.json").read_text())
    assert theirs["conditions"]["steered x1"]["nll"] == ours["conditions"]["steered x1"]["nll"]
    assert "under budget" in ours["flags"] and "under budget" not in theirs["flags"]

    # It is a run from then on: evaluated already, and exported with its origin.
    monkeypatch.setattr(ev, "load_from_options", None)
    monkeypatch.setattr(ex, "load_from_options", None)
    assert ev.main([*data, *model, *QUICK, "--vector", str(path)]) == 0
    assert export(folder, "--format", "pt", "--out", tmp_path / "card") == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert "# Steering vector: layer_1.pt (bare tensor" in text  # not the data's name
    assert "| training | none here |" in text and "| data |" not in text
    assert "hold 1 x the vector as imported" in text

    # Another vector is not put in its place.
    torch.save(2 * vector, path)
    for other, message in ((path, "holds another run or vector"), (folder, "is a run folder")):
        capsys.readouterr()
        assert ev.main([*data, *model, *QUICK, "--vector", str(other)]) == 2
        assert message in capsys.readouterr().err


def test_a_blend_is_the_weighted_sum_of_runs_and_is_evaluated_as_one_vector(
    evaluated, tiny_folder, tmp_path, capsys
):
    runs = [the_folder(evaluated / "runs", f"src__role__{name}") for name in ("pirate", "sailor")]
    first, second = (load_vector(run / VECTOR_FILE)[0] for run in runs)
    to = ["--out", tmp_path / "out", "--format", "safetensors", "--format", "peft"]
    assert export(*runs, "--blend", "0.7", "-0.4", "--name", "old salt", *to) == 0
    out = tmp_path / "out" / "old salt"
    vector, header = load_vector(out / VECTOR_FILE)
    assert torch.equal(vector, 0.7 * first + -0.4 * second)
    assert header["blend_of"] == "0.7 x src__role__pirate + -0.4 x src__role__sailor"
    assert "config_hash" not in header and header["layer"] == "1"
    text = (out / "README.md").read_text()
    assert "# Steering vector: old salt" in text and "hold 1 x the vector as blended" in text
    assert "| blend of | 0.7 x src__role__pirate" in text and "| data |" not in text
    bias = load_file(out / "peft" / "adapter_model.safetensors")
    (bias,) = (tensor for name, tensor in bias.items() if name.endswith("bias"))
    assert torch.equal(bias, vector)

    # Any persona's data can be asked how much of it is left.
    data = ["--data-root", str(evaluated / "data"), "--dataset", "src__role__sailor"]
    data += ["--model", tiny_folder, "--dtype", "fp32", "--device", "cpu"]
    where = ["--vector", str(out / VECTOR_FILE), "--out", str(tmp_path / "blend")]
    assert ev.main([*data, *where, *QUICK]) == 0
    assert load_vector(tmp_path / "blend" / VECTOR_FILE)[1]["blend_of"] == header["blend_of"]
    result = json.loads((tmp_path / "blend" / "eval.json").read_text())
    assert result["norms"]["steered"] == pytest.approx(vector.norm().item())

    # A part may come from elsewhere.
    torch.save(first, tmp_path / "salty.pt")
    where = ["--vector", str(tmp_path / "salty.pt"), "--out", str(tmp_path / "salty")]
    assert ev.main([*data, *where, "--layer", "1", *QUICK]) == 0
    parts = [runs[1], tmp_path / "salty", "--blend", "1", "2", "--name", "mix"]
    assert export(*parts, "--out", tmp_path / "out", "--format", "safetensors") == 0
    header = load_vector(tmp_path / "out" / "mix" / VECTOR_FILE)[1]
    assert header["blend_of"] == "1 x src__role__sailor + 2 x salty.pt (bare tensor)"


def test_blends_that_do_not_go_together_are_refused(evaluated, tmp_path, capsys):
    runs = [the_folder(evaluated / "runs", f"src__role__{name}") for name in ("pirate", "sailor")]
    to = ["--out", tmp_path / "out", "--format", "pt"]
    for flags, message in (
        ("--blend 1 1", "--blend and --name: both or neither"),
        ("--blend 1 --name x", "with --blend one for each weight"),
        ("--blend 0 0 --name x", "not all 0"),
        ("--blend 1 nan --name x", "finite numbers"),
        ("--blend 1 1 --name ../x", '--name "../x"'),
        ("--blend 1 1 --name x --scale recommended", "--blend: --scale is a number"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export(*runs, *flags.split(), *to)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        export("--from", "x.pt", "--model", "m", "--blend", "1", "1", "--name", "x", *to)
    assert "--blend goes with RUN_DIR" in capsys.readouterr().err
    header = load_vector(runs[1] / VECTOR_FILE)[1]
    elsewhere = {"model": "x", "model_digest": "files-0"}
    for change, message in (({"layer": 2}, "a blend has one layer"), (elsewhere, "--any-model")):
        other = tmp_path / message
        shutil.copytree(runs[1], other)
        edit_json(other / "run.json", args={**record_of(other)["args"], **change})
        save_vector(other / VECTOR_FILE, VECTOR, {**header, **change})
        assert export(runs[0], other, "--blend", "1", "1", "--name", "x", *to) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_an_exported_vector(a_run, evaluated, tiny_folder, tmp_path, capsys):
    assert export(a_run, "--format", "safetensors", "--out", tmp_path / "out") == 0
    start = ["--init-vector", str(tmp_path / "out" / VECTOR_FILE), "--lr", "0.01"]
    base = command(str(evaluated / "data"), tiny_folder, tmp_path / "runs", *start)
    with pytest.raises(SystemExit, match="2"):
        ts.main([*base, "--max-steps", "0"])
    assert "eval_steering.py --vector FILE" in capsys.readouterr().err
    assert ts.main(base) == 0
    lines = (the_folder(tmp_path / "runs") / "metrics.jsonl").read_text().splitlines()
    best = record_of(a_run)["final"]["best_val"]
    assert json.loads(lines[0]) == {"step": 0, "val_loss": pytest.approx(best, rel=1e-5)}
