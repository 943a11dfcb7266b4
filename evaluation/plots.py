"""Pictures of an evaluation and of many runs, as PNG files; matplotlib is optional.

A function that draws returns [the file's name], or says why there is no picture and returns [].
"""

import functools
import io
import json
import sys

import numpy as np

from steering.vector_file import write_atomically

NAMES = {"steered_chosen": "steered, chosen scale", "mean_difference": "mean difference"}
COLORS = {"vanilla": "#a6a6a6", "prompted": "#de8f05", "random": "#cccccc"}
COLORS |= {"mean_difference": "#029e73", "steered": "#4a9fd4", "steered_chosen": "#9fd0f0"}


def pyplot():
    """matplotlib's pyplot, drawing to files; ImportError names the install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib (pip install matplotlib)") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure, path):
    """Write a figure as PNG by write and rename."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    write_atomically(path, data.getvalue())
    pyplot().close(figure)


def picture(draw):
    """Decorator: draw(path, ...) returns [name of the file], or says why there is no picture."""

    @functools.wraps(draw)
    def wrapped(path, *rest):
        try:
            draw(path, *rest)
        except ImportError as error:
            print(f"no {path.name}: {error}", file=sys.stderr)
            return []
        return [path.name]

    return wrapped


@picture
def plot_run(path, result, metrics_path):
    """eval.png: NLL, paired differences, loss curve; persona score, fluency, KL against scale."""
    figure, axes = pyplot().subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    figure.suptitle(f"{result['dataset']}   (flags: {', '.join(result['flags']) or 'none'})")
    plot_likelihood(axes[0, 0], axes[0, 1], result)
    plot_curve(axes[0, 2], metrics_path)
    if result["answers"]:
        plot_persona(axes[1, 0], result)
        plot_fluency(axes[1, 1], result)
    scales = [(0.0, 0.0, 0.0, 0.0)]
    for name, row in result["side_effects"].items():
        if name.startswith("steered x"):
            scales.append((float(name.removeprefix("steered x")), row["mean"], *row["interval"]))
    x, mean, low, high = np.array(sorted(scales)).T
    axes[1, 2].plot(x, mean, "o-", color=COLORS["steered"])
    axes[1, 2].fill_between(x, low, high, alpha=0.2, color=COLORS["steered"])
    axes[1, 2].set(title="Side effect on plain rows", xlabel="scale", ylabel="KL, nats a token")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def plot_likelihood(bars, paired, result):
    """Bars of NLL with intervals, and steered minus each other condition, paired."""
    table = result["likelihood"]
    names = list(table)[::-1]
    labels = [NAMES.get(name, name) for name in names]
    values = np.array([table[name]["nll"] for name in names])
    bounds = np.array([table[name]["interval"] for name in names]).T
    bars.barh(labels, values, color=[COLORS[name] for name in names])
    bars.errorbar(values, labels, xerr=abs(bounds - values), fmt="none", ecolor="k", capsize=3)
    for name, value in zip(labels, values, strict=True):
        bars.text(0.02 * values.max(), name, f"{value:.3f}", va="center", weight="bold")
    bars.set(title="NLL per response token, held-out", xlabel="nats (95% over questions)")
    others = [name for name in names if name != "steered"]
    labels = [NAMES.get(name, name) for name in others]
    values = np.array([table[name]["steered_minus"] for name in others])
    bounds = np.array([table[name]["steered_minus_interval"] for name in others]).T
    paired.errorbar(
        values, labels, xerr=abs(bounds - values), fmt="o", capsize=4, color=COLORS["steered"]
    )
    paired.axvline(0, color="k", linewidth=0.8)
    paired.set(title="Steered minus ... (below zero: steered is better)", xlabel="nats, paired")


