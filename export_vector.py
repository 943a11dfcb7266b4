"""A trained vector as files that other tools read, and their vectors as files of ours.

    python export_vector.py RUN_DIR --format gguf --out exported/pirate
    python export_vector.py runs --format all --out exported           # every finished run in there
    python export_vector.py runs --format lora --out adapters          # adapters/<persona>/
    python export_vector.py --from evil.pt --model Qwen/Qwen3-32B --layer 22 --format safetensors \\
        --out imported/evil

Each folder gets a README.md, a card that says what the vector is and how each tool loads it. Layers
are 0-based decoder blocks whose output gets the vector, whatever the format calls them. lora and
lora-gguf are adapters, which servers swap by request: fitted and checked on rows of the data, with
the model, which is loaded once; peft is exact, for PEFT alone. No pickle is run. Exit codes: 0
done, 1 a file could not be written, 2 bad input, 130 Ctrl-C.
"""

import contextlib
import functools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data_filter
from data_filter import DataOptions
from evaluation.summary import FORMAT_VERSION
from hook_model import find_layers, load_from_options
from interop import adapter, adapter_check
from interop.card import card
from interop.formats import check_same_model, file_names, files_of, import_vector
from steering.command_line import exit_code, new_parser, number_or_word, parse
from steering.data_layouts import parse_name, pooled_names
from steering.fast_path import FastPath
from steering.files import read_json, write_atomically
from steering.finished import FinishedRun, Shelf, read_run, shared_folder
from steering.loading import DTYPES, read_config
from steering.run_folder import find_runs, lock_folder, run_path
from steering.vector_file import VECTOR_FILE, load_vector, vector_digest

FORMATS = tuple(file_names(0))
WITH_ROW = ("lora", "lora-gguf")  # adapters made of a fitted input row
WITH_MODEL = (*WITH_ROW, "peft")  # formats that load it
BY_NAME = (*WITH_MODEL, "hotwire")  # of many runs: one folder a persona, by the name to ask for
VECTOR_ALONE = ("safetensors", "gguf", "pt", "chatspace")  # formats that need nothing else
FIT_DATASETS, FIT_TOKENS = 64, 16  # datasets to fit on at most, and tokens of them a feature
CHECK_TOKENS, MIN_CHECK_TOKENS = 20_000, 150  # held-out, of all runs together, and of each


@dataclass
class Source:
    """A vector (n,) and all that is known of it; path: where it was found.
    metadata: the header of our own format, with model, model_type, layer and model_is_local; scale:
    of the original vector, that in training or in the file it was imported from; record, result:
    run.json and eval.json, empty for a vector from elsewhere; row, adapter: the input row of its
    adapters (features,), and what was measured of them; place: names of modules of the model."""

    path: Path
    vector: torch.Tensor
    metadata: dict
    scale: float = 1.0
    record: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    row: torch.Tensor | None = None
    adapter: dict = field(default_factory=dict)
    place: dict = field(default_factory=dict)

    def scale_of(self, wanted):
        """`wanted`, or the scale that the evaluation recommends; ValueError where it does not."""
        known = self.result.get("recommended", {"why": "eval_steering.py finds one", "scale": None})
        if not (found := known["scale"] if wanted == "recommended" else wanted):
            raise ValueError(f"{self.path}: no recommended scale ({known['why']})")
        return found


