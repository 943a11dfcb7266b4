"""Train one steering vector per persona dataset: a frozen chat model, hidden_size numbers to fit.

    python train_steering.py --data-root DATA --dataset gemma-2-27b__role__pirate --layer 22
    python train_steering.py --data-root DATA --list-file roles.txt --model Qwen/Qwen3-32B
    make demo                                                           # smallest real run

Exit codes: 0 done or nothing to do, 1 a run failed, 2 bad input, 75 stopped by SIGTERM/SIGUSR1
after a checkpoint (start again to go on), 130 Ctrl-C. Several datasets: the worst code counts.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from tqdm import tqdm

import data_filter
from hook_model import ResidualHook, load_model
from steering import (
    fast_path,
    loading,
    memory,
    ranks,
    run_folder,
    run_state,
    teacher,
    vector_file,
)
from steering.chat_format import label_count, micro_batches
from steering.command_line import count_or_word, exit_code, new_parser, number_or_word, parse
from steering.data_layouts import data_digest, requested_names
from steering.vector_file import VECTOR_FILE

AUTO_LR = 0.05  # --lr auto, in units of median residual norm / sqrt(hidden_size)
AUTO_STEPS, AUTO_EPOCHS = 150, 4  # without --num-epochs: what makes so many steps, so many at most
TEACHER_WEIGHT = 0.5  # share of --teacher in the loss
# Options that do not change the vector: not in the config that decides "done" and "may resume".
NOT_IN_CONFIG = """
    data_root dataset list_file source_model kind strict chat_template device device_map compile
    tensor_parallel gradient_checkpointing prefix_cache micro_batch_tokens save_every
    keep_checkpoints restart accept_code_change plan plan_memory plan_tflops print_todo
    print_status output_dir run_name trust_remote_code seeds
"""
log = logging.getLogger("steering")


class NoVector(RuntimeError):
    """A training that leads to no vector, whichever machine it is tried on."""


def token_loss(logits, targets):
    """What training minimizes, and validates by: next-token cross-entropy in nats.
    logits: (N, V); targets: (N,); returns (N,), each of its own logits only. Reported NLLs are
    those of evaluation/measures.py and do not change with it."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def teacher_loss(logits, targets, tokens, log_probs):
    """--teacher: TEACHER_WEIGHT x KL(teacher || model) + the rest x token_loss, in nats a token.
    logits: (N, V); targets: (N,); tokens, log_probs: (N, K) of the teacher; returns (N,)."""
    kl = teacher.divergence(logits, tokens, log_probs)
    return TEACHER_WEIGHT * kl + (1 - TEACHER_WEIGHT) * token_loss(logits, targets)


def lr_factor(step, total, warmup, kind):
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": cosine}[kind]


def epochs_of(args, steps_per_epoch):
    """How many passes over the rows are made."""
    return args.num_epochs or min(AUTO_EPOCHS, math.ceil(AUTO_STEPS / steps_per_epoch))


# ------------------------------------------------------------------ the loop


