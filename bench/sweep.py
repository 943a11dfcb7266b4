"""The recipe sweep behind RECIPE.md: each line of a plan file is one training run.

    python bench/sweep.py PLAN.txt --out runs/sweep            # a line: name | units options
    python bench/sweep.py --table runs/sweep                   # the runs as a Markdown table

units: `--lr auto` is this factor times the residual norm / sqrt(hidden_size).
options: options of train_steering.py. A line `all | options` holds for the lines below it.

Recipes are compared by the NLL of validation questions, which are cut from the training questions.
Every run is scored on the same rows, whatever it trained on; the score is in the run's choice.json.
A run that is done is not done again.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_steering
from data_filter import DataOptions, split_dataset
from evaluation.likelihood import nll_under
from evaluation.rows import first_tokens
from hook_model import load_from_options
from steering.fast_path import FastPath
from steering.files import read_json, read_json_lines, write_json
from steering.finished import Shelf, read_run
from steering.run_folder import find_runs, run_path

COMMON = "--data-root sample_data --val-fraction 0.3 --save-every 1000000"
MAX_TOKENS = 1024  # padded, a forward pass
CHOICE_TOKENS = 12_000  # of rows of validation questions

HEADER = """\
| recipe | rows | steps | tokens | seconds | NLL | share of gain | best at step | norm / residual |
|---|---|---|---|---|---|---|---|---|"""


@dataclass
class Result:
    """A run that was scored: its folder, its run.json and its choice.json."""

    folder: Path
    record: dict
    choice: dict


def score(folder, shelf):
    """NLL of CHOICE_TOKENS of validation questions, with a run's vector and without one."""
    path = folder / "choice.json"
    if path.exists():
        return read_json(path)
    run = read_run(folder)
    chat = shelf.chat(run)
    model = shelf.model(run)
    # The token budget and the seed of a run decide its rows. Here every run gets the same rows.
    options = DataOptions.of(run.args)
    options = replace(options, target_tokens=None, seed=options.split_seed)
    splits = split_dataset(run.dataset, options.datasets(), chat, options)
    rows = first_tokens(splits.validation, CHOICE_TOKENS)

    vectors = [run.vector, torch.zeros_like(run.vector)]
    under = nll_under(FastPath(model), rows, MAX_TOKENS)
    nll, vanilla = map(under, vectors)
    choice = {"nll": nll, "vanilla": vanilla, "rows": len(rows)}
    write_json(path, choice)
    return choice


def trained_on(folder):
    """(tokens, seconds) of the steps of a run. The seconds include those of the prefix pass."""
    tokens = 0
    seconds = read_json(folder / "run.json")["final"]["prefix_seconds"]
    for row in read_json_lines(folder / "metrics.jsonl"):
        if "loss" in row:
            tokens += row["tokens"]
            seconds += row["seconds"]
    return tokens, seconds


def find_results(out):
    """{(model, dataset, layer): its scored runs} of a folder."""
    groups = {}
    for folder in find_runs([out]):
        record = read_json(folder / "run.json")
        choice = read_json(folder / "choice.json")
        if choice:
            key = (record["args"]["model"], record["dataset"], record["args"]["layer"])
            groups.setdefault(key, []).append(Result(folder, record, choice))
    return groups


def print_table(out):
    """Print the runs of a folder in Markdown, best first within a model, dataset and layer."""
    for (model, dataset, layer), results in find_results(out).items():
        results.sort(key=lambda result: result.choice["nll"])
        best = results[0].choice["nll"]
        vanilla = results[0].choice["vanilla"]
        print(f"\n### {Path(model).name}, {dataset}, layer {layer}\n\nVanilla {vanilla:.4f}.\n")
        print(HEADER)
        for result in results:
            nll = result.choice["nll"]
            final = result.record["final"]
            tokens, seconds = trained_on(result.folder)
            cells = [
                result.folder.name,
                str(result.record["counts"]["train"]),
                str(final["steps"]),
                f"{tokens:,}",
                f"{seconds:.0f}",
                f"{nll:.4f}",
                f"{(vanilla - nll) / (vanilla - best):.3f}",
                str(final["best_step"]),
                f"{final['ratio']:.2f}",
            ]
            print(f"| {' | '.join(cells)} |")


def read_plan(path):
    """Yield (name, options of the last `all` line or "", options) of each run of a plan file."""
    common = ""
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, options = line.split("|")
        if name.strip() == "all":
            common = options.strip()
        else:
            yield name.strip(), common, options.strip()


def run_plan(plan, out):
    """Train and score each line of a plan file. A run that fails says so in its own run.json."""
    shelf = Shelf(load_from_options)
    for name, common, options in read_plan(plan):
        print(f"=== {name}: {options}", flush=True)
        units, _, rest = options.partition(" ")
        argv = shlex.split(f"{COMMON} {common} {rest} --output-dir {out} --run-name {name}")
        args = train_steering.parse_args(argv)
        (dataset,) = args.dataset
        (layer,) = args.layer

        train_steering.AUTO_LR = float(units)
        code = train_steering.main(argv)
        if code > 2:  # A signal stopped the run. The same command continues it.
            raise SystemExit(code)
        if code == 0:
            choice = score(run_path(out, args.model, layer, dataset, name), shelf)
            print(f"=== {name}: {choice['nll']:.4f} of {choice['vanilla']:.4f}", flush=True)


def parse_args(argv=None):
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("plan", nargs="?", type=Path, help="file with one run a line")
    add("--out", type=Path, default=Path("runs/sweep"), help="root of the run folders")
    add("--table", type=Path, metavar="DIR", help="print the runs of this folder")
    return parser.parse_args(argv)


def main(argv=None):
    """Command line entry."""
    args = parse_args(argv)
    if args.plan:
        run_plan(args.plan, args.out)
    if args.table:
        print_table(args.table)


if __name__ == "__main__":
    main()
