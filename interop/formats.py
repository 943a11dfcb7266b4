"""Vectors as files of other tools: bytes to write, and a reader that trusts nothing.

    files = files_of("gguf", Source(path, vector, {"layer": 22, "model_type": "qwen3"}))
    source = import_vector("evil_response_avg_diff.pt", "Qwen/Qwen3-32B", layer=22)

A layer is always the 0-based decoder block whose OUTPUT gets the vector; each format's own counting
is translated here. Pickles are read as tensors only: code in them is refused, not run.
"""

import io
import json
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from interop.adapter import Site
from steering.files import read_json
from steering.loading import is_same_model, model_digest, read_config, shape_of
from steering.vector_file import NOT_READ, VECTOR_FILE, load_vector, vector_bytes

GGUF_FILE = "steering_vector.gguf"
CHATSPACE_FILE = "steering_vector.pt"
CHATSPACE_CONFIG = "steering_config.json"
LORA_FILES = ["adapter_config.json", "adapter_model.safetensors"]

VECTOR_ALONE = ("safetensors", "gguf", "pt", "chatspace")  # formats that need nothing else
WITH_ROW = ("lora", "lora-gguf")  # adapters made of a fitted input row
WITH_MODEL = (*WITH_ROW, "peft")  # formats that load the model


@dataclass
class Source:
    """A vector (n,) to be written, and what files and their card say of it.

    path: where it was found. metadata: the header of our own format, with model, model_type, layer
    and, for the card, model_is_local. scale: of the trained vector, or of that of the tool it was
    imported from. record, result: run.json and eval.json, empty for a vector from elsewhere.
    block: what lm-eval calls the layer. site: where an adapter goes; module: what servers call it;
    row: its lora_A (features,); measured: what the adapter loses, of `compare_with_adapter`;
    fitted: how the row was fitted.
    """

    path: Path
    vector: torch.Tensor
    metadata: dict
    scale: float = 1.0
    record: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    block: str = ""
    site: Site | None = None
    module: str = ""
    row: torch.Tensor | None = None
    measured: dict | None = None
    fitted: dict | None = None

    @property
    def layer(self):
        """Where the vector acts."""
        return self.metadata["layer"]


def import_gguf():
    """The gguf package; ImportError names the install."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package (pip install gguf)") from error
    return gguf


def file_names(layer):
    """{format: names of its files}, for a vector of a layer."""
    return {
        "safetensors": [VECTOR_FILE],
        "gguf": [GGUF_FILE],
        "pt": [f"layer_{layer}.pt"],
        "chatspace": [CHATSPACE_FILE, CHATSPACE_CONFIG],
        "lm-eval": ["lm_eval_steered.pt"],
        "lora": LORA_FILES,
        "lora-gguf": ["adapter.gguf"],
        "peft": [f"peft/{file}" for file in LORA_FILES],
    }


FORMATS = tuple(file_names(0))


def files_of(format_name, source):
    """{file name: bytes} of a Source in a format.

    Raises ValueError for a layer or an architecture that the format cannot hold, ImportError naming
    the install.
    """
    vector = source.vector
    layer = source.layer
    if format_name == "safetensors":  # our own, as a run leaves it
        contents = [vector_bytes(vector, {**source.metadata, "scale": source.scale})]
    elif format_name == "gguf":
        contents = [gguf_bytes(vector, layer, source.metadata["model_type"])]
    elif format_name == "pt":  # a bare tensor: steering-vectors, torch
        contents = [torch_bytes(vector)]
    elif format_name == "lm-eval":
        steer = {"steering_vector": vector, "steering_coefficient": 1.0, "action": "add"}
        contents = [torch_bytes({source.block: {**steer, "bias": None, "head_index": None}})]
    elif format_name == "lora":
        contents = lora_contents(source, source.row, {"weight": vector[:, None]})
    elif format_name == "peft":  # exact: the bias of lora_B is the vector
        nothing = torch.zeros(source.site.module.in_features)
        tensors = {"weight": torch.zeros(len(vector), 1), "bias": vector}
        contents = lora_contents(source, nothing, tensors)
    elif format_name == "lora-gguf":
        contents = [lora_gguf_bytes(source)]
    else:  # chatspace, whose TransformerSteerModel.from_pretrained takes these three keys alone
        model = source.metadata["model"]
        config = {"model_name": model, "target_layer": layer, "init_scale": 0.0}
        contents = [torch_bytes({"steering_vector": vector}), json_bytes(config)]
    return dict(zip(file_names(layer)[format_name], contents, strict=True))


def json_bytes(config):
    """A config file as bytes."""
    return (json.dumps(config, indent=2) + "\n").encode()


def torch_bytes(value):
    """The bytes of torch.save."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def gguf_bytes(vector, layer, model_type):
    """llama.cpp's control vector, which repeng reads too: `direction.<layer>`, F32.

    llama.cpp adds direction.k to the output of block k, our count, but knows no direction.0:
    ValueError for layer 0. The keys are those that its cvector-generator and repeng write.
    """
    if layer < 1:
        raise ValueError(f"layer {layer}: --format gguf can hold layers 1 and above, others any")
    fields = {"controlvector.model_hint": model_type, "controlvector.layer_count": 1}
    return written_gguf("controlvector", fields, {f"direction.{layer}": vector})