def train(model, train_set, val_set, folder, state, args, laps, stop, taught=()):
    """Fit `model.steering` on Examples, going on from a checkpoint's state if that has a step.
    state: what `run_state.start_state` gives, kept in every checkpoint; taught: the examples of
    train_set as --teacher sees them. Returns final numbers, or None if a signal stopped
    it after a checkpoint. The vector left in the model is the best of all validations.
    NoVector: loss or gradient is not finite, or no validation beats the start."""
    steering, parameters = model.steering, list(model.steering.parameters())
    rows_per_step = args.batch_size * args.gradient_accumulation
    steps_per_epoch = math.ceil(len(train_set) / rows_per_step)
    total = args.max_steps or epochs_of(args, steps_per_epoch) * steps_per_epoch
    warmup = int(args.warmup_ratio * total)
    val_every = args.val_every or math.ceil(steps_per_epoch / 2)
    max_tokens = args.micro_batch_tokens
    if max_tokens == "auto":  # what fits now; when the run goes on, the same again
        if "micro_batch_tokens" not in state:
            state["micro_batch_tokens"] = automatic_tokens(args, model.input_device)
        max_tokens = state["micro_batch_tokens"]
        log.info(f"forward  passes of at most {max_tokens:,} tokens")
    shuffle = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    # Resume: one file holds the whole state.
    resumed = "step" in state
    if resumed:
        steering.load_state_dict(state["steering"])
        optimizer.load_state_dict(state["optimizer"])
        shuffle.set_state(state["shuffle"])
        log.info(f"resume   after step {state['step']} of {total}")
    else:
        state |= {"step": 0, "epoch": 0, "position": 0, "label_tokens": 0, "seconds": 0.0}
        state |= {"best_step": 0, "best_val": None, "bad_validations": 0}
        state["order"] = torch.randperm(len(train_set), generator=shuffle)
        state["best"] = {name: t.clone() for name, t in steering.state_dict().items()}
    run_folder.trim_metrics(folder / "metrics.jsonl", state["step"] if resumed else -1)

    # The loss, and what the teacher predicts.
    fast = fast_path.FastPath(model)
    losses = plain = functools.partial(fast.losses, token_loss=token_loss)
    if taught:
        known = teacher.predictions(fast, train_set, taught, max_tokens)
        losses = functools.partial(fast.losses, token_loss=teacher_loss, known=known)
        laps.lap("teacher")

    # Layers 0..k never see the vector: run them once for every row that comes up more than once.
    rows_seen_twice = [*(train_set if total > steps_per_epoch else []), *val_set]
    fast.cache_prefix(rows_seen_twice, args.prefix_cache, max_tokens)
    if not resumed:
        state["residual_norm"] = fast.median_residual_norm(train_set[:8])
    laps.lap("prefix")

    # What is about to happen.
    lr_unit = state["residual_norm"] / math.sqrt(model.hidden_size)
    peak_lr = AUTO_LR * lr_unit if args.lr == "auto" else args.lr
    log.info(f"steering layer {model.layer} | median residual norm {state['residual_norm']:.4g}")
    in_units = f"{peak_lr / lr_unit:.3g} x norm/sqrt(n)"
    log.info(f"lr       {peak_lr:.3g} = {in_units}, {args.lr_scheduler}")
    epoch_tokens = sum(len(example.input_ids) for example in train_set)
    log.info(
        f"steps    {total} of {rows_per_step} rows ({args.batch_size} x "
        f"{args.gradient_accumulation}), {steps_per_epoch} an epoch of {epoch_tokens:,} tokens"
    )
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in laps.items())
    log.info(f"ready    after {sum(laps.values()):.1f} s: {phases}")

    def validate():
        loss = ranks.agree(fast_path.token_mean(plain, val_set, max_tokens))
        if state["best_val"] is None or loss < state["best_val"]:
            state["best"] = {name: t.clone() for name, t in steering.state_dict().items()}
            state.update(best_val=loss, best_step=state["step"], bad_validations=0)
        else:
            state["bad_validations"] += 1
        print(json.dumps({"step": state["step"], "val_loss": loss}), file=metrics, flush=True)
        return f"val {loss:.4f} | "

    def checkpoint():
        os.fsync(metrics.fileno())
        weights = {"steering": steering.state_dict(), "optimizer": optimizer.state_dict()}
        state.update(weights, shuffle=shuffle.get_state())
        run_folder.save_checkpoint(folder, state, args.keep_checkpoints)

    def out_of_patience():
        return args.patience is not None and state["bad_validations"] >= args.patience

    quiet = ranks.rank() > 0 or None  # None: where there is no terminal
    bar = tqdm(total=total, initial=state["step"], unit="step", disable=quiet)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics, bar:
        if val_set and not resumed:
            log.info(f"step {0:05d}/{total:05d} | {validate()}before training")
        while state["step"] < total and not out_of_patience():
            started = time.perf_counter()

            # Rows of this step; the smaller window at the end of an epoch is trained on too.
            if state["position"] >= len(train_set):
                state["order"] = torch.randperm(len(train_set), generator=shuffle)
                state["epoch"], state["position"] = state["epoch"] + 1, 0
            window = state["order"][state["position"] : state["position"] + rows_per_step]
            batch = [train_set[i] for i in window.tolist()]
            label_tokens = sum(map(label_count, batch))

            # Gradient accumulation: loss summed over label tokens / label tokens of the whole step,
            # since a mean of micro-batch means would weigh short rows more.
            try:
                step_loss = 0.0
                for rows in micro_batches(batch, max_tokens):
                    loss = losses(rows).sum() / label_tokens
                    loss.backward()
                    step_loss += loss.detach()
            except Exception as error:  # out of memory: the same step again, in smaller pieces
                single = all(len(rows) == 1 for rows in micro_batches(batch, max_tokens))
                if single or ranks.size() > 1 or not memory.is_out_of_memory(error):
                    raise
                max_tokens = state["micro_batch_tokens"] = max_tokens // 2
                log.warning(f"WARNING: out of memory, now --micro-batch-tokens {max_tokens}")
                optimizer.zero_grad()
                loss = None  # and with it what its graph holds
                continue

            # Update; nothing has touched the vector yet if this raises.
            ranks.share_gradients(parameters)
            step_loss = step_loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf).item()  # not clipped
            if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
                raise NoVector(
                    f"step {state['step'] + 1}: loss {step_loss}, gradient norm {grad_norm}. "
                    "Try a lower --lr, a higher --warmup-ratio, or --dtype fp32"
                )
            lr = peak_lr * lr_factor(state["step"], total, warmup, args.lr_scheduler)
            for group in optimizer.param_groups:  # whose own "lr" is replaced; "factor": if any
                group["lr"] = lr * group.get("factor", 1.0)
            optimizer.step()
            optimizer.zero_grad()

            # Account, validate, log.
            seconds = time.perf_counter() - started
            state["step"], state["position"] = state["step"] + 1, state["position"] + len(batch)
            state["label_tokens"] += label_tokens
            state["seconds"] += seconds
            tokens = sum(len(example.input_ids) for example in batch)
            norm = steering.added().detach().norm().item()
            row = {
                "step": state["step"], "epoch": state["epoch"], "loss": step_loss, "lr": lr,
                "grad_norm": grad_norm, "vector_norm": norm, "label_tokens": label_tokens,
                "tokens": tokens, "seconds": round(seconds, 4), "time": time.time(),
            }  # fmt: skip
            print(json.dumps(row), file=metrics, flush=True)
            last = state["step"] == total
            val = validate() if val_set and (last or state["step"] % val_every == 0) else ""
            log.info(
                f"step {state['step']:05d}/{total:05d} | loss {step_loss:.4f} | {val}lr {lr:.1e} | "
                f"|v| {norm:.2f} ({norm / state['residual_norm']:.2f} of residual) | "
                f"label_tok {state['label_tokens']:,} | tok/s {tokens / seconds:,.0f} | "
                f"{run_folder.peak_memory():.1f} GiB"
            )
            bar.update()

            # Checkpoint, and leave if a signal came in during the step.
            stopped = ranks.agree(stop.exit_code)
            if last or stopped or out_of_patience() or state["step"] % args.save_every == 0:
                checkpoint()
            if stopped:
                log.info(f"stopped  by a signal after step {state['step']}: start again to go on")
                return None
    if out_of_patience():
        log.info(f"stopped  early: the last {args.patience} validations were no better")
    if val_set:
        if state["best_step"] == 0:
            raise NoVector(
                f"no validation in {state['step']} steps was better than the start "
                f"({state['best_val']:.4f}). Try a lower --lr or more steps"
            )
        steering.load_state_dict(state["best"])
    norm, residual = steering.added().detach().norm().item(), state["residual_norm"]
    kept = {key: state[key] for key in ("best_step", "best_val", "label_tokens", "seconds")}
    return {
        "steps": state["step"], **kept, "lr": peak_lr, "vector_norm": norm,
        "residual_norm": residual, "ratio": norm / residual,
    }  # fmt: skip


