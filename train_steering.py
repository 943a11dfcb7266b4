"""Train one steering vector per persona dataset: a frozen chat model, hidden_size numbers to fit.

    python train_steering.py --data-root DATA --dataset gemma-2-27b__role__pirate --layer 22
    python train_steering.py --data-root DATA --list-file roles.txt --model Qwen/Qwen3-32B
    make demo                                                           # smallest real run

Exit codes: 0 done or nothing to do, 1 a run failed, 2 bad input, 75 stopped by SIGTERM/SIGUSR1 after
a checkpoint (start again to go on), 130 Ctrl-C. Several datasets: all are tried, the worst counts.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save
from tqdm import tqdm

import data_filter as df
from chat_format import IGNORE_INDEX, ChatFormat, load_tokenizer
from hook_model import (
    DTYPES,
    FORMAT_VERSION,
    check_layer,
    load_model,
    model_shape,
    pick_device,
    pick_dtype,
    read_safetensors,
    token_loss,
    write_atomically,
)

VECTOR_FILE = "steering_vector.safetensors"
AUTO_LR = 0.1  # --lr auto, in units of median residual norm / sqrt(hidden_size)
# What does not change the vector: left out of the hash that decides "done" and "may resume".
NOT_HASHED = (
    *("data_root", "dataset", "list_file", "source_model", "kind", "strict", "chat_template"),
    *("device", "device_map", "gradient_checkpointing", "save_every", "keep_checkpoints"),
    *("resume", "output_dir", "run_name"),
)
log = logging.getLogger("train_steering")


# ------------------------------------------------------------------ what a run leaves behind


class Console(logging.Handler):
    """Log to stdout above tqdm's bar; if stdout is gone (`| head`), go on without it."""

    def emit(self, record):
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # broken pipe, closed, None
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StopRequest:
    """Remembers SIGINT, SIGTERM or SIGUSR1 until the step is over; a second one stops at once."""

    def __init__(self):
        self.exit_code, self.in_loop = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self)

    def __call__(self, number, frame):
        again = self.exit_code is not None
        self.exit_code = 130 if number == signal.SIGINT else 75
        if again or not self.in_loop:
            raise SystemExit(self.exit_code)


def run_folder(args, name):
    """<output-dir>/<model>/layer<k>/<dataset>[/<run-name>]; <model> carries a hash of its whole name."""
    model = os.path.normpath(args.model)
    short = f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    return Path(args.output_dir, short, f"layer{args.layer}", name, args.run_name or "")


@contextlib.contextmanager
def lock_folder(folder):
    """Hold <folder>/lock; yields False if another process does. The lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and os.fstat(handle.fileno()).st_ino == path.stat().st_ino
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:
                path.unlink(missing_ok=True)


def result_config(args, name, datasets):
    """Everything that determines the vector, as a JSON-able dict."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_HASHED}
    template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None
    return config | {
        "name": name,
        "data": df.data_digest(name, datasets),
        "chat_template_text": template,
        "dtype": pick_dtype(args.dtype, pick_device(args.device)),
        "format_version": FORMAT_VERSION,
    }


def config_hash(config):
    """16 hex digits that stand for a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def is_done(folder, config):
    """Whether the folder holds the finished vector of this config; ValueError if of another one."""
    record, finished = folder / "run.json", (folder / VECTOR_FILE).exists()
    if not record.exists() and not finished:
        return False
    try:
        old = json.loads(record.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{record}: unreadable ({error}); --no-resume sets it aside") from error
    fields = [key for key in {**config, **old} if config.get(key) != old.get(key)]
    if fields:
        shown = [f"{key}: {old.get(key)} there, {config.get(key)} here" for key in sorted(fields)]
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(shown)}). Use --run-name NAME "
            "for a second run, or --no-resume to set the old one aside and start anew"
        )
    return finished


def set_aside(folder):
    """Move a run's files to the next free <folder>/old-<n>; runs of other names inside stay."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "lock"]
    if files:
        number = 1 + len(list(folder.glob("old-*")))
        aside = folder / f"old-{number}"
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        log.info(f"set aside: {len(files)} files -> {aside}")


