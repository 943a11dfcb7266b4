"""Evaluations as text: tables, samples.md, flags; the report of many runs. No model is loaded."""

import contextlib
import csv
import html
import io
import math
from pathlib import Path

import numpy as np

from evaluation.plots import NAMES, plot_matrix, plot_run
from evaluation.stats import TEXT_METRICS
from steering.command_line import aligned
from steering.run_state import changed_sources
from steering.vector_file import VECTOR_FILE, load_vector, read_json, write_atomically, write_json

FORMAT_VERSION = "3"  # of eval.json
WHY_NEW_FORMAT = "an older version's brackets were too narrow"
NLL = ("vanilla", "prompted", "steered", "mean_difference", "random")
AT_ONE = "eval/answers/steered x1"  # of the vector as it is

COLUMNS = {  # of report.csv: where run.json or eval.json of a run says it
    "dataset": "run/dataset", "run": "run/folder", "status": "run/status",
    "model": "run/args/model", "layer": "run/args/layer", "rows": "run/counts/train",
    "tokens": "run/counts/tokens", "questions": "eval/heldout/questions",
    "steps": "run/final/steps", "seconds": "run/final/seconds",
    "best_val": "run/final/best_val", "norm": "run/final/vector_norm",
    "norm_ratio": "run/final/ratio", **{name: f"eval/likelihood/{name}/nll" for name in NLL},
    "recovered": "eval/recovered/value", "recovered_low": "eval/recovered/interval/0",
    "recovered_high": "eval/recovered/interval/1", "auroc": "eval/probe/auroc",
    "probe": f"{AT_ONE}/persona/mean", "judge": f"{AT_ONE}/judge/score/mean",
    "kl": "eval/side_effects/steered x1/mean",
    **{name: f"{AT_ONE}/{name}" for name in TEXT_METRICS},
}  # fmt: skip
for _name in ("vanilla", "random"):
    _where = f"eval/likelihood/{_name}/steered_minus"
    COLUMNS |= {f"minus_{_name}": _where, f"minus_{_name}_low": f"{_where}_interval/0"}
    COLUMNS |= {f"minus_{_name}_high": f"{_where}_interval/1"}


def number(value, form="{:.4f}", bounds=None):
    """A number as text, with its interval if given; "-" for None."""
    if value is None:
        return "-"
    return form.format(value) + (f" {bracket(bounds, form)}" if bounds else "")


def bracket(bounds, form):
    """An interval as text; "-" for None: too few questions."""
    return "-" if bounds is None else "[" + ", ".join(form.format(bound) for bound in bounds) + "]"


def mean_text(found):
    """{"mean", "interval"}, or None, as text."""
    return number(found["mean"], "{:.2f}", found["interval"]) if found else "-"


def likelihood_text(result):
    """The likelihood table, intervals included, as text."""
    table = [["condition", "NLL/token", "95% interval", "perplexity", "steered minus it"]]
    for condition, row in result["likelihood"].items():
        name = NAMES.get(condition, condition)
        if condition in ("mean_difference", "steered_chosen"):
            key = condition.removesuffix("_chosen")
            name += f" x{result['coefficients'][key]['chosen']:.2g}"
        cells = [name, number(row["nll"]), bracket(row["interval"], "{:.3f}")]
        paired = row.get("steered_minus"), "{:+.3f}", row.get("steered_minus_interval")
        cells += [f"{row['perplexity']:.2f}", number(*paired) if "steered_minus" in row else ""]
        table.append(cells)
    recovered, counts = result["recovered"], result["heldout"]
    about = number(recovered["value"], "{:.2f}", recovered.get("interval"))
    if recovered["value"] is None:
        about = f"undefined, {recovered.get('why')}"
    head = f"{result['dataset']}: {counts['rows']} rows of {counts['questions']} held-out questions"
    last = f"recovered fraction (vanilla - steered) / (vanilla - prompted): {about}"
    return "\n".join([head, *aligned(table, left=(0, 4)), last])


