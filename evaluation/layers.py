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
from evaluation.table import number_at, scale_of, steered_name
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

    found = {}  # {layer: {persona: [numbers of each run]}}
    for entry in sorted(entries, key=lambda entry: entry.facts["layer"]):
        personas = found.setdefault(entry.facts["layer"], {})
        numbers = numbers_of(entry)
        if numbers:
            personas.setdefault(entry.facts["dataset"], []).append(numbers)
    shared = sorted(set.intersection(*map(set, found.values())))
    others = sorted({entry.facts["dataset"] for entry in entries} - {*shared})
    left_out = ""
    if others:
        left_out = (
            f"Left out ({len(others)}), such as {others[0]}: at some layer without an evaluated "
            "run, or with a vector that does not spend the budget."
        )
    if not shared:
        return {"title": title, "text": left_out, "lines": []}

    means = {}
    for layer, personas in found.items():
        means[layer] = [mean_of(personas[name]) for name in shared]
    about = f"persona by probe at layer {probe_layer}, KL budget {config['kl_budget']:g}"
    text = table_of(means, about, result["recommended"]["chosen_on"])
    lines = [[str(layer), curve_of(means[layer], config["kl_budget"])] for layer in means]
    title += f", {len(shared)} personas"
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
        "kl": number_at(result, condition, "kl"),
        "kl_p95": number_at(result, condition, "kl_p95"),
        "nll_gain": None if None in nll else nll[0] - nll[1],
        "repeated": number_at(result, condition, "repeated"),
    }
    if None in numbers.values():
        return {}
    points = {0.0: numbers["vanilla"]}
    for name in result["conditions"]:
        persona = number_at(result, name, "probe")
        if (scale_of(result, name) or 0) > 0 and persona is not None:
            points[number_at(result, name, "kl")] = persona
    return numbers | {"points": sorted(points.items())}


def mean_of(runs):
    """The mean of the numbers of a persona's runs at a layer, which may differ in their seed; the
    points of each."""
    means = {}
    for name in runs[0]:
        if name != "points":
            means[name] = float(np.mean([run[name] for run in runs]))
    return means | {"points": [run["points"] for run in runs]}


def table_of(means, about, chosen_on):
    """The table of layers, and how the best one differs from the others, as text.
    means: {layer: numbers of each persona, in the same order}; chosen_on: whose questions the best
    one is chosen by."""
    personas = {layer: np.array([n["persona"] for n in each]) for layer, each in means.items()}
    highest = np.max(list(personas.values()), axis=0)
    rows = [["layer", *MEANS]]
    chosen = {}
    for layer, each in means.items():
        row = {
            name: np.mean([numbers[name] for numbers in each]) for name in MEANS if name != "won"
        }
        row["won"] = np.mean(personas[layer] == highest)
        chosen[layer] = row["chosen_on"]
        rows.append([str(layer), *(form.format(row[name]) for name, form in MEANS.items())])

    best = max(chosen, key=chosen.get)
    lines = [f"At equal side effects: {about}; means over personas.", *aligned(rows)]
    lines.append(f"Best on {chosen_on}: layer {best}. On held-out ones, it minus")
    for layer, each in means.items():
        if layer != best:
            words = []
            for name in ("persona", "nll_gain"):
                pairs = zip(means[best], each, strict=True)
                ahead = [here[name] - there[name] for here, there in pairs]
                words.append(f"{name} {difference_text(ahead)}")
            lines.append(f"  layer {layer}: {'; '.join(words)}")
    return "\n".join(lines)


def difference_text(differences):
    """The mean of a difference over personas, with its 95% interval, as text."""
    found = ratio(differences, [1] * len(differences), range(len(differences)), PERSONAS)
    text = f"{found['mean']:+.3f}"
    if found["low"] is None:
        return f"{text} (no interval of less than {PERSONAS} personas)"
    text += f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    if found["low"] <= 0 <= found["high"]:
        text += ", no difference"
    return text


def curve_of(each, budget):
    """[[KL, persona], ...] of a layer: the mean over personas, and over the runs of each, between
    their measured points."""
    grid = np.linspace(0, budget, GRID)
    curves = []
    for numbers in each:
        runs = [np.interp(grid, *zip(*points, strict=True)) for points in numbers["points"]]
        curves.append(np.mean(runs, axis=0))
    return np.stack([grid, np.mean(curves, axis=0)], axis=1).tolist()
