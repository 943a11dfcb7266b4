"""From a model's name to its config, tokenizer, weights, dtype and device.

    layers, width = model_shape("Qwen/Qwen3-32B")
    chat = load_chat("Qwen/Qwen3-32B")                       # its chat template, as a ChatFormat
    model = load_weights("Qwen/Qwen3-32B", "auto", "auto")   # the plain transformers model

A name is a Hugging Face id, a local folder or a .gguf file (read dequantized). transformers is
imported where it is used, since that takes seconds that reading files does not need.
"""

import contextlib
import functools
import hashlib
import logging
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from steering import memory, ranks
from steering.chat_format import ChatFormat
from steering.vector_file import base_name

CONFIG_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
CONFIG_FILES += ["added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"]
WEIGHTS = ".safetensors", ".bin"
QUANTIZE = "none", "4bit", "8bit"
# What transformers raises for files that are torn, no weights at all, or of another model.
UNREADABLE = (
    OSError, ImportError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError,
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def cpu_has_bf16():
    """Whether this CPU multiplies bf16 natively (AVX512-BF16, AMX, or Arm's bf16)."""
    with contextlib.suppress(OSError):
        return bool(
            re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
        )
    return False


def pick_device(device="auto"):
    """The device, "auto" being cuda, mps or cpu; ValueError for one that is not here."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next((kind for kind, available in there.items() if available), "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device}: not a device (use auto, cuda, mps or cpu)") from error
    if not there.get(kind, True):
        raise ValueError(f"--device {device}: no {kind} device here (use --device cpu)")
    return device


def pick_dtype(dtype, device):
    """The key of DTYPES, "auto" being bf16, but fp32 on a CPU without native bf16."""
    if dtype != "auto":
        return dtype
    return "fp32" if device == "cpu" and not cpu_has_bf16() else "bf16"


def gguf_arguments(name):
    """from_pretrained arguments that read `name`; ValueError if it is a path and not there.
    A .gguf file is a folder plus `gguf_file`."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if (looks_local or path.suffix == ".gguf") and not path.exists():
        raise ValueError(f"--model {name}: no such file or folder")
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": name}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def read_config(name, trust_remote_code=False):
    """The config of a model, by itself; ValueError if it is not readable."""
    from transformers import AutoConfig

    arguments = gguf_arguments(name)
    try:
        return AutoConfig.from_pretrained(**arguments, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error


@functools.cache  # an evaluation or export of many runs asks for the same model again and again
def weights_digest(file, size, changed):
    """sha256 of a file of weights, or of samples of a large one. changed: when it was written."""
    with open(file, "rb") as handle:
        if size <= 2**29:
            return hashlib.file_digest(handle, "sha256").digest()
        digest = hashlib.sha256()
        for i in range(128):
            handle.seek(size * i // 128)
            digest.update(handle.read(2**16))
        return digest.digest()


def model_digest(name):
    """What stands for a model's files: "files-<hash>" of a local one, "commit-<id>" of the hub's.
    None if it is not here yet. Hashed are config, tokenizer, template, code and weights; of a file
    of weights above 512 MiB its size and 128 samples of 64 KiB, since all of 65 GB would take
    minutes: there a change to a few of the weights may pass."""
    path, digest = Path(name), hashlib.sha256()
    if not path.exists():
        from huggingface_hub import try_to_load_from_cache

        for look in (lambda: None, lambda: read_config(name)):  # the config brings it here
            with contextlib.suppress(ValueError):  # nothing by that name
                look()
                if isinstance(found := try_to_load_from_cache(name, "config.json"), str):
                    return f"commit-{Path(found).parent.name[:16]}"
        return None
    for file in model_files(path) if path.is_dir() else [path]:
        if file.suffix in WEIGHTS or file == path:
            about = file.stat()
            digest.update(str(about.st_size).encode())
            digest.update(weights_digest(file, about.st_size, about.st_mtime_ns))
        else:
            digest.update(file.name.encode() + file.read_bytes())
    return f"files-{digest.hexdigest()[:16]}"


def model_files(folder):
    """The files of a folder that a model is made of, sorted."""
    suffixes = *WEIGHTS, ".jinja", ".model", ".py"
    files = (f for f in folder.iterdir() if f.name in CONFIG_FILES or f.suffix in suffixes)
    return sorted(filter(Path.is_file, files))


def same_files(name, digest, other):
    """Whether two `model_digest` of a model say the same. Two commits of the hub do if what the
    cache has of both is the same files: then only a README or the like has changed."""
    both = all(str(each).startswith("commit-") for each in (digest, other))
    if digest == other or not (both and name):
        return digest == other
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(here := try_to_load_from_cache(name, "config.json"), str):
        return False
    commits = (each.removeprefix("commit-") for each in (digest, other))
    snapshots = [list(Path(here).parents[1].glob(f"{commit}*")) for commit in commits]
    if any(len(found) != 1 for found in snapshots):
        return False
    each = [{f.name: f.resolve() for f in model_files(found[0])} for found in snapshots]
    weights = [{file for file in files if file.endswith(WEIGHTS)} for files in each]
    if all(weights) and weights[0] != weights[1]:  # of one, they may not be here yet
        return False
    return all(each[0][file] == each[1][file] for file in each[0].keys() & each[1].keys())


def is_same_model(header, name):
    """Whether the header of a vector file is of this model.
    By their files, if those of both were local, since "a/final" and "b/final" are two models;
    otherwise by the last part of their names, so that a local copy of a hub's model passes."""
    theirs, ours = header.get("model_digest", ""), model_digest(name) or ""
    if theirs.startswith("files") and ours.startswith("files"):
        return theirs == ours
    if theirs == f"commit-{Path(name).name[:16]}":
        return True  # the snapshot in the hub's cache, by its path
    return base_name(header.get("model", "unknown")) == base_name(name)


def shape_of(config):
    """(number of layers, hidden_size) of a config, of its text part if there are several."""
    text = config.get_text_config()
    return text.num_hidden_layers, text.hidden_size


def longest_text(config):
    """How many tokens a model takes; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def model_shape(name, trust_remote_code=False):
    """(number of layers, hidden_size) from the config alone; ValueError if it is not readable."""
    return shape_of(read_config(name, trust_remote_code))


def check_layer(layer, num_layers, model_name):
    """ValueError unless `layer` is one of the 0-based decoder layers."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"--layer {layer} is out of range: {model_name} has {num_layers} layers "
            f"(use 0..{num_layers - 1})"
        )


def load_tokenizer(name, chat_template=None, trust_remote_code=False):
    """The tokenizer of a model; chat_template: a file to use in place of its own template."""
    from transformers import AutoTokenizer

    arguments = gguf_arguments(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "" if Path(name).exists() else "no such folder here, and "
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--model {name}: {where}its tokenizer does not load: {reason}") from error
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8-sig")
    return tokenizer


def load_chat(name, chat_template=None, trust_remote_code=False, template=None, date=None):
    """The ChatFormat of a model; chat_template: a file to use in place of its own template.
    template: the text of such a file, and date: as a run keeps them."""
    tokenizer = load_tokenizer(name, chat_template, trust_remote_code)
    if template:
        tokenizer.chat_template = template
    return ChatFormat(tokenizer, date)


def fake_weights(name, dtype, trust_remote_code=False):
    """The transformers model of a config, of torch's fake tensors: shapes without content.
    dtype: "auto", that of a GPU, or a key of DTYPES. ValueError if there is no such config."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_config(name, trust_remote_code)
    options = {"dtype": DTYPES[pick_dtype(dtype, "cuda")], "trust_remote_code": trust_remote_code}
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except ValueError:
            model = AutoModelForImageTextToText.from_config(config, **options)
    model.config._name_or_path = name
    return model


def quantization(bits, dtype):
    """transformers' config for weights of linear layers as "4bit" (NF4) or "8bit", by bitsandbytes,
    that computes in a dtype. Embeddings, norms and head stay as they are."""
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError("--quantize needs: pip install bitsandbytes accelerate") from error
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every product that it casts
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **kind)


def check_weights(model, report):
    """ValueError unless the files held every weight of a model in its shape, and no layer beyond.

    transformers fills what is missing with random numbers, and only says so on stderr.
    report: what `from_pretrained(output_loading_info=True)` gives. A tied head does not count.
    """
    missing = sorted(report["missing_keys"])
    mismatched = [
        f"{name} {list(in_file)}, config says {list(in_model)}"
        for name, in_file, in_model in report["mismatched_keys"]
    ]
    unexpected = sorted(report["unexpected_keys"])
    beyond = [name for name in unexpected if layer_beyond(model, name)]
    problems = []
    for what, names in (
        ("its files lack", missing),
        ("its files have another shape of", mismatched),
        ("its files have layers that its config does not", beyond),
    ):
        if names:
            problems.append(f"{what} {some_of(names)}")
    if missing and unexpected:
        problems.append(f"they have instead {some_of(unexpected)}")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. It would be partly random: use a folder whose config.json and "
            "weights belong together, saved by save_pretrained of the model itself"
        )


def some_of(names):
    """The first three of some names, and how many there are."""
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({', '.join(names[:3])})"


def layer_beyond(model, name):
    """Whether a weight's name is of a layer after the model's last one.
    Layers that predict tokens further ahead (num_nextn_predict_layers) are left out on purpose."""
    match = re.match(r"(.+?)\.(\d+)\.", name)
    if not match:
        return False
    extra = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and f".{path}".endswith(f".{match[1]}"):
            return int(match[2]) >= len(module) + extra
    return False


def load_weights(
    name,
    dtype,
    device,
    device_map=None,
    trust_remote_code=False,
    quantize="none",
    tensor_parallel=False,
):
    """The transformers model of a name, on its device; `model.name_or_path` is the name.
    dtype: "auto" or a key of DTYPES; device: "fake" for `fake_weights`; device_map: as in
    transformers, needs accelerate; quantize: of QUANTIZE; tensor_parallel: a part for this process,
    see ranks.py. Raises ValueError if the model or the device is not there, or a package."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    if device == "fake":
        return fake_weights(name, dtype, trust_remote_code)
    tensor_parallel = tensor_parallel and ranks.size() > 1
    device, gguf = pick_device(device), name.endswith(".gguf")
    if device == "cpu":
        memory.keep_freed()
    options = {"dtype": DTYPES[pick_dtype(dtype, device)], "device_map": device_map}
    if gguf:
        with contextlib.suppress(ImportError, TypeError):  # older versions always dequantize
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
    disable_progress_bar()
    if quantize != "none":
        if gguf:
            raise ValueError("--quantize is not for .gguf files, which are dequantized")
        options["quantization_config"] = quantization(quantize, options["dtype"])
        device_map = options["device_map"] = device_map or {"": device}
    if tensor_parallel:
        ranks.check_heads(read_config(name, trust_remote_code))
        del options["device_map"]
        try:
            from transformers.distributed import DistributedConfig

            options["distributed_config"] = DistributedConfig(tp_plan="auto")
        except (ImportError, TypeError):  # older versions
            options["tp_plan"] = "auto"
    options |= {**gguf_arguments(name), "trust_remote_code": trust_remote_code}
    # Mismatched shapes are let through here, so that `check_weights` can name them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(**options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            # It is used without images.
            model, report = AutoModelForImageTextToText.from_pretrained(**options)
        check_weights(model, report)
    except UNREADABLE as error:
        raise ValueError(f"--model {name} does not load: {str(error).strip()}") from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # of 4 bits: packed, it has no gradient
            module.support_avx512bf16_for_cpu = False
    if gguf:  # it is a plain model now
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config._name_or_path = name
    return model if device_map or tensor_parallel else model.to(device)
