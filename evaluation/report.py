"""The report of many runs: report.csv and report.html. No model is loaded."""

import contextlib
import csv
import io
import math
from pathlib import Path

import numpy as np

from evaluation.layers import compare_layers, setting_of
from evaluation.page import Entry, heat_map, write_page
from evaluation.summary import training_flags
from evaluation.table import (
    TRAINED,
    bounds_of,
    condition_to_use,
    number_at,
    number_of,
    text_of,
)
from steering.data_layouts import persona_of
from steering.files import read_json, write_atomically
from steering.run import changed_sources
from steering.tables import aligned
from steering.vector_file import VECTOR_FILE, load_vector


def read_result(path):
    """The evaluation that an eval.json holds; {} without one, or if it is torn or older than
    conditions are. Flags come last: [] of an evaluation that is still going on."""
    result = read_json(path)
    if "conditions" not in result:
        return {}
    result.setdefault("flags", [])
    return result


def read_entry(folder):
    """What the files of a run say, as an Entry."""
    record = read_json(folder / "run.json")
    result = read_result(folder / "eval.json")
    args = record.get("args", {})
    counts = record.get("counts", {})
    final = record.get("final", {})
    facts = {
        "dataset": record.get("dataset"),
        "run": str(folder),
        "status": record.get("status"),
        "model": args.get("model"),
        "layer": args.get("layer"),
        "rows": counts.get("train"),
        "tokens": counts.get("tokens"),
        "questions": result.get("heldout", {}).get("questions"),
        "steps": final.get("steps"),
        "seconds": final.get("seconds"),
        "best_val": final.get("best_val"),
        "heldout_nll": number_at(result, TRAINED, "nll"),
        "minus_vanilla": number_at(result, "vanilla", "steered_minus"),
        "norm": final.get("vector_norm"),
        "norm_ratio": final.get("ratio"),
        "auroc": result.get("probe", {}).get("auroc"),
        "recommended_scale": result.get("recommended", {}).get("scale"),
        "agreement": number_of(result.get("agreement")),
        "flags": "; ".join(all_flags(record, result)),
    }
    return Entry(folder, record, result, facts)


def all_flags(record, result):
    """What is wrong with a run, as a list: its status, its evaluation, its code."""
    flags = []
    if record.get("status") != "done":
        flags.append(str(record.get("status")))
    elif not result:
        flags += training_flags(record)
    flags += result.get("flags", [])
    if changed_sources(record.get("code", {})):
        flags.append("other code")
    if record.get("code_changes"):
        flags.append("code changed midway")
    return flags


def by_nll(entry):
    """Sort key: what the vector adds to vanilla's NLL, most negative first, unknown last."""
    added = entry.facts["minus_vanilla"]
    if added is None or math.isnan(added):
        return math.inf
    return added


def short_names(rows):
    """What to call each run in a figure: the persona, longer where two are alike."""
    names = [persona_of(str(row["dataset"])) for row in rows]
    if len(set(names)) < len(names):
        folders = [Path(row["run"]) for row in rows]
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        names = [str(row["run"]) for row in rows]
    return names


def write_report(folder, runs, matrices=()):
    """Write report.csv and report.html into `folder`, which is there.

    runs: run folders, evaluated or not. matrices: what `specificity` returned.
    """
    entries = [read_entry(run) for run in runs]
    entries.sort(key=by_nll)
    measures = {}
    groups = {}  # of runs whose vectors can be compared: those of one model and layer
    for entry in entries:
        measures |= entry.result.get("measures", {})
        with contextlib.suppress(ValueError):  # There is no vector yet, or it is not finite.
            vector = load_vector(entry.folder / VECTOR_FILE)[0]
            place = (entry.facts["model"], entry.facts["layer"], len(vector))
            if vector.any():
                entry.direction = (vector / vector.norm()).numpy()
                groups.setdefault(place, []).append(entry)
    maps = [cosine_map(group) for group in groups.values() if len(group) > 1]
    maps += [specificity_map(matrix) for matrix in matrices]

    write_csv(folder / "report.csv", entries, measures)
    titles = short_names([entry.facts for entry in entries])
    layers = compare_layers(entries)
    for found in layers:
        print(f"\n{found['title']}\n{found['text']}")
    comparisons = {"heat": maps, "seeds": compare_seeds(entries, measures), "layers": layers}
    write_page(folder / "report.html", entries, titles, measures, comparisons)


