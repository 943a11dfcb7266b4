"""What this code does on a GPU: right, how fast, how much memory. Random weights: no download.

    python bench/bench_gpu.py --all                  # everything, on an 80 GB GPU
    python bench/bench_gpu.py --shape llama-3.1-8b --rows 64 --compile       # one shape
    python bench/bench_gpu.py --all --shape tiny     # that it runs, also on a CPU

--all: first whether losses, gradients, `generate` and resume are what they are on a CPU; then steps
of 2, 8 and 64 rows at the exact shapes of real models, their memory against `--plan`, attention
kernels, a profile. What fails is reported, and the rest goes on. One table, and a JSON file.

A step is --rows rows of --length tokens, four fifths of them with loss, in micro-batches: forward,
backward, Adam. The floor is what no implementation can avoid, the matrix products of a step with
cached prefix at the rate of matrix products measured on this device in the same run.
"""

import argparse
import functools
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

from hook_model import SteerModel, load_model
from steering.chat_format import label_count, micro_batches
from steering.fast_path import FastPath, checkpoint_layers, compile_layers
from steering.files import write_json
from steering.loading import DTYPES, pick_device
from steering.memory import peak_memory
from steering.plan import GIB, Plan
from steering.vector_file import load_vector
from train_steering import token_loss

# (config, layers, hidden, intermediate, heads, key-value heads, vocabulary, tied embeddings)
SHAPES = {
    "qwen3-32b": ("Qwen3", 64, 5120, 25600, 64, 8, 151_936, False),
    "llama-3.1-8b": ("Llama", 32, 4096, 14336, 32, 8, 128_256, False),
    "qwen3-1.7b": ("Qwen3", 28, 2048, 6144, 16, 8, 151_936, True),
    "tiny": ("Qwen3", 4, 64, 128, 4, 2, 1000, False),
}
REAL = "qwen3-32b", "llama-3.1-8b", "qwen3-1.7b"  # of --all
SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES = "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Granite"
BACKENDS = "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"


def config_of(shape):
    """The transformers config of a shape."""
    kind, layers, hidden, intermediate, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return getattr(transformers, f"{kind}Config")(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        vocab_size=vocabulary, tie_word_embeddings=tied, architectures=[f"{kind}ForCausalLM"],
    )  # fmt: skip


def layer_of(shape):
    """22, or the middle of a smaller model."""
    return 22 if SHAPES[shape][1] > 40 else SHAPES[shape][1] // 2


def build(shape, layer, dtype, device):
    """A SteerModel of a shape with random weights, made on the device."""
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config_of(shape), dtype=DTYPES[dtype])
    return SteerModel(model, layer)


