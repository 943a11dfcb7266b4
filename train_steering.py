"""Train one steering vector per persona dataset: a frozen chat model, hidden_size numbers to fit.

    python train_steering.py --data-root DATA --dataset gemma-2-27b__role__pirate --layer 22
    python train_steering.py --data-root DATA --list-file roles.txt --model Qwen/Qwen3-32B
    make demo                                                           # smallest real run

Exit codes: 0 done or nothing to do, 1 a run failed, 2 bad input, 75 stopped by SIGTERM/SIGUSR1
after a checkpoint (start again to go on), 130 Ctrl-C. Several datasets: the worst code counts.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import data_filter as df
from chat_format import ChatFormat, load_tokenizer
from data_layouts import data_digest, find_datasets
from hook_model import (
    DTYPES,
    FORMAT_VERSION,
    ResidualHook,
    check_layer,
    example_sums,
    label_count,
    load_model,
    load_vector,
    median_residual_norm,
    micro_batches,
    model_shape,
    pick_device,
    pick_dtype,
    vector_digest,
)
from run_folder import (
    VECTOR_FILE,
    Console,
    Laps,
    StopRequest,
    config_hash,
    environment,
    is_done,
    is_locked,
    last_speed,
    load_checkpoint,
    lock_folder,
    peak_memory,
    read_json,
    run_folder,
    save_checkpoint,
    set_aside,
    trim_metrics,
    write_json,
)

AUTO_LR = 0.05  # --lr auto, in units of median residual norm / sqrt(hidden_size)
# Options that do not change the vector: not in the hash that decides "done" and "may resume".
NOT_HASHED = (
    *("data_root", "dataset", "list_file", "source_model", "kind", "strict", "chat_template"),
    *("device", "device_map", "compile", "gradient_checkpointing", "prefix_cache"),
    *(
        "micro_batch_tokens",
        "save_every",
        "keep_checkpoints",
        "restart",
        "print_todo",
        "print_status",
    ),
    *("output_dir", "run_name"),
)
log = logging.getLogger("train_steering")


# ------------------------------------------------------------------ data and schedule


def prepare(name, datasets, chat, args):
    """(training examples, validation examples, counts for run.json) of one dataset.

    Validation questions are cut from the training ones. Raises ValueError if none is left to train
    on; a baseline, whose rows nobody scored, gives empty lists.
    """
    filtered = df.filter_dataset(name, datasets, args)
    for problem in filtered.problems[:10]:
        log.warning(f"WARNING: {problem}")
    if len(filtered.problems) > 10:
        log.warning(f"WARNING: ... and {len(filtered.problems) - 10} more broken lines")
    examples, tokens = df.budgeted(filtered, chat, args)
    train_set, val_set = df.split_by_question(
        examples, args.val_fraction, args.split_seed, "validation"
    )
    if not filtered.is_baseline and not sum(map(label_count, train_set)):
        raise ValueError(f"{name}: no example left to train on. {filtered.counts()}")
    counts = {"rows": filtered.total, "kept": filtered.kept, "dropped": +filtered.dropped}
    counts |= {"train": len(train_set), "validation": len(val_set), "tokens": tokens}
    return train_set, val_set, counts | {"summary": filtered.counts()}


def lr_factor(step, total, warmup, kind):
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": cosine}[kind]


def result_config(args, name, datasets):
    """Everything that determines the vector, as a JSON-able dict."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_HASHED}
    template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None
    dtype = pick_dtype(args.dtype, pick_device(args.device))
    data = data_digest(name, datasets)
    config |= {"name": name, "data": data, "template": template, "dtype": dtype}
    if args.init_vector:  # what it holds counts, not where it lies
        config["init_vector"] = vector_digest(load_vector(args.init_vector)[0])
    return config | {"auto_lr": AUTO_LR, "format_version": FORMAT_VERSION}


# ------------------------------------------------------------------ the loop


