"""Pictures of an evaluation and of many runs, as PNG files; matplotlib is optional.

A function that draws returns [the file's name], or says why there is no picture and returns [].
"""

import functools
import io
import json
import sys

import numpy as np

from steering.files import write_atomically

NAMES = {"steered_chosen": "steered, lowest NLL", "mean_difference": "mean difference"}
NAMES |= {"steered_recommended": "steered, recommended", "few_shot": "few-shot"}
COLORS = {"vanilla": "#a6a6a6", "prompted": "#de8f05", "random": "#cccccc"}
COLORS |= {"mean_difference": "#029e73", "steered": "#4a9fd4", "steered_chosen": "#9fd0f0"}


def picture(draw):
    """Decorator: draw(pyplot, ...) -> figure becomes a function of (path, ...) that writes it."""

    @functools.wraps(draw)
    def wrapped(path, *rest):
        try:
            import matplotlib
        except ImportError:
            print(f"no {path.name}: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
            return []
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, data = draw(pyplot, *rest), io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
        pyplot.close(figure)
        write_atomically(path, data.getvalue())
        return [path.name]

    return wrapped


@picture
def plot_run(pyplot, result, metrics_path):
    """eval.png: NLL, paired differences, loss curve; persona score, fluency, KL against scale."""
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    figure.suptitle(f"{result['dataset']}   (flags: {', '.join(result['flags']) or 'none'})")
    plot_likelihood(axes[0, 0], axes[0, 1], result["likelihood"])
    plot_curve(axes[0, 2], metrics_path)
    if result["answers"]:
        plot_persona(axes[1, 0], result)
        plot_fluency(axes[1, 1], result["answers"])
    at_zero = {"vanilla": {"mean": 0.0, "interval": [0.0, 0.0]}}
    plot_band(axes[1, 2], at_zero | result["side_effects"], lambda row: row, COLORS["steered"])
    axes[1, 2].set(title="Side effect on plain rows", xlabel="scale", ylabel="KL, nats a token")
    for axis in axes[1] if result["recommended"]["scale"] else ():
        axis.axvline(result["recommended"]["scale"], color="k", linewidth=0.8, linestyle=":")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plot_likelihood(bars, paired, table):
    """Bars of NLL with intervals, and steered minus each other condition, paired."""
    names = list(table)[::-1]
    labels, colors = [NAMES.get(n, n) for n in names], [COLORS.get(n, "#999999") for n in names]
    bars.barh(labels, [table[name]["nll"] for name in names], color=colors)
    plot_intervals(bars, table, names, "nll", "interval", "k")
    for name, label in zip(names, labels, strict=True):
        bars.text(0.1, label, f"{table[name]['nll']:.3f}", va="center", weight="bold")
    bars.set(title="NLL per response token, held-out", xlabel="nats (95% over questions)")
    names.remove("steered")
    keys = "steered_minus", "steered_minus_interval"
    plot_intervals(paired, table, names, *keys, COLORS["steered"], fmt="o")
    paired.axvline(0, color="k", linewidth=0.8)
    paired.set(title="Steered minus ... (below zero: steered is better)", xlabel="nats, paired")


def plot_intervals(axis, table, names, value, interval, color, fmt="none"):
    """Intervals of the conditions named, one above the other; only the value where there is none"""
    values = np.array([table[name][value] for name in names])
    bounds = np.array([table[name][interval] or [table[name][value]] * 2 for name in names]).T
    labels, style = [NAMES.get(name, name) for name in names], {"capsize": 4, "color": color}
    axis.errorbar(values, labels, xerr=abs(bounds - values), fmt=fmt, **style)


def plot_curve(axis, metrics_path):
    """Training and validation loss over optimizer steps, from metrics.jsonl."""
    lines = metrics_path.read_text(encoding="utf-8").splitlines() if metrics_path.exists() else []
    rows = list(map(json.loads, lines))
    for key, style in (("loss", {"color": "#cccccc"}), ("val_loss", {"marker": "o"})):
        if points := [(row["step"], row[key]) for row in rows if key in row]:
            axis.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
            axis.legend(frameon=False)
    axis.set(title="Loss in training", xlabel="step", ylabel="nats a token")


def by_scale(rows, value):
    """(scales, values) of vanilla, as scale 0, and of each steered scale; None is left out."""
    points = []
    for condition, row in rows.items():
        if condition == "vanilla" or condition.startswith("steered x"):
            scale = float(condition.removeprefix("steered x").replace("vanilla", "0"))
            points += [] if value(row) is None else [(scale, value(row))]
    points = sorted(points, key=lambda point: point[0])
    return [scale for scale, _ in points], [found for _, found in points]


def plot_band(axis, rows, value, color, label=None, unit=1.0):
    """A line of means by scale, over `unit`, in a band of their intervals."""
    x, found = by_scale(rows, value)
    if x:
        bounds = [point["interval"] or [point["mean"]] * 2 for point in found]
        axis.plot(x, [point["mean"] / unit for point in found], "o-", label=label, color=color)
        axis.fill_between(x, *(np.array(bounds).T / unit), alpha=0.2, color=color)


def plot_persona(axis, result):
    """Persona score of answers against scale, by probe and by judge, between 0 and 1."""
    scorers, answers = {}, result["answers"]
    if not result["probe"]["withheld"]:
        scorers["probe"] = (answers, lambda row: row["persona"], 1.0, COLORS["steered"])
    for judge, color in zip(result.get("judges", ()), ("#cc78bc", "#d55e00"), strict=False):
        name, high, rows = judge["model"], judge["scale"][1], judge["conditions"]
        scorers[f"{name} / {high}"] = (rows, lambda row: row["score"], high, color)
    for name, (rows, read, high, color) in scorers.items():
        plot_band(axis, rows, read, color, f"steered, {name}", high)
        for condition, style in (("prompted", "--"), ("mean_difference", ":")):
            if found := condition in rows and read(rows[condition]):
                label = f"{NAMES.get(condition, condition)}, {name}"
                axis.axhline(found["mean"] / high, linestyle=style, color=color, label=label)
        axis.legend(frameon=False, fontsize=8)
    title = "Persona score of answers (scale 0: vanilla)"
    axis.set(title=title, xlabel="scale" if scorers else "withheld", ylim=(-0.03, 1.03))


def plot_fluency(axis, rows):
    """Perplexity to the plain model (right), repetition and empty answers against scale."""
    for key, color in (("repeated", "#d55e00"), ("empty", "#949494"), ("distinct", "#029e73")):
        axis.plot(*by_scale(rows, lambda row, key=key: row[key]), "o-", label=key, color=color)
    title = "Fluency of answers (scale 0: vanilla)"
    axis.set(title=title, xlabel="scale", ylabel="share", ylim=(-0.03, 1.03))
    axis.legend(frameon=False, fontsize=8, loc="center left")
    right, points = axis.twinx(), by_scale(rows, lambda row: row["perplexity"])
    right.plot(*points, "s--", color=COLORS["steered"])
    right.set(ylabel="perplexity, dashed")
    right.set_ylim(bottom=0)


@picture
def plot_matrix(pyplot, names, matrix, title):
    """A heat map in which zero is white."""
    matrix, count = np.asarray(matrix), len(names)
    size = min(20.0, 3.5 + 0.6 * count)
    figure, axis = pyplot.subplots(figsize=(size + 1, size), layout="constrained")
    spread = float(np.abs(matrix).max()) or 1.0
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-spread, vmax=spread)
    figure.colorbar(shown, shrink=0.8)
    axis.set_title(title, fontsize=10)
    if count <= 60:
        axis.set_xticks(range(count), names, rotation=60, ha="right")
        axis.set_yticks(range(count), names)
    if count <= 20:
        for i, j in np.ndindex(matrix.shape):
            color = "white" if abs(matrix[i, j]) > 0.6 * spread else "black"
            axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=color)
    return figure
