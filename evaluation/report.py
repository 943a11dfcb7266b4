"""The report of many runs: tables, a CSV file, heat maps. No model is loaded."""

import contextlib
import csv
import io
import json
import math
from pathlib import Path

import numpy as np

from evaluation.page import heat_map, write_page
from evaluation.plots import plot_matrix
from evaluation.stats import TEXT_METRICS
from evaluation.summary import FORMAT_VERSION, number, plain, scale_condition, training_flags
from steering.files import read_json, write_atomically
from steering.run import changed_sources
from steering.tables import aligned
from steering.vector_file import VECTOR_FILE, load_vector

NLL = ("vanilla", "prompted", "few_shot", "steered", "mean_difference", "random")

COLUMNS = {  # of report.csv: where run.json or eval.json of a run says it; @: at the scale to use
    "dataset": "run/dataset", "run": "run/folder", "status": "run/status",
    "model": "run/args/model", "layer": "run/args/layer", "rows": "run/counts/train",
    "tokens": "run/counts/tokens", "questions": "eval/heldout/questions",
    "steps": "run/final/steps", "seconds": "run/final/seconds",
    "best_val": "run/final/best_val", "norm": "run/final/vector_norm",
    "norm_ratio": "run/final/ratio", **{name: f"eval/likelihood/{name}/nll" for name in NLL},
    "recovered": "eval/recovered/value", "recovered_low": "eval/recovered/interval/0",
    "recovered_high": "eval/recovered/interval/1", "auroc": "eval/probe/auroc",
    "scale": "eval/recommended/scale", "probe": "eval/answers/@/persona/mean",
    "judge": "eval/judges/0/conditions/@/score/mean",
    "coherence": "eval/judges/0/conditions/@/coherence/mean",
    "overall": "eval/judges/0/conditions/@/overall/mean",
    "caricature": "eval/judges/0/conditions/@/caricature/mean",
    "judge_model": "eval/judges/0/model", "agreement": "eval/agreement/spearman",
    "kl": "eval/side_effects/@/mean",
    **{name: f"eval/answers/@/{name}" for name in TEXT_METRICS},
}  # fmt: skip
for _name in ("vanilla", "random"):
    _where = f"eval/likelihood/{_name}/steered_minus"
    COLUMNS |= {f"minus_{_name}": _where, f"minus_{_name}_low": f"{_where}_interval/0"}
    COLUMNS |= {f"minus_{_name}_high": f"{_where}_interval/1"}


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
    judges = result.get("judges", [])
    scored = [j for j in judges if any(c["score"] for c in j["conditions"].values())]
    result |= {"judges": [*scored, *(j for j in judges if j not in scored)]}  # the first is shown
    files, use = {"run": {**record, "folder": str(folder)}, "eval": result}, scale_condition(result)
    row = {column: pick(files, path.replace("@", use)) for column, path in COLUMNS.items()}
    row |= {name: found["nll"] for name, found in result.get("likelihood", {}).items()}
    for condition, scores in result.get("capability", {}).get("conditions", {}).items():
        row |= {f"{task}, {condition}": score["value"] for task, score in scores.items()}
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
    return names if len(set(names)) == len(names) else [str(row["run"]) for row in rows]


REPORT_NOTE = """
NLL per response token on held-out questions; recovered: (vanilla - steered) / (vanilla - prompted);
brackets: 95% over questions; probe, judge, KL and what follows: at the recommended scale, or at 1;
norm: in median token norms of the residual stream at the layer. Every number is in report.csv.
"""


