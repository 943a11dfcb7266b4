"""steering/fast_path.py: shortcuts give the numbers of the plain forward, or are not taken."""

import functools
import math

import pytest
import torch
import transformers
from conftest import (
    CONFIGS,
    IDS,
    block_outputs,
    divergences_of,
    gradient_of,
    plain_loss,
    row_of,
    rows_of,
    steered_tiny,
    tiny,
)

import hook_model as hm
from steering import chat_format as cf
from steering import fast_path as fp
from steering import memory
from train_steering import token_loss


def losses_of(fast, rows):
    """The loss of every label token, as training takes it."""
    return fast.losses(rows, token_loss)


def sum_of(fast, rows):
    """The loss of all label tokens, as a number."""
    return losses_of(fast, rows).sum().item()


def layers_called(model, part="mlp"):
    """A list that grows by a layer's number whenever that part of it does its work."""
    called = []
    for i, layer in enumerate(model.layers):
        getattr(layer, part).register_forward_hook(lambda *_, i=i: called.append(i))
    return called


def assert_plain_forwards(fast, rows, caplog):
    """Assert that the check has found it out, once, and that numbers are the plain forward's."""
    model = fast.model
    assert model.fast_layers == {model.layer: False} and not fast.cache
    expected = plain_loss(model, rows)
    gradient = gradient_of(model, expected)
    loss = losses_of(fast, rows).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient_of(model, loss), gradient, rtol=1e-4, atol=1e-6)
    ids = cf.collate(rows)[0]
    assert torch.equal(fast.layer_output(ids), block_outputs(model, ids)[model.layer])
    fp.FastPath(model).cache_prefix(rows)
    assert caplog.text.count(f"no fast path for {type(model.model).__name__}") == 1


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("architecture", CONFIGS)
def test_losses_and_gradient_equal_the_full_forward_with_and_without_the_cache(
    architecture, monkeypatch
):
    monkeypatch.setattr(fp, "HEAD_TOKENS", 5)  # several parts
    model = steered_tiny(architecture)
    rows = rows_of(14, 9, 12)  # over the window of 8
    fast = fp.FastPath(model)
    plain = plain_loss(model, rows)
    expected = gradient_of(model, plain)
    found = {}
    for place, max_tokens in (("off", 14), ("auto", 14), ("auto", 1000)):
        fast.cache.clear()
        fast.cache_prefix(rows, place, max_tokens)
        assert model.fast_layers == {1: True}
        assert {*fast.cache} == {tuple(row.input_ids) for row in rows if place == "auto"}
        losses = losses_of(fast, rows)
        assert losses.shape == (sum(map(cf.label_count, rows)),)
        assert torch.allclose(losses.sum(), plain, rtol=1e-5)
        gradient = gradient_of(model, losses.sum())
        assert (gradient - expected).norm() < 1e-4 * expected.norm()
        found[place, max_tokens] = torch.cat([losses.detach(), gradient])
    first = losses_of(fast, rows)[
        : cf.label_count(rows[0])
    ].sum()  # of one row, as if it were alone
    alone = gradient_of(model, losses_of(fast, rows[:1]).sum())
    assert torch.allclose(gradient_of(model, first), alone, rtol=1e-3, atol=1e-5)
    # Where the cache was filled at the padded shapes of the loss, nothing differs in any bit.
    assert torch.equal(found["auto", 1000], found["off", 14])