def written_gguf(architecture, fields, tensors):
    """Bytes of a GGUF file; fields: {key: str, int or float}, tensors: written as F32."""
    with tempfile.TemporaryDirectory() as folder:  # the library writes files only
        path = Path(folder, GGUF_FILE)
        writer = import_gguf().GGUFWriter(path, architecture)
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        for key, value in fields.items():
            add[type(value)](key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def lora_contents(source, row, b_tensors):
    """[adapter_config.json, adapter_model.safetensors] of a rank-1 LoRA, as PEFT saves it.

    row: lora_A (features,); b_tensors: {"weight": (n, 1), "bias": (n,) if it has one}.
    """
    module = source.module
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": source.metadata["model"],
        "target_modules": [module],
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "lora_bias": "bias" in b_tensors,
    }
    tensors = {f"base_model.model.{module}.lora_A.weight": row[None].float()}
    for key, tensor in b_tensors.items():
        tensors[f"base_model.model.{module}.lora_B.{key}"] = tensor.float().contiguous()
    return [json_bytes(config), save(tensors, {"format": "pt"})]


def lora_gguf_bytes(source):
    """llama.cpp's adapter file of a rank-1 LoRA, F32. Raises ValueError for an architecture that
    llama.cpp does not know, or has no such module in."""
    gguf = import_gguf()
    kind = source.metadata["model_type"]
    architecture = kind.removesuffix("_text").replace("_", "")
    architecture = {"mistral": "llama", "qwen25vl": "qwen2vl"}.get(architecture, architecture)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    module = source.site.name.replace("language_model.", "")  # as llama.cpp's own converter does
    try:
        name = gguf.get_tensor_name_map(known[architecture], source.layer + 1)[module]
    except KeyError as error:
        raise ValueError(f"the gguf package knows no {kind} with such a layer") from error
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}
    tensors = {
        f"{name}.weight.lora_a": source.row[None],
        f"{name}.weight.lora_b": source.vector[:, None],
    }
    return written_gguf(architecture, fields, tensors)


# ---------------------------------------------------------------- reading


@dataclass
class Found:
    """What a file holds, before a layer is chosen.

    kind: words for the format. rows: {layer: tensor}, layer None where the file does not say.
    metadata: model and model_type, where the file does say; of our own format its header.
    """

    kind: str
    rows: dict
    metadata: dict = field(default_factory=dict)


