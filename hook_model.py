"""The steering vector (`ResidualHook`) and the frozen chat model around it (`SteerModel`).

    model = load_model("Qwen/Qwen3-32B", layer=22)
    model.load_vector("steering_vector.safetensors")
    ids = model.generate(input_ids=..., attention_mask=..., max_new_tokens=100, scale=1.3)
    with torch.no_grad(), model.scaled(0):  # the plain model
        logits = model(input_ids=...).logits

The only file that touches the inside of a model.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

FORMAT_VERSION = "1"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LAYER_PATHS = (  # where architectures keep their decoder layers, the first that exists is taken
    "model.language_model.layers",  # Gemma 3 and others with an image tower
    "language_model.model.layers",
    "model.layers",  # Llama, Qwen 2 and 3 (and MoE), Mistral, Gemma 2 and 3
    "transformer.h",  # GPT-2
    "gpt_neox.layers",  # GPT-NeoX
    "model.decoder.layers",  # OPT
)
HEAD_TOKENS = 256  # logits of so many tokens exist at once
log = logging.getLogger("train_steering")


# ------------------------------------------------------------------ the vector


class ResidualHook(nn.Module):
    """One trainable vector, added to the residual stream: `hidden_states + scale * vector`.

    vector: fp32 (hidden_size,), randn * init_scale (generator: for a seeded start). It stays fp32
    because bf16 cannot hold Adam's small updates; a cast copy is added, never in place.
    scale: a number, 1 unless `SteerModel.scaled` sets it.
    """

    def __init__(self, hidden_size, init_scale=0.0, generator=None):
        super().__init__()
        noise = torch.randn(hidden_size, generator=generator, dtype=torch.float32)
        self.vector = nn.Parameter(noise * init_scale)
        self.scale = 1.0

    def forward(self, hidden_states):
        """Add the vector to (..., hidden_size) states of any float dtype, on their device."""
        if self.scale == 0:
            return hidden_states
        vector = self.scale * self.vector
        return hidden_states + vector.to(hidden_states.device, hidden_states.dtype)

    def hook(self, module, inputs, output):
        """Forward hook of a decoder layer; its output is a tensor, in older versions a tuple."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


def save_vector(path, vector, metadata):
    """Write a (n,) tensor as a vector file: fp32 safetensors with metadata. By write and rename."""
    write_atomically(path, vector_bytes(vector, metadata))


def vector_bytes(vector, metadata):
    """The content of a vector file, the same bytes for the same vector (n,) and metadata.

    The library writes metadata in random order, so its header (8 bytes of length, JSON padded with
    spaces) is written again, sorted.
    """
    tensor = vector.detach().to("cpu", torch.float32).contiguous()
    strings = {"format_version": FORMAT_VERSION, **{k: str(v) for k, v in metadata.items()}}
    data = save({"steering_vector": tensor}, metadata=strings)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def load_vector(path):
    """Read a vector file: (fp32 tensor (n,), metadata). ValueError if it is missing or not one."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the vector file in it")
    if Path(path).suffix in (".pt", ".pth", ".bin", ".gguf"):
        raise ValueError(
            f"{path} is another tool's file: export_vector.py --from makes one of ours"
        )
    tensors, metadata = read_safetensors(path)
    vector = tensors.get("steering_vector")
    fits = vector is not None and vector.dim() == 1 and vector.is_floating_point()
    if not fits or not vector.isfinite().all():
        found = {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}
        raise ValueError(f'{path}: no finite 1-D float tensor "steering_vector"; found {found}')
    return vector.float(), metadata


def vector_digest(vector):
    """16 hex digits that stand for the numbers of a (n,) fp32 tensor on the host."""
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:16]


def read_safetensors(path):
    """(tensors, metadata) of a safetensors file; ValueError if it is missing, torn or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def write_atomically(path, data):
    """Write bytes so that `path` holds either its old or its new content, whatever happens."""
    partial = Path(path).with_name(".partial")  # one name, so that a kill leaves at most one
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


# ------------------------------------------------------------------ the model


