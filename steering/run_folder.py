"""Where a run is: its folder, who holds it, and the files in it.

<output-dir>/<model>/layer<k>/<dataset>[/<run-name>]/ holds run.json, train.log, metrics.jsonl,
checkpoint-<step>.pt and, once the run has finished, steering_vector.safetensors.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from steering.files import read_json_lines, sweep_partial, write_atomically
from steering.vector_file import VECTOR_FILE

log = logging.getLogger("steering")


def run_path(output_dir, model, layer, dataset, run_name=None):
    """<output_dir>/<model>/layer<k>/<dataset>[/<run_name>]; <model> ends in a hash of its name."""
    model = os.path.normpath(model)
    short = f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    return Path(output_dir, short, f"layer{layer}", dataset, run_name or "")


def find_runs(paths):
    """Run folders with a finished vector, each once: each path itself, or else those below it, or
    else the path if a run was begun there. ValueError if there is none."""
    found = {}
    for path in map(Path, paths):
        here = [run for run in all_runs([path]) if (run / VECTOR_FILE).exists()]
        if (path / "run.json").exists() and ((path / VECTOR_FILE).exists() or not here):
            here = [path]
        if not here:
            raise ValueError(f"{path}: no readable run.json, and no finished run below it")
        found |= dict.fromkeys(here)
    return list(found)


def all_runs(paths):
    """Every folder with a run.json at or below the paths, finished or not, without old-<n>."""
    folders = {file.parent for path in paths for file in Path(path).rglob("run.json")}
    return sorted(folder for folder in folders if not re.fullmatch(r"old-\d+", folder.name))


@contextlib.contextmanager
def lock_folder(folder):
    """Hold <folder>/lock, made if need be; yields False if another process holds it.
    The lock dies with its process. Raises ValueError if the folder cannot be written, or its file
    system has no locks."""
    path = folder / "lock"
    for _ in range(20):  # `is_locked` of another process holds it for a moment
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = open(path, "a")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise ValueError(f"folder {folder} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                break
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            way_out = "name a folder of another file system with --output-dir"
            raise ValueError(f"{folder}: no lock to be had ({error}); {way_out}") from error
        handle.close()  # Another process holds it, or removed it while this one waited.
    else:
        yield False
        return
    with handle:
        try:
            sweep_partial(folder)
            yield True
        finally:
            path.unlink(missing_ok=True)


def is_locked(folder):
    """Whether another process holds the folder's lock."""
    try:
        with open(folder / "lock", "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)  # else there is none


def set_aside(folder):
    """Move a run's files to the next free <folder>/old-<n>; runs of other names inside stay, and so
    do judgements, which are of answers and serve all of them."""
    stay = ("lock", "judgements.jsonl")
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in stay]
    if not files:
        return
    numbers = itertools.count(1)
    aside = next(f"old-{n}" for n in numbers if not (folder / f"old-{n}").exists())
    (folder / aside).mkdir()
    for path in files:
        path.rename(folder / aside / path.name)
    log.info(f"set aside: {len(files)} files -> {folder / aside}")


def checkpoints(folder):
    """The folder's checkpoint files, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"), key=lambda path: (len(path.stem), path.stem))


def trim_metrics(path, step):
    """Drop what metrics.jsonl has of steps after `step`, and a torn last line."""
    kept = [json.dumps(row) for row in read_json_lines(path) if row["step"] <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def last_speed(folder):
    """Tokens a second of the last ten steps in metrics.jsonl; 0 if there is none."""
    rows = [row for row in read_json_lines(folder / "metrics.jsonl") if "tokens" in row][-10:]
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["tokens"] for row in rows) / (seconds or 1.0)


def environment():
    """Versions, machine and git commit, for run.json."""
    commit = None
    with contextlib.suppress(OSError):
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = found.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "host": platform.node(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "git_commit": commit,
        "command": sys.argv,
    }
