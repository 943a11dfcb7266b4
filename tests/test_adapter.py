"""Rank-1 adapters: where they fit, what is fitted, what the files do, and what is refused."""

import json
import shutil
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from conftest import IDS, VECTOR, export, rows_of, source, the_folder, tiny
from safetensors.torch import load_file

import eval_steering as ev
import export_vector as ex
import hook_model as hm
from interop import adapter as ad
from interop import adapter_check
from interop import formats as vf
from steering.fast_path import FastPath
from steering.vector_file import VECTOR_FILE, load_vector, vector_bytes

FIT = ["llama", "mistral", "qwen2", "qwen3", "cohere", "gpt_neox", "opt", "granite"]
MIXTURE, NORM = "its MLP is a mixture of experts", "does not reach the layer's output unchanged"


def steered(architecture, layer=1):
    model = hm.SteerModel(tiny(architecture), layer)
    model.set_vector(VECTOR)
    return model


def with_lora(site, tensors):
    """A hook that adds what PEFT would add at the site, from the tensors of its file."""
    prefix = f"base_model.model.{site.name}.lora_"
    a, b = tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"]
    bias = tensors.get(f"{prefix}B.bias", 0.0)

    def hook(module, inputs, output):
        return output + inputs[0] @ a.T @ b.T + bias

    return site.module.register_forward_hook(hook)


def files(name, model, site, row=None, tmp_path=None):
    """The tensors of an adapter's file, as a reader finds them."""
    place = {"module": site.name, "features": site.module.in_features}
    written = vf.files_of(name, VECTOR, source(model.layer).metadata, "pirate", place, row)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(next(d for n, d in written.items() if n.endswith(".safetensors")))
    config = json.loads(next(d for n, d in written.items() if n.endswith(".json")))
    return load_file(path), config


# ---------------------------------------------------------------- where, what, how much


@pytest.mark.parametrize("architecture", FIT)
def test_peft_files_are_the_vector_exactly_and_lora_files_are_v_times_a_z(architecture, tmp_path):
    model = steered(architecture)
    site = ad.find_site(model)
    assert model.model.get_submodule(site.name) is site.module
    logits = model(input_ids=IDS).logits
    row = torch.randn(site.module.in_features, generator=torch.Generator().manual_seed(1))
    (example,) = rows_of(len(IDS[0]))
    example.input_ids = IDS[0].tolist()
    products = torch.stack(ad.row_products(model, site, row, [example]))
    with ad.as_adapter(model, products):
        by_products = model(input_ids=IDS[:1]).logits
    for name, expected in (("peft", logits), ("lora", by_products)):
        tensors, config = files(name, model, site, row, tmp_path)
        assert config["target_modules"] == [site.name] and config["r"] == 1
        assert config["lora_bias"] == (name == "peft") and config["lora_alpha"] == 1
        handle = with_lora(site, tensors)
        with model.steering_off():
            theirs = model(input_ids=IDS[: len(expected)]).logits
        handle.remove()
        assert torch.allclose(theirs, expected, atol=1e-4)
        assert not torch.allclose(theirs, model(input_ids=IDS[: len(expected)]).logits) or (
            name == "peft"
        )


@pytest.mark.parametrize(
    "architecture, reason",
    [
        ("gemma2", NORM), ("gemma3", NORM), ("qwen3_moe", MIXTURE), ("gpt2", "no nn.Linear is at"),
    ],
)  # fmt: skip
def test_models_that_the_trick_does_not_fit_are_refused_with_the_reason(architecture, reason):
    with pytest.raises(ValueError, match=f"no adapter for .*{reason}"):
        ad.find_site(steered(architecture))


