"""What a run leaves behind: folder, lock, run.json, logs, checkpoints; and how signals stop it.

<output-dir>/<model>/layer<k>/<dataset>[/<run-name>]/ holds run.json, train.log, metrics.jsonl,
checkpoint-<step>.pt and, once the run has finished, steering_vector.safetensors.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
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
from tqdm import tqdm

from steering.vector_file import VECTOR_FILE, sweep_partial, write_atomically

log = logging.getLogger("steering")


class Console(logging.Handler):
    """Log to stdout, above the bar, without tracebacks; goes on if stdout is gone (`| head`)."""

    def emit(self, record):
        try:
            tqdm.write(record.getMessage(), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # broken pipe, closed, None
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def log_file(path):
    """Context: what is logged goes to this file too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class StopRequest:
    """Remembers a signal that asks to stop until the step is over; a second Ctrl-C stops at once.
    A second SIGTERM does not: a scheduler may send one, and a shell loop pass it on once more."""

    def __init__(self):
        self.exit_code, self.in_loop = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self)

    def __call__(self, number, frame):
        again = self.exit_code is not None and number == signal.SIGINT
        self.exit_code = 130 if number == signal.SIGINT else 75
        if again or not self.in_loop:
            raise SystemExit(self.exit_code)


class Laps(dict):
    """Seconds of each phase before the first step; the first lap starts with the process."""

    def __init__(self):
        self.last = time.perf_counter()
        with contextlib.suppress(OSError, AttributeError):  # where /proc says since when it runs
            started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
            since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
            self.last -= since_boot - int(started) / os.sysconf("SC_CLK_TCK")

    def lap(self, name):
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self[name], self.last = round(now - self.last, 2), now


def import_name(path):
    """What to call the run of a vector file from elsewhere: by its name, that of its folder if it
    is one of ours."""
    path = Path(path)
    name = path.parent.name if path.name == VECTOR_FILE else path.stem
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "imported"


def run_path(output_dir, model, layer, dataset, run_name=None):
    """<output_dir>/<model>/layer<k>/<dataset>[/<run_name>]; <model> ends in a hash of its name."""
    model = os.path.normpath(model)
    short = f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    return Path(output_dir, short, f"layer{layer}", dataset, run_name or "")


def find_runs(paths):
    """Run folders with a finished vector, at or below each path, each once; ValueError if none."""
    found = {}
    for path in map(Path, paths):
        here = [path] if (path / "run.json").exists() else []
        here = here or [run for run in all_runs([path]) if (run / VECTOR_FILE).exists()]
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
        handle.close()  # held by another, or removed by it while this one waited
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
    stay = "lock", "judgements.jsonl"
    files = [path for path in folder.iterdir() if path.is_file() and path.name not in stay]
    if files:
        aside = next(p for n in itertools.count(1) if not (p := folder / f"old-{n}").exists())
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        log.info(f"set aside: {len(files)} files -> {aside}")


def last_speed(folder):
    """Tokens a second of the last ten steps in metrics.jsonl; 0 if there is none."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the line being written
                rows.append(json.loads(line))
    rows = [row for row in rows if "tokens" in row][-10:]
    return sum(row["tokens"] for row in rows) / (sum(row["seconds"] for row in rows) or 1.0)


def environment():
    """Versions, machine and git commit, for run.json."""
    git, commit = ["git", "describe", "--always", "--dirty", "--abbrev=40"], None
    with contextlib.suppress(OSError):
        here = Path(__file__).parent
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    machine = {"python": platform.python_version(), "host": platform.node(), **versions}
    return {**machine, "git_commit": commit or None, "command": sys.argv}


def checkpoints(folder):
    """The folder's checkpoint files, oldest first."""
    return sorted(folder.glob("checkpoint-*.*"), key=lambda p: (len(p.stem), p.stem))


def save_checkpoint(folder, state, keep):
    """Write checkpoint-<step>.pt, all that a restart needs, and drop all but the newest `keep`.
    state: tensors and plain values, nested at will, with "step", "config" and "code"."""
    data = io.BytesIO()
    torch.save(state, data)
    write_atomically(folder / f"checkpoint-{state['step']:05d}.pt", data.getvalue())
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def trim_metrics(path, step):
    """Drop what metrics.jsonl says of steps after `step` (and a torn last line)."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the torn line
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def peak_memory():
    """Peak memory so far in GiB: of the GPU if there is one, of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
