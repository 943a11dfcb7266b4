"""A trained vector as files that other tools read, and their vectors as files of ours.

    python export_vector.py RUN_DIR --format gguf --out exported/pirate
    python export_vector.py runs --format all --out exported           # every finished run in there
    python export_vector.py --from evil.pt --model Qwen/Qwen3-32B --layer 22 --format safetensors \\
        --out imported/evil

Each folder gets a README.md, a card that says what the vector is and how each tool loads it. Layers
are 0-based decoder blocks whose output gets the vector, whatever the format calls them. No model is
loaded, and no pickle is run. Exit codes: 0 done, 2 bad input.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

import eval_report
from data_layouts import parse_name
from hook_model import (
    base_name,
    check_layer,
    load_vector,
    read_config,
    shape_of,
    write_atomically,
)
from judge import SCALES
from run_folder import VECTOR_FILE, find_runs, read_json
from vector_formats import read_vector, write_chatspace, write_gguf, write_pt, write_safetensors

FORMATS = ("safetensors", "gguf", "pt", "chatspace")


@dataclass
class Source:
    """A vector (n,) and all that is known of it.

    model_type: the architecture, as in the model's config; metadata: what goes into our own file's
    header; record, result: run.json and eval.json, empty for a vector from elsewhere.
    """

    vector: object
    model: str
    model_type: str
    layer: int
    metadata: dict
    record: dict
    result: dict


# ------------------------------------------------------------------ where vectors come from


def from_run(folder):
    """The Source of a finished run folder; ValueError if it is not finished or not readable."""
    record, path = read_json(folder / "run.json"), folder / VECTOR_FILE
    if not path.exists():
        raise ValueError(f"{folder}: no {VECTOR_FILE}, so this run has not finished")
    if missing := {"dataset", "args", "counts", "final"} - record.keys():
        raise ValueError(f"{folder / 'run.json'}: unreadable, no {', '.join(sorted(missing))}")
    vector, metadata = load_vector(path)
    try:
        model, layer = metadata["model"], int(metadata["layer"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its header names no model and layer ({metadata})") from error
    kind = metadata.get("model_type") or read_config(model).model_type  # not in older runs
    metadata, result = {**metadata, "model_type": kind}, read_json(folder / "eval.json")
    if result.get("config", {}).get("format_version") != eval_report.FORMAT_VERSION:
        result = {}
    return Source(vector, model, kind, layer, metadata, record, result)


def from_file(path, args):
    """The Source of a file of any format, for --model; ValueError if it is not one for it."""
    config = read_config(args.model, args.trust_remote_code)
    layers, width = shape_of(config)
    if args.layer is not None:
        check_layer(args.layer, layers, args.model)
    found = read_vector(path, layers, width, args.layer)
    if found.model and base_name(found.model) != base_name(args.model) and not args.any_model:
        raise ValueError(
            f"{path} is for model {found.model}, not {args.model} "
            "(--any-model if they are the same model under two names)"
        )
    if found.model_type not in ("", config.model_type):  # tools name some architectures differently
        print(f"WARNING: {path} is for a {found.model_type!r:.40}, not a {config.model_type!r}")
    metadata = {"imported_from": f"{Path(path).name} ({found.kind})", **(found.metadata or {})}
    metadata |= {"model": args.model, "model_type": config.model_type, "layer": found.layer}
    print(f"read     {path}: {found.kind}, layer {found.layer}, norm {found.vector.norm():.4g}")
    return Source(found.vector, args.model, config.model_type, found.layer, metadata, {}, {})


# ------------------------------------------------------------------ the card

# What loads each format: (format, tool, language, lines), $model and $layer to be filled in.
SNIPPETS = [
    (
        "safetensors",
        "hook_model.py (the scripts that trained it)",
        "python",
        """\
from chat_format import ChatFormat, load_tokenizer
from hook_model import load_model

model, chat = load_model("$model", layer=$layer), ChatFormat(load_tokenizer("$model"))
model.load_vector("steering_vector.safetensors")
inputs = chat.inputs(["How was your day?"], model.input_device)
print(chat.answers(inputs, model.generate(**inputs, max_new_tokens=100, scale=1.0))[0])
""",
    ),
    (
        "gguf",
        "llama.cpp",
        "sh",
        """\
