"""One training: its state, what is written of it, and how an earlier one in its folder is told.

A run is the same as an earlier one if its config is: options, data, template, dtype. What an older
run.json lacks had its default, so a new option changes nothing. The code may differ: then a
finished run stays finished, with a warning, and an unfinished one does not go on unasked.
"""

import ast
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from steering import ranks
from steering.files import read_json, write_atomically, write_json
from steering.loading import same_files
from steering.memory import peak_memory
from steering.process import log_file
from steering.run_folder import checkpoints, environment, is_locked, trim_metrics
from steering.vector_file import VECTOR_FILE, load_vector, origin_of

ROOT = Path(__file__).resolve().parent.parent  # the folder of this project
ATTEMPTS = 5  # processes in a row that may die in a run without writing another checkpoint
KEEP_CHECKPOINTS = 3
# What these decide (which runs there are, the size of passes) is compared by value, or only rounds.
NO_PART_OF_A_VECTOR = ("steering/plan.py", "steering/sweep.py")
log = logging.getLogger("steering")


class NoVector(RuntimeError):
    """A training that leads to no vector, whichever machine it is tried on."""


# ------------------------------------------------------------------ is it the same run?


@dataclass
class Standing:
    """What the folder of a run holds, for the run that is asked for.
    verdict: "done", "busy", "other settings", "other code", "goes on" or "new"; reason: why it is
    refused, if it is; changed: files whose code is not that of the run, if it is done or refused
    for that."""

    verdict: str
    reason: str = ""
    changed: list = field(default_factory=list)


def standing(folder, config, defaults):
    """The Standing of a folder. defaults: what an option stands for that the folder's config lacks.

    vector | checkpoint | config | code  ->
    yes    | any        | same   | any   -> done; `changed` names what is other code
    no     | no         | same   | any   -> done, if it was skipped for lack of scores
    (locked by another process)          -> busy
    no     | no         | any    | any   -> new
    one of them         | other  | any   -> other settings: --run-name, --restart
    no     | yes        | same   | other -> other code: --restart, --accept-code-change
    no     | yes        | same   | same  -> goes on

    Two configs are the same where `differences` finds none; "auto" dtypes of a finished run are the
    same on any machine. Without a readable run.json, settings count as other ones.
    """
    record = read_json(folder / "run.json")
    old = record.get("config", {})
    has_vector = (folder / VECTOR_FILE).exists()
    has_checkpoint = bool(checkpoints(folder))
    other = differences(config, old, defaults)
    if has_vector and config.get("auto_dtype") and old.get("auto_dtype"):
        other = [key for key in other if key != "dtype"]  # what auto was on another machine

    changed = changed_sources(record.get("code", {}))
    skipped = record.get("status") == "skipped" and not has_checkpoint
    if (has_vector or skipped) and old and not other:
        return Standing("done", changed=changed)
    if is_locked(folder):
        return Standing("busy")
    if not (has_vector or has_checkpoint):
        return Standing("new")
    if not old:
        reason = f"{folder / 'run.json'}: unreadable; --restart sets it aside"
        return Standing("other settings", reason)
    if other:
        shown = []
        for key in other:
            there = str({**defaults, **old}.get(key))
            shown.append(f"{key}: {there:.40} there, {config.get(key)!s:.40} here")
        return Standing(
            "other settings",
            f"{folder} holds a run with other settings ({'; '.join(shown)}). Use --run-name NAME "
            "for a second run, or --restart to set the old one aside and start anew",
        )
    if changed:
        return Standing(
            "other code",
            f"{folder} holds a run in work by other code ({', '.join(changed)}): --restart sets it "
            "aside and starts anew, --accept-code-change goes on with this code",
            changed,
        )
    return Standing("goes on")


def differences(config, old, defaults):
    """Keys in which a config differs from an older one. An option that the older one lacks had its
    default. A key that neither it nor the defaults know did not matter when it was written."""
    before = {**defaults, **old}
    other = []
    for key in sorted(config):
        if key in before and key != "auto_dtype" and config[key] != before[key]:
            other.append(key)
    key = "model_digest"
    if key in other and same_files(before.get("model"), config[key], before[key]):
        other.remove(key)
    return other


