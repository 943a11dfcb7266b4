"""The table that an evaluation is: what each measure says of each condition.

    result = {"measures": {}, "conditions": {}}
    add_column(result, Measure("questions", "answers", "{:.2f}"), {"vanilla": 0.1, "prompted": 0.4})

eval.json holds it, and every output reads it there: console, samples.md, eval.png, report.csv and
report.html know no measure and no condition by name, so that a new one shows in all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    table: which of the printed tables it is in. form: how a value is printed. unit: of a value,
    "" without one. better: "lower", "higher", or "" where neither is. about: one line for a reader.
    of_answer: for a mean over a condition's answers, the function of one: text -> a number, or None
    where the text has none.
    """

    name: str
    table: str
    form: str
    unit: str = ""
    better: str = ""
    about: str = ""
    of_answer: Callable | None = None


def add_column(result, measure, column):
    """Put a measure into an evaluation's dict, in place of what it said before.

    column: {condition: value}. A value is a number, a truth value, or {"mean", "low", "high", "n"}:
    a mean, its 95% interval (None, None if too little is known for one), and over how many
    questions. None is left out.
    """
    result["measures"][measure.name] = {
        "table": measure.table,
        "form": measure.form,
        "unit": measure.unit,
        "better": measure.better,
        "about": measure.about,
    }
    for row in result["conditions"].values():
        row.pop(measure.name, None)
    for condition, value in column.items():
        if value is not None:
            result["conditions"].setdefault(condition, {})[measure.name] = value


def drop_columns(result, table):
    """Take the measures of tables whose names begin so out of an evaluation's dict, with their
    values."""
    measures = result["measures"].items()
    stale = [name for name, about in measures if about["table"].startswith(table)]
    for name in stale:
        del result["measures"][name]
        for row in result["conditions"].values():
            row.pop(name, None)


def value_at(result, condition, measure):
    """A value of the table as it stands there, or None."""
    return result.get("conditions", {}).get(condition, {}).get(measure)


def number_of(value):
    """The number that a value of the table is, or is the mean of; None for None."""
    if isinstance(value, dict):
        return value["mean"]
    return value


def bounds_of(value):
    """[low, high] of a value that has an interval, or None."""
    if isinstance(value, dict) and value["low"] is not None:
        return [value["low"], value["high"]]
    return None


def number_at(result, condition, measure):
    """The number of a place in the table, or None."""
    return number_of(value_at(result, condition, measure))


def text_of(value, form):
    """A value as text, with its interval if it has one; "-" for None, "" for False."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    text = form.format(number_of(value))
    bounds = bounds_of(value)
    if bounds:
        low, high = (form.format(bound) for bound in bounds)
        text += f" [{low}, {high}]"
    return text


def steered_name(scale):
    """What the condition of the trained vector at a scale is called."""
    return f"steered x{scale:g}"


TRAINED = steered_name(1)  # the vector as it was trained; always among the conditions


def condition_to_use(result):
    """The condition of the recommended scale, or of the vector as it is where there is none."""
    return steered_name(result.get("recommended", {}).get("scale") or 1)