def answers_table(result):
    """What the answers of each condition are like, as text."""
    probe, judge = result["probe"], result.get("judge")
    first = f"no persona score by probe: {probe['withheld']}"
    if not probe["withheld"]:
        persona, plain = probe["rows"]["heldout"], probe["rows"]["plain_heldout"]
        first = f"probe: held-out AUROC {probe['auroc']:.3f} ({persona} persona rows, {plain} plain"
        first += f": {result['plain']['source']})"
    scorers = ["probe", "judge"] if judge else ["probe"]
    table = [["answers", *scorers, "perplexity", *TEXT_METRICS, "KL", ""]]
    for condition, row in result["answers"].items():
        cells = [NAMES.get(condition, condition), mean_text(row["persona"])]
        cells += [mean_text(row["judge"]["score"])] if judge else []
        cells.append(number(row["perplexity"], "{:.1f}"))
        cells += [number(row.get(name), metric.form) for name, metric in TEXT_METRICS.items()]
        effect = result["side_effects"].get(condition) or {}
        cells += [number(effect.get("mean"), "{:.3f}"), "COLLAPSED" * row["collapsed"]]
        table.append(cells)
    lines = [first, *aligned(table, left=(0, len(table[0]) - 1))]
    if judge:
        rows, (low, high) = [row["judge"] for row in result["answers"].values()], judge["scale"]
        bad = [f"{sum(r[key] for r in rows)} {key}" for key in ("refusal", "unparsable", "failed")]
        lines.append(f"judge {judge['model']}, {low}-{high}: {', '.join(bad)}")
    return "\n".join(lines)


def tables_text(result):
    """Both tables and the flags, as text."""
    flags = f"flags: {', '.join(result['flags']) or 'none'}"
    answers = [answers_table(result)] if result["samples"] else []
    return "\n\n".join([likelihood_text(result), *answers, flags])


