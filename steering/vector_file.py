"""The vector on disk: one safetensors file, written by rename; and the JSON files beside it.

    save_vector("steering_vector.safetensors", vector, {"model": "Qwen/Qwen3-32B", "layer": 22})
    vector, metadata = load_vector("steering_vector.safetensors")

Imports no transformers, so that what only reads files (reports, status) starts fast.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

VECTOR_FILE, FORMAT_VERSION, PARTIAL = "steering_vector.safetensors", "1", ".partial-"


def vector_bytes(vector, metadata, name="steering_vector"):
    """The content of a vector file: the same bytes for the same vector (n,) and metadata.
    The library writes metadata in random order, so its header (8 bytes of length, JSON padded with
    spaces) is written again, sorted."""
    tensor = vector.detach().to("cpu", torch.float32).contiguous()
    strings = {"format_version": FORMAT_VERSION, **{k: str(v) for k, v in metadata.items()}}
    data = save({name: tensor}, metadata=strings)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def save_vector(path, vector, metadata):
    """Write a (n,) tensor as a vector file (fp32), its metadata as strings. By write and rename."""
    write_atomically(path, vector_bytes(vector, metadata))


def load_vector(path, name="steering_vector"):
    """Read a vector file: (fp32 tensor (n,), metadata). ValueError if it is missing or not one.
    name: of its tensor."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name the vector file in it")
    if Path(path).suffix in (".pt", ".pth", ".bin", ".gguf"):
        raise ValueError(f"{path} is another tool's: export_vector.py --from makes one of ours")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    vector = tensors.get(name)
    fits = vector is not None and vector.dim() == 1 and vector.is_floating_point()
    if not fits or not vector.isfinite().all():
        found = {key: f"{t.dtype} {list(t.shape)}" for key, t in tensors.items()}
        raise ValueError(f'{path}: no finite 1-D float tensor "{name}"; found {found}')
    return vector.float(), metadata


def vector_digest(vector):
    """16 hex digits that stand for the numbers of a (n,) fp32 tensor on the host."""
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:16]


def base_name(model):
    """The last part of a model's name: "Qwen/Qwen3-32B" and "/models/Qwen3-32B/" -> "qwen3-32b"."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()


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
    with contextlib.suppress(OSError):  # the name too is to outlast a power cut
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


def write_json(path, value):
    """Write a JSON file by write and rename."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """A JSON file's object; {} if it is missing, torn or no object."""
    value = None
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
