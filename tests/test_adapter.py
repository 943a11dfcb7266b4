"""Rank-1 adapters: where they fit, what is fitted, what the files do, and what is refused."""

import json
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf
from conftest import HEADS, IDS, ROOT, SMALL, VECTOR, command, export, rows_of, the_folder, tiny
from safetensors.torch import load_file

import export_vector as ex
import hook_model as hm
import train_steering as ts
from interop import adapter as ad
from interop import adapter_check
from interop.formats import Source, files_of, import_vector
from steering.loading import load_tokenizer
from steering.vector_file import VECTOR_FILE, load_vector, vector_bytes

FIT = ["llama", "mistral", "qwen2", "qwen3", "cohere", "gpt_neox", "opt", "granite"]
MIXTURE = "its MLP is a mixture of experts"
NORM = "does not reach the layer's output unchanged"
WEIGHTS = "adapter_model.safetensors"
CALIBRATION = ROOT / "interop" / "calibration"


def steered(architecture, layer=1, **changes):
    model = hm.SteerModel(tiny(architecture, **changes), layer)
    model.set_vector(VECTOR)
    return model


def source_of(model, row=None):
    """A Source of VECTOR at the layer of a model, which servers load as we do."""
    kind = model.config.model_type
    metadata = {"model": "org/model", "model_type": kind, "layer": model.layer}
    site = ad.find_site(model)
    return Source(Path("x"), VECTOR, metadata, site=site, module=site.name, row=row)


TEXT = {**SMALL, **HEADS}
COMPOSITES = {  # models that see images, (config, class that it names)
    "qwen3_5": lambda: (
        hf.Qwen3_5Config(
            text_config={
                **TEXT,
                "layer_types": ["linear_attention", "full_attention"] * 2,
                **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
                **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
            },
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
        ),
        hf.Qwen3_5ForConditionalGeneration,
    ),
    "mistral3": lambda: (
        hf.Mistral3Config(
            text_config={"model_type": "mistral", **TEXT},
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 8,
            },
        ),
        hf.Mistral3ForConditionalGeneration,
    ),
}


def save_composite(architecture, folder):
    """Save a tiny random model that sees images; returns it."""
    torch.manual_seed(0)
    config, kind = COMPOSITES[architecture]()
    model = kind(config).eval()
    model.save_pretrained(folder)
    return model


def logits_with_lora(model, path, ids):
    """The plain model's logits with what PEFT would add, from the tensors of a LoRA file."""
    tensors = {}
    for key, tensor in load_file(path).items():
        name, part = re.fullmatch(r"base_model\.model\.(.+)\.lora_(.+)", key).groups()
        tensors[part] = tensor

    def hook(module, inputs, output):
        added = inputs[0] @ tensors["A.weight"].T @ tensors["B.weight"].T
        return output + added + tensors.get("B.bias", 0.0)

    handle = model.model.get_submodule(name).register_forward_hook(hook)
    with model.steering_off():
        logits = model(input_ids=ids).logits
    handle.remove()
    return logits


def inputs_of_site(model, ids):
    """What enters the linear layer of an adapter, (T, features), by the test's own hook."""
    caught = []
    module = ad.find_site(model).module
    handle = module.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    model(input_ids=ids[None])
    handle.remove()
    return caught[0].reshape(len(ids), -1)


@dataclass
class Lora:
    """What the file of an adapter holds, and where it is for."""

    a: torch.Tensor
    b: torch.Tensor
    layer: int


def lora_of(path):
    """The Lora of a file."""
    tensors = load_file(path)
    a, b = (tensors[key] for key in sorted(tensors))
    return Lora(a[0], b[:, 0], int(re.search(r"layers\.(\d+)\.", min(tensors))[1]))


# ---------------------------------------------------------------- where, what, how much