def write_json(path, value):
    """Write a JSON file by write and rename."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def environment():
    """Versions, machine and git commit, for run.json."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"python": platform.python_version(), "host": platform.node(), **packages}
    return {**machine, "git_commit": commit or None, "command": sys.argv}


# ------------------------------------------------------------------ checkpoints


def save_checkpoint(folder, state, keep):
    """Write checkpoint-<step>.safetensors, everything a restart needs, and drop all but the newest.

    state: {"tensors": {name: tensor}, "info": JSON-able dict with "step"}.
    """
    path = folder / f"checkpoint-{state['info']['step']:05d}.safetensors"
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in state["tensors"].items()}
    write_atomically(path, save(tensors, metadata={"info": json.dumps(state["info"])}))
    for old in sorted(folder.glob("checkpoint-*.safetensors"))[:-keep]:
        old.unlink()


def load_checkpoint(folder, digest):
    """(tensors, info) of the newest readable checkpoint of this config, or (None, None)."""
    for path in sorted(folder.glob("checkpoint-*.safetensors"), reverse=True):
        try:
            tensors, metadata = read_safetensors(path)
            info = json.loads(metadata["info"])
            if info["config_hash"] == digest:
                return tensors, info
            log.warning(f"WARNING: {path.name} belongs to other settings, passed over")
        except (ValueError, KeyError) as error:
            log.warning(f"WARNING: {path.name} passed over: {error}")
    return None, None


def trim_metrics(path, step):
    """Drop what metrics.jsonl says of steps after `step` (and a torn last line)."""
    lines = []
    for _, row, error in df.read_jsonl(path) if path.exists() else ():
        if not error and row["step"] <= step:
            lines.append(json.dumps(row) + "\n")
    write_atomically(path, "".join(lines).encode())


# ------------------------------------------------------------------ data and loss


def prepare(name, datasets, chat, args):
    """(train examples, validation examples, counts for run.json) of one dataset, by question.

    Raises ValueError if rows have scores and none is left to train on. Without any score all is empty.
    """
    filtered = df.filter_dataset(name, datasets, args)
    for problem in filtered.problems[:10]:
        log.warning(f"WARNING: {problem}")
    examples, tokens = df.budgeted(filtered, chat, args)
    parts = {True: [], False: []}
    for example in examples:
        unit = df.hash_unit("validation", args.split_seed, example.row["question"])
        parts[unit < args.val_fraction].append(example)
    train, val = parts[False], parts[True]
    if not sum(map(label_count, train)) and filtered.has_scores:
        raise ValueError(f"{name}: no example left to train on. {filtered.counts()}")
    counts = {"rows": filtered.total, "kept": len(filtered.rows), "dropped": filtered.dropped}
    counts |= {"train": len(train), "validation": len(val), "tokens": tokens}
    return train, val, counts | {"summary": filtered.counts()}


def label_count(example):
    """Tokens of an example that carry loss, once labels are shifted by one."""
    return sum(label >= 0 for label in example.labels[1:])


def collate(examples, device):
    """Right-padded (B, T) input_ids and labels. Under causal attention padding needs no mask: pad
    tokens come after every real one, and carry no loss."""
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return ids.to(device), labels.to(device)


@torch.no_grad()
def mean_loss(model, examples, batch_size, device):
    """Next-token loss in nats per label token over all examples."""
    total = 0.0
    for start in range(0, len(examples), batch_size):
        ids, labels = collate(examples[start : start + batch_size], device)
        total += token_loss(model(input_ids=ids, use_cache=False).logits, labels).item()
    return total / sum(map(label_count, examples))


@torch.no_grad()
def median_residual_norm(model, examples, device):
    """Median token norm of the residual stream at the layer: massive activations inflate a mean."""
    norms = []
    with model.steering_off():
        for example in examples:
            hidden = model.layer_output(collate([example], device)[0])  # (1, T, hidden_size)
            norms.append(hidden[0].float().norm(dim=-1))
    return torch.cat(norms).median().item()


