"""Vectors as files of other tools: bytes to write, and a reader that trusts nothing.

    files = files_of("gguf", vector, {"layer": 22, "model_type": "qwen3"})   # {file name: bytes}
    found = read_vector("evil_response_avg_diff.pt", layers=64, width=5120, layer=22)
    found = import_vector("evil_response_avg_diff.pt", "Qwen/Qwen3-32B", layer=22)

A layer is always the 0-based decoder block whose OUTPUT gets the vector; each format's own counting
is translated here. Pickles are read as tensors only: code in them is refused, not run.
"""

import contextlib
import io
import json
import math
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from steering.loading import check_layer, is_same_model, model_digest, read_config, shape_of
from steering.vector_file import VECTOR_FILE, load_vector, vector_bytes

GGUF_FILE, GGUF_ARCHITECTURE = "steering_vector.gguf", "controlvector"
CHATSPACE_FILE, CHATSPACE_CONFIG = "steering_vector.pt", "steering_config.json"
LORA_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def import_gguf():
    """The gguf package; ImportError names the install."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package (pip install gguf)") from error
    return gguf


def file_names(layer, name="persona"):
    """{format: names of its files}, for a vector of a layer, in a folder of that name."""
    return {
        "safetensors": [VECTOR_FILE], "gguf": [GGUF_FILE], "pt": [f"layer_{layer}.pt"],
        "chatspace": [CHATSPACE_FILE, CHATSPACE_CONFIG], "hotwire": [f"{name}.pt"],
        "lm-eval": ["lm_eval_steered.pt"], "lora": LORA_FILES, "lora-gguf": ["adapter.gguf"],
        "peft": [f"peft/{file}" for file in LORA_FILES],
    }  # fmt: skip


def files_of(format_name, vector, metadata, name="persona", place=None, row=None):
    """{file name: bytes} of a vector (n,) in a format; metadata: model, model_type, layer and more.
    name: of the folder; place: names of modules in the transformers model, block for lm-eval,
    module and its number of features for adapters; row: their lora_A (features,). Raises ValueError
    for a layer or an architecture that the format cannot hold, ImportError naming the install."""
    layer = metadata["layer"]
    if format_name == "safetensors":  # our own, as a run leaves it
        contents = [vector_bytes(vector, metadata)]
    elif format_name == "gguf":
        contents = [gguf_bytes(vector, layer, metadata["model_type"])]
    elif format_name in ("pt", "hotwire"):  # a bare tensor: steering-vectors, EasyEdit2, torch
        contents = [torch_bytes(vector)]
    elif format_name == "lm-eval":
        steer = {"steering_vector": vector, "steering_coefficient": 1.0, "action": "add"}
        contents = [torch_bytes({place["block"]: {**steer, "bias": None, "head_index": None}})]
    elif format_name == "lora":
        contents = lora_contents(metadata | place, row, {"weight": vector[:, None]})
    elif format_name == "peft":  # exact: the bias of lora_B is the vector
        zero = torch.zeros(len(vector), 1)
        parts = {"weight": zero, "bias": vector}
        contents = lora_contents(metadata | place, torch.zeros(place["features"]), parts)
    elif format_name == "lora-gguf":
        contents = [lora_gguf_bytes(vector, row, metadata | place)]
    else:  # chatspace, whose TransformerSteerModel.from_pretrained takes these three keys alone
        config = {"model_name": metadata["model"], "target_layer": layer, "init_scale": 0.0}
        config = json.dumps(config, indent=2) + "\n"
        contents = [torch_bytes({"steering_vector": vector}), config.encode()]
    return dict(zip(file_names(layer, name)[format_name], contents, strict=True))


def gguf_bytes(vector, layer, model_type):
    """llama.cpp's control vector (repeng and EasySteer read it too): `direction.<layer>`, F32.
    llama.cpp adds direction.k to the output of block k, our count, but knows no direction.0:
    ValueError for layer 0. The keys are those that its cvector-generator and repeng write."""
    if layer < 1:
        raise ValueError(f"layer {layer}: --format gguf can hold layers 1 and above, others any")

    def fill(writer):
        writer.add_string(f"{GGUF_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{GGUF_ARCHITECTURE}.layer_count", 1)  # tensors in the file

    return written_gguf(GGUF_ARCHITECTURE, fill, {f"direction.{layer}": vector})


def written_gguf(architecture, fill, tensors):
    """Bytes of a GGUF file with the keys that fill(the library's writer) adds, and tensors, F32."""
    with tempfile.TemporaryDirectory() as folder:  # the library writes files only
        path = Path(folder, GGUF_FILE)
        writer = import_gguf().GGUFWriter(path, architecture)
        fill(writer)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def lora_contents(metadata, row, b_tensors):
    """[adapter_config.json, adapter_model.safetensors] of a rank-1 LoRA, as PEFT saves it.
    row: lora_A (features,); b_tensors: {"weight": (n, 1), "bias": (n,) if it has one}."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": metadata["model"], "target_modules": [metadata["module"]],
        "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "fan_in_fan_out": False, "lora_bias": "bias" in b_tensors,
    }  # fmt: skip
    prefix = f"base_model.model.{metadata['module']}"
    tensors = {f"{prefix}.lora_A.weight": row[None]}
    tensors |= {f"{prefix}.lora_B.{key}": tensor for key, tensor in b_tensors.items()}
    tensors = {key: tensor.float().contiguous() for key, tensor in tensors.items()}
    return [(json.dumps(config, indent=2) + "\n").encode(), save(tensors, {"format": "pt"})]


def lora_gguf_bytes(vector, row, metadata):
    """llama.cpp's adapter file of a rank-1 LoRA, F32. Raises ValueError for an architecture that
    llama.cpp does not know, or has no such module in."""
    gguf, kind = import_gguf(), metadata["model_type"]
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = {"mistral": "llama", "gpt_neox": "gptneox"}.get(kind, kind.replace("_", ""))
    name = None
    if architecture in known:
        names = gguf.get_tensor_name_map(known[architecture], metadata["layer"] + 1)
        name = names.get_name(metadata["module"])
    if name is None:
        raise ValueError(f"--format lora-gguf: the gguf package knows no {kind} with such a layer")

    def fill(writer):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 1.0)

    tensors = {"lora_a": row[None], "lora_b": vector[:, None]}
    tensors = {f"{name}.weight.{part}": tensor for part, tensor in tensors.items()}
    return written_gguf(architecture, fill, tensors)


def torch_bytes(value):
    """The bytes of torch.save."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


@dataclass
class Found:
    """What a file holds: `vector` (n,) fp32 on the host, for `layer`; and what it says of itself.
    kind: words for the format; model, model_type: "" where the file does not say; scale: what it
    was multiplied by since it was trained; metadata: the header of our own format, and what
    `import_vector` makes it."""

    kind: str
    rows: dict  # {layer: tensor}, layer None where the file does not say
    model: str = ""
    model_type: str = ""
    scale: float = 1.0
    metadata: dict = field(default_factory=dict)
    layer: int | None = None
    vector: torch.Tensor | None = None


def read_vector(path, layers, width, layer=None):
    """The `Found` vector of a file or folder, for a model of `layers` layers of `width` numbers.
    layer: which one, where the file has several or does not say. Raises ValueError for whatever is
    not such a vector."""
    path = Path(path)
    if path.is_dir():
        path = vector_file_in(path)
    if path.suffix not in READERS or not path.is_file():
        what = "not a vector file" if path.exists() else "no such file or folder"
        raise ValueError(f"{path}: {what} (allowed: {', '.join(READERS)}, or a folder)")
    try:
        found = READERS[path.suffix](path, layers)
    except ValueError as error:
        known = str(path.parent) in str(error)
        raise ValueError(f"{error}" if known else f"{path}: {error}") from error
    k = found.layer = choose_layer(path, found, layer)
    row, wrong = found.rows[k if k in found.rows else None], None
    if not 0 <= k < layers:
        wrong = f"layer {k}, where the model has 0..{layers - 1}"
    elif list(row.shape) != [width] or not row.is_floating_point():
        here = f"{row.dtype} of shape {list(row.shape)} at layer {k}"
        wrong = f"{here}, where the model needs {width} floating-point numbers"
    elif not row.isfinite().all():
        wrong = f"NaN or infinity in layer {k}"
    if wrong:
        raise ValueError(f"{path} ({found.kind}): {wrong}")
    found.vector = row.detach().to(torch.float32, copy=True)
    return found


def import_vector(path, model, layer=None, any_model=False, trust_remote_code=False):
    """The `Found` vector of a file or folder, for a model by name; metadata is a header of ours.
    Raises ValueError if it is not one, or is for another model (any_model: whatever it is for)."""
    if (Path(path) / "run.json").exists():
        raise ValueError(f"{path} is a run folder: name it without --from or --vector")
    config = read_config(model, trust_remote_code)
    layers, width = shape_of(config)
    if layer is not None:
        check_layer(layer, layers, model)
    found = read_vector(path, layers, width, layer)
    check_same_model(path, {"model": found.model or model, **found.metadata}, model, any_model)
    if found.model_type not in ("", config.model_type):  # tools name some architectures differently
        print(f"WARNING: {path} is for a {found.model_type!r:.40}, not a {config.model_type!r}")
    print(f"read     {path}: {found.kind}, layer {found.layer}, norm {found.vector.norm():.4g}")
    origin = found.metadata or {"imported_from": f"{Path(path).name} ({found.kind})"}
    found.metadata = {
        **origin, "model": model, "model_type": config.model_type, "layer": found.layer,
        "model_is_local": Path(model).exists(), "model_digest": model_digest(model),
    }  # fmt: skip
    return found


def check_same_model(path, header, model, any_model):
    """ValueError if the header is of another model, unless told that they are one."""
    if not any_model and not is_same_model(header, model):
        way_out = "--any-model if they are the same model, by another name or with other files"
        raise ValueError(f"{path} is for model {header['model']}, not {model} ({way_out})")


def choose_layer(path, found, asked):
    """The layer asked for, else the only one; ValueError where that is not in the file."""
    known = sorted(found.rows.keys() - {None})
    layer = known[0] if asked is None and len(known) == 1 else asked
    if layer is None or (known and layer not in known):
        many = f"layers {known[0]}..{known[-1]}" if known else "no layer in it"
        has = f"{path} ({found.kind}) has {f'layer {known[0]}' if len(known) == 1 else many}"
        told = f"--layer {asked}: {has}"
        raise ValueError(f"{has}: say which one with --layer" if asked is None else told)
    return layer


def vector_file_in(folder):
    """The one vector file of a folder, ours first; ValueError if there is none, or several."""
    names = [VECTOR_FILE, CHATSPACE_FILE, GGUF_FILE]
    found = [folder / name for name in names if (folder / name).exists()]
    found = found[:1] or sorted(folder.glob("layer_*.pt"))
    if len(found) != 1:
        count = f"{len(found)} files layer_<k>.pt" if found else f"none of {', '.join(names)}"
        raise ValueError(f"{folder}: {count}; name the file itself")
    return found[0]


def read_safetensors_file(path, layers):
    """Our own file."""
    vector, metadata = load_vector(path)
    known, scale = metadata.get("layer", ""), math.nan
    rows = {int(known) if re.fullmatch("[0-9]{1,6}", known) else None: vector}
    with contextlib.suppress(ValueError):
        scale = float(metadata.get("scale", 1))
    if not math.isfinite(scale):
        raise ValueError(f"scale {metadata['scale']!r:.40} is not a finite number")
    about = {key: metadata.get(key, "") for key in ("model", "model_type")}
    return Found("steering vector", rows, **about, scale=scale, metadata=metadata)


def read_gguf_file(path, layers):
    """A control vector, of one or many layers (llama.cpp, repeng)."""
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        keys = ("general.architecture", f"{GGUF_ARCHITECTURE}.model_hint")
        fields = [reader.get_field(key) for key in keys]
        architecture, hint = (str(field.contents()) if field else "" for field in fields)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the parser runs into whatever broken bytes make it
        raise ValueError(f"not a readable GGUF file ({error!r:.200})") from error
    if architecture != GGUF_ARCHITECTURE:
        raise ValueError(f"a GGUF file of architecture {architecture!r:.40}, not 'controlvector'")
    rows = {}
    for name, tensor in tensors.items():
        number = re.fullmatch(r"direction\.([0-9]{1,6})", name)
        if not number or tensor.tensor_type.name not in ("F32", "F16") or tensor.data.ndim != 1:
            what = f"{name!r:.60} ({tensor.tensor_type.name} of shape {list(tensor.data.shape)})"
            raise ValueError(f"tensor {what}, where 1-D F32 or F16 direction.<k> belongs")
        rows[int(number[1])] = torch.from_numpy(tensor.data.copy())
    if not rows:
        raise ValueError("a control vector file without a direction.<k>")
    return Found("control vector", rows, model_type=hint)


def read_pickle_file(path, layers):
    """What torch.save wrote, as tensors only.
    A tensor (n,): layer_<k>.pt says its layer. A tensor of one row a layer: persona-vectors puts
    the embeddings before them (row k + 1 is ours, but not the last, which it takes after the final
    norm), others do not. A dict: chatspace's, or assistant-axis's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser runs into whatever broken bytes make it
        if found := re.search(r"GLOBAL (\S+)", str(error)):  # torch's word for a name to import
            raise ValueError(
                f"refused, and nothing in it was run: it imports {found[1]:.80}, and only tensors "
                "are read. If you trust it, save its tensor alone with torch.save"
            ) from error
        why = f"broken or of another kind, and nothing in it was run ({type(error).__name__})"
        raise ValueError(f"not a readable torch file, {why}") from error
    if isinstance(value, dict) and "steering_vector" in value:
        layer, model = chatspace_config(path)
        return Found("chatspace", {layer: tensor_of(value["steering_vector"])}, model)
    if isinstance(value, dict) and "vector" in value:
        tensor = tensor_of(value["vector"])
        if tensor.dim() != 2 or len(tensor) != layers:
            there = f'"vector" of shape {list(tensor.shape)}'
            raise ValueError(f"{there}, where [{layers}, n] belongs, row by layer")
        return Found("assistant-axis", dict(enumerate(tensor)))
    tensor = tensor_of(value)
    if tensor.dim() == 1:
        number = re.fullmatch(r"layer_([0-9]{1,6})", path.stem)
        kind = "bare tensor, its layer in its file's name" if number else "bare tensor"
        return Found(kind, {int(number[1]) if number else None: tensor})
    if tensor.dim() == 2 and len(tensor) == layers:
        return Found("one row a layer", dict(enumerate(tensor)))
    if tensor.dim() == 2 and len(tensor) == layers + 1:
        return Found("persona-vectors", dict(enumerate(tensor[1:-1])))
    belongs = (
        f"[n], [{layers}, n] (one row a layer) or [{layers + 1}, n] (embeddings first) belongs"
    )
    shape = list(tensor.shape)
    raise ValueError(f"a tensor of shape {shape}; the model has {layers} layers, so {belongs}")


def tensor_of(value):
    """The value, if it is a plain dense tensor; ValueError otherwise."""
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu"
        if plain and not value.is_nested and not value.is_quantized:
            return value
    keys = f" with keys {[*value][:5]!r:.100}" if isinstance(value, dict) else ""
    expected = 'a dense tensor, {"steering_vector": tensor} or {"vector": tensor}'
    raise ValueError(f"a {type(value).__name__}{keys}, where {expected} belongs")


def chatspace_config(path):
    """(layer or None, model or "") as the steering_config.json beside the file says."""
    config = path.with_name(CHATSPACE_CONFIG)
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        layer, model = values.get("target_layer"), values.get("model_name") or ""
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{config}: not readable ({error})") from error
    if layer is not None and type(layer) is not int:
        raise ValueError(f"{config}: target_layer {layer!r:.40} is not a whole number")
    return layer, str(model)


READERS = {".safetensors": read_safetensors_file, ".gguf": read_gguf_file}
READERS |= dict.fromkeys((".pt", ".pth", ".bin"), read_pickle_file)