@pytest.mark.parametrize("architecture", FIT)
def test_peft_files_are_the_vector_exactly_and_lora_files_are_v_times_a_z(architecture, tmp_path):
    model = steered(architecture)
    logits = model(input_ids=IDS[:1]).logits
    z = inputs_of_site(model, IDS[0])
    row = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(1))
    source = source_of(model, row)

    def add(module, inputs, output):  # v (a . z) in place of v
        added = (z @ row)[:, None] * VECTOR
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    handle = model.layers[1].register_forward_hook(add)
    with model.steering_off():
        by_products = model(input_ids=IDS[:1]).logits
    handle.remove()
    assert not torch.allclose(by_products, logits, atol=1e-2)
    for name, expected in (("peft", logits), ("lora", by_products)):
        config, weights = files_of(name, source).values()
        (tmp_path / WEIGHTS).write_bytes(weights)
        assert torch.allclose(
            logits_with_lora(model, tmp_path / WEIGHTS, IDS[:1]), expected, atol=1e-4
        )
        config = json.loads(config)
        assert config["target_modules"] == [source.site.name]
        assert config["lora_bias"] == (name == "peft")
        assert config["r"] == config["lora_alpha"] == 1


@pytest.mark.parametrize(
    "architecture, changes, reason",
    [
        ("gemma2", {}, NORM),
        ("gemma3", {}, NORM),
        ("granite", {"residual_multiplier": 0.22}, r"\(off by 78%\)"),
        ("qwen3_moe", {}, MIXTURE),
        ("gpt2", {}, "no nn.Linear is at"),
    ],
)
def test_models_that_the_trick_does_not_fit_are_refused_with_the_reason(
    architecture, changes, reason
):
    model = steered(architecture, **changes)
    before = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match=f"no adapter for .*{reason}"):
        ad.find_site(model)
    assert torch.equal(model(input_ids=IDS).logits, before)  # the check leaves no trace


