"""Training speed, side by side: TRL's SFTTrainer, our loop without the prefix cache, our loop.

    make bench                           # layer 12 x 3 epochs, layer 20 x 5: under 20 minutes
    make bench ARGS="--tokens 5300 --repeats 5"                # the longer version

Every run is a process of its own, with the same model, rows, order of rows, dtype, layer, learning
rates and optimizer steps; TRL gets our token ids and labels. The three take turns. The speed is
tokens (pads not counted) over seconds of training, the prefix pass included, start-up not.
Memory is measured apart, in tensors: of a cached epoch against one uncached micro-batch.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VARIANTS = ("trl", "trl-no-ckpt", "cache off", "ours")
MEMORY = "memory"
HEADER = (
    f"{'variant':<12} {'tok/s':>7} {'ratio':>6} {'first step s':>12} {'all s':>6} {'peak GiB':>8} "
    f"{'final loss':>10} {'curve differs':>13}"
)
LR, ROWS_PER_MICRO_BATCH, ACCUMULATION = 0.5, 4, 2


# ------------------------------------------------------------------ one run, in its own process


def training_arguments(args, folder):
    """Command line of train_steering.py, which all variants follow."""
    return [
        *("--model", args.model, "--data-root", args.data_root, "--dataset", args.dataset),
        *("--layer", str(args.layer), "--num-epochs", str(args.epochs), "--dtype", args.dtype),
        *("--target-tokens", str(args.tokens), "--val-fraction", "0", "--lr", str(LR)),
        *("--batch-size", str(ROWS_PER_MICRO_BATCH), "--warmup-ratio", "0"),
        *("--gradient-accumulation", str(ACCUMULATION), "--lr-scheduler", "constant"),
        *("--output-dir", str(folder), "--save-every", "1000000"),
    ]


def run_ours(args, folder):
    """Train with train_steering.py; returns what every variant reports."""
    import train_steering

    extra = ["--prefix-cache", "off"] if args.variant == "cache off" else []
    if code := train_steering.main([*training_arguments(args, folder), *extra]):
        raise SystemExit(code)
    (record,) = Path(folder).rglob("run.json")
    rows = [json.loads(line) for line in (record.parent / "metrics.jsonl").open()]
    prefix = json.loads(record.read_text())["final"]["prefix_seconds"]
    seconds = prefix + sum(row["seconds"] for row in rows)
    result = {"losses": [row["loss"] for row in rows], "seconds": seconds}
    return result | {"tokens": sum(row["tokens"] for row in rows), "first_step": rows[0]["time"]}


def load_examples(args, folder):
    """(examples, chat format, training options), as train_steering.py has them."""
    import train_steering
    from data_filter import DataOptions, split_dataset
    from steering.loading import load_chat

    options = train_steering.parse_args(training_arguments(args, folder))
    chat, data = load_chat(args.model), DataOptions.of(vars(options))
    examples = split_dataset(args.dataset, data.datasets(), chat, data).train
    if len(examples) % (ROWS_PER_MICRO_BATCH * ACCUMULATION):
        raise SystemExit(f"{len(examples)} rows are no whole number of steps: change --tokens")
    return examples, chat, options


def peak_of(work):
    """Peak GiB of tensors that `work()` allocates, beyond what exists before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events)) / 2**30


def run_memory(args, folder):
    """Peak memory beyond the model's: of one uncached micro-batch, and of a cached epoch."""
    from hook_model import load_model
    from steering.chat_format import micro_batches
    from steering.fast_path import FastPath
    from train_steering import token_loss

    examples, _, options = load_examples(args, folder)
    model = load_model(args.model, args.layer, args.dtype)
    fast = FastPath(model)
    batches = micro_batches(examples, options.micro_batch_tokens)
    largest = max(batches, key=lambda b: len(b) * max(len(e.input_ids) for e in b))

    def train(batches):
        for batch in batches:
            fast.losses(batch, token_loss).sum().backward()

    def cached_epoch():
        fast.cache_prefix(examples, max_tokens=options.micro_batch_tokens)
        train(batches)

    train(batches[:1])  # the check of the fast path, once
    one, epoch = peak_of(lambda: train([largest])), peak_of(cached_epoch)
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters()) / 2**30
    cache = sum(states.numel() * states.element_size() for states in fast.cache.values()) / 2**30
    return {"weights": weights, "micro-batch": one, "cache": cache, "cached epoch": epoch}