# ------------------------------------------------------------------ one dataset


def result_config(name, args, datasets, digest):
    """Everything but the code that determines the vector, as a JSON-able dict.
    digest: `loading.model_digest` of the model."""
    config = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG.split()}
    config |= {"name": name, "data": data_digest(name, datasets), "model_digest": digest}
    config |= run_state.contents_of(args)
    config["auto_epochs"] = None if args.num_epochs or args.max_steps else [AUTO_STEPS, AUTO_EPOCHS]
    config |= {"teacher_weight": TEACHER_WEIGHT} if args.teacher else {}
    return config | ({"auto_lr": AUTO_LR} if args.lr == "auto" else {})


def train_dataset(name, folder, config, datasets, chat, get_model, args, laps, stop):
    """Train one dataset in its run folder; returns the exit code. ValueError: bad input."""
    defaults = option_defaults()
    if not args.restart and run_state.is_done(folder, config, defaults):
        if changed := run_state.changed_since(folder):
            log.warning(f"WARNING: {name} is done, but by other code: {', '.join(changed)}")
        log.info(f"{name}: done already, {folder}")
        return 0
    if run_folder.is_locked(folder) or run_state.failed_meanwhile(folder):
        log.info(f"{name}: skipped, another process works in {folder}, or just failed there")
        return 0
    if not args.restart:  # a run goes on with the date that its prompts began with
        chat = chat.at(vector_file.read_json(folder / "run.json").get("date"))
    splits = data_filter.split_dataset(name, datasets, chat, data_filter.DataOptions.of(vars(args)))
    filtered = splits.filtered
    for problem in filtered.problems[:10]:
        log.warning(f"WARNING: {problem}")
    if (more := len(filtered.problems) - 10) > 0:
        log.warning(f"WARNING: ... and {more} more broken lines")
    if not filtered.is_baseline and not sum(map(label_count, splits.train)):
        raise ValueError(f"{name}: no example left to train on. {filtered.counts()}")
    if args.teacher and splits.train:
        splits.taught = teacher.teacher_examples(chat, splits.train, args.teacher)
    laps.lap("tokenize")
    with run_folder.lock_folder(folder) as held:
        if not held or (not args.restart and run_state.is_done(folder, config, defaults)):
            log.info(f"{name}: another process was faster, {folder}")  # while the data was read
            return 0
        if args.restart:
            run_folder.set_aside(folder)
        state = run_state.start_state(folder, config, defaults, args.accept_code_change)
        record = run_state.new_record(folder, name, config, state, vars(args))
        record |= {"counts": splits.counts(), "date": chat.date, "end_of_turn": chat.end_of_turn}
        if not splits.train:
            log.info(f"{name}: skipped, no examples: no scores ({filtered.counts()})")
            vector_file.write_json(folder / "run.json", record | {"status": "skipped"})
            return 0
        with run_folder.log_file(folder / "train.log"):
            try:
                return fill_folder(folder, record, state, splits, get_model, args, laps, stop)
            except Exception as error:  # whatever it was, the next dataset may do better
                log.exception(f"FAILED   {name}: {error} (traceback in {folder / 'train.log'})")
                failed = {"status": "failed", "error": str(error)}
                with contextlib.suppress(OSError, ValueError):  # the disk may be full
                    vector_file.write_json(folder / "run.json", record | failed)
                if ranks.size() > 1 and not isinstance(error, NoVector | ValueError):
                    raise SystemExit(1) from error  # the others may be anywhere: torchrun ends them
                return 1
            finally:
                stop.in_loop = False


