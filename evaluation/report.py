"""Evaluations as text: tables, samples.md, flags; the report of many runs. No model is loaded."""

import csv
import io
import math
from pathlib import Path

import numpy as np

from evaluation.plots import NAMES, plot_matrix, plot_run
from evaluation.stats import TEXT_METRICS
from steering.command_line import aligned
from steering.run_state import changed_sources
from steering.vector_file import VECTOR_FILE, load_vector, read_json, write_atomically, write_json

FORMAT_VERSION = "2"  # of eval.json


def number(value, form="{:.4f}"):
    """A number as text, "-" for None."""
    return "-" if value is None else form.format(value)


def bracket(bounds, form="{:+.3f}"):
    """An interval as text."""
    return "[" + ", ".join(form.format(bound) for bound in bounds) + "]"


def paired_text(value, bounds, digits=3):
    """A difference with its interval as text, "-" for None."""
    return "-" if value is None else f"{value:+.{digits}f} {bracket(bounds)}"


def mean_text(value):
    """{"mean", "interval"} as text, "-" for None."""
    return "-" if value is None else f"{value['mean']:.2f} {bracket(value['interval'], '{:.2f}')}"


def likelihood_text(result):
    """The likelihood table, intervals included, as text."""
    table = [["condition", "NLL/token", "95% interval", "perplexity", "steered minus it"]]
    for condition, row in result["likelihood"].items():
        name, paired = NAMES.get(condition, condition), ""
        if condition in ("mean_difference", "steered_chosen"):
            key = "steered" if condition == "steered_chosen" else condition
            name += f" x{result['coefficients'][key]['chosen']:.2g}"
        if "steered_minus" in row:
            paired = paired_text(row["steered_minus"], row["steered_minus_interval"], 4)
        interval = bracket(row["interval"], "{:.3f}")
        table.append([name, number(row["nll"]), interval, f"{row['perplexity']:.2f}", paired])
    recovered, counts = result["recovered"], result["heldout"]
    about = f"undefined, {recovered.get('why')}"
    if recovered["value"] is not None:
        about = f"{recovered['value']:.2f} {bracket(recovered['interval'], '{:.2f}')}"
    head = f"{result['dataset']}: {counts['rows']} rows of {counts['questions']} held-out questions"
    last = f"recovered fraction (vanilla - steered) / (vanilla - prompted): {about}"
    return "\n".join([head, *aligned(table, left=(0, 4)), last])


def answers_table(result):
    """What the answers of each condition are like, as text."""
    probe, judge = result["probe"], result.get("judge")
    if probe["withheld"]:
        first = f"no persona score by probe: {probe['withheld']}"
    else:
        persona, plain = probe["rows"]["heldout"], probe["rows"]["plain_heldout"]
        first = f"probe: held-out AUROC {probe['auroc']:.3f} ({persona} persona rows, {plain} plain"
        first += f": {result['plain']['source']})"
    head = [
        "answers",
        "probe",
        *(["judge"] if judge else []),
        "perplexity",
        *TEXT_METRICS,
        "KL",
        "",
    ]
    table = [head]
    for condition, row in result["answers"].items():
        cells = [NAMES.get(condition, condition), mean_text(row["persona"])]
        if judge:
            cells.append(mean_text(row["judge"]["score"]))
        cells.append(number(row["perplexity"], "{:.1f}"))
        cells += [number(row.get(name), metric.form) for name, metric in TEXT_METRICS.items()]
        effect = result["side_effects"].get(condition) or {}
        cells += [number(effect.get("mean"), "{:.3f}"), "COLLAPSED" * row["collapsed"]]
        table.append(cells)
    lines = [first, *aligned(table, left=(0, len(table[0]) - 1))]
    if judge:
        low, high = judge["scale"]
        rows, bad = [row["judge"] for row in result["answers"].values()], []
        for key in ("refusal", "unparsable", "failed"):
            bad.append(f"{sum(row[key] for row in rows)} {key}")
        lines.append(f"judge {judge['model']}, {low}-{high}: {', '.join(bad)}")
    return "\n".join(lines)


def answers_text(sample, heading="##"):
    """One question and its answers as Markdown."""
    parts = [f"{heading} {sample['question']}", f"persona prompt: *{sample['system_prompt']}*"]
    parts += [f"**{condition}**\n\n{text}" for condition, text in sample["answers"].items()]
    return "\n\n".join(parts)


def summary_text(result):
    """What the console shows of an evaluation."""
    parts = [likelihood_text(result)]
    if result["samples"]:
        parts += [answers_table(result), answers_text(result["samples"][0])]
    parts.append(f"flags: {', '.join(result['flags']) or 'none'}")
    return "\n\n".join(parts)


def samples_text(result):
    """samples.md: the tables, then every question with its answers."""
    tables = likelihood_text(result)
    tables += f"\n\n{answers_table(result)}" if result["samples"] else ""
    flags = f"flags: {', '.join(result['flags']) or 'none'}"
    parts = [f"# {result['dataset']}", f"```\n{tables}\n```", flags]
    return "\n\n".join([*parts, *map(answers_text, result["samples"])]) + "\n"


