"""What costs much, kept in files of JSON lines: added as it comes, and never asked for again."""

import contextlib
import hashlib
import json
import sys
import threading
from pathlib import Path

from steering.finished import shared_folder
from steering.loading import model_digest
from steering.run import config_hash, source_hashes


class Kept:
    """{key: dict} in a file that several processes may add to; a torn line is passed over.

    about: what all of it depends on, a part of every key. A folder that cannot be written to keeps
    nothing, and says so once.
    """

    def __init__(self, path, *about):
        self.path = Path(path)
        self.about = about
        self.found = {}
        self._lock = threading.Lock()
        self._warned = False
        data = b"\n"
        if self.path.exists():
            data += self.path.read_bytes()
        self._torn = not data.endswith(b"\n")
        for line in data.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self.found[entry["key"]] = entry

    def key(self, *parts):
        """24 hex digits that stand for JSON-able parts."""
        return hashlib.sha256(json.dumps([*self.about, *parts]).encode()).hexdigest()[:24]

    def add(self, key, **values):
        """Write a line, whole or not at all where another process writes too."""
        entry = {"key": key, **values}
        line = json.dumps(entry) + "\n"
        with self._lock:
            self.found[key] = entry
            if self._torn:
                line = "\n" + line
            try:
                with open(self.path, "ab", buffering=0) as file:
                    file.write(line.encode())
                self._torn = False
            except OSError as error:
                if not self._warned:
                    print(f"WARNING: {self.path} keeps nothing: {error}", file=sys.stderr)
                self._warned = True


def kept_beside(run, model, chat, maker):
    """What is Kept of a run's model, in a file that all its runs share, whatever their layer.

    maker: the module that makes it, such as "evaluation/answers.py"; other code of it, or of what
    it imports, makes all of it anew.
    """
    precision = str(model.model.dtype)
    quantization = run.args.get("quantize", "none")
    if quantization != "none":
        precision += f" {quantization}"
    settings = model.model.generation_config.to_diff_dict()
    settings.pop("transformers_version", None)
    place = run.folder
    layer_folder = shared_folder(run, None)
    if layer_folder:
        place = layer_folder.parent
    return Kept(
        place / f"kept_{Path(maker).stem}.jsonl",
        model_digest(run.args["model"]),
        precision,
        chat.options,
        settings,
        code_of(maker),
    )


def code_of(path):
    """16 hex digits that stand for the code of a module and of all that it imports here, but for
    the table, in which numbers are only put."""
    return config_hash(source_hashes(path, without=("evaluation/table.py",)))
