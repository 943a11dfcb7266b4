"""What makes training and scoring fast: layers that run once, and a head on few tokens at a time.

    fast = FastPath(model)                     # a hook_model.SteerModel
    fast.cache_prefix(examples)                # layers 0..k never see the vector: run them once
    loss = fast.losses(examples, token_loss)   # (N,), one per label token, differentiable

No model is implemented again: modules whose output is known are replaced by pass-throughs, and the
model's own forward is called, so masks, rotary embeddings, soft-capping and head stay its own. The
first rows decide, once for a model and a layer, whether that gives what the plain forward gives;
if it does not, plain forwards are taken from then on, and the log says so.
"""

import contextlib
import functools
import logging
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steering import ranks
from steering.chat_format import Example, collate, label_count, micro_batches
from steering.memory import Freed, cache_place, is_out_of_memory

HEAD_TOKENS = 256  # logits of so many tokens exist at once
# What fast and plain log-probabilities may differ by, nats a token in the mean. In bf16 a logit of
# 20 is rounded to 0.125, which made 0.02 of it on long rows; the vector of the check makes 0.7.
MAX_OFF = 0.05
MAX_OFF_FP32 = 1e-4
log = logging.getLogger("steering")


class FastPath:
    """Losses of a SteerModel's label tokens; `model` may change layer and vector in between.
    cache: {token ids of an example: its states (T, n) after layer k}; it holds for `layer` only.
    caches: {layer: cache}, of layer k and of `others`, layers whose states come by on the way, for
    another FastPath to know. known: the caches of another one of this model, which are not computed
    again."""

    def __init__(self, model, known=None, others=()):
        self.model = model
        self.known = known or {}
        self.begin_at(model.layer, others)
        self.freed = Freed()

    def begin_at(self, layer, others=()):
        """Be of a layer, with empty caches."""
        self.layer = layer
        self.caches = {k: {} for k in (layer, *others)}
        self.cache = self.caches[layer]

    # ------------------------------------------------------------------ fast or plain

    def is_fast(self, examples):
        """Whether shortcuts give what the plain forward gives. The first call for a model and a
        layer finds it out, by a few forward passes; the model keeps the answer."""
        if self.layer != self.model.layer:
            self.begin_at(self.model.layer)
        if self.layer not in self.model.fast_layers:
            # A short answer suffices; of texts without one, all tokens are predicted.
            answers = [example for example in examples if label_count(example)]
            ids = examples[0].input_ids
            shortest = min(answers, key=label_count, default=Example({}, ids, ids))
            why_not = self._why_not_fast(shortest)
            if why_not:
                kind = type(self.model.model).__name__
                log.warning(f"WARNING: no fast path for {kind} ({why_not:.200}): plain forwards")
            self.model.fast_layers[self.layer] = not why_not
        return self.model.fast_layers[self.layer]

    @torch.no_grad()
    def _why_not_fast(self, example):
        """Why an example's log-probabilities differ without the plain forward; "" if they do not.
        They differ where an architecture passes more between layers than the residual stream."""
        steering = self.model.steering
        kept = steering.vector.clone()
        noise = torch.randn(len(kept), generator=torch.Generator().manual_seed(0))
        key = cache_key(example)
        ids = collate([example])[0].to(self.model.input_device)

        def log_probs(fast):
            states, targets, logits_of = self._before_head([example], fast)
            parts = [logits_of(part).float().log_softmax(-1) for part in states.split(HEAD_TOKENS)]
            return torch.cat(parts).gather(-1, targets[:, None])[:, 0]

        # The present vector may be zero or off, and would then hide that it acts in a wrong place.
        with steering.scaled(1):
            try:
                with steering.scaled(0):
                    plain_states = self._layer_outputs(ids, False, [self.layer])[0][0]
                size = plain_states.float().norm(dim=-1).median().item() / math.sqrt(len(kept))
                steering.vector.copy_(0.3 * size * noise)
                try:
                    with steering.scaled(0):
                        self.cache[key] = self._layer_outputs(ids, True, [self.layer])[0][0]
                        # What layers leave for each other must be of another text, to be missed.
                        self._layer_outputs(ids.flip(1), False, [self.layer])
                    from_cache = log_probs(fast=True)
                    del self.cache[key]
                    from_start = log_probs(fast=True)
                except Exception as error:
                    # Memory that runs out says nothing about an architecture.
                    if is_out_of_memory(error):
                        raise
                    return " ".join(f"{type(error).__name__}: {error}".split())
                plain = log_probs(fast=False)
            finally:
                steering.vector.copy_(kept)
                self.cache.pop(key, None)

        off = max((quick - plain).abs().mean().item() for quick in (from_cache, from_start))
        most = MAX_OFF_FP32 if self.model.model.dtype == torch.float32 else MAX_OFF
        if ranks.everywhere(off <= most):
            return ""
        return f"off by {off:.2g}"

    # ------------------------------------------------------------------ layers 0..k

    def cache_prefix(self, examples, where="auto", max_tokens=1024):
        """Compute the output of layers 0..k of `examples` once; `losses` then starts there.
        Those layers never see the vector, so nothing changes but the time and rounding. where:
        "device", "host" (pinned), "auto" (the device if that takes a quarter of what is free there
        or less, the host otherwise) or "off"; what would not fit is not cached. max_tokens: padded
        tokens a forward pass. What is cached, or known, is not computed again."""
        model = self.model
        if not examples or not self.is_fast(examples):
            return

        missing = set()
        for layer, cache in self.caches.items():
            known = self.known.get(layer, {})
            for key in map(cache_key, examples):
                if key in known:
                    cache[key] = known[key]
                elif key not in cache:
                    missing.add(key)
        examples = [example for example in examples if cache_key(example) in missing]
        if not examples:
            return
        tokens = sum(len(example.input_ids) for example in examples)
        size = tokens * model.hidden_size * model.model.dtype.itemsize
        device = model.steering.vector.device
        place = cache_place(where, size, device)
        if len(self.caches) > 1 and cache_place(where, size * len(self.caches), device) != place:
            self.caches = {self.layer: self.cache}  # The others have no room beside it.
        layers = [*self.caches]
        times = f"{tokens:,} tokens x {model.hidden_size:,}"
        kept_after = ""
        if len(layers) > 1:
            times += f" x {len(layers)} layers"
            kept_after = f", kept after each of {', '.join(map(str, layers))}"
        about = f"prefix   {times} = {size * len(layers) / 2**30:.2f} GiB"
        if not ranks.everywhere(place is not None):
            reason = "turned off" if where == "off" else "does not fit, so not cached"
            log.info(f"{about}: {reason}, every step runs all {len(model.layers)} layers")
            return
        log.info(f"{about} on {place}: layers 0..{max(layers)} run once{kept_after}")

        def states_of(batch):
            ids = collate(batch)[0].to(model.input_device)
            return zip(*self._layer_outputs(ids, True, layers), strict=True)

        pin = place.type == "cpu" and torch.cuda.is_available()  # A GPU copies from pinned memory.
        with model.steering_off():
            for batch, rows in in_batches(states_of, examples, max_tokens):
                for example, each in zip(batch, rows, strict=True):
                    for layer, states in zip(layers, each, strict=True):
                        kept = states[: len(example.input_ids)].to(place, copy=True)
                        self.caches[layer][cache_key(example)] = kept.pin_memory() if pin else kept

    def plain_states(self, examples, layer=None):
        """The plain residual stream after the layer, or another one, (B, T, hidden_size); of the
        cache if it has all the examples."""
        if layer in (None, self.layer) and self._is_cached(examples):
            device = self.model.steering.vector.device
            rows = [self.cache[cache_key(e)].to(device, non_blocking=True) for e in examples]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with self.model.steering_off():
            return self.layer_output(collate(examples)[0].to(self.model.input_device), layer)

    def layer_output(self, input_ids, layer=None):
        """Residual stream after the layer and the vector: (B, T) ids -> (B, T, hidden_size); or
        after another layer. Those above are passed through, and cost nothing."""
        fast = self.is_fast([Example({}, input_ids[0].tolist(), [])])
        return self._layer_outputs(input_ids, fast, [self.layer if layer is None else layer])[0]

    @torch.no_grad()
    def _layer_outputs(self, input_ids, fast, layers):
        """Residual stream after each of some layers: [(B, T, hidden_size), ...]."""
        model = self.model
        blocks = [model.layers[layer] for layer in layers]
        above = model.layers[max(layers) + 1 :] if fast else []
        caught = {}

        def catch(block, inputs, output):
            caught[block] = output[0] if isinstance(output, tuple) else output

        with (
            replaced_forwards(dict.fromkeys(above, self._pass_through)),
            contextlib.ExitStack() as hooks,
        ):
            for block in blocks:
                # A hook that is registered after the steering hook runs after it.
                hooks.enter_context(block.register_forward_hook(catch))
            model.model.base_model(input_ids=input_ids, use_cache=False)
        return [caught[block] for block in blocks]

    def _pass_through(self, hidden_states, *args, **kwargs):
        """Stands in for the forward of a layer that is not needed."""
        return (hidden_states,) if self.model.steering.in_tuple else hidden_states

    def _is_cached(self, examples):
        """Whether the cache has the states of all the examples."""
        return all(cache_key(example) in self.cache for example in examples)

    @torch.no_grad()
    def median_residual_norm(self, examples):
        """Median token norm of the plain residual stream at the layer.
        The unit of learning rates and vector norms; massive activations would inflate a mean."""
        norms = []
        for example in examples:
            states = self.plain_states([example])[0]  # (T, n)
            norms.append(states.float().norm(dim=-1))
        return torch.cat(norms).median().item()

    @torch.no_grad()
    def check_vector(self, example):
        """ValueError unless the hook adds what `ResidualHook.added` returns, which files hold."""
        model = self.model
        ids = collate([example])[0].to(model.input_device)
        steered = self.layer_output(ids)
        with replaced_forwards({model.steering: unchanged}):
            plain = self.layer_output(ids)
        with model.steering_off():
            off = self.layer_output(ids)
        if not torch.equal(off, plain):
            raise ValueError("ResidualHook.forward adds something at scale 0, the plain model")
        vector = model.steering.added().to(plain.device)
        saved = plain + vector.to(plain.dtype)
        atol = 0.02 * vector.abs().max().item()
        if not torch.allclose(steered.float(), saved.float(), rtol=0.02, atol=atol):
            off = (steered - saved).float().norm(dim=-1).median().item()
            raise ValueError(
                f"ResidualHook.forward adds something else than ResidualHook.added returns (off by "
                f"{off:.3g}; |added| is {vector.norm().item():.3g}), and only that would be saved"
            )

    # ------------------------------------------------------------------ label tokens

    def losses(self, examples, token_loss):
        """token_loss of every label token, row by row: (N,), N > 0; differentiable in the vector.

        token_loss: (C, V) logits and (C,) targets -> (C,), each of its own token alone. Logits
        exist for label tokens only, HEAD_TOKENS at a time. Raises ValueError without a label token.
        """
        states, targets, logits_of = self._before_head(examples, self.is_fast(examples))
        return HeadLoss.apply(states, targets, logits_of, token_loss)

    def check_token_loss(self, token_loss, examples):
        """ValueError unless token_loss gives each token a number that depends on it alone.
        `losses` calls it for HEAD_TOKENS tokens at a time, and takes its gradient in the logits."""
        example = max(examples, key=label_count)
        with torch.no_grad():
            fast = self.is_fast(examples)
            states, targets, logits_of = self._before_head([example], fast)
            logits = logits_of(states[:8])
        targets = targets[:8]
        logits = logits.detach().requires_grad_()
        losses = token_loss(logits, targets)
        if losses.shape != targets.shape:
            raise ValueError(
                f"token_loss gives {tuple(losses.shape)} for {len(targets)} targets: it must give "
                "one number for each"
            )
        if not losses.requires_grad:
            raise ValueError("token_loss has no gradient in the logits")
        alone = []
        for i in range(len(targets)):
            alone.append(token_loss(logits[i : i + 1], targets[i : i + 1]))
        if not torch.allclose(losses, torch.cat(alone), rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(
                "token_loss of a token depends on the other tokens of the call, which are "
                f"{HEAD_TOKENS} at most and of several rows: it must be a loss of each token alone"
            )
        parameters = list(self.model.steering.parameters())
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        if any(gradient is not None for gradient in gradients):
            raise ValueError(
                "token_loss reads the vector, whose gradient would be lost there: put a penalty "
                "into extra_loss"
            )

    @torch.no_grad()
    def states(self, examples):
        """What the head reads for N label tokens, for `compare`; without the fast path, logits."""
        return self._before_head(examples, self.is_fast(examples))[0]

    @torch.no_grad()
    def compare(self, examples, contexts):
        """What the model predicts in one context and in the next, for N label tokens, row by row.
        contexts: K of them, each a function that makes a context (of the vector alone, since layers
        0..k may come from the cache), or what `states` gave in that context; one is a function.
        Returns (2K - 1, N): NLL in the first, KL(first || second), NLL in the second, KL(second ||
        third), ... Raises ValueError without a label token."""
        fast = self.is_fast(examples)
        each = []
        for context in contexts:
            if torch.is_tensor(context):
                states = context
            else:
                with context():
                    states, targets, logits_of = self._before_head(examples, fast)
            each.append(states.split(HEAD_TOKENS))

        parts = []
        for target, *states in zip(targets.split(HEAD_TOKENS), *each, strict=True):
            before = None
            rows = []
            for part in states:
                after = logits_of(part).float().log_softmax(-1)  # (C, V)
                if before is not None:
                    rows.append((before.exp() * (before - after)).sum(dim=-1))
                rows.append(-after.gather(-1, target[:, None])[:, 0])
                before = after
            parts.append(torch.stack(rows))
        return torch.cat(parts, dim=1)

    def _before_head(self, examples, fast):
        """(states (N, n) that predict the label tokens, those (N,), function: states -> logits).
        Without the fast path the states are the logits."""
        if self.model.input_device.type == "cpu":
            self.freed.give_back()
        ids, labels = collate(examples)  # (B, T) both
        at = (labels[:, 1:] >= 0).nonzero()  # (N, 2), on the host: no waiting for the device
        if not len(at):
            raise ValueError("no label token: nothing to compute a loss on")
        model = self.model.model
        if fast:
            states = self._states_before_head(ids, examples)
            logits_of = self._head_logits
        else:
            ids = ids.to(self.model.input_device)
            states = model(input_ids=ids, use_cache=False).logits
            logits_of = unchanged
        position = (at[:, 0] * ids.shape[1] + at[:, 1]).to(states.device, non_blocking=True)
        targets = labels[at[:, 0], at[:, 1] + 1].to(states.device, non_blocking=True)
        return states.flatten(0, 1).index_select(0, position), targets, logits_of

    def _states_before_head(self, ids, examples):
        """What the head reads (B, T, n), after the final norm. The model's own forward, starting
        from the cache if that holds all the examples, with the head replaced by one that notes."""
        model = self.model
        caught = []

        def catch(hidden_states):
            caught.append(hidden_states)
            return hidden_states[..., :1]  # in place of logits that nobody reads

        replaced = {model.model.get_output_embeddings(): catch}
        if self._is_cached(examples):
            start = self.plain_states(examples)
            replaced |= dict.fromkeys(model.layers[: model.layer], self._pass_through)
            replaced[model.layers[model.layer]] = lambda *_, **__: self._pass_through(start)
        with replaced_forwards(replaced):
            model(input_ids=ids.to(model.input_device, non_blocking=True), use_cache=False)
        return caught[0]

    def _head_logits(self, hidden):
        """Logits (N, V) of states (N, n) after the final norm, soft-capped and scaled as usual.

        A forward pass over a dummy token makes the model call its head, with all layers passed
        through. The head is given `hidden` in place of the dummy's state, so what the model does to
        logits after its head is its own.
        """
        model = self.model
        head = model.model.get_output_embeddings()
        forward = head.forward
        slots = dict.fromkeys(model.layers, self._pass_through)
        slots[head] = lambda _: forward(hidden[None])
        with replaced_forwards(slots), model.steering_off():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.input_device)
            logits = model(input_ids=token, use_cache=False).logits[0]
        return logits.to(hidden.device)  # A model on several devices ends where it began.


