"""Which layer to steer at: runs of the same personas at several layers, at equal side effects.

    for found in compare_layers(entries):
        print(found["text"])

A vector that does more also changes more of everything else, so layers are compared at the scale
where each run's vector spends the whole KL budget. The best one is chosen by answers to the
questions to choose by; what is said of it is of held-out ones.
"""

import json

import numpy as np

from evaluation.scale import NEAR
from evaluation.stats import ratio
from evaluation.table import number_at, steered_name
from steering.tables import aligned

PERSONAS = 4  # differences between layers have an interval from so many on
GRID = 13  # points of a curve
MEANS = {  # columns of the table, and how they are printed
    "chosen_on": "{:.3f}",
    "persona": "{:.3f}",
    "kl": "{:.2f}",
    "kl_p95": "{:.2f}",
    "nll_gain": "{:+.3f}",
    "repeated": "{:.2f}",
    "won": "{:.0%}",
}
# What runs may differ in that are compared; all other settings are the same.
OF_A_RUN = {"layer", "name", "data", "seed"}
OF_AN_EVALUATION = {"vector", "run", "data", "plain"}


def compare_layers(entries):
    """[{"title", "text", "lines"}] of the report's Entries: for all runs of a setting that are at
    several layers, a table, and curves of persona against KL as the page draws them."""
    groups = {}
    for entry in entries:
        # An imported vector, such as a blend, is of no setting.
        if entry.result.get("recommended") and entry.record.get("status") == "done":
            setting = (
                setting_of(entry.record, OF_A_RUN),
                setting_of(entry.result, OF_AN_EVALUATION),
            )
            groups.setdefault(setting, []).append(entry)
    several = []
    for group in groups.values():
        if len({entry.facts["layer"] for entry in group}) > 1:
            several.append(comparison(group))
    return several


def setting_of(made, differs):
    """The "config" of a run.json or an eval.json, without what may differ, as a text."""
    config = made.get("config") or {}
    left = {key: value for key, value in config.items() if key not in differs}
    return json.dumps(left, sort_keys=True)


def comparison(entries):
    """{"title", "text", "lines"} of runs of a setting at several layers."""
    result = entries[0].result
    config = result.get("config") or {}
    title = f"Layers of {entries[0].facts['model']}"
    probe_layer = config.get("probe_layer")
    if probe_layer is None:
        text = "Each run has a probe of its own layer: --probe-layer K makes them comparable."
        return {"title": title, "text": text, "lines": []}

    found = {}  # {layer: {(dataset, seed): numbers}}
    for entry in sorted(entries, key=lambda entry: entry.facts["layer"]):
        here = found.setdefault(entry.facts["layer"], {})
        numbers = numbers_of(entry)
        if numbers:
            here[entry.facts["dataset"], entry.record["config"].get("seed")] = numbers
    shared = sorted(set.intersection(*map(set, found.values())))
    datasets = [dataset for dataset, _ in shared]
    others = sorted({entry.facts["dataset"] for entry in entries} - {*datasets})
    left_out = ""
    if others:
        left_out = (
            f"Left out ({len(others)}), such as {others[0]}: at some layer without an evaluated "
            "run, or with a vector that does not spend the budget."
        )
    if not shared:
        return {"title": title, "text": left_out, "lines": []}

    numbers = {layer: [here[key] for key in shared] for layer, here in found.items()}
    about = f"persona by probe at layer {probe_layer}, KL budget {config['kl_budget']:g}"
    text = table_of(numbers, datasets, about, result["recommended"]["chosen_on"])
    lines = [[str(layer), curve_of(each, config["kl_budget"])] for layer, each in numbers.items()]
    title += f", {len({*datasets})} personas"
    return {"title": title, "text": f"{text}\n{left_out}".strip(), "lines": lines}


def numbers_of(entry):
    """What a run shows at the scale that spends its KL budget, as a dict; {} if it is not known, or
    no scale that was tried spends it."""
    result = entry.result
    recommended = result["recommended"]
    largest = recommended.get("largest")
    spent = NEAR * result["config"]["kl_budget"]
    chosen = [
        found
        for found in recommended["candidates"]
        if found["scale"] == largest and found["kl"] >= spent
    ]
    if not chosen:
        return {}
    condition = steered_name(largest)
    nll = [number_at(result, name, "nll") for name in ("vanilla", condition)]
    numbers = {
        "vanilla": number_at(result, "vanilla", "probe"),
        "chosen_on": chosen[0]["persona"],
        "persona": number_at(result, condition, "probe"),
        "nll_gain": None if None in nll else nll[0] - nll[1],
    }
    for name in ("kl", "kl_p95", "repeated"):
        numbers[name] = number_at(result, condition, name)
    if None in numbers.values():
        return {}
    points = {0.0: numbers["vanilla"]}
    for name in result["conditions"]:
        persona = number_at(result, name, "probe")
        if (number_at(result, name, "scale") or 0) > 0 and persona is not None:
            points[number_at(result, name, "kl")] = persona
    return numbers | {"points": sorted(points.items())}


def table_of(numbers, datasets, about, chosen_on):
    """The table of layers, and how the best one differs from the others, as text.
    numbers: {layer: what each run shows, in the same order}, of these datasets; chosen_on: whose
    questions the best one is chosen by."""
    personas = {layer: [run["persona"] for run in each] for layer, each in numbers.items()}
    highest = np.max(list(personas.values()), axis=0)
    rows = [["layer", *MEANS]]
    chosen = {}
    for layer, each in numbers.items():
        row = {name: np.mean([run[name] for run in each]) for name in MEANS if name != "won"}
        row["won"] = np.mean(personas[layer] == highest)
        chosen[layer] = row["chosen_on"]
        rows.append([str(layer), *(form.format(row[name]) for name, form in MEANS.items())])

    best = max(chosen, key=chosen.get)
    lines = [f"At equal side effects: {about}; means over personas.", *aligned(rows)]
    lines.append(f"Best on {chosen_on}: layer {best}. On held-out ones, it minus")
    for layer, each in numbers.items():
        if layer != best:
            words = []
            for name in ("persona", "nll_gain"):
                pairs = zip(numbers[best], each, strict=True)
                ahead = [here[name] - there[name] for here, there in pairs]
                words.append(f"{name} {difference_text(ahead, datasets)}")
            lines.append(f"  layer {layer}: {'; '.join(words)}")
    return "\n".join(lines)


def difference_text(differences, datasets):
    """The mean of a difference with its 95% interval over personas, as text; seeds of a dataset
    count as one."""
    found = ratio(differences, [1] * len(differences), datasets, PERSONAS)
    text = f"{found['mean']:+.3f}"
    if found["low"] is None:
        return f"{text} (no interval of less than {PERSONAS} personas)"
    text += f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    if found["low"] <= 0 <= found["high"]:
        text += ", no difference"
    return text


def curve_of(runs, budget):
    """[[KL, persona], ...] of a layer: the mean over runs, between their measured points."""
    grid = np.linspace(0, budget, GRID)
    curves = [np.interp(grid, *zip(*run["points"], strict=True)) for run in runs]
    return np.stack([grid, np.mean(curves, axis=0)], axis=1).tolist()
