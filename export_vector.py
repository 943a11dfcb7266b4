"""A trained vector as files that other tools read, and their vectors as files of ours.

    python export_vector.py RUN_DIR --format gguf --out exported/pirate
    python export_vector.py runs --format all --out exported           # every finished run in there
    python export_vector.py runs --format lora --out adapters          # adapters/<persona>/
    python export_vector.py RUN_A RUN_B --blend 0.7 0.4 --name grumpy_poet --format lora --out DIR
    python export_vector.py --from evil.pt --model Qwen/Qwen3-32B --layer 22 --format safetensors \\
        --out imported/evil

Each folder gets a README.md, a card that says what the vector is and how each tool loads it. Layers
are 0-based decoder blocks whose output gets the vector, whatever the format calls them. lora and
lora-gguf are adapters, which servers swap by request: fitted and checked on rows of the data, with
the model, which is loaded once; peft is exact, for PEFT alone. A format that cannot hold a vector
is an error, and the others are written. No pickle is run. Exit codes: 0 done, 1 a file could not be
written, 2 bad input, 130 Ctrl-C.
"""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

import data_filter
from data_filter import DataOptions
from evaluation.report import read_result
from hook_model import load_from_options
from interop import adapter
from interop.adapter_check import (
    adapter_words,
    check_loss,
    compare_with_adapter,
    fit_and_measure,
    fit_words,
)
from interop.card import card
from interop.formats import (
    FORMATS,
    VECTOR_ALONE,
    WITH_MODEL,
    WITH_ROW,
    Source,
    check_same_model,
    file_names,
    files_of,
    import_vector,
)
from steering.command_line import exit_code, new_parser, number_or_word, parse
from steering.data_layouts import persona_of
from steering.files import read_json, write_atomically
from steering.finished import FinishedRun, Shelf, read_run, shared_folder
from steering.loading import DTYPES
from steering.run_folder import find_runs, lock_folder, run_path
from steering.vector_file import VECTOR_FILE, load_vector, origin_of, vector_digest

REFUSALS = (ValueError, OSError, ImportError, RuntimeError)  # others may do better
FIT_DATASETS = 64  # datasets to fit an input row on at most
FIT_TOKENS = 16  # of them, a feature
CHECK_TOKENS = 20_000  # held-out, to check the adapters of all runs together
MIN_CHECK_TOKENS = 150  # of each


# ---------------------------------------------------------------- what is exported


def from_run(run, args):
    """The Source of a run; ValueError if its folder is not readable.
    --model is the name that the files are to give the model, a local copy's place being of no use
    to others."""
    path = run.folder / VECTOR_FILE
    vector, metadata = load_vector(path)
    name = args.model or run.record["args"]["model"]
    check_same_model(path, metadata, name, args.any_model)
    was_local = not args.model and metadata.get("model_is_local") == "True"
    metadata["model_is_local"] = was_local or Path(name).exists()
    metadata |= {"model": name, "layer": run.record["args"]["layer"]}

    result_path = run.folder / "eval.json"
    result = read_result(result_path)
    if result and result["config"]["vector"] != vector_digest(vector):
        result = {}
    if not result and result_path.exists():
        print(f"WARNING: {result_path} left out: torn, or of another vector or version")
    return Source(run.folder, vector, metadata, record=run.record, result=result)


def from_elsewhere(args, out):
    """(Source of the file of --from, a FinishedRun as if it were a run in `out`)."""
    source = import_vector(
        args.source, args.model, args.layer, args.any_model, args.trust_remote_code
    )
    options = {key: value for key, value in vars(args).items() if value is not None}
    options["layer"] = source.layer
    return source, FinishedRun(out, args.dataset, {"config": {}}, source.vector, options)


def blended(args):
    """(Source of the weighted sum of the vectors of some runs, a FinishedRun: the first of them).
    ValueError if they are not of one model and layer."""
    runs = [read_run(folder, changes_of(args)) for folder in args.run]
    sources = [from_run(run, args) for run in runs]
    first = sources[0]
    parts = []
    vector = torch.zeros_like(first.vector)
    for run, source, weight in zip(runs, sources, args.blend, strict=True):
        check_same_model(source.path, source.metadata, first.metadata["model"], args.any_model)
        if source.layer != first.layer:
            where = f"{first.path} at layer {first.layer}, {source.path} at {source.layer}"
            raise ValueError(f"a blend has one layer: {where}")
        vector += weight * source.vector
        parts.append(f"{weight:g} x {origin_of(source.metadata, run.dataset)}")
    kept = {"model", "model_type", "model_digest", "model_is_local", "layer", "quantize"}
    metadata = {key: value for key, value in first.metadata.items() if key in kept}
    metadata |= {"dataset": args.name, "blend_of": " + ".join(parts)}
    return Source(first.path, vector, metadata), runs[0]