llama-cli --model MODEL.gguf --control-vector-scaled steering_vector.gguf:1.0 \\
    --control-vector-layer-range $layer $layer
""",
    ),
    (
        "gguf",
        "repeng",
        "python",
        """\
from repeng import ControlModel, ControlVector
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("$model", dtype="auto")
model = ControlModel(model, layer_ids=[$layer])
model.set_control(ControlVector.import_gguf("steering_vector.gguf"), 1.0)
""",
    ),
    (
        "gguf",
        "EasySteer (not checked)",
        "python",
        """\
from vllm import LLM
from vllm.steer_vectors.request import SteerVectorRequest

llm = LLM("$model", enable_steer_vector=True, enforce_eager=True)
place = {"target_layers": [$layer], "prefill_trigger_tokens": [-1], "generate_trigger_tokens": [-1]}
steer = SteerVectorRequest("persona", 1, steer_vector_local_path="steering_vector.gguf", **place)
print(llm.generate("How was your day?", steer_vector_request=steer))
""",
    ),
    (
        "pt",
        "steering-vectors",
        "python",
        """\
import torch
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("$model", dtype="auto")
vector = torch.load("layer_$layer.pt", weights_only=True)
handle = SteeringVector({$layer: vector}).patch_activations(model, multiplier=1.0)
""",
    ),
    (
        "pt",
        "transformers alone",
        "python",
        """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("$model", dtype="auto")
vector = torch.load("layer_$layer.pt", weights_only=True)
block = model.model.layers[$layer]  # where most models keep their decoder layers
block.register_forward_hook(lambda module, inputs, output: output + 1.0 * vector.to(output))
""",
    ),
    (
        "chatspace",
        "chatspace (not checked)",
        "python",
        """\
from chatspace.steering.model import TransformerSteerModel

