"""Train one steering vector per persona dataset: a frozen chat model, hidden_size numbers to fit.

    python train_steering.py --data-root DATA --dataset gemma-2-27b__role__pirate --layer 22
    python train_steering.py --data-root DATA --list-file roles.txt --model Qwen/Qwen3-32B
    make demo                                                           # smallest real run

Exit codes: 0 done or nothing to do, 1 a run failed, 2 bad input, 75 stopped by SIGTERM/SIGUSR1
after a checkpoint (start again to go on), 130 Ctrl-C. Several datasets: the worst code counts.
"""

import contextlib
import logging
import math
import re
import sys
import time
from dataclasses import dataclass, replace

import torch

import data_filter
from hook_model import ResidualHook, load_from_options
from steering import fast_path, memory, ranks
from steering.chat_format import label_count, micro_batches
from steering.command_line import count_or_word, exit_code, new_parser, number_or_word, parse
from steering.data_layouts import requested_names
from steering.loading import LoadOptions, add_load_arguments, pick_device, pick_dtype
from steering.plan import Plan
from steering.process import StopRequest, start_logging
from steering.run import NoVector
from steering.sweep import Sweep

AUTO_LR = 0.05  # --lr auto, in units of median residual norm / sqrt(hidden_size)
AUTO_STEPS = 150  # without --num-epochs, the passes over the rows that make so many steps
AUTO_EPOCHS = 4  # are made, but at most so many passes
ROW_TOKENS = 400  # a row's length that --plan counts steps by
# Options that are not compared by value to tell whether a run is the same: they do not change the
# vector, or `Sweep.config` puts what they stand for in their place.
NOT_IN_CONFIG = """
    data_root dataset list_file source_model kind only limit strict chat_template device device_map
    compile tensor_parallel gradient_checkpointing prefix_cache micro_batch_tokens save_every
    restart accept_code_change plan plan_memory plan_tflops write_todo print_status output_dir
    run_name trust_remote_code seeds
"""
log = logging.getLogger("steering")


# ------------------------------------------------------------------ what is optimized, and how


def token_loss(logits, targets):
    """What training minimizes, and validates by: next-token cross-entropy in nats.
    logits: (N, V); targets: (N,); returns (N,). It sees some label tokens of a step at a time, so
    each number must depend on its own token alone; what does not belongs into `extra_loss`.
    Reported NLLs are those of evaluation/likelihood.py and do not change with it."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def extra_loss(model, batch):
    """A penalty, added once a step to the mean of token_loss: a scalar tensor, or None.
    Autograd takes its gradient. The loss that is logged includes it; the validation loss, which
    chooses the vector, does not. model: the SteerModel; batch: the step's Examples."""
    return None


def make_optimizer(parameters, lr):
    """The optimizer of the vector. lr: the peak; each group's own follows the schedule from it."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def lr_factor(step, total, warmup, kind):
    """Share of the peak learning rate at 0-based `step`: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": cosine}[kind]


@dataclass
class Schedule:
    """How many optimizer steps a training takes, and when it validates."""

    rows_per_step: int
    steps_per_epoch: int
    total: int
    warmup: int
    val_every: int


def make_schedule(args, row_count):
    """The Schedule of a number of training rows; the last, smaller step of an epoch counts too."""
    rows_per_step = args.batch_size * args.gradient_accumulation
    steps_per_epoch = math.ceil(row_count / rows_per_step)
    epochs = args.num_epochs or min(AUTO_EPOCHS, math.ceil(AUTO_STEPS / steps_per_epoch))
    total = args.max_steps or epochs * steps_per_epoch
    warmup = int(args.warmup_ratio * total)
    val_every = args.val_every or math.ceil(steps_per_epoch / 2)
    return Schedule(rows_per_step, steps_per_epoch, total, warmup, val_every)


# ------------------------------------------------------------------ the loop