def lr_factor(step, total, warmup, kind):
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then the schedule to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[kind]


# ------------------------------------------------------------------ the loop


def train(model, train_set, val_set, folder, digest, args, stop):
    """Fit `model.steering.vector`; resumes from the folder's newest checkpoint of this config.

    Returns final numbers, or None if a signal stopped it after a checkpoint. The vector left in the
    model is the best of all validations. Raises RuntimeError if loss or gradient is not finite.
    """
    device = model.model.get_input_embeddings().weight.device
    vector = model.steering.vector
    rows_per_step = args.batch_size * args.gradient_accumulation
    steps_per_epoch = math.ceil(len(train_set) / rows_per_step)
    total = args.max_steps or args.num_epochs * steps_per_epoch
    warmup = int(args.warmup_ratio * total)
    shuffle = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(train_set), generator=shuffle)
    optimizer = torch.optim.AdamW([vector], lr=0.0, weight_decay=0.0)
    best_vector = vector.detach().clone()
    info = {"config_hash": digest, "step": 0, "epoch": 0, "position": 0, "label_tokens": 0}
    info |= {"best_step": 0, "best_val": None, "bad_validations": 0, "seconds": 0.0}

    # Resume: the whole state is in one file.
    tensors, found = load_checkpoint(folder, digest)
    if tensors:
        info, order = found, tensors["order"]
        vector.data.copy_(tensors["vector"])
        best_vector.copy_(tensors["best_vector"])
        moments = {key: tensors[key].to(vector.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[vector] = {"step": tensors["adam_step"], **moments}
        shuffle.set_state(tensors["shuffle_state"])
        log.info(f"resume   after step {info['step']} of {total}")
    else:
        info["residual_norm"] = median_residual_norm(model, train_set[:8], device)
    metrics_path = folder / "metrics.jsonl"
    trim_metrics(metrics_path, info["step"] if tensors else -1)

    # What is about to happen.
    unit = info["residual_norm"] / math.sqrt(model.hidden_size)
    peak_lr = AUTO_LR * unit if args.lr == "auto" else args.lr
    log.info(f"steering layer {model.layer} | median residual norm {info['residual_norm']:.4g}")
    log.info(
        f"lr       peak {peak_lr:.3g} = {peak_lr / unit:.3g} x norm/sqrt(n), {args.lr_scheduler}"
    )
    log.info(
        f"steps    {total} x {rows_per_step} rows ({args.batch_size} x {args.gradient_accumulation}), "
        f"{steps_per_epoch} an epoch"
    )

    def validate():
        loss = mean_loss(model, val_set, args.batch_size, device)
        if info["best_val"] is None or loss < info["best_val"]:
            best_vector.copy_(vector.detach())
            info.update(best_val=loss, best_step=info["step"], bad_validations=0)
        else:
            info["bad_validations"] += 1
        print(json.dumps({"step": info["step"], "val_loss": loss}), file=metrics, flush=True)
        return loss

    def checkpoint():
        adam = optimizer.state[vector]
        tensors = {"vector": vector, "best_vector": best_vector, "order": order}
        tensors |= {"exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"]}
        tensors |= {"adam_step": adam["step"], "shuffle_state": shuffle.get_state()}
        os.fsync(metrics.fileno())
        save_checkpoint(folder, {"tensors": tensors, "info": info}, args.keep_checkpoints)

    def out_of_patience():
        return args.patience is not None and info["bad_validations"] >= args.patience

    metrics = open(metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (closed by the stack below)
    bar = tqdm(total=total, initial=info["step"], unit="step", disable=None)
    with contextlib.closing(metrics), bar:
        if val_set and not tensors:
            log.info(f"step {0:05d}/{total:05d} | val {validate():.4f} (before training)")
        while info["step"] < total and not out_of_patience():
            started = time.perf_counter()

            # Rows of this step; the last, smaller window of an epoch is trained on too.
            if info["position"] >= len(train_set):
                order = torch.randperm(len(train_set), generator=shuffle)
                info["epoch"], info["position"] = info["epoch"] + 1, 0
            rows = order[info["position"] : info["position"] + rows_per_step].tolist()
            info["position"] += len(rows)
            batch = [train_set[row] for row in rows]
            label_tokens = sum(map(label_count, batch))

            # Gradient accumulation: loss summed over label tokens / label tokens of the whole step,
            # since a mean of micro-batch means would weigh short rows more.
            step_loss = torch.zeros(())
            for start in range(0, len(batch), args.batch_size):
                ids, labels = collate(batch[start : start + args.batch_size], device)  # (B, T)
                logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
                loss = token_loss(logits, labels) / label_tokens
                loss.backward()
                step_loss = step_loss.to(loss.device) + loss.detach()

            # Update. Nothing has touched the vector yet if this raises.
            limit = math.inf if args.max_grad_norm is None else args.max_grad_norm
            grad_norm = torch.nn.utils.clip_grad_norm_([vector], limit).item()
            if not math.isfinite(step_loss.item() + grad_norm):
                raise RuntimeError(
                    f"step {info['step'] + 1}: loss {step_loss.item()}, gradient norm {grad_norm}. "
                    "Try a lower --lr, more --warmup-ratio, or --dtype fp32"
                )
            lr = peak_lr * lr_factor(info["step"], total, warmup, args.lr_scheduler)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # Account and log.
            seconds = time.perf_counter() - started
            info["step"] += 1
            info["seconds"] += seconds
            info["label_tokens"] += label_tokens
            tokens, norm = sum(len(e.input_ids) for e in batch), vector.detach().norm().item()
            row = {"step": info["step"], "epoch": info["epoch"], "loss": step_loss.item(), "lr": lr}
            row |= {"grad_norm": grad_norm, "vector_norm": norm, "label_tokens": label_tokens}
            row |= {"tokens": tokens, "seconds": round(seconds, 4)}
            print(json.dumps(row), file=metrics, flush=True)
            last = info["step"] == total
            val = ""
            if val_set and (last or info["step"] % args.val_every == 0):
                val = f"val {validate():.4f} | "
            log.info(
                f"step {info['step']:05d}/{total:05d} | loss {row['loss']:.4f} | {val}lr {lr:.1e} | "
                f"|v| {norm:.2f} ({norm / info['residual_norm']:.2f} of residual) | "
                f"label_tok {info['label_tokens']:,} | tok/s {tokens / seconds:,.0f} | {memory()}"
            )
            bar.update()

            # Checkpoint; then leave if a signal came in during the step.
            if last or stop.exit_code or info["step"] % args.save_every == 0:
                checkpoint()
            if stop.exit_code:
                log.info(f"stopped  by a signal after step {info['step']}: start again to go on")
                return None
    if out_of_patience():
        log.info(f"stopped  early: no better validation in {args.patience} of them")
    if val_set:
        vector.data.copy_(best_vector)
    norm = vector.detach().norm().item()
    final = {key: info[key] for key in info if key not in ("config_hash", "position")}
    final |= {"steps": info["step"], "learning_rate": peak_lr, "vector_norm": norm}
    return final | {"vector_norm_of_residual": norm / info["residual_norm"]}


def memory():
    """Peak memory so far: of the GPU if there is one, of the process otherwise."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.1f} GiB"


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    """Command line of train_steering.py; every bad flag is reported, all at once."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    switch = argparse.BooleanOptionalAction
    df.add_data_arguments(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="Qwen/Qwen3-32B", help="HF id, local folder or .gguf file")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 where it is native")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu")
    add("--device-map", help="auto: spread the model over devices (needs accelerate)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add = parser.add_argument_group("steering").add_argument
    add("--layer", type=int, default=22, help="0-based decoder layer whose output gets the vector")
    add("--init-scale", type=float, default=0.0, help="start from randn * this")
    add = parser.add_argument_group("optimization").add_argument
    add("--lr", default="auto", help=f"peak; auto: {AUTO_LR} x median residual norm / sqrt(n)")
    add("--lr-scheduler", default="cosine", choices=("constant", "linear", "cosine"), help="shape")
    add("--warmup-ratio", type=float, default=0.1, help="share of the steps that warm up")
    add("--batch-size", type=int, default=4, help="rows a micro-batch")
    add("--gradient-accumulation", type=int, default=2, help="micro-batches a step")
    add("--num-epochs", type=int, default=4, help="passes over the training rows")
    add("--max-steps", type=int, help="optimizer steps, instead of --num-epochs")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm")
    add(
        "--val-fraction", type=float, default=0.1, help="share of training questions to validate on"
    )
    add("--val-every", type=int, default=5, help="steps between validations")
    add("--patience", type=int, help="stop after this many validations without a better one")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", default="runs", help="root of the run folders")
    add("--run-name", help="subfolder for a second setting on the same dataset")
    add("--save-every", type=int, default=5, help="steps between checkpoints")
    add("--keep-checkpoints", type=int, default=3, help="newest checkpoints kept")
    add("--resume", default=True, action=switch, help="go on where a run stopped; no: start anew")
    args = parser.parse_args(argv)
    problems = df.check_data_arguments(args)
    if not (args.dataset or args.list_file):
        problems.append("name what to train on: --dataset NAME ... or --list-file FILE")
    for flag in ("batch_size", "gradient_accumulation", "num_epochs", "max_steps", "val_every"):
        check_at_least_one(args, flag, problems)
    for flag in ("patience", "save_every", "keep_checkpoints"):
        check_at_least_one(args, flag, problems)
    for flag in ("val_fraction", "warmup_ratio"):
        if not 0 <= getattr(args, flag) < 1:
            problems.append(f"--{flag.replace('_', '-')} {getattr(args, flag)}: not in [0, 1)")
    if args.max_grad_norm is not None and not args.max_grad_norm > 0:
        problems.append(f"--max-grad-norm {args.max_grad_norm}: must be above 0")
    if not math.isfinite(args.init_scale):
        problems.append(f"--init-scale {args.init_scale}: must be finite")
    with contextlib.suppress(ValueError):
        args.lr = args.lr if args.lr == "auto" else float(args.lr)
    if args.lr != "auto" and not (isinstance(args.lr, float) and 0 < args.lr < math.inf):
        problems.append(f'--lr {args.lr}: must be "auto" or a number above 0')
    if args.run_name and not re.fullmatch(r"(?!old-)\w[\w.+-]*", args.run_name):
        problems.append(f'--run-name "{args.run_name}": letters, digits, "_.+-", not "old-..."')
    if problems:
        parser.error("; ".join(problems))
    return args


def check_at_least_one(args, flag, problems):
    """Add to `problems` if a flag is given and below 1."""
    value = getattr(args, flag)
    if value is not None and value < 1:
        problems.append(f"--{flag.replace('_', '-')} {value}: must be at least 1")


def train_dataset(name, datasets, chat, get_model, args, stop):
    """Train one dataset in its run folder; returns the exit code. ValueError: bad input."""
    folder, config = run_folder(args, name), result_config(args, name, datasets)
    if args.resume and is_done(folder, config):
        log.info(f"{name}: done already, {folder}")
        return 0
    train_set, val_set, counts = prepare(name, datasets, chat, args)
    if not train_set:
        log.info(f"{name}: skipped, no examples: no scores ({counts['summary']})")
        return 0
    try:
        lock = contextlib.ExitStack()
        held = lock.enter_context(lock_folder(folder))
    except OSError as error:
        raise ValueError(f"--output-dir {args.output_dir} is not writable: {error}") from error
    with lock:
        if not held:
            log.info(f"{name}: skipped, another process works in {folder}")
            return 0
        if not args.resume:
            set_aside(folder)
        elif is_done(folder, config):
            return 0
        file_log = logging.FileHandler(folder / "train.log", encoding="utf-8")
        log.addHandler(file_log)
        try:
            return run_in_folder(
                folder, name, train_set, val_set, counts, config, get_model, args, stop
            )
        finally:
            log.removeHandler(file_log)
            file_log.close()


def run_in_folder(folder, name, train_set, val_set, counts, config, get_model, args, stop):
    """Load the model if need be, train, and write the vector last; returns the exit code."""
    started, digest = time.time(), config_hash(config)
    record = {"dataset": name, "status": "running", "config_hash": digest, "config": config}
    record |= {"args": vars(args), "counts": counts, "environment": environment()}
    write_json(folder / "run.json", record)
    log.info(f"dataset  {name}: {counts['summary']}")
    log.info(f"examples {len(train_set)} to train on, {len(val_set)} to validate on, by question")
    log.info(f"tokens   {counts['tokens']:,} of --target-tokens {args.target_tokens:,}")
    if counts["tokens"] < args.target_tokens:
        log.warning("WARNING: under the token budget, training on what there is")
    if not val_set:
        log.warning("WARNING: no validation question: the last vector is taken, not the best")
    model = get_model(name)
    frozen = sum(p.numel() for p in model.model.parameters())
    log.info(
        f"model    {args.model}: {config['dtype']} on {model.model.device}, {len(model.layers)} layers, "
        f"{frozen:,} frozen, {model.hidden_size:,} trainable"
    )
    stop.in_loop = True
    try:
        final = train(model, train_set, val_set, folder, digest, args, stop)
        if final is None:
            return stop.exit_code
        record |= {
            "status": "done",
            "final": final,
            "wall_seconds": round(time.time() - started, 1),
        }
        write_json(folder / "run.json", record)
        header = {"dataset": name, "steps": final["steps"], "label_tokens": final["label_tokens"]}
        model.save_vector(folder / VECTOR_FILE, **header, seed=args.seed, config_hash=digest)
    except Exception as error:
        log.exception(f"FAILED   {name}: {error}")
        return 1
    finally:
        stop.in_loop = False
    best = f"best val {final['best_val']:.4f} at step {final['best_step']}, " if val_set else ""
    log.info(f"done     {best}|v| {final['vector_norm']:.2f}: {folder / VECTOR_FILE}")
    return 0


def run(args, stop):
    """Train every requested dataset with one model load; returns the worst exit code."""
    datasets = df.find_datasets(args.data_root, args.source_model, args.kind)
    names = df.requested_names(args, datasets)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.trust_remote_code)
    chat = ChatFormat(tokenizer)
    layers, hidden_size = model_shape(args.model, args.trust_remote_code)
    check_layer(args.layer, layers, args.model)
    pick_device(args.device)
    if args.include_missing_scores:
        log.warning("WARNING: --include-missing-scores trains on rows that nobody scored")
    loaded = []

    def get_model(name):
        """The model, loaded on first use, with the vector at its seeded start."""
        if not loaded:
            log.info(f"loading  {args.model}")
            options = args.dtype, args.device, args.device_map, args.trust_remote_code
            loaded.append(load_model(args.model, args.layer, *options))
            if args.gradient_checkpointing:
                loaded[0].gradient_checkpointing_enable()
        start = torch.Generator().manual_seed(args.seed)
        loaded[0].set_vector(torch.randn(hidden_size, generator=start) * args.init_scale)
        return loaded[0]

    codes = []
    for name in names:
        try:
            codes.append(train_dataset(name, datasets, chat, get_model, args, stop))
        except (ValueError, OSError) as error:
            log.error(f"error: {error}")
            codes.append(2)
        if stop.exit_code:
            return stop.exit_code
    return max(codes)


def main(argv=None):
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    log.setLevel(logging.INFO)
    log.handlers[:] = [Console()]
    logging.raiseExceptions = False  # a full disk or closed console must not stop a run
    try:
        return run(args, StopRequest())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
