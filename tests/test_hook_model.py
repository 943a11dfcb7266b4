"""hook_model.py: the vector is added where it should be, and nowhere and to nothing else."""

import functools
import math
import types

import pytest
import torch
import transformers
from conftest import CONFIGS, SMALL, tiny
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import hook_model as hm
from evaluation import measures as me
from steering import chat_format as cf
from steering import fast_path as fp
from steering import loading as ld
from steering import memory
from train_steering import token_loss as loss_of_target


def token_loss(logits, labels):
    """The reference: next-token cross-entropy in nats, summed over label tokens."""
    logits, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


IDS = torch.arange(3, 23).reshape(2, 10)  # (B, T)


def steered(architecture="llama", layer=1, value=0.7, **changes):
    """A tiny SteerModel whose vector is a fixed random one of some size."""
    model = hm.SteerModel(tiny(architecture, **changes), layer)
    noise = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1))
    model.set_vector(noise, scale=value)
    return model


def block_outputs(model, ids):
    """What every decoder block passes on, read by the test's own hooks, put behind all others."""
    outputs = {}

    def reader(i):
        def read(module, inputs, output):
            state = output[0] if isinstance(output, tuple) else output
            outputs[i] = state.detach().clone()

        return read

    handles = [layer.register_forward_hook(reader(i)) for i, layer in enumerate(model.layers)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("architecture", CONFIGS)
def test_hook_adds_exactly_v_at_its_layer_and_nothing_below(architecture):
    model = steered(architecture)
    with model.steering_off():
        plain = block_outputs(model, IDS)
    moved = block_outputs(model, IDS)
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], plain[1] + model.steering.vector)
    assert not torch.allclose(moved[2], plain[2])
    assert torch.equal(fp.FastPath(model).layer_output(IDS), moved[1])


def test_layers_that_return_tuples_are_steered_too():
    hook = hm.ResidualHook(4, init_scale=1.0)
    hidden, cache = torch.zeros(1, 2, 4), object()
    output = hook.hook(None, None, (hidden, cache))
    assert torch.equal(output[0], hook.vector.expand(1, 2, 4)) and output[1] is cache
    assert torch.equal(hidden, torch.zeros(1, 2, 4))  # never in place


def test_vector_stays_fp32_and_states_keep_their_dtype():
    hook = hm.ResidualHook(4, init_scale=1.0)
    hidden = torch.zeros(1, 4, dtype=torch.bfloat16)
    assert hook(hidden).dtype == torch.bfloat16 and hook.vector.dtype == torch.float32
    seeded = [hm.ResidualHook(4, 0.5, torch.Generator().manual_seed(3)).vector for _ in range(2)]
    assert torch.equal(*seeded)
    assert not hm.ResidualHook(4).vector.any()


def test_unknown_architecture_names_what_was_looked_for():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Looked for: .*model\.layers.*transformer\.h"):
        hm.find_layers(model)


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_layer_out_of_range_names_the_allowed_range(layer):
    with pytest.raises(ValueError, match=rf"--layer {layer} is out of range: .* \(use 0\.\.3\)"):
        hm.SteerModel(tiny("llama"), layer)


def test_only_the_vector_is_trainable_and_the_model_gets_no_gradient():
    model = steered()
    token_loss(model(input_ids=IDS).logits, IDS).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["steering.vector"]
    assert all(p.grad is None for p in model.model.parameters())
    assert model.steering.vector.grad.norm() > 0


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gemma3"])
def test_gradient_equals_finite_differences(architecture):
    model = steered(architecture).double()  # differences need more digits than fp32 has
    vector = model.steering.vector

    def loss():  # the reference: log-probabilities picked by hand, in double
        logits = model(input_ids=IDS, use_cache=False).logits.double()
        return -logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).sum()

    token_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()
    random = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for direction in (vector.grad.clone(), random):
        direction *= 1e-2 / direction.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                vector += sign * direction
                values.append(loss().item())
                vector -= sign * direction
        expected = 2 * (vector.grad @ direction).item()
        assert math.isclose(values[0] - values[1], expected, rel_tol=1e-2, abs_tol=1e-5)


def test_train_mode_never_turns_dropout_on():
    model = hm.SteerModel(tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5), 1).train()
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_gradient_checkpointing_gives_the_same_gradient_and_recomputes_above_only(architecture):
    model, calls = steered(architecture), []
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))

    def gradient():
        calls.clear()
        model.steering.vector.grad = None
        token_loss(model(input_ids=IDS, use_cache=False).logits, IDS).backward()
        return model.steering.vector.grad.clone()

    plain = gradient()
    fp.checkpoint_layers(model)
    inner = [layer.forward for layer in model.layers]
    assert [hasattr(forward, "keywords") for forward in inner] == [False, False, True, True]
    assert torch.allclose(gradient(), plain, rtol=1e-6, atol=1e-8)


def test_checkpointed_layers_really_keep_less(monkeypatch):
    model, saved = steered(), []

    def count():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), id):
            model(input_ids=IDS, use_cache=False)
        return sum(saved)

    plain = count()
    fp.checkpoint_layers(model)
    assert count() < plain / 2


# ---------------------------------------------------------------- save and load