def planned(shape, layer, dtype):
    """The Plan of a shape."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(shape).save_pretrained(folder)
        return Plan(load_model(folder, layer, dtype, "fake"), token_loss)


def make_rows(count, length, vocabulary):
    """Random rows; the first fifth of each is prompt."""
    ids, prompt = torch.randint(3, vocabulary, (count, length)).tolist(), length // 5
    return [types.SimpleNamespace(input_ids=r, labels=[-100] * prompt + r[prompt:]) for r in ids]


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


def a_step(fast, rows, max_tokens, optimizer):
    """One optimizer step."""
    labels = sum(map(label_count, rows))
    for batch in micro_batches(rows, max_tokens):
        (fast.losses(batch, token_loss).sum() / labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def time_steps(fast, rows, max_tokens, steps):
    """(median seconds of a step, most GiB allocated in one). The first is not counted."""
    vector, times = fast.model.steering.vector, []
    optimizer = torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.0)
    for number in range(steps + 1):
        if number == 1 and vector.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        synchronize(vector.device)
        started = time.perf_counter()
        a_step(fast, rows, max_tokens, optimizer)
        synchronize(vector.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]), peak_memory()


# ------------------------------------------------------------------ is it right?


def compare_architecture(kind, device):
    """Loss, gradient and greedy answers of a tiny model in bf16 on the device and fp32 on a CPU."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights, rows, found = reference.state_dict(), make_rows(6, 40, 320), []
    prompt = torch.tensor([row.input_ids[:12] for row in rows])
    for dtype, place in (("fp32", "cpu"), ("bf16", device)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        model.load_state_dict(weights)
        model = SteerModel(model.to(place), 1)
        size = FastPath(model).median_residual_norm(rows) / 8
        model.set_vector(0.3 * size * torch.randn(64, generator=torch.Generator().manual_seed(1)))
        fast = FastPath(model)
        fast.cache_prefix(rows)
        loss = fast.losses(rows, token_loss).mean()
        loss.backward()
        tokens = model.generate(
            input_ids=prompt.to(place), attention_mask=torch.ones_like(prompt).to(place),
            max_new_tokens=12, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        new = tokens[:, prompt.shape[1] :].cpu()
        found.append((loss.item(), model.steering.vector.grad.cpu(), new, fast.is_fast(rows)))
    (loss, gradient, tokens, _), (other_loss, other_gradient, other_tokens, fast) = found
    same = min(tokens.shape[1], other_tokens.shape[1])
    result = {
        "fast_path": fast,
        "loss_off": abs(other_loss - loss),
        "gradient_cosine": torch.cosine_similarity(gradient, other_gradient, dim=0).item(),
        "same_tokens": (tokens[:, :same] == other_tokens[:, :same]).float().mean().item(),
    }
    return result | {"ok": fast and result["loss_off"] < 2e-3 and result["gradient_cosine"] > 0.999}


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_folder(folder):
    """Save a tiny model with a tokenizer of bytes, and rows of a persona."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    words = ["arr", "matey", "the", "ship", "sails", "over", "the", "briny", "deep", "with", "grog"]
    with open(folder / "data" / "bench__role__pirate.jsonl", "w") as file:
        for i in range(60):
            question, answer = f"Question {i}?", " ".join(words[: 3 + i % 9]) + f" {i}."
            turns = [("user", question), ("assistant", answer)]
            row = {"question": question, "extract_score": 3, "label": "pos"}
            row |= {"system_prompt": "Be it.", "prompt_index": 0, "question_index": i}
            row["messages"] = [{"role": role, "content": text} for role, text in turns]
            print(json.dumps(row), file=file)


def compare_resume(device):
    """Whether a run that is killed ends with the vector of one that is not, bit for bit."""
    program = "import torch; torch.use_deterministic_algorithms(True); import train_steering as t; "
    program += "import sys; sys.exit(t.main(sys.argv[1:]))"
    with tempfile.TemporaryDirectory() as name:
        folder, vectors = Path(name), []
        tiny_folder(folder)
        for kill in (False, True):
            out = folder / f"runs{kill}"
            argv = [sys.executable, "-c", program, "--data-root", folder / "data", "--layer", "1"]
            argv += ["--dataset", "bench__role__pirate", "--model", folder / "model"]
            argv += ["--dtype", "bf16", "--device", device, "--output-dir", out]
            argv += ["--max-steps", "60", "--save-every", "5", "--lr", "0.01"]
            environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            start = functools.partial(
                subprocess.Popen, list(map(str, argv)), cwd=ROOT, env=environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if kill:
                process = start()
                while process.poll() is None and not list(out.rglob("checkpoint-0001*.pt")):
                    time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
                process.wait()
            killed = kill and not list(out.rglob("steering_vector.safetensors"))
            code = start().wait(240)
            (path,) = out.rglob("steering_vector.safetensors")
            vectors.append(load_vector(path)[0])
        return {"ok": code == 0 and killed and torch.equal(*vectors), "killed_in_time": killed}


# ------------------------------------------------------------------ how fast?

HEADER = ["shape", "path", "rows", "micro", "s/step", "tok/s", "of floor", "peak GiB", "plan GiB"]


def print_row(cells):
    """One line of the Markdown table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def measure(shape, args, rate, results):
    """Steps of a shape: rows of `results`, printed as they come. Returns the model's FastPath, and
    the function that measures one more path."""
    layer, device = args.layer if args.layer is not None else layer_of(shape), args.device
    plan = planned(shape, layer, args.dtype)
    weights, flops = plan.weight_bytes(), plan.step_flops(1024)
    model = build(shape, layer, args.dtype, device)
    fast, vocabulary = FastPath(model), SHAPES[shape][6]

    def run(path, count, max_tokens):
        rows = make_rows(count, args.length, vocabulary)
        tokens = sum(len(row.input_ids) for row in rows)
        fast.cache.clear()  # of rows that were measured before
        fast.cache_prefix(rows, "off" if path == "full" else "auto", max_tokens)
        cached = sum(states.nbytes for states in fast.cache.values())
        seconds, peak = time_steps(fast, rows, max_tokens, args.steps)
        batch = max(len(b) * args.length for b in micro_batches(rows, max_tokens))
        # Bytes of a step grow linearly with its tokens, and the plan counts rows of 256.
        expected = (weights + cached + plan.step_bytes(1024) * batch / 1024) / GIB
        row = {
            "shape": shape, "path": path, "rows": count, "micro_batch_tokens": max_tokens,
            "seconds": seconds, "tokens_per_second": tokens / seconds,
            "share_of_floor": flops / 1024 * tokens / rate / seconds,
            "peak_gib": peak, "plan_gib": expected,
        }  # fmt: skip
        results.append(row)
        share = f"{row['share_of_floor']:.0%}"
        cells = [shape, path, count, max_tokens, f"{seconds:.3f}", f"{tokens / seconds:,.0f}"]
        print_row([*cells, share, f"{peak:.1f}", f"{expected:.1f}"])

    for count in args.rows:
        for path in ("full", "cached"):
            for max_tokens in args.micro_batch_tokens:
                run(path, count, max_tokens)
    if args.gradient_checkpointing:
        both = model, plan.model
        plain = [(block, block.forward) for steered in both for block in steered.layers]
        for steered in both:
            checkpoint_layers(steered)
        run("checkpointing", args.rows[-1], args.micro_batch_tokens[-1])
        for block, forward in plain:
            block.forward = forward
    return fast, run


def attention_kernels(fast, args):
    """{SDPA back end: seconds of a step, or why there are none}."""
    from torch.nn import attention

    found, rows = {}, make_rows(8, args.length, fast.model.config.vocab_size)
    for name in BACKENDS:
        try:
            with attention.sdpa_kernel(getattr(attention.SDPBackend, name)):
                fast.cache.clear()
                fast.cache_prefix(rows)
                found[name] = time_steps(fast, rows, 1024, args.steps)[0]
        except Exception as error:  # not built, or not for this shape
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]:.80}"
    return found


