"""What training takes, from the model's config alone: bytes, floating point operations, hours.

    plan = Plan(load_model("Qwen/Qwen3-32B", 22, device="fake"), token_loss)
    print(plan.step_bytes(1024), plan.step_flops(1024))

The training step itself runs, on torch's fake tensors, which have shapes and no content. So what is
counted is what this code would allocate and multiply, whatever the architecture.
"""

import logging
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from steering.chat_format import Example
from steering.fast_path import FastPath, cache_key, checkpoint_layers
from steering.memory import free_memory

ROW = 256  # tokens of a row
PROMPT = 48  # those of them without loss
TOKENS = 1024  # of a forward pass, by default
SIZES = [ROW * 2**i for i in range(7)]  # of micro-batches: 256 to 16,384 tokens
GIB = 2**30
RESERVE = 2 * GIB  # of a device, for what is not tensors, and gaps between them
log = logging.getLogger("steering")


class LiveBytes(TorchDispatchMode):
    """Context: bytes of the storages that operations inside of it make, until they are freed.
    peak: the most at once; known: tensors that were there before."""

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key, size):
        self.known.discard(key)
        self.now -= size


def flops_of(work, *arguments):
    """Floating point operations of work(*arguments) on fake tensors, whose attention is a CPU's."""

    def forward(query, key, *_, out_shape=None, **__):  # two products of (T, D) and (D, T)
        batch, heads, length, width = query
        return 4 * batch * heads * length * key[2] * width

    def backward(_, query, key, *__, out_shape=None, **___):  # five of them
        return forward(query, key) * 5 // 2

    name = "_scaled_dot_product_flash_attention_for_cpu"
    operations = {name: forward, f"{name}_backward": backward}
    mapping = {getattr(torch.ops.aten, key): value for key, value in operations.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work(*arguments)
    return counter.get_total_flops()


class Plan:
    """What training a vector takes. model: a SteerModel, of fake weights (or real ones, to check);
    token_loss: that of train_steering.py."""

    def __init__(self, model, token_loss):
        self.model = model
        self.token_loss = token_loss
        model.fast_layers[model.layer] = True  # There are no numbers to check it by.

    def forward(self, tokens):
        """A function: loss of a micro-batch of so many tokens, its prefix cached."""
        row = Example({}, [0] * ROW, [-100] * PROMPT + [0] * (ROW - PROMPT))
        fast = FastPath(self.model)
        states = torch.zeros(ROW, self.model.hidden_size, dtype=self.model.model.dtype)
        fast.cache[cache_key(row)] = states

        return lambda: fast.losses([row] * (tokens // ROW), self.token_loss).sum()

    def step(self, tokens):
        """A function: loss and gradient of a micro-batch of so many tokens."""
        forward = self.forward(tokens)

        def step():
            forward().backward()
            self.model.steering.vector.grad = None

        return step

    def step_bytes(self, tokens):
        """The most bytes that a step of so many tokens holds at once, beyond weights and cache."""
        step = self.step(tokens)
        with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as live:
            step()
        return live.peak

    def step_flops(self, tokens):
        """Floating point operations of a step of so many tokens.
        Counted apart from bytes, since the counter keeps alive what checkpointing frees."""
        return flops_of(self.step(tokens))

    @torch.no_grad()
    def upper_flops(self, tokens):
        """Floating point operations of the layers above k and the head for so many tokens, without
        a gradient."""
        return flops_of(self.forward(tokens))

    def prefix_flops(self, tokens):
        """Floating point operations of layers 0..k for so many tokens."""
        ids = torch.zeros(tokens // ROW, ROW, dtype=torch.long)
        with self.model.steering_off():
            return flops_of(FastPath(self.model).layer_output, ids)

    def weight_bytes(self, quantize="none"):
        """Bytes of the model's parameters and buffers, those that are shared once."""
        model = self.model.model
        storages = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        total = sum(storages.values())
        if quantize == "none":
            return total
        head = model.get_output_embeddings()
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                saved_bits = 8 * model.dtype.itemsize - 4.5  # NF4 has a scale for 64 numbers.
                total -= module.weight.numel() * saved_bits / 8
        return total

    def micro_batch(self, room):
        """(bytes of a step of TOKENS, tokens of the largest of SIZES whose step fits into `room`
        bytes, 0 if none does). Bytes grow linearly with tokens."""
        few = self.step_bytes(TOKENS)
        slope = (self.step_bytes(4 * TOKENS) - few) / (3 * TOKENS)
        fitting = [tokens for tokens in SIZES if few + slope * (tokens - TOKENS) <= room]
        return few, max(fitting, default=0)

    def tokens_now(self, device, checkpointing):
        """Tokens of the largest micro-batch that fits beside the weights that are there already."""
        if checkpointing:
            checkpoint_layers(self.model)
        tokens = self.micro_batch(0.9 * free_memory(device))[1]
        if not tokens:
            log.warning(f"WARNING: memory for {SIZES[0]} tokens is short, going on with them")
        return tokens or SIZES[0]

    def dataset_flops(self, args, epochs):
        """Floating point operations of a dataset. args: options of train_steering.py."""
        prefixes = epochs if args.prefix_cache == "off" else min(epochs, 1)
        each = prefixes * self.prefix_flops(TOKENS) + epochs * self.step_flops(TOKENS)
        return each * args.target_tokens / TOKENS

    def show(self, args, epochs, datasets):
        """Print it, for a device of args.plan_memory GiB and args.plan_tflops.
        args: options of train_steering.py; epochs: passes over the rows; datasets: how many."""
        model = self.model
        weights = self.weight_bytes(args.quantize)
        cache = args.target_tokens * model.hidden_size * model.model.dtype.itemsize / GIB
        parameters = sum(p.numel() for p in model.model.parameters())
        dtype = str(model.model.dtype).removeprefix("torch.")
        bits = "" if args.quantize == "none" else f", {args.quantize}"
        layers = len(model.layers)
        print(f"model    {model.name}: {parameters:,} parameters, {dtype}, {layers} layers")
        print(f"weights  {weights / GIB:.1f} GiB{bits}")
        print(f"cache    {cache:.2f} GiB of layers 0..{model.layer}, on the device or the host")

        flops = self.dataset_flops(args, epochs)  # before checkpointing adds to them
        room = args.plan_memory * GIB - weights - RESERVE
        fitting = []
        for option in ("", " --gradient-checkpointing"):
            if option:
                checkpoint_layers(model)
            need, tokens = self.micro_batch(room)
            print(f"step     {need / GIB:.2f} GiB for {TOKENS:,} tokens a forward pass{option}")
            if tokens:
                fitting.append(f"--micro-batch-tokens {tokens}{option}")
        words = ", or ".join(fitting)
        if not fitting:
            words = f"too small, {(weights + need + RESERVE) / GIB:.0f} GiB are needed for that: "
            words += "several by --tensor-parallel or --device-map auto"
            if not bits:
                words += ", --quantize 4bit"
        print(f"{f'{args.plan_memory:g} GiB':<8} {words}")

        seconds = flops / args.plan_tflops / 1e12
        print(
            f"compute  {flops / 1e15:.3g} PFLOP for {args.target_tokens:,} tokens, {epochs:.3g} "
            f"epochs: {seconds:.3g} s at {args.plan_tflops:g} TFLOP/s; {datasets} of them: "
            f"{datasets * seconds / 3600:.3g} h"
        )