def train(model, train_set, val_set, folder, digest, args, laps, stop):
    """Fit `model.steering.vector`, from the folder's newest checkpoint of this config if any.

    Returns final numbers, or None if a signal stopped it after a checkpoint. The vector left in the
    model is the best of all validations. Raises RuntimeError if loss or gradient is not finite, or
    if no validation beats the start.
    """
    vector = model.steering.vector
    rows_per_step = args.batch_size * args.gradient_accumulation
    steps_per_epoch = math.ceil(len(train_set) / rows_per_step)
    total = args.num_epochs * steps_per_epoch if args.max_steps is None else args.max_steps
    warmup = int(args.warmup_ratio * total)
    val_every = args.val_every or math.ceil(steps_per_epoch / 2)
    shuffle = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(train_set), generator=shuffle)
    optimizer = torch.optim.AdamW([vector], lr=0.0, weight_decay=0.0)
    best_vector, max_tokens = vector.detach().clone(), args.micro_batch_tokens
    info = {"config_hash": digest, "step": 0, "epoch": 0, "position": 0, "label_tokens": 0}
    info |= {"best_step": 0, "best_val": None, "bad_validations": 0, "seconds": 0.0}

    # Resume: one file holds the whole state.
    tensors, found = load_checkpoint(folder, digest)
    if tensors:
        info, order = found, tensors["order"]
        vector.data.copy_(tensors["vector"])
        best_vector.copy_(tensors["best_vector"])
        moments = {key: tensors[key].to(vector.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[vector] = {"step": tensors["adam_step"], **moments}
        shuffle.set_state(tensors["shuffle_state"])
        log.info(f"resume   after step {info['step']} of {total}")
    trim_metrics(folder / "metrics.jsonl", info["step"] if tensors else -1)

    # Layers 0..k never see the vector: run them once for every row that comes up more than once.
    again = [*(train_set if total > steps_per_epoch else []), *val_set]
    model.cache_prefix(again, args.prefix_cache, max_tokens)
    if not tensors:
        info["residual_norm"] = median_residual_norm(model, train_set[:8])
    laps.lap("prefix")

    # What is about to happen.
    unit = info["residual_norm"] / math.sqrt(model.hidden_size)
    peak_lr = AUTO_LR * unit if args.lr == "auto" else args.lr
    log.info(f"steering layer {model.layer} | median residual norm {info['residual_norm']:.4g}")
    log.info(f"lr       {peak_lr:.3g} = {peak_lr / unit:.3g} x norm/sqrt(n), {args.lr_scheduler}")
    epoch_tokens = sum(len(example.input_ids) for example in train_set)
    log.info(
        f"steps    {total} of {rows_per_step} rows ({args.batch_size} x "
        f"{args.gradient_accumulation}), {steps_per_epoch} an epoch of {epoch_tokens:,} tokens"
    )
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in laps.items())
    log.info(f"ready    after {sum(laps.values()):.1f} s: {phases}")

    def validate():
        losses = example_sums(model.losses, val_set, max_tokens)
        loss = sum(losses) / sum(map(label_count, val_set))
        if info["best_val"] is None or loss < info["best_val"]:
            best_vector.copy_(vector.detach())
            info.update(best_val=loss, best_step=info["step"], bad_validations=0)
        else:
            info["bad_validations"] += 1
        print(json.dumps({"step": info["step"], "val_loss": loss}), file=metrics, flush=True)
        return f"val {loss:.4f} | "

    def checkpoint():
        tensors = {"vector": vector, "best_vector": best_vector, "order": order}
        adam = optimizer.state[vector]
        tensors |= {"exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"]}
        tensors |= {"adam_step": adam["step"], "shuffle_state": shuffle.get_state()}
        os.fsync(metrics.fileno())
        save_checkpoint(folder, tensors, info, args.keep_checkpoints)

    def out_of_patience():
        return args.patience is not None and info["bad_validations"] >= args.patience

    bar = tqdm(total=total, initial=info["step"], unit="step", disable=None)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics, bar:
        if val_set and not tensors:
            log.info(f"step {0:05d}/{total:05d} | {validate()}before training")
        while info["step"] < total and not out_of_patience():
            started = time.perf_counter()

            # Rows of this step; the smaller window at the end of an epoch is trained on too.
            if info["position"] >= len(train_set):
                order = torch.randperm(len(train_set), generator=shuffle)
                info["epoch"], info["position"] = info["epoch"] + 1, 0
            window = order[info["position"] : info["position"] + rows_per_step].tolist()
            batch = [train_set[i] for i in window]
            label_tokens = sum(map(label_count, batch))

            # Gradient accumulation: loss summed over label tokens / label tokens of the whole step,
            # since a mean of micro-batch means would weigh short rows more.
            try:
                step_loss = 0.0
                for rows in micro_batches(batch, max_tokens):
                    loss = model.losses(rows).sum() / label_tokens
                    loss.backward()
                    step_loss += loss.detach()
            except torch.OutOfMemoryError:  # the same step again, in smaller pieces
                if all(len(rows) == 1 for rows in micro_batches(batch, max_tokens)):
                    raise
                max_tokens //= 2
                log.warning(
                    f"WARNING: out of memory, --micro-batch-tokens is {max_tokens} from now"
                )
                optimizer.zero_grad()
                loss = None  # and with it what its graph holds
                continue

            # Update; nothing has touched the vector yet if this raises.
            step_loss, limit = step_loss.item(), args.max_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_([vector], limit).item()
            if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
                raise RuntimeError(
                    f"step {info['step'] + 1}: loss {step_loss}, gradient norm {grad_norm}. "
                    "Try a lower --lr, a higher --warmup-ratio, or --dtype fp32"
                )
            lr = peak_lr * lr_factor(info["step"], total, warmup, args.lr_scheduler)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # Account, validate, log.
            seconds = time.perf_counter() - started
            info["step"], info["position"] = info["step"] + 1, info["position"] + len(batch)
            info["label_tokens"] += label_tokens
            info["seconds"] += seconds
            tokens, norm = sum(len(e.input_ids) for e in batch), vector.detach().norm().item()
            row = {"step": info["step"], "epoch": info["epoch"], "loss": step_loss, "lr": lr}
            row |= {"grad_norm": grad_norm, "vector_norm": norm, "label_tokens": label_tokens}
            row |= {"tokens": tokens, "seconds": round(seconds, 4), "time": time.time()}
            print(json.dumps(row), file=metrics, flush=True)
            last = info["step"] == total
            val = validate() if val_set and (last or info["step"] % val_every == 0) else ""
            log.info(
                f"step {info['step']:05d}/{total:05d} | loss {step_loss:.4f} | {val}lr {lr:.1e} | "
                f"|v| {norm:.2f} ({norm / info['residual_norm']:.2f} of residual) | "
                f"label_tok {info['label_tokens']:,} | tok/s {tokens / seconds:,.0f} | "
                f"{peak_memory():.1f} GiB"
            )
            bar.update()

            # Checkpoint, and leave if a signal came in during the step.
            if last or stop.exit_code or out_of_patience() or info["step"] % args.save_every == 0:
                checkpoint()
            if stop.exit_code:
                log.info(f"stopped  by a signal after step {info['step']}: start again to go on")
                return None
    if out_of_patience():
        log.info(f"stopped  early: the last {args.patience} validations were no better")
    if val_set:
        if total and info["best_step"] == 0:
            raise RuntimeError(
                f"no validation in {info['step']} steps was better than the start "
                f"({info['best_val']:.4f}). Try a lower --lr or more steps"
            )
        vector.data.copy_(best_vector)
    final = {"steps": info["step"], "best_step": info["best_step"], "best_val": info["best_val"]}
    final |= {"label_tokens": info["label_tokens"], "seconds": info["seconds"], "lr": peak_lr}
    norm, residual = vector.detach().norm().item(), info["residual_norm"]
    return final | {"vector_norm": norm, "residual_norm": residual, "ratio": norm / residual}