def train(model, train_set, val_set, args, run):
    """Fit `model.steering` on Examples, going on from `run.state` if that is of a checkpoint.
    Returns the final numbers, or None if a signal stopped it after a checkpoint. The vector that is
    left in the model is the best of all validations. NoVector: loss or gradient is not finite, or
    no validation beats the start. ValueError: a loss or a hook that is not what it must be."""
    state = run.state
    steering = model.steering
    parameters = list(steering.parameters())
    schedule = make_schedule(args, len(train_set))
    max_tokens = micro_batch_tokens(args, model, state)
    fast = fast_path.FastPath(model, run.known_states, run.other_layers)

    # Layers 0..k never see the vector: run them once for every row that comes up more than once,
    # and where the vector is trained at other layers next, up to the highest of those.
    started = time.perf_counter()
    rows_seen_twice = list(val_set)
    if schedule.total > schedule.steps_per_epoch:
        rows_seen_twice = [*train_set, *val_set]
    fast.cache_prefix(rows_seen_twice, args.prefix_cache, max_tokens)
    run.known_states = fast.caches
    if state.residual_norm is None:
        state.residual_norm = fast.median_residual_norm(train_set[:8])
    fast.check_token_loss(token_loss, train_set)
    prefix_seconds = time.perf_counter() - started

    # Adam moves each number by about one rate a step, so how far a rate carries the vector depends
    # on how long the states are that it is added to.
    lr_unit = state.residual_norm / math.sqrt(model.hidden_size)
    optimizer = make_optimizer(parameters, AUTO_LR * lr_unit if args.lr == "auto" else args.lr)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    shuffle = torch.Generator().manual_seed(args.seed)
    if run.resumed:
        restore(state, steering, optimizer, shuffle)
    else:
        state.order = torch.randperm(len(train_set), generator=shuffle)
        state.best = copy_of(steering)
    log_settings(model, run, schedule, peak_lrs[0])

    with run.open_metrics(schedule.total):
        if val_set and not run.resumed:
            run.log({"step": 0, "val_loss": validate(fast, val_set, max_tokens, state)})
        while state.step < schedule.total and not out_of_patience(args, state):
            started = time.perf_counter()

            # Rows of this step; the smaller window at the end of an epoch is trained on too.
            if state.position >= len(train_set):
                state.order = torch.randperm(len(train_set), generator=shuffle)
                state.epoch += 1
                state.position = 0
            window = state.order[state.position : state.position + schedule.rows_per_step]
            batch = [train_set[i] for i in window.tolist()]
            label_tokens = sum(map(label_count, batch))

            # Gradient accumulation: loss summed over label tokens / label tokens of the whole step,
            # since a mean of micro-batch means would weigh short rows more.
            try:
                step_loss = 0.0
                for rows in micro_batches(batch, max_tokens):
                    loss = fast.losses(rows, token_loss).sum() / label_tokens
                    loss.backward()
                    step_loss += loss.detach()
                penalty = extra_loss(model, batch)
                if penalty is not None:
                    penalty.backward()
                    step_loss += penalty.detach()
            except Exception as error:
                # Memory that ran out is no end: the same step again, in smaller pieces.
                if not may_be_halved(batch, max_tokens, error):
                    raise
                max_tokens //= 2
                state.micro_batch_tokens = max_tokens
                log.warning(f"WARNING: out of memory, now --micro-batch-tokens {max_tokens}")
                optimizer.zero_grad()
                loss = None  # The graph of the failed pass is freed with its last tensor.
                continue

            # Update.
            ranks.share_gradients(parameters)
            step_loss = step_loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf).item()  # not clipped
            if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
                # Nothing has touched the vector yet, and the last checkpoint holds.
                raise NoVector(
                    f"step {state.step + 1}: loss {step_loss}, gradient norm {grad_norm}. "
                    "Try a lower --lr, a higher --warmup-ratio, or --dtype fp32"
                )
            factor = lr_factor(state.step, schedule.total, schedule.warmup, args.lr_scheduler)
            for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak_lr * factor
            optimizer.step()
            optimizer.zero_grad()

            # Account, validate, log.
            seconds = time.perf_counter() - started
            state.step += 1
            state.position += len(batch)
            state.label_tokens += label_tokens
            state.seconds += seconds
            row = {
                "step": state.step, "epoch": state.epoch, "loss": step_loss,
                "lr": peak_lrs[0] * factor, "grad_norm": grad_norm,
                "vector_norm": steering.added().detach().norm().item(),
                "label_tokens": label_tokens, "tokens": sum(len(e.input_ids) for e in batch),
                "seconds": round(seconds, 4), "time": time.time(),
            }  # fmt: skip
            last = state.step == schedule.total
            if val_set and (last or state.step % schedule.val_every == 0):
                row["val_loss"] = validate(fast, val_set, max_tokens, state)
            run.log(row)

            # Checkpoint, and leave if a signal came in during the step: a step is never cut in two.
            stopped = run.stopped
            at_an_end = last or stopped or out_of_patience(args, state)
            if at_an_end or state.step % args.save_every == 0:
                state.vector_state = steering.state_dict()
                state.optimizer_state = optimizer.state_dict()
                state.shuffle_state = shuffle.get_state()
                run.checkpoint()
            if stopped:
                log.info(f"stopped  by a signal after step {state.step}: start again to go on")
                return None

    if state.step < schedule.total:
        log.info(f"stopped  early: the last {args.patience} validations were no better")
    keep_best(model, val_set, state)
    fast.check_vector(train_set[0])
    return final_numbers(steering, state, peak_lrs[0], prefix_seconds)


