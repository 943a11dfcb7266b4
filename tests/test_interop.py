"""Exported files in the tools that they are for, each in its own environment: make test-interop.

A vector is trained, exported, and loaded by the lines on its card; the tool's logits and greedy
text must be ours, at the vector's layer and, for the same vector, at the layer above.
"""

import numpy as np
import pytest
import torch
from conftest import LAYER, ROOT, report, run_python, snippets

import export_vector as ex
import hook_model as hm
import train_steering as ts
from steering.loading import load_chat
from steering.vector_file import VECTOR_FILE

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def exported(fp32_folder, tmp_path_factory):
    """{layer: export folder} of a pirate vector, trained for 40 steps at LAYER."""
    root = tmp_path_factory.mktemp("exported")
    data = ["--data-root", str(ROOT / "sample_data"), "--dataset", "sample__role__pirate"]
    model = ["--model", fp32_folder, "--dtype", "fp32", "--device", "cpu", "--layer", str(LAYER)]
    assert ts.main([*data, *model, "--max-steps", "40", "--output-dir", str(root / "runs")]) == 0
    (run,) = (root / "runs").glob("*/*/sample__role__pirate")
    folders = {LAYER: root / "at", LAYER + 1: root / "above"}
    assert ex.main([str(run), "--format", "all", "--out", str(folders[LAYER])]) == 0
    moved = root / f"layer_{LAYER + 1}.pt"
    moved.write_bytes((folders[LAYER] / f"layer_{LAYER}.pt").read_bytes())
    arguments = ["--from", str(moved), "--model", fp32_folder, "--format", "all"]
    assert ex.main([*arguments, "--out", str(folders[LAYER + 1])]) == 0
    return folders


@pytest.fixture(scope="module")
def ids(fp32_folder, tmp_path_factory):
    """(path of ids.npy, the ids (1, T)) of a question."""
    inputs = load_chat(fp32_folder).inputs(["How was your day at work?"])
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, inputs["input_ids"].numpy())
    return path, inputs["input_ids"]


@pytest.fixture(scope="module")
def ours(fp32_folder, exported, ids):
    """{layer or "plain": (logits, greedy tokens)} by hook_model.py."""
    model = hm.load_model(fp32_folder, LAYER, dtype="fp32", device="cpu")
    vector = hm.load_vector(exported[LAYER] / VECTOR_FILE)[0]
    options = {"attention_mask": torch.ones_like(ids[1]), "max_new_tokens": 40, "do_sample": False}
    results = {}
    for layer in (LAYER, LAYER + 1):
        model.set_layer(layer)
        model.set_vector(vector)
        for name, scale in ((layer, 1.0), ("plain", 0.0)):
            with model.scaled(scale), torch.no_grad():
                logits = model(input_ids=ids[1]).logits.numpy()
                results[name] = logits, model.generate(input_ids=ids[1], **options).numpy()
    assert abs(results[LAYER][0] - results[LAYER + 1][0]).max() > 0.5
    assert not np.array_equal(results[LAYER][1], results["plain"][1])
    return results


@pytest.mark.parametrize(
    "format_name, tool, packages",
    [
        ("GGUF", "repeng", ("repeng", "transformers")),
        ("bare tensor", "steering-vectors", ("steering-vectors", "transformers")),
    ],
)
def test_lines_on_the_card_give_the_same_logits_and_text(
    format_name, tool, packages, exported, ids, ours, tmp_path
):
    differences = []
    for layer, folder in exported.items():
        code = tmp_path / "snippet.py"
        code.write_text(snippets((folder / "README.md").read_text())[tool])
        script = ROOT / "tests" / "consumers" / "run_snippet.py"
        run_python(tool, script, code, ids[0], tmp_path / "out.npz", cwd=folder)
        theirs = np.load(tmp_path / "out.npz")
        logits, tokens = ours[layer]
        differences.append(abs(theirs["logits"] - logits).max())
        assert differences[-1] < 1e-2
        assert np.array_equal(theirs["tokens"], tokens)
        elsewhere = ours[LAYER if layer != LAYER else LAYER + 1][0]
        assert abs(theirs["logits"] - elsewhere).max() > 0.5
    report(format_name, tool, packages, max(differences), "same greedy text")


def test_llama_cpp_shifts_logits_as_we_do_at_the_layer_and_at_no_other(
    packaged_gguf, exported, ids, ours, tmp_path
):
    correlations, differences = {}, []
    for layer, folder in exported.items():
        script, out = ROOT / "tests" / "consumers" / "run_llama_cpp.py", tmp_path / f"{layer}.npz"
        vector = folder / "steering_vector.gguf"
        run_python("llama-cpp-python", script, packaged_gguf, vector, ids[0], out)
        theirs = np.load(out)
        assert theirs["layer"] == layer
        change = (ours[layer][0] - ours["plain"][0])[0].ravel()
        names = ("below", "at", "above")
        found = {
            name: np.corrcoef((theirs[name] - theirs["plain"]).ravel(), change)[0, 1]
            for name in names
        }
        assert found["at"] > 0.999 and max(found["below"], found["above"]) < 0.97, found
        correlations[layer] = " / ".join(f"{found[name]:.5f}" for name in names)
        differences.append(abs(theirs["at"] - ours[layer][0][0]).max())
    said = "; ".join(f"k={k}: {text}" for k, text in correlations.items())
    more = f"correlation at k-1 / k / k+1: {said}"
    report("GGUF", "llama-cpp-python", ("llama_cpp_python",), max(differences), more)
