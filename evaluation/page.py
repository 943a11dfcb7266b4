"""report.html: all runs of a report on one page, which needs no network, server or framework.

page.html has the layout, page.js what is done with it; the data is put between, a block for each
run that is read when the run is opened. Texts are data there and never markup.
"""

import base64
import contextlib
import hashlib
import json
import math
from pathlib import Path

import numpy as np

from evaluation.plots import NAMES
from evaluation.summary import FORMAT_VERSION, tables_text
from steering.files import read_json, write_atomically

HERE = Path(__file__).parent
POINTS = 150  # of a loss curve, at most
COLUMNS = (  # key of a report's row; what is above it, digits (None: text), and what it means
    ("dataset", "run", None, "the persona, and the run where there are several of it"),
    ("flags", "flags", None, "what may be wrong with it; those that all runs have are left out"),
    ("model", "model", None, ""), ("layer", "layer", 0, "the vector is added to its output"),
    ("rows", "rows", 0, "that were trained on"),
    ("vanilla", "vanilla", 3, "NLL a token of the plain model"),
    ("prompted", "prompted", 3, "NLL under the persona's system prompt"),
    ("few_shot", "few-shot", 3, "NLL with three examples in the prompt"),
    ("mean_difference", "mean diff", 3, "NLL under the vector that no training made"),
    ("steered", "steered x1", 3, "NLL under the vector as it was trained"),
    ("minus_vanilla", "steered - vanilla", 3, "below 0: better than the plain model"),
    ("recovered", "recovered", 2, "(vanilla - steered) / (vanilla - prompted); large where the "
     "prompt hardly helps"),
    ("scale", "scale", 2, "the recommended one: probe, judge and KL are there"),
    ("probe", "probe", 2, "persona of the answers, 0 to 1"),
    ("judge", "judge", 2, "persona by the first judge that gave scores"),
    ("kl", "KL", 2, "KL(vanilla || steered) on plain rows, nats a token: what else it changes"),
    ("repeated", "repeated", 2, "share of 4-word or 24-character sequences that came before"),
    ("norm_ratio", "norm", 2, "of the vector, in median norms of the residual stream"),
)  # fmt: skip
LOW_IS_GOOD = "vanilla", "prompted", "few_shot", "mean_difference", "steered", "minus_vanilla", "kl"


def block(name, data):
    """A data block of the page. "<" is escaped, so that no text in it can end the block."""
    text = json.dumps(plain_numbers(data), separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def index_row(number, row, title):
    """A run as the table has it; row: of `report_row`; title: what to call it."""
    cells = {key: row.get(key) for key, *_ in COLUMNS}
    cells |= {"model": Path(str(row["model"])).name, "dataset": title}
    bounds = {
        key: [row[f"{key}_low"], row[f"{key}_high"]]
        for key in ("minus_vanilla", "recovered")
        if row[f"{key}_low"] is not None
    }
    flags = row["flags"].split("; ") if row["flags"] else []
    search = " ".join(map(str, (row["dataset"], row["model"], row["run"], row["flags"])))
    return {
        "number": number, "cells": cells, "bounds": bounds, "flags": flags, "folder": row["run"],
        "search": search.lower(),
    }  # fmt: skip


def plain_numbers(data):
    """The data with as many digits as a page shows, and None for NaN, which JSON does not have."""
    if isinstance(data, float):
        return float(f"{data:.5g}") if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: plain_numbers(value) for key, value in data.items()}
    return [plain_numbers(value) for value in data] if isinstance(data, list | tuple) else data


def curve(path, key):
    """[[step, value], ...] of a run's metrics.jsonl, of which every so many are left out."""
    points = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn, as a run was killed
            row = json.loads(line)
            points.append([row["step"], row[key]])
    step = len(points) // POINTS + 1
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])


def run_data(folder):
    """All that the page shows of one run, as a JSON-able dict; of an evaluation by another version
    nothing but the training."""
    result, metrics = read_json(folder / "eval.json"), folder / "metrics.jsonl"
    data = {"loss": curve(metrics, "loss"), "val": curve(metrics, "val_loss")}
    data |= {"nll": [], "scales": [], "before": [], "turns": [], "samples": [], "identity": []}
    data |= {"recommended": None, "tables": None}
    if not result:
        return data
    if result.get("config", {}).get("format_version") != FORMAT_VERSION:
        return data | {"tables": f"{folder / 'eval.json'} is of another version: evaluate it anew"}
    data["recommended"] = result["recommended"]["scale"]
    for name, row in result["likelihood"].items():
        data["nll"].append([NAMES.get(name, name), row["nll"], *(row["interval"] or [])])
    for name, row in result["answers"].items():
        persona = row["persona"] or {"mean": None, "interval": None}
        if not name.startswith("steered x"):
            data["before"].append(name)
            continue
        scale, effect = float(name.removeprefix("steered x")), result["side_effects"].get(name)
        data["scales"].append({
            "name": name, "scale": scale, "persona": persona["mean"],
            "interval": persona["interval"], "kl": effect and effect["mean"],
        })  # fmt: skip
    data["scales"].sort(key=lambda one: one["scale"])
    for name, talk in result.get("conversation", {}).items():
        means = talk["persona"]["by_turn"] if talk["persona"] else []
        data["turns"].append({"name": name, "points": [[i, m] for i, m in enumerate(means, 1)]})
    data |= {key: result[key] for key in ("samples", "identity")}
    return data | {"tables": tables_text(result) if "flags" in result else None}


def heat_map(title, note, names, matrix):
    """A heat map as the page draws it: a byte for each number, 0 the lowest and 255 the highest."""
    matrix = np.nan_to_num(matrix, nan=np.nanmin(matrix))
    low, high = float(matrix.min()), float(matrix.max())
    share = (matrix - low) / ((high - low) or 1.0)
    cells = base64.b64encode(np.round(255 * share).astype(np.uint8).tobytes()).decode()
    return {
        "title": title, "note": note, "names": names, "cells": cells, "low": low, "high": high,
    }  # fmt: skip


def write_page(path, rows, titles, heat):
    """Write report.html of the rows of a report, in their order; returns [its name].
    titles: what to call each; heat: of `heat_map`."""
    index = [index_row(i, *about) for i, about in enumerate(zip(rows, titles, strict=True))]
    columns, same = [], []
    for key, head, digits, about in COLUMNS:
        values = {row["cells"][key] for row in index}
        if key in ("model", "layer") and len(values) == 1:
            same.append(f"{head} {values.pop()}")
        else:
            column = {"key": key, "head": head, "digits": digits, "about": about}
            columns.append(column | {"up": digits is None or key in LOW_IS_GOOD})
    data = {"columns": columns, "rows": index, "heat": heat, "same": ", ".join(same)}
    blocks = [block("index", data)]
    for number, row in enumerate(rows):
        blocks.append(block(f"run-{number}", run_data(Path(row["run"]))))
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = (HERE / "page.html").read_text().replace("@POLICY@", policy)
    before, rest = text.split("@DATA@")
    between, after = rest.split("@SCRIPT@")
    write_atomically(path, "".join([before, *blocks, between, script, after]).encode())
    return [path.name]