def profile(args):
    """Print where the time of one cached epoch of ours goes, by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from hook_model import load_model
    from steering.chat_format import micro_batches
    from steering.fast_path import FastPath
    from train_steering import token_loss

    args.layer, args.epochs = args.profile, 2
    examples, _, options = load_examples(args, "unused")
    fast = FastPath(load_model(args.model, args.layer, args.dtype))
    fast.cache_prefix(examples)
    fast.losses(examples[:1], token_loss)
    with record(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in micro_batches(examples, options.micro_batch_tokens):
            fast.losses(batch, token_loss).sum().backward()
    table = profiler.key_averages()
    total = sum(row.self_cpu_time_total for row in table)
    for row in sorted(table, key=lambda row: -row.self_cpu_time_total)[:12]:
        print(f"{row.key:<48} {row.self_cpu_time_total / total:6.1%} {row.count:>6} calls")


def run_trl(args, folder):
    """Train the same with SFTTrainer, a frozen model and a hooked vector; returns the same."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from hook_model import ResidualHook, find_layers
    from steering.loading import DTYPES, pick_dtype

    examples, chat, options = load_examples(args, folder)
    generator = torch.Generator().manual_seed(options.seed)
    order = [
        i for _ in range(args.epochs) for i in torch.randperm(len(examples), generator=generator)
    ]
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in (examples[i] for i in order)]

    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[pick_dtype(args.dtype, "cpu")]
    ).requires_grad_(False)
    model.steering = ResidualHook(model.config.hidden_size)
    find_layers(model)[args.layer].register_forward_hook(model.steering.hook)

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    times = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.time())

        def on_step_end(self, *_, **__):
            times.append(time.time())

    config = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,  # the rows are all epochs, one after the other
        per_device_train_batch_size=ROWS_PER_MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,  # the model has its dtype already
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.variant == "trl",  # TRL's default
    )
    trainer = InOrder(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=chat.tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = {"losses": losses, "seconds": times[-1] - times[0], "first_step": times[1]}
    return result | {"tokens": sum(len(row["input_ids"]) for row in rows)}


# ------------------------------------------------------------------ all runs


def measure(variant, layer, epochs):
    """Run one variant in a process of its own, with the options of this one: its report, wall
    seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log")
        command = [sys.executable, *sys.argv, "--variant", variant, "--report", str(report)]
        command += ["--layer", str(layer), "--epochs", str(epochs)]
        started = time.time()
        with open(log, "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{variant} failed:\n{log.read_text()[-3000:]}")
        result = json.loads(report.read_text())
    if "first_step" in result:
        result["first_step"] -= started
    return result | {"wall": time.time() - started, "gib": usage.ru_maxrss / 2**20}


def compare(layer, epochs, args):
    """Run all variants, interleaved, and print the table of one setting."""
    runs = {variant: [] for variant in args.variants}
    for _ in range(args.repeats):
        for variant in args.variants:
            runs[variant].append(measure(variant, layer, epochs))
            last = runs[variant][-1]
            speed = last["tokens"] / last["seconds"]
            print(f"  {variant:<12} {speed:7.1f} tok/s, {last['wall']:.0f} s in all", flush=True)
    reference = runs[args.variants[0]][0]
    tokens, steps = reference["tokens"] // epochs, len(reference["losses"])
    print(f"\nlayer {layer}, {epochs} epochs of {tokens:,} tokens, {steps} steps\n{HEADER}")
    table = {}
    for variant, results in runs.items():
        keys = ("first_step", "wall", "gib")
        row = {key: statistics.median(result[key] for result in results) for key in keys}
        row["speed"] = statistics.median(r["tokens"] / r["seconds"] for r in results)
        row["loss"] = results[0]["losses"][-1]
        pairs = zip(results[0]["losses"], reference["losses"], strict=True)
        row["curve"] = max(abs(a - b) / b for a, b in pairs)
        table[variant] = row
        ratio = row["speed"] / table[args.variants[0]]["speed"]
        print(
            f"{variant:<12} {row['speed']:7.1f} {ratio:6.2f} {row['first_step']:12.1f} "
            f"{row['wall']:6.1f} {row['gib']:8.2f} {row['loss']:10.4f} {row['curve']:13.1e}"
        )
    if max(row["curve"] for row in table.values()) > 1e-2:
        raise SystemExit("the loss curves differ by more than 1e-2: this comparison is void")
    sizes = measure(MEMORY, layer, epochs)
    most = sizes["micro-batch"] + sizes["cache"]
    print(
        f"tensors, GiB: model {sizes['weights']:.3f} + one uncached micro-batch "
        f"{sizes['micro-batch']:.3f} + cache {sizes['cache']:.3f}; a cached epoch takes "
        f"{sizes['cached epoch']:.3f} beyond the model, of at most {most:.3f}\n",
        flush=True,
    )


def parse_args(argv=None):
    """Command line of bench.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="models/SmolLM2-135M-Instruct", help="local folder")
    add("--data-root", default="sample_data", help="as in train_steering.py")
    add("--dataset", default="sample__role__pirate", help="as in train_steering.py")
    add("--dtype", default="auto", help="auto: bf16 where it is native")
    add("--tokens", type=int, default=2100, help="tokens an epoch (a whole number of steps)")
    add("--repeats", type=int, default=2, help="runs of each variant, in turns")
    add("--settings", nargs="+", default=["12x3", "20x5"], metavar="LxE", help="layer x epochs")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="first: reference")
    add("--profile", type=int, metavar="LAYER", help="only profile our loop at this layer")
    add("--variant", choices=(*VARIANTS, MEMORY), help=argparse.SUPPRESS)  # one run, for ourselves
    for name in ("--layer", "--epochs"):
        add(name, type=int, help=argparse.SUPPRESS)
    add("--report", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    """Command line entry."""
    args = parse_args(argv)
    if args.variant:
        trl = dict.fromkeys(VARIANTS[:2], run_trl)
        run = {**trl, MEMORY: run_memory}.get(args.variant, run_ours)
        result = run(args, Path(args.report).parent / "run")
        Path(args.report).write_text(json.dumps(result))
        return
    if args.profile is not None:
        profile(args)
        return
    for setting in args.settings:
        layer, epochs = map(int, setting.split("x"))
        compare(layer, epochs, args)


if __name__ == "__main__":
    main()