def test_a_factor_on_the_mlp_is_refused_and_the_check_leaves_no_trace():
    model = hm.SteerModel(tiny("granite", residual_multiplier=0.22), 1)
    with pytest.raises(ValueError, match="off by 78%"):
        ad.find_site(model)
    model = steered("llama")
    before = model(input_ids=IDS).logits
    ad.find_site(model)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_the_row_is_the_ridge_regression_of_one_on_what_enters_the_projection():
    model, examples = steered("llama"), rows_of(9, 14, 11, 30, 7)
    site = ad.find_site(model)
    row, missed = ad.fit_row(model, site, examples, max_tokens=30)
    caught, weights = [], []
    handle = site.module.register_forward_pre_hook(lambda m, i: caught.append(i[0][0].double()))
    for example in examples:
        model(input_ids=torch.tensor([example.input_ids]))
        weights.append(ad.token_weights(example).double())
    handle.remove()
    z, w = torch.cat(caught), torch.cat(weights)
    assert {1.0, ad.OPENING_WEIGHT} == {*w.tolist()}
    gram, mean = (z * w[:, None]).T @ z / w.sum(), (z * w[:, None]).sum(0) / w.sum()
    ridge = ad.RIDGE * gram.diagonal().median() * torch.eye(len(gram), dtype=torch.double)
    expected = torch.linalg.solve(gram + ridge, mean)
    assert torch.allclose(row.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert missed == pytest.approx(1 - (mean @ expected).item(), abs=1e-4)
    products = torch.cat(ad.row_products(model, site, row, examples, max_tokens=30))
    assert np.allclose(products, (z @ row.double()).numpy(), atol=1e-3)


def test_the_comparison_is_that_of_plain_forwards():
    model, examples = steered("qwen3"), rows_of(9, 14, 11)
    site, fast = ad.find_site(model), FastPath(model)
    row = torch.full((site.module.in_features,), 0.5)
    products = ad.row_products(model, site, row, examples)
    fast.cache_prefix(examples)
    batches = adapter_check.to_compare(fast, examples, products, max_tokens=30)
    assert len(batches) > 1
    found = adapter_check.compare_with_adapter(fast, batches)
    sums = torch.zeros(5)
    for example, values in zip(examples, products, strict=True):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        each = []
        for context in (model.steering_off(), None, ad.as_adapter(model, values[None])):
            with context or torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].detach().log_softmax(-1)
            each.append(logits[labels[1:] >= 0])
        target = labels[1:][labels[1:] >= 0][:, None]
        nll = [-logits.gather(1, target).sum() for logits in each]
        kl = [(p.exp() * (p - q)).sum() for p, q in pairwise(each)]
        sums += torch.stack([nll[0], kl[0], nll[1], kl[1], nll[2]])
        assert len(target)
    mean = (sums / found["tokens"]).tolist()
    assert [*found["nll"].values()] == pytest.approx([mean[0], mean[2], mean[4]], abs=1e-4)
    assert [found["kl_vector"], found["kl"]] == pytest.approx([mean[1], mean[3]], abs=1e-4)
    assert found["lost"] == pytest.approx(mean[3] / mean[1], rel=1e-2) and found["lost"] > 0.01
    perfect = [torch.ones_like(values) for values in products]
    batches = adapter_check.to_compare(fast, examples, perfect, max_tokens=30)
    same = adapter_check.compare_with_adapter(fast, batches)
    assert abs(same["kl"]) < 1e-6 and same["nll"]["adapter"] == same["nll"]["vector"]


def test_the_sample_is_varied_and_every_fifth_document_of_it_is_not_fitted_on(smol_chat):
    fit, heldout = ad.sample_examples(smol_chat)
    texts = [{tuple(e.input_ids) for e in part} for part in (fit, heldout)]
    assert not texts[0] & texts[1] and len(texts[0]) > 3.9 * len(texts[1]) > 150
    assert sum(len(e.input_ids) for e in fit) > 50_000
    assert sum(any(label >= 0 for label in e.labels) for e in fit) > 50  # conversations


# ---------------------------------------------------------------- files of other tools


