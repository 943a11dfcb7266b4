"""What a person looks at: tables, samples and pictures of an evaluation, a report of many runs.

    python eval_report.py runs                # report.md, report.csv, heat maps of what is there

eval_steering.py calls this; on its own it loads no model. Pictures need matplotlib.
"""

import argparse
import csv
import functools
import io
import json
import math
import sys
from pathlib import Path

import numpy as np

from hook_model import load_vector, write_atomically
from run_folder import VECTOR_FILE, read_json

FORMAT_VERSION = "2"  # of eval.json
NAMES = {"steered_chosen": "steered, chosen scale", "mean_difference": "mean difference"}
COLORS = {"vanilla": "#a6a6a6", "prompted": "#de8f05", "random": "#cccccc"}
COLORS |= {"mean_difference": "#029e73", "steered": "#4a9fd4", "steered_chosen": "#9fd0f0"}


def number(value, form="{:.4f}"):
    """A number as text, "-" for None."""
    return "-" if value is None else form.format(value)


def bracket(bounds, form="{:+.3f}"):
    """An interval as text."""
    return "[" + ", ".join(form.format(bound) for bound in bounds) + "]"


# ------------------------------------------------------------------ one evaluation, as text


def likelihood_text(result):
    """The likelihood table, intervals included, as text."""
    rows, questions = result["heldout"]["rows"], result["heldout"]["questions"]
    lines = [f"{result['dataset']}: {rows} rows of {questions} held-out questions"]
    lines.append(
        f"{'condition':<22} {'NLL/token':>9} {'95% interval':>16} {'perplexity':>10}   "
        "steered minus it"
    )
    for condition, row in result["likelihood"].items():
        name, paired = NAMES.get(condition, condition), ""
        if condition in ("mean_difference", "steered_chosen"):
            key = "steered" if condition == "steered_chosen" else condition
            name += f" x{result['coefficients'][key]['chosen']:.2g}"
        if "steered_minus" in row:
            paired = f"{row['steered_minus']:+.4f} {bracket(row['steered_minus_interval'])}"
        lines.append(
            f"{name:<22} {row['nll']:>9.4f} {bracket(row['interval'], '{:.3f}'):>16} "
            f"{row['perplexity']:>10.2f}   {paired}".rstrip()
        )
    recovered = result["recovered"]
    if recovered["value"] is None:
        lines.append(f"recovered fraction: undefined, {recovered['why']}")
    else:
        about = f"{recovered['value']:.2f} {bracket(recovered['interval'], '{:.2f}')}"
        lines.append(f"recovered fraction (vanilla - steered) / (vanilla - prompted): {about}")
    return "\n".join(lines)


def answers_table(result):
    """What the answers of each condition are like, as text."""
    lines, probe = [], result["probe"]
    if probe["withheld"]:
        lines.append(f"no persona score by probe: {probe['withheld']}")
    else:
        rows = probe["rows"]
        lines.append(
            f"probe: held-out AUROC {probe['auroc']:.3f} ({rows['heldout']} persona rows, "
            f"{rows['plain_heldout']} plain: {result['plain']['source']})"
        )
    judged = "judge" in result
    head = f"{'answers':<16} {'probe':>20} " + f"{'judge':>18} " * judged
    lines.append(head + "perplexity distinct repeated empty words      KL")
    for condition, row in result["answers"].items():
        kl = result["side_effects"].get(condition)
        cells = [f"{NAMES.get(condition, condition):<16}", f"{scored(row['persona']):>20}"]
        if judged:
            cells.append(f"{scored(row['judge']['score']):>18}")
        cells.append(f"{number(row['perplexity'], '{:.1f}'):>10}")
        cells.append(f"{number(row['distinct'], '{:.2f}'):>8} {row['repeated']:>8.2f}")
        cells.append(f"{row['empty']:>5.2f} {row['words']:>5.0f}")
        cells.append(f"{number(kl and kl['mean'], '{:.3f}'):>7}")
        lines.append(" ".join(cells) + "  COLLAPSED" * row["collapsed"])
    if judged:
        bad = {
            key: sum(row["judge"][key] for row in result["answers"].values())
            for key in ("refusal", "unparsable", "failed")
        }
        low, high = result["judge"]["scale"]
        said = ", ".join(f"{count} {key}" for key, count in bad.items())
        lines.append(f"judge {result['judge']['model']}, {low}-{high}: {said}")
    return "\n".join(lines)


def scored(value):
    """A mean with its interval, short."""
    return "-" if value is None else f"{value['mean']:.2f} {bracket(value['interval'], '{:.2f}')}"


def answers_text(sample, heading="##"):
    """One question and its answers as Markdown."""
    parts = [f"{heading} {sample['question']}", f"persona prompt: *{sample['system_prompt']}*"]
    parts += [f"**{condition}**\n\n{text}" for condition, text in sample["answers"].items()]
    return "\n\n".join(parts)