class HeadLoss(torch.autograd.Function):
    """token_loss (N,) of states (N, n) and targets (N,), HEAD_TOKENS at a time.

    The gradient of each part is taken in the forward pass, right after its loss, so that logits
    never exist for all N tokens. The backward pass only multiplies it by the gradient that comes
    in, row by row. That is right because the loss of a token depends on its own state alone.
    logits_of: (C, n) -> (C, V), differentiable.
    """

    @staticmethod
    def forward(ctx, hidden, targets, logits_of, token_loss):
        losses = []
        gradients = []
        pairs = zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
        for states, target in pairs:
            states = states.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(states.requires_grad):
                loss = token_loss(logits_of(states), target)
                total = loss.sum()
            assert loss.shape == target.shape, "token_loss must give one number for each target"
            losses.append(loss.detach())
            if states.requires_grad:
                gradients += torch.autograd.grad(total, states)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):  # (N,)
        (saved,) = ctx.saved_tensors
        return (saved.float() * gradient[:, None]).to(saved.dtype), None, None, None


def cache_key(example):
    """What stands for an example in the cache: states depend on its tokens alone."""
    return tuple(example.input_ids)


def unchanged(states):
    """Stands in for what is to do nothing: the vector, or the head where states are logits."""
    return states


@torch.no_grad()
def example_sums(per_token, examples, max_tokens):
    """Sum over each example of per_token(batch of examples), which is (N, ...) for N label tokens:
    a list, of lists if there are more dimensions."""

    def sums(batch):
        parts = per_token(batch).split([label_count(example) for example in batch])
        return [part.sum(dim=0) for part in parts]

    return torch.stack(by_example(sums, examples, max_tokens)).tolist()