def test_saved_vector_gives_identical_logits_when_loaded(tmp_path):
    model, path = steered(), tmp_path / "v.safetensors"
    logits = model(input_ids=IDS).logits
    model.save_vector(path, steps=3)
    other = hm.SteerModel(tiny("llama"), 1)
    assert not torch.equal(other(input_ids=IDS).logits, logits)
    assert other.load_vector(path)["steps"] == "3"
    assert torch.equal(other(input_ids=IDS).logits, logits)
    assert path.stat().st_size < 100_000
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]  # nothing half-written


def test_same_vector_and_metadata_give_the_same_bytes(tmp_path):
    metadata, files = {f"key {i}": i for i in range(20)}, set()
    for i in range(5):
        hm.save_vector(tmp_path / str(i), torch.arange(9.0), metadata)
        files.add((tmp_path / str(i)).read_bytes())
        read, strings = hm.load_vector(tmp_path / str(i))
        assert torch.equal(read, torch.arange(9.0)) and strings["key 7"] == "7"
    assert len(files) == 1


def test_loading_names_the_mismatch(tmp_path):
    model, path = steered(), tmp_path / "v.safetensors"
    model.config._name_or_path = "org/right-model"
    model.save_vector(path)
    for change, message in (
        ({"name": "org/other"}, "trained on model org/right-model, this is org/other"),
        ({"layer": 2}, "trained at layer 1, the model is set to 2"),
        ({"hidden_size": 64}, r"shape \[32\] .*it needs \[64\]"),
    ):
        width = change.get("hidden_size", 32)
        other = hm.SteerModel(tiny("llama", hidden_size=width), change.get("layer", 1))
        other.config._name_or_path = change.get("name", "/local/copy/Right-Model/")
        with pytest.raises(ValueError, match=message):
            other.load_vector(path)
    other = hm.SteerModel(tiny("llama"), 1)
    other.load_vector(path, any_model=True)
    assert torch.equal(other.steering.vector, model.steering.vector)


def test_unreadable_vector_files_are_clear_errors(tmp_path):
    good = tmp_path / "good.safetensors"
    hm.save_vector(good, torch.ones(8), {"layer": 1})
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(good.read_bytes()[:-5])
    nan = tmp_path / "nan.safetensors"
    hm.save_vector(nan, torch.full((8,), math.nan), {})
    for path in (torn, tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            hm.load_vector(path)
    whole = tmp_path / "whole.safetensors"
    save_file({"steering_vector": torch.ones(8, dtype=torch.int32)}, whole)
    for path in (nan, whole):
        with pytest.raises(ValueError, match="no finite 1-D float tensor"):
            hm.load_vector(path)
    with pytest.raises(ValueError, match="is a folder: name the vector"):
        hm.load_vector(tmp_path)
    with pytest.raises(ValueError, match="--from makes one of ours"):
        hm.load_vector(tmp_path / "layer_1.pt")
    model = steered()
    before = model.steering.vector.detach().clone()
    for vector, scale in ((torch.full((32,), math.inf), 1), (torch.ones(32), math.nan)):
        with pytest.raises(ValueError, match="finite: False"):
            model.set_vector(vector, scale)
    assert torch.equal(model.steering.vector, before)
    with pytest.raises(ValueError, match="scale nan: must be"), model.scaled(math.nan):
        pass


def test_scale_layer_and_switch():
    model = steered(value=0.0)
    plain = model(input_ids=IDS).logits
    model.set_vector(torch.ones(32), scale=2.0)
    at_one = model(input_ids=IDS).logits
    assert torch.equal(model.steering.vector, torch.full((32,), 2.0))
    model.set_layer(2)
    assert not torch.allclose(model(input_ids=IDS).logits, at_one)
    with pytest.raises(RuntimeError, match="inside"), model.steering_off():
        assert torch.equal(model(input_ids=IDS).logits, plain)
        raise RuntimeError("inside")
    assert not torch.equal(model(input_ids=IDS).logits, plain)


def test_generate_gives_the_head_no_strided_rows_for_which_its_weight_is_copied():
    model, products = steered("llama", vocab_size=83), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            shapes = [list(x.shape) for x in args if torch.is_tensor(x)]
            if "mm" in str(function) and any(83 in shape for shape in shapes):
                products.append(str(function))
            return function(*args, **(kwargs or {}))

    with Products():
        model.generate(input_ids=IDS, pad_token_id=0, max_new_tokens=2, do_sample=False)
    assert products == ["aten.mm.default"] * 2  # with strided ones aten.bmm: a weight for each row


def test_scale_of_a_generate_call_multiplies_the_vector_for_that_call_only():
    model = steered("qwen3", value=0.05)
    vector = model.steering.vector.detach().clone()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}

    def tokens(**more):
        return model.generate(input_ids=IDS, pad_token_id=0, **options, **more).tolist()

    plain, at_one, at_three = (tokens(scale=scale) for scale in (0, 1, 3))
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
    assert plain != at_one != at_three


def test_vectors_add_up_with_their_scales(tmp_path):
    model, paths = steered(), [tmp_path / f"{i}.safetensors" for i in range(2)]
    a, b = torch.arange(32.0), torch.ones(32)
    for path, vector in zip(paths, (a, b), strict=True):
        model.set_vector(vector)
        model.save_vector(path)
    assert hm.load_vector(paths[0])[1]["model_type"] == "llama"
    model.load_vector(paths[0], scale=2)  # in place of what was there
    assert torch.equal(model.steering.vector, 2 * a)
    model.load_vector(paths[1], scale=-0.5, add=True)
    model.set_vector(b, scale=4, add=True)
    assert torch.equal(model.steering.vector, 2 * a + 3.5 * b)
    with pytest.raises(ValueError, match="does not fit"):
        model.set_vector(torch.ones(31), add=True)
    assert torch.equal(model.steering.vector, 2 * a + 3.5 * b)


