"""Is a run finished, may it go on, and was it made by this code?

A run is the same as an earlier one if its config is: options, data, template, dtype. What an older
run.json lacks had its default, so a new option changes nothing. The code may differ: then a
finished run stays finished, with a warning, and an unfinished one does not go on unasked.
"""

import ast
import contextlib
import functools
import hashlib
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from steering.loading import is_same_model, pick_device, pick_dtype, same_files
from steering.run_folder import checkpoints, environment, is_locked, last_speed, run_path
from steering.vector_file import (
    FORMAT_VERSION,
    VECTOR_FILE,
    load_vector,
    read_json,
    save_vector,
    vector_digest,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent  # of this project
ATTEMPTS = 5  # processes that may die in a run, one after the other, at the same step
STARTED = time.time()  # of this process, almost
FORMER_DEFAULTS = {"num_epochs": 4}  # a run that finished under them is done under today's
log = logging.getLogger("steering")


def config_hash(config):
    """16 hex digits that stand for a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def differences(config, old, defaults):
    """Keys in which a config differs from an older one; an option that lacks had its default.
    What else it lacks nobody recorded then, and options that are no more do not count: the code
    that had them is other code."""
    before = {**defaults, **old}
    known = [key for key in config if key in before and key != "auto_dtype"]
    other = sorted(key for key in known if config[key] != before[key])
    key = "model_digest"
    if key in other and same_files(before.get("model"), config[key], before[key]):
        other.remove(key)
    return other


@functools.cache
def source_hashes(script, without=("steering/plan.py",)):
    """{file: hash} of a script here and all that it imports of this project, directly or not.
    Of the syntax trees without docstrings, so that a reworded comment changes nothing. without:
    files to leave out, such as those that only show numbers."""
    hashes, files = {}, [ROOT / script]
    while files:
        path = files.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in hashes or name in without:
            continue
        tree, modules = ast.parse(path.read_bytes()), []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
        hashes[name] = config_hash(plain_tree(tree))
        for module in modules:
            place = str(module).replace(".", "/")
            paths = ROOT / f"{place}.py", ROOT / place / "__init__.py"
            files += [path for path in paths if path.exists()]
    return hashes


def plain_tree(node):
    """A syntax tree as lists, without what is empty, which differs between Python versions."""
    if isinstance(node, list):
        return [plain_tree(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [(key, plain_tree(value)) for key, value in ast.iter_fields(node) if value is not None]
    return [type(node).__name__, *(part for part in parts if part[1] != [])]


def changed_sources(old, new=None):
    """Files whose code is not that of `old`, earlier source_hashes; [] if nothing is recorded."""
    new = source_hashes("train_steering.py") if new is None else new
    return sorted(name for name in {**old, **new} if old.get(name) != new.get(name)) if old else []


def changed_since(folder):
    """Files whose code is not that of the run in a folder."""
    return changed_sources(read_json(folder / "run.json").get("code", {}))


def is_done(folder, config, defaults):
    """Whether the folder holds the finished vector of this config, or was skipped under it.
    defaults: what a key stands for that the folder's config lacks. Raises ValueError if it holds a
    vector or a checkpoint of another config; a run that left neither (it failed before its first
    checkpoint) may be replaced."""
    record, done = read_json(folder / "run.json"), (folder / VECTOR_FILE).exists()
    holds, old = done or bool(checkpoints(folder)), record.get("config", {})
    if holds and not old:
        raise ValueError(f"{folder / 'run.json'}: unreadable; --restart sets it aside")
    fields = differences(config, old, defaults)
    if done and config.get("auto_dtype") and record.get("args", {}).get("dtype") == "auto":
        fields = [key for key in fields if key != "dtype"]  # what auto was on another machine
    older = FORMER_DEFAULTS if "auto_epochs" not in old else {}
    for key, former in older.items() if done or not holds else ():
        if (old.get(key), config.get(key)) == (former, defaults.get(key)):
            fields = [field for field in fields if field != key]
    if not holds:
        return record.get("status") == "skipped" and not fields
    if fields:
        pairs = [(key, str({**defaults, **old}.get(key)), str(config.get(key))) for key in fields]
        shown = [f"{key}: {there:.40} there, {here:.40} here" for key, there, here in pairs]
        way = [f"--{key.replace('_', '-')} {old[key]}" for key in fields if key in older]
        way = f"Add {' '.join(way)} to go on with it, or --run-name" if way else "Use --run-name"
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(shown)}). {way} NAME for a "
            "second run, or --restart to set the old one aside and start anew"
        )
    return done


def start_state(folder, config, defaults, accept_code_change=False):
    """What training goes on from: the newest readable checkpoint of this config, or a new start.

    {"config", "code", "code_changes"} and, of a checkpoint, all the rest, tensors on the host.
    Raises ValueError for a checkpoint of an older format, and for one by other code unless that is
    accepted; it is then named in "code_changes".
    """
    start = {"config": config, "code": source_hashes("train_steering.py"), "code_changes": []}
    for path in reversed(checkpoints(folder)):
        if path.suffix == ".safetensors":
            why = "was written by an older version, and its run cannot be continued"
            raise ValueError(f"{path} {why}: --restart sets it aside and starts anew")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            other = differences(config, state["config"], defaults)
            problem = "belongs to other settings, " if other else ""
        except (OSError, MemoryError):  # of the machine, not of the file: it may be whole
            raise
        except Exception as error:  # torch raises whatever torn bytes lead to
            problem = f"{type(error).__name__}, "
        if problem:
            log.warning(f"WARNING: {path.name} {problem}passed over")
            path.rename(path.with_name(f"passed-over-{path.name}"))  # else it counts as the newest
            continue
        if (changed := changed_sources(state["code"])) and not accept_code_change:
            raise ValueError(
                f"{folder} holds a run in work by other code ({', '.join(changed)}): --restart "
                "sets it aside and starts anew, --accept-code-change goes on with this code"
            )
        if changed:
            log.warning(f"WARNING: going on with other code: {', '.join(changed)}")
        return {**state, **start, "code_changes": sorted({*state["code_changes"], *changed})}
    return start


def new_record(folder, dataset, config, state, args):
    """run.json of a run that begins or goes on, as a dict. attempts: how many processes in a row,
    this one included, began where this one does: those before died without a word."""
    before, step = read_json(folder / "run.json"), state.get("step", 0)
    died = before.get("status") == "running" and before.get("from_step") == step
    return {
        "dataset": dataset, "status": "running", "config_hash": config_hash(config),
        "config": config, "code": state["code"], "code_changes": state["code_changes"],
        "args": args, **environment(), "from_step": step,
        "attempts": before.get("attempts", 0) + 1 if died else 1,
    }  # fmt: skip


def contents_of(args):
    """What options stand for, as a part of the config: what files hold, not where they lie, and the
    dtype that "auto" is here."""
    dtype = pick_dtype(args.dtype, pick_device(args.device))
    found = {"dtype": dtype, "auto_dtype": args.dtype == "auto", "format_version": FORMAT_VERSION}
    file = args.chat_template
    found["template"] = Path(file).read_text("utf-8-sig") if file else None
    if args.init_vector:
        found["init_vector"] = vector_digest(load_vector(args.init_vector)[0])
    return found


def vector_header(record):
    """What the file of a run's vector says, as a dict; record: run.json of one that is done."""
    args, header = record["args"], {key: record[key] for key in ("dataset", "config_hash")}
    header |= {key: record["final"][key] for key in ("steps", "label_tokens")}
    header |= {"seed": args["seed"], "model_is_local": Path(args["model"]).exists()}
    header |= {"model_digest": record["config"]["model_digest"]}
    header |= {"quantize": args["quantize"]} if args["quantize"] != "none" else {}
    if start := args["init_vector"]:
        about = load_vector(start)[1]
        header["started_from"] = about.get("imported_from", about.get("dataset", start))
    return header


def failed_meanwhile(folder):
    """Whether another process has failed in the folder since this one began."""
    path = folder / "run.json"
    with contextlib.suppress(OSError):
        return path.stat().st_mtime > STARTED and read_json(path).get("status") == "failed"
    return False


@dataclass
class Run:
    """A vector (n,), the run.json beside it, and the options that are to be used with it (args)."""

    folder: Path
    dataset: str
    record: dict
    vector: torch.Tensor
    args: dict


def read_run(folder, changes=None):
    """A finished run folder as a Run; ValueError if it is not finished or not readable.
    changes: {option: value} in place of the run's own. The persona's text is left out of prompts
    even if the run kept it there, so that vanilla and steered are what they say."""
    folder = Path(folder)
    record = read_json(folder / "run.json")
    args = record.get("args")
    args = {**args, **(changes or {}), "keep_system_prompt": False} if type(args) is dict else {}
    if lacking := {"dataset", "config", "config_hash"} - {*record} or {"model", "layer"} - {*args}:
        raise ValueError(f"{folder}: no readable run.json (no {', '.join(sorted(lacking))})")
    if not (folder / VECTOR_FILE).exists():
        raise ValueError(f"{folder}: no {VECTOR_FILE}, so this run has not finished")
    vector = load_vector(folder / VECTOR_FILE)[0]
    return Run(folder, record["dataset"], record, vector, args)


def model_suffix(run):
    """What the names of a run's evaluation end in: "" if it is of the model it was trained on."""
    header = {"model": run.record["args"].get("model", "")}
    header["model_digest"] = run.record["config"].get("model_digest") or ""  # not in older runs
    same, name = is_same_model(header, run.args["model"]), run.args["model"]
    return "" if same else f"-{run_path('', name, 0, '').parts[0]}"


def eval_path(run):
    """Where the evaluation of a run is, under the model that it is used with."""
    return run.folder / f"eval{model_suffix(run)}.json"


def shared_folder(run, default):
    """The folder that the runs of a run's layer and model share; default: where it is in none."""
    name = f"layer{run.args['layer']}"
    return next((p for p in run.folder.absolute().parents if p.name == name), default)


def write_imported_run(folder, dataset, data, vector, header, args):
    """Make a run folder of a vector (n,) from elsewhere, with a run.json that says so.
    data: what `data_digest` gives of the dataset; header: of the vector file; args: data options,
    model and layer. Raises ValueError if the folder holds anything else."""
    config = {"data": data, "template": None, "vector": vector_digest(vector), "name": dataset}
    config |= {key: args[key] for key in ("model", "layer")}
    config["model_digest"] = header.get("model_digest")
    record = {
        "dataset": dataset, "status": "imported", "config": config, "args": args,
        "config_hash": config_hash(config), "counts": {},
        "final": {"vector_norm": vector.norm().item()}, **environment(),
    }  # fmt: skip
    there = read_json(folder / "run.json")
    known = {"model_digest": config["model_digest"], **there.get("config", {})}
    if known != config and (there or (folder / VECTOR_FILE).exists()):
        raise ValueError(f"{folder} holds another run or vector: name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", record)
    save_vector(folder / VECTOR_FILE, vector, header)


def failed_ones(folders):
    """Names of {name: run folder} whose last try failed."""
    records = {name: read_json(folder / "run.json") for name, folder in folders.items()}
    return {name for name, record in records.items() if record.get("status") == "failed"}


def print_progress(folders, config_of, defaults, todo):
    """Print how far a list is: counts, failures, speed and time left; or names still to do (todo).
    folders: {name: run folder}; config_of: a function of the name; defaults: as in `is_done`. A run
    that cannot be read counts as left: training it will say what is wrong."""
    groups, seconds, speed = {"done": [], "running": [], "failed": [], "left": []}, [], 0.0
    changed = []
    for name, folder in folders.items():
        record, done = read_json(folder / "run.json"), False
        with contextlib.suppress(ValueError, OSError):
            done = is_done(folder, config_of(name), defaults)
        state = "done" if done else "failed" if record.get("status") == "failed" else "left"
        if is_locked(folder):
            state, speed = "running", speed + last_speed(folder)
        groups[state].append(name)
        if state == "done":
            seconds += [record["wall_seconds"]] if "wall_seconds" in record else []
            changed += [files] if (files := changed_since(folder)) else []
        elif todo and state != "running":
            print(name)
        elif not todo and state != "left":
            print(f"{state:<8} {name}" + f": {record.get('error')}" * (state == "failed"))
    if changed:
        files = ", ".join(sorted({file for files in changed for file in files}))
        text = f"WARNING: {len(changed)} of the finished runs are by other code: {files}"
        print(text, file=sys.stderr)
    if not todo:
        counts = " / ".join(f"{len(members)} {state}" for state, members in groups.items())
        ahead, workers = len(groups["left"]) + len(groups["running"]) / 2, len(groups["running"])
        hours = ahead * sum(seconds) / max(1, len(seconds)) / max(1, workers) / 3600
        left = f"{hours:.1f} h" if seconds else "unknown"
        name, folder = next(iter(folders.items()))
        counts = f"{folder.name}: {counts}" if folder.name != name else counts  # of --run-name
        print(f"status   {counts} of {len(folders)} | tok/s {speed:,.0f} | time left {left}")
