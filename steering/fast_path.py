"""What makes training and scoring fast: layers that run once, and a head on few tokens at a time.

    fast = FastPath(model)                     # a hook_model.SteerModel
    fast.cache_prefix(examples)                # layers 0..k never see the vector: run them once
    loss = fast.losses(examples, token_loss)   # (N,), one a label token, differentiable

No model is implemented again: modules whose output is known are replaced by pass-throughs, and the
model's own forward is called, so masks, rotary embeddings, soft-capping and head stay its own. A
model for which that is not the same takes the plain path, and the log says so.
"""

import contextlib
import functools
import logging
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from steering import ranks
from steering.chat_format import collate, label_count, micro_batches
from steering.memory import Freed, cache_place, is_out_of_memory

HEAD_TOKENS = 256  # logits of so many tokens exist at once
# What fast and plain log-probabilities may differ by, nats a token in the mean. In bf16 a logit of
# 20 is rounded to 0.125, which made 0.02 of it on long rows; the vector of the check makes 0.7.
MAX_OFF, MAX_OFF_FP32 = 0.05, 1e-4
log = logging.getLogger("steering")


class FastPath:
    """Losses of a SteerModel's label tokens; `model` may change layer and vector in between.
    cache: {id of an example: (the example, its states (T, n) after layer k)}; fast: whether the
    fast path does what the model does (None: not checked yet); both hold for `layer` only."""

    def __init__(self, model):
        self.model, self.layer, self.cache, self.fast = model, model.layer, {}, None
        self.freed = Freed()

    def cache_prefix(self, examples, where="auto", max_tokens=1024):
        """Compute the output of layers 0..k of `examples` once; `losses` then starts there.
        Those layers never see the vector, so nothing changes but the time and rounding. where:
        "device", "host" (pinned), "auto" (the device if that takes a quarter of what is free there
        or less, the host otherwise) or "off"; what would not fit is not cached. max_tokens: padded
        tokens a forward pass."""
        model, self.layer, self.cache, self.fast = self.model, self.model.layer, {}, None
        tokens = sum(len(example.input_ids) for example in examples)
        dtype, device = model.model.dtype, model.steering.vector.device
        size = tokens * model.hidden_size * dtype.itemsize
        place = cache_place(where, size, device)
        if not ranks.everywhere(place is not None):
            place = None
        about = f"prefix   {tokens:,} tokens x {model.hidden_size:,} = {size / 2**30:.2f} GiB"
        if place is None:
            reason = "turned off" if where == "off" else "does not fit, so not cached"
            log.info(f"{about}: {reason}, every step runs all {len(model.layers)} layers")
        elif tokens:
            log.info(f"{about} on {place}: layers 0..{self.layer} run once")
            pin = place.type == "cpu" and torch.cuda.is_available()  # fast to copy from

            def states_of(batch):
                return self.layer_output(collate(batch)[0].to(model.input_device))

            with model.steering_off():
                for batch, rows in in_batches(states_of, examples, max_tokens):
                    if self.fast is False:  # as layers could not be passed through
                        return
                    for example, states in zip(batch, rows, strict=True):
                        kept = states[: len(example.input_ids)].to(place, copy=True)
                        self.cache[id(example)] = example, kept.pin_memory() if pin else kept

    def _either(self, compute):
        """What compute() gives on the fast path; on the plain one if that fails, and from then on.
        An out-of-memory says nothing about a path: fewer rows at once are the way out."""
        if self.fast is not False:
            try:
                return compute()
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._give_up(error)
        return compute()

    def _give_up(self, why):
        """Take plain forwards from now on, and say so."""
        self.fast, self.cache, kind = False, {}, type(self.model.model).__name__
        reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
        reason = " ".join(reason.split())
        log.warning(f"WARNING: no fast path for {kind} ({reason:.200}): plain forwards")

    def layer_output(self, input_ids):
        """Residual stream after the layer and the vector: (B, T) ids -> (B, T, hidden_size).
        Layers above are passed through, so it costs a forward of layers 0..k only."""
        return self._either(lambda: self._layer_output(input_ids))

    @torch.no_grad()
    def _layer_output(self, input_ids):
        model, caught = self.model, []

        def catch(module, inputs, output):
            caught.append(output[0] if isinstance(output, tuple) else output)

        above = model.layers[model.layer + 1 :] if self.fast is not False else ()
        # A hook registered after the steering hook runs after it.
        handle = model.layers[model.layer].register_forward_hook(catch)
        try:
            with replaced_forwards(dict.fromkeys(above, self._pass_through)):
                model.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            handle.remove()
        return caught[0]

    @torch.no_grad()
    def median_residual_norm(self, examples):
        """Median token norm of the plain residual stream at the layer.
        The unit of learning rates and vector norms; massive activations would inflate a mean."""
        if self._covers(examples):
            states = [self.cache[id(example)][1] for example in examples]
        else:
            ids = [collate([example])[0].to(self.model.input_device) for example in examples]
            with self.model.steering_off():
                states = [self.layer_output(row)[0] for row in ids]  # (T, n) each
        norms = [rows.float().norm(dim=-1) for rows in states]
        return torch.cat(norms).median().item()

    def _covers(self, examples):
        """Whether all the examples are in the cache, and that is of the model's layer."""
        here = self.layer == self.model.layer
        return here and all(id(example) in self.cache for example in examples)

    def _pass_through(self, hidden_states, *args, **kwargs):
        """Stands in for the forward of a layer that is not needed."""
        return (hidden_states,) if self.model.steering.in_tuple else hidden_states

    def losses(self, examples, token_loss, known=None):
        """token_loss of every label token, row by row: (N,), N > 0; differentiable in the vector.

        token_loss: (C, V) logits and (C,) targets -> (C,), each of its own token alone. Logits
        exist for label tokens only, HEAD_TOKENS at a time. known: {id of an example: tensors whose
        first dimension are its label tokens}, which token_loss gets too, after the targets. Raises
        ValueError without a label token.
        """
        self._check_fast_path(examples)
        each = [known[id(example)] for example in examples] if known else ()

        def compute():
            states, targets, logits_of = self._before_head(examples)
            more = [torch.cat(rows).to(states.device) for rows in zip(*each, strict=True)]
            return HeadLoss.apply(states, logits_of, token_loss, targets, *more)

        return self._either(compute)

    @torch.no_grad()
    def predictions(self, examples, per_token):
        """What per_token makes of what is predicted for N label tokens, row by row: (N, ...).
        per_token: logits (C, V) and targets (C,) -> (C, ...)."""
        self._check_fast_path(examples)

        def compute():
            states, targets, logits_of = self._before_head(examples)
            parts = zip(states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
            return torch.cat([per_token(logits_of(part), target) for part, target in parts])

        return self._either(compute)

    def divergences(self, examples):
        """KL(vanilla || steered) in nats of the prediction of every label token, row by row: (N,).
        Raises ValueError without a label token."""
        return self.compare(examples, [self.model.steering_off, contextlib.nullcontext])[1]

    @torch.no_grad()
    def states(self, examples):
        """What the head reads for N label tokens, for `compare`; without the fast path, logits."""
        self._check_fast_path(examples)
        return self._either(lambda: self._before_head(examples))[0]

    @torch.no_grad()
    def compare(self, examples, contexts):
        """What the model predicts in one context and in the next, for N label tokens, row by row.
        contexts: K functions that make one, which must leave what the cache holds as it is, or what
        `states` gave in it. (2K - 1, N): NLL in the first, KL(first || second), NLL in the second,
        ... Raises ValueError without a label token."""
        self._check_fast_path(examples)
        return self._either(lambda: self._compare(examples, contexts))

    def _compare(self, examples, contexts):
        each, parts = [], []
        for context in contexts:
            states = context
            if not torch.is_tensor(context):
                with context():
                    states, targets, logits_of = self._before_head(examples)
            each.append(states.split(HEAD_TOKENS))
        for target, *states in zip(targets.split(HEAD_TOKENS), *each, strict=True):
            before, rows = None, []
            for part in states:
                after = logits_of(part).float().log_softmax(-1)  # (C, V)
                if before is not None:
                    rows.append((before.exp() * (before - after)).sum(dim=-1))
                rows.append(-after.gather(-1, target[:, None])[:, 0])
                before = after
            parts.append(torch.stack(rows))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def _check_fast_path(self, examples):
        """Set `fast` to whether the fast path computes what the plain forward does, on an example.
        It does unless an architecture passes more between its layers than the residual stream."""
        if self.layer != self.model.layer:
            self.layer, self.cache, self.fast = self.model.layer, {}, None
        if self.fast is not None:
            return
        example, steering = min(examples, key=label_count), self.model.steering
        kept, noise = steering.vector.clone(), torch.Generator().manual_seed(0)

        def log_probs():
            states, targets, logits_of = self._before_head([example])
            parts = [logits_of(part).float().log_softmax(-1) for part in states.split(HEAD_TOKENS)]
            return torch.cat(parts).gather(-1, targets[:, None])[:, 0]

        with steering.scaled(1):  # with a vector that shows: the present one may be zero or off
            size = self.median_residual_norm([example]) / math.sqrt(len(kept))
            try:
                steering.vector.copy_(0.3 * size * torch.randn(len(kept), generator=noise))
                quick = self._either(log_probs)
                if self.fast is None:
                    self.fast = False
                    plain = log_probs()
                    self.fast = True
                    off = (quick - plain).abs().mean().item()
                    fp32 = self.model.model.dtype == torch.float32
                    if not ranks.everywhere(off <= (MAX_OFF_FP32 if fp32 else MAX_OFF)):
                        self._give_up(f"off by {off:.2g}")
            except Exception:  # out of memory: to be checked again
                self.fast = None
                raise
            finally:
                steering.vector.copy_(kept)

    def _before_head(self, examples):
        """(states (N, n) that predict the label tokens, those (N,), function: states -> logits).
        Without the fast path the states are the logits."""
        if self.model.input_device.type == "cpu":
            self.freed.give_back()
        ids, labels = collate(examples)  # (B, T) both
        at = (labels[:, 1:] >= 0).nonzero()  # (N, 2), on the host: no waiting for the device
        if not len(at):
            raise ValueError("no label token: nothing to compute a loss on")
        model = self.model.model
        if self.fast is not False:
            head, caught = model.get_output_embeddings(), []

            def catch(hidden_states):
                caught.append(hidden_states)  # (B, T, n), after the final norm
                return hidden_states[..., :1]  # in place of logits that nobody reads

            with replaced_forwards({head: catch}):
                self._forward_above(ids, examples)
            states, logits_of = caught[0], self._head_logits
        else:
            ids = ids.to(self.model.input_device)
            states, logits_of = model(input_ids=ids, use_cache=False).logits, lambda x: x
        position = (at[:, 0] * ids.shape[1] + at[:, 1]).to(states.device, non_blocking=True)
        targets = labels[at[:, 0], at[:, 1] + 1].to(states.device, non_blocking=True)
        return states.flatten(0, 1).index_select(0, position), targets, logits_of

    def _forward_above(self, ids, examples):
        """The model's own forward, starting from the cache if that holds all the examples."""
        model, skipped = self.model, {}
        if self._covers(examples):
            rows = [self.cache[id(example)][1] for example in examples]
            rows = [row.to(model.steering.vector.device, non_blocking=True) for row in rows]
            start = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T, n), without vector
            skipped = dict.fromkeys(model.layers[: model.layer], self._pass_through)
            skipped[model.layers[model.layer]] = lambda *_, **__: self._pass_through(start)
        with replaced_forwards(skipped):
            ids = ids.to(model.input_device, non_blocking=True)
            return model(input_ids=ids, use_cache=False)

    def _head_logits(self, hidden):
        """Logits (N, V) of states (N, n) after the final norm, soft-capped and scaled as usual.
        Done by the model's own forward, over one token that no layer touches."""
        model = self.model
        head = model.model.get_output_embeddings()
        forward = head.forward
        slots = dict.fromkeys(model.layers, self._pass_through)
        slots[head] = lambda _: forward(hidden[None])
        with replaced_forwards(slots), model.steering_off():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.input_device)
            logits = model(input_ids=token, use_cache=False).logits[0]
            return logits.to(hidden.device)  # of a model on several devices: where it began