def test_left_padded_generation_equals_unpadded():
    model = steered("qwen3", value=3.0)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=IDS[:1], attention_mask=torch.ones(1, 10).long(), **options)
    padded = torch.cat([torch.zeros(1, 4).long(), IDS[:1]], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 10])
    batch = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert batch[0, 14:].tolist() == alone[0, 10:].tolist()
    with model.steering_off():
        plain = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert plain[0, 14:].tolist() != batch[0, 14:].tolist()


# ---------------------------------------------------------------- batches and loss


def example(ids, labels):
    return types.SimpleNamespace(input_ids=ids, labels=labels)


def test_right_padding_without_a_mask_does_not_change_losses():
    rows = [example(list(range(3, 3 + n)), [-100, *range(4, 3 + n)]) for n in (10, 6, 3)]
    for architecture in ("llama", "qwen3", "gemma2", "gemma3"):
        model = steered(architecture)
        fast = fp.FastPath(model)
        together = fp.example_sums(me.nll_of(fast), rows, max_tokens=30)
        alone = fp.example_sums(me.nll_of(fast), rows, max_tokens=1)
        assert together == pytest.approx(alone, rel=1e-5)


def test_losses_equal_the_models_own_loss():
    model = steered()
    fast = fp.FastPath(model)
    labels = IDS.clone()
    labels[:, :4] = -100
    output = model(input_ids=IDS, labels=labels)
    rows = [example(IDS[i].tolist(), labels[i].tolist()) for i in (0, 1)]
    assert torch.allclose(losses_of(fast, rows).mean(), output.loss)  # 2 rows x 6 label tokens
    assert torch.allclose(token_loss(output.logits, labels) / 12, output.loss)
    assert cf.label_count(rows[0]) == 6
    with pytest.raises(ValueError, match="no label token"):
        losses_of(fast, [example(IDS[0].tolist(), [-100] * 10)])


def test_divergence_is_the_kl_of_vanilla_from_steered_at_label_tokens():
    rows = rows_of(9, 6, 12)
    for architecture in ("llama", "gemma2", "granite"):  # the last two cap and scale logits
        model = steered(architecture, value=3.0)
        fast = fp.FastPath(model)
        for model.fast_layers[1] in (True, False):
            mine = fp.example_sums(fast.divergences, rows, max_tokens=20)
            for row, value in zip(rows, mine, strict=True):
                ids, labels = cf.collate([row])
                with torch.no_grad():
                    after = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                    with model.steering_off():
                        before = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                kl = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none")
                expected = kl.sum(-1)[labels[0, 1:] >= 0].sum().item()
                assert value == pytest.approx(expected, rel=1e-4) and value > 0
    model.set_vector(torch.zeros(32))
    assert fp.example_sums(fast.divergences, rows, 20) == pytest.approx([0, 0, 0], abs=1e-6)


def test_response_means_are_of_the_plain_states_of_label_tokens():
    model, rows = steered(value=9.0), rows_of(9, 6, 12)
    means = me.response_means(model, rows, max_tokens=20)
    for row, mean in zip(rows, means, strict=True):
        with model.steering_off():
            states = fp.FastPath(model).layer_output(cf.collate([row])[0])[0]
        picked = [state for state, label in zip(states, row.labels, strict=True) if label >= 0]
        assert torch.allclose(mean, torch.stack(picked).mean(dim=0), atol=1e-5)
    with pytest.raises(ValueError, match="no label token"):
        me.response_means(model, [example([3, 4], [-100, -100])], 20)


def test_residual_norm_is_the_median_over_tokens_of_the_plain_stream():
    model, rows = steered(value=50.0), [example(IDS[i].tolist(), []) for i in (0, 1)]
    fast = fp.FastPath(model)
    with model.steering_off():
        norms = torch.cat([fast.layer_output(IDS[i : i + 1])[0].norm(dim=-1) for i in (0, 1)])
    assert fast.median_residual_norm(rows) == pytest.approx(norms.median().item())


# ---------------------------------------------------------------- the fast path


def rows_of(*lengths, prompt=3):
    """Rows of these lengths, the first `prompt` tokens and the last one without loss."""
    rows = []
    for i, length in enumerate(lengths):
        ids = [(7 * i + 5 * t) % 150 + 3 for t in range(length)]
        rows.append(example(ids, [-100] * prompt + ids[prompt:-1] + [-100]))
    return rows


def losses_of(fast, rows):
    """The loss of every label token, as training takes it."""
    return fast.losses(rows, loss_of_target)


def gradient_of(model, loss):
    model.steering.vector.grad = None
    loss.backward()
    return model.steering.vector.grad.clone()