def loud(architecture, **changes):
    """A model whose logits are large enough for caps and scales to matter."""
    model = steered_tiny(architecture, **changes)
    model.model.get_output_embeddings().weight.data *= 20
    return model


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 2.0}),
    ],
)
def test_softcapped_and_scaled_logits_stay_right(architecture, changes):
    model = loud(architecture, **changes)
    rows = rows_of(9, 14)
    plain = plain_loss(model, rows)
    assert plain.item() != pytest.approx(plain_loss(loud(architecture), rows).item(), rel=1e-2)
    loss = losses_of(fp.FastPath(model), rows).sum()
    assert torch.allclose(loss, plain, rtol=1e-5)
    expected = gradient_of(model, plain)
    assert torch.allclose(gradient_of(model, loss), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_right_padding_without_a_mask_does_not_change_losses(architecture):
    fast = fp.FastPath(steered_tiny(architecture))
    rows = rows_of(10, 6, 3, prompt=1)
    sums = functools.partial(fp.example_sums, functools.partial(losses_of, fast), rows)
    assert sums(max_tokens=30) == pytest.approx(sums(max_tokens=1), rel=1e-5)
    with pytest.raises(ValueError, match="no label token"):
        losses_of(fast, [row_of([3, 4], [-100, -100])])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("fast_path", [True, False])
def test_divergence_is_the_kl_of_vanilla_from_steered_at_label_tokens(architecture, fast_path):
    model = steered_tiny(architecture, value=3.0)
    model.fast_layers[1] = fast_path
    divergences = divergences_of(fp.FastPath(model))
    rows = rows_of(9, 6, 12)
    for row, value in zip(rows, fp.example_sums(divergences, rows, max_tokens=20), strict=True):
        ids, labels = cf.collate([row])
        with torch.no_grad():
            after = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            with model.steering_off():
                before = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        kl = torch.nn.functional.kl_div(after, before, log_target=True, reduction="none")
        expected = kl.sum(-1)[labels[0, 1:] >= 0].sum().item()
        assert value == pytest.approx(expected, rel=1e-4) and value > 0
    model.set_vector(torch.zeros(32))
    assert fp.example_sums(divergences, rows, 20) == pytest.approx([0, 0, 0], abs=1e-6)


def test_residual_norm_is_the_median_over_tokens_of_the_plain_stream():
    model = steered_tiny(value=50.0)
    fast = fp.FastPath(model)
    with model.steering_off():
        norms = block_outputs(model, IDS)[1].norm(dim=-1)
    rows = [row_of(ids.tolist(), []) for ids in IDS]
    assert fast.median_residual_norm(rows) == pytest.approx(norms.median().item())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_recomputed_layers_are_those_above_keep_less_and_give_the_same_gradient(architecture):
    model = steered_tiny(architecture)
    called = layers_called(model, "self_attn")
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    def gradient():
        called.clear()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = plain_loss(model, rows_of(9, 14))
        return gradient_of(model, loss)

    plain = gradient()
    assert called == [0, 1, 2, 3]
    all_kept = sum(kept)
    fp.checkpoint_layers(model)
    assert torch.allclose(gradient(), plain, rtol=1e-6, atol=1e-8)
    assert sorted(called) == [0, 1, 2, 2, 3, 3] and sum(kept) < all_kept / 2


def test_compiled_layers_are_those_above_and_give_the_same_gradient(monkeypatch):
    compiled = []
    real = torch.compile

    def without_gcc(function, **options):
        compiled.append(function.__self__)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", without_gcc)
    model = steered_tiny(layer=2)
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    expected = gradient_of(model, losses_of(fast, rows).sum())
    fp.compile_layers(model)
    assert compiled == [model.layers[3]]
    got = gradient_of(model, losses_of(fast, rows).sum())
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_cached_heldout_loss_in_bf16_is_within_a_hundredth(smol):
    model = hm.load_model(smol, 12, dtype="bf16", device="cpu")
    model.set_vector(torch.randn(576, generator=torch.Generator().manual_seed(0)))
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    fast.cache_prefix(rows)
    assert fast.is_fast(rows) and {s.dtype for s in fast.cache.values()} == {torch.bfloat16}
    with torch.no_grad():
        plain = plain_loss(model, rows).item()
        tokens = sum(map(cf.label_count, rows))
        assert sum_of(fast, rows) / tokens == pytest.approx(plain / tokens, abs=0.01)


def test_model_split_over_memory_and_disk_gives_the_same_gradient(tiny_folder, tmp_path):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(4)} | {"lm_head": "cpu"}
    split = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path)
    )
    whole = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    model = hm.SteerModel(split, 1)
    assert next(split.model.layers[1].parameters()).device.type == "meta"
    rows = rows_of(9, 14)
    for layer in (1, 2):  # on disk (its weights are on no device), in memory
        for each in (model, whole):
            each.set_layer(layer)
            each.set_vector(torch.randn(32, generator=torch.Generator().manual_seed(1)))
        expected = gradient_of(whole, plain_loss(whole, rows))
        fast = fp.FastPath(model)
        for cache in ("off", "host"):
            fast.cache_prefix(rows, cache)
            got = gradient_of(model, losses_of(fast, rows).sum())
            assert model.fast_layers[layer] and bool(fast.cache) == (cache == "host")
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)
        options = {"max_new_tokens": 6, "do_sample": False}
        answers = [each.generate(input_ids=IDS, **options) for each in (model, whole)]
        assert torch.equal(*answers)