# ------------------------------------------------------------------ one dataset, many datasets


def train_dataset(name, datasets, chat, get_model, args, laps, stop):
    """Train one dataset in its run folder; returns the exit code. ValueError: bad input."""
    folder, config = run_folder(args, name), result_config(args, name, datasets)
    if not args.restart and is_done(folder, config):
        log.info(f"{name}: done already, {folder}")
        return 0
    train_set, val_set, counts = prepare(name, datasets, chat, args)
    laps.lap("tokenize")
    with lock_folder(folder) as held:
        if not held:
            log.info(f"{name}: skipped, another process works in {folder}")
            return 0
        if not train_set:
            log.info(f"{name}: skipped, no examples: no scores ({counts['summary']})")
            record = {"dataset": name, "status": "skipped", "config": config, "counts": counts}
            write_json(folder / "run.json", record)
            return 0
        if args.restart:
            set_aside(folder)
        elif is_done(folder, config):  # by another process, while this one read the data
            return 0
        file_log = logging.FileHandler(folder / "train.log", encoding="utf-8")
        log.addHandler(file_log)
        try:
            data = train_set, val_set, counts
            return fill_folder(folder, config, data, get_model, args, laps, stop)
        except Exception as error:  # whatever it was, the next dataset may do better
            log.exception(f"FAILED   {name}: {error} (traceback in {folder / 'train.log'})")
            with contextlib.suppress(OSError, ValueError):  # the disk may be full
                record = read_json(folder / "run.json")
                write_json(folder / "run.json", record | {"status": "failed", "error": str(error)})
            return 1
        finally:
            stop.in_loop = False
            log.removeHandler(file_log)
            file_log.close()


