"""Seconds a step at the exact shape of a Qwen3 model, with random weights: no download.

    python bench/bench_gpu.py                        # Qwen3-32B in bf16: 80 GB or more
    python bench/bench_gpu.py --shape qwen3-8b --compile
    python bench/bench_gpu.py --shape tiny --device cpu --rows 4 --length 64     # it runs

A step is --rows rows of --length tokens, two thirds of them with loss, in micro-batches: forward,
backward, Adam. The floor is what no implementation can avoid: the matrix products of the layers
above --layer (forward, and backward to the activations; weights are frozen) and of the head on
label tokens, at the rate of matrix products measured on this device in the same run.
"""

import argparse
import statistics
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

from hook_model import SteerModel
from steering.chat_format import label_count, micro_batches
from steering.fast_path import FastPath, checkpoint_layers, compile_layers
from steering.loading import DTYPES, pick_device
from steering.run_folder import peak_memory
from train_steering import token_loss

SHAPES = {  # (layers, hidden, intermediate, heads, key-value heads, vocabulary)
    "qwen3-32b": (64, 5120, 25600, 64, 8, 151_936),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151_936),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 151_936),
    "tiny": (4, 64, 128, 4, 2, 1000),
}
HEAD_DIM = 128  # of every Qwen3


def build(shape, layer, dtype, device):
    """A SteerModel of a shape with random weights, made on the device."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    config = transformers.Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab_size=vocabulary,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return SteerModel(model, layer)


def make_rows(count, length, vocabulary):
    """Random rows; the first third of each is prompt."""
    ids = torch.randint(3, vocabulary, (count, length)).tolist()
    prompt = length // 3
    return [
        types.SimpleNamespace(input_ids=row, labels=[-100] * prompt + row[prompt:]) for row in ids
    ]


def floor_flops(shape, layer, rows):
    """Floating point operations of a step that no implementation with a cache can avoid."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    projections = hidden * HEAD_DIM * (2 * heads + 2 * kv_heads) + 3 * hidden * intermediate
    flops = 0
    for row in rows:
        length = len(row.input_ids)
        attention = heads * HEAD_DIM * length  # two products over half of the T x T positions
        per_layer = 2 * (projections + attention) * length
        flops += 2 * (layers - 1 - layer) * per_layer  # forward, and backward to activations
        flops += 2 * 2 * hidden * vocabulary * label_count(row)
    return flops


def synchronize(device):
    """Wait for the device, so that clocks mean something."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(size, dtype, device):
    """Floating point operations a second of square matrix products of the model's dtype."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        times.append((time.perf_counter() - started) / 4)
    return 2 * size**3 / statistics.median(times[1:])


def time_steps(fast, rows, max_tokens, steps):
    """Median seconds of a whole optimizer step; the first, which warms up, is not counted."""
    vector, labels = fast.model.steering.vector, sum(map(label_count, rows))
    optimizer, times = torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.0), []
    for _ in range(steps + 1):
        synchronize(vector.device)
        started = time.perf_counter()
        for batch in micro_batches(rows, max_tokens):
            (fast.losses(batch, token_loss).sum() / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(vector.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main(argv=None):
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="qwen3-32b", choices=SHAPES, help="whose sizes")
    add("--layer", type=int, help="default: 22, or the middle of a smaller model")
    add("--rows", type=int, default=64, help="rows a step")
    add("--length", type=int, default=330, help="tokens a row")
    add("--micro-batch-tokens", type=int, nargs="+", default=[1024], help="each is measured")
    add("--steps", type=int, default=3, help="steps to take the median of")
    add("--dtype", default="bf16", choices=DTYPES, help="of the weights")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--compile", action="store_true", help="measure with compiled layers too")
    add("--gradient-checkpointing", action="store_true", help="less memory for more time")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    layers = SHAPES[args.shape][0]
    layer = args.layer if args.layer is not None else 22 if layers > 40 else layers // 2
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    print(f"{args.shape}, layer {layer} of {layers}, {args.dtype} on {name}, torch", end=" ")
    print(f"{torch.__version__}, transformers {transformers.__version__}, {time.strftime('%F')}")

    rate = matmul_rate(8192 if device.startswith("cuda") else 1024, args.dtype, device)
    model = build(args.shape, layer, args.dtype, device)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    fast, rows = FastPath(model), make_rows(args.rows, args.length, SHAPES[args.shape][-1])
    tokens = sum(len(row.input_ids) for row in rows)
    floor = floor_flops(args.shape, layer, rows) / rate
    print(
        f"matrix products {rate / 1e12:.2f} TFLOP/s, floor {floor:.3f} s a step, {tokens:,} tokens"
    )
    print(
        f"{'path':<10} {'micro':>6} {'s/step':>8} {'tok/s':>8} {'floor share':>11} {'peak GiB':>8}"
    )
    paths = ["full", "cached", *(["compiled"] if args.compile else [])]
    for path in paths:
        for max_tokens in args.micro_batch_tokens:
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            if path == "compiled":
                compile_layers(model)
            fast.cache_prefix(rows, "off" if path == "full" else "auto", max_tokens)
            seconds = time_steps(fast, rows, max_tokens, args.steps)
            print(f"{path:<10} {max_tokens:>6} {seconds:>8.3f} {tokens / seconds:>8,.0f} "
                  f"{floor / seconds:>11.1%} {peak_memory():>8.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