def config_hash(config):
    """16 hex digits that stand for a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def source_hashes(script, without=NO_PART_OF_A_VECTOR):
    """{file: hash of its text} of a script and of all that it imports from this project, directly
    or not. without: files to leave out, since they change no result."""
    hashes = {}
    files = [ROOT / script]
    while files:
        path = files.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in hashes or name in without:
            continue
        text = path.read_bytes()
        hashes[name] = hashlib.sha256(text).hexdigest()[:16]
        modules = []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            place = ROOT / str(module).replace(".", "/")
            candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
            files += [path for path in candidates if path.exists()]
    return hashes


def changed_sources(old, new=None):
    """Files whose code is not that of `old`, earlier source_hashes; [] if nothing is recorded."""
    if not old:
        return []
    if new is None:
        new = source_hashes("train_steering.py")
    return sorted(name for name in {**old, **new} if old.get(name) != new.get(name))


# ------------------------------------------------------------------ the run


@dataclass
class TrainState:
    """Where a training is: all that a checkpoint holds, tensors on the host or the device."""

    step: int = 0  # optimizer updates that are done
    epoch: int = 0
    position: int = 0  # rows of this epoch that were trained on
    order: torch.Tensor | None = None  # of this epoch's rows
    shuffle_state: torch.Tensor | None = None  # of the generator that makes the orders
    vector_state: dict | None = None  # ResidualHook.state_dict()
    optimizer_state: dict | None = None
    best: dict | None = None  # ResidualHook.state_dict() of the best validation
    best_val: float | None = None
    best_step: int = 0
    bad_validations: int = 0  # in a row, none of them the best
    residual_norm: float | None = None  # median token norm of the residual stream at the layer
    micro_batch_tokens: int | None = None  # what "auto", or memory that ran out, made of it
    label_tokens: int = 0  # that were trained on
    seconds: float = 0.0  # of the steps


def newest_state(folder, config, defaults):
    """The TrainState of the newest readable checkpoint of a config, or a new one.
    ValueError if a checkpoint is whole, and its state is not one of this code."""
    for path in reversed(checkpoints(folder)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            values = content["state"]
            other = differences(config, content["config"], defaults)
            problem = "belongs to other settings" if other else ""
        except (OSError, MemoryError):  # These are the machine's: the file may be whole.
            raise
        except Exception as error:  # torch raises whatever torn bytes lead to
            problem = type(error).__name__
        if not problem:
            try:
                return TrainState(**values)
            except TypeError as error:
                raise ValueError(
                    f"{path} holds what this code does not know ({error}): --restart sets it aside"
                ) from error
        log.warning(f"WARNING: {path.name} {problem}, passed over")
        path.rename(path.with_name(f"passed-over-{path.name}"))  # else it counts as the newest
    return TrainState()


class Run:
    """A training as its loop sees it: where it is, what to write, whether to stop.
    folder: of the run; state: a TrainState; args: its options; splits: its examples (`train`,
    `validation`); record: what run.json says; exit_code: of the run once it is over. other_layers:
    at which its rows will be trained on next; known_states: {layer: a FastPath's cache} of its rows
    that were found before, and then those to know for the next run."""

    def __init__(self, folder, state, args, splits, stop):
        self.folder = folder
        self.state = state
        self.args = args
        self.splits = splits
        self.record = {}
        self.exit_code = 0
        self.other_layers = []
        self.known_states = {}
        self._stop = stop
        self.resumed = state.step > 0  # from a checkpoint; this process has taken no step yet
        self._metrics = None
        self._bar = None
        self._started = time.time() - state.seconds  # as if one process had done all

    @property
    def stopped(self):
        """The exit code that a signal asks for, or None.
        Every rank must read it exactly once a step, since they agree on it."""
        return ranks.from_rank_0(self._stop.exit_code)

    @contextlib.contextmanager
    def failures_booked(self):
        """Context of a whole training: a failure is logged, written to run.json and into
        `exit_code`, and goes no further, since the next dataset may do better."""
        with log_file(self.folder / "train.log"):
            try:
                yield
            except Exception as error:
                self.fail(error)
                expected = isinstance(error, NoVector | ValueError)  # Every rank meets it.
                if ranks.size() > 1 and not expected:
                    # The other ranks may be anywhere: torchrun ends them all.
                    raise SystemExit(1) from error
            finally:
                self._stop.in_loop = ranks.rank() > 0  # Rank 0 says when all of them stop.

    def fail(self, error):
        """Book a failure: in the log, in run.json and in `exit_code`."""
        self.exit_code = 1
        if ranks.rank():
            return
        name = self.record["dataset"]
        text = f"FAILED   {name}: {error} (traceback in {self.folder / 'train.log'})"
        log.error(text, exc_info=error)
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            self._write_record(status="failed", error=str(error))

    def _write_record(self, **changes):
        self.record.update(changes)
        if ranks.rank() == 0:
            write_json(self.folder / "run.json", self.record)

    def begin(self):
        """Write run.json, from now on a run that is under way; signals wait for a step's end."""
        self._write_record()
        self._stop.in_loop = True

    @contextlib.contextmanager
    def open_metrics(self, total_steps):
        """Context of the loop: metrics.jsonl is open, a bar shows how far it is."""
        if self.resumed:
            log.info(f"resume   after step {self.state.step} of {total_steps}")
        path = self.folder / "metrics.jsonl"
        trim_metrics(path, self.state.step if self.resumed else -1)  # A new run keeps no row.
        quiet = True if ranks.rank() else None  # None: where there is no terminal
        with (
            open(path, "a", encoding="utf-8") as self._metrics,
            tqdm(total=total_steps, initial=self.state.step, unit="step", disable=quiet) as bar,
        ):
            self._bar = bar
            yield

    def log(self, row):
        """Write a row of numbers to metrics.jsonl and show it: the one place for another logger.
        row: of a step, with "val_loss" if it was validated; or of the start, that alone."""
        print(json.dumps(row), file=self._metrics, flush=True)
        line = f"step {row['step']:05d}/{self._bar.total:05d} | "
        if "loss" in row:
            line += f"loss {row['loss']:.4f} | "
        if "val_loss" in row:
            line += f"val {row['val_loss']:.4f} | "
        if "loss" not in row:
            log.info(f"{line}before training")
            return
        share = row["vector_norm"] / self.state.residual_norm
        log.info(
            f"{line}lr {row['lr']:.1e} | |v| {row['vector_norm']:.2f} ({share:.2f} of residual) | "
            f"label_tok {self.state.label_tokens:,} | "
            f"tok/s {row['tokens'] / row['seconds']:,.0f} | {peak_memory():.1f} GiB"
        )
        self._bar.update()

    def checkpoint(self):
        """Write checkpoint-<step>.pt, all that a restart needs; the newest few are kept."""
        os.fsync(self._metrics.fileno())
        data = io.BytesIO()
        torch.save({"config": self.record.get("config"), "state": vars(self.state)}, data)
        path = self.folder / f"checkpoint-{self.state.step:05d}.pt"
        write_atomically(path, data.getvalue())
        for old in checkpoints(self.folder)[:-KEEP_CHECKPOINTS]:
            old.unlink()

    def finish(self, model, final):
        """Write run.json, then the vector, which exists only if all went well.
        final: the numbers of the end, as a dict; None if a signal stopped the run."""
        if final is None:
            self._write_record(status="stopped")
            return
        seconds = round(time.time() - self._started, 1)
        self._write_record(status="done", final=final, wall_seconds=seconds)
        if ranks.rank() == 0:
            model.save_vector(self.folder / VECTOR_FILE, **vector_header(self.record))
        best = ""
        if final["best_val"] is not None:
            best = f"best val {final['best_val']:.4f} at step {final['best_step']}, "
        log.info(f"done     {best}|v| {final['vector_norm']:.2f}: {self.folder / VECTOR_FILE}")


def new_record(folder, dataset, config, state, args):
    """run.json of a run that begins or goes on, as a dict. attempts: how many processes in a row,
    this one included, began where this one does: those before died without a word."""
    before = read_json(folder / "run.json")
    attempts = 1
    if before.get("status") == "running" and before.get("from_step") == state.step:
        attempts = before.get("attempts", 0) + 1
    changes = set()
    if state.step:
        changes = {*before.get("code_changes", []), *changed_sources(before.get("code", {}))}
    return {
        "dataset": dataset,
        "status": "running",
        "config_hash": config_hash(config),
        "config": config,
        "code": source_hashes("train_steering.py"),
        "code_changes": sorted(changes),
        "args": args,
        **environment(),
        "from_step": state.step,
        "attempts": attempts,
    }


def vector_header(record):
    """What the file of a run's vector says, as a dict; record: run.json of one that is done."""
    args = record["args"]
    header = {
        "dataset": record["dataset"],
        "config_hash": record["config_hash"],
        "steps": record["final"]["steps"],
        "label_tokens": record["final"]["label_tokens"],
        "seed": args["seed"],
        "model_is_local": Path(args["model"]).exists(),
        "model_digest": record["config"]["model_digest"],
    }
    if args["quantize"] != "none":
        header["quantize"] = args["quantize"]
    if args["init_vector"]:
        start = load_vector(args["init_vector"])[1]
        header["started_from"] = origin_of(start, args["init_vector"])
    return header
