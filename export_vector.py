"""A trained vector as files that other tools read, and their vectors as files of ours.

    python export_vector.py RUN_DIR --format gguf --out exported/pirate
    python export_vector.py runs --format all --out exported           # every finished run in there
    python export_vector.py --from evil.pt --model Qwen/Qwen3-32B --layer 22 --format safetensors \\
        --out imported/evil

Each folder gets a README.md, a card that says what the vector is and how each tool loads it. Layers
are 0-based decoder blocks whose output gets the vector, whatever the format calls them. No model is
loaded, and no pickle is run. Exit codes: 0 done, 1 a file could not be written, 2 bad input.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evaluation.card import card
from evaluation.report import FORMAT_VERSION
from steering.command_line import exit_code, new_parser, parse
from steering.loading import read_config
from steering.run_folder import find_runs, lock_folder
from steering.run_state import read_run
from steering.vector_file import (
    VECTOR_FILE,
    load_vector,
    read_json,
    vector_digest,
    write_atomically,
)
from steering.vector_formats import check_same_model, file_names, files_of, import_vector

FORMATS = tuple(file_names(0))


@dataclass
class Source:
    """A vector (n,) and all that is known of it; path: where it was found.
    metadata: the header of our own format, with model, model_type, layer and model_is_local; scale:
    of the original vector, that in training or in the file it was imported from; record, result:
    run.json and eval.json, empty for a vector from elsewhere."""

    path: Path
    vector: torch.Tensor
    metadata: dict
    scale: float = 1.0
    record: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)


def from_run(folder, args):
    """The Source of a finished run folder; ValueError if it is not finished or not readable.
    --model is the name that the files are to give the model, a local copy's place being of no use
    to others."""
    run, path = read_run(folder), folder / VECTOR_FILE
    if missing := {"counts", "final"} - run.record.keys():
        raise ValueError(f"{folder / 'run.json'}: unreadable, no {', '.join(sorted(missing))}")
    vector, metadata = load_vector(path)
    try:
        trained_on, metadata["layer"] = metadata["model"], int(metadata["layer"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its header names no model and layer ({metadata})") from error
    model = metadata["model"] = args.model or trained_on
    check_same_model(path, {**metadata, "model": trained_on}, model, args.any_model)
    known_local = not args.model and metadata.get("model_is_local") == "True"
    metadata["model_is_local"] = known_local or Path(model).exists()
    if "model_type" not in metadata:  # as in older runs
        metadata["model_type"] = read_config(trained_on, args.trust_remote_code).model_type
    result = read_json(folder / "eval.json")
    about = result.get("config", {}).get
    if (about("format_version"), about("vector")) != (FORMAT_VERSION, vector_digest(vector)):
        if (folder / "eval.json").exists():
            why = "torn, or of another vector or version"
            print(f"WARNING: {folder / 'eval.json'} left out: {why}")
        result = {}
    return Source(folder, vector, metadata, 1.0, run.record, result)


def export(source, formats, out, scale, overwrite):
    """Write `scale` times the vector and its card to the folder `out`; returns the files' names.
    A folder holds one vector: formats that are there already are written along with the new ones.
    Raises ValueError, with nothing written, where that would replace what is not the same."""
    if (out / "run.json").exists():
        raise ValueError(f"--out {out} is a run folder: name another one")
    files, before = contents(source, formats, scale), {}  # bad input ends before there is a folder
    with lock_folder(out) as held:
        if not held:
            raise ValueError(f"{out}: another process is writing there")
        names = file_names(source.metadata["layer"])
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
        what = f"a vector of norm {source.vector.norm():.4g}"
        raise ValueError(f"{source.path}: --scale {scale:g} x {what} is zero or infinite")
    header, files = {**source.metadata, "scale": total}, {}
    for name in formats:
        files |= files_of(name, vector, header)
    try:
        text = card(source, vector, total, formats, [*files])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"run.json or eval.json is not as this version writes it ({error!r:.80})"
        raise ValueError(f"{source.path}: {why}") from error
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
                trust = args.trust_remote_code
                found = import_vector(args.source, args.model, args.layer, args.any_model, trust)
                source = Source(Path(args.source), found.vector, found.metadata, found.scale)
            else:
                source, out = from_run(folder, args), Path(args.out) / folder.relative_to(args.run)
            names = export(source, args.format, out, args.scale, args.overwrite)
            print(f"exported {out}: {', '.join(names)}")
            if source.metadata["model_is_local"]:
                print(f"NOTE: the files name the model {source.metadata['model']}, a folder here")
                print("      before you publish them, give its public name with --model")
            codes.append(0)
        except (ValueError, OSError, ImportError) as error:  # the next one may do better
            print(f"error: {error}", file=sys.stderr)
            codes.append(1 if isinstance(error, OSError) else 2)
    return max(codes)


def parse_args(argv=None):
    """Command line of export_vector.py; every bad flag is reported, all at once."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what to export").add_argument
    add("run", nargs="?", metavar="RUN_DIR", help="run folder, or a folder of runs")
    add("--from", dest="source", metavar="PATH", help="instead: a vector file of any of the tools")
    add("--model", help="HF id or folder; for a run: the name that the files give the model")
    add("--layer", type=int, help="with --from: 0-based, needed where the file does not say one")
    add("--any-model", action="store_true", help="whatever model the vector was made for")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add = parser.add_argument_group("output").add_argument
    choices = (*FORMATS, "all")
    add("--format", required=True, action="append", choices=choices, help="may be given repeatedly")
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add("--scale", type=float, default=1.0, help="multiply the vector by this")
    add("--overwrite", action="store_true", help="replace files that are there and differ")
    args = parse(parser, argv, {}, check_arguments)
    args.format = FORMATS if "all" in args.format else list(dict.fromkeys(args.format))
    return args


def check_arguments(args):
    """(whether something is wrong, what) of the options."""
    text = f"--scale {args.scale}: must be finite and not 0"
    return [
        (bool(args.run) == bool(args.source), "name either RUN_DIR or --from PATH"),
        (args.source and not args.model, "--from needs --model: the model that the vector is for"),
        (args.run and args.layer is not None, "--layer goes with --from: a run knows its own"),
        (not (math.isfinite(args.scale) and args.scale), text),
    ]


def main(argv=None):
    """Command line entry; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
