"""The vector on disk: one safetensors file, written by rename.

    save_vector("steering_vector.safetensors", vector, {"model": "Qwen/Qwen3-32B", "layer": 22})
    vector, metadata = load_vector("steering_vector.safetensors")

Imports no transformers, so that what only reads files (reports, status) starts fast.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from steering.files import write_atomically

VECTOR_FILE = "steering_vector.safetensors"
FORMAT_VERSION = "1"
OTHER_TOOLS = (".pt", ".pth", ".bin", ".gguf")
NOT_READ = "which is not read: name the run folder, or an export of it in --format safetensors"


def vector_bytes(vector, metadata, name="steering_vector"):
    """The content of a vector file: the same bytes for the same vector (n,) and metadata.
    The library writes metadata in random order, so its header (8 bytes of length, JSON padded with
    spaces) is written again, sorted."""
    tensor = vector.detach().to("cpu", torch.float32).contiguous()
    strings = {"format_version": FORMAT_VERSION}
    for key, value in metadata.items():
        strings[key] = str(value)

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
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the vector file in it")
    if path.suffix in OTHER_TOOLS:
        raise ValueError(f"{path} is another tool's: export_vector.py --from makes one of ours")

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (the file is no dict)
                tensors[key] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error

    vector = tensors.get(name)
    if vector is None and any("lora_" in key for key in tensors):
        raise ValueError(f"{path}: of a LoRA adapter, {NOT_READ}")
    fits = vector is not None and vector.dim() == 1 and vector.is_floating_point()
    if not fits or not vector.float().isfinite().all():  # of some dtypes there is no isfinite
        found = {key: f"{t.dtype} {list(t.shape)}" for key, t in tensors.items()}
        raise ValueError(f'{path}: no finite 1-D float tensor "{name}" (as fp32); found {found}')
    return vector.float(), metadata


def origin_of(metadata, otherwise):
    """Whose vector a file's metadata say that it is: what it was imported from, or its dataset."""
    return metadata.get("imported_from", metadata.get("dataset", otherwise))


def vector_digest(vector):
    """16 hex digits that stand for the numbers of a (n,) fp32 tensor on the host."""
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:16]