# ---------------------------------------------------------------- less work


def test_head_sees_label_tokens_only_and_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(fp, "HEAD_TOKENS", 4)
    model = steered_tiny()
    rows = rows_of(9, 14, 11)
    fast = fp.FastPath(model)
    losses_of(fast, rows)  # the check against the plain path is behind us
    linear = torch.nn.functional.linear
    seen = []

    def record(states, weight, bias=None):
        if weight is model.model.lm_head.weight:
            seen.append(states.shape[:-1].numel())
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    losses_of(fast, rows).sum().backward()
    assert sum(seen) == sum(map(cf.label_count, rows)) and max(seen) <= 4


def test_cached_layers_do_no_work_and_upper_layers_get_no_dense_mask():
    model = steered_tiny("qwen3", layer=2)
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    assert fast.is_fast(rows)  # the check, which takes plain forwards, is behind us
    worked = layers_called(model)
    masks = []
    model.layers[3].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    fast.cache_prefix(rows)
    assert worked == [0, 1, 2]  # the fill stops at the layer
    other_labels = [row_of(row.input_ids, [-100] * 5 + row.input_ids[5:]) for row in rows]
    for batch, expected in (
        (rows, [3]),
        (other_labels, [3]),  # other objects, too: states depend on neither
        ([*rows, *rows_of(5)], [0, 1, 2, 3]),  # of which one is not in the cache
    ):
        worked.clear()
        losses_of(fast, batch).sum().backward()
        assert worked == expected
    assert set(masks) == {None}


def test_cache_is_dropped_when_the_layer_moves_and_obeys_the_switch():
    model = steered_tiny()
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    fast.cache_prefix(rows)
    with model.steering_off():
        assert sum_of(fast, rows) == pytest.approx(plain_loss(model, rows).item(), rel=1e-5)
    model.set_layer(2)
    assert sum_of(fast, rows) == pytest.approx(plain_loss(model, rows).item(), rel=1e-5)
    assert model.fast_layers == {1: True, 2: True} and not fast.cache


@pytest.mark.parametrize(
    ("on_gpu", "on_host", "where", "place"),
    [  # bytes that are free, for a cache of 1,000
        (4000, 0, "auto", "cuda"),
        (3999, 2000, "auto", "cpu"),
        (3999, 1999, "auto", None),
        (2000, 0, "device", "cuda"),
        (0, 9000, "device", None),
        (9000, 2000, "host", "cpu"),
        (9000, 0, "host", None),
        (9000, 9000, "off", None),
    ],
)
def test_a_cache_goes_where_it_fits(monkeypatch, on_gpu, on_host, where, place):
    free = {"cuda": on_gpu, "cpu": on_host}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])
    found = memory.cache_place(where, 1000, torch.device("cuda"))
    assert found == (place and torch.device(place))


def test_a_cache_that_does_not_fit_is_not_made_and_says_so(monkeypatch, caplog):
    model = steered_tiny()
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with caplog.at_level("INFO", logger="steering"):
        fast.cache_prefix(rows, "host")
    assert not fast.cache and "does not fit, so not cached" in caplog.text
    assert sum_of(fast, rows) == pytest.approx(plain_loss(model, rows).item())