@pytest.mark.parametrize("architecture", COMPOSITES)
def test_adapters_are_for_the_class_that_the_config_names_and_lm_eval_for_the_one_it_loads(
    architecture, tmp_path, capsys
):
    served = hm.SteerModel(save_composite(architecture, tmp_path / "model"), 1)
    torch.save(VECTOR, tmp_path / "layer_1.pt")
    source = ["--from", tmp_path / "layer_1.pt", "--model", tmp_path / "model", "--dtype", "fp32"]
    formats = ["--format", "peft", "--format", "lm-eval"]
    assert export(*source, *formats, "--out", tmp_path / "out") == 0
    plain = served(input_ids=IDS).logits
    adapted = logits_with_lora(served, tmp_path / "out" / "peft" / WEIGHTS, IDS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model = AutoModelForImageTextToText.from_pretrained(" in card
    served.set_vector(VECTOR)
    assert torch.allclose(adapted, served(input_ids=IDS).logits, atol=1e-5)
    assert not torch.allclose(adapted, plain, atol=1e-2)

    config = torch.load(tmp_path / "out" / "lm_eval_steered.pt", weights_only=True)
    loaded = hm.load_model(tmp_path / "model", 1, dtype="fp32", device="cpu")
    assert loaded.model.base_model.get_submodule(*config) is loaded.layers[1]
    assert torch.allclose(loaded(input_ids=IDS).logits, plain, atol=1e-5)

    loaded.save_vector(tmp_path / VECTOR_FILE)  # says the model type of the class that is loaded
    capsys.readouterr()
    import_vector(tmp_path / VECTOR_FILE, str(tmp_path / "model"))
    assert "WARNING" not in capsys.readouterr().out

    (data,) = files_of("lora-gguf", source_of(loaded, torch.arange(48.0))).values()
    (tmp_path / "a.gguf").write_bytes(data)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kind = reader.get_field("general.architecture").contents()
    assert kind == architecture.replace("_", "")
    assert reader.tensors[0].name == "blk.1.ffn_down.weight.lora_a"


@pytest.mark.parametrize(
    "named, reason",
    [
        ("NobodysModel", "does not make the NobodysModel that its config names"),
        ("Qwen3ForCausalLM", "does not make the Qwen3ForCausalLM that its config names"),
        ("MistralForCausalLM", "layer 1 of LlamaForCausalLM is not in MistralForCausalLM"),
    ],
)
def test_a_class_that_is_not_to_be_had_leaves_all_other_formats(named, reason, tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = [named]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    torch.save(VECTOR, tmp_path / "layer_1.pt")
    source = ["--from", tmp_path / "layer_1.pt", "--model", tmp_path / "model", "--dtype", "fp32"]
    assert export(*source, "--format", "peft", "--out", tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'no'}: no peft: no adapter for {tmp_path}")
    assert reason in error and error.count("\n") == 1 and not (tmp_path / "no").exists()
    formats = ["--format", "peft", "--format", "lm-eval", "--format", "pt"]
    assert export(*source, *formats, "--out", tmp_path / "out") == 2
    assert reason in capsys.readouterr().err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"layer_1.pt", "lm_eval_steered.pt", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "### lm-evaluation-harness" in card and "PEFT" not in card and "peft/" not in card


def test_the_row_is_the_ridge_regression_of_one_on_what_enters_the_projection():
    model = steered("llama")
    examples = rows_of(*range(7, 67))  # more than a forward pass takes
    row = ad.fit_row(model, ad.find_site(model), examples)
    z = []
    w = []
    for example in examples:
        z.append(inputs_of_site(model, torch.tensor(example.input_ids)).double())
        near = torch.arange(len(example.input_ids)) < 3 + ad.OPENING  # of where the answer begins
        w.append(torch.where(near, ad.OPENING_WEIGHT, 1.0).double())
    z = torch.cat(z)
    w = torch.cat(w)
    gram = (z * w[:, None]).T @ z / w.sum()
    mean = (z * w[:, None]).sum(0) / w.sum()
    ridge = ad.RIDGE * gram.diagonal().median() * torch.eye(len(gram), dtype=torch.double)
    expected = torch.linalg.solve(gram + ridge, mean)
    assert torch.allclose(row.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    products = torch.cat(ad.row_products(model, ad.find_site(model), row, examples))
    assert torch.allclose(products.double(), z @ row.double(), atol=1e-3)


def test_a_layer_that_lets_little_through_has_a_finite_row():
    model = steered("opt")  # a ReLU, of which most never fire
    model.layers[1].fc1.bias.data[:30] = -100
    row = ad.fit_row(model, ad.find_site(model), rows_of(9, 14, 11))
    assert row.isfinite().all()


def test_what_an_adapter_loses_is_that_of_plain_forwards():
    model = steered("qwen3")
    examples = rows_of(*range(9, 69))  # more than a forward pass takes
    site = ad.find_site(model)
    row = torch.full((site.module.in_features,), 0.5)
    found = adapter_check.compare_with_adapter(model, site, row, examples)
    sums = torch.zeros(5)
    for example in examples:
        ids = torch.tensor(example.input_ids)
        labels = torch.tensor(example.labels)[1:]
        products = (inputs_of_site(model, ids) @ row)[None]
        each = []
        for context in (model.steering_off(), model.scaled(1), ad.as_adapter(model, products)):
            with context, torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            each.append(logits[labels >= 0])
        target = labels[labels >= 0][:, None]
        nll = [-logits.gather(1, target).sum() for logits in each]
        kl = [(p.exp() * (p - q)).sum() for p, q in pairwise(each)]
        sums += torch.stack([nll[0], kl[0], nll[1], kl[1], nll[2]])
    vanilla, kl_vector, vector, kl, adapter = (sums / found["tokens"]).tolist()
    nll = {"vanilla": vanilla, "vector": vector, "adapter": adapter}
    assert found["nll"] == pytest.approx(nll, abs=1e-4)
    assert [found["kl_vector"], found["kl"]] == pytest.approx([kl_vector, kl], abs=1e-4)
    assert found["lost"] == pytest.approx(kl / kl_vector, rel=1e-2) and found["lost"] > 0.01
    assert found["tokens"] == sum(len(e.labels) - 4 for e in examples) and found["rows"] == 60


def test_the_sample_is_varied_and_every_fifth_document_of_it_is_not_fitted_on(
    smol_chat, monkeypatch
):
    monkeypatch.setattr(ad, "SAMPLE", CALIBRATION)
    fit, heldout = ad.sample_examples(smol_chat)
    texts = [{tuple(e.input_ids) for e in part} for part in (fit, heldout)]
    assert not texts[0] & texts[1] and len(texts[0]) > 3.9 * len(texts[1]) > 150
    assert sum(len(e.input_ids) for e in fit) > 50_000
    assert sum(any(label >= 0 for label in e.labels) for e in fit) > 50  # conversations


# ---------------------------------------------------------------- files of other tools


def test_gguf_adapter_is_as_llama_cpp_reads_it(tmp_path):
    model = steered("qwen3")
    source = source_of(model, torch.arange(48.0))
    (data,) = files_of("lora-gguf", source).values()
    (tmp_path / "a.gguf").write_bytes(data)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    values = [reader.get_field(key).contents() for key in keys]
    assert values == ["qwen3", "adapter", "lora", 1.0]
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_a"], source.row[None])
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], VECTOR[:, None])
    source.metadata["model_type"] = "mine"
    with pytest.raises(ValueError, match="the gguf package knows no mine with such a layer"):
        files_of("lora-gguf", source)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_lm_eval_finds_the_layer_by_the_name_in_its_file(architecture, tmp_path):
    model = steered(architecture)
    model.model.config.save_pretrained(tmp_path / "model")  # no weights are needed
    torch.save(VECTOR, tmp_path / "layer_1.pt")
    source = ["--from", tmp_path / "layer_1.pt", "--model", tmp_path / "model"]
    assert export(*source, "--format", "lm-eval", "--out", tmp_path / "out") == 0
    config = torch.load(tmp_path / "out" / "lm_eval_steered.pt", weights_only=True)
    expected = model(input_ids=IDS).logits
    ((name, steer),) = config.items()
    assert steer["action"] == "add" and steer["bias"] is None and steer["head_index"] is None

    def hook(module, inputs, output):  # as its SteeredModel does
        added = steer["steering_vector"] * steer["steering_coefficient"]
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    handle = model.model.base_model.get_submodule(name).register_forward_hook(hook)
    with model.steering_off():
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    handle.remove()


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def short_sample(tmp_path_factory):
    """In place of the sample of calibration/, a part of it, for fits in a second."""
    folder = tmp_path_factory.mktemp("sample")
    for name, documents in (("prose.txt", 60), ("conversations.jsonl", 10)):
        lines = (CALIBRATION / name).read_text().splitlines()[:documents]
        (folder / name).write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ad, "SAMPLE", folder)
        yield


@pytest.fixture(scope="module")
def honest_runs(short_sample, smol, trained, tmp_path_factory):
    """The folder of two finished runs, pirate and sailor, of a model that adapters fit: a tiny
    random one's z says little, but in this one a feature of every MLP is 1."""
    root = tmp_path_factory.mktemp("honest")
    tokenizer = load_tokenizer(smol)
    config = {**SMALL, "vocab_size": len(tokenizer), "num_attention_heads": 4, "mlp_bias": True}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**config))
    for layer in model.model.layers:
        for linear, bias in ((layer.mlp.gate_proj, 1.278465), (layer.mlp.up_proj, 1.0)):
            linear.weight.data[0] = 0.0
            linear.bias.data[0] = bias  # silu(1.278465) is 1
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    data = str(trained / "data")
    base = command(data, str(root / "model"), root / "runs", "--init-scale", "0.5")
    assert ts.main([*base, "--dataset", "src__role__pirate", "src__role__sailor"]) == 0
    run = the_folder(root / "runs")
    assert export(run, "--format", "lora", "--out", root / "out") == 0  # fits the input row
    return root / "runs"