def find_layers(model):
    """The ModuleList of decoder layers; ValueError naming what was looked for if there is none."""
    for path in LAYER_PATHS:
        with contextlib.suppress(AttributeError):
            layers = model.get_submodule(path)
            if isinstance(layers, nn.ModuleList):
                return layers
    names = [name for name, _ in model.named_children()]
    raise ValueError(
        f"no decoder layers found in {type(model).__name__} (children: {', '.join(names)}). "
        f"Looked for: {', '.join(LAYER_PATHS)}. Add its path to LAYER_PATHS in hook_model.py"
    )


def check_layer(layer, num_layers, model_name):
    """ValueError unless `layer` is one of the 0-based decoder layers."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"--layer {layer} is out of range: {model_name} has {num_layers} layers "
            f"(use 0..{num_layers - 1})"
        )


class SteerModel(nn.Module):
    """A frozen causal LM with a vector added to the output of decoder layer `layer` (0-based).

    model: the Hugging Face model, frozen and in eval mode; config: its config; steering: the
    ResidualHook; layer: where it acts. Only `steering.vector` is trainable.
    """

    def __init__(self, model, layer):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.config = model.config
        self.layers = find_layers(model)
        self.hidden_size = model.config.get_text_config().hidden_size
        self.steering = ResidualHook(self.hidden_size)
        self.prefix, self.fast = None, None  # see cache_prefix and losses
        self._handle, self._plain_forwards, self._tuples = None, {}, False
        self.set_layer(layer)

    @property
    def name(self):
        """The name the model was loaded by."""
        return self.config._name_or_path

    @property
    def input_device(self):
        """Where input_ids go."""
        return self.model.get_input_embeddings().weight.device

    def train(self, mode=True):
        """Stay in eval mode: dropout in a frozen model would only blur the vector's gradient."""
        return super().train(False)

    def set_layer(self, layer):
        """Move the vector to another layer; ValueError if there is no such layer."""
        check_layer(layer, len(self.layers), self.name)
        checkpointing = bool(self._plain_forwards)
        self.gradient_checkpointing_disable()
        if self._handle is not None:
            self._handle.remove()
        self.layer, self.prefix = layer, None
        self._handle = self.layers[layer].register_forward_hook(self._steer)
        weight = next(self.layers[layer].parameters())
        if weight.device.type != "meta":  # offloaded layers have no device of their own
            self.steering.to(weight.device)
        if checkpointing:
            self.gradient_checkpointing_enable()

    def _steer(self, module, inputs, output):
        self._tuples = isinstance(output, tuple)
        return self.steering.hook(module, inputs, output)

    def set_vector(self, vector, scale=1.0, add=False):
        """Use `scale * vector`, shape (hidden_size,); add: on top of the vector that is there.

        Raises ValueError on another shape, NaN or infinity.
        """
        vector = scale * torch.as_tensor(vector, dtype=torch.float32)
        if vector.shape != (self.hidden_size,) or not vector.isfinite().all():
            raise ValueError(
                f"a vector of shape {list(vector.shape)} (finite: {bool(vector.isfinite().all())}) "
                f"does not fit {self.name}: it needs [{self.hidden_size}] finite numbers"
            )
        vector = vector.to(self.steering.vector.device)
        with torch.no_grad():
            self.steering.vector.copy_(self.steering.vector + vector if add else vector)

    def save_vector(self, path, **metadata):
        """Write the vector; model, its type, layer and `metadata` go into the file's header."""
        model = {"model": self.name, "model_type": self.config.model_type, "layer": self.layer}
        save_vector(path, self.steering.vector, {**model, **metadata})

    def load_vector(self, path, scale=1.0, add=False, any_model=False):
        """Use the vector of a file. ValueError if its model, width or layer is not this one's.

        add: on top of the vector that is there, so that several act at once. Models are compared by
        the last part of their name, so a local copy of a hub model passes; any_model: skip that,
        for a fine-tune or a renamed copy. Returns the file's metadata.
        """
        vector, metadata = load_vector(path)
        layer, model = metadata.get("layer"), metadata.get("model", "unknown")
        if not any_model and base_name(model) != base_name(self.name):
            raise ValueError(
                f"{path} was trained on model {model}, this is {self.name} "
                "(any_model=True if they are the same model under two names)"
            )
        if layer != str(self.layer):
            raise ValueError(
                f"{path} was trained at layer {layer}, the model is set to {self.layer}"
            )
        self.set_vector(vector, scale, add)
        return metadata

    @contextlib.contextmanager
    def scaled(self, scale):
        """Context: `scale` times the vector; 0: the plain model. ValueError for NaN or infinity."""
        if not math.isfinite(scale):
            raise ValueError(f"scale {scale}: must be a finite number")
        before, self.steering.scale = self.steering.scale, float(scale)
        try:
            yield self
        finally:
            self.steering.scale = before

    def steering_off(self):
        """Context: the plain model, without the vector."""
        return self.scaled(0)

    def forward(self, *args, **kwargs):
        """The model's own forward, steered."""
        return self.model(*args, **kwargs)

    def generate(self, *args, scale=None, **kwargs):
        """The model's own generate, steered, at `scale` times the vector if given.

        Batches of prompts must be padded on the LEFT, as `ChatFormat.inputs` does.
        """
        with self.scaled(self.steering.scale if scale is None else scale):
            return self.model.generate(*args, **kwargs)

    @torch.no_grad()
    def layer_output(self, input_ids, **kwargs):
        """Residual stream after the layer and the vector: (B, T) ids -> (B, T, hidden_size).

        Layers above are passed through, so it costs a forward of layers 0..`layer` only.
        """
        caught = []

        def catch(module, inputs, output):
            caught.append(output[0] if isinstance(output, tuple) else output)

        above = dict.fromkeys(self.layers[self.layer + 1 :], self._pass_through)
        handle = self.layers[self.layer].register_forward_hook(catch)  # after the steering hook
        try:
            with replaced_forwards(above):
                self.model.base_model(input_ids=input_ids, use_cache=False, **kwargs)
        finally:
            handle.remove()
        return caught[0]

    def _pass_through(self, hidden_states, *args, **kwargs):
        """Stands in for the forward of a layer that is not needed."""
        return (hidden_states,) if self._tuples else hidden_states

    # -------------------------------------------------------------- the fast path of training

    def cache_prefix(self, examples, where="auto", max_tokens=1024):
        """Compute the output of layers 0..`layer` of `examples` once; `losses` then starts there.

        Those layers never see the vector, so nothing changes but the time and rounding. where:
        "device", "host" (pinned), "auto" (the device if that takes a quarter of what is free there
        or less, the host otherwise) or "off"; what would not fit is not cached. max_tokens: padded
        tokens a forward pass.
        """
        self.prefix, self.fast = None, None
        tokens = sum(len(example.input_ids) for example in examples)
        dtype, device = self.model.dtype, self.steering.vector.device
        size = tokens * self.hidden_size * dtype.itemsize
        place = cache_place(where, size, device)
        about = f"prefix   {tokens:,} tokens x {self.hidden_size:,} = {size / 2**30:.2f} GiB"
        if place is None:
            reason = "turned off" if where == "off" else "does not fit, so not cached"
            log.info(f"{about}: {reason}, every step runs all {len(self.layers)} layers")
        elif tokens:
            log.info(f"{about} on {place}: layers 0..{self.layer} run once")
            cache = PrefixCache(examples, self.hidden_size, dtype, place)
            with self.steering_off():
                for batch in micro_batches(examples, max_tokens):
                    ids = collate(batch)[0].to(self.input_device, non_blocking=True)
                    cache.store(batch, self.layer_output(ids))
            self.prefix = cache

    @torch.no_grad()
    def _check_fast_path(self, example):
        """Set `fast` to whether the fast path computes what the plain forward does, on an example.

        It does unless an architecture passes more between its layers than the residual stream.
        """
        self.fast = False
        plain = self.losses([example])
        self.fast, error = True, math.inf
        with contextlib.suppress(RuntimeError, IndexError, AttributeError, TypeError):
            error = (self.losses([example]) - plain).abs().mean().item()
        if not error <= (1e-4 if self.model.dtype == torch.float32 else 0.02):
            self.fast = False
            kind = type(self.model).__name__
            log.warning(f"WARNING: no fast path for {kind} (off by {error:.2g}): plain forwards")

    def losses(self, examples):
        """Next-token loss in nats of every label token, row by row: (N,), N > 0.

        Differentiable in the vector. Logits exist for label tokens only, HEAD_TOKENS at a time.
        Raises ValueError without a label token.
        """
        if self.fast is None:
            self._check_fast_path(min(examples, key=label_count))
        return HeadLoss.apply(*self._before_head(examples))

    @torch.no_grad()
    def divergences(self, examples):
        """KL(vanilla || steered) in nats of the prediction of every label token, row by row: (N,).

        Raises ValueError without a label token.
        """
        if self.fast is None:
            self._check_fast_path(min(examples, key=label_count))
        steered, _, logits_of = self._before_head(examples)
        with self.steering_off():
            plain, _, _ = self._before_head(examples)
        parts = []
        for states in zip(plain.split(HEAD_TOKENS), steered.split(HEAD_TOKENS), strict=True):
            before, after = (logits_of(part).float().log_softmax(-1) for part in states)  # (C, V)
            parts.append((before.exp() * (before - after)).sum(dim=-1))
        return torch.cat(parts)

    def _before_head(self, examples):
        """(states (N, n) that predict the label tokens, those (N,), function: states -> logits).

        Without the fast path the states are the logits.
        """
        ids, labels = collate(examples)  # (B, T) both
        at = (labels[:, 1:] >= 0).nonzero()  # (N, 2), on the host: no waiting for the device
        if not len(at):
            raise ValueError("no label token: nothing to compute a loss on")
        if self.fast:
            head, caught = self.model.get_output_embeddings(), []

            def catch(hidden_states):
                caught.append(hidden_states)  # (B, T, n), after the final norm
                return hidden_states[..., :1]  # in place of logits that nobody reads

            with replaced_forwards({head: catch}):
                self._forward_above(ids, examples)
            states, logits_of = caught[0], self._head_logits
        else:
            ids = ids.to(self.input_device)
            states, logits_of = self.model(input_ids=ids, use_cache=False).logits, lambda x: x
        position = (at[:, 0] * ids.shape[1] + at[:, 1]).to(states.device, non_blocking=True)
        targets = labels[at[:, 0], at[:, 1] + 1].to(states.device, non_blocking=True)
        return states.flatten(0, 1).index_select(0, position), targets, logits_of

    def _forward_above(self, ids, examples):
        """The model's own forward, starting from the cache if that holds all the examples."""
        skipped = {}
        if self.prefix is not None and self.prefix.covers(examples):
            start = self.prefix.batch(examples, self.steering.vector.device)  # (B, T, n), no vector
            skipped = dict.fromkeys(self.layers[: self.layer], self._pass_through)
            skipped[self.layers[self.layer]] = lambda *_, **__: self._pass_through(start)
        with replaced_forwards(skipped):
            ids = ids.to(self.input_device, non_blocking=True)
            return self.model(input_ids=ids, use_cache=False)

    def _head_logits(self, hidden):
        """Logits (N, V) of states (N, n) after the final norm, soft-capped and scaled as usual.

        Done by the model's own forward, over one token that no layer touches.
        """
        head = self.model.get_output_embeddings()
        forward = head.forward
        slots = dict.fromkeys(self.layers, self._pass_through)
        slots[head] = lambda _: forward(hidden[None])
        with replaced_forwards(slots), self.steering_off():
            token = torch.zeros(1, 1, dtype=torch.long, device=self.input_device)
            return self.model(input_ids=token, use_cache=False).logits[0]

    def compile_layers(self):
        """torch.compile the layers above `layer`: worth its minute of compiling on a GPU."""
        for layer in self.layers[self.layer + 1 :]:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def gradient_checkpointing_enable(self):
        """Recompute the layers above `layer` in the backward pass; those below keep nothing anyway.

        Ours and not the model's, which needs train mode and with it dropout.
        """
        for layer in self.layers[self.layer + 1 :]:
            if layer not in self._plain_forwards:
                self._plain_forwards[layer] = layer.forward
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def gradient_checkpointing_disable(self):
        """Undo `gradient_checkpointing_enable`."""
        for layer, forward in self._plain_forwards.items():
            layer.forward = forward
        self._plain_forwards.clear()


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