def fill_folder(folder, record, state, splits, get_model, args, laps, stop):
    """Train and write run.json (`record`), then the vector, which exists only if all went well."""
    if record["attempts"] > run_state.ATTEMPTS:
        raise NoVector(f"its process died {run_state.ATTEMPTS} times in a row")
    train_set, val_set = splits.train, splits.validation
    ranks.agree((vars(args), train_set, val_set, state, splits.taught))
    model, started = get_model(), time.time()  # no model, no run.json
    laps.lap("load")
    vector_file.write_json(folder / "run.json", record)
    log.info(f"dataset  {record['dataset']}: {record['counts']['summary']}")
    log.info(f"examples {len(train_set)} to train on, {len(val_set)} to validate on (by question)")
    under = splits.tokens < args.target_tokens and "WARNING: under budget, on what there is:"
    log.info(f"{under or 'budget  '} {splits.tokens:,} of --target-tokens {args.target_tokens:,}")
    if not val_set:
        log.warning("WARNING: no validation questions: the last vector is kept, not the best")
    n = [sum(p.numel() for p in part.parameters()) for part in (model.model, model.steering)]
    where = f"{record['config']['dtype']} on {model.input_device}, {len(model.layers)} layers"
    log.info(f"model    {args.model}: {where}, parameters: {n[0]:,} frozen, {n[1]:,} trained")
    stop.in_loop = True
    final = train(model, train_set, val_set, folder, state, args, laps, stop, splits.taught)
    record["startup"] = dict(laps)
    if final is None:
        vector_file.write_json(folder / "run.json", record | {"status": "stopped"})
        return stop.exit_code
    record |= {"status": "done", "final": final, "wall_seconds": round(time.time() - started, 1)}
    vector_file.write_json(folder / "run.json", record)
    model.save_vector(folder / VECTOR_FILE, **run_state.vector_header(record))
    best = f"best val {final['best_val']:.4f} at step {final['best_step']}, " if val_set else ""
    log.info(f"done     {best}|v| {final['vector_norm']:.2f}: {folder / VECTOR_FILE}")
    return 0


