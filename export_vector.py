"""A trained vector as files that other tools read, and their vectors as files of ours.

    python export_vector.py RUN_DIR --format gguf --out exported/pirate
    python export_vector.py runs --format all --out exported           # every finished run in there
    python export_vector.py --from evil.pt --model Qwen/Qwen3-32B --layer 22 --format safetensors \\
        --out imported/evil

Each folder gets a README.md, a card that says what the vector is and how each tool loads it. Layers
are 0-based decoder blocks whose output gets the vector, whatever the format calls them. No model is
loaded, and no pickle is run. Exit codes: 0 done, 1 a file could not be written, 2 bad input.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import eval_report
from hook_model import (
    base_name,
    check_layer,
    load_vector,
    read_config,
    shape_of,
    vector_digest,
    write_atomically,
)
from run_folder import VECTOR_FILE, find_runs, lock_folder, read_json
from vector_card import card
from vector_formats import (
    file_names,
    read_vector,
    write_chatspace,
    write_gguf,
    write_pt,
    write_safetensors,
)

FORMATS = tuple(file_names(0))


@dataclass
class Source:
    """A vector (n,) and all that is known of it; path: where it was found.

    model, model_type: its name and architecture, as in its config; local: whether that name is a
    folder of this machine; metadata: the header of our own format; scale: of the original vector,
    that in training or in the file it was imported from; record, result: run.json and eval.json,
    empty for a vector from elsewhere.
    """

    path: Path
    vector: torch.Tensor
    model: str
    model_type: str
    local: bool
    layer: int
    metadata: dict
    scale: float = 1.0
    record: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)


# ------------------------------------------------------------------ where vectors come from


def from_run(folder, args):
    """The Source of a finished run folder; ValueError if it is not finished or not readable.

    --model is the name that the files are to give the model, a local copy's place being of no use
    to others.
    """
    record, path = read_json(folder / "run.json"), folder / VECTOR_FILE
    if not path.exists():
        raise ValueError(f"{folder}: no {VECTOR_FILE}, so this run has not finished")
    if missing := {"dataset", "args", "counts", "final"} - record.keys():
        raise ValueError(f"{folder / 'run.json'}: unreadable, no {', '.join(sorted(missing))}")
    vector, metadata = load_vector(path)
    try:
        trained_on, layer = metadata["model"], int(metadata["layer"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its header names no model and layer ({metadata})") from error
    model = args.model or trained_on
    check_same_model(path, trained_on, model, args.any_model)
    local = Path(model).exists()
    if not args.model:  # a relative path says nothing elsewhere
        local = local or metadata.get("model_is_local") == "True"
    model_type = metadata.get("model_type")  # not in older runs
    if not model_type:
        model_type = read_config(trained_on, args.trust_remote_code).model_type
    metadata |= {"model": model, "model_type": model_type, "model_is_local": local}
    result = evaluation_of(folder, vector)
    return Source(folder, vector, model, model_type, local, layer, metadata, 1.0, record, result)


def evaluation_of(folder, vector):
    """The content of eval.json, {} with a warning if it is not of this vector (n,)."""
    path = folder / "eval.json"
    result = read_json(path)
    config = result.get("config", {})
    digests = config.get("format_version"), config.get("vector")
    if digests == (eval_report.FORMAT_VERSION, vector_digest(vector)):
        return result
    if path.exists():
        print(f"WARNING: {path} left out: torn, or of another vector or version")
    return {}


def from_file(path, args):
    """The Source of a file of any format, for --model; ValueError if it is not one for it."""
    if (Path(path) / "run.json").exists():
        raise ValueError(f"{path} is a run folder: name it without --from")
    config = read_config(args.model, args.trust_remote_code)
    layers, width = shape_of(config)
    if args.layer is not None:
        check_layer(args.layer, layers, args.model)
    found = read_vector(path, layers, width, args.layer)
    if found.model:
        check_same_model(path, found.model, args.model, args.any_model)
    if found.model_type not in ("", config.model_type):  # tools name some architectures differently
        print(f"WARNING: {path} is for a {found.model_type!r:.40}, not a {config.model_type!r}")
    print(f"read     {path}: {found.kind}, layer {found.layer}, norm {found.vector.norm():.4g}")
    metadata = found.metadata or {"imported_from": f"{Path(path).name} ({found.kind})"}
    about = {"model": args.model, "model_type": config.model_type, "layer": found.layer}
    local = Path(args.model).exists()
    metadata |= {**about, "model_is_local": local}
    return Source(
        Path(path), found.vector, **about, local=local, metadata=metadata, scale=found.scale
    )


def check_same_model(path, trained_on, model, any_model):
    """ValueError if the names are of two models, unless told that they are one."""
    if not any_model and base_name(trained_on) != base_name(model):
        raise ValueError(
            f"{path} is for model {trained_on}, not {model} "
            "(--any-model if they are the same model under two names)"
        )


# ------------------------------------------------------------------ writing a folder


def export(source, formats, out, scale, overwrite):
    """Write `scale` times the vector and its card to the folder `out`; returns the files' names.

    A folder holds one vector: formats that are there already are written along with the new ones.
    Raises ValueError, with nothing written, where that would replace what is not the same.
    """
    if (out / "run.json").exists():
        raise ValueError(f"--out {out} is a run folder: name another one")
    files, before = contents(source, formats, scale), {}  # bad input ends before there is a folder
    with lock_folder(out) as held:
        if not held:
            raise ValueError(f"{out}: another process is writing there")
        names = file_names(source.layer)
        present = [f for f in FORMATS if any((out / name).exists() for name in names[f])]
        if present:
            files = contents(source, [f for f in FORMATS if f in formats or f in present], scale)
            before = contents(source, present, scale)
        other = [n for n in files if not same(out / n, files[n], before.get(n))]
        stale = [path for path in out.glob("layer_*.pt") if path.name not in files]
        if (other or stale) and not overwrite:
            differ = ", ".join([*other, *(path.name for path in stale)])
            raise ValueError(f"{out} has another {differ}: --overwrite replaces what is there")
        for name, data in files.items():
            write_atomically(out / name, data)
        for path in stale:
            path.unlink()
    return [*files]


def contents(source, formats, scale):
    """{file name: bytes} of `scale` times the vector in these formats, and of their card."""
    vector, total = source.vector * scale, source.scale * scale
    if not (vector.isfinite().all() and vector.any()):
        norm = source.vector.norm()
        raise ValueError(
            f"{source.path}: --scale {scale:g} x a vector of norm {norm:.4g} is zero or infinite"
        )
    header = {**source.metadata, "scale": total}
    writers = {
        "safetensors": lambda: write_safetensors(vector, header),
        "gguf": lambda: write_gguf(vector, source.layer, source.model_type),
        "pt": lambda: write_pt(vector, source.layer),
        "chatspace": lambda: write_chatspace(vector, source.layer, source.model),
    }
    files = {}
    for name in formats:
        files |= writers[name]()
    try:
        text = card(source, vector, total, formats, [*files])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{source.path}: run.json or eval.json is not as this version writes it ({error!r:.80})"
        ) from error
    return {**files, "README.md": text.encode()}


def same(path, *contents):
    """Whether there is nothing at the path, or one of these contents."""
    return not path.exists() or (path.is_file() and path.read_bytes() in contents)


def run(args):
    """Export every source; returns the worst exit code."""
    out, codes = Path(args.out), []
    for folder in [None] if args.source else find_runs([args.run]):
        try:
            if folder is None:
                source = from_file(args.source, args)
            else:
                source, out = from_run(folder, args), Path(args.out) / folder.relative_to(args.run)
            names = export(source, args.format, out, args.scale, args.overwrite)
            print(f"exported {out}: {', '.join(names)}")
            if source.local:
                print(
                    f"NOTE: the files name the model {source.model}, a folder of this machine: "
                    "before you publish them, give its public name with --model"
                )
            codes.append(0)
        except (ValueError, OSError, ImportError) as error:  # the next one may do better
            print(f"error: {error}", file=sys.stderr)
            codes.append(1 if isinstance(error, OSError) else 2)
    return max(codes)


# ------------------------------------------------------------------ command line


def parse_args(argv=None):
    """Command line of export_vector.py; every bad flag is reported, all at once."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("what to export").add_argument
    add("run", nargs="?", metavar="RUN_DIR", help="run folder, or a folder of runs")
    add("--from", dest="source", metavar="PATH", help="instead: a vector file of any of the tools")
    add("--model", help="the model's HF id or folder; of a run: the name to give it in the files")
    add("--layer", type=int, help="with --from: 0-based layer, where the file has not just one")
    add("--any-model", action="store_true", help="whatever model the vector was made for")
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
    if args.run and args.layer is not None:
        problems.append("--layer goes with --from: a run knows its own")
    if not (math.isfinite(args.scale) and args.scale):
        problems.append(f"--scale {args.scale}: must be finite and not 0")
    if problems:
        parser.error("; ".join(problems))
    if args.model and Path(args.model).exists():  # as in training: "models/x/" is "models/x"
        args.model = os.path.normpath(args.model)
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
