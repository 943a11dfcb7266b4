"""The recipe sweep behind RECIPE.md: each line of a plan is one training run, read off its log.

    python bench/sweep.py PLAN.txt --out runs/sweep            # a line: name | units options
    python bench/sweep.py --table runs/sweep                   # the runs as a Markdown table

Recipes are chosen on validation questions, cut from the training ones (--val-fraction 0.3). The
held-out questions are scored once, at the end, of the runs that --report names. units: what --lr
auto multiplies the residual size with; options: of train_steering.py. A line `all | options` holds
for the lines below it. A run that is in the folder already is not trained again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


import data_filter as df
import eval_steering
import train_steering
from evaluation.measures import response_means
from hook_model import load_chat, load_model
from steering.data_layouts import parsed_rows
from steering.vector_file import save_vector

COMMON = "--data-root sample_data --val-fraction 0.3 --save-every 1000000"

HEADER = """\
| recipe | steps | tokens | seconds | best val | norm / residual | tokens to target | s to target |
|---|---|---|---|---|---|---|---|"""


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


def read(folder):
    """What a finished run says: recipe, validation curve over tokens and seconds, vector size."""
    record = json.loads((folder / "run.json").read_text())
    curve, tokens, seconds = [], 0, record.get("startup", {}).get("prefix", 0.0)
    for line in (folder / "metrics.jsonl").open():
        row = json.loads(line)
        if "loss" in row:
            tokens, seconds = tokens + row["tokens"], seconds + row["seconds"]
        else:
            curve.append((tokens, seconds, row["val_loss"]))
    return record, curve


def target_of(curves):
    """1% above the best validation loss that any of the runs reached."""
    return 1.01 * min(value for curve in curves for _, _, value in curve)


def table(out):
    """The runs of a folder as a Markdown table, best first within each model, dataset and layer."""
    groups = {}
    for path in sorted(out.rglob("run.json")):
        record, curve = read(path.parent)
        if record["status"] in ("done", "failed"):  # failed: never better than the start
            key = record["args"]["model"], record["dataset"], record["args"]["layer"]
            groups.setdefault(key, []).append((path.parent.name, record, curve))
    for (model, dataset, layer), runs in groups.items():
        target = target_of([curve for _, _, curve in runs])
        vanilla = runs[0][2][0][2]
        print(f"\n### {Path(model).name}, {dataset}, layer {layer}")
        print(f"\nVanilla {vanilla:.4f}, target {target:.4f} (1% above the best).\n\n{HEADER}")
        for name, record, curve in sorted(runs, key=lambda run: min(c[2] for c in run[2])):
            tokens, seconds, _ = curve[-1]
            best = min(value for _, _, value in curve)
            hit = next((point for point in curve if point[2] <= target), None)
            reached = f"{hit[0]:,} | {hit[1]:.0f}" if hit else f"> {tokens:,} | > {seconds:.0f}"
            final = record.get("final", {})
            cells = [name, str(final.get("steps", "?")), f"{tokens:,}", f"{seconds:.0f}"]
            cells += [f"{best:.4f}", f"{final.get('ratio', float('nan')):.2f}", reached]
            print(f"| {' | '.join(cells)} |")


def run_plan(plan, out):
    """Train each line of a plan file, `name | units options`; a run records its own failure."""
    common = COMMON
    for line in plan.read_text().splitlines():
        name, _, options = map(str.strip, line.partition("|"))
        if not name or name.startswith("#"):
            continue
        if name == "all":
            common = f"{COMMON} {options}"
            continue
        units, _, rest = options.partition(" ")  # the line's first word: lr in residual units
        argv = shlex.split(f"{common} {rest} --output-dir {out} --run-name {name}")
        args = train_steering.parse_args(argv)
        if args.init_vector and not Path(args.init_vector).exists():
            mean_difference(args.init_vector, args.model, args.dataset[0], args.layer)
        print(f"=== {name}: {options}", flush=True)
        train_steering.AUTO_LR = float(units)
        if (code := train_steering.main(argv)) > 2:  # a signal: stop here, go on another time
            raise SystemExit(code)


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