def test_gguf_adapter_is_as_llama_cpp_reads_it(tmp_path):
    model = steered("qwen3")
    site = ad.find_site(model)
    row = torch.arange(float(site.module.in_features))
    metadata, place = source(1).metadata | {"model_type": "qwen3"}, {"module": site.name}
    (data,) = vf.files_of("lora-gguf", VECTOR, metadata, "pirate", place, row).values()
    (tmp_path / "a.gguf").write_bytes(data)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    keys = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"
    values = [reader.get_field(key).contents() for key in keys]
    assert values == ["qwen3", "adapter", "lora", 1.0]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_a"], row.numpy()[None])
    assert np.array_equal(tensors["blk.1.ffn_down.weight.lora_b"], VECTOR.numpy()[:, None])
    with pytest.raises(ValueError, match="the gguf package knows no mine with such a layer"):
        vf.files_of("lora-gguf", VECTOR, metadata | {"model_type": "mine"}, "pirate", place, row)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_lm_eval_finds_the_layer_by_the_name_in_its_file(architecture, tmp_path):
    model = steered(architecture)
    model.model.config.save_pretrained(tmp_path)
    block = ex.block_name(str(tmp_path), 1, False)
    (data,) = vf.files_of("lm-eval", VECTOR, source(1).metadata, "x", {"block": block}).values()
    (tmp_path / "v.pt").write_bytes(data)
    config = torch.load(tmp_path / "v.pt", weights_only=True)
    steered_logits = model(input_ids=IDS).logits
    handles = []
    for name, module in model.model.base_model.named_modules():  # as its SteeredModel does
        if name in config:
            steer = config[name]
            assert steer["action"] == "add" and steer["bias"] is None

            def hook(module, inputs, output, steer=steer):
                added = steer["steering_vector"] * steer["steering_coefficient"]
                if isinstance(output, tuple):
                    return (output[0] + added, *output[1:])
                return output + added

            handles.append(module.register_forward_hook(hook))
    assert len(handles) == 1
    with model.steering_off():
        assert torch.allclose(model(input_ids=IDS).logits, steered_logits, atol=1e-5)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of two finished tiny runs, pirate and sailor, without an input row."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def smooth(monkeypatch):
    """A tiny random model's z says little, so that any honest adapter is bad: one with 1 in it."""

    def perfect(model, site, examples, max_tokens=1024):
        z = ad.inputs_of(model, site, examples[:1])[0, -1].float()
        return z / z.square().sum(), 0.0

    products = lambda m, s, r, examples, t=1024: [torch.ones(len(e.input_ids)) for e in examples]  # noqa: E731
    monkeypatch.setattr(ad, "fit_row", perfect)
    monkeypatch.setattr(ad, "row_products", products)


def test_a_folder_of_runs_becomes_a_folder_of_adapters_by_one_load(
    runs, smooth, tmp_path, monkeypatch, capsys
):
    loads, load = [], ex.load_from_options
    monkeypatch.setattr(ex, "load_from_options", lambda *a: loads.append(a) or load(*a))
    out, every = tmp_path / "out", ("lora", "lora-gguf", "peft", "lm-eval", "hotwire")
    flags = [word for name in every for word in ("--format", name)]
    assert export(runs, *flags, "--out", out) == 0
    assert len(loads) == 1
    assert {path.name for path in out.iterdir()} == {"pirate", "sailor"}
    names = {path.relative_to(out / "pirate").as_posix() for path in out.rglob("pirate/**/*")}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "adapter.gguf", "peft",
        "peft/adapter_config.json", "peft/adapter_model.safetensors", "lm_eval_steered.pt",
        "pirate.pt",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("fitted   ") == 1 and printed.count("KL") == 2
    card = (out / "sailor" / "README.md").read_text()
    assert "the adapter is off the vector by KL" in card and '"model": "sailor"' in card
    assert "drop that bias" in card and "--cache-ram 0" in card
    vectors = {}
    for name in ("pirate", "sailor"):
        folder = the_folder(runs, dataset=f"src__role__{name}")
        vectors[name] = load_vector(folder / VECTOR_FILE)[0]
        tensors = load_file(out / name / "adapter_model.safetensors")
        (b,) = (tensor for key, tensor in tensors.items() if "lora_B" in key)
        assert torch.equal(b[:, 0], vectors[name])
    row = load_vector(the_folder(runs).parent / ad.ROW_FILE, "lora_a")[0]
    (a,) = (tensor for key, tensor in tensors.items() if "lora_A" in key)
    assert torch.equal(a[0], row)
    # Again, by itself and scaled: the row that is there is used.
    kept = (the_folder(runs).parent / ad.ROW_FILE).stat().st_mtime_ns
    monkeypatch.setattr(ad, "fit_row", lambda *a: 1 / 0)
    arguments = the_folder(runs), "--format", "lora", "--scale", 2, "--out", tmp_path / "x2"
    assert export(*arguments) == 0
    assert (the_folder(runs).parent / ad.ROW_FILE).stat().st_mtime_ns == kept
    tensors = load_file(tmp_path / "x2" / "adapter_model.safetensors")
    (b,) = (tensor for key, tensor in tensors.items() if "lora_B" in key)
    assert torch.equal(b[:, 0], 2 * vectors["pirate"])