@pytest.fixture
def runs(honest_runs, tmp_path):
    """A copy of them, with the input row that was fitted."""
    shutil.copytree(honest_runs, tmp_path / "runs")
    return tmp_path / "runs"


def change_run(folder, **changes):
    """Change options that a run keeps, as if it had been made with them."""
    record = json.loads((folder / "run.json").read_text())
    record["args"] |= changes
    (folder / "run.json").write_text(json.dumps(record))


def test_a_folder_of_runs_becomes_a_folder_of_adapters_by_one_load(
    runs, tmp_path, monkeypatch, capsys
):
    loads = []
    load = ex.load_from_options
    monkeypatch.setattr(ex, "load_from_options", lambda *a: loads.append(a) or load(*a))
    out = tmp_path / "out"
    row_file = the_folder(runs).parent / ad.ROW_FILE
    row_file.unlink()
    flags = [f"--format={name}" for name in ("lora", "lora-gguf", "peft", "lm-eval")]
    assert export(runs, *flags, "--scale", 2, "--out", out) == 0
    assert len(loads) == 1
    assert {path.name for path in out.iterdir()} == {"pirate", "sailor"}
    names = "adapter_config.json", WEIGHTS, "adapter.gguf", "lm_eval_steered.pt", "README.md"
    for name in (*names, *(f"peft/{name}" for name in names[:2])):
        assert (out / "pirate" / name).exists()
    printed = capsys.readouterr().out
    assert printed.count("fitted   ") == 1
    effects = re.findall(r"by KL \S+ of (\S+) nats", printed)
    assert len(effects) == 2 and "0" not in effects  # each vector was there when it was checked
    card = (out / "sailor" / "README.md").read_text()
    for fact in ("the adapter is off the vector by KL", "a . z of held-out answers 1.00 +- 0.0"):
        assert fact in card
    for snippet in ('"model": "sailor"', "drop that bias", "--cache-ram 0"):
        assert snippet in card
    row = load_vector(row_file, "lora_a")[0]
    # None of these files is read back: each says what it is, and what to name in its place.
    model = json.loads((the_folder(runs) / "run.json").read_text())["args"]["model"]
    lora = "of a LoRA adapter, which is not read: name the run folder, or an export"
    for name, message in (
        (WEIGHTS, lora),
        (f"peft/{WEIGHTS}", lora),
        ("adapter.gguf", "a LoRA adapter, which is not read: name the run folder"),
        ("lm_eval_steered.pt", "a dict of dicts, as lm-eval has it, which is not read: name"),
    ):
        source = ["--from", out / "pirate" / name, "--model", model, "--layer", 1]
        assert export(*source, "--format", "pt", "--out", tmp_path / "back") == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="of a LoRA adapter, which is not read"):
        load_vector(out / "pirate" / WEIGHTS)
    for name in ("pirate", "sailor"):
        vector = 2 * load_vector(the_folder(runs, f"src__role__{name}") / VECTOR_FILE)[0]
        assert torch.equal(lora_of(out / name / WEIGHTS).b, vector)
        assert torch.equal(lora_of(out / name / WEIGHTS).a, row)
    # A row that is there is used, not fitted again.
    monkeypatch.setattr(ad, "sample_examples", None)
    assert export(the_folder(runs), "--format", "lora", "--out", tmp_path / "again") == 0