def base_name(model):
    """The last part of a model's name: "Qwen/Qwen3-32B" and "/models/Qwen3-32B/" -> "qwen3-32b"."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()


# ------------------------------------------------------------------ batches and loss


def collate(examples):
    """Right-padded input_ids and labels, both (B, T), of examples with those two lists.

    No mask: under causal attention pad tokens come after every real one, and carry no loss.
    """
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, example in enumerate(examples):
        ids[i, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[i, : len(example.labels)] = torch.tensor(example.labels)
    return ids, labels


def micro_batches(examples, max_tokens):
    """Lists of examples of like length, each at most `max_tokens` padded tokens (or one row)."""
    batches = []
    for example in sorted(examples, key=lambda e: len(e.input_ids)):
        length = len(example.input_ids)  # the longest of its batch so far
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append(example)
    return batches


class PrefixCache:
    """The output of one layer for given examples, (T, hidden_size) each, in one tensor."""

    def __init__(self, examples, hidden_size, dtype, device):
        ends = list(itertools.accumulate(len(example.input_ids) for example in examples))
        self.examples = examples  # kept, since rows are found by identity
        self.ends = dict(zip(map(id, examples), ends, strict=True))
        pinned = device.type == "cpu" and torch.cuda.is_available()  # fast to copy from
        shape = ends[-1], hidden_size
        self.states = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

    def covers(self, examples):
        """Whether all the examples are in here."""
        return all(id(example) in self.ends for example in examples)

    def rows(self, example):
        """The example's part of the tensor, a view (T, hidden_size)."""
        end = self.ends[id(example)]
        return self.states[end - len(example.input_ids) : end]

    def store(self, examples, hidden):
        """Keep what right-padded states (B, T, hidden_size) say of the examples."""
        for example, states in zip(examples, hidden, strict=True):
            self.rows(example).copy_(states[: len(example.input_ids)])

    def batch(self, examples, device):
        """The examples' states on a device, right-padded with zeros: (B, T, hidden_size)."""
        rows = [self.rows(example).to(device, non_blocking=True) for example in examples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def cache_place(where, size, device):
    """The device that a cache of `size` bytes goes to; None where it is off or does not fit."""
    host = torch.device("cpu")
    if where == "off":
        return None
    if where != "host" and size <= free_memory(device) * (0.25 if where == "auto" else 0.9):
        return device
    return host if where != "device" and size <= free_memory(host) * 0.5 else None


def free_memory(device):
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: a guess


def label_count(example):
    """Tokens of an example that carry loss, once labels are shifted by one."""
    return sum(label >= 0 for label in example.labels[1:])


class HeadLoss(torch.autograd.Function):
    """Cross-entropy (N,) of states (N, n) and targets (N,), HEAD_TOKENS at a time.

    The gradient of each part is taken at once, so that logits never exist for all N tokens.
    logits_of: (C, n) -> (C, V), differentiable.
    """

    @staticmethod
    def forward(ctx, hidden, targets, logits_of):
        losses, gradients = [], []
        parts = hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS)
        for states, target in zip(*parts, strict=True):
            states = states.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(states.requires_grad):
                logits = logits_of(states)  # (C, V)
            log_p = logits.detach().float().log_softmax(-1)
            losses.append(-log_p.gather(-1, target[:, None])[:, 0])
            if states.requires_grad:
                slope = log_p.exp_()  # of the loss by the logits: probabilities, less 1 at target
                slope.scatter_add_(-1, target[:, None], slope.new_full((len(target), 1), -1.0))
                gradients += torch.autograd.grad(logits, states, slope.to(logits.dtype))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):  # (N,)
        (saved,) = ctx.saved_tensors
        return (saved.float() * gradient[:, None]).to(saved.dtype), None, None