model = TransformerSteerModel.from_pretrained(".", torch_dtype="auto")
""",
    ),
]


def card(source, formats, scale, names):
    """README.md of an export folder: front matter as on the Hugging Face Hub, facts, how to load.

    names: the files exported. What is not known is left out.
    """
    front = ["---", "tags:", "- steering-vector", "- control-vector", "- persona", "---"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.model) and not Path(source.model).exists():
        front.insert(1, f"base_model: {source.model}")  # a name on the Hub
    layer, vector = source.layer, source.vector
    place = f"the output of decoder block {layer} (counted from 0), at every token"
    facts = {
        "base model": f"`{source.model}` ({source.model_type}), frozen",
        "layer": f"{layer}: added to {place}",
        "vector": f"{len(vector):,} numbers, norm {vector.norm():.4g} as trained",
        "scale": f"the files hold {scale:g} x the vector as trained",
        **origin(source),
        "files": ", ".join(f"`{name}`" for name in names),
    }
    title = source.metadata.get("dataset", source.metadata.get("imported_from", "unnamed"))
    table = ["| | |", "|---|---|", *(f"| {name} | {words} |" for name, words in facts.items())]
    parts = ["\n".join(front), f"# Steering vector: {title}", "\n".join(table)]
    parts += ["## Does it work?", *evaluation(source.result), "## How to load it"]
    for kind, tool, language, lines in SNIPPETS:
        if kind in formats:
            code = Template(lines).substitute(model=source.model, layer=layer)
            parts.append(f"### {tool}\n\n```{language}\n{code}```")
    return "\n\n".join(parts) + "\n"


def origin(source):
    """{name: words}: the data, its scores and the training, as run.json has them; or the import."""
    record, facts = source.record, {}
    if "imported_from" in source.metadata:
        facts["imported from"] = source.metadata["imported_from"]
    if not record:
        return facts
    args, counts, final, name = record["args"], record["counts"], record["final"], record["dataset"]
    kinds = sorted({parse_name(part)[1] for part in name.split("+")})
    scores = [f"{kind}s {args[f'{kind}_min_score']:g} of {SCALES[kind][1]}" for kind in kinds]
    facts["data"] = f"`{name}`: {counts['summary']}"
    facts["scores"] = f"a judge's, of each row; at least {', '.join(scores)} to be kept"
    facts["training"] = (
        f"{counts['train']} rows, {final['steps']} steps (best: {final['best_step']}), "
        f"{final['label_tokens']:,} label tokens, lr {final['lr']:.3g}, seed {args['seed']}"
    )
    facts["norm"] = f"{final['ratio']:.2f} of the median token norm of the residual stream there"
    return facts


def evaluation(result):
    """Paragraphs: the tables of eval.json, and its first question with the answers."""
    if not result:
        return ["Not evaluated."]
    tables = eval_report.likelihood_text(result)
    if result["samples"]:
        tables += "\n\n" + eval_report.answers_table(result)
    about = "On questions that training never saw; `x` is a multiple of the vector as trained."
    flags = f"Flags: {', '.join(result['flags']) or 'none'}."
    sample = [eval_report.answers_text(sample, "###") for sample in result["samples"][:1]]
    return [about, f"```\n{tables}\n```", flags, *sample]


# ------------------------------------------------------------------ writing a folder


def export(source, formats, out, scale, overwrite):
    """Write the vector's files and its card to the folder `out`; returns their names.

    Raises ValueError, with nothing written, where that would replace what is not the same.
    """
    vector, files = source.vector * scale, {}
    total = float(source.metadata.get("scale", 1)) * scale  # of an export of an export
    writers = {
        "safetensors": lambda: write_safetensors(vector, {**source.metadata, "scale": total}),
        "gguf": lambda: write_gguf(vector, source.layer, source.model_type),
        "pt": lambda: write_pt(vector, source.layer),
        "chatspace": lambda: write_chatspace(vector, source.layer, source.model),
    }
    for name in formats:
        files |= writers[name]()
    files["README.md"] = card(source, formats, scale, [*files]).encode()
    if (out / "run.json").exists():
        raise ValueError(f"--out {out} is a run folder: name another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    other = [n for n in files if (out / n).exists() and (out / n).read_bytes() != files[n]]
    if other and not overwrite:
        raise ValueError(f"{out} has another {', '.join(other)}: --overwrite replaces it")
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomically(out / name, data)
    return [*files]


def run(args):
    """Export every source; returns the worst exit code."""
    out, codes = Path(args.out), []
    for folder in [None] if args.source else find_runs([args.run]):
        try:
            if folder is None:
                source = from_file(args.source, args)
            else:
                source, out = from_run(folder), Path(args.out) / folder.relative_to(args.run)
            names = export(source, args.format, out, args.scale, args.overwrite)
            print(f"exported {out}: {', '.join(names)}")
            codes.append(0)
        except (ValueError, OSError, ImportError) as error:  # the next one may do better
            print(f"error: {error}", file=sys.stderr)
            codes.append(2)
    return max(codes)


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    """Command line of export_vector.py; every bad flag is reported, all at once."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("what to export").add_argument
    add("run", nargs="?", metavar="RUN_DIR", help="run folder, or a folder of runs")
    add(
        "--from", dest="source", metavar="PATH", help="instead: a vector file or folder of any tool"
    )
    add = parser.add_argument_group("with --from").add_argument
    add("--model", help="the model that the vector is for: HF id or local folder")
    add("--layer", type=int, help="0-based decoder layer, where the file has several or says none")
    add("--any-model", action="store_true", help="whatever model the file names")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add = parser.add_argument_group("output").add_argument
    choices = (*FORMATS, "all")
    add("--format", required=True, action="append", choices=choices, help="may be given repeatedly")
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add("--scale", type=float, default=1.0, help="multiply the vector by this")
    add("--overwrite", action="store_true", help="replace files that are there and differ")
    args = parser.parse_args(argv)
    problems = []
    if bool(args.run) == bool(args.source):
        problems.append("name either RUN_DIR or --from PATH")
    if args.source and not args.model:
        problems.append("--from needs --model: the model that the vector is for")
    elif not args.source and (args.model or args.layer is not None or args.any_model):
        problems.append("--model, --layer and --any-model go with --from; a run knows its own")
    if not (math.isfinite(args.scale) and args.scale):
        problems.append(f"--scale {args.scale}: must be finite and not 0")
    if problems:
        parser.error("; ".join(problems))
    args.format = FORMATS if "all" in args.format else list(dict.fromkeys(args.format))
    return args


def main(argv=None):
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