def test_an_adapter_that_loses_too_much_is_refused_unless_forced(
    short_sample, trained, tmp_path, capsys
):
    arguments = the_folder(trained / "runs"), "--format", "lora", "--out", tmp_path / "out"
    assert export(*arguments) == 2  # of a random model: z has next to nothing to do with 1
    error = capsys.readouterr().err
    assert "of this vector, 10% at most" in error and "--format peft is exact" in error
    assert not (tmp_path / "out").exists()
    more = ["--format", "lora-gguf", "--format", "peft", "--format", "all"]
    assert export(*arguments[:-1], tmp_path / "others", *more) == 2
    both = capsys.readouterr()
    for name in ("lora", "lora-gguf"):
        assert f"error: {tmp_path / 'others'}: no {name}: adapters lose" in both.err
    names = {path.name for path in (tmp_path / "others").iterdir()}
    assert {"peft", "layer_1.pt", VECTOR_FILE} < names
    assert not {WEIGHTS, "adapter.gguf"} & names
    card = (tmp_path / "others" / "README.md").read_text()
    assert "### PEFT, exactly" in card and "### vLLM" not in card and "held-out" not in both.out
    assert export(*arguments, "--force") == 0
    assert "the adapter is off the vector by KL" in (tmp_path / "out" / "README.md").read_text()