def write_evaluation(folder, result):
    """Write eval.json, samples.md and eval.png into a run folder; returns the files' names."""
    write_json(folder / "eval.json", result)
    write_atomically(folder / "samples.md", samples_text(result).encode())
    pictures = plot_run(folder / "eval.png", result, folder / "metrics.jsonl")
    return ["eval.json", "samples.md", *pictures]


def find_flags(result, record):
    """What eval.json and run.json say is wrong with a run, as a list, most serious first."""
    table = result["likelihood"]
    bounds = {name: row.get("steered_minus_interval", [0, 0]) for name, row in table.items()}
    checks = [
        ("NaN", not all(math.isfinite(row["nll"]) for row in table.values())),
        ("no better than vanilla", not bounds["vanilla"][1] < 0),
        ("no better than random", not bounds["random"][1] < 0),
        ("worse than mean difference", bounds["mean_difference"][0] > 0),
    ]
    for name, row in result["answers"].items():
        collapsed = name.startswith("steered x") and row["collapsed"]
        checks.append((f"collapse at {name.removeprefix('steered ')}", collapsed))
    return [*(name for name, wrong in checks if wrong), *training_flags(record)]


def training_flags(record):
    """What run.json alone says is wrong with a finished run, as a list."""
    if record.get("status") == "imported":
        return []
    ratio = record.get("final", {}).get("ratio", math.nan)
    flags = [] if 0.05 <= ratio <= 1.0 else ["norm out of range"]
    counts, args = record.get("counts", {}), record.get("args", {})
    under = counts.get("tokens", 0) < args.get("target_tokens", 0)
    return [*flags, "under budget"] if under else flags


def code_flags(record):
    """Whether a run is by other code than is here now, or by more than one, as a list."""
    other = ["other code"] if changed_sources(record.get("code", {})) else []
    return [*other, "code changed midway"] if record.get("code_changes") else other


REPORT_NLL = ("vanilla", "prompted", "steered", "mean_difference", "random")


def report_row(folder):
    """One line of report.csv: what run.json and, once evaluated, eval.json say of a run."""
    record, result = read_json(folder / "run.json"), read_json(folder / "eval.json")
    final, counts, args = (record.get(key, {}) for key in ("final", "counts", "args"))
    table, recovered = result.get("likelihood", {}), result.get("recovered", {})
    at_one = result.get("answers", {}).get("steered x1", {})  # of the vector as it is
    low, high = recovered.get("interval", (None, None))
    row = {
        "dataset": record.get("dataset"), "run": str(folder), "status": record.get("status"),
        "model": args.get("model"), "layer": args.get("layer"),
        "rows": counts.get("train"), "tokens": counts.get("tokens"), "steps": final.get("steps"),
        "seconds": final.get("seconds"), "best_val": final.get("best_val"),
        "norm": final.get("vector_norm"), "norm_ratio": final.get("ratio"),
        **{key: table.get(key, {}).get("nll") for key in (*REPORT_NLL, *table)},
        "recovered": recovered.get("value"), "recovered_low": low, "recovered_high": high,
        "auroc": result.get("probe", {}).get("auroc"),
        "probe": (at_one.get("persona") or {}).get("mean"),
        "judge": (at_one.get("judge", {}).get("score") or {}).get("mean"),
        "kl": (result.get("side_effects", {}).get("steered x1") or {}).get("mean"),
        **{name: at_one.get(name) for name in TEXT_METRICS},
    }  # fmt: skip
    for condition in ("vanilla", "random"):
        paired = table.get(condition, {})
        row[f"minus_{condition}"] = paired.get("steered_minus")
        bounds = paired.get("steered_minus_interval", (None, None))
        row[f"minus_{condition}_low"], row[f"minus_{condition}_high"] = bounds
    flags = result["flags"] if "flags" in result else training_flags(record)
    flags = flags if row["status"] == "done" else [str(row["status"]), *result.get("flags", [])]
    row["flags"] = "; ".join([*flags, *code_flags(record)])
    return row


def report_order(row):
    """Sort key: recovered fraction, best first; then the undefined ones by gain over vanilla."""
    recovered = -math.inf if row["recovered"] is None else row["recovered"]
    return -recovered, math.inf if row["minus_vanilla"] is None else row["minus_vanilla"]


def short_names(rows):
    """What to call each run in a figure: the persona, longer where two are alike."""
    names = [str(row["dataset"]).split("__")[-1] for row in rows]
    if len(set(names)) < len(names):
        names = ["/".join(Path(row["run"]).parts[-2:]) for row in rows]
    return names


REPORT_NOTE = """
NLL per response token on held-out questions; recovered: (vanilla - steered) / (vanilla - prompted);
brackets: 95% over questions; probe, judge, KL and what follows: of the vector as it is, scale 1;
norm: in median token norms of the residual stream at the layer. Every number is in report.csv.
"""