def plain_loss(model, rows):
    """The reference: hooked full forward of the model, logits of all tokens."""
    ids, labels = cf.collate(rows)
    return token_loss(model(input_ids=ids, use_cache=False).logits, labels)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_cached_prefix_gives_the_same_states_and_gradient_bit_for_bit(architecture):
    model, rows = steered(architecture), rows_of(14, 9, 12)  # longer than the sliding window of 8
    fast, before_head = fp.FastPath(model), []
    handle = model.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: before_head.append(inputs[0])
    )
    plain = plain_loss(model, rows)
    handle.remove()
    (states,) = before_head
    states.retain_grad()
    expected = gradient_of(model, plain)
    fast.cache_prefix(rows, max_tokens=1000)  # one batch: equal padded shapes
    assert model.fast_layers == {1: True}
    assert {*fast.cache} == {tuple(row.input_ids) for row in rows}
    ids, _ = cf.collate(rows)
    cached = fast._states_before_head(ids, rows)
    for row, ours, theirs in zip(rows, cached, states, strict=True):
        length = len(row.input_ids)  # after which there is padding
        assert torch.equal(ours[:length], theirs[:length])
    model.steering.vector.grad = None
    cached.backward(states.grad)  # what the model's own head and loss make of these states
    assert torch.equal(model.steering.vector.grad, expected) and expected.norm() > 0


@pytest.mark.parametrize("architecture", CONFIGS)
def test_fast_loss_and_gradient_equal_the_full_forward(architecture, monkeypatch):
    monkeypatch.setattr(fp, "HEAD_TOKENS", 5)  # several parts
    model, rows = steered(architecture), rows_of(9, 14, 11)
    fast = fp.FastPath(model)
    plain = plain_loss(model, rows)
    expected = gradient_of(model, plain)
    for place in ("off", "auto"):
        fast.cache_prefix(rows, place, max_tokens=14)  # one row a batch: other padded shapes
        losses = losses_of(fast, rows)
        assert losses.shape == (sum(map(cf.label_count, rows)),)
        assert model.fast_layers == {1: True} and bool(fast.cache) == (place == "auto")
        assert torch.allclose(losses.sum(), plain, rtol=1e-5)
        error = (gradient_of(model, losses.sum()) - expected).norm() / expected.norm()
        assert error < 1e-4


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere"])
def test_softcapped_and_scaled_logits_stay_right(architecture):
    changes = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 7.0}}
    model = steered(architecture, **changes.get(architecture, {"logit_scale": 0.2}))
    fast = fp.FastPath(model)
    model.model.get_output_embeddings().weight.data *= 20  # logits large enough to matter
    rows = rows_of(9, 14)
    plain = plain_loss(model, rows)
    expected = gradient_of(model, plain)
    got = losses_of(fast, rows).sum()
    assert torch.allclose(got, plain, rtol=1e-5)
    assert torch.allclose(gradient_of(model, got), expected, rtol=1e-4, atol=1e-6)
    head, caught = model.model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, inputs, logits: caught.append(logits))
    ids, labels = cf.collate(rows)
    model(input_ids=ids)
    assert not torch.allclose(token_loss(caught[0], labels), plain, rtol=1e-2)


def test_head_sees_label_tokens_only_and_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(fp, "HEAD_TOKENS", 4)
    model, rows, seen = steered("llama"), rows_of(9, 14, 11), []
    fast = fp.FastPath(model)
    losses_of(fast, rows)  # the check against the plain path is behind us
    linear = torch.nn.functional.linear

    def record(states, weight, bias=None):
        if weight is model.model.lm_head.weight:
            seen.append(states.shape[:-1].numel())
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    losses_of(fast, rows).sum().backward()
    assert sum(seen) == sum(map(cf.label_count, rows)) and max(seen) <= 4


def test_cached_layers_do_no_work_and_upper_layers_get_no_dense_mask():
    model, rows, worked, masks = steered("qwen3", layer=2), rows_of(9, 14), [], []
    fast = fp.FastPath(model)
    assert fast.is_fast(rows)  # the check, which takes plain forwards, is behind us
    for i, layer in enumerate(model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: worked.append(i))
    model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    fast.cache_prefix(rows)
    assert worked == [0, 1, 2]  # the fill stops at the layer
    losses_of(fast, rows)
    worked.clear()
    losses_of(fast, rows).sum().backward()
    assert worked == [3] and set(masks) == {None}
    worked.clear()
    same_text = [example(row.input_ids, [-100] * 5 + row.input_ids[5:]) for row in rows]
    losses_of(fast, same_text)  # another object, other labels: states depend on neither
    assert worked == [3]
    worked.clear()
    losses_of(fast, [*rows, *rows_of(5)])  # of which one is not in the cache
    assert worked == [0, 1, 2, 3]


def test_cache_is_dropped_when_the_layer_moves_and_obeys_the_switch():
    model, rows = steered("llama"), rows_of(9, 14)
    fast = fp.FastPath(model)
    with model.steering_off():
        vanilla = plain_loss(model, rows).item()
    fast.cache_prefix(rows)
    with model.steering_off():
        assert losses_of(fast, rows).sum().item() == pytest.approx(vanilla, rel=1e-5)
    model.set_layer(2)
    assert losses_of(fast, rows).sum().item() == pytest.approx(plain_loss(model, rows).item())
    assert model.fast_layers == {1: True, 2: True} and not fast.cache


def test_a_cache_that_does_not_fit_is_not_made_and_says_so(monkeypatch, caplog):
    model, rows = steered("llama"), rows_of(9, 14)
    fast = fp.FastPath(model)
    size = 23 * 32 * 4
    free = {"cuda": 0, "cpu": 0}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for on_gpu, on_host, where, place in (
        (4 * size, 0, "auto", cuda),
        (4 * size - 1, 2 * size, "auto", cpu),
        (4 * size - 1, 2 * size - 1, "auto", None),
        (2 * size, 0, "device", cuda),
        (0, 9 * size, "device", None),
        (9 * size, 2 * size, "host", cpu),
        (9 * size, 0, "host", None),
        (9 * size, 9 * size, "off", None),
    ):
        free.update(cuda=on_gpu, cpu=on_host)
        assert memory.cache_place(where, size, cuda) == place
    free["cpu"] = 0
    with caplog.at_level("INFO", logger="steering"):
        fast.cache_prefix(rows, "host")
    assert not fast.cache and "does not fit, so not cached" in caplog.text
    assert losses_of(fast, rows).sum().item() == pytest.approx(plain_loss(model, rows).item())


