"""The recipe sweep behind RECIPE.md: each line of a plan is one training run, read off its log.

    python bench/sweep.py PLAN.txt --out runs/sweep            # a line: name | units options
    python bench/sweep.py --table runs/sweep                   # the runs as a Markdown table

Recipes are chosen by the vector's NLL on rows of validation questions, cut from the training ones:
the same rows whatever a run trains on, kept in its choice.json. The held-out questions are scored
once, at the end, of the runs that --report names. units: what --lr auto multiplies the residual
size with; options: of train_steering.py. A line `all | options` holds for the lines below it. What
is in the folder already is not done again.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_filter as df
import eval_steering
import train_steering
from evaluation.measures import first_tokens, mean_nll, response_means
from hook_model import Shelf, load_chat, load_model
from steering.data_layouts import parsed_rows
from steering.run_folder import run_path
from steering.run_state import read_run
from steering.vector_file import read_json, save_vector, write_json

COMMON = "--data-root sample_data --val-fraction 0.3 --save-every 1000000"
CHOICE_TOKENS = 12_000  # of rows of validation questions

HEADER = """\
| recipe | rows | steps | tokens | seconds | NLL | share of gain | best at step | norm / residual |
|---|---|---|---|---|---|---|---|---|"""


def mean_difference(path, model_name, name, layer):
    """Write mean response state of a persona's training rows minus that of the default rows."""
    options = train_steering.parse_args(
        shlex.split(f"{COMMON} --model {model_name} --dataset {name} --layer {layer}")
    )
    chat, data = load_chat(model_name), df.DataOptions.of(vars(options))
    datasets = data.datasets()
    persona = df.split_dataset(name, datasets, chat, data).train
    default = datasets[name.split("__")[0] + "__role__0_default"]
    rows = [row for row, _ in parsed_rows(default)]
    rows, _ = df.split_by_question(rows, data.heldout_fraction, data.split_seed)
    model = load_model(model_name, layer)
    means = [response_means(model, e, 1024).mean(dim=0) for e in (persona, chat.encode(rows))]
    save_vector(path, means[0] - means[1], {"model": model_name, "layer": layer})


def choice(folder, shelf):
    """NLL on CHOICE_TOKENS of validation questions, of the vector in a run folder and of none."""
    path, run = folder / "choice.json", read_run(folder)
    if not path.exists():
        chat, model, options = shelf.chat(run), shelf.model(run), df.DataOptions.of(run.args)
        options = replace(options, target_tokens=None, seed=options.split_seed)
        splits = df.split_dataset(run.dataset, options.datasets(), chat, options)
        rows = first_tokens(splits.validation, CHOICE_TOKENS)
        vectors = [run.vector, torch.zeros_like(run.vector)]
        nll, vanilla = mean_nll(model, rows, vectors, run.args["micro_batch_tokens"])
        write_json(path, {"nll": nll, "vanilla": vanilla, "rows": len(rows)})
    return read_json(path)


def trained_on(folder):
    """(tokens, seconds) of the steps of a run, the seconds of its prefix pass among them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    rows = [row for row in rows if "loss" in row]
    seconds = read_json(folder / "run.json")["startup"]["prefix"]
    return sum(row["tokens"] for row in rows), seconds + sum(row["seconds"] for row in rows)


def table(out):
    """The runs of a folder as a Markdown table, best first within each model, dataset and layer."""
    groups = {}
    for path in sorted(p for p in out.rglob("choice.json") if "old-" not in str(p.parent.name)):
        record = read_json(path.with_name("run.json"))
        key = record["args"]["model"], record["dataset"], record["args"]["layer"]
        groups.setdefault(key, []).append((path.parent, record, read_json(path)))
    for (model, dataset, layer), runs in groups.items():
        runs.sort(key=lambda run: run[2]["nll"])
        best, vanilla = (runs[0][2][key] for key in ("nll", "vanilla"))
        print(f"\n### {Path(model).name}, {dataset}, layer {layer}\n\nVanilla {vanilla:.4f}.\n")
        print(HEADER)
        for folder, record, found in runs:
            (tokens, seconds), final = trained_on(folder), record["final"]
            share = (vanilla - found["nll"]) / (vanilla - best)
            cells = [folder.name, str(record["counts"]["train"]), str(final["steps"])]
            cells += [f"{tokens:,}", f"{seconds:.0f}", f"{found['nll']:.4f}", f"{share:.3f}"]
            cells += [str(final["best_step"]), f"{final['ratio']:.2f}"]
            print(f"| {' | '.join(cells)} |")


def read_plan(path):
    """Yield [name, options of the last `all` line or "", ...] of each run of a plan file, `name |
    options`, what else is between bars behind it."""
    common = ""
    for line in path.read_text().splitlines():
        name, *fields = map(str.strip, line.split("|"))
        if name == "all":
            common = fields[0]
        elif name and not name.startswith("#"):
            yield [name, common, *fields]


def run_plan(plan, out):
    """Train each line of a plan file, `name | units options`; a run records its own failure."""
    shelf = Shelf()
    for name, common, options in read_plan(plan):
        units, _, rest = options.partition(" ")  # the line's first word: lr in residual units
        argv = shlex.split(f"{COMMON} {common} {rest} --output-dir {out} --run-name {name}")
        args = train_steering.parse_args(argv)
        if args.init_vector and not Path(args.init_vector).exists():
            mean_difference(args.init_vector, args.model, args.dataset[0], args.layer)
        print(f"=== {name}: {options}", flush=True)
        train_steering.AUTO_LR = float(units)
        if (code := train_steering.main(argv)) > 2:  # a signal: stop here, go on another time
            raise SystemExit(code)
        where = args.model, args.layer, args.dataset[0], name
        if code == 0:
            found = choice(run_path(out, *where), shelf)
            print(f"=== {name}: {found['nll']:.4f} of {found['vanilla']:.4f}", flush=True)


def report(folders):
    """Held-out NLL of chosen runs, in one Markdown table."""
    print("| run | vanilla | prompted | steered |\n|---|---|---|---|")
    for folder in folders:
        eval_steering.main(["--run", str(folder), "--num-samples", "0"])
        result = json.loads((folder / "eval.json").read_text())["likelihood"]
        values = " | ".join(f"{result[c]['nll']:.4f}" for c in ("vanilla", "prompted", "steered"))
        print(f"| {folder.parent.parent.name} {folder.name} | {values} |", flush=True)


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("plan", nargs="?", type=Path, help="file with one run a line")
    add("--out", type=Path, default=Path("runs/sweep"), help="root of the run folders")
    add("--table", type=Path, metavar="DIR", help="print the runs of this folder")
    add("--report", type=Path, nargs="+", metavar="RUN_DIR", help="print held-out NLL of these")
    args = parser.parse_args()
    if args.plan:
        run_plan(args.plan, args.out)
    if args.table:
        table(args.table)
    if args.report:
        report(args.report)


if __name__ == "__main__":
    main()