def test_a_row_of_another_model_layer_or_split_is_refused(runs, tmp_path, capsys):
    run = the_folder(runs)
    path = run.parent / ad.ROW_FILE
    row, header = load_vector(path, "lora_a")

    def refused(message):
        assert export(run, "--format", "lora", "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

    for changes in ({"layer": 2}, {"model_digest": "files-0"}, {"module": "model.x"}):
        path.write_bytes(vector_bytes(row, {**header, **changes}, "lora_a"))
        refused(f"{path} is not for model.layers.1.mlp.down_proj of")
    path.write_bytes(vector_bytes(row[1:], header, "lora_a"))
    refused(f"{path} is not for model.layers.1.mlp.down_proj of")
    path.write_bytes(b"torn")
    refused("not a readable safetensors file")
    path.write_bytes(vector_bytes(row, header, "lora_a"))
    change_run(run, split_seed=5)  # what was fitted on may be what the check holds out
    refused("was fitted with another split of the questions ([0, 0.2], here [5, 0.2])")


def test_two_personas_of_one_name_are_refused_before_anything_is_written(runs, tmp_path, capsys):
    other = the_folder(runs).with_name("other__role__pirate")
    shutil.copytree(the_folder(runs), other)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "dataset": other.name}))
    assert export(runs, "--format", "lora", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "two runs of the name pirate" in error and "other__role__pirate" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_checked_on_questions_that_its_row_was_not_fitted_on(
    runs, tmp_path, monkeypatch, capsys
):
    run = the_folder(runs)
    (run.parent / ad.ROW_FILE).unlink()
    out = ["--format", "lora", "--out", tmp_path / "out"]
    assert export(run, *out, "--data-root", tmp_path / "gone") == 2
    assert "gone" in capsys.readouterr().err and not (tmp_path / "out").exists()
    fitted = examples_given_to(adapter_check, "fit_row", monkeypatch)
    checked = examples_given_to(ex, "compare_with_adapter", monkeypatch)
    assert export(run, *out) == 0
    questions = {example.row["question"] for example in checked}
    assert questions and questions.isdisjoint(example.row.get("question") for example in fitted)
    assert any(example.row.get("question") for example in fitted)


def examples_given_to(module, name, monkeypatch):
    """The Examples that a function will get as its last argument: a list that fills."""
    real = getattr(module, name)
    examples = []

    def watched(*arguments):
        examples.extend(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(module, name, watched)
    return examples


def test_a_vector_from_elsewhere_becomes_an_adapter(runs, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(VECTOR, tmp_path / "v.pt")
    model = json.loads((the_folder(runs) / "run.json").read_text())["args"]["model"]
    source = ["--from", tmp_path / "v.pt", "--model", model, "--layer", 1]
    assert export(*source, "--format", "peft", "--out", tmp_path / "exact") == 0
    tensors = load_file(tmp_path / "exact" / "peft" / WEIGHTS)
    assert torch.equal(next(t for key, t in tensors.items() if key.endswith("bias")), VECTOR)
    # The input row goes where the runs of the model would be.
    (the_folder(runs).parent / ad.ROW_FILE).unlink()
    data = ["--data-root", trained / "data", "--dataset", "src__role__pirate"]
    assert export(*source, *data, "--format", "lora", "--out", tmp_path / "evil") == 0
    assert torch.equal(lora_of(tmp_path / "evil" / WEIGHTS).b, VECTOR)
    assert the_folder(tmp_path / "runs").with_name(ad.ROW_FILE).exists()


def test_runs_of_several_layers_get_each_the_row_of_its_own(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = runs / "others" / "deep"
    shutil.copytree(the_folder(runs), deep)
    change_run(deep, layer=2)
    for source, out in ((runs, "all"), (deep, "alone")):
        assert export(source, "--format", "lora", "--out", tmp_path / out) == 0
    together = tmp_path / "all" / "pirate-deep" / WEIGHTS
    assert together.read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert lora_of(tmp_path / "all" / "pirate" / WEIGHTS).layer == 1
    assert lora_of(together).layer == 2
    (row_file,) = runs.glob(f"*/layer2/{ad.ROW_FILE}")
    assert torch.equal(lora_of(together).a, load_vector(row_file, "lora_a")[0])


def test_a_torn_run_or_a_row_that_cannot_be_kept_does_not_end_the_others(
    runs, tmp_path, monkeypatch, capsys
):
    (the_folder(runs).parent / ad.ROW_FILE).unlink()
    (the_folder(runs) / "run.json").write_text("{torn")

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(ad, "save_row", refuse)
    assert export(runs, "--format", "lora", "--out", tmp_path / "out") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sailor"]
    both = capsys.readouterr()
    assert "is not kept, so the next run fits anew: read-only" in both.out
    assert "src__role__pirate: no readable run.json" in both.err