def test_an_architecture_that_passes_more_than_the_stream_falls_back(caplog):
    model, rows, first = steered("llama"), rows_of(9, 14), []
    fast = fp.FastPath(model)
    model.layers[0].register_forward_pre_hook(lambda module, args: first.append(args[0]))
    model.layers[0].mlp.register_forward_hook(lambda module, args, out: first.append(out))
    model.layers[3].register_forward_hook(lambda module, args, out: out + 3 * first[-1].mean())
    fast.cache_prefix(rows)
    assert_plain_forwards(fast, rows, caplog)
    assert "(off by " in caplog.text


def assert_plain_forwards(fast, rows, caplog):
    """Assert that the check has found it out, once, and that numbers are the plain forward's."""
    model = fast.model
    assert model.fast_layers == {model.layer: False} and not fast.cache
    expected = plain_loss(model, rows)
    gradient = gradient_of(model, expected)
    loss = losses_of(fast, rows).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient_of(model, loss), gradient, rtol=1e-4, atol=1e-6)
    states = fast.layer_output(cf.collate(rows)[0])
    assert torch.equal(states, block_outputs(model, cf.collate(rows)[0])[model.layer])
    fp.FastPath(model).cache_prefix(rows)
    assert caplog.text.count(f"no fast path for {type(model.model).__name__}") == 1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_layers_below_that_are_steered_too_are_noticed_even_with_a_zero_vector(value, caplog):
    model, rows = steered("llama", layer=2, value=value), rows_of(9, 14)
    model.layers[1].register_forward_hook(model.steering.hook)  # the cache knows nothing of it
    fast, before = fp.FastPath(model), model.steering.vector.detach().clone()
    with model.steering_off():
        fast.cache_prefix(rows)
        losses_of(fast, rows)  # the check is done here
        assert torch.equal(model.steering.vector, before) and model.steering.scale == 0
    model.set_vector(torch.ones(32), scale=3.0)
    assert_plain_forwards(fast, rows, caplog)


@pytest.mark.parametrize("dtype, off, fast", [
    ("bfloat16", 0.06, True), ("bfloat16", 0.4, False), ("float32", 0.06, False),
])  # fmt: skip
def test_what_bf16_rounds_of_a_logit_is_no_reason_for_plain_forwards(monkeypatch, dtype, off, fast):
    model, real = steered("llama"), fp.FastPath._head_logits
    model.model.to(getattr(torch, dtype))

    def rounded(self, hidden):  # half of the logits too high, as a long row's were by 0.02
        logits = real(self, hidden)
        return logits + off * (torch.arange(logits.shape[-1]) % 2).to(logits)

    monkeypatch.setattr(fp.FastPath, "_head_logits", rounded)
    losses_of(fp.FastPath(model), rows_of(9, 14))
    assert model.fast_layers == {1: fast}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: error code 12")],
)
@pytest.mark.parametrize(
    ("method", "fails_at"),
    [
        ("_before_head", 1),  # plain
        ("_before_head", 2),  # from the cache
        ("_before_head", 3),  # without it
        ("_layer_output", 1),  # plain
        ("_layer_output", 2),  # for the cache
    ],
)
def test_out_of_memory_in_the_check_leaves_vector_and_fast_path_as_they_were(
    monkeypatch, error, method, fails_at
):
    model, rows = steered("llama", value=0.0), rows_of(9)
    fast, real, calls = fp.FastPath(model), getattr(fp.FastPath, method), []

    def full(self, inputs, fast):
        calls.append(1)
        if len(calls) == fails_at:
            raise error
        return real(self, inputs, fast)

    with model.scaled(0.5):
        with monkeypatch.context() as patch:
            patch.setattr(fp.FastPath, method, full)
            with pytest.raises(type(error)):
                losses_of(fast, rows)
        assert len(calls) == fails_at and model.steering.scale == 0.5
        assert not model.steering.vector.any() and not fast.cache and not model.fast_layers
        losses_of(fast, rows)  # by when there is memory
        assert model.fast_layers == {1: True} and not fast.cache and model.steering.scale == 0.5
        assert not model.steering.vector.any()


@pytest.mark.parametrize(
    "shares", ["a pass-through fails", "what is missing fails", "a default", "what was left before"]
)
def test_layers_that_cannot_be_passed_through_mean_plain_forwards_and_right_numbers(
    shares, caplog, monkeypatch
):
    model, rows, left = steered("llama"), rows_of(9, 14, 11), {}
    below, above = model.layers[0].forward, model.layers[3].forward

    def leave(hidden_states, *args, **kwargs):
        left["values"] = below(hidden_states, *args, **kwargs)
        return left["values"]

    def take(hidden_states, *args, **kwargs):  # as layers that share keys and values do
        if shares == "a default":
            left.setdefault("values", hidden_states)
        shared = left["values"][-1:, :1]  # states of one token, which add up to something
        return above(hidden_states, *args, **kwargs) + 3 * shared / shared.norm()

    def refuse(self, hidden_states, *args, **kwargs):
        raise KeyError("a layer wants what another one left")

    if shares == "a pass-through fails":
        monkeypatch.setattr(fp.FastPath, "_pass_through", refuse)
    else:  # without layer 0 there is nothing to take: only a start from the cache fails
        monkeypatch.setattr(model.layers[0], "forward", leave)
        monkeypatch.setattr(model.layers[3], "forward", take)
        if shares != "what was left before":  # of whatever text that was
            model.model.register_forward_pre_hook(lambda *_: left.clear())
    fast = fp.FastPath(model)
    fast.cache_prefix(rows)
    assert ("KeyError" if "fails" in shares else "off by") in caplog.text
    assert_plain_forwards(fast, rows, caplog)


