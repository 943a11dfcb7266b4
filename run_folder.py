"""What a run leaves behind: folder, lock, run.json, logs, checkpoints; and how signals stop it.

<output-dir>/<model>/layer<k>/<dataset>[/<run-name>]/ holds run.json, train.log, metrics.jsonl,
checkpoint-<step>.safetensors and, once the run has finished, steering_vector.safetensors.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import platform
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

from hook_model import read_safetensors, write_atomically

VECTOR_FILE = "steering_vector.safetensors"
log = logging.getLogger("train_steering")


class Console(logging.Handler):
    """Log to stdout, above the bar, without tracebacks; goes on if stdout is gone (`| head`)."""

    def emit(self, record):
        try:
            tqdm.write(record.getMessage(), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # broken pipe, closed, None
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StopRequest:
    """Remembers SIGINT, SIGTERM or SIGUSR1 until the step is over; a second Ctrl-C stops at once.

    A second SIGTERM does not: a scheduler may send one, and a shell loop pass it on once more.
    """

    def __init__(self):
        self.exit_code, self.in_loop = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self)

    def __call__(self, number, frame):
        again = self.exit_code is not None and number == signal.SIGINT
        self.exit_code = 130 if number == signal.SIGINT else 75
        if again or not self.in_loop:
            raise SystemExit(self.exit_code)


class Laps(dict):
    """Seconds of each phase before the first step; the first lap starts with the process."""

    def __init__(self):
        self.last = time.perf_counter() - process_age()

    def lap(self, name):
        """Book the time since the last lap (or `restart`) under `name`."""
        now = time.perf_counter()
        self[name], self.last = round(now - self.last, 2), now

    def restart(self):
        """Forget the laps and start the next one now."""
        self.clear()
        self.last = time.perf_counter()


def process_age():
    """Seconds since this process started; 0 where /proc does not say."""
    with contextlib.suppress(OSError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start
    return 0.0


def run_folder(args, name):
    """<output-dir>/<model>/layer<k>/<dataset>[/<run-name>]; <model> ends in a hash of its name."""
    model = os.path.normpath(args.model)
    short = f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    return Path(args.output_dir, short, f"layer{args.layer}", name, args.run_name or "")


def find_runs(paths):
    """Run folders with a finished vector, at or below each path, each once; ValueError if none."""
    found = {}
    for path in map(Path, paths):
        here = [path] if (path / "run.json").exists() else []
        below = sorted(file.parent for file in path.rglob(VECTOR_FILE))
        below = [f for f in below if (f / "run.json").exists() and not f.name.startswith("old-")]
        if not (here or below):
            raise ValueError(f"{path}: no readable run.json, and no finished run below it")
        found |= dict.fromkeys(here or below)
    return list(found)


@contextlib.contextmanager
def lock_folder(folder):
    """Hold <folder>/lock, made if need be; yields False if another process holds it.

    The lock dies with its process. Raises ValueError if the folder cannot be written.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be written ({error.strerror})") from error
    with handle:
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


def is_locked(folder):
    """Whether another process holds the folder's lock."""
    try:
        with open(folder / "lock", "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        pass
    return False


def config_hash(config):
    """16 hex digits that stand for a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def is_done(folder, config):
    """Whether the folder holds the finished vector of this config, or the word that it needs none.

    Raises ValueError if it holds a vector or a checkpoint of another config; a run that left
    neither (it failed before its first checkpoint) may be replaced.
    """
    path, old, status = folder / "run.json", {}, None
    holds = (folder / VECTOR_FILE).exists() or bool(checkpoints(folder))
    if not path.exists() and not holds:
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        old, status = record["config"], record["status"]
    except (OSError, ValueError, KeyError) as error:
        if holds:
            raise ValueError(f"{path}: unreadable ({error}); --restart sets it aside") from error
    if not holds:
        return status == "skipped" and old == config
    fields = sorted(key for key in {**config, **old} if config.get(key) != old.get(key))
    if fields:
        pairs = [(key, str(old.get(key)), str(config.get(key))) for key in fields]
        shown = [f"{key}: {there:.40} there, {here:.40} here" for key, there, here in pairs]
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(shown)}). Use --run-name NAME "
            "for a second run, or --restart to set the old one aside and start anew"
        )
    return (folder / VECTOR_FILE).exists()


def set_aside(folder):
    """Move a run's files to the next free <folder>/old-<n>; runs of other names inside stay."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "lock"]
    if files:
        aside = next(p for n in itertools.count(1) if not (p := folder / f"old-{n}").exists())
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        log.info(f"set aside: {len(files)} files -> {aside}")


def write_json(path, value):
    """Write a JSON file by write and rename."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """A JSON file's object; {} if it is missing, torn or no object."""
    value = None
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


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


def checkpoints(folder):
    """The folder's checkpoint files, oldest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), key=lambda p: (len(p.name), p.name))


def save_checkpoint(folder, tensors, info, keep):
    """Write checkpoint-<step>.safetensors, all that a restart needs, and drop all but the newest.

    tensors: {name: tensor}; info: a JSON-able dict with "step" and "config_hash".
    """
    path = folder / f"checkpoint-{info['step']:05d}.safetensors"
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, metadata={"info": json.dumps(info)}))
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def load_checkpoint(folder, digest):
    """(tensors, info) of the newest readable checkpoint of this config, or (None, None)."""
    for path in reversed(checkpoints(folder)):
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