def fill_folder(folder, config, data, get_model, args, laps, stop):
    """Train and write run.json, then the vector, which exists only if all went well.

    data: what `prepare` returns.
    """
    train_set, val_set, counts = data
    started, digest = time.time(), config_hash(config)
    record = {"dataset": config["name"], "status": "running", "config_hash": digest}
    record |= {"config": config, "args": vars(args), "counts": counts, **environment()}
    write_json(folder / "run.json", record)
    header = {"dataset": config["name"], "config_hash": digest, "seed": args.seed}
    header["model_is_local"] = Path(args.model).exists()  # then its name means nothing elsewhere
    if args.init_vector:
        start = load_vector(args.init_vector)[1]
        header["started_from"] = start.get("imported_from", start.get("dataset", args.init_vector))
    log.info(f"dataset  {config['name']}: {counts['summary']}")
    log.info(f"examples {len(train_set)} to train on, {len(val_set)} to validate on (by question)")
    budget = f"{counts['tokens']:,} tokens of --target-tokens {args.target_tokens:,}"
    if counts["tokens"] < args.target_tokens:
        log.warning(f"WARNING: under budget, training on what there is: {budget}")
    else:
        log.info(f"budget   {budget}")
    if not val_set:
        log.warning("WARNING: no validation questions: the last vector is kept, not the best")
    model = get_model()
    laps.lap("load")
    frozen = sum(parameter.numel() for parameter in model.model.parameters())
    log.info(
        f"model    {args.model}: {config['dtype']} on {model.input_device}, {len(model.layers)} "
        f"layers, {frozen:,} parameters frozen, {model.hidden_size:,} trained"
    )
    stop.in_loop = True
    final = train(model, train_set, val_set, folder, digest, args, laps, stop)
    record["startup"] = dict(laps)
    if final is None:
        write_json(folder / "run.json", record | {"status": "stopped"})
        return stop.exit_code
    record |= {"status": "done", "final": final, "wall_seconds": round(time.time() - started, 1)}
    write_json(folder / "run.json", record)
    header |= {"steps": final["steps"], "label_tokens": final["label_tokens"]}
    model.save_vector(folder / VECTOR_FILE, **header)
    best = f"best val {final['best_val']:.4f} at step {final['best_step']}, " if val_set else ""
    log.info(f"done     {best}|v| {final['vector_norm']:.2f}: {folder / VECTOR_FILE}")
    return 0


def print_todo(names, datasets, args):
    """Print the names that are neither done nor in another process's hands."""
    for name in names:
        try:
            folder = run_folder(args, name)
            if is_done(folder, result_config(args, name, datasets)) or is_locked(folder):
                continue
        except (ValueError, OSError):
            pass  # training it will say what is wrong
        print(name)


