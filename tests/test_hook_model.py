"""hook_model.py: the vector is added where it should be, and nowhere and to nothing else."""

import math

import pytest
import torch
import transformers
from conftest import CONFIGS, IDS, SMALL, block_outputs, plain_loss, rows_of, steered_tiny, tiny
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import hook_model as hm
from steering import loading as ld
from steering.fast_path import FastPath
from train_steering import token_loss

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_hook_adds_exactly_v_at_its_layer_and_nothing_below(architecture):
    model = steered_tiny(architecture)
    with model.steering_off():
        plain = block_outputs(model, IDS)
    moved = block_outputs(model, IDS)
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], plain[1] + model.steering.vector)
    assert not torch.allclose(moved[2], plain[2])
    assert torch.equal(FastPath(model).layer_output(IDS), moved[1])


ROWS = ["llama", "qwen3", "gemma2", "gpt2", "mistral"]  # mistral's window is 8 tokens


def padded_prompts(count):
    """Left-padded prompts of unlike length: input_ids and attention_mask, (count, 16)."""
    ids = torch.randint(3, 90, (count, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : row % 5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def different_vectors(count):
    """A vector for each row, the first of them zero: the plain model."""
    vectors = 2 * torch.randn(count, 32, generator=torch.Generator().manual_seed(3))
    vectors[0] = 0
    return vectors


@pytest.mark.parametrize("architecture", ROWS)
def test_each_row_of_a_batch_is_steered_by_its_own_vector_as_if_alone(architecture):
    model = steered_tiny(architecture)
    prompts = padded_prompts(8)
    vectors = different_vectors(8)
    written = model.generate(**prompts, **GREEDY, vectors=vectors)
    with torch.no_grad(), model.row_vectors(vectors):
        together = model(**prompts).logits.log_softmax(-1)
    assert model.steering.rows is None
    for i in range(8):
        start = i % 5
        alone = {name: part[i : i + 1, start:] for name, part in prompts.items()}
        model.set_vector(vectors[i])
        with model.scaled(0 if i == 0 else 1):
            assert torch.equal(written[i, start:], model.generate(**alone, **GREEDY)[0])
            with torch.no_grad():
                logits = model(**alone).logits.log_softmax(-1)
        # Without padding positions are other ones, and so are gpt2's embeddings of them.
        if start == 0:
            assert torch.allclose(together[i : i + 1], logits, atol=1e-5)
    assert len({tuple(row.tolist()) for row in written[:, 16:]}) > 4


@pytest.mark.parametrize(
    "several",
    [
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_beams_and_several_answers_to_a_prompt_have_its_vector(several):
    model = steered_tiny()
    prompts = padded_prompts(3)
    vectors = different_vectors(3)
    options = GREEDY | several
    written = model.generate(**prompts, **options, vectors=vectors)
    each = len(written) // 3
    for i in range(3):
        alone = {name: part[i : i + 1] for name, part in prompts.items()}
        expected = model.generate(**alone, **options, vectors=vectors[i : i + 1])
        assert torch.equal(written[i * each : (i + 1) * each], expected)


def test_vectors_that_do_not_fit_the_rows_are_refused():
    model = steered_tiny()
    for vectors, said in (
        (torch.ones(3, 32), "3 vectors for 2 rows"),
        (torch.ones(1, 32), "1 vectors for 2 rows"),
        (torch.ones(2, 31), r"shape \[2, 31\] .*it needs \[rows, 32\] finite numbers"),
        (torch.ones(32), r"shape \[32\] .*it needs \[rows, 32\]"),
        (torch.full((2, 32), math.nan), "finite: False"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(**padded_prompts(2), **GREEDY, vectors=vectors)
        assert model.steering.rows is None
    with pytest.raises(ValueError, match=r"it needs \[32\] finite"):
        model.set_vector(torch.ones(2, 32))


def test_states_keep_dtype_tuple_and_place_and_the_vector_stays_fp32():
    hook = hm.ResidualHook(4, init_scale=1.0)
    hidden = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    cache = object()
    states, rest = hook.hook(None, None, (hidden, cache))
    assert rest is cache and states.dtype == torch.bfloat16
    assert torch.equal(states, hook.vector.bfloat16().expand(1, 2, 4))
    assert not hidden.any() and hook.vector.dtype == torch.float32


def test_a_start_is_zero_or_drawn_from_the_generator_given():
    seeded = [hm.ResidualHook(4, 0.5, torch.Generator().manual_seed(3)).vector for _ in range(2)]
    assert torch.equal(*seeded) and seeded[0].any()
    assert not hm.ResidualHook(4).vector.any()


def test_unknown_architecture_names_what_was_looked_for():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Looked for: .*model\.layers.*transformer\.h"):
        hm.find_layers(model)


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_layer_out_of_range_names_the_allowed_range(layer):
    with pytest.raises(ValueError, match=rf"--layer {layer} is out of range: .* \(use 0\.\.3\)"):
        hm.SteerModel(tiny("llama"), layer)


def test_layer_whose_output_is_not_one_residual_stream_is_refused():
    model = steered_tiny()
    model.layers[1].forward = lambda hidden, *_, **__: hidden.expand(4, *hidden.shape)  # Gemma 3n
    said = r"LlamaDecoderLayer gives states \(4, .*, not \(B, T, 32\)"
    with pytest.raises(ValueError, match=said):
        model(input_ids=IDS)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gemma3"])
def test_gradient_equals_finite_differences(architecture):
    model = steered_tiny(architecture).double()  # differences need more digits than fp32 has

    def loss(vector):
        inputs = {"input_ids": IDS, "use_cache": False}
        weights = {"steering.vector": vector}
        logits = torch.func.functional_call(model, weights, (), inputs).logits
        return -logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).sum()

    assert torch.autograd.gradcheck(loss, model.steering.vector, eps=1e-2, rtol=1e-2, atol=2e-3)


def test_train_mode_never_turns_dropout_on():
    model = hm.SteerModel(tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5), 1).train()
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


# ---------------------------------------------------------------- save and load


def test_saved_vector_gives_identical_logits_when_loaded(tmp_path):
    model = steered_tiny()
    path = tmp_path / "v.safetensors"
    logits = model(input_ids=IDS).logits
    model.save_vector(path, steps=3)
    other = hm.SteerModel(tiny("llama"), 1)
    assert not torch.equal(other(input_ids=IDS).logits, logits)
    assert other.load_vector(path)["steps"] == "3"
    assert torch.equal(other(input_ids=IDS).logits, logits)
    assert path.stat().st_size < 100_000
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]  # nothing half-written


def test_same_vector_and_metadata_give_the_same_bytes(tmp_path):
    metadata = {f"key {i}": i for i in range(20)}
    files = set()
    for i in range(5):
        hm.save_vector(tmp_path / str(i), torch.arange(9.0), metadata)
        files.add((tmp_path / str(i)).read_bytes())
    read, strings = hm.load_vector(tmp_path / "0")
    assert len(files) == 1
    assert torch.equal(read, torch.arange(9.0)) and strings["key 7"] == "7"


@pytest.mark.parametrize(
    ("name", "layer", "width", "said"),
    [
        ("org/other", 1, 32, "trained on model org/right-model, this is org/other"),
        ("/local/copy/Right-Model/", 2, 32, "trained at layer 1, the model is set to 2"),
        ("/local/copy/Right-Model/", 1, 64, r"shape \[32\] .*it needs \[64\]"),
    ],
)
def test_loading_names_the_mismatch(tmp_path, name, layer, width, said):
    model = steered_tiny()
    model.config._name_or_path = "org/right-model"
    model.save_vector(tmp_path / "v.safetensors")
    other = hm.SteerModel(tiny("llama", hidden_size=width), layer)
    other.config._name_or_path = name
    with pytest.raises(ValueError, match=said):
        other.load_vector(tmp_path / "v.safetensors")
    if name == "org/other":
        other.load_vector(tmp_path / "v.safetensors", any_model=True)
        assert torch.equal(other.steering.vector, model.steering.vector)


def test_unreadable_vector_files_are_clear_errors(tmp_path):
    hm.save_vector(tmp_path / "good.safetensors", torch.ones(8), {"layer": 1})
    good = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(good[:-5])
    hm.save_vector(tmp_path / "nan.safetensors", torch.full((8,), math.nan), {})
    whole = torch.ones(8, dtype=torch.int32)
    save_file({"steering_vector": whole}, tmp_path / "whole.safetensors")
    for name, said in (
        ("torn.safetensors", "not a readable safetensors file"),
        ("none.safetensors", "not a readable safetensors file"),
        ("nan.safetensors", "no finite 1-D float tensor"),
        ("whole.safetensors", "no finite 1-D float tensor"),
        ("", "is a folder: name the vector"),
        ("layer_1.pt", "--from makes one of ours"),
    ):
        with pytest.raises(ValueError, match=said):
            hm.load_vector(tmp_path / name)


def test_vectors_and_scales_that_are_not_finite_or_do_not_fit_change_nothing():
    model = steered_tiny()
    before = model.steering.vector.detach().clone()
    for vector, scale in (
        (torch.full((32,), math.inf), 1),
        (torch.ones(32), math.nan),
        (torch.ones(31), 1),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            model.set_vector(vector, scale, add=True)
    with pytest.raises(ValueError, match="scale nan: must be"), model.scaled(math.nan):
        pass
    assert torch.equal(model.steering.vector, before)


def test_vectors_add_up_with_their_scales(tmp_path):
    model = steered_tiny()
    a = torch.arange(32.0)
    b = torch.ones(32)
    for name, vector in (("a", a), ("b", b)):
        model.set_vector(vector)
        model.save_vector(tmp_path / name)
    assert hm.load_vector(tmp_path / "a")[1]["model_type"] == "llama"
    model.load_vector(tmp_path / "a", scale=2)  # in place of what was there
    assert torch.equal(model.steering.vector, 2 * a)
    model.load_vector(tmp_path / "b", scale=-0.5, add=True)
    model.set_vector(b, scale=4, add=True)
    assert torch.equal(model.steering.vector, 2 * a + 3.5 * b)


# ---------------------------------------------------------------- steering a model


def test_vector_moves_with_its_layer_and_is_off_inside_of_the_switch_alone():
    model = steered_tiny()
    model.set_vector(torch.ones(32), scale=2.0)
    at_one = model(input_ids=IDS).logits
    model.set_layer(2)
    at_two = model(input_ids=IDS).logits
    only_there = hm.SteerModel(tiny("llama"), 2)
    only_there.set_vector(torch.ones(32), scale=2.0)
    assert torch.equal(at_two, only_there(input_ids=IDS).logits)
    plain = tiny("llama")(input_ids=IDS).logits
    assert not torch.allclose(at_two, at_one)
    with pytest.raises(RuntimeError, match="inside"), model.steering_off():
        assert torch.equal(model(input_ids=IDS).logits, plain)
        raise RuntimeError("inside")
    assert torch.equal(model(input_ids=IDS).logits, at_two)


def test_generate_gives_the_head_no_strided_rows_for_which_its_weight_is_copied():
    model = steered_tiny(vocab_size=83)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes = [list(x.shape) for x in args if torch.is_tensor(x)]
            if "mm" in str(function) and any(83 in shape for shape in shapes):
                products.append(str(function))
            return function(*args, **(kwargs or {}))

    with Products():
        model.generate(input_ids=IDS, **GREEDY | {"max_new_tokens": 2})
    assert products == ["aten.mm.default"] * 2  # with strided ones aten.bmm: a weight for each row


def test_scale_of_a_generate_call_multiplies_the_vector_for_that_call_only():
    model = steered_tiny("qwen3", value=0.05)
    vector = model.steering.vector.detach().clone()

    def tokens(**more):
        mask = torch.ones_like(IDS)
        return model.generate(input_ids=IDS, attention_mask=mask, **GREEDY, **more).tolist()

    plain = tokens(scale=0)
    at_one = tokens(scale=1)
    at_three = tokens(scale=3)
    assert plain != at_one != at_three
    assert tokens() == at_one and torch.equal(model.steering.vector, vector)
    with model.scaled(3):
        assert tokens() == at_three and tokens(scale=1) == at_one
    with pytest.raises(ValueError, match="no_such_option"):
        tokens(scale=3, no_such_option=1)
    assert tokens() == at_one  # an error does not leave the scale behind
    model.set_vector(vector, scale=3)
    assert tokens() == at_three
    with model.steering_off():
        assert tokens() == plain


def test_left_padded_generation_equals_unpadded():
    model = steered_tiny("qwen3", value=3.0)
    padded = torch.cat([torch.zeros(1, 4).long(), IDS[:1]], dim=1)

    def answer(ids):
        mask = (ids > 0).long()
        return model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[0, -8:].tolist()

    steered = answer(padded)
    assert steered == answer(IDS[:1])
    with model.steering_off():
        assert answer(padded) != steered


# ---------------------------------------------------------------- loading


def image_text_config(name):
    """The config of a small model of images and text."""
    text = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
    if name == "mistral3":
        vision = transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        words = transformers.MistralConfig(**text, head_dim=8)
        return transformers.Mistral3Config(text_config=words, vision_config=vision)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(text_config={**text, "rope_scaling": rope})
    config.vision_config.depth = 1
    config.vision_config.hidden_size = 16
    config.vision_config.num_heads = 2
    config.vision_config.out_hidden_size = 32
    return config


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_models_of_images_and_text_load_by_their_text_part(name, tmp_path):
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(
        image_text_config(name), dtype=torch.float32
    )
    whole.save_pretrained(tmp_path)
    model = hm.load_model(tmp_path, 1, "fp32", "cpu")
    assert len(model.layers) == 4 and model.hidden_size == 32
    model.set_vector(torch.ones(32))
    rows = rows_of(9, 14)
    fast = FastPath(model)
    fast.cache_prefix(rows)
    loss = fast.losses(rows, token_loss).sum().item()
    assert loss == pytest.approx(plain_loss(model, rows).item())
    assert model.generate(input_ids=IDS, **GREEDY).shape[1] > IDS.shape[1]


def test_load_model_names_what_is_wrong(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)  # without weights: what is wrong is seen before
    for name, layer, options, said in (
        (tmp_path, 0, {"dtype": "float32"}, "dtype float32: not one of auto, bf16, fp32, fp16"),
        (tmp_path, 4, {}, "is out of range"),
        ("./nowhere", 0, {}, r"--model ./nowhere: no such file or folder"),
    ):
        with pytest.raises(ValueError, match=said):
            hm.load_model(name, layer, **options)


def test_load_model_from_folder_in_the_dtype_asked_for(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    for name, dtype in ld.DTYPES.items():
        model = hm.load_model(tmp_path, 1, dtype=name, device="cpu")
        assert model.model.dtype == dtype and model.steering.vector.dtype == torch.float32
        assert model.name == str(tmp_path)


def test_auto_dtype_is_bf16_unless_the_cpu_lacks_it(monkeypatch):
    for has_bf16, on_cpu in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(ld, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert ld.pick_dtype("auto", "cpu") == on_cpu
        assert ld.pick_dtype("auto", "cuda") == "bf16"
        assert ld.pick_dtype("fp16", "cpu") == "fp16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_so():
    with pytest.raises(ValueError, match="no cuda device here"):
        ld.pick_device("cuda:1")


def test_remote_code_is_never_trusted_unless_asked(monkeypatch, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    seen = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def record(*args, **kwargs):
        seen.append(kwargs["trust_remote_code"])
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    hm.load_model(tmp_path, 1, device="cpu")
    hm.load_model(tmp_path, 1, device="cpu", trust_remote_code=True)
    assert seen == [False, True]
