"""Files that are whole or absent, whatever happens while they are written; and JSON in them."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

PARTIAL = ".partial-"


def write_atomically(path, data):
    """Write bytes so that `path` holds either its old or its new content, whatever happens.
    Each writer has a file of its own until then; `sweep_partial` removes those of killed ones."""
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{threading.get_ident()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise

    # The name, too, is to outlast a power cut.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep_partial(folder):
    """Remove what writers left in the folder that were killed, an hour ago or more."""
    for path in Path(folder).glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def read_text(path):
    """A text file that a user wrote, as UTF-8 with or without a byte order mark; ValueError names
    one that is not."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def write_json(path, value):
    """Write a JSON file by write and rename."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """A JSON file's object; {} if the file is missing, torn or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path):
    """The objects of a file of JSON lines; a line that is none, such as a torn one, is passed over,
    a missing file is empty."""
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().split(b"\n"):  # alone: a text may hold what else ends lines
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows
