"""eval.png: an evaluation as one picture. matplotlib is optional."""

import io
import itertools
import math
import sys
import textwrap

from evaluation.table import bounds_of, condition_to_use, number_of
from steering.files import read_json_lines, write_atomically

COLUMNS = 5  # of panels
BLUES = ("#a6cbe8", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")  # by scale
OTHERS = "#7f7f7f #222222 #de8f05 #d9b500 #ca9161 #8c564b #c9a0a0 #e0703a #029e73 #b5b5b5 #cc78bc"


def condition_colors(result):
    """{condition: "#rrggbb"}: shades of blue for the trained vector, by scale, and a colour of its
    own for each other condition."""
    rows = result["conditions"]
    scales = sorted(row["scale"] for row in rows.values() if "scale" in row)
    others = itertools.cycle(OTHERS.split())
    colors = {}
    for condition, row in rows.items():
        if "scale" in row:
            place = scales.index(row["scale"]) / len(scales)
            colors[condition] = BLUES[int(place * len(BLUES))]
        else:
            colors[condition] = next(others)
    return colors


def column_of(result, measure):
    """{condition: value} of a measure, where it is a finite number."""
    column = {}
    for condition, row in result["conditions"].items():
        value = row.get(measure)
        if value is not None and not isinstance(value, bool) and math.isfinite(number_of(value)):
            column[condition] = value
    return column


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
    except ImportError:
        print(f"no {path.name}: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return []
    except Exception as error:
        print(f"no {path.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return []
    return [path.name]


def draw(result, steps):
    """The figure. steps: rows of metrics.jsonl."""
    from matplotlib.figure import Figure

    columns = {measure: column_of(result, measure) for measure in result["measures"]}
    shown = [measure for measure, column in columns.items() if len(column) > 1]
    rows = math.ceil((len(shown) + 1) / COLUMNS)
    height = 0.8 + 0.2 * len(result["conditions"])
    figure = Figure(figsize=(3.2 * COLUMNS, rows * height + 0.6), layout="constrained")
    flags = ", ".join(result["flags"]) or "none"
    figure.suptitle(textwrap.fill(f"{result['dataset']}   (flags: {flags})", 150))
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params(nbins=4)
    for axis in axes[len(shown) + 1 :]:
        axis.set_visible(False)

    for i, measure in enumerate(shown):
        about = result["measures"][measure]
        words = [about["unit"]]
        if about["better"]:
            words.append(f"{about['better']} is better")
        axes[i].set_title(f"{measure}\n{', '.join(filter(None, words))}")
        draw_column(axes[i], result, columns[measure], named=i % COLUMNS == 0)
    draw_losses(axes[len(shown)], steps)
    return figure


def draw_column(axis, result, column, named):
    """A dot at each mean, with a line over its interval; the scale to use has a ring around it.
    named: whether the names of the conditions are beside it."""
    names = []
    for place, (condition, color) in enumerate(condition_colors(result).items()):
        used = condition == condition_to_use(result)
        names.append(f"{condition} (recommended)" if used else condition)
        if condition in column:
            value = column[condition]
            bounds = bounds_of(value) or [number_of(value)] * 2
            axis.plot(bounds, [place, place], color=color)
            axis.plot(number_of(value), place, "o", color=color)
            if used:
                axis.plot(number_of(value), place, "o", ms=10, mfc="none", color=color)
    axis.set_yticks(range(len(names)), names if named else [])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", color="#eeeeee")


def draw_losses(axis, steps):
    """Training and validation loss over optimizer steps."""
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        there = [row for row in steps if key in row]
        losses = [row[key] for row in there]
        axis.plot([row["step"] for row in there], losses, style, ms=4, label=key)
    axis.set_title("training\nnats a token, over steps")
    axis.legend(frameon=False)