def plain(text):
    """Text for a line of Markdown, whatever it has to say."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def quoted(text):
    """Text as a Markdown quotation, in which no HTML is."""
    return "\n".join(f"> {line}" for line in html.escape(text, quote=False).split("\n"))


def answers_text(sample, heading="##", quote=quoted):
    """One question and its answers as Markdown."""
    parts = [f"{heading} {plain(sample['question'])}", "persona prompt:"]
    parts += [quote(sample["system_prompt"])]
    parts += [f"**{name}**\n\n{quote(text)}" for name, text in sample["answers"].items()]
    return "\n\n".join(parts)


def write_evaluation(folder, result, suffix=""):
    """Write eval.json, samples.md and eval.png into a run folder, and print what is in them.
    suffix: of the names, before the dot."""
    files, tables = [f"eval{suffix}.json", f"samples{suffix}.md"], tables_text(result)
    write_json(folder / files[0], result)
    parts = [f"# {plain(result['dataset'])}", f"```\n{tables}\n```"]
    text = "\n\n".join([*parts, *map(answers_text, result["samples"])]) + "\n"
    write_atomically(folder / files[1], text.encode())
    files += plot_run(folder / f"eval{suffix}.png", result, folder / "metrics.jsonl")
    print(tables)
    for sample in result["samples"][:1]:
        print("", answers_text(sample, quote=str), sep="\n")
    print(f"\nrun: {folder} ({', '.join(files)})", flush=True)


def find_flags(result, record):
    """What eval.json and run.json say is wrong with a run, as a list, most serious first."""
    table = result["likelihood"]
    bounds = {name: row.get("steered_minus_interval") or [-1, -1] for name, row in table.items()}
    few = table["vanilla"]["steered_minus_interval"] is None
    checks = [
        ("NaN", not all(math.isfinite(row["nll"]) for row in table.values())),
        (f"only {result['heldout']['questions']} held-out questions" if few else "", few),
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


def pick(value, path):
    """What a nested dict or list holds at "a/b/0", None where there is no such place."""
    for key in path.split("/"):
        try:
            value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def report_row(folder):
    """One line of report.csv: what run.json and, once evaluated, eval.json say of a run."""
    record, result = read_json(folder / "run.json"), read_json(folder / "eval.json")
    files = {"run": {**record, "folder": str(folder)}, "eval": result}
    row = {column: pick(files, path) for column, path in COLUMNS.items()}
    row |= {name: found["nll"] for name, found in result.get("likelihood", {}).items()}
    flags = result["flags"] if "flags" in result else training_flags(record)
    flags = flags if row["status"] == "done" else [str(row["status"]), *result.get("flags", [])]
    other = ["other code"] if changed_sources(record.get("code", {})) else []
    other += ["code changed midway"] if record.get("code_changes") else []
    version = result.get("config", {}).get("format_version", FORMAT_VERSION)
    other += ["older evaluation"] if version != FORMAT_VERSION else []
    return row | {"flags": "; ".join([*flags, *other])}


def report_order(row):
    """Sort key: recovered fraction, best first; then the undefined ones by gain over vanilla."""
    values = [row["recovered"], row["minus_vanilla"]]
    recovered, gain = (v if v is not None and math.isfinite(v) else None for v in values)
    return math.inf if recovered is None else -recovered, math.inf if gain is None else gain


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
    text, columns = io.StringIO(), list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "report.csv", text.getvalue().encode())
    added = [c for c in columns if c not in (*COLUMNS, "flags", "steered_chosen")]
    cells = [report_cells(row, added) for row in rows]
    table = [[*cells[0]], ["---"] * len(cells[0]), *(row.values() for row in cells)]
    lines = [f"# {len(rows)} runs, by recovered fraction\n"]
    lines += [*(f"| {' | '.join(row)} |" for row in table), REPORT_NOTE]
    groups, pictures = {}, []  # vectors of one model and layer can be compared
    for row in rows:
        with contextlib.suppress(ValueError):  # none there, or not a vector
            vector = load_vector(Path(row["run"], VECTOR_FILE))[0]
            groups.setdefault((row["model"], row["layer"], len(vector)), []).append((row, vector))
    for place, group in groups.items():
        if len(group) > 1:
            suffix = f"-{len(pictures)}" if pictures else ""
            members, vectors = zip(*group, strict=True)
            said, drawn = compare_vectors(folder, place[:2], members, vectors, matrices, suffix)
            lines, pictures = lines + said, pictures + drawn
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode())
    return ["report.csv", "report.md", *pictures]


def compare_vectors(folder, place, group, vectors, matrices, suffix):
    """(Markdown lines, names of heat maps) of the report's rows of one (model, layer)."""
    vectors = np.stack([(vector / vector.norm()).numpy() for vector in vectors])
    cosine = vectors @ vectors.T
    off = cosine[~np.eye(len(group), dtype=bool)]
    lines = [f"## {Path(str(place[0])).name}, layer {place[1]}\n"]
    lines.append(f"Cosine between vectors: mean {off.mean():.2f}, highest {off.max():.2f}.\n")
    path = folder / f"cosine{suffix}.png"
    pictures = plot_matrix(path, short_names(group), cosine, "Cosine between vectors")
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

    def interval(name, form):
        bounds = row[f"{name}_low"], row[f"{name}_high"]
        return number(row[name], form, None if None in bounds else bounds)

    undefined = row["recovered"] is None and row["steered"] is not None
    return {
        "dataset": f"`{plain(row['dataset'])}`",
        **{key: number(row[key]) for key in ("vanilla", "prompted", "steered")},
        "mean diff": number(row["mean_difference"]),
        **{key: number(row.get(key)) for key in added},
        "recovered": "undefined" if undefined else interval("recovered", "{:.2f}"),
        "steered - vanilla": interval("minus_vanilla", "{:+.3f}"),
        "steered - random": interval("minus_random", "{:+.3f}"),
        **{head: number(row[head.lower()], "{:.2f}") for head in ("probe", "judge", "KL")},
        **{name: number(row[name], metric.form) for name, metric in TEXT_METRICS.items()},
        "norm": number(row["norm_ratio"], "{:.2f}"), "flags": row["flags"],
    }  # fmt: skip


def specificity_line(matrix):
    """How often the diagonal wins, and where it does not."""
    names, best = matrix["names"], np.array(matrix["nll"]).argmin(axis=0)
    lost = [f"{names[i]} (better by {names[j]})" for i, j in enumerate(best) if i != j]
    text = f"Specificity: {len(best) - len(lost)} of {len(best)} personas' rows are best explained "
    return text + "by their own vector" + f"; not {', '.join(lost)}" * bool(lost) + ".\n"


def print_table(rows):
    """The table a sweep ends with; held-out NLL once evaluated, validation NLL before."""
    whole = ("rows", "tokens", "steps", "seconds")
    table = [["dataset", *whole, "best val", "held-out", "norm", "flags"]]
    for row in rows:
        cells = [str(row["dataset"]), *(number(row[key], "{:,.0f}") for key in whole)]
        cells += [number(row["best_val"]), number(row["steered"]), number(row["norm"], "{:.2f}")]
        table.append([*cells, row["flags"]])
    print("\n".join(aligned(table, left=(0, len(table[0]) - 1))))