@pytest.mark.parametrize("wrong", ["cached", "uncached"])
@pytest.mark.parametrize("fails", [True, False])
def test_the_check_tries_the_start_from_the_cache_and_the_one_without(
    wrong, fails, monkeypatch, caplog
):
    model, rows, real = steered("llama"), rows_of(9, 14), fp.FastPath._states_before_head

    def one_is_wrong(self, ids, examples):
        states = real(self, ids, examples)
        if self._is_cached(examples) == (wrong == "cached"):
            if fails:
                raise AttributeError("no such state")
            return states + 0.1 * states.norm(dim=-1, keepdim=True).mean()
        return states

    monkeypatch.setattr(fp.FastPath, "_states_before_head", one_is_wrong)
    fast = fp.FastPath(model)
    assert not fast.is_fast(rows)
    assert_plain_forwards(fast, rows, caplog)


def test_the_check_is_done_once_a_model_and_layer(monkeypatch):
    model, rows, checked = steered("llama"), rows_of(9, 14), []
    real = fp.FastPath._why_not_fast

    def check(self, row):
        checked.append((self.layer, len(row.input_ids)))
        return real(self, row)

    monkeypatch.setattr(fp.FastPath, "_why_not_fast", check)
    for _ in range(2):
        fast = fp.FastPath(model)
        fast.cache_prefix(rows[::-1])
        losses_of(fast, rows)
        fast.layer_output(IDS)
    assert checked == [(1, 9)]  # of the shortest answer
    model.set_layer(2)
    losses_of(fast, rows)
    model.set_layer(1)
    losses_of(fast, rows)
    assert checked == [(1, 9), (2, 9)]


def test_what_fails_after_the_check_is_an_error_and_no_silent_change_of_path(monkeypatch, caplog):
    model, rows = steered("llama"), rows_of(9, 14)
    fast = fp.FastPath(model)
    fast.cache_prefix(rows)
    with monkeypatch.context() as patch:
        patch.setattr(fp.FastPath, "_pass_through", lambda self, hidden_states: None)
        with pytest.raises(TypeError):  # a layer has more arguments
            losses_of(fast, rows)
    assert model.fast_layers == {1: True} and fast.cache
    assert "WARNING" not in caplog.text
    expected = plain_loss(model, rows).item()
    assert losses_of(fast, rows).sum().item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- edits that would train nonsense