def from_run(run, args):
    """The Source of a run; ValueError if its folder is not readable.
    --model is the name that the files are to give the model, a local copy's place being of no use
    to others."""
    folder, path = run.folder, run.folder / VECTOR_FILE
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
    name = out.name
    files, before = contents(source, formats, scale, name), {}  # bad input leaves no folder
    with lock_folder(out) as held:
        if not held:
            raise ValueError(f"{out}: another process is writing there")
        names = file_names(source.metadata["layer"], out.name)
        present = [f for f in FORMATS if any((out / file).exists() for file in names[f])]
        if lacking := {*present} - {*formats} - {*VECTOR_ALONE, "hotwire"}:
            all_of = " ".join(f"--format {f}" for f in sorted({*formats, *lacking}))
            raise ValueError(f"{out} has more formats, that must hold the same vector: {all_of}")
        if present:
            every = [f for f in FORMATS if f in formats or f in present]
            files = contents(source, every, scale, name)
            before = contents(source, present, scale, name)
        other = [n for n in files if not same(out / n, files[n], before.get(n))]
        stale = [path for path in out.glob("layer_*.pt") if path.name not in files]
        if (other or stale) and not overwrite:
            differ = ", ".join([*other, *(path.name for path in stale)])
            raise ValueError(f"{out} has another {differ}: --overwrite replaces what is there")
        for file, data in files.items():
            (out / file).parent.mkdir(exist_ok=True)
            write_atomically(out / file, data)
        for path in stale:
            path.unlink()
    return [*files]