def write_csv(path, entries, measures):
    """Write a line for each run and condition; a run that is not evaluated has one line."""
    lines = []
    for entry in entries:
        for condition, values in entry.result.get("conditions", {"": {}}).items():
            line = dict(entry.facts)
            line["condition"] = condition
            line["recommended"] = condition == condition_to_use(entry.result)
            for name, value in values.items():
                line[name] = number_of(value)
                bounds = bounds_of(value)
                if bounds:
                    line[f"{name}_low"] = bounds[0]
                    line[f"{name}_high"] = bounds[1]
            lines.append(line)

    columns = [*entries[0].facts, "condition", "scale", "recommended"]
    for name in measures:
        for column in (name, f"{name}_low", f"{name}_high"):
            if any(column in line for line in lines):
                columns.append(column)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def cosines(entries):
    """Cosine of the vector of each run with that of each other: (N, N)."""
    directions = np.stack([entry.direction for entry in entries])
    return directions @ directions.T


def place_of(about):
    """The model, by its whole name, and the layer of a dict, as text."""
    return f"{about['model']}, layer {about['layer']}"


def cosine_map(group):
    """The heat map of cosines between the vectors of some runs, as the page draws it."""
    names = short_names([entry.facts for entry in group])
    cosine = cosines(group)
    first, second = np.triu_indices(len(group), 1)
    values = cosine[first, second]
    note = f"Cosine between vectors: mean {values.mean():.2f}"
    ends = {"lowest": values.argmin(), "highest": values.argmax()}
    for what, place in ends.items():
        pair = f"{names[first[place]]} and {names[second[place]]}"
        note += f", {what} {values[place]:.2f} ({pair})"
    title = f"Cosine between vectors, {place_of(group[0].facts)}"
    return heat_map(title, f"{note}.", names, cosine)


def specificity_map(matrix):
    """The heat map of a matrix of `specificity`, and how often the diagonal is the best."""
    names = matrix["names"]
    nll = np.array(matrix["nll"], float)  # (vectors, personas)
    ranked = np.where(np.isnan(nll), np.inf, nll)
    best = ranked.min(axis=0)
    lost = np.flatnonzero(nll.diagonal() != best).tolist()
    note = f"Specificity: {len(names) - len(lost)} of {len(names)} personas' rows are best "
    note += "explained by their own vector"
    if lost:
        winners = ranked.argmin(axis=0)
        better = [f"{names[j]} (better by {names[winners[j]]})" for j in lost]
        note += f"; not {', '.join(better)}"
    note += ". NLL of each persona's held-out rows (column) under each vector (row), minus vanilla."
    change = nll - np.array(matrix["vanilla"], float)
    return heat_map(f"Specificity, {place_of(matrix)}", note, names, change, lost, signed=True)


def compare_seeds(entries, measures):
    """A table, as text, of how alike runs came out that differ in nothing but --seed, at the scale
    to use; "" if there are none."""
    groups = {}
    for entry in entries:
        config = entry.record.get("config") or {}
        if entry.direction is not None and "seed" in config:
            groups.setdefault(setting_of(entry.record, {"seed"}), {})[config["seed"]] = entry

    forms = {"scale": "{:.2f}"}
    for name, about in measures.items():
        forms[name] = about["form"]
    lines = []
    for group in groups.values():
        if len(group) > 1:
            members = list(group.values())
            others = np.triu_indices(len(members), 1)
            cosine = cosines(members)[others]
            line = [members[0].facts["dataset"], str(len(members))]
            line.append(f"{cosine.mean():.3f} ({cosine.min():.3f})")
            for name, form in forms.items():
                line.append(spread(members, name, form))
            line.append(members[0].facts["run"])
            lines.append(line)
    if not lines:
        return ""
    heads = ["dataset", "seeds", "cosine (lowest)", *forms, "first run"]
    about = "Mean +- standard deviation over runs that differ in their seed."
    return "\n".join([about, *aligned([heads, *sorted(lines)])])


def spread(entries, measure, form):
    """Mean +- standard deviation of a measure over some runs, as text."""
    numbers = []
    for entry in entries:
        number = number_at(entry.result, condition_to_use(entry.result), measure)
        if number is not None:
            numbers.append(number)
    if not numbers:
        return "-"
    text = form.format(np.mean(numbers))
    if len(numbers) > 1:
        text += f" +- {np.std(numbers, ddof=1):.3f}"
    return text


def print_table(rows):
    """The table a sweep ends with; held-out NLL once evaluated, validation NLL before."""
    forms = {
        "rows": "{:,.0f}",
        "tokens": "{:,.0f}",
        "steps": "{:,.0f}",
        "seconds": "{:,.0f}",
        "best_val": "{:.4f}",
        "heldout_nll": "{:.4f}",
        "norm": "{:.2f}",
    }
    table = [["dataset", *forms, "flags"]]
    datasets = [row["dataset"] for row in rows]
    for row in rows:
        name = str(row["dataset"])
        if datasets.count(name) > 1:
            name = row["run"]
        numbers = [text_of(row[key], form) for key, form in forms.items()]
        table.append([name, *numbers, row["flags"]])
    print("\n".join(aligned(table, left=(0, len(table[0]) - 1))))