# ------------------------------------------------------------------ many datasets


def prepared_model(args, loaded):
    """The model, with the vector at its start. loaded: a list that holds it from the first use on.
    Raises SystemExit if it does not load, since then no dataset can be trained."""
    try:
        if not loaded:
            log.info(f"loading  {args.model}")
            where = args.dtype, args.device, args.device_map, args.trust_remote_code
            kind = {"quantize": args.quantize, "tensor_parallel": args.tensor_parallel}
            loaded.append(load_model(args.model, args.layer, *where, **kind))
            if args.compile:
                fast_path.compile_layers(loaded[0])
            if args.gradient_checkpointing:
                fast_path.checkpoint_layers(loaded[0])
        seeded = torch.Generator().manual_seed(args.seed)
        start = ResidualHook(loaded[0].hidden_size, args.init_scale, seeded)
        loaded[0].steering.load_state_dict(start.state_dict())
        if args.init_vector:
            loaded[0].load_vector(args.init_vector)
    except ValueError as error:
        log.error(f"error: {error}")
        raise SystemExit(2) from error
    return loaded[0]


def follow(stop):
    """--tensor-parallel, all ranks but the first: train what rank 0 trains; returns 0."""
    loaded, stop.in_loop = [], True  # when to stop, rank 0 says
    for options, train_set, val_set, state, taught in ranks.jobs():
        model = prepared_model(args := Namespace(**options), loaded)
        alike = contextlib.suppress(NoVector, ValueError)  # what rank 0 meets too
        with tempfile.TemporaryDirectory() as folder, alike:
            laps = run_folder.Laps()
            train(model, train_set, val_set, Path(folder), state, args, laps, stop, taught)
    return 0


def run(args, laps, stop):
    """Train every requested dataset under each seed, with one model load; the worst exit code."""
    name, codes, loaded = args.run_name, [], []
    for seed in range(args.seed, args.seed + args.seeds):
        args.seed = seed
        if args.seeds > 1:  # a folder each
            args.run_name = f"{name}-seed{seed}" if name else f"seed{seed}"
        codes.append(run_datasets(args, laps, stop, loaded))
        if stop.exit_code:
            return stop.exit_code
    return max(codes)


def run_datasets(args, laps, stop, loaded):
    """`run` for one seed. loaded: a list that holds the model once it has been needed."""
    datasets = data_filter.DataOptions.of(vars(args)).datasets()
    names = requested_names(datasets, args.dataset, args.list_file, args.source_model, args.kind)
    if not args.print_status:  # which starts without transformers
        num_layers, _ = loading.model_shape(args.model, args.trust_remote_code)
        loading.check_layer(args.layer, num_layers, args.model)
    digest = loading.model_digest(args.model)
    config_of = functools.partial(result_config, args=args, datasets=datasets, digest=digest)
    where = args.output_dir, args.model, args.layer
    folders = {name: run_folder.run_path(*where, name, args.run_name) for name in names}
    if args.print_todo or args.print_status:
        run_state.print_progress(folders, config_of, option_defaults(), args.print_todo)
        return 0
    chat = loading.load_chat(args.model, args.chat_template, args.trust_remote_code)
    if not chat.end_of_turn:
        log.warning("WARNING: no special token ends a turn in the template: no stop is trained")
    if args.include_missing_scores:
        log.warning("WARNING: --include-missing-scores trains on rows that nobody scored")

    get_model = functools.partial(prepared_model, args, loaded)
    if ranks.size() > 1:  # what ended all ranks once comes last
        failed = run_state.failed_ones(folders)
        names.sort(key=lambda name: name in failed)
    codes = []
    for name in names:
        try:
            about = name, folders[name], config_of(name), datasets
            codes.append(train_dataset(*about, chat, get_model, args, laps, stop))
        except (ValueError, OSError) as error:
            log.error(f"error: {error}")
            codes.append(2)
        except Exception as error:  # of whatever is in the data: the next dataset may do better
            log.exception(f"FAILED   {name}: {error!r}")
            codes.append(1)
        if stop.exit_code:
            return stop.exit_code
        laps.lap("over")
        laps.clear()
    return max(codes)