def import_vector(path, model, layer=None, any_model=False, trust_remote_code=False):
    """The Source of a file, for a model by name; its metadata are a header of ours.

    layer: which one, where the file has several or does not say. any_model: whatever model it is
    for. Raises ValueError for whatever is not such a vector.
    """
    path = Path(path)
    if (path / "run.json").exists():
        raise ValueError(f"{path} is a run folder: name it without --from or --vector")
    if path.suffix not in READERS or not path.is_file():
        raise ValueError(f"{path}: no such file, or no vector file ({', '.join(READERS)})")
    config = read_config(model, trust_remote_code)
    layers, width = shape_of(config)
    try:
        found = READERS[path.suffix](path, layers)
        scale = float(found.metadata.get("scale", 1))
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {why}") from error

    layer = choose_layer(path, found, layer)
    row = found.rows.get(layer, found.rows.get(None))
    here = f"{path} ({found.kind}), layer {layer}"
    if not 0 <= layer < layers:
        raise ValueError(f"{here}: the model has 0..{layers - 1}")
    if row.shape != (width,) or not row.is_floating_point():
        there = f"{row.dtype} of shape {list(row.shape)}"
        raise ValueError(f"{here}: {there}, where {width} floating-point numbers belong")
    vector = row.detach().to(torch.float32, copy=True)
    if not vector.isfinite().all():
        raise ValueError(f"{here}: {row.dtype} with NaN or infinity as fp32")
    print(f"read     {here}, norm {vector.norm():.4g}")

    header = found.metadata
    check_same_model(path, {"model": model, **header}, model, any_model)
    kind = header.get("model_type", config.model_type)
    known = (config.model_type, config.get_text_config().model_type)
    if kind not in known:  # tools name some architectures differently
        print(f"WARNING: {path} is for a {kind!r:.40}, not a {config.model_type!r}")
    if path.suffix != ".safetensors":
        header["imported_from"] = f"{path.name} ({found.kind})"
    header |= {
        "model": model,
        "model_type": config.model_type,
        "layer": layer,
        "model_is_local": Path(model).exists(),
        "model_digest": model_digest(model),
    }
    return Source(path, vector, header, scale)


def check_same_model(path, header, model, any_model):
    """ValueError if the header is of another model, unless told that they are one."""
    if not any_model and not is_same_model(header, model):
        way_out = "--any-model if they are the same model, by another name or with other files"
        raise ValueError(f"{path} is for model {header.get('model')}, not {model} ({way_out})")


def choose_layer(path, found, asked):
    """The layer asked for, else the only one; ValueError where that is not in the file."""
    known = sorted(found.rows.keys() - {None})
    if asked is None and len(known) == 1:
        return known[0]
    if asked is not None and (not known or asked in known):
        return asked
    there = ", ".join(map(str, known)) or "unknown"
    what = f"{path} ({found.kind}) has layer {there}"
    raise ValueError(f"{what}: say which with --layer (now: {asked})")


def read_safetensors_file(path, layers):
    """Our own file."""
    vector, metadata = load_vector(path)
    layer = None
    if metadata.get("layer", "").isdecimal():
        layer = int(metadata["layer"])
    return Found("steering vector", {layer: vector}, metadata)


def read_gguf_file(path, layers):
    """A control vector, of one or many layers (llama.cpp, repeng)."""
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.get_field("general.architecture").contents()
        hint = reader.get_field("controlvector.model_hint")
        says = {"model_type": hint.contents()} if hint else {}
    except Exception as error:  # the parser runs into whatever broken bytes make it
        raise ValueError(f"not a readable GGUF file ({error!r:.200})") from error
    if reader.get_field("adapter.type"):
        raise ValueError(f"a LoRA adapter, {NOT_READ}")
    if architecture != "controlvector":
        raise ValueError(f"a GGUF file of architecture {architecture!r:.40}, not 'controlvector'")
    rows = {}
    for tensor in reader.tensors:
        number = re.fullmatch(r"direction\.([0-9]{1,6})", tensor.name)
        kind = tensor.tensor_type.name
        if not number or kind not in ("F32", "F16") or tensor.data.ndim != 1:
            what = f"{tensor.name!r:.60} ({kind} of shape {list(tensor.data.shape)})"
            raise ValueError(f"tensor {what}, where 1-D F32 or F16 direction.<k> belongs")
        rows[int(number[1])] = torch.from_numpy(tensor.data.copy())
    if not rows:
        raise ValueError("a control vector file without a direction.<k>")
    return Found("control vector", rows, says)