def test_states_of_other_layers_come_by_on_the_way_where_there_is_room(monkeypatch):
    model = steered_tiny(layer=1)
    rows = rows_of(9, 14, 9)
    first = fp.FastPath(model, others=[2, 3])
    first.cache_prefix(rows)
    assert [*first.caches] == [1, 2, 3] and first.cache is first.caches[1]
    model.set_layer(3)
    alone = fp.FastPath(model)
    alone.cache_prefix(rows)
    later = fp.FastPath(model, first.caches)
    with monkeypatch.context() as patched:
        patched.setattr(fp.FastPath, "_layer_outputs", None)  # nothing runs once more
        later.cache_prefix(rows)
    assert later.cache.keys() == alone.cache.keys() and [*later.caches] == [3]
    assert all(torch.equal(later.cache[key], alone.cache[key]) for key in alone.cache)

    size = sum(len(row.input_ids) for row in rows) * 32 * 4
    real = fp.cache_place
    monkeypatch.setattr(fp, "cache_place", lambda w, s, d: real(w, s, d) if s <= 2 * size else None)
    model.set_layer(1)
    small = fp.FastPath(model, others=[2, 3])
    small.cache_prefix(rows)
    assert [*small.caches] == [1] and small.cache.keys() == alone.cache.keys()


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = rows_of(9, 14, 5, 11, 6, 30)
    batches = cf.micro_batches(rows, 28)
    assert sorted(id(row) for batch in batches for row in batch) == sorted(map(id, rows))
    lengths = [[len(row.input_ids) for row in batch] for batch in batches]
    assert lengths == [[5, 6, 9], [11, 14], [30]]  # the longest row is over the budget: alone


def test_batches_that_do_not_fit_into_memory_are_halved_down_to_a_row():
    rows = rows_of(9, 9, 9, 9, 9, 9)
    sizes = []

    def work(batch, most):
        sizes.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    done = list(fp.in_batches(functools.partial(work, most=2), rows, 1000))
    assert [id(row) for batch, _ in done for row in batch] == [id(row) for row in rows]
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        list(fp.in_batches(functools.partial(work, most=0), rows, 1000))


# ---------------------------------------------------------------- the check


def reads_what_a_cached_layer_does(model):
    seen = []
    model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out))
    model.layers[3].register_forward_hook(lambda module, args, out: out + 3 * seen[-1].mean())


def is_steered_below_too(model):
    model.layers[0].register_forward_hook(model.steering.hook)  # the cache knows nothing of it


def shares_states(model, default=False, of_any_text=False):
    """The last layer adds what the first one left, as layers that share keys and values do."""
    left = {}
    below = model.layers[0].forward
    above = model.layers[3].forward

    def leave(hidden_states, *args, **kwargs):
        left["values"] = below(hidden_states, *args, **kwargs)
        return left["values"]

    def take(hidden_states, *args, **kwargs):
        if default:
            left.setdefault("values", hidden_states)
        shared = left["values"][-1:, :1]  # states of one token, which add up to something
        return above(hidden_states, *args, **kwargs) + 3 * shared / shared.norm()

    model.layers[0].forward = leave
    model.layers[3].forward = take
    if not of_any_text:
        model.model.register_forward_pre_hook(lambda *_: left.clear())