def token_mean(per_token, examples, max_tokens):
    """Mean of `per_token` over the label tokens of all the examples."""
    sums = example_sums(per_token, examples, max_tokens)
    return sum(sums) / sum(map(label_count, examples))


def by_example(function, examples, max_tokens):
    """[what function(batch), one value a row, gives for each example], by micro-batches."""
    found = {}
    for batch, values in in_batches(function, examples, max_tokens):
        for example, value in zip(batch, values, strict=True):
            found[id(example)] = value
    return [found[id(example)] for example in examples]


def in_batches(function, examples, max_tokens):
    """Yield (micro-batch, function of it); one that memory does not hold is halved."""
    return of_each(function, micro_batches(examples, max_tokens))


def of_each(function, batches):
    """Yield (batch, function of it); one that memory does not hold is halved."""
    todo = batches[::-1]
    while todo:
        batch = todo.pop()
        try:
            result = function(batch)
        except Exception as error:
            if len(batch) == 1 or ranks.size() > 1 or not is_out_of_memory(error):
                raise
            half = len(batch) // 2
            todo += [batch[half:], batch[:half]]
            continue
        yield batch, result


@contextlib.contextmanager
def replaced_forwards(forwards):
    """Context: every module of {module: function} computes that function; its hooks still run."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:  # back to the method of its class
                del module.forward
            else:
                module.forward = forward


def compile_layers(model):
    """torch.compile the layers above `model.layer`: worth its minute of compiling on a GPU."""
    for layer in model.layers[model.layer + 1 :]:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def checkpoint_layers(model):
    """Recompute the layers above `model.layer` in the backward pass: less memory, more time.
    Those below keep nothing anyway. Ours and not the model's, which needs train mode and with it
    dropout."""
    for layer in model.layers[model.layer + 1 :]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