def plan_for(args, dtype):
    """The Plan of training a vector on args.model, from its config."""
    from steering.plan import Plan

    fake = load_model(args.model, args.layer, dtype, "fake", None, args.trust_remote_code)
    return Plan(fake, token_loss)


def automatic_tokens(args, device):
    """--micro-batch-tokens auto: what fits on all ranks now, the weights being there."""
    dtype = loading.pick_dtype(args.dtype, device.type)
    tokens = plan_for(args, dtype).tokens_now(device, args.gradient_checkpointing)
    return ranks.least(tokens)


def print_plan(args):
    """--plan: print what training would take; returns the exit code."""
    steps = args.target_tokens / 400 / args.batch_size / args.gradient_accumulation  # of such rows
    epochs = args.max_steps / steps if args.max_steps else epochs_of(args, math.ceil(steps))
    names = requested_names({}, args.dataset, args.list_file) or ["one"]
    plan_for(args, args.dtype).show(args, epochs, len(names) * args.seeds)
    return 0


# ------------------------------------------------------------------ command line


def make_parser():
    """The command line of train_steering.py."""
    parser = new_parser(__doc__)
    data_filter.add_data_arguments(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="Qwen/Qwen3-32B", help="HF id, local folder or .gguf file")
    add("--dtype", default="auto", choices=("auto", *loading.DTYPES), help="auto: native bf16")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--device-map", help="auto: spread the model over devices (needs accelerate)")
    text = "share the model between the processes of torchrun"
    add("--tensor-parallel", action="store_true", help=text)
    text = "bits of the frozen weights, by bitsandbytes; 8bit: without cache, slow"
    add("--quantize", default="none", choices=loading.QUANTIZE, help=text)
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add = parser.add_argument_group("steering").add_argument
    add("--layer", type=int, default=22, help="0-based decoder layer whose output gets the vector")
    add("--init-scale", type=float, default=0.0, help="start from randn(hidden_size) * this")
    add("--init-vector", metavar="FILE", help="start from this vector file of the same layer")
    add = parser.add_argument_group("optimization").add_argument
    text = f"peak; auto: {AUTO_LR} x median residual norm / sqrt(hidden_size)"
    add("--lr", type=number_or_word, default="auto", help=text)
    add("--lr-scheduler", default="cosine", choices=("constant", "linear", "cosine"), help="of lr")
    add("--warmup-ratio", type=float, default=0.1, help="share of the steps that warm up")
    add("--batch-size", type=int, default=2, help="rows of a step, times --gradient-accumulation")
    add("--gradient-accumulation", type=int, default=1, help="factor on --batch-size")
    text = f"passes over the rows; default: for {AUTO_STEPS} steps, at most {AUTO_EPOCHS} passes"
    add("--num-epochs", type=int, help=text)
    add("--max-steps", type=int, help="optimizer steps, in place of --num-epochs")
    add("--val-fraction", type=float, help="share of the training questions to validate on")
    add("--val-every", type=int, help="steps between validations; default: half an epoch")
    add("--patience", type=int, help="stop after this many validations without a better one")
    text = "fit also to what the plain model predicts with the persona, or examples, in its prompt"
    add("--teacher", choices=teacher.KINDS, help=text)
    add = parser.add_argument_group("speed and memory").add_argument
    text = "padded tokens a forward pass; auto: what --plan says"
    add("--micro-batch-tokens", type=count_or_word, default=1024, metavar="N", help=text)
    where = ("auto", "device", "host", "off")
    add("--prefix-cache", default="auto", choices=where, help="place of what layers 0..k give")
    add("--gradient-checkpointing", action="store_true", help="less memory for more time")
    add("--compile", action="store_true", help="torch.compile the layers above --layer")
    add("--plan", action="store_true", help="only print what training takes, from the config")
    add("--plan-memory", type=float, default=80.0, help="GiB of a device to plan for")
    add("--plan-tflops", type=float, default=400.0, help="its TFLOP/s: 40%% of an H100's in bf16")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", default="runs", help="root of the run folders")
    add("--run-name", help="subfolder for a second setting on the same dataset")
    add("--seeds", type=int, default=1, metavar="N", help="from --seed on, in subfolders seed<k>")
    add("--save-every", type=int, default=10, help="steps between checkpoints")
    add("--keep-checkpoints", type=int, default=3, help="newest checkpoints to keep")
    add("--print-todo", action="store_true", help="only print the datasets that are not done yet")
    add("--print-status", action="store_true", help="only print how far the datasets are")
    add("--restart", action="store_true", help="begin anew, keeping the old files in old-<n>/")
    add("--accept-code-change", action="store_true", help="go on with a run of other code")
    return parser