class HeadLoss(torch.autograd.Function):
    """token_loss (N,) of states (N, n) and what is known of each (N, ...), HEAD_TOKENS at a time.
    The gradient of each part is taken at once, so that logits never exist for all N tokens.
    logits_of: (C, n) -> (C, V), differentiable."""

    @staticmethod
    def forward(ctx, hidden, logits_of, token_loss, *known):
        losses, gradients, ctx.known = [], [], len(known)
        for states, *targets in zip(*(x.split(HEAD_TOKENS) for x in (hidden, *known)), strict=True):
            states = states.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(states.requires_grad):
                loss = token_loss(logits_of(states), *targets)
                total = loss.sum()
            assert loss.shape == states.shape[:1], "token_loss must give one number for each target"
            losses.append(loss.detach())
            if states.requires_grad:
                gradients += torch.autograd.grad(total, states)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):  # (N,)
        (saved,) = ctx.saved_tensors
        product = (saved.float() * gradient[:, None]).to(saved.dtype)
        return product, None, None, *[None] * ctx.known


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
        found |= {id(e): value for e, value in zip(batch, values, strict=True)}
    return [found[id(example)] for example in examples]


def in_batches(function, examples, max_tokens):
    """Yield (micro-batch, function of it); one that memory does not hold is halved."""
    todo = micro_batches(examples, max_tokens)[::-1]
    while todo:
        batch = todo.pop()
        try:
            result = function(batch)
        except Exception as error:
            if len(batch) == 1 or ranks.size() > 1 or not is_out_of_memory(error):
                raise
            todo += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
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