def restore(state, steering, optimizer, shuffle):
    """Put vector, optimizer and order of rows back to where a checkpoint left them."""
    steering.load_state_dict(state.vector_state)
    optimizer.load_state_dict(state.optimizer_state)
    shuffle.set_state(state.shuffle_state)


def may_be_halved(batch, max_tokens, error):
    """Whether memory ran out, and the batch can still be split into smaller passes."""
    single = all(len(rows) == 1 for rows in micro_batches(batch, max_tokens))
    return memory.is_out_of_memory(error) and not single and ranks.size() == 1


def copy_of(steering):
    """The vector's parameters as they are now, {name: tensor}."""
    return {name: tensor.clone() for name, tensor in steering.state_dict().items()}


def validate(fast, val_set, max_tokens, state):
    """Mean token_loss on the validation rows; `state` keeps the vector if it is the best so far."""

    def losses(rows):
        return fast.losses(rows, token_loss)

    loss = ranks.from_rank_0(fast_path.token_mean(losses, val_set, max_tokens))
    if state.best_val is None or loss < state.best_val:
        state.best = copy_of(fast.model.steering)
        state.best_val = loss
        state.best_step = state.step
        state.bad_validations = 0
    else:
        state.bad_validations += 1
    return loss


def out_of_patience(args, state):
    """Whether the last --patience validations were no better than one before."""
    return args.patience is not None and state.bad_validations >= args.patience


def keep_best(model, val_set, state):
    """Put the vector of the best validation into the model; NoVector if that is the start's."""
    if not val_set:
        return
    if state.best_step == 0:
        raise NoVector(
            f"no validation in {state.step} steps was better than the start "
            f"({state.best_val:.4f}). Try a lower --lr or more steps"
        )
    model.steering.load_state_dict(state.best)


def final_numbers(steering, state, peak_lr, prefix_seconds):
    """What run.json keeps of a finished training."""
    norm = steering.added().detach().norm().item()
    return {
        "steps": state.step, "best_step": state.best_step, "best_val": state.best_val,
        "label_tokens": state.label_tokens, "seconds": state.seconds,
        "prefix_seconds": round(prefix_seconds, 2), "lr": peak_lr, "vector_norm": norm,
        "residual_norm": state.residual_norm, "ratio": norm / state.residual_norm,
    }  # fmt: skip


def micro_batch_tokens(args, model, state):
    """Padded tokens of a forward pass. A run that goes on keeps what "auto", or memory that ran
    out, made of them, unless the option is smaller now."""
    asked = args.micro_batch_tokens
    if asked != "auto":
        return min(asked, state.micro_batch_tokens or asked)
    if state.micro_batch_tokens is None:
        device = model.input_device
        plan = plan_for(args, args.layer, pick_dtype(args.dtype, device.type))
        fitting = plan.tokens_now(device, args.gradient_checkpointing)
        state.micro_batch_tokens = ranks.least(fitting)
        log.info(f"forward  passes of at most {state.micro_batch_tokens:,} tokens")
    return state.micro_batch_tokens


def plan_for(args, layer, dtype):
    """The Plan of training a vector at a layer of args.model, from its config."""
    options = replace(LoadOptions.of(vars(args)), dtype=dtype, device="fake")
    return Plan(load_from_options(options, layer), token_loss)