def scaled(source, wanted):
    """The Source of a multiple of the vector: `wanted` times, or as its evaluation recommends.
    ValueError where that recommends none, or a vector is no longer one."""
    factor = wanted
    if wanted == "recommended":
        known = source.result.get("recommended", {"why": "eval_steering.py finds one"})
        factor = known.get("scale")
        if not factor:
            raise ValueError(f"{source.path}: no recommended scale ({known['why']})")
    vector = source.vector * factor
    if not vector.isfinite().all() or not vector.any():
        what = f"a vector of norm {source.vector.norm():.4g}"
        raise ValueError(f"{source.path}: --scale {factor:g} x {what} is zero or infinite")
    return replace(source, vector=vector, scale=source.scale * factor)


# ---------------------------------------------------------------- adapters


class Workshop:
    """What the exports of one call share.

    check_tokens: of held-out rows, to check each adapter on. shelf: the model, loaded once, and
    chat formats.
    """

    def __init__(self, runs):
        self.check_tokens = max(MIN_CHECK_TOKENS, CHECK_TOKENS // runs)
        self.shelf = Shelf(load_from_options)

    def prepare(self, source, run, name, args):
        """Add to a Source what a format, by name, needs of the model, if another has not done so.
        Raises ValueError, with the reason, where adapters do not fit the model, or lose too much of
        the vector; not if forced."""
        if name in VECTOR_ALONE:
            return
        if {*args.format}.isdisjoint(WITH_MODEL):  # lm-eval asks for the name of a layer alone
            run.args["device"] = "fake"
        model = self.shelf.model(run)
        if name == "lm-eval":  # it loads the class that we load
            source.block = adapter.name_of(model.layers[model.layer], model.model.base_model)
            return
        source.site = adapter.find_site(model)
        if name != "lora-gguf":  # llama.cpp has names of its own
            trusted = run.args.get("trust_remote_code", False)
            source.module = adapter.served_name(model, source.site, trusted)
        if name not in WITH_ROW:
            return
        if not source.measured:
            source.row, source.fitted = self.input_row(run, model, source.site)
            examples = self.splits_of(run.dataset, run, 0, self.check_tokens).heldout
            if not examples:
                raise ValueError(f"{run.dataset}: no held-out row to check an adapter on")
            model.set_vector(source.vector)
            source.measured = compare_with_adapter(model, source.site, source.row, examples)
        if not args.force:
            check_loss(source.fitted, source.measured)

    def input_row(self, run, model, site):
        """(a (features,), how it was fitted): that of the run's folder, which is fitted and written
        if it is not there. ValueError if it may have been fitted on rows that check adapters."""
        options = DataOptions.of(run.args)
        split = [options.split_seed, options.heldout_fraction]
        default = run_path("runs", model.name, model.layer, "")
        path = shared_folder(run, default) / adapter.ROW_FILE
        if path.exists():
            row, fitted = adapter.load_row(path, model, site)
        else:
            examples, heldout, names = self.rows_to_fit(run, FIT_TOKENS * site.module.in_features)
            chat = self.shelf.chat(run)
            row, fitted = fit_and_measure(model, site, chat, examples, heldout)
            fitted |= {"datasets": names, "split": split}
            print(f"fitted   {path}: {fit_words(fitted)}")
            try:
                adapter.save_row(path, row, model, site, fitted)
            except OSError as error:
                print(f"WARNING: {path} is not kept, so the next run fits anew: {error}")
        if fitted["split"] != split:
            there = f"another split of the questions ({fitted['split']}, here {split})"
            raise ValueError(f"{path} was fitted with {there}. Remove it to fit another")
        return row, fitted

    def rows_to_fit(self, run, tokens):
        """(examples of training questions, some of held-out ones, names) of the datasets beside a
        run's, so many tokens in all; of FIT_DATASETS at most, spread over all. ValueError if none
        has a row."""
        names = list(DataOptions.of(run.args).datasets())
        names = names[:: len(names) // FIT_DATASETS + 1]
        share = tokens // len(names) + 1
        train = []
        heldout = []
        used = []
        for name in names:
            try:
                splits = self.splits_of(name, run, share, share // 8 + 1)
            except ValueError as error:  # a dataset that nobody asked for
                print(f"WARNING: {name} is left out of the fit: {error}", file=sys.stderr)
                continue
            if splits.train:
                used.append(name)
            train += splits.train
            heldout += splits.heldout
        if not train:
            raise ValueError(f"{run.args['data_root']}: no row to fit an input row on")
        return train, heldout, used

    def splits_of(self, name, run, tokens, heldout_tokens):
        """The Splits of a dataset with a run's options: training and held-out examples, up to so
        many tokens of each."""
        options = replace(DataOptions.of(run.args), target_tokens=tokens, val_fraction=0.0)
        chat = self.shelf.chat(run)
        return data_filter.split_dataset(name, options.datasets(), chat, options, heldout_tokens)


# ---------------------------------------------------------------- writing


def export(source, formats, files, out, overwrite):
    """Write the files {name: bytes} of a Source, and its card, to the folder `out`.

    A folder holds one vector. Raises ValueError, with nothing written, where files of other formats
    or layers would stay there, or where what is not the same would be replaced.
    """
    if (out / "run.json").exists():
        raise ValueError(f"--out {out} is a run folder: name another one")
    files["README.md"] = card_of(source, formats, files, out)  # bad input leaves no folder
    with lock_folder(out) as held:
        if not held:
            raise ValueError(f"{out}: another process is writing there")
        patterns = [name for names in file_names("*").values() for name in names]
        there = {str(path.relative_to(out)) for name in patterns for path in out.glob(name)}
        left = ", ".join(sorted(there - files.keys()))
        if left:
            way_out = "name their formats too, or another folder"
            raise ValueError(f"{out} has {left}, which must hold the same vector: {way_out}")
        known = [name for name in files if (out / name).exists()]
        other = ", ".join(name for name in known if (out / name).read_bytes() != files[name])
        if other and not overwrite:
            raise ValueError(f"{out} has another {other}: --overwrite replaces what is there")
        for name, data in files.items():
            (out / name).parent.mkdir(exist_ok=True)
            write_atomically(out / name, data)


def card_of(source, formats, names, out):
    """The card of the files of a Source in the folder `out`, as bytes."""
    try:
        return card(source, formats, [*names], out.absolute().name).encode()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"run.json or eval.json is not as this version writes it ({error!r:.80})"
        raise ValueError(f"{source.path}: {why}") from error


def targets(args):
    """[(run folder, or None with --from and --blend, folder to write to)]. ValueError for two of
    one name."""
    out = Path(args.out)
    if args.source:
        return [(None, out)]
    if args.blend:
        return [(None, out / args.name)]
    (top,) = args.run
    folders = find_runs([top])
    if folders == [Path(top)] or not {*args.format} & {*WITH_MODEL}:
        return [(folder, out / folder.relative_to(top)) for folder in folders]

    # Servers know an adapter by its folder: the persona, and the run's own name if it has one.
    named = {}
    for folder in folders:
        dataset = str(read_json(folder / "run.json").get("dataset"))
        name = persona_of(dataset)
        if folder.name != dataset:
            name += f"-{folder.name}"
        if name in named:
            way_out = "export one of them by itself, to a folder of another name"
            raise ValueError(f"two runs of the name {name}: {named[name]} and {folder} ({way_out})")
        named[name] = folder
    return [(folder, out / name) for name, folder in named.items()]


def export_one(folder, out, workshop, args):
    """Export a run folder, or the vector of --from or --blend, to the folder `out`, and say so;
    returns the exit code. A format that cannot be written does not stop the others."""
    if args.blend:
        source, run = blended(args)
    elif folder is None:
        source, run = from_elsewhere(args, out)
    else:
        run = read_run(folder, changes_of(args))
        source = from_run(run, args)
    source = scaled(source, args.scale)
    files = {}
    written = []
    codes = [0]
    for name in args.format:
        try:
            workshop.prepare(source, run, name, args)
            files |= files_of(name, source)
            written.append(name)
        except REFUSALS as error:
            codes.append(complain(f"{out}: no {name}: {error}", error))
    if not written:
        return max(codes)
    export(source, written, files, out, args.overwrite)
    print(f"exported {out}: {', '.join(files)}")
    if {*written} & {*WITH_ROW}:
        print(f"         {adapter_words(source.measured)}")
    if source.metadata["model_is_local"]:
        print(f"NOTE: the files name the model {source.metadata['model']}, a folder here")
        print("      before you publish them, give its public name with --model")
    return max(codes)


def complain(text, error):
    """Print what an error is about; returns the exit code that stands for it."""
    print(f"error: {text}", file=sys.stderr)
    return 1 if isinstance(error, OSError | RuntimeError) else 2


def changes_of(args):
    """{option: value} in place of a run's own."""
    names = ("data_root", "source_model", "kind", "dtype", "device", "device_map")
    given = vars(args).items()
    changes = {key: value for key, value in given if key in names and value is not None}
    changes["quantize"] = "none"
    if args.model and Path(args.model).exists():  # the run's own may be gone
        changes["model"] = args.model
    return changes


def run(args):
    """Export every source; returns the worst exit code."""
    every = targets(args)
    workshop = Workshop(len(every))
    codes = [0]
    for folder, out in every:
        try:
            codes.append(export_one(folder, out, workshop, args))
        except REFUSALS as error:
            codes.append(complain(error, error))
    return max(codes)


# ---------------------------------------------------------------- the command line


def parse_args(argv=None):
    """Command line of export_vector.py; every bad flag is reported, all at once."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what to export").add_argument
    add(
        "run",
        nargs="*",
        metavar="RUN_DIR",
        help="run folder, or a folder of runs; with --blend, runs",
    )
    text = "a weight for each run: their weighted sum as one vector"
    add("--blend", nargs="+", type=float, metavar="WEIGHT", help=text)
    add("--name", help="with --blend: what to call it, and its folder below --out")
    text = "instead: a vector file, ours or another tool's (safetensors, gguf, pt, chatspace)"
    add("--from", dest="source", metavar="PATH", help=text)
    add("--model", help="HF id or folder; for a run: the name that the files give the model")
    add("--layer", type=int, help="with --from: 0-based, needed where the file does not say one")
    add("--dataset", metavar="NAME", help="with --from and lora: rows of its persona, to check it")
    add("--any-model", action="store_true", help="whatever model the vector was made for")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add = parser.add_argument_group("lora and lora-gguf: data and model to fit with").add_argument
    add("--data-root", help="where the data is now, if not where the run had it")
    add("--source-model", help="in place of the run's; the assistant-axis layout needs it")
    add("--kind", choices=("role", "trait"), help="as --source-model")
    add("--dtype", choices=("auto", *DTYPES), help="in place of the run's")
    add("--device", help="in place of the run's: auto, cuda, cuda:1, mps or cpu")
    add("--device-map", help="in place of the run's: auto spreads the model over devices")
    add("--force", action="store_true", help="export adapters even if they lose much of the vector")
    add = parser.add_argument_group("output").add_argument
    choices = (*FORMATS, "all")
    text = f"may be given repeatedly; all: {', '.join(VECTOR_ALONE)}"
    add("--format", required=True, action="append", choices=choices, help=text)
    add("--out", required=True, metavar="DIR", help="folder to write to")
    text = 'multiply the vector by this, or "recommended": by what its evaluation found'
    add("--scale", type=number_or_word, default=1.0, help=text)
    add("--overwrite", action="store_true", help="replace files that are there and differ")
    args = parse(parser, argv, {}, check_arguments)
    if "all" in args.format:
        args.format += VECTOR_ALONE
    args.format = [name for name in FORMATS if name in args.format]
    return args


def check_arguments(args):
    """(whether something is wrong, what) of the options."""
    is_number = isinstance(args.scale, float) and math.isfinite(args.scale) and args.scale
    fits = args.source and {*args.format} & {*WITH_ROW}
    weights = args.blend or []
    return [
        (
            fits and not (args.data_root and args.dataset),
            "lora with --from needs --data-root and --dataset: rows to fit and check it on",
        ),
        (args.run and args.dataset, "--dataset goes with --from: a run knows its own"),
        (bool(args.run) == bool(args.source), "name either RUN_DIR or --from PATH"),
        (bool(args.blend) != bool(args.name), "--blend and --name: both or neither"),
        (weights and args.source, "--blend goes with RUN_DIR"),
        (weights and args.scale == "recommended", "--blend: --scale is a number, 1 if not given"),
        (
            args.run and len(args.run) != len(weights or [1]),
            "name one RUN_DIR, or with --blend one for each weight",
        ),
        (
            not all(map(math.isfinite, weights)) or (weights and not any(weights)),
            f"--blend {weights}: finite numbers, not all 0",
        ),
        (
            args.name and not re.fullmatch(r"\w[\w .+-]*", args.name),
            f'--name "{args.name}": use letters, digits, " _.+-"',
        ),
        (args.source and not args.model, "--from needs --model: the model that the vector is for"),
        (args.run and args.layer is not None, "--layer goes with --from: a run knows its own"),
        (
            not is_number and args.scale != "recommended",
            f'--scale {args.scale}: must be finite and not 0, or "recommended"',
        ),
    ]


def main(argv=None):
    """Command line entry; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
