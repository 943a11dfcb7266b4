"""From a model's name to its config, tokenizer, weights, dtype and device.

    check_layers([22], "Qwen/Qwen3-32B")                     # by its config alone
    chat = load_chat("Qwen/Qwen3-32B")                       # its chat template, as a ChatFormat
    model = load_weights(LoadOptions("Qwen/Qwen3-32B"))      # the plain transformers model

A name is a Hugging Face id, a local folder or a .gguf file (read dequantized). transformers is
imported where it is used, since that takes seconds that reading files does not need.
"""

import contextlib
import functools
import hashlib
import logging
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from steering import memory, ranks
from steering.chat_format import ChatFormat
from steering.command_line import Options
from steering.files import read_text

CONFIG_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
WEIGHTS = (".safetensors", ".bin")
QUANTIZE = ("none", "4bit")
# What transformers raises for files that are torn, no weights at all, or of another model.
UNREADABLE = (
    OSError, ImportError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError,
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadOptions(Options):
    """How a model is loaded: the one place of these options. `add_load_arguments` makes them
    options of a script, run.json keeps them, and `load_weights` acts on them."""

    model: str = "Qwen/Qwen3-32B"
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    quantize: str = "none"
    tensor_parallel: bool = False


# Those that a run keeps and another script may change.
CHANGEABLE = [field.name for field in fields(LoadOptions) if field.name != "tensor_parallel"]


def add_load_arguments(parser, of_a_run=""):
    """Add the LoadOptions. of_a_run: what to say of them all in a script that takes from a run
    those that are not given, where processes that share a model are no choice."""
    add = parser.add_argument_group("model", of_a_run).add_argument
    add("--model", help="HF id, local folder or .gguf file")
    add("--dtype", choices=("auto", *DTYPES), help="auto: bf16, but fp32 on a CPU without it")
    add("--device", help="auto, cuda, cuda:1, mps or cpu")
    add("--device-map", help="auto: spread the model over devices (needs accelerate)")
    add("--quantize", choices=QUANTIZE, help="frozen weights in 4 bits (needs bitsandbytes)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    if of_a_run:
        parser.set_defaults(**dict.fromkeys(CHANGEABLE))
    else:
        parser.set_defaults(**asdict(LoadOptions()))
        text = "share the model between the processes of torchrun"
        add("--tensor-parallel", action="store_true", help=text)


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
    path = Path(name)
    if not path.exists():
        snapshot = hub_snapshot(name)
        if snapshot is None:
            with contextlib.suppress(ValueError):  # Reading the config brings it here.
                read_config(name)
                snapshot = hub_snapshot(name)
        return snapshot and f"commit-{snapshot.name[:16]}"

    digest = hashlib.sha256()
    for file in model_files(path) if path.is_dir() else [path]:
        if file.suffix in WEIGHTS or file == path:
            status = file.stat()
            digest.update(str(status.st_size).encode())
            digest.update(weights_digest(file, status.st_size, status.st_mtime_ns))
        else:
            digest.update(file.name.encode() + file.read_bytes())
    return f"files-{digest.hexdigest()[:16]}"


def hub_snapshot(name):
    """The folder of a model of the hub in the local cache, named by its commit; None if none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name that a model can have
        return None
    return Path(found).parent if isinstance(found, str) else None


def model_files(folder):
    """The files of a folder that a model is made of, sorted."""
    suffixes = *WEIGHTS, ".jinja", ".model", ".py"
    files = (f for f in folder.iterdir() if f.name in CONFIG_FILES or f.suffix in suffixes)
    return sorted(filter(Path.is_file, files))


def same_files(name, digest, other):
    """Whether two `model_digest` of a model say the same. Two commits of the hub do if what the
    cache has of both is the same files: then only a README or the like has changed."""
    if digest == other:
        return True
    commits = [str(each) for each in (digest, other)]
    if not name or not all(commit.startswith("commit-") for commit in commits):
        return False
    here = hub_snapshot(name)
    if here is None:
        return False

    snapshots = []
    for commit in commits:
        found = list(here.parent.glob(f"{commit.removeprefix('commit-')}*"))
        if len(found) != 1:
            return False
        snapshots.append({file.name: file.resolve() for file in model_files(found[0])})
    ours, theirs = snapshots
    our_weights = {file for file in ours if file.endswith(WEIGHTS)}
    their_weights = {file for file in theirs if file.endswith(WEIGHTS)}
    if our_weights and their_weights and our_weights != their_weights:
        return False
    # The weights of one of them may not be in the cache yet.
    return all(ours[file] == theirs[file] for file in ours.keys() & theirs.keys())


def is_same_model(header, name):
    """Whether the header of a vector file is of this model.
    By their files, if those of both were local, since "a/final" and "b/final" are two models;
    otherwise by the last part of their names, so that a local copy of a hub's model passes."""
    theirs = header.get("model_digest", "")
    ours = model_digest(name) or ""
    if theirs.startswith("files") and ours.startswith("files"):
        return theirs == ours
    if theirs == f"commit-{Path(name).name[:16]}":
        return True  # the snapshot in the hub's cache, by its path
    return base_name(header.get("model", "unknown")) == base_name(name)


def base_name(model):
    """The last part of a model's name: "Qwen/Qwen3-32B" and "/models/Qwen3-32B/" -> "qwen3-32b"."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()


def shape_of(config):
    """(number of layers, hidden_size) of a config, of its text part if there are several."""
    text = config.get_text_config()
    return text.num_hidden_layers, text.hidden_size


def longest_text(config):
    """How many tokens a model takes; None where its config does not say.
    It is those that change no other row of a batch: beyond, longrope has other embeddings for all
    of them, as dynamic ones do beyond `max_position_embeddings`."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    longest = getattr(text, "max_position_embeddings", None)
    if rope.get("rope_type", rope.get("type")) == "longrope":
        key = "original_max_position_embeddings"
        return rope.get(key) or getattr(text, key, longest)  # there before transformers 5
    return longest


def check_layer(layer, num_layers, model_name, option="--layer"):
    """ValueError unless `layer`, given by an option, is one of the 0-based decoder layers."""
    if not 0 <= layer < num_layers:
        raise ValueError(
            f"{option} {layer} is out of range: {model_name} has {num_layers} layers "
            f"(use 0..{num_layers - 1})"
        )


def check_layers(layers, name, trust_remote_code=False):
    """ValueError unless all are 0-based decoder layers of a model, by its config alone."""
    num_layers, _ = shape_of(read_config(name, trust_remote_code))
    for layer in layers:
        check_layer(layer, num_layers, name)


def load_tokenizer(name, trust_remote_code=False):
    """The tokenizer of a model; ValueError if it does not load."""
    from transformers import AutoTokenizer

    arguments = gguf_arguments(name)
    try:
        return AutoTokenizer.from_pretrained(**arguments, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        if not Path(name).exists():
            reason = f"{reason} (there is no such folder here)"
        raise ValueError(f"--model {name}: its tokenizer does not load: {reason}") from error


def load_chat(name, chat_template=None, trust_remote_code=False, template=None, date=None):
    """The ChatFormat of a model; chat_template: a file to use in place of its own template.
    template: the text of such a file, and date: as a run keeps them."""
    tokenizer = load_tokenizer(name, trust_remote_code)
    if chat_template:
        template = read_text(chat_template)
    if template:
        tokenizer.chat_template = template
    config = read_config(name, trust_remote_code)
    tokens = config.get_text_config().vocab_size
    return ChatFormat(tokenizer, date, tokens, longest_text(config))


def fake_weights(options):
    """The transformers model of a config, of torch's fake tensors: shapes without content.
    options: LoadOptions, their dtype "auto" being that of a GPU. ValueError if there is none."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_config(options.model, options.trust_remote_code)
    dtype = DTYPES[pick_dtype(options.dtype, "cuda")]
    how = {"dtype": dtype, "trust_remote_code": options.trust_remote_code}
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            model = AutoModelForCausalLM.from_config(config, **how)
        except ValueError:
            model = AutoModelForImageTextToText.from_config(config, **how)
    model.config._name_or_path = options.model
    return model


def four_bits(dtype):
    """transformers' config for linear layers in 4 bits (NF4), by bitsandbytes, that compute in a
    dtype. Embeddings, norms and head stay as they are."""
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError("--quantize needs: pip install bitsandbytes accelerate") from error
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns at every product.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


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


def load_weights(options):
    """The transformers model of LoadOptions, on its device; `model.name_or_path` is its name.
    The device "fake" gives `fake_weights`; with tensor_parallel this process has a part of it, see
    ranks.py. Raises ValueError if the model, a weight, the device or a package is not there."""
    from transformers.utils.logging import disable_progress_bar

    name = options.model
    if options.dtype not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {options.dtype}: not one of auto, {', '.join(DTYPES)}")
    if options.device == "fake":
        return fake_weights(options)
    device = pick_device(options.device)
    if device == "cpu":
        memory.keep_freed()
    disable_progress_bar()
    arguments = pretrained_arguments(options, device)
    try:
        model, report = from_pretrained(arguments)
        check_weights(model, report)
        for module in model.modules():
            # On some CPUs bitsandbytes packs 4-bit weights, and packed ones have no gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if name.endswith(".gguf"):  # It is a plain model once it is dequantized.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
        model.config._name_or_path = name
        placed = arguments.get("device_map") or (options.tensor_parallel and ranks.size() > 1)
        return model if placed else model.to(device)
    except UNREADABLE as error:  # also what the device has no room for
        raise ValueError(f"--model {name} does not load: {str(error).strip()}") from error


def pretrained_arguments(options, device):
    """What `from_pretrained` is told, as a dict, for LoadOptions and the device picked for them."""
    name = options.model
    dtype = DTYPES[pick_dtype(options.dtype, device)]
    arguments = {
        **gguf_arguments(name),
        "dtype": dtype,
        "device_map": options.device_map,
        "trust_remote_code": options.trust_remote_code,
        # Mismatched shapes are let through here, so that `check_weights` can name them.
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if name.endswith(".gguf"):
        with contextlib.suppress(ImportError, TypeError):  # Older versions always dequantize.
            from transformers import GgufConfig

            arguments["quantization_config"] = GgufConfig(dequantize=True)
    if options.quantize != "none":
        if name.endswith(".gguf"):
            raise ValueError("--quantize is not for .gguf files, which are dequantized")
        arguments["quantization_config"] = four_bits(dtype)
        arguments["device_map"] = options.device_map or {"": device}
    if options.tensor_parallel and ranks.size() > 1:
        ranks.check_heads(read_config(name, options.trust_remote_code))
        del arguments["device_map"]
        try:
            from transformers.distributed import DistributedConfig

            arguments["distributed_config"] = DistributedConfig(tp_plan="auto")
        except (ImportError, TypeError):  # older versions
            arguments["tp_plan"] = "auto"
    return arguments


def from_pretrained(arguments):
    """(model, loading report) of a causal language model, or one that also sees images, which is
    used without them."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        return AutoModelForCausalLM.from_pretrained(**arguments)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
    return AutoModelForImageTextToText.from_pretrained(**arguments)