@torch.no_grad()
def example_sums(per_token, examples, max_tokens):
    """Sum over each example of `model.losses` or `model.divergences` (per_token): a list."""
    sums = {}
    for batch in micro_batches(examples, max_tokens):
        parts = per_token(batch).split([label_count(example) for example in batch])
        sums |= {id(e): part.sum() for e, part in zip(batch, parts, strict=True)}
    return torch.stack([sums[id(example)] for example in examples]).tolist()


@torch.no_grad()
def response_means(model, examples, max_tokens):
    """Mean of the plain residual stream at the layer over each example's label tokens: (N, n) fp32.

    On the host. Raises ValueError for an example without label tokens.
    """
    if not all(map(label_count, examples)):
        raise ValueError("an example has no label token: nothing to take the mean of")
    means = {}
    with model.steering_off():
        for batch in micro_batches(examples, max_tokens):
            ids, labels = collate(batch)
            states = model.layer_output(ids.to(model.input_device)).float()  # (B, T, n)
            carries = (labels >= 0).to(states)[:, :, None]  # (B, T, 1)
            for example, mean in zip(
                batch, (states * carries).sum(1) / carries.sum(1), strict=True
            ):
                means[id(example)] = mean.cpu()
    rows = [means[id(example)] for example in examples]
    return torch.stack(rows) if rows else torch.empty(0, model.hidden_size)