def write_report(folder, runs, matrices=()):
    """Write report.csv, report.md, report.html and heat maps into `folder`; returns their names.
    runs: run folders, evaluated or not; matrices: what eval_steering.specificity returned."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(map(report_row, runs), key=report_order)
    text, columns = io.StringIO(), list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "report.csv", text.getvalue().encode())
    others = "flags", "steered_chosen", "steered_recommended"
    added = [c for c in columns if c not in (*COLUMNS, *others)]
    cells = [report_cells(row, added) for row in rows]
    table = [[*cells[0]], ["---"] * len(cells[0]), *(row.values() for row in cells)]
    lines = [f"# {len(rows)} runs, by recovered fraction\n"]
    lines += [*(f"| {' | '.join(row)} |" for row in table), REPORT_NOTE]
    found, groups, pictures, heat = [], {}, [], []
    for row in rows:
        with contextlib.suppress(ValueError):  # none there, or not a vector
            found.append((row, load_vector(Path(row["run"], VECTOR_FILE))[0]))
    lines += compare_seeds(found)
    for row, vector in found:  # those of one model and layer can be compared
        groups.setdefault((row["model"], row["layer"], len(vector)), []).append((row, vector))
    for place, group in groups.items():
        if len(group) > 1:
            suffix = f"-{len(pictures)}" if pictures else ""
            members, vectors = zip(*group, strict=True)
            about = folder, place[:2], members, vectors, matrices, suffix
            said, drawn, maps = compare_vectors(*about)
            lines, pictures, heat = lines + said, pictures + drawn, heat + maps
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode())
    page = write_page(folder / "report.html", rows, short_names(rows), heat)
    return ["report.csv", "report.md", *page, *pictures]


def compare_seeds(runs):
    """Markdown lines: of runs that differ in nothing but --seed, how alike they came out.
    runs: (row of the report, vector) pairs."""
    groups, table = {}, []
    for row, vector in runs:
        config = read_json(Path(row["run"], "run.json")).get("config")
        if row["status"] == "done" and isinstance(config, dict) and "seed" in config:
            seed, rest = config["seed"], {**config, "seed": None}
            groups.setdefault(json.dumps(rest, sort_keys=True), {})[seed] = row, vector
    heads = {"steered": "{:.3f}", "minus_vanilla": "{:+.3f}", "recovered": "{:.2f}"}
    heads |= {"scale": "{:.2f}", "probe": "{:.2f}", "judge": "{:.2f}"}
    for found in groups.values():
        if len(found) < 2:
            continue
        group, vectors = zip(*found.values(), strict=True)
        vectors = np.stack([(vector / vector.norm()).numpy() for vector in vectors])
        cosine = (vectors @ vectors.T)[np.triu_indices(len(group), 1)]
        cells = [f"`{plain(group[0]['dataset'])}`", str(len(group))]
        cells.append(f"{cosine.mean():.3f} ({cosine.min():.3f})")
        for head, form in heads.items():
            values = [row[head] for row in group if row[head] is not None]
            spread = np.std(values, ddof=1) if len(values) > 1 else None
            mean = number(np.mean(values) if values else None, form)
            cells.append(mean if spread is None else f"{mean} +- {spread:.3f}")
        table.append(f"| {' | '.join(cells)} |")
    if not table:
        return []
    names = ["dataset", "seeds", "cosine (lowest)", "steered", "steered - vanilla", "recovered"]
    head = [f"| {' | '.join([*names, 'scale', 'probe', 'judge'])} |", "|---" * 9 + "|"]
    about = "Runs that differ in their seed alone: mean +- standard deviation over them.\n"
    return ["## Seeds\n", about, *head, *sorted(table), ""]


def compare_vectors(folder, place, group, vectors, matrices, suffix):
    """(Markdown lines, names of heat maps, these for the page) of the report's rows of one (model,
    layer)."""
    vectors = np.stack([(vector / vector.norm()).numpy() for vector in vectors])
    cosine = vectors @ vectors.T
    off = cosine[~np.eye(len(group), dtype=bool)]
    names, where = short_names(group), f"{Path(str(place[0])).name}, layer {place[1]}"
    lines = [f"## {where}\n"]
    ends = []
    for what, at in (
        ("lowest", cosine.argmin()),
        ("highest", (cosine - 9 * np.eye(len(group))).argmax()),
    ):
        i, j = divmod(int(at), len(group))
        ends.append(f"{what} {cosine[i, j]:.2f} ({names[i]} and {names[j]})")
    note = f"Cosine between vectors: mean {off.mean():.2f}, {', '.join(ends)}."
    lines.append(f"{note}\n")
    path = folder / f"cosine{suffix}.png"
    pictures = plot_matrix(path, names, cosine, "Cosine between vectors")
    maps = [heat_map(f"Cosine between vectors, {where}", note, names, cosine)]
    for matrix in matrices:
        if (matrix["model"], matrix["layer"]) == place:
            lines.append(specificity_line(matrix))
            title = "NLL of each persona's held-out rows (column) under each vector (row),\n"
            title += "minus vanilla; the diagonal should be lowest of its column"
            change = np.array(matrix["nll"]) - np.array(matrix["vanilla"])
            path = folder / f"specificity{suffix}.png"
            pictures += plot_matrix(path, matrix["names"], change, title)
            maps.append(heat_map(f"Specificity, {where}", title, matrix["names"], change))
    return [*lines, *(f"![{name}]({name})\n" for name in pictures)], pictures, maps


def report_cells(row, added=()):
    """A run as {column: text} of the Markdown table; added: conditions beyond the usual ones."""

    def interval(name, form):
        bounds = row[f"{name}_low"], row[f"{name}_high"]
        return number(row[name], form, None if None in bounds else bounds)

    undefined = row["recovered"] is None and row["steered"] is not None
    return {
        "dataset": f"`{plain(row['dataset'])}`",
        **{key: number(row[key]) for key in ("vanilla", "prompted", "steered")},
        "few-shot": number(row["few_shot"]), "mean diff": number(row["mean_difference"]),
        **{key: number(row.get(key)) for key in added},
        "recovered": "undefined" if undefined else interval("recovered", "{:.2f}"),
        "steered - vanilla": interval("minus_vanilla", "{:+.3f}"),
        "steered - random": interval("minus_random", "{:+.3f}"),
        "scale": number(row["scale"], "{:g}"),
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
    names = [row["dataset"] for row in rows]
    for row in rows:
        name = str(row["dataset"])
        name += f"/{Path(row['run']).name}" if names.count(row["dataset"]) > 1 else ""
        cells = [name, *(number(row[key], "{:,.0f}") for key in whole)]
        cells += [number(row["best_val"]), number(row["steered"]), number(row["norm"], "{:.2f}")]
        table.append([*cells, row["flags"]])
    print("\n".join(aligned(table, left=(0, len(table[0]) - 1))))