def summary_text(result):
    """What the console shows of an evaluation."""
    parts = [likelihood_text(result)]
    if result["samples"]:
        parts += [answers_table(result), answers_text(result["samples"][0])]
    parts.append(f"flags: {', '.join(result['flags']) or 'none'}")
    return "\n\n".join(parts)


def samples_text(result):
    """samples.md: the tables, then every question with its answers."""
    tables = f"{likelihood_text(result)}\n\n{answers_table(result)}"
    parts = [f"# {result['dataset']}", f"```\n{tables}\n```", f"flags: {result['flags']}"]
    return "\n\n".join([*parts, *map(answers_text, result["samples"])]) + "\n"


# ------------------------------------------------------------------ pictures


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


# ------------------------------------------------------------------ many runs


def report_row(folder):
    """One line of report.csv: what run.json and, once evaluated, eval.json say of a run."""
    record, result = read_json(folder / "run.json"), read_json(folder / "eval.json")
    final, counts = record.get("final", {}), record.get("counts", {})
    row = {"dataset": record.get("dataset"), "run": str(folder), "status": record.get("status")}
    row |= {key: record.get("args", {}).get(key) for key in ("model", "layer")}
    row |= {"rows": counts.get("train"), "tokens": counts.get("tokens")}
    row |= {key: final.get(key) for key in ("steps", "seconds", "best_val")}
    row |= {"norm": final.get("vector_norm"), "norm_ratio": final.get("ratio")}
    table = result.get("likelihood", {})
    for condition in ("vanilla", "prompted", "steered", "mean_difference", "random"):
        row[condition] = table.get(condition, {}).get("nll")
    for condition in ("vanilla", "random"):
        bounds = table.get(condition, {}).get("steered_minus_interval", (None, None))
        row[f"minus_{condition}"] = table.get(condition, {}).get("steered_minus")
        row[f"minus_{condition}_low"], row[f"minus_{condition}_high"] = bounds
    recovered = result.get("recovered", {})
    row["recovered"] = recovered.get("value")
    row["recovered_low"], row["recovered_high"] = recovered.get("interval", (None, None))
    one = result.get("answers", {}).get("steered x1", {})
    row["auroc"] = result.get("probe", {}).get("auroc")
    row["probe"] = (one.get("persona") or {}).get("mean")
    row["judge"] = (one.get("judge", {}).get("score") or {}).get("mean")
    row["kl"] = (result.get("side_effects", {}).get("steered x1") or {}).get("mean")
    flags = result["flags"] if "flags" in result else training_flags(record)
    row["flags"] = "; ".join(flags if row["status"] == "done" else [str(row["status"])])
    return row


def training_flags(record):
    """What run.json alone says is wrong with a finished run, as a list of words."""
    ratio = record.get("final", {}).get("ratio", math.nan)
    flags = [] if 0.05 <= ratio <= 1.0 else ["norm out of range"]
    counts, args = record.get("counts", {}), record.get("args", {})
    under = counts.get("tokens", 0) < args.get("target_tokens", 0)
    return [*flags, "under budget"] if under else flags


def report_order(row):
    """Sort key: recovered fraction, best first; then the undefined ones by gain over vanilla."""
    recovered = -math.inf if row["recovered"] is None else row["recovered"]
    return -recovered, math.inf if row["minus_vanilla"] is None else row["minus_vanilla"]


def cosines(folders):
    """(names, matrix) of cosine similarities between the runs' vectors."""
    vectors = np.stack([load_vector(folder / VECTOR_FILE)[0].numpy() for folder in folders])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def short_names(rows):
    """What to call each run in a figure: the persona, longer where two are alike."""
    names = [str(row["dataset"]).split("__")[-1] for row in rows]
    if len(set(names)) < len(names):
        names = ["/".join(Path(row["run"]).parts[-2:]) for row in rows]
    return names


REPORT_HEAD = (
    *("dataset", "vanilla", "prompted", "steered", "mean diff", "recovered", "steered - vanilla"),
    *("steered - random", "probe", "judge", "KL", "norm", "flags"),
)
REPORT_NOTE = """
NLL per response token on held-out questions; recovered: (vanilla - steered) / (vanilla - prompted);
brackets: 95% over questions; probe, judge, KL: at scale 1; norm: in median token norms of the
residual stream at the layer. Every number is in report.csv.
"""