def print_status(names, datasets, args):
    """Print how far a list of datasets is: counts, failures, speed, and time left."""
    groups, seconds, speed = {"done": [], "running": [], "failed": [], "left": []}, [], 0.0
    for name in names:
        folder = run_folder(args, name)
        record = read_json(folder / "run.json")
        state = "failed" if record.get("status") == "failed" else "left"
        with contextlib.suppress(ValueError, OSError):  # another setting is not this one
            state = "done" if is_done(folder, result_config(args, name, datasets)) else state
        if is_locked(folder):
            state = "running"
            speed += last_speed(folder)
        groups[state].append(name)
        seconds += [record["wall_seconds"]] if state == "done" and "wall_seconds" in record else []
    for name in groups["running"]:
        print(f"running  {name}")
    for name in groups["failed"]:
        print(f"failed   {name}: {read_json(run_folder(args, name) / 'run.json')['error']}")
    counts = " / ".join(f"{len(members)} {state}" for state, members in groups.items())
    ahead = len(groups["left"]) + len(groups["running"]) / 2
    hours = "unknown"
    if seconds:
        workers = max(1, len(groups["running"]))
        hours = f"{ahead * sum(seconds) / len(seconds) / workers / 3600:.1f} h"
    print(f"status   {counts} of {len(names)} | tok/s {speed:,.0f} | time left {hours}")