def read_pickle_file(path, layers):
    """What torch.save wrote, as tensors only.

    A tensor (n,): layer_<k>.pt says its layer. A tensor of one row a layer: persona-vectors puts
    the embeddings before them (row k + 1 is ours, but not the last, which it takes after the final
    norm), others do not. A dict: chatspace's, or assistant-axis's.
    """
    value = load_tensors(path)
    kind = "one row a layer"
    if isinstance(value, dict) and "steering_vector" in value:
        layer, says = chatspace_config(path)
        return Found("chatspace", {layer: tensor_of(value["steering_vector"])}, says)
    if isinstance(value, dict) and "vector" in value:
        kind = "assistant-axis"
        value = value["vector"]
    if isinstance(value, dict) and any(isinstance(part, dict) for part in value.values()):
        raise ValueError(f"a dict of dicts, as lm-eval has it, {NOT_READ}")
    tensor = tensor_of(value)
    if tensor.dim() == 1:
        number = re.fullmatch(r"layer_([0-9]{1,6})", path.stem)
        if number:
            return Found("bare tensor, its layer in its file's name", {int(number[1]): tensor})
        return Found("bare tensor", {None: tensor})
    if tensor.dim() == 2 and len(tensor) == layers:
        return Found(kind, dict(enumerate(tensor)))
    if tensor.dim() == 2 and len(tensor) == layers + 1 and kind != "assistant-axis":
        return Found("persona-vectors", dict(enumerate(tensor[1:-1])))
    raise ValueError(
        f"a tensor of shape {list(tensor.shape)}; the model has {layers} layers, so [n], "
        f"[{layers}, n] (one row a layer) or [{layers + 1}, n] (embeddings first) belongs"
    )


def load_tensors(path):
    """What torch.save wrote to a file, if that is tensors; no code is run. ValueError otherwise."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parser runs into whatever broken bytes make it
        found = re.search(r"GLOBAL (\S+)", str(error))  # torch's word for a name to import
        if found:
            raise ValueError(
                f"refused, and nothing in it was run: it imports {found[1]:.80}, and only tensors "
                "are read. If you trust it, save its tensor alone with torch.save"
            ) from error
        why = f"broken or of another kind, and nothing in it was run ({type(error).__name__})"
        raise ValueError(f"not a readable torch file, {why}") from error


def tensor_of(value):
    """The value, if it is a plain dense tensor; ValueError otherwise."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_nested
    if is_tensor and value.layout == torch.strided and value.device.type == "cpu":
        return value
    kind = type(value).__name__
    if isinstance(value, dict):
        kind += f" with keys {[*value][:5]!r:.100}"
    expected = 'a dense tensor, {"steering_vector": tensor} or {"vector": tensor}'
    raise ValueError(f"a {kind}, where {expected} belongs")


def chatspace_config(path):
    """(layer or None, {"model"}) as the steering_config.json beside the file says."""
    values = read_json(path.with_name(CHATSPACE_CONFIG))
    if not values:
        return None, {}
    layer = values.get("target_layer")
    if not isinstance(layer, int | None):
        raise ValueError(f"target_layer {layer!r:.40} of {CHATSPACE_CONFIG} is not a whole number")
    return layer, {"model": str(values.get("model_name"))}


READERS = {
    ".safetensors": read_safetensors_file,
    ".gguf": read_gguf_file,
    ".pt": read_pickle_file,
    ".pth": read_pickle_file,
    ".bin": read_pickle_file,
}
