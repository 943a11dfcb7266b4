"""What training takes, from the model's config alone: bytes, floating point operations, hours.

    plan = Plan(load_model("Qwen/Qwen3-32B", 22, device="fake"), token_loss)
    print(plan.step_bytes(1024), plan.step_flops(1024))

The training step itself runs, on torch's fake tensors, which have shapes and no content. So what is
counted is what this code would allocate and multiply, whatever the architecture.
"""

import logging
import types
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from steering.fast_path import FastPath, checkpoint_layers
from steering.memory import free_memory

ROW, PROMPT = 256, 48  # tokens of a row, and those of them without loss
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


def counted():
    """A FlopCounterMode that knows the attention of fake tensors, which are those of a CPU."""

    def forward(query, key, *_, out_shape=None, **__):  # two products of (T, D) and (D, T)
        batch, heads, length, width = query
        return 4 * batch * heads * length * key[2] * width

    def backward(_, query, key, *__, out_shape=None, **___):  # five of them
        return forward(query, key) * 5 // 2

    name = "_scaled_dot_product_flash_attention_for_cpu"
    operations = {name: forward, f"{name}_backward": backward}
    mapping = {getattr(torch.ops.aten, key): value for key, value in operations.items()}
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Plan:
    """What training a vector takes. model: a SteerModel, of fake weights (or real ones, to check);
    token_loss: that of train_steering.py."""

    def __init__(self, model, token_loss):
        self.model, self.token_loss = model, token_loss

    def fast_path(self):
        """A FastPath that is not checked: there are no numbers to compare."""
        fast = FastPath(self.model)
        fast.fast = True
        return fast

    def step(self, tokens):
        """A function: loss and gradient of a micro-batch of so many tokens, its prefix cached."""
        labels = [-100] * PROMPT + [0] * (ROW - PROMPT)
        row, fast = types.SimpleNamespace(input_ids=[0] * ROW, labels=labels), self.fast_path()
        fast.cache[id(row)] = (
            row,
            torch.zeros(ROW, self.model.hidden_size, dtype=self.model.model.dtype),
        )

        def step():
            fast.losses([row] * (tokens // ROW), self.token_loss).sum().backward()
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
        step = self.step(tokens)
        with counted() as counter:
            step()
        return counter.get_total_flops()

    def prefix_flops(self, tokens):
        """Floating point operations of layers 0..k for so many tokens."""
        ids = torch.zeros(tokens // ROW, ROW, dtype=torch.long)
        with counted() as counter, self.model.steering_off():
            self.fast_path().layer_output(ids)
        return counter.get_total_flops()

    def weight_bytes(self, quantize="none"):
        """Bytes of the model's parameters and buffers, those that are shared once."""
        model = self.model.model
        tensors = [*model.parameters(), *model.buffers()]
        each = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        head, bits = model.get_output_embeddings(), 8 * model.dtype.itemsize
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        saved = bits - {"none": bits, "4bit": 4.5, "8bit": 8}[quantize]  # NF4 has a scale for 64
        return sum(each.values()) - sum(m.weight.numel() for m in linear) * saved / 8

    def micro_batch(self, room):
        """(bytes of a step of TOKENS, tokens of the largest of SIZES whose step fits into `room`
        bytes, 0 if none does). Bytes grow linearly with tokens."""
        few, many = (self.step_bytes(tokens) for tokens in (TOKENS, 4 * TOKENS))
        slope = (many - few) / (3 * TOKENS)
        return few, max((n for n in SIZES if few + slope * (n - TOKENS) <= room), default=0)

    def tokens_now(self, device, checkpointing):
        """Tokens of the largest micro-batch that fits beside the weights that are there already."""
        if checkpointing:
            checkpoint_layers(self.model)
        tokens = self.micro_batch(0.9 * free_memory(device))[1]
        if not tokens:
            log.warning(f"WARNING: memory for {SIZES[0]} tokens is short, going on with them")
        return tokens or SIZES[0]

    def work(self, args, epochs):
        """Floating point operations of a dataset. args: options of train_steering.py."""
        prefix, step = self.prefix_flops(TOKENS), self.step_flops(TOKENS)
        passes = epochs if args.prefix_cache == "off" else min(epochs, 1)
        teacher = prefix + step / 2 if args.teacher else 0  # a forward pass, of shared prompts
        return (passes * prefix + epochs * step + teacher) * args.target_tokens / TOKENS

    def show(self, args, epochs, datasets):
        """Print it, for a device of args.plan_memory GiB and args.plan_tflops.
        args: options of train_steering.py; epochs: passes over the rows; datasets: how many."""
        model, budget = self.model, args.target_tokens
        weights, quantized = self.weight_bytes(args.quantize), args.quantize != "none"
        cache = budget * model.hidden_size * model.model.dtype.itemsize / GIB
        count = sum(p.numel() for p in model.model.parameters())
        dtype = str(model.model.dtype).removeprefix("torch.")
        print(f"model    {model.name}: {count:,} parameters, {dtype}, {len(model.layers)} layers")
        print(f"weights  {weights / GIB:.1f} GiB" + f", {args.quantize}" * quantized)
        print(f"cache    {cache:.2f} GiB of layers 0..{model.layer}, on the device or the host")
        work = self.work(args, epochs)
        room, fits = args.plan_memory * GIB - weights - RESERVE, []
        for option in ("", " --gradient-checkpointing"):
            if option:
                checkpoint_layers(model)
            need, tokens = self.micro_batch(room)
            print(f"step     {need / GIB:.2f} GiB for {TOKENS:,} tokens a forward pass{option}")
            fits += [f"--micro-batch-tokens {tokens}{option}"] if tokens else []
        none = (
            f"too small, {(weights + need + RESERVE) / GIB:.0f} GiB are needed for that: several "
        )
        none += "by --tensor-parallel or --device-map auto" + ", --quantize 4bit" * (not quantized)
        print(f"{args.plan_memory:g} GiB".ljust(8), ", or ".join(fits) or none)
        seconds = work / args.plan_tflops / 1e12
        print(
            f"compute  {work / 1e15:.3g} PFLOP for {budget:,} tokens, {epochs:.3g} epochs: "
            f"{seconds:.3g} s at {args.plan_tflops:g} TFLOP/s; {datasets} of them: "
            f"{datasets * seconds / 3600:.3g} h"
        )