def test_an_adapter_that_loses_too_much_is_refused_unless_forced(runs, tmp_path, capsys):
    arguments = the_folder(runs), "--format", "lora", "--out", tmp_path / "out"
    assert export(*arguments) == 2  # of a random model: z has next to nothing to do with 1
    error = capsys.readouterr().err
    assert "of this vector, 10% at most" in error and "--format peft is exact" in error
    assert not (tmp_path / "out").exists()
    assert export(*arguments, "--force") == 0
    assert "the adapter is off the vector by KL" in (tmp_path / "out" / "README.md").read_text()


def test_files_that_fit_another_model_or_layer_are_refused(runs, smooth, tmp_path, capsys):
    run, out = the_folder(runs), tmp_path / "out"
    assert export(run, "--format", "lora", "--out", tmp_path / "first") == 0
    path = run.parent / ad.ROW_FILE
    row, header = load_vector(path, "lora_a")
    capsys.readouterr()
    for changes in ({"layer": 2}, {"model_digest": "files-0"}, {"module": "model.x"}, None):
        if changes is None:
            path.write_bytes(vector_bytes(row, {**header, "about": "{}"}, "lora_a"))
            assert export(run, "--format", "lora", "--out", out) == 2
            error = capsys.readouterr().err
            assert f"{path}: its header does not say what it was fitted on. Remove it" in error
            break
        path.write_bytes(vector_bytes(row, {**header, **changes}, "lora_a"))
        assert export(run, "--format", "lora", "--out", out) == 2
        error = capsys.readouterr().err
        assert f"{path} has {len(row)} numbers for" in error and "Remove it to fit another" in error
    path.write_bytes(b"torn")
    assert export(run, "--format", "lora", "--out", out) == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    assert path.read_bytes() == b"torn" and not out.exists()