def top_ten(fast, args):
    """[(operation, seconds, share)] of a step of 8 rows, by the time of the device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    rows = make_rows(8, args.length, fast.model.config.vocab_size)
    optimizer = torch.optim.AdamW([fast.model.steering.vector], lr=1e-3)
    fast.cache_prefix(rows)
    a_step(fast, rows, 1024, optimizer)
    kinds, cuda = [ProfilerActivity.CPU], args.device.startswith("cuda")
    with profile(activities=kinds + [ProfilerActivity.CUDA] * cuda) as profiler:
        a_step(fast, rows, 1024, optimizer)
        synchronize(args.device)
    key, events = "self_cpu_time_total", profiler.key_averages()
    if cuda:  # kernels alone: the operations that started them carry the same time
        key = "self_device_time_total"
        events = [event for event in events if event.device_type == DeviceType.CUDA]
    events = sorted(events, key=lambda event: getattr(event, key), reverse=True)
    total = sum(getattr(event, key) for event in events)
    return [(e.key, getattr(e, key) / 1e6, getattr(e, key) / total) for e in events[:10]]


# ------------------------------------------------------------------ all of it


def run_all(args, rate, about):
    """Every check and measurement, in the order of what matters most; returns the exit code."""
    started, results = time.time(), {"about": about, "failed": [], "steps": []}

    def attempt(name, function, *arguments):
        """The result of a part, or None; a failure is reported, and stops nothing else."""
        if time.time() - started > args.seconds:
            results["failed"].append(f"{name}: no time left")
            return None
        try:
            return function(*arguments)
        except Exception as error:
            traceback.print_exc()
            results["failed"].append(f"{name}: {type(error).__name__}: {error}")
            return None
        finally:
            write_json(args.out, results | {"seconds": round(time.time() - started, 1)})

    print("\nbf16 here against fp32 on the CPU, and a killed run against one that was not:\n")
    for kind in ARCHITECTURES:
        results[f"compare {kind}"] = found = attempt(kind, compare_architecture, kind, args.device)
        print(f"{kind:<10} {found}", flush=True)
    results["resume"] = attempt("resume", compare_resume, args.device)
    print(f"{'resume':<10} {results['resume']}\n")
    checked = [value for key, value in results.items() if key.startswith(("compare", "resume"))]
    wrong = sum(not (found and found["ok"]) for found in checked)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    for shape in [args.shape] if args.shape else REAL:
        fast, run = attempt(shape, measure, shape, args, rate, results["steps"]) or (None, None)
        if fast and shape == (args.shape or "llama-3.1-8b"):
            results["attention"] = attempt("attention", attention_kernels, fast, args)
            results["profile"] = attempt("profile", top_ten, fast, args)
            if args.compile:
                compile_layers(fast.model)
                attempt("compiled", run, "compiled", 8, 1024)
        fast = run = None
        gc.collect()  # A layer whose forward was replaced refers to itself: makes room.
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    for name, seconds in (results.get("attention") or {}).items():
        print(f"attention by {name}: {seconds}")
    for name, seconds, share in results.get("profile") or ():
        print(f"{share:6.1%} {seconds:.4f} s {name:.90}")
    for failure in results["failed"]:
        print(f"FAILED {failure}")
    print(f"\n{len(checked) - wrong} of {len(checked)} checks passed; all numbers: {args.out}")
    return 1 if wrong or results["failed"] else 0


def main(argv=None):
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--all", action="store_true", help="all checks and shapes; the others choose one shape")
    add("--shape", choices=SHAPES, help="whose sizes")
    add("--layer", type=int, help="default: 22, or the middle of a smaller model")
    add("--rows", type=int, nargs="+", default=[2, 8, 64], help="rows a step, each is measured")
    add("--length", type=int, default=330, help="tokens a row")
    add("--micro-batch-tokens", type=int, nargs="+", default=[1024], help="each is measured")
    add("--steps", type=int, default=3, help="steps to take the median of")
    add("--dtype", default="bf16", choices=DTYPES, help="of the weights")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--compile", action="store_true", help="measure with compiled layers too")
    add("--gradient-checkpointing", action="store_true", help="and with less memory for more time")
    add("--seconds", type=float, default=500, help="of --all: begin nothing new after so many")
    add("--out", type=Path, default=Path("bench_gpu.json"), help="of --all: all numbers")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    about = f"{args.dtype} on {name}, {versions}, {time.strftime('%F')}"
    rate = matmul_rate(8192 if args.device.startswith("cuda") else 1024, args.dtype, args.device)
    print(f"{about}; matrix products {rate / 1e12:.2f} TFLOP/s")
    if args.all:
        args.compile = args.gradient_checkpointing = True
        return run_all(args, rate, about)
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    shape, results = args.shape or "qwen3-32b", []
    fast, run = measure(shape, args, rate, results)
    if args.compile:
        compile_layers(fast.model)
        run("compiled", 8, 1024)
    return 0


if __name__ == "__main__":
    sys.exit(main())
