"""report.html: all runs of a report on one page, which needs no network, server or framework.

page.html has the layout, page.js what is done with it; the data is put between, a block for each
run that is read when the run is opened. Texts are data there and never markup.
"""

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.summary import tables_text
from evaluation.table import TRAINED, bounds_of, condition_to_use, number_of
from steering.files import read_json_lines, write_atomically

HERE = Path(__file__).parent
POINTS = 150  # of a loss curve, at most


@dataclass
class Entry:
    """A run of a report: its folder, run.json, eval.json ({} if there is none), the facts that
    report.csv has of it, and its vector at length 1, (n,), None if there is none."""

    folder: Path
    record: dict
    result: dict
    facts: dict
    direction: np.ndarray | None = None


def short_float(text):
    """A number of JSON with as many digits as a page shows."""
    return float(f"{float(text):.5g}")


def block(name, data):
    """A data block of the page. NaN, which JSON does not have, becomes null; "<" is escaped, so
    that no text in it can end the block."""
    text = json.dumps(data)
    data = json.loads(text, parse_float=short_float, parse_constant=lambda constant: None)
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def cells_of(values):
    """A condition's line of the table: {measure: number, truth value or [mean, low, high]}."""
    cells = {}
    for measure, value in values.items():
        cells[measure] = number_of(value)
        bounds = bounds_of(value)
        if bounds:
            cells[measure] = [number_of(value), *bounds]
    return cells


def index_row(entry, title):
    """What the page's table has of a run: its facts, and of the conditions those without a scale,
    the vector as it was trained, and the recommended one."""
    use = condition_to_use(entry.result)
    conditions = {}
    for name, values in entry.result.get("conditions", {}).items():
        if "scale" not in values or name in (TRAINED, use):
            conditions[name] = cells_of(values)
    return {"title": title, "facts": entry.facts, "use": use, "conditions": conditions}


def curve(rows, key):
    """[[step, value], ...] of the rows of metrics.jsonl, of which every so many are left out."""
    points = [[row["step"], row[key]] for row in rows if key in row]
    return points[:: len(points) // POINTS + 1] + points[-1:]


def run_data(entry, known):
    """All that the page shows of one opened run, as a JSON-able dict; without an evaluation, how
    it was trained. known: conditions that `index_row` has, which are None here."""
    rows = read_json_lines(entry.folder / "metrics.jsonl")
    result = entry.result
    data = {"loss": curve(rows, "loss"), "validation": curve(rows, "val_loss"), "conditions": {}}
    if not result:
        return data
    for name, values in result["conditions"].items():
        data["conditions"][name] = None if name in known else cells_of(values)
    data["turns"] = {}
    for name, talk in result.get("conversation", {}).items():
        if talk["persona"]:
            data["turns"][name] = talk["persona"]["by_turn"]
    data["samples"] = result["samples"]
    data["identity"] = result["identity"]
    data["tables"] = tables_text(result)
    return data


def heat_map(title, note, names, matrix, lost=(), signed=False):
    """A heat map as the page draws it, its numbers as two bytes each.

    matrix: (N, N). lost: columns whose diagonal is marked. signed: zero is in the middle.
    """
    cells = base64.b64encode(np.asarray(matrix, "<f2").tobytes()).decode()
    return {
        "title": title,
        "note": note,
        "names": names,
        "cells": cells,
        "lost": list(lost),
        "signed": signed,
    }


def write_page(path, entries, titles, measures, comparisons):
    """Write report.html of the runs of a report, in their order.

    titles: what to call each. measures: {name: what eval.json says about it} of all runs.
    comparisons: {"heat": of `heat_map`, "seeds": text, "layers": of `compare_layers`}.
    """
    rows = list(map(index_row, entries, titles))
    blocks = [block("index", {"measures": measures, "rows": rows, **comparisons})]
    for number, entry in enumerate(entries):
        data = run_data(entry, rows[number]["conditions"])
        blocks.append(block(f"run-{number}", data))
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = (HERE / "page.html").read_text(encoding="utf-8").replace("@POLICY@", policy)
    text = text.replace("@SCRIPT@", script)
    text = text.replace("@DATA@", "".join(blocks))  # last: an answer may hold the other words
    write_atomically(path, text.encode())