def contents(source, formats, scale, folder):
    """{file name: bytes} of `scale` times the vector in these formats, and of their card.
    folder: its name, which some tools take for the vector's."""
    vector, total = source.vector * scale, source.scale * scale
    if not (vector.isfinite().all() and vector.any()):
        what = f"a vector of norm {source.vector.norm():.4g}"
        raise ValueError(f"{source.path}: --scale {scale:g} x {what} is zero or infinite")
    header, files = {**source.metadata, "scale": total}, {}
    for name in formats:
        files |= files_of(name, vector, header, folder, source.place, source.row)
    try:
        text = card(source, vector, total, formats, [*files], folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"run.json or eval.json is not as this version writes it ({error!r:.80})"
        raise ValueError(f"{source.path}: {why}") from error
    return {**files, "README.md": text.encode()}


def same(path, *contents):
    """Whether there is nothing at the path, or one of these contents."""
    return not path.exists() or (path.is_file() and path.read_bytes() in contents)


@functools.cache
def block_name(model, layer, trust_remote_code):
    """What lm-evaluation-harness calls the layer; from the config alone, without weights."""
    from transformers import AutoModelForCausalLM

    config = read_config(model, trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    block = find_layers(skeleton)[layer]
    return next(name for name, part in skeleton.base_model.named_modules() if part is block)


class Workshop:
    """What adapters need beyond the vector: the model, loaded once, and, in shelf.kept as long as
    it is the model, its site, `a` (the input row that all adapters of a layer share) and held-out
    rows to check them on. runs: how many there are, since they share CHECK_TOKENS."""

    def __init__(self, force, runs):
        self.force, self.shelf = force, Shelf(load_from_options)
        self.check_tokens = max(MIN_CHECK_TOKENS, CHECK_TOKENS // runs)

    def prepare(self, source, run, formats, scale):
        """Add to the source what these formats need. Raises ValueError, with the reason, where
        adapters do not fit the model, or lose too much of `scale` times the vector."""
        if "lm-eval" in formats:
            trust = run.args.get("trust_remote_code", False)
            layer = source.metadata["layer"]
            source.place["block"] = block_name(run.args["model"], layer, trust)
        if not {*formats} & {*WITH_MODEL}:
            return
        model, kept = self.shelf.model(run), self.shelf.kept
        site = kept["site"] = kept.get("site") or adapter.find_site(model)
        source.place |= {"module": site.name, "features": site.module.in_features}
        if not {*formats} & {*WITH_ROW}:
            return
        path = shared_folder(run, run_path("runs", model.name, model.layer, "")) / adapter.ROW_FILE
        if path not in kept:
            row_of = adapter.load_row if path.exists() else functools.partial(self.fit, run)
            kept[path] = row_of(path, model, site)
        source.row, about = kept[path]
        model.set_vector(source.vector, scale)
        found = adapter_check.compare_with_adapter(*self.to_check(path, run, model, site))
        source.adapter = about | found
        lost = max(found["lost"], *(off**2 for _, off in about["missed"].values()))
        if not (lost <= adapter_check.MAX_LOST or self.force):
            what = f"adapters lose {lost:.0%} of this vector, {adapter_check.MAX_LOST:.0%} at most"
            found = f"{adapter_check.adapter_words(found)}; {adapter_check.fit_words(about)}"
            way_out = "--force exports it all the same; --format peft is exact, for PEFT alone"
            raise ValueError(f"{source.path}: {what} ({found}). {way_out}")

    def fit(self, run, path, model, site):
        """(a (features,), what it was fitted and measured on), written to the path if possible."""
        options, chat = DataOptions.of(run.args), self.shelf.chat(run)
        tokens = FIT_TOKENS * site.module.in_features
        examples, heldout, names = rows_to_fit(chat, options, tokens)
        sample, sample_heldout = adapter.sample_examples(chat)
        row, _ = adapter.fit_row(model, site, examples + sample)
        measured = heldout + sample_heldout
        products = adapter.row_products(model, site, row, measured)
        about = {
            "missed": adapter_check.missed_by_row(measured, products),
            "datasets": names, "split": [options.split_seed, options.heldout_fraction],
            "fitted_tokens": sum(len(e.input_ids) for e in examples + sample),
        }  # fmt: skip
        print(f"fitted   {path}: {adapter_check.fit_words(about)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            adapter.save_row(path, row, model, site, about)
        except OSError as error:
            print(f"WARNING: {path} is not kept, so another call fits anew: {error}")
        return row, about

    def to_check(self, path, run, model, site):
        """What `compare_with_adapter` takes, of held-out rows of the run's dataset."""
        options, kept = DataOptions.of(run.args), self.shelf.kept
        chat, (row, about) = self.shelf.chat(run), kept[path]
        if about["split"] != [options.split_seed, options.heldout_fraction]:
            what = f"{path} was fitted with another split of the questions ({about['split']})"
            raise ValueError(f"{what}: held-out rows may be among them. Remove it to fit another")
        if kept.get("checked") != (wanted := (path, run.dataset, options, chat)):
            datasets, budget = options.datasets(), self.check_tokens
            _, examples = examples_of(run.dataset, datasets, chat, options, 0, budget)
            if not examples:
                raise ValueError(f"{run.dataset}: no held-out row to check an adapter on")
            fast = FastPath(model)
            fast.cache_prefix(examples)
            products = adapter.row_products(model, site, row, examples)
            kept["check"] = fast, adapter_check.to_compare(fast, examples, products)
            kept["checked"] = wanted
        return kept["check"]


def examples_of(name, datasets, chat, options, tokens, heldout_tokens):
    """[examples of training questions, of held-out ones] of a dataset, up to so many tokens."""
    filtered = data_filter.filter_dataset(name, datasets, options)
    fraction, seed = options.heldout_fraction, options.split_seed
    parts = data_filter.split_by_question(filtered.rows, fraction, seed)
    return [
        data_filter.take_budget(part, chat, budget, options.max_length, options.seed)[0]
        for part, budget in zip(parts, (tokens, heldout_tokens), strict=True)
    ]


def rows_to_fit(chat, options, tokens):
    """(examples of training questions, some of held-out ones, names) of the datasets of a data
    root, so many tokens in all; of FIT_DATASETS at most, spread over all. ValueError if none has a
    row."""
    datasets = options.datasets()
    names, train, heldout = [*datasets][:: len(datasets) // FIT_DATASETS + 1], [], []
    share = tokens // len(names) + 1
    for name in list(names):
        try:
            found = examples_of(name, datasets, chat, options, share, share // 8 + 1)
        except ValueError as error:  # a dataset that nobody asked for
            print(f"WARNING: {name} is left out of the fit: {error}", file=sys.stderr)
            found = [], []
        if not found[0]:
            names.remove(name)
        train, heldout = train + found[0], heldout + found[1]
    if not train:
        raise ValueError(f"{options.data_root}: no row to fit the adapters' input row on")
    return train, heldout, names


def targets(args):
    """[(run folder, or None with --from, folder to write to)]. ValueError for two of one name."""
    out = Path(args.out) if Path(args.out).name else Path(args.out).absolute()  # "." has no name
    if args.source:
        return [(None, out)]
    folders = find_runs([args.run])
    if folders == [Path(args.run)] or not {*args.format} & {*BY_NAME}:
        return [(folder, out / folder.relative_to(args.run)) for folder in folders]
    named = {}
    for folder in folders:  # by persona, and the run's own name if it has one
        name = dataset = str(read_json(folder / "run.json").get("dataset"))
        with contextlib.suppress(ValueError):  # a name of its own, or none, which read_run will say
            name = "+".join(parse_name(part)[2] for part in pooled_names(dataset))
        name += f"-{folder.name}" if folder.name != dataset else ""
        if name in named:
            way_out = "export one of them by itself, to a folder of another name"
            raise ValueError(f"two runs of the name {name}: {named[name]} and {folder} ({way_out})")
        named[name] = folder
    return [(folder, out / name) for name, folder in named.items()]


def run(args):
    """Export every source; returns the worst exit code."""
    codes, every = [], targets(args)
    workshop = Workshop(args.force, len(every))
    given = {key: value for key, value in vars(args).items() if value is not None}
    places = ("data_root", "source_model", "kind", "dtype", "device", "device_map")
    changes = {key: given[key] for key in places if key in given} | {"quantize": "none"}
    if args.model and Path(args.model).exists():  # the runs' own may be gone
        changes["model"] = args.model
    for folder, out in every:
        try:
            if folder is None:
                trust = args.trust_remote_code
                found = import_vector(args.source, args.model, args.layer, args.any_model, trust)
                source = Source(Path(args.source), found.vector, found.metadata, found.scale)
                options = {**given, "layer": found.layer}
                made_of = FinishedRun(out, args.dataset, {"config": {}}, found.vector, options)
            else:
                made_of = read_run(folder, changes)
                source = from_run(made_of, args)
            scale = source.scale_of(args.scale)
            workshop.prepare(source, made_of, args.format, scale)
            names = export(source, args.format, out, scale, args.overwrite)
            print(f"exported {out}: {', '.join(names)}")
            if source.adapter:
                print(f"         {adapter_check.adapter_words(source.adapter)}")
            if source.metadata["model_is_local"]:
                print(f"NOTE: the files name the model {source.metadata['model']}, a folder here")
                print("      before you publish them, give its public name with --model")
            codes.append(0)
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # others may do better
            print(f"error: {error}", file=sys.stderr)
            codes.append(1 if isinstance(error, OSError | RuntimeError) else 2)
    return max(codes)


def parse_args(argv=None):
    """Command line of export_vector.py; every bad flag is reported, all at once."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what to export").add_argument
    add("run", nargs="?", metavar="RUN_DIR", help="run folder, or a folder of runs")
    add("--from", dest="source", metavar="PATH", help="instead: a vector file of any of the tools")
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
    every = [*args.format, *(VECTOR_ALONE if "all" in args.format else ())]
    args.format = [name for name in FORMATS if name in every]
    return args


def check_arguments(args):
    """(whether something is wrong, what) of the options."""
    text = f'--scale {args.scale}: must be finite and not 0, or "recommended"'
    is_number = isinstance(args.scale, float) and math.isfinite(args.scale) and args.scale
    fitted = args.source and {*args.format} & {*WITH_ROW} and not (args.data_root and args.dataset)
    return [
        (fitted, "lora with --from needs --data-root and --dataset: rows to fit and check it on"),
        (args.run and args.dataset, "--dataset goes with --from: a run knows its own"),
        (bool(args.run) == bool(args.source), "name either RUN_DIR or --from PATH"),
        (args.source and not args.model, "--from needs --model: the model that the vector is for"),
        (args.run and args.layer is not None, "--layer goes with --from: a run knows its own"),
        (not is_number and args.scale != "recommended", text),
    ]


def main(argv=None):
    """Command line entry; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
