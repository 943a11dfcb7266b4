"""Finished runs, as evaluation and export take them: a vector, and how it came about.

run = read_run("runs/Qwen3-32B-45363f/layer22/gemma-2-27b__role__pirate")
shelf = Shelf(load_from_options)                  # hook_model's
chat, model = shelf.chat(run), shelf.model(run)
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from steering.files import read_json, write_json
from steering.loading import LoadOptions, is_same_model, load_chat
from steering.run import config_hash
from steering.run_folder import environment, run_path
from steering.vector_file import VECTOR_FILE, load_vector, save_vector, vector_digest


@dataclass
class FinishedRun:
    """A vector (n,), the run.json beside it, and the options that are to be used with it (args)."""

    folder: Path
    dataset: str
    record: dict
    vector: torch.Tensor
    args: dict


def read_run(folder, changes=None):
    """A finished run folder as a FinishedRun; ValueError if it is not finished or not readable.
    changes: {option: value} in place of the run's own. The persona's text is left out of prompts
    even if the run kept it there, so that vanilla and steered are what they say."""
    folder = Path(folder)
    record = read_json(folder / "run.json")
    lacking = {"dataset", "config", "config_hash", "args"} - record.keys()
    if not isinstance(record.get("args"), dict):
        lacking.add("args")
    if not lacking:
        lacking = {"model", "layer"} - record["args"].keys()
    if lacking:
        raise ValueError(f"{folder}: no readable run.json (no {', '.join(sorted(lacking))})")
    if not (folder / VECTOR_FILE).exists():
        raise ValueError(f"{folder}: no {VECTOR_FILE}, so this run has not finished")
    args = {**record["args"], **(changes or {}), "keep_system_prompt": False}
    vector = load_vector(folder / VECTOR_FILE)[0]
    return FinishedRun(folder, record["dataset"], record, vector, args)


def model_suffix(run):
    """What is added to the names of an evaluation's files: "" for the model of the training."""
    name = run.args["model"]
    header = {
        "model": run.record["args"]["model"],
        "model_digest": run.record["config"]["model_digest"] or "",
    }
    if is_same_model(header, name):
        return ""
    return f"-{run_path('', name, 0, '').parts[0]}"


def eval_path(run):
    """Where the evaluation of a run is, under the model that it is used with."""
    return run.folder / f"eval{model_suffix(run)}.json"


def shared_folder(run, default):
    """The folder that the runs of a run's layer and model share; default: where it is in none."""
    name = f"layer{run.args['layer']}"
    return next((path for path in run.folder.absolute().parents if path.name == name), default)


def import_name(path):
    """What to call the run of a vector file from elsewhere: by its name, that of its folder if it
    is one of ours."""
    path = Path(path)
    name = path.parent.name if path.name == VECTOR_FILE else path.stem
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "imported"


def write_imported_run(folder, dataset, data, vector, header, args):
    """Make a run folder of a vector (n,) from elsewhere, with a run.json that says so.
    data: what `data_digest` gives of the dataset; header: of the vector file; args: data options,
    model and layer. Raises ValueError if the folder holds anything else."""
    config = {
        "name": dataset,
        "data": data,
        "template": None,
        "vector": vector_digest(vector),
        "model": args["model"],
        "layer": args["layer"],
        "model_digest": header.get("model_digest"),
    }
    record = {
        "dataset": dataset,
        "status": "imported",
        "config": config,
        "args": args,
        "config_hash": config_hash(config),
        "counts": {},
        "final": {"vector_norm": vector.norm().item()},
        **environment(),
    }
    there = read_json(folder / "run.json")
    if there.get("config") != config and (there or (folder / VECTOR_FILE).exists()):
        raise ValueError(f"{folder} holds another run or vector: name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", record)
    save_vector(folder / VECTOR_FILE, vector, header)


class Shelf:
    """What a script keeps from run to run: the model in use, chat formats, held-out examples.
    load: load_from_options of hook_model. For the caller to fill: heldout, {folder: examples};
    means, mean states that a probe reads, emptied where the model changes; and states, a
    FastPath's caches, emptied where model or layer change."""

    def __init__(self, load):
        self.heldout = {}
        self.means = {}
        self.states = {}
        self._load = load
        self._options = None
        self._model = None
        self._chats = {}

    def chat(self, run):
        """The ChatFormat of a run: its template as it was, whatever became of the file."""
        options = LoadOptions.of(run.args)
        template = run.record["config"].get("template")
        date = run.record.get("date")
        key = (options.model, template, date)
        if key not in self._chats:
            trusted = options.trust_remote_code
            self._chats[key] = load_chat(options.model, None, trusted, template, date)
        return self._chats[key]

    def model(self, run):
        """The run's model, with the vector's place at the run's layer."""
        options = LoadOptions.of({**run.args, "tensor_parallel": False})
        layer = run.args["layer"]
        if self._options != options:
            self._options = None
            self._model = None  # The old one makes room first.
            self.means = {}
            self.states = {}
            self._model = self._load(options, layer)
            self._options = options
        if self._model.layer != layer:
            self._model.set_layer(layer)
            self.states = {}
        return self._model