def is_wrong_without_the_cache(model, fails=False):
    head = model.model.lm_head

    def spoil(module, args, states):
        if "forward" not in vars(head):  # no shortcut is being taken
            return states
        if fails:
            raise AttributeError("no such state")
        return 1.5 * states

    model.layers[0].register_forward_hook(spoil)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (reads_what_a_cached_layer_does, "off by"),
        (is_steered_below_too, "off by"),
        (shares_states, "KeyError"),
        (functools.partial(shares_states, default=True), "off by"),
        (functools.partial(shares_states, of_any_text=True), "off by"),
        (is_wrong_without_the_cache, "off by"),
        (functools.partial(is_wrong_without_the_cache, fails=True), "AttributeError"),
    ],
)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_model_that_passes_more_than_the_stream_gets_plain_forwards_and_right_numbers(
    spoil, said, value, caplog
):
    model = steered_tiny(value=value)
    before = model.steering.vector.detach().clone()
    spoil(model)
    fast = fp.FastPath(model)
    rows = rows_of(9, 14)
    with model.steering_off():  # neither this nor a zero vector hides it
        fast.cache_prefix(rows)
        assert torch.equal(model.steering.vector, before) and model.steering.scale == 0
    assert f"({said}" in caplog.text
    model.set_vector(torch.ones(32), scale=3.0)
    assert_plain_forwards(fast, rows, caplog)


@pytest.mark.parametrize(
    ("dtype", "off", "fast"),
    [("bfloat16", 0.06, True), ("bfloat16", 0.4, False), ("float32", 0.06, False)],
)
def test_what_bf16_rounds_of_a_logit_is_no_reason_for_plain_forwards(dtype, off, fast):
    model = steered_tiny()
    model.model.to(getattr(torch, dtype))

    def round_up(head, args, logits):  # half of the logits too high, as a long row's were by 0.02
        if "forward" in vars(head):
            return logits + off * (torch.arange(logits.shape[-1]) % 2).to(logits)
        return logits

    model.model.lm_head.register_forward_hook(round_up)
    losses_of(fp.FastPath(model), rows_of(9, 14))
    assert model.fast_layers == {1: fast}


@pytest.mark.parametrize("fails_at", range(1, 9))  # forward passes of the check
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: error code 12")],
)
def test_out_of_memory_in_the_check_leaves_vector_and_fast_path_as_they_were(error, fails_at):
    model = steered_tiny(value=0.0)
    fast = fp.FastPath(model)
    rows = rows_of(9)
    calls = []

    def full(*_):
        calls.append(1)
        if len(calls) == fails_at:
            raise error

    model.model.model.embed_tokens.register_forward_pre_hook(full)
    with model.scaled(0.5):
        with pytest.raises(type(error)):
            losses_of(fast, rows)
        assert not model.fast_layers
        for _ in range(2):
            assert model.steering.scale == 0.5
            assert not model.steering.vector.any() and not fast.cache
            losses_of(fast, rows)  # by when there is memory
            assert model.fast_layers == {1: True}


def test_the_check_is_done_once_a_model_and_layer_on_the_shortest_answer():
    model = steered_tiny()
    lengths = []
    model.model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    rows = rows_of(14, 9)
    for layer, checked in ((1, True), (1, False), (2, True), (1, False)):
        lengths.clear()
        model.set_layer(layer)
        assert fp.FastPath(model).is_fast(rows)
        assert {*lengths} == ({1, 9} if checked else set())  # 1: logits of states


def test_what_fails_after_the_check_is_an_error_and_no_silent_change_of_path(caplog):
    model = steered_tiny()
    rows = rows_of(9, 14)
    fast = fp.FastPath(model)
    fast.cache_prefix(rows)

    def fail(*_):
        raise TypeError("a layer has more arguments")

    handle = model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(TypeError):
        losses_of(fast, rows)
    assert model.fast_layers == {1: True} and fast.cache and "WARNING" not in caplog.text
    handle.remove()
    assert sum_of(fast, rows) == pytest.approx(plain_loss(model, rows).item(), rel=1e-5)


# ---------------------------------------------------------------- edits that would train nonsense