def log_settings(model, run, schedule, peak_lr):
    """Say what is about to happen."""
    args = run.args
    norm = run.state.residual_norm
    log.info(f"steering layer {model.layer} | median residual norm {norm:.4g}")
    in_units = peak_lr / (norm / math.sqrt(model.hidden_size))
    log.info(f"lr       {peak_lr:.3g} = {in_units:.3g} x norm/sqrt(n), {args.lr_scheduler}")
    tokens = sum(len(example.input_ids) for example in run.splits.train)
    log.info(
        f"steps    {schedule.total} of {schedule.rows_per_step} rows ({args.batch_size} x "
        f"{args.gradient_accumulation}), {schedule.steps_per_epoch} an epoch of {tokens:,} tokens"
    )


# ------------------------------------------------------------------ all datasets


def split(name, datasets, chat, args):
    """The Splits of a dataset under the options of a run."""
    options = data_filter.DataOptions.of(vars(args))
    return data_filter.split_dataset(name, datasets, chat, options)


def load(args):
    """The model of all trainings, its vector at the lowest layer of --layer; ValueError if it does
    not load."""
    log.info(f"loading  {args.model}")
    model = load_from_options(LoadOptions.of(vars(args)), min(args.layer))
    if args.compile:
        fast_path.compile_layers(model)
    if args.gradient_checkpointing:
        fast_path.checkpoint_layers(model)
    return model


def set_start(model, args):
    """Put the vector at its layer and its start; ValueError if --init-vector is not of this model
    and layer."""
    model.set_layer(args.layer)
    seeded = torch.Generator().manual_seed(args.seed)
    start = ResidualHook(model.hidden_size, args.init_scale, seeded)
    model.steering.load_state_dict(start.state_dict())
    if args.init_vector:
        model.load_vector(args.init_vector)


def log_run(model, run):
    """Say what a run trains on, and what it trains."""
    args = run.args
    splits = run.splits
    log.info(f"dataset  {run.record.get('dataset')}: {splits.counts()['summary']}")
    log.info(
        f"examples {len(splits.train)} to train on, {len(splits.validation)} to validate on "
        "(by question)"
    )
    budget = f"{splits.tokens:,} of --target-tokens {args.target_tokens:,}"
    if splits.tokens < args.target_tokens:
        log.warning(f"WARNING: under budget, on what there is: {budget}")
    else:
        log.info(f"budget   {budget}")
    if not splits.validation:
        log.warning("WARNING: no validation questions: the last vector is kept, not the best")
    frozen = sum(p.numel() for p in model.model.parameters())
    trained = sum(p.numel() for p in model.steering.parameters())
    dtype = str(model.model.dtype).removeprefix("torch.")
    log.info(
        f"model    {args.model}: {dtype} on {model.input_device}, {len(model.layers)} layers, "
        f"the vector after layer {model.layer}; parameters: {frozen:,} frozen, {trained:,} trained"
    )


def train_all(args, stop):
    """Train every requested dataset under each seed, at each layer, with one model load; returns
    the worst exit code."""
    defaults = vars(make_parser().parse_args([]))
    sweep = Sweep(args, split, NOT_IN_CONFIG.split(), defaults, stop)
    if args.write_todo:
        sweep.write_todo(args.write_todo)
        return 0
    if args.print_status:
        sweep.print_status()
        return 0
    model = None
    with contextlib.closing(sweep.runs()) as runs:
        for run in runs:
            with run.failures_booked():
                # What fails in here is booked, and the next run begins.
                try:
                    model = model or load(args)
                    set_start(model, run.args)
                except ValueError as error:  # Then no training is possible.
                    log.error(f"error: {error}")
                    raise SystemExit(2) from error
                run.begin()
                log_run(model, run)
                final = train(model, run.splits.train, run.splits.validation, run.args, run)
                run.finish(model, final)
    return sweep.exit_code


# ------------------------------------------------------------------ command line