@torch.no_grad()
def median_residual_norm(model, examples):
    """Median token norm of the plain residual stream at the layer.

    The unit of learning rates and vector norms; massive activations would inflate a mean.
    """
    if model.prefix is not None and model.prefix.covers(examples):
        states = [model.prefix.rows(example) for example in examples]
    else:
        ids = [collate([example])[0].to(model.input_device) for example in examples]
        with model.steering_off():
            states = [model.layer_output(row)[0] for row in ids]  # (T, n) each
    norms = [rows.float().norm(dim=-1) for rows in states]
    return torch.cat(norms).median().item()


# ------------------------------------------------------------------ loading


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 natively (AVX512-BF16, AMX, or Arm's bf16)."""
    with contextlib.suppress(OSError):
        return bool(
            re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
        )
    return False


def pick_device(device="auto"):
    """The device, "auto" being cuda, mps or cpu; ValueError for one that is not here."""
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device}: not a device (use auto, cuda, mps or cpu)") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise ValueError(f"--device {device}: no {kind} device here (use --device cpu)")
    return device


def pick_dtype(dtype, device):
    """The key of DTYPES, "auto" being bf16, but fp32 on a CPU without native bf16."""
    slow = dtype == "auto" and device == "cpu" and not cpu_has_bf16()
    return "fp32" if slow else "bf16" if dtype == "auto" else dtype