def run(args, laps, stop):
    """Train every requested dataset with one model load; returns the worst exit code."""
    datasets = find_datasets(args.data_root, args.source_model, args.kind)
    names = df.requested_names(args, datasets)
    if args.print_todo or args.print_status:
        check_layer(args.layer, model_shape(args.model, args.trust_remote_code)[0], args.model)
        (print_todo if args.print_todo else print_status)(names, datasets, args)
        return 0
    chat = ChatFormat(load_tokenizer(args.model, args.chat_template, args.trust_remote_code))
    num_layers, hidden_size = model_shape(args.model, args.trust_remote_code)
    check_layer(args.layer, num_layers, args.model)
    if args.include_missing_scores:
        log.warning("WARNING: --include-missing-scores trains on rows that nobody scored")
    loaded = []

    def get_model():
        """The model, loaded at its first use, with the vector at its start."""
        try:
            if not loaded:
                log.info(f"loading  {args.model}")
                where = args.dtype, args.device, args.device_map
                loaded.append(load_model(args.model, args.layer, *where, args.trust_remote_code))
                if args.compile:
                    loaded[0].compile_layers()
                if args.gradient_checkpointing:
                    loaded[0].gradient_checkpointing_enable()
            if args.init_vector:
                loaded[0].load_vector(args.init_vector)
                return loaded[0]
        except ValueError as error:  # no use in trying the other datasets
            log.error(f"error: {error}")
            raise SystemExit(2) from error
        seeded = torch.Generator().manual_seed(args.seed)
        loaded[0].set_vector(ResidualHook(hidden_size, args.init_scale, seeded).vector.detach())
        return loaded[0]

    codes = []
    for name in names:
        try:
            codes.append(train_dataset(name, datasets, chat, get_model, args, laps, stop))
        except (ValueError, OSError) as error:
            log.error(f"error: {error}")
            codes.append(2)
        if stop.exit_code:
            return stop.exit_code
        laps.restart()
    return max(codes)


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    """Command line of train_steering.py; every bad flag is reported, all at once."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    df.add_data_arguments(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="Qwen/Qwen3-32B", help="HF id, local folder or .gguf file")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 where it is native")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--device-map", help="auto: spread the model over devices (needs accelerate)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add = parser.add_argument_group("steering").add_argument
    add("--layer", type=int, default=22, help="0-based decoder layer whose output gets the vector")
    add("--init-scale", type=float, default=0.0, help="start from randn(hidden_size) * this")
    add("--init-vector", metavar="FILE", help="start from this vector file of the same layer")
    add = parser.add_argument_group("optimization").add_argument
    add("--lr", default="auto", help=f"peak; auto: {AUTO_LR} x median residual norm / sqrt(n)")
    add("--lr-scheduler", default="cosine", choices=("constant", "linear", "cosine"), help="shape")
    add("--warmup-ratio", type=float, default=0.1, help="share of the steps that warm up")
    add("--batch-size", type=int, default=2, help="a step takes this many rows ...")
    add("--gradient-accumulation", type=int, default=1, help="... times this")
    add("--num-epochs", type=int, default=4, help="passes over the training rows")
    add("--max-steps", type=int, help="in place of --num-epochs; 0: --init-vector, as a run")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm; 0: off")
    add("--val-fraction", type=float, default=0.1, help="share of training questions to validate")
    add("--val-every", type=int, help="steps between validations; default: half an epoch")
    add("--patience", type=int, help="stop after this many validations without a better one")
    add = parser.add_argument_group("speed and memory").add_argument
    add("--micro-batch-tokens", type=int, default=1024, help="padded tokens a forward pass")
    where = ("auto", "device", "host", "off")
    add("--prefix-cache", default="auto", choices=where, help="keep what layers 0..--layer give")
    add("--gradient-checkpointing", action="store_true", help="less memory for more time")
    add("--compile", action="store_true", help="torch.compile the layers above --layer")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", default="runs", help="root of the run folders")
    add("--run-name", help="subfolder for a second setting on the same dataset")
    add("--save-every", type=int, default=10, help="steps between checkpoints")
    add("--keep-checkpoints", type=int, default=3, help="newest checkpoints to keep")
    add("--print-todo", action="store_true", help="only print the datasets that are not done yet")
    add("--print-status", action="store_true", help="only print how far the datasets are")
    add("--restart", action="store_true", help="begin anew, keeping the old files in old-<n>/")
    args = parser.parse_args(argv)
    if Path(args.model).exists():  # one spelling, one run folder: "models/x/" is "models/x"
        args.model = os.path.normpath(args.model)
    if problems := [*df.check_data_arguments(args), *check_arguments(args)]:
        parser.error("; ".join(problems))
    return args


def check_arguments(args):
    """What is wrong with the options beyond the data, as messages; turns --lr into a number."""
    problems = []
    if not (args.dataset or args.list_file):
        problems.append("name what to train on: --dataset NAME ... or --list-file FILE")
    counts = ("batch_size", "gradient_accumulation", "num_epochs", "max_steps", "patience")
    counts += ("micro_batch_tokens", "val_every", "save_every", "keep_checkpoints")
    for key in counts:
        least = 0 if key == "max_steps" and args.init_vector else 1
        if (value := getattr(args, key)) is not None and value < least:
            problems.append(f"--{key.replace('_', '-')} {value}: must be at least {least}")
    for key in ("val_fraction", "warmup_ratio"):
        if not 0 <= (value := getattr(args, key)) < 1:
            problems.append(f"--{key.replace('_', '-')} {value}: not in [0, 1)")
    for key in ("max_grad_norm", "init_scale"):
        if not 0 <= (value := getattr(args, key)) < math.inf:
            problems.append(f"--{key.replace('_', '-')} {value}: must be 0 or above, and finite")
    if args.lr != "auto":
        with contextlib.suppress(ValueError):
            args.lr = float(args.lr)
        if isinstance(args.lr, str) or not 0 < args.lr < math.inf:
            problems.append(f'--lr {args.lr}: must be "auto" or a number above 0')
    if args.run_name and not re.fullmatch(r"(?!old-)\w[\w.+-]*", args.run_name):
        problems.append(f'--run-name "{args.run_name}": use letters, digits, "_.+-"; not "old-..."')
    return problems


def main(argv=None):
    """Command line entry; returns the exit code."""
    laps = Laps()
    laps.lap("import")
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    log.setLevel(logging.INFO)
    log.handlers[:] = [Console()]
    logging.raiseExceptions = False  # a full disk or a closed console must not stop a run
    try:
        return run(args, laps, StopRequest())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