def write_report(folder, runs, matrices=()):
    """Write report.csv, report.md and heat maps into `folder`; returns the names of the files.
    runs: run folders, evaluated or not; matrices: what eval_steering.specificity returned."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(map(report_row, runs), key=report_order)
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "report.csv", text.getvalue().encode())
    conditions = dict.fromkeys(
        c for run in runs for c in read_json(run / "eval.json").get("likelihood", ())
    )
    added = [c for c in conditions if c not in (*REPORT_NLL, "steered_chosen")]
    cells = [report_cells(row, added) for row in rows]
    table = [[*cells[0]], ["---"] * len(cells[0]), *(row.values() for row in cells)]
    lines = [f"# {len(rows)} runs, by recovered fraction\n"]
    lines += [*(f"| {' | '.join(row)} |" for row in table), REPORT_NOTE]
    groups = {}  # vectors of one model and layer can be compared
    for row in rows:
        if (Path(row["run"]) / VECTOR_FILE).exists():
            groups.setdefault((row["model"], row["layer"]), []).append(row)
    pictures = []
    for place, group in groups.items():
        if len(group) > 1:
            suffix = f"-{len(pictures)}" if pictures else ""
            said, drawn = compare_vectors(folder, place, group, matrices, suffix)
            lines, pictures = lines + said, pictures + drawn
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode())
    return ["report.csv", "report.md", *pictures]


def compare_vectors(folder, place, group, matrices, suffix):
    """(Markdown lines, names of heat maps) of the runs of one (model, layer)."""
    paths = [Path(row["run"], VECTOR_FILE) for row in group]
    vectors = np.stack([load_vector(path)[0].numpy() for path in paths])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T
    off = cosine[~np.eye(len(group), dtype=bool)]
    lines = [f"## {Path(str(place[0])).name}, layer {place[1]}\n"]
    lines.append(f"Cosine between vectors: mean {off.mean():.2f}, highest {off.max():.2f}.\n")
    path, names = folder / f"cosine{suffix}.png", short_names(group)
    pictures = plot_matrix(path, names, cosine, "Cosine between vectors")
    for matrix in matrices:
        if (matrix["model"], matrix["layer"]) == place:
            lines.append(specificity_line(matrix))
            title = "NLL of each persona's held-out rows (column) under each vector (row),\n"
            title += "minus vanilla; the diagonal should be lowest of its column"
            change = np.array(matrix["nll"]) - np.array(matrix["vanilla"])
            path = folder / f"specificity{suffix}.png"
            pictures += plot_matrix(path, matrix["names"], change, title)
    return [*lines, *(f"![{name}]({name})\n" for name in pictures)], pictures


def report_cells(row, added=()):
    """A run as {column: text} of the Markdown table; added: conditions beyond the usual ones."""
    recovered = "undefined" if row["steered"] is not None else "-"
    if row["recovered"] is not None:
        bounds = row["recovered_low"], row["recovered_high"]
        recovered = f"{row['recovered']:.2f} {bracket(bounds, '{:.2f}')}"
    paired = {
        f"steered - {name}": paired_text(
            row[f"minus_{name}"], (row[f"minus_{name}_low"], row[f"minus_{name}_high"])
        )
        for name in ("vanilla", "random")
    }
    return {
        "dataset": f"`{row['dataset']}`",
        **{key: number(row[key]) for key in ("vanilla", "prompted", "steered")},
        "mean diff": number(row["mean_difference"]),
        **{key: number(row.get(key)) for key in added}, "recovered": recovered, **paired,
        **{head: number(row[head.lower()], "{:.2f}") for head in ("probe", "judge", "KL")},
        **{name: number(row[name], metric.form) for name, metric in TEXT_METRICS.items()},
        "norm": number(row["norm_ratio"], "{:.2f}"), "flags": row["flags"],
    }  # fmt: skip


def specificity_line(matrix):
    """How often the diagonal wins, and where it does not."""
    nll = np.array(matrix["nll"])
    best = nll.argmin(axis=0)
    names = matrix["names"]
    lost = [f"{names[i]} (better by {names[j]})" for i, j in enumerate(best) if i != j]
    text = f"Specificity: {len(best) - len(lost)} of {len(best)} personas' rows are best explained "
    return text + "by their own vector" + f"; not {', '.join(lost)}" * bool(lost) + ".\n"


def print_table(rows):
    """The table a sweep ends with; held-out NLL once evaluated, validation NLL before."""
    whole = ("rows", "tokens", "steps", "seconds")
    table = [["dataset", *whole, "best val", "held-out", "norm", "flags"]]
    for row in rows:
        cells = [str(row["dataset"]), *(number(row[key], "{:,.0f}") for key in whole)]
        cells += [number(row["best_val"]), number(row["steered"])]
        table.append([*cells, number(row["norm"], "{:.2f}"), row["flags"]])
    print("\n".join(aligned(table, left=(0, len(table[0]) - 1))))