def make_parser():
    """The command line of train_steering.py."""
    parser = new_parser(__doc__)
    data_filter.add_data_arguments(parser)
    add_load_arguments(parser)
    add = parser.add_argument_group("steering").add_argument
    text = "0-based decoder layer whose output gets the vector; of several, a run at each"
    add("--layer", type=int, nargs="+", default=[22], help=text)
    add("--init-scale", type=float, default=0.0, help="start from randn(hidden_size) * this")
    add("--init-vector", metavar="FILE", help="start from this vector file of the same layer")
    add = parser.add_argument_group("optimization").add_argument
    text = f"peak; auto: {AUTO_LR} x median residual norm / sqrt(hidden_size)"
    add("--lr", type=number_or_word, default="auto", help=text)
    add("--lr-scheduler", default="cosine", choices=("constant", "linear", "cosine"),
        help="shape of the schedule after warm-up")  # fmt: skip
    add("--warmup-ratio", type=float, default=0.1, help="share of the steps that warm up")
    add("--batch-size", type=int, default=2, help="rows of a step, times --gradient-accumulation")
    add("--gradient-accumulation", type=int, default=1, help="factor on --batch-size")
    text = f"passes over the rows; default: for {AUTO_STEPS} steps, at most {AUTO_EPOCHS} passes"
    add("--num-epochs", type=int, help=text)
    add("--max-steps", type=int, help="optimizer steps, in place of --num-epochs")
    # Its default is with those of the data options, since the split needs it.
    add("--val-fraction", type=float, help="share of the training questions to validate on")
    add("--val-every", type=int, help="steps between validations; default: half an epoch")
    add("--patience", type=int, help="stop after this many validations without a better one")
    add = parser.add_argument_group("speed and memory").add_argument
    text = "padded tokens in a forward pass; auto: what --plan says"
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
    add("--write-todo", metavar="FILE", help="only write the names that are not done yet to a file")
    add("--print-status", action="store_true", help="only print how far the datasets are")
    add("--restart", action="store_true", help="begin anew, keeping the old files in old-<n>/")
    add("--accept-code-change", action="store_true", help="go on with a run of other code")
    return parser


def parse_args(argv=None):
    """Parsed and checked options; every bad one is reported, all at once."""
    counts = "batch_size gradient_accumulation num_epochs max_steps patience micro_batch_tokens"
    counts += " val_every save_every seeds"
    bounds = {**data_filter.DATA_BOUNDS, "size": "init_scale"}
    bounds["count"] += f" {counts}"
    bounds["share"] += " val_fraction warmup_ratio"
    return parse(make_parser(), argv, bounds, check_arguments)


def check_arguments(args):
    """(whether something is wrong, what) of the options beyond their bounds."""
    lr_fits = 0 < args.lr < math.inf if isinstance(args.lr, float) else args.lr == "auto"
    name = args.run_name
    name_fits = name is None or re.fullmatch(r"(?!old-)\w[\w.+-]*", name)
    numbers = (args.plan_tflops, args.plan_memory)
    return [
        (not lr_fits, f'--lr {args.lr}: must be "auto" or a number above 0'),
        (
            not (args.dataset or args.list_file or args.plan),
            "name what to train on: --dataset NAME ... or --list-file FILE",
        ),
        (
            args.tensor_parallel and (args.device_map or args.quantize != "none"),
            "--tensor-parallel goes without --device-map and --quantize",
        ),
        (args.plan and (args.tensor_parallel or args.device_map), "--plan is for one device"),
        (
            not all(0 < number < math.inf for number in numbers),
            "--plan-tflops and --plan-memory must be above 0",
        ),
        (args.patience and not args.val_fraction, "--patience needs --val-fraction above 0"),
        (
            args.max_steps == 0,
            "--max-steps 0 trains nothing; eval_steering.py --vector FILE evaluates a vector",
        ),
        (
            args.init_vector and len(args.layer) > 1,
            "--init-vector is of one layer: name one with --layer",
        ),
        (not name_fits, f'--run-name "{name}": use letters, digits, "_.+-"; not "old-..."'),
    ]


def print_plan(args):
    """--plan: print what training would take; returns the exit code."""
    row_count = math.ceil(args.target_tokens / ROW_TOKENS)
    schedule = make_schedule(args, row_count)
    names = requested_names({}, args) or ["one"]
    epochs = schedule.total / schedule.steps_per_epoch
    for layer in args.layer:
        plan_for(args, layer, args.dtype).show(args, epochs, len(names) * args.seeds)
    return 0


def main(argv=None):
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    start_logging()
    if args.plan:
        return exit_code(print_plan, args)
    stop = StopRequest()
    if args.tensor_parallel:
        code = exit_code(lambda: ranks.start(pick_device(args.device)))
        if code:
            return code
    if ranks.rank():  # Rank 0 speaks for all.
        start_logging(logging.ERROR)
        return train_all(args, stop)
    code = exit_code(train_all, args, stop)
    ranks.from_rank_0(None)  # no more jobs for the others
    return code


if __name__ == "__main__":
    sys.exit(main())