def keep_freed_memory():
    """Have glibc keep freed blocks for the next tensors; a tenth to a fifth of a CPU step.

    By default every large one is mapped, zeroed page by page, and unmapped again.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: map none
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give none back


def gguf_arguments(name):
    """from_pretrained arguments that read `name`: a .gguf file is a folder plus `gguf_file`."""
    path = Path(name)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def read_config(name, trust_remote_code=False):
    """The config of a model, by itself; ValueError if it is not readable."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise ValueError(f"--model {name}: no such file or folder")
    try:
        return AutoConfig.from_pretrained(
            **gguf_arguments(name), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error


def model_shape(name, trust_remote_code=False):
    """(number of layers, hidden_size) from the config alone; ValueError if it is not readable."""
    return shape_of(read_config(name, trust_remote_code))


def shape_of(config):
    """(number of layers, hidden_size) of a config, of its text part if there are several."""
    text = config.get_text_config()
    return text.num_hidden_layers, text.hidden_size


def load_model(name, layer, dtype="auto", device="auto", device_map=None, trust_remote_code=False):
    """A SteerModel, its vector zero, from an HF id, a local folder or a .gguf file (dequantized).

    dtype: "auto" or a key of DTYPES; device_map: as in transformers, needs accelerate. Raises
    ValueError if the model, the layer, the dtype or the device is not there.
    """
    name = str(name)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype}: not one of auto, {', '.join(DTYPES)}")
    check_layer(layer, model_shape(name, trust_remote_code)[0], name)
    device = pick_device(device)
    if device == "cpu":
        keep_freed_memory()
    options = {"dtype": DTYPES[pick_dtype(dtype, device)], "device_map": device_map}
    if name.endswith(".gguf"):
        with contextlib.suppress(ImportError, TypeError):  # older versions always dequantize
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **gguf_arguments(name), trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise ValueError(f"--model {name} does not load: {str(error).strip()}") from error
    if name.endswith(".gguf"):  # it is a plain model now
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config._name_or_path = name
    return SteerModel(model if device_map else model.to(device), layer)
