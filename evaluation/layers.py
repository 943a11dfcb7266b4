"""Which layer to steer at: runs of the same personas at several layers, at equal side effects.

    for found in compare_layers(entries):
        print(found["text"])

A vector that does more also changes more of everything else, so layers are compared at the scale
where each run's vector spends the whole KL budget. The best one is chosen by answers to the
questions to choose by; what is said of it is of held-out ones.
"""

import numpy as np

from evaluation.stats import ratio
from evaluation.table import number_at, scale_of, steered_name
from steering.tables import aligned

PERSONAS = 4  # differences between layers have an interval from so many on
GRID = 13  # points of a curve
MEANS = {  # columns of the table, and how they are printed
    "validation": "{:.3f}",
    "persona": "{:.3f}",
    "kl": "{:.2f}",
    "kl_p95": "{:.2f}",
    "nll_gain": "{:+.3f}",
    "repeated": "{:.2f}",
    "won": "{:.0%}",
}


def compare_layers(entries):
    """[{"title", "text", "lines"}] of the report's Entries: for each model that has runs of the
    same personas at several layers, a table, and curves of persona against KL as the page draws
    them."""
    models = {}
    for entry in entries:
        numbers = numbers_of(entry)
        if numbers:
            config = entry.result["config"]
            place = (entry.facts["model"], config.get("probe_layer"), config["kl_budget"])
            layers = models.setdefault(place, {})
            runs = layers.setdefault(entry.facts["layer"], {})
            runs.setdefault(entry.facts["dataset"], []).append(numbers)
    found = []
    for (model, probe_layer, budget), layers in models.items():
        shared = sorted(set.intersection(*map(set, layers.values())))
        if len(layers) < 2 or not shared:
            continue
        title = f"Layers of {model}, {len(shared)} personas"
        if probe_layer is None:
            text = "Each run has a probe of its own layer: --probe-layer K makes them comparable."
            found.append({"title": title, "text": text, "lines": []})
            continue
        means = {}
        for layer in sorted(layers):
            means[layer] = [mean_of(layers[layer][persona]) for persona in shared]
        text = table_of(means, f"persona by probe at layer {probe_layer}, KL budget {budget:g}")
        lines = [[str(layer), curve_of(means[layer], budget)] for layer in means]
        found.append({"title": title, "text": text, "lines": lines})
    return found


def numbers_of(entry):
    """What a run shows at the scale that spends its KL budget, as a dict; {} if it is not known."""
    result = entry.result
    recommended = result.get("recommended", {})
    largest = recommended.get("largest")
    condition = steered_name(largest or 0)
    chosen = [c["persona"] for c in recommended.get("candidates", []) if c["scale"] == largest]
    numbers = {
        "vanilla": number_at(result, "vanilla", "probe"),
        "validation": chosen[0] if chosen else None,
        "persona": number_at(result, condition, "probe"),
        "kl": number_at(result, condition, "kl"),
        "kl_p95": number_at(result, condition, "kl_p95"),
        "nll_gain": entry.facts["nll_gain"],
        "repeated": number_at(result, condition, "repeated"),
    }
    if None in numbers.values():
        return {}
    points = {0.0: numbers["vanilla"]}
    for name in result["conditions"]:
        persona = number_at(result, name, "probe")
        if scale_of(result, name) is not None and persona is not None:
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


def table_of(means, about):
    """The table of layers, and how the best one differs from the others, as text.
    means: {layer: numbers of each persona, in the same order}."""
    personas = {layer: np.array([n["persona"] for n in each]) for layer, each in means.items()}
    highest = np.max(list(personas.values()), axis=0)
    rows = [["layer", *MEANS]]
    validation = {}
    for layer, each in means.items():
        row = {
            name: np.mean([numbers[name] for numbers in each]) for name in MEANS if name != "won"
        }
        row["won"] = np.mean(personas[layer] == highest)
        validation[layer] = row["validation"]
        rows.append([str(layer), *(form.format(row[name]) for name, form in MEANS.items())])

    best = max(validation, key=validation.get)
    lines = [f"At equal side effects: {about}; means over personas.", *aligned(rows)]
    lines.append(f"Best on validation questions: layer {best}. Its persona on held-out ones, minus")
    for layer, others in personas.items():
        if layer != best:
            differences = personas[best] - others
            names = range(len(differences))
            found = ratio(differences, [1] * len(differences), names, PERSONAS)
            words = f"{found['mean']:+.3f}"
            if found["low"] is None:
                words += f" (no interval of less than {PERSONAS} personas)"
            else:
                words += f" [{found['low']:+.3f}, {found['high']:+.3f}]"
                if found["low"] <= 0 <= found["high"]:
                    words += ", no difference"
            lines.append(f"  that of layer {layer}: {words}")
    return "\n".join(lines)


def curve_of(each, budget):
    """[[KL, persona], ...] of a layer: the mean over runs, each between its measured points."""
    grid = np.linspace(0, budget, GRID)
    points = [found for numbers in each for found in numbers["points"]]
    curves = [np.interp(grid, *zip(*found, strict=True)) for found in points]
    return np.stack([grid, np.mean(curves, axis=0)], axis=1).tolist()