def per_token(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def focal(logits, targets):
    """Another loss of each token alone."""
    nats = per_token(logits, targets)
    return (1 - (-nats).exp()) ** 2 * nats


def best_half(logits, targets):
    nats = per_token(logits, targets)
    return nats * (nats <= nats.median())


def scaled_by_all(logits, targets):
    return per_token(logits / logits.std(), targets)


ONE_EACH, ALONE = "one number for each", "depends on the other tokens"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("fast_path", [True, False])
def test_losses_of_each_token_alone_pass_on_either_path(architecture, fast_path):
    model, rows = steered(architecture), rows_of(9, 14, 11)
    model.fast_layers[1] = fast_path
    fast = fp.FastPath(model)
    before = model.steering.vector.detach().clone()
    for cached in (False, True):
        if cached:
            fast.cache_prefix(rows)
        for loss in (loss_of_target, focal):
            fast.check_token_loss(loss, rows)
    assert torch.equal(model.steering.vector, before) and model.steering.vector.grad is None
    model.model.to(torch.bfloat16)
    fp.FastPath(model).check_token_loss(loss_of_target, rows)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("loss, message", [
    (lambda logits, targets: per_token(logits, targets).mean(), rf"gives \(\) .*{ONE_EACH}"),
    (lambda logits, targets: per_token(logits, targets)[:, None], rf"gives \(8, 1\) .*{ONE_EACH}"),
    (lambda logits, targets: logits.float().log_softmax(-1), rf"gives \(8, 160\) .*{ONE_EACH}"),
    (lambda logits, targets: per_token(logits, targets) / len(targets), ALONE),
    (lambda logits, targets: per_token(logits, targets).softmax(0), ALONE),
    (best_half, ALONE),
    (scaled_by_all, ALONE),
    (lambda logits, targets: per_token(logits, targets).detach(), "no gradient in the logits"),
    (lambda logits, targets: targets.float(), "no gradient in the logits"),
])  # fmt: skip
def test_losses_that_need_more_than_their_token_are_refused(loss, message, fast_path):
    model = steered("llama")
    model.fast_layers[1] = fast_path
    with pytest.raises(ValueError, match=message):
        fp.FastPath(model).check_token_loss(loss, rows_of(9, 14, 11))


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_loss_that_reads_the_vector_is_refused(value):
    model, rows = steered("llama", value=value), rows_of(9, 14)
    penalties = (
        lambda: 0.1 * model.steering.vector.square().sum(),
        lambda: 0.1 * model.steering.added().abs().mean(),
    )
    for penalty in penalties:
        with pytest.raises(ValueError, match=r"reads the vector.*extra_loss"):
            fp.FastPath(model).check_token_loss(
                lambda logits, targets, penalty=penalty: per_token(logits, targets) + penalty(),
                rows,
            )
    fixed = model.steering.vector.detach().square().sum()  # a constant has no gradient to lose
    fp.FastPath(model).check_token_loss(
        lambda logits, targets: per_token(logits, targets) + fixed, rows
    )


class LowRank(hm.ResidualHook):
    """A steering that no vector can stand for: `added` was left as it was."""

    ignores_scale = False

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        generator = torch.Generator().manual_seed(5)
        self.down = torch.nn.Parameter(0.3 * torch.randn(hidden_size, 2, generator=generator))
        self.up = torch.nn.Parameter(0.3 * torch.randn(2, hidden_size, generator=generator))

    def forward(self, hidden_states):
        down, up = (part.to(hidden_states.dtype) for part in (self.down, self.up))
        scale = 1.0 if self.ignores_scale else self.scale
        return super().forward(hidden_states) + scale * (hidden_states @ down) @ up


class LowRankAlways(LowRank):
    ignores_scale = True


class Gain(hm.ResidualHook):
    """The learned gain of README's edits."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.gain = torch.nn.Parameter(torch.tensor(1.7))

    def added(self):
        return self.gain * self.vector


class GainOfForwardAlone(hm.ResidualHook):
    """The same in the wrong place: it acts, and would not be saved."""

    def forward(self, hidden_states):
        return hidden_states + 1.7 * self.scale * self.vector.to(hidden_states.dtype)


class NeverOff(hm.ResidualHook):
    """What is saved, but the plain model has it too."""

    def forward(self, hidden_states):
        return hidden_states + self.added().to(hidden_states.dtype)


class AnotherPlace(hm.ResidualHook):
    """The first tokens only: right where it acts."""

    def forward(self, hidden_states):
        moved = super().forward(hidden_states)
        return torch.cat([moved[:, :4], hidden_states[:, 4:]], dim=1)


def with_hook(kind, architecture="llama", ratio=0.3, dtype=torch.float32):
    """A SteerModel whose steering is of another class, its vector so long beside the states."""
    whole = tiny(architecture).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hm, "ResidualHook", kind)
        model = hm.SteerModel(whole, 1)
    states = block_outputs(steered(architecture, value=0.0), cf.collate(rows_of(14))[0])[1]
    norm = states.norm(dim=-1).median().item() / math.sqrt(model.hidden_size)
    noise = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1))
    model.set_vector(noise, scale=ratio * norm)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", [hm.ResidualHook, Gain])
def test_a_hook_that_adds_what_is_saved_passes(kind, architecture, dtype):
    for ratio in (3.0, 0.3, 0.02, 0.0):  # too long, after a training, few steps, none
        model = with_hook(kind, architecture, ratio, dtype)
        before = model.steering.vector.detach().clone()
        fp.FastPath(model).check_vector(rows_of(14)[0])
        assert torch.equal(model.steering.vector, before)
        assert "forward" not in vars(model.steering)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, ratio", [
    (LowRank, 0.3), (LowRank, 0.0), (LowRankAlways, 0.3), (LowRankAlways, 0.0),
    (GainOfForwardAlone, 0.3), (AnotherPlace, 0.3), (NeverOff, 0.3),
])  # fmt: skip
def test_a_hook_that_adds_something_else_than_what_is_saved_is_refused(kind, ratio, dtype):
    model = with_hook(kind, ratio=ratio, dtype=dtype)
    at_zero = kind in (LowRankAlways, NeverOff)
    fault = "at scale 0" if at_zero else "else than ResidualHook.added returns"
    with pytest.raises(ValueError, match=f"ResidualHook.forward adds something {fault}"):
        fp.FastPath(model).check_vector(rows_of(14)[0])


def test_batches_that_do_not_fit_into_memory_are_halved():
    rows, sizes = rows_of(9, 9, 9, 9, 9, 9), []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [example.input_ids for example in batch]

    done = list(fp.in_batches(work, rows, 1000))
    assert [id(e) for batch, _ in done for e in batch] == [id(e) for e in rows]
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        list(fp.in_batches(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("x")), rows, 99))


def test_layer_whose_output_is_not_one_residual_stream_is_refused():
    model = steered("llama")
    model.layers[1].register_forward_hook(lambda *_: None)
    model.layers[1].forward = lambda hidden, *_, **__: hidden.expand(4, *hidden.shape)  # Gemma 3n
    with pytest.raises(
        ValueError, match=r"LlamaDecoderLayer gives states \(4, .*, not \(B, T, 32\)"
    ):
        model(input_ids=IDS)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_models_of_images_and_text_load_by_their_text_part(name, tmp_path):
    text = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
    if name == "mistral3":
        vision = transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config = transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**text, head_dim=8), vision_config=vision
        )
    else:
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2_5_VLConfig(text_config={**text, "rope_scaling": rope})
        config.vision_config.depth, config.vision_config.hidden_size = 1, 16
        config.vision_config.num_heads, config.vision_config.out_hidden_size = 2, 32
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    model = hm.load_model(tmp_path, 1, "fp32", "cpu")
    assert len(model.layers) == 4 and model.hidden_size == 32
    model.set_vector(torch.ones(32))
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    fast.cache_prefix(rows)
    assert losses_of(fast, rows).sum().item() == pytest.approx(plain_loss(model, rows).item())
    out = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == IDS.shape[1] + 3


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = rows_of(9, 14, 5, 11, 6, 30)
    batches = cf.micro_batches(rows, 28)
    assert sorted(id(e) for batch in batches for e in batch) == sorted(map(id, rows))
    lengths = [[len(e.input_ids) for e in batch] for batch in batches]
    assert lengths == [[5, 6, 9], [11, 14], [30]]  # the longest row is over the budget: alone


def test_compiled_layers_give_the_same_gradient(monkeypatch):
    without_gcc = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", without_gcc)
    model, rows = steered("llama", layer=2), rows_of(9, 14)
    fast = fp.FastPath(model)
    expected = gradient_of(model, losses_of(fast, rows).sum())
    fp.compile_layers(model)
    got = gradient_of(model, losses_of(fast, rows).sum())
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert hasattr(model.layers[3].forward, "_torchdynamo_orig_callable")


def test_cached_heldout_loss_in_bf16_is_within_a_hundredth(smol):
    model = hm.load_model(smol, 12, dtype="bf16", device="cpu")
    fast = fp.FastPath(model)
    rows = rows_of(20, 33, 27)
    model.set_vector(torch.randn(576, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        plain = plain_loss(model, rows).item()
    fast.cache_prefix(rows, max_tokens=66)
    tokens = sum(map(cf.label_count, rows))
    total = sum(fp.example_sums(me.nll_of(fast), rows, max_tokens=40))
    assert fast.is_fast(rows) and {s.dtype for s in fast.cache.values()} == {torch.bfloat16}
    assert total / tokens == pytest.approx(plain / tokens, abs=0.01)


# ---------------------------------------------------------------- a model in several places


def test_model_split_over_memory_and_disk_gives_the_same_gradient(tiny_folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)} | {"lm_head": "cpu"}
    split = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path)
    )
    whole = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    rows, noise = rows_of(9, 14), torch.randn(32, generator=torch.Generator().manual_seed(1))
    for layer in (1, 2):  # on disk (its weights are on no device), in memory
        model = hm.SteerModel(split, layer)
        fast = fp.FastPath(model)
        assert next(split.model.layers[1].parameters()).device.type == "meta"
        for each in (model, whole):
            each.set_layer(layer)
            each.set_vector(noise)
        expected = gradient_of(whole, plain_loss(whole, rows))
        for cache in ("off", "host"):
            fast.cache_prefix(rows, cache)
            got = gradient_of(model, losses_of(fast, rows).sum())
            assert model.fast_layers == {layer: True} and bool(fast.cache) == (cache == "host")
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
        options = {"max_new_tokens": 6, "do_sample": False}
        answers = [each.generate(input_ids=IDS, **options) for each in (model, whole)]
        assert torch.equal(*answers)
        model._handles[0].remove()


# ---------------------------------------------------------------- loading


def test_load_model_names_what_is_wrong(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)  # without weights: what is wrong is seen before
    with pytest.raises(ValueError, match="dtype float32: not one of auto, bf16, fp32, fp16"):
        hm.load_model(tmp_path, 0, dtype="float32")
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        hm.load_model("./nowhere", 0)


def test_load_model_from_folder_in_the_dtype_asked_for(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "m")
    for name, dtype in ld.DTYPES.items():
        model = hm.load_model(str(tmp_path / "m"), 1, dtype=name, device="cpu")
        assert model.model.dtype == dtype
        assert model.steering.vector.dtype == torch.float32
        assert model.name == str(tmp_path / "m")
    with pytest.raises(ValueError, match="is out of range"):
        hm.load_model(str(tmp_path / "m"), 4)
    with pytest.raises(ValueError, match=r"--model .*none"):
        hm.load_model(str(tmp_path / "none"), 1)


def test_device_map_places_the_vector_with_its_layer(tmp_path):
    pytest.importorskip("accelerate")
    tiny("llama").save_pretrained(tmp_path / "m")
    model = hm.load_model(str(tmp_path / "m"), 1, dtype="fp32", device_map={"": "cpu"})
    token_loss(model(input_ids=IDS).logits, IDS).backward()
    assert model.steering.vector.grad.norm() > 0


def test_auto_dtype_is_bf16_unless_the_cpu_lacks_it(monkeypatch):
    monkeypatch.setattr(ld, "cpu_has_bf16", lambda: False)
    assert [ld.pick_dtype("auto", d) for d in ("cpu", "cuda")] == ["fp32", "bf16"]
    assert ld.pick_dtype("fp16", "cpu") == "fp16"
    monkeypatch.setattr(ld, "cpu_has_bf16", lambda: True)
    assert ld.pick_dtype("auto", "cpu") == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_so():
    with pytest.raises(ValueError, match="no cuda device here"):
        ld.pick_device("cuda:1")


def test_remote_code_is_never_trusted_unless_asked(monkeypatch, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "m")
    seen = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def record(*args, **kwargs):
        seen.append(kwargs["trust_remote_code"])
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    hm.load_model(str(tmp_path / "m"), 1, device="cpu")
    hm.load_model(str(tmp_path / "m"), 1, device="cpu", trust_remote_code=True)
    assert seen == [False, True]
