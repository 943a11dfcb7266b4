"""eval.png: an evaluation as one picture. matplotlib is optional."""

import io
import math
import sys
import textwrap

from evaluation.table import bounds_of, condition_to_use, number_of
from steering.files import read_json_lines, write_atomically

COLUMNS = 5  # of panels


def plot_run(path, result, metrics_path):
    """Write eval.png: a panel for each measure, a row for each condition; and the losses.

    Returns [the file's name], or says in a line why there is no picture and returns []: no
    evaluation fails for its picture.
    """
    try:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
            figure = draw(result, read_json_lines(metrics_path))
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=110)
        write_atomically(path, data.getvalue())
    except Exception as error:
        why = repr(error)
        if isinstance(error, ImportError):
            why = f"it needs matplotlib (pip install matplotlib): {why}"
        print(f"no {path.name}: {why}", file=sys.stderr)
        return []
    return [path.name]


def draw(result, steps):
    """The figure. steps: rows of metrics.jsonl."""
    from matplotlib.figure import Figure

    shown = [name for name in result["measures"] if len(numbers_of(result, name)) > 1]
    rows = len(shown) // COLUMNS + 1
    height = 0.8 + 0.2 * len(result["conditions"])
    size = (3.2 * COLUMNS, rows * height + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    title = f"{result['dataset']}   (ring: {condition_to_use(result)}, the one to use; flags: "
    title += f"{', '.join(result['flags']) or 'none'})"
    figure.suptitle(textwrap.fill(title, 150))

    colors = colors_of(result)
    for i, measure in enumerate(shown):
        axis = figure.add_subplot(rows, COLUMNS, i + 1)
        draw_measure(axis, result, measure, colors)
        if i % COLUMNS:
            axis.set_yticklabels([])
    axis = figure.add_subplot(rows, COLUMNS, len(shown) + 1)
    draw_losses(axis, steps)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params(axis="x", nbins=4)
    return figure


def numbers_of(result, measure):
    """{condition: value} of a measure, where it is a finite number."""
    found = {}
    for condition, row in result["conditions"].items():
        number = number_of(row.get(measure))
        if not isinstance(number, bool | None) and math.isfinite(number):
            found[condition] = row[measure]
    return found


def colors_of(result):
    """{condition: colour}: shades of blue for the trained vector, by scale."""
    from matplotlib import colormaps

    rows = result["conditions"]
    scales = sorted(row["scale"] for row in rows.values() if "scale" in row)
    colors = {}
    for i, (condition, row) in enumerate(rows.items()):
        colors[condition] = colormaps["tab20"](2 + i % 18)  # The first two are blue.
        if "scale" in row:
            rank = scales.index(row["scale"]) + 1
            shade = 0.3 + 0.7 * rank / len(scales)
            colors[condition] = colormaps["Blues"](shade)
    return colors


def draw_measure(axis, result, measure, colors):
    """A dot at each mean, with a line over its interval; the scale to use has a ring around it.
    colors: of `colors_of`."""
    found = numbers_of(result, measure)
    for place, (condition, color) in enumerate(colors.items()):
        if condition in found:
            number = number_of(found[condition])
            bounds = bounds_of(found[condition]) or [number, number]
            axis.plot(number, place, "o", color=color)
            axis.plot(bounds, [place, place], color=color)
            if condition == condition_to_use(result):
                axis.plot(number, place, "o", markersize=10, fillstyle="none", color=color)

    names = list(result["conditions"])
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", color="#eeeeee")
    about = result["measures"][measure]
    title = f"{measure}\n{about['unit']}"
    if about["better"]:
        title += f" ({about['better']} is better)"
    axis.set_title(title)


def draw_losses(axis, steps):
    """Training and validation loss over optimizer steps."""
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        rows = [row for row in steps if key in row]
        places = [row["step"] for row in rows]
        losses = [row[key] for row in rows]
        axis.plot(places, losses, style, markersize=4, label=key)
    axis.set_title("training\nnats a token, over steps")
    axis.legend(frameon=False)