@functools.cache
def option_defaults():
    """{option: default}: what run.json means that was written before an option existed."""
    return vars(make_parser().parse_args([]))


def parse_args(argv=None):
    """Parsed and checked options; every bad one is reported, all at once."""
    counts = "batch_size gradient_accumulation num_epochs max_steps patience micro_batch_tokens"
    counts += " val_every save_every keep_checkpoints seeds"
    bounds = {**data_filter.DATA_BOUNDS, "size": "init_scale"}
    bounds["count"] += f" {counts}"
    bounds["share"] += " val_fraction warmup_ratio"
    return parse(make_parser(), argv, bounds, check_arguments)


def check_arguments(args):
    """(whether something is wrong, what) of the options beyond their bounds."""
    name = args.run_name is None or re.fullmatch(r"(?!old-)\w[\w.+-]*", args.run_name)
    listed, number = args.dataset or args.list_file, isinstance(args.lr, float)
    lr = 0 < args.lr < math.inf if number else args.lr == "auto"
    return [
        (not lr, f'--lr {args.lr}: must be "auto" or a number above 0'),
        (
            not listed and not args.plan,
            "name what to train on: --dataset NAME ... or --list-file FILE",
        ),
        (
            args.tensor_parallel and (args.device_map or args.quantize != "none"),
            "--tensor-parallel goes without --device-map and --quantize",
        ),
        (
            args.plan and (args.tensor_parallel or args.device_map or args.quantize == "8bit"),
            "--plan is for one device, and for bf16 or --quantize 4bit",
        ),
        (
            args.plan and not (0 < args.plan_tflops < math.inf and 0 < args.plan_memory < math.inf),
            "--plan-tflops and --plan-memory must be above 0",
        ),
        (args.patience and not args.val_fraction, "--patience needs --val-fraction above 0"),
        (args.max_steps == 0, "to evaluate a vector as it is: eval_steering.py --vector FILE"),
        (args.teacher and args.keep_system_prompt, "--teacher is for prompts without the persona"),
        (not name, f'--run-name "{args.run_name}": use letters, digits, "_.+-"; not "old-..."'),
    ]


def main(argv=None):
    """Command line entry; returns the exit code."""
    laps = run_folder.Laps()
    laps.lap("import")
    args = parse_args(argv)
    log.setLevel(logging.INFO)
    log.handlers[:] = [run_folder.Console()]
    logging.raiseExceptions = False  # a full disk or a closed console must not stop a run
    if args.plan:
        return exit_code(print_plan, args)
    stop = run_folder.StopRequest()
    if args.tensor_parallel and (code := exit_code(ranks.start, loading.pick_device(args.device))):
        return code
    if ranks.rank():
        log.setLevel(logging.ERROR)
        return follow(stop)
    code = exit_code(run, args, laps, stop)
    ranks.agree(None)
    return code


if __name__ == "__main__":
    sys.exit(main())