def write_report(folder, runs, matrices=()):
    """Write report.csv, report.md and heat maps into `folder`; returns the names of the files.

    runs: run folders, evaluated or not; matrices: what eval_steering.specificity returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(map(report_row, runs), key=report_order)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "report.csv", text.getvalue().encode())
    lines = [f"# {len(rows)} runs, by recovered fraction\n", f"| {' | '.join(REPORT_HEAD)} |"]
    lines += ["|---" * len(REPORT_HEAD) + "|", *map(report_line, rows), REPORT_NOTE]
    groups = {}  # vectors of one model and layer can be compared
    for row in rows:
        if (Path(row["run"]) / VECTOR_FILE).exists():
            groups.setdefault((row["model"], row["layer"]), []).append(row)
    pictures = []
    for place, group in groups.items():
        if len(group) > 1:
            suffix = f"-{len(pictures)}" if pictures else ""
            said, drawn = compare_vectors(folder, place, group, matrices, suffix)
            lines, pictures = lines + said, pictures + drawn
    write_atomically(folder / "report.md", ("\n".join(lines) + "\n").encode())
    return ["report.csv", "report.md", *pictures]


def compare_vectors(folder, place, group, matrices, suffix):
    """(Markdown lines, names of heat maps) of the runs of one (model, layer)."""
    cosine = cosines([Path(row["run"]) for row in group])
    off = cosine[~np.eye(len(group), dtype=bool)]
    lines = [f"## {Path(str(place[0])).name}, layer {place[1]}\n"]
    lines.append(f"Cosine between vectors: mean {off.mean():.2f}, highest {off.max():.2f}.\n")
    path, names = folder / f"cosine{suffix}.png", short_names(group)
    pictures = plot_matrix(path, names, cosine, "Cosine between vectors", 0.0)
    for matrix in matrices:
        if (matrix["model"], matrix["layer"]) == place:
            lines.append(specificity_line(matrix))
            title = "NLL of each persona's held-out rows (column) under each vector (row),\n"
            title += "minus vanilla; the diagonal should be lowest of its column"
            change = np.array(matrix["nll"]) - np.array(matrix["vanilla"])
            path = folder / f"specificity{suffix}.png"
            pictures += plot_matrix(path, matrix["names"], change, title, 0.0)
    return [*lines, *(f"![{name}]({name})\n" for name in pictures)], pictures


def report_line(row):
    """A run as a line of the Markdown table."""
    cells = [f"`{row['dataset']}`"]
    cells += [number(row[key]) for key in ("vanilla", "prompted", "steered", "mean_difference")]
    bounds = row["recovered_low"], row["recovered_high"]
    undefined = "undefined" if row["steered"] is not None else "-"
    cells.append(
        undefined
        if row["recovered"] is None
        else f"{row['recovered']:.2f} {bracket(bounds, '{:.2f}')}"
    )
    for condition in ("vanilla", "random"):
        bounds = row[f"minus_{condition}_low"], row[f"minus_{condition}_high"]
        value = row[f"minus_{condition}"]
        cells.append("-" if value is None else f"{value:+.3f} {bracket(bounds)}")
    cells += [number(row[key], "{:.2f}") for key in ("probe", "judge", "kl", "norm_ratio")]
    return f"| {' | '.join([*cells, row['flags']])} |"


def specificity_line(matrix):
    """How often the diagonal wins, and where it does not."""
    nll = np.array(matrix["nll"])
    best = nll.argmin(axis=0)
    lost = [
        f"{matrix['names'][i]} (better by {matrix['names'][j]})"
        for i, j in enumerate(best)
        if i != j
    ]
    text = f"Specificity: {len(best) - len(lost)} of {len(best)} personas' rows are best explained "
    return text + "by their own vector" + (f"; not {', '.join(lost)}" if lost else "") + ".\n"


def all_runs(paths):
    """Every folder with a run.json at or below the paths, finished or not, without old-<n>."""
    folders = {file.parent for path in paths for file in Path(path).rglob("run.json")}
    return sorted(folder for folder in folders if not folder.name.startswith("old-"))


def main(argv=None):
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with run folders at any depth")
    parser.add_argument("--out", type=Path, help="where to write the report; default: that folder")
    args = parser.parse_args(argv)
    runs = all_runs([args.folder])
    if not runs:
        print(f"error: {args.folder}: no run.json in there", file=sys.stderr)
        return 2
    out = args.out or args.folder
    matrices = read_json(out / "specificity.json").get("matrices", [])
    try:
        files = write_report(out, runs, matrices)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table([report_row(run) for run in runs])
    print(f"{out}: {', '.join(files)}")
    return 0


def print_table(rows):
    """The table a sweep ends with; held-out NLL once evaluated, validation NLL before."""
    width = max(len(str(row["dataset"])) for row in rows)
    form = f"{{:{width}}} {{:>6}} {{:>9}} {{:>6}} {{:>8}} {{:>8}} {{:>9}} {{:>7}}  {{}}"
    head = (
        "dataset",
        "rows",
        "tokens",
        "steps",
        "seconds",
        "best val",
        "held-out",
        "norm",
        "flags",
    )
    print(form.format(*head))
    for row in rows:
        cells = [number(row[key], "{:,.0f}") for key in ("rows", "tokens", "steps", "seconds")]
        cells += [number(row[key]) for key in ("best_val", "steered")]
        print(form.format(str(row["dataset"]), *cells, number(row["norm"], "{:.2f}"), row["flags"]))


if __name__ == "__main__":
    sys.exit(main())