def test_two_personas_of_one_name_are_refused_before_anything_is_written(runs, tmp_path, capsys):
    run = the_folder(runs)
    shutil.copytree(run, run.with_name("other__role__pirate"))
    record = json.loads((run.with_name("other__role__pirate") / "run.json").read_text())
    record["dataset"] = "other__role__pirate"
    (run.with_name("other__role__pirate") / "run.json").write_text(json.dumps(record))
    assert export(runs, "--format", "lora", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "two runs of the name pirate" in error and "other__role__pirate" in error
    assert not (tmp_path / "out").exists()


def test_without_rows_to_fit_on_nothing_is_written(runs, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(runs, "--format", "lora", "--data-root", tmp_path / "gone", "--out", out) == 2
    assert "gone" in capsys.readouterr().err and not out.exists()
    foreign = tmp_path / "v.pt"
    torch.save(VECTOR, foreign)
    model = json.loads((the_folder(runs) / "run.json").read_text())["args"]["model"]
    arguments = "--from", foreign, "--model", model, "--layer", 1, "--format", "lora", "--out", out
    with pytest.raises(SystemExit) as stop:
        export(*arguments)
    assert stop.value.code == 2
    assert "--from needs --data-root and --dataset" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export(*arguments, "--scale", 0)
    assert "--scale 0.0: must be finite and not 0" in capsys.readouterr().err
    assert not out.exists()


def test_a_vector_from_elsewhere_becomes_an_adapter(
    runs, trained, smooth, tmp_path, monkeypatch
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save(VECTOR, tmp_path / "v.pt")
    model = json.loads((the_folder(runs) / "run.json").read_text())["args"]["model"]
    data = "--data-root", trained / "data", "--dataset", "src__role__pirate"
    where = "--from", tmp_path / "v.pt", "--model", model, "--layer", 1, *data
    assert export(*where, "--format", "lora", "--out", tmp_path / "a" / "evil") == 0
    assert [*(tmp_path / "runs").glob(f"*/layer1/{ad.ROW_FILE}")]  # where its runs would be
    assert export(*where[:-4], "--format", "peft", "--out", tmp_path / "exact") == 0
    tensors = load_file(tmp_path / "exact" / "peft" / "adapter_model.safetensors")
    (bias,) = (tensor for key, tensor in tensors.items() if key.endswith("bias"))
    assert torch.equal(bias, VECTOR)


def test_formats_beside_an_adapter_must_be_written_with_it(runs, smooth, tmp_path, capsys):
    run, out = the_folder(runs), tmp_path / "out"
    assert export(run, "--format", "lora", "--out", out) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert export(run, "--format", "pt", "--out", out, "--scale", 2, "--overwrite") == 2
    assert "--format lora --format pt" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert export(run, "--format", "pt", "--format", "lora", "--out", out, "--overwrite") == 0
    assert (out / "layer_1.pt").exists()
    assert ev.main(["--run", str(run), "--report-only"]) == 0  # lora_a.safetensors disturbs nothing


def test_what_belongs_to_one_model_and_layer_is_never_used_for_another(
    runs, trained, smooth, tmp_path, monkeypatch, capsys
):  # fmt: skip
    """Runs of another layer and another dtype in one call: each as if it were exported alone."""
    run = the_folder(runs)
    for name, changes, scale in (("deep", {"layer": 2}, 1), ("bf", {"dtype": "bf16"}, -50)):
        other = runs / "others" / name
        shutil.copytree(run, other)
        record = json.loads((other / "run.json").read_text())
        record["args"] |= changes
        (other / "run.json").write_text(json.dumps(record))
        vector, header = load_vector(other / VECTOR_FILE)
        header |= {key: str(value) for key, value in changes.items() if key == "layer"}
        (other / VECTOR_FILE).write_bytes(vector_bytes(vector * scale, header))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ex, "CHECK_TOKENS", 0)  # the same rows, however many runs
    formats = "--format", "lora", "--format", "safetensors", "--force"
    assert export(runs, *formats, "--out", tmp_path / "all") == 0
    capsys.readouterr()
    for name in ("deep", "bf"):
        assert export(runs / "others" / name, *formats, "--out", tmp_path / name) == 0
        for file in ("adapter_model.safetensors", VECTOR_FILE, "README.md"):
            alone = (tmp_path / name / file).read_text(errors="replace")
            together = (tmp_path / "all" / f"pirate-{name}" / file).read_text(errors="replace")
            assert alone == together.replace(f"pirate-{name}", name), (name, file)
    layers = [
        key.split(".layers.")[1][0]
        for name in ("pirate", "pirate-deep")
        for key in load_file(tmp_path / "all" / name / "adapter_model.safetensors")
    ]
    assert layers == ["1", "1", "2", "2"]


def test_adding_an_adapter_to_an_export_changes_nothing_that_is_there(runs, smooth, tmp_path):
    run, out = the_folder(runs), tmp_path / "out"
    assert export(run, "--format", "safetensors", "--out", out) == 0
    before = (out / VECTOR_FILE).read_bytes()
    for name in ("peft", "lora"):
        more = ("--format", "peft") if name == "lora" else ()
        assert export(run, "--format", name, *more, "--out", out) == 0  # without --overwrite
        assert (out / VECTOR_FILE).read_bytes() == before


def test_a_torn_run_or_a_row_that_cannot_be_kept_does_not_end_the_others(
    runs, smooth, tmp_path, monkeypatch, capsys
):
    (the_folder(runs, dataset="src__role__sailor") / "run.json").write_text("{torn")
    fits, fit = [], ad.fit_row
    monkeypatch.setattr(ad, "fit_row", lambda *a: fits.append(a) or fit(*a))

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(ad, "save_row", refuse)
    assert export(runs, "--format", "lora", "--out", tmp_path / "out") == 2
    assert (tmp_path / "out" / "pirate" / "adapter.gguf").exists() is False
    assert (tmp_path / "out" / "pirate" / "adapter_model.safetensors").exists() and len(fits) == 1
    both = capsys.readouterr()
    assert "is not kept, so another call fits anew: read-only" in both.out
    assert "src__role__sailor: no readable run.json" in both.err


def test_a_row_of_another_split_and_a_layer_that_lets_little_through(
    runs, smooth, tmp_path, capsys
):
    run = the_folder(runs)
    assert export(run, "--format", "lora", "--out", tmp_path / "a") == 0
    record = json.loads((run / "run.json").read_text())
    record["args"]["split_seed"] = 5
    (run / "run.json").write_text(json.dumps(record))
    assert export(run, "--format", "lora", "--out", tmp_path / "b") == 2
    assert "was fitted with another split of the questions" in capsys.readouterr().err
    model = steered("opt")  # a ReLU, of which most never fire
    model.layers[1].fc1.bias.data[:30] = -100
    row, _ = ad.fit_row(model, ad.find_site(model), rows_of(9, 14, 11))
    assert row.isfinite().all()