def plot_curve(axis, metrics_path):
    """Training and validation loss over optimizer steps, from metrics.jsonl."""
    try:
        lines = metrics_path.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    rows = [json.loads(line) for line in lines]
    for key, style in (("loss", {"color": "#cccccc"}), ("val_loss", {"marker": "o"})):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    axis.set(title="Loss in training", xlabel="step", ylabel="nats a token")
    if axis.lines:
        axis.legend(frameon=False)


def by_scale(result, value):
    """(scales, values) of vanilla, as scale 0, and of each steered scale; None is left out."""
    points = []
    for condition, row in result["answers"].items():
        if condition == "vanilla" or condition.startswith("steered x"):
            scale = float(condition.removeprefix("steered x").replace("vanilla", "0"))
            if (found := value(row)) is not None:
                points.append((scale, found))
    points = sorted(points, key=lambda point: point[0])
    return [scale for scale, _ in points], [found for _, found in points]


def plot_persona(axis, result):
    """Persona score of answers against scale, by probe and by judge, between 0 and 1."""
    scorers = {}
    if not result["probe"]["withheld"]:
        scorers["probe"] = (lambda row: row["persona"], 1.0, COLORS["steered"])
    if "judge" in result:
        high = result["judge"]["scale"][1]
        scorers[f"judge / {high}"] = (lambda row: row["judge"]["score"], high, "#cc78bc")
    for name, (read, high, color) in scorers.items():
        x, values = by_scale(result, read)
        if x:
            mean = np.array([value["mean"] for value in values]) / high
            low, high_bound = np.array([value["interval"] for value in values]).T / high
            axis.plot(x, mean, "o-", label=f"steered, {name}", color=color)
            axis.fill_between(x, low, high_bound, alpha=0.2, color=color)
        for condition, style in (("prompted", "--"), ("mean_difference", ":")):
            found = read(result["answers"][condition]) if condition in result["answers"] else None
            if found:
                label = f"{NAMES.get(condition, condition)}, {name}"
                axis.axhline(found["mean"] / high, linestyle=style, color=color, label=label)
    title = "Persona score of answers (scale 0: vanilla)"
    axis.set(title=title, xlabel="scale", ylim=(-0.03, 1.03))
    if scorers:
        axis.legend(frameon=False, fontsize=8)
    else:
        axis.text(0.5, 0.5, "withheld", ha="center", transform=axis.transAxes)


def plot_fluency(axis, result):
    """Perplexity to the plain model (right), repetition and empty answers against scale."""
    for key, color in (("repeated", "#d55e00"), ("empty", "#949494"), ("distinct", "#029e73")):
        axis.plot(*by_scale(result, lambda row, key=key: row[key]), "o-", label=key, color=color)
    axis.set(title="Fluency of answers (scale 0: vanilla)", xlabel="scale", ylim=(-0.03, 1.03))
    axis.set_ylabel("share")
    right = axis.twinx()
    x, values = by_scale(result, lambda row: row["perplexity"])
    right.plot(x, values, "s--", color=COLORS["steered"], label="perplexity (right)")
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)
    handles = [*axis.lines, *right.lines]
    axis.legend(
        handles,
        [line.get_label() for line in handles],
        frameon=False,
        fontsize=8,
        loc="center left",
    )


@picture
def plot_matrix(path, names, matrix, title, center):
    """A heat map; center: the value that is white."""
    matrix, count = np.asarray(matrix), len(names)
    size = min(20.0, 3.5 + 0.6 * count)
    figure, axis = pyplot().subplots(figsize=(size + 1, size), layout="constrained")
    spread = float(np.abs(matrix - center).max()) or 1.0
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=center - spread, vmax=center + spread)
    figure.colorbar(shown, shrink=0.8)
    axis.set_title(title, fontsize=10)
    if count <= 60:
        axis.set_xticks(range(count), names, rotation=60, ha="right")
        axis.set_yticks(range(count), names)
    if count <= 20:
        for i, j in np.ndindex(matrix.shape):
            dark = abs(matrix[i, j] - center) > 0.6 * spread
            color = "white" if dark else "black"
            axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=color)
    save_picture(figure, path)