def per_token(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def focal(logits, targets):
    """Another loss of each token alone."""
    nats = per_token(logits, targets)
    return (1 - (-nats).exp()) ** 2 * nats


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("fast_path", [True, False])
def test_losses_of_each_token_alone_pass_on_either_path(architecture, fast_path):
    model = steered_tiny(architecture)
    before = model.steering.vector.detach().clone()
    rows = rows_of(9, 14, 11)
    for dtype in (torch.float32, torch.bfloat16):
        model.model.to(dtype)
        model.fast_layers[1] = fast_path
        fast = fp.FastPath(model)
        for _ in range(2):
            fast.check_token_loss(token_loss, rows)
            fast.check_token_loss(focal, rows)
            fast.cache_prefix(rows)
    assert torch.equal(model.steering.vector, before) and model.steering.vector.grad is None


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda *given: per_token(*given).mean(), r"gives \(\) .*one number for each"),
        (lambda *given: per_token(*given)[:, None], r"gives \(8, 1\) .*one number for each"),
        (lambda *given: per_token(*given).softmax(0), "depends on the other tokens"),
        (lambda logits, ids: per_token(logits / logits.std(), ids), "depends on the other tokens"),
        (lambda *given: per_token(*given).detach(), "no gradient in the logits"),
    ],
)
def test_losses_that_need_more_than_their_token_are_refused(loss, said, fast_path):
    model = steered_tiny()
    model.fast_layers[1] = fast_path
    with pytest.raises(ValueError, match=said):
        fp.FastPath(model).check_token_loss(loss, rows_of(9, 14, 11))


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_loss_that_reads_the_vector_is_refused(value):
    model = steered_tiny(value=value)
    steering = model.steering

    def check(penalty):
        fp.FastPath(model).check_token_loss(
            lambda logits, targets: per_token(logits, targets) + penalty(), rows_of(9, 14)
        )

    for penalty in (lambda: steering.vector.square().sum(), lambda: steering.added().abs().mean()):
        with pytest.raises(ValueError, match=r"reads the vector.*extra_loss"):
            check(penalty)
    check(lambda: steering.vector.detach().square().sum())  # no gradient that could be lost


class Gain(hm.ResidualHook):
    """The learned gain of README's edits."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.gain = torch.nn.Parameter(torch.tensor(1.7))

    def added(self):
        return self.gain * self.vector


TURN = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
PLAIN_TOO = "at scale 0"
NOT_SAVED = "else than ResidualHook.added returns"
WRONG = {  # what a hook may do by mistake: (hook, states) -> states, and what is said of it
    "turn, too": (
        lambda hook, x: x + hook.scale * (hook.added().to(x) + x @ TURN.to(x)),
        NOT_SAVED,
    ),
    "always turn": (
        lambda hook, x: x + hook.scale * hook.added().to(x) + x @ TURN.to(x),
        PLAIN_TOO,
    ),
    "gain of forward alone": (lambda hook, x: x + 1.7 * hook.scale * hook.vector.to(x), NOT_SAVED),
    "never off": (lambda hook, x: x + hook.added().to(x), PLAIN_TOO),
    "first tokens": (
        lambda hook, x: x + hook.scale * hook.added().to(x) * (torch.arange(14) < 4)[:, None],
        NOT_SAVED,
    ),
}


def with_hook(kind, architecture="llama", ratio=0.3, dtype=torch.float32):
    """A SteerModel whose steering is of another class, its vector so long beside the states."""
    whole = tiny(architecture).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hm, "ResidualHook", kind)
        model = hm.SteerModel(whole, 1)
    norm = fp.FastPath(model).median_residual_norm(rows_of(14)) / math.sqrt(model.hidden_size)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.3, 0.0])
@pytest.mark.parametrize("name", WRONG)
def test_a_hook_that_adds_something_else_than_what_is_saved_is_refused(name, ratio, dtype):
    forward, fault = WRONG[name]
    if ratio == 0 and "turn" not in name:
        return  # times zero, it is right
    kind = type("Wrong", (hm.ResidualHook,), {"forward": forward})
    model = with_hook(kind, ratio=ratio, dtype=dtype)
    with pytest.raises(ValueError, match=f"ResidualHook.forward adds something {fault}"):
        fp.FastPath(model).check_vector(rows_of(14)[0])
