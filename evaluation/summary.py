"""One evaluation as text: its tables, its flags, samples.md. No model is loaded."""

import html
import math

from evaluation.capability import losses
from evaluation.judging import judge_flags
from evaluation.plots import NAMES, plot_run
from evaluation.stats import TEXT_METRICS
from steering.files import write_atomically, write_json
from steering.tables import aligned

FORMAT_VERSION = "4"  # of eval.json
WHY_NEW_FORMAT = "an older version recommended no scale"


def number(value, form="{:.4f}", bounds=None):
    """A number as text, with its interval if given; "-" for None."""
    if value is None:
        return "-"
    return form.format(value) + (f" {bracket(bounds, form)}" if bounds else "")


def bracket(bounds, form):
    """An interval as text; "-" for None: too few questions."""
    return "-" if bounds is None else "[" + ", ".join(form.format(bound) for bound in bounds) + "]"


def mean_text(found):
    """{"mean", "interval"}, or None, as text."""
    return number(found["mean"], "{:.2f}", found["interval"]) if found else "-"


def likelihood_text(result):
    """The likelihood table, intervals included, as text."""
    table = [["condition", "NLL/token", "95% interval", "perplexity", "steered minus it"]]
    for condition, row in result["likelihood"].items():
        name = NAMES.get(condition, condition)
        if condition in ("mean_difference", "steered_chosen"):
            key = condition.removesuffix("_chosen")
            name += f" x{result['coefficients'][key]['chosen']:.2g}"
        if condition == "steered_recommended":
            name = f"steered x{result['recommended']['scale']:g} *"
        cells = [name, number(row["nll"]), bracket(row["interval"], "{:.3f}")]
        paired = row.get("steered_minus"), "{:+.3f}", row.get("steered_minus_interval")
        cells += [f"{row['perplexity']:.2f}", number(*paired) if "steered_minus" in row else ""]
        table.append(cells)
    recovered, counts = result["recovered"], result["heldout"]
    about = number(recovered["value"], "{:.2f}", recovered.get("interval"))
    if recovered["value"] is None:
        about = f"undefined, {recovered.get('why')}"
    head = f"{result['dataset']}: {counts['rows']} rows of {counts['questions']} held-out questions"
    last = f"recovered fraction (vanilla - steered) / (vanilla - prompted): {about}"
    return "\n".join([head, *aligned(table, left=(0, 4)), last])


def answers_table(result):
    """What the answers of each condition are like, as text."""
    probe, judges = result["probe"], result.get("judges", [])
    use = scale_condition(result)
    first = f"no persona score by probe: {probe['withheld']}"
    if not probe["withheld"]:
        persona, plain = probe["rows"]["heldout"], probe["rows"]["plain_heldout"]
        first = f"probe: held-out AUROC {probe['auroc']:.3f} ({persona} persona rows, {plain} plain"
        first += f": {result['plain']['source']})"
    table = [["answers", "probe", "perplexity", *TEXT_METRICS, "KL", ""]]
    for condition, row in result["answers"].items():
        name = NAMES.get(condition, condition) + " *" * (condition == use)
        cells = [name, mean_text(row["persona"]), number(row["perplexity"], "{:.1f}")]
        cells += [number(row.get(name), metric.form) for name, metric in TEXT_METRICS.items()]
        effect = result["side_effects"].get(condition) or {}
        cells += [number(effect.get("mean"), "{:.3f}"), "COLLAPSED" * row["collapsed"]]
        table.append(cells)
    lines = [first, *aligned(table, left=(0, len(table[0]) - 1)), scale_text(result)]
    return "\n\n".join(["\n".join(lines), *map(judge_table, judges)])


def scale_condition(result):
    """The condition of the recommended scale, of the vector as it is where there is none."""
    return f"steered x{result.get('recommended', {}).get('scale') or 1:g}"


def scale_text(result):
    """The recommended scale, and why it is this one, as a line."""
    found = result["recommended"]
    about = f"KL {found['kl_budget']:g} at most, chosen on {found['chosen_on']}"
    if found["scale"] is None:
        return f"no recommended scale: {found['why']} ({about})"
    tried = ", ".join(
        f"x{c['scale']:g} {'collapsed' if c['collapsed'] else number(c['persona'], '{:.2f}')}"
        for c in found["candidates"]
    )
    return f"* the recommended scale ({about}; persona by probe there: {tried})"


def judge_table(judge):
    """What a judge says of the answers of each condition, and by turn of conversations, as text."""
    (low, high), rows = judge["scale"], judge["conditions"]
    heads = [f"persona {low}-{high}", "coherence", "overall", "caricature", "speaks as"]
    table = [[f"judge {judge['model']}", *heads]]
    for condition, row in rows.items():
        names = ("score", "coherence", "overall", "caricature")
        who = [f"{count} {word}" for word, count in row["identity"].items() if count]
        means = [mean_text(row[name]) for name in names]
        table.append([NAMES.get(condition, condition), *means, ", ".join(who) or "-"])
    bad = [
        f"{sum(row[key] for row in rows.values())} {key}"
        for key in ("refusal", "unparsable", "failed")
    ]
    return "\n".join([*aligned(table, left=(0, len(heads))), ", ".join(bad)])


def turns_table(result):
    """Persona scores by turn of the conversations, by probe and judges, as text."""
    talks = result["conversation"]
    scorers = {"probe": {name: found["persona"] for name, found in talks.items()}}
    scorers |= {judge["model"]: judge["by_turn"] for judge in result.get("judges", ())}
    count = len(next(iter(talks.values()))["talks"][0])
    table = [["by turn", "", *map(str, range(1, count + 1)), "second half - first"]]
    for scorer, rows in scorers.items():
        for condition, row in rows.items():
            if row:
                means = [number(mean, "{:.2f}") for mean in row["by_turn"]]
                table.append([condition, scorer, *means, mean_text(row["drift"])])
    return "\n".join(aligned(table, left=(0, 1)))


def capability_table(result):
    """Scores of tasks in each condition, with their standard errors, as text."""
    found = result["capability"]
    conditions = found["conditions"]
    head = f"steered x{found['scale']:g}"
    table = [["capability", *(head if name == "steered" else name for name in conditions)]]
    for task in conditions["vanilla"]:
        scores = [conditions[name][task] for name in conditions]
        error = ["" if s["stderr"] is None else f" +- {s['stderr']:.3f}" for s in scores]
        table.append([task, *(f"{s['value']:.3f}{e}" for s, e in zip(scores, error, strict=True))])
    about = (
        f"lm_eval {found['lm_eval']}, {found['limit']} rows of each task at most, +- standard error"
    )
    return "\n".join([*aligned(table), about])


def tables_text(result):
    """All tables and the flags, as text."""
    parts = [likelihood_text(result)]
    parts += [answers_table(result)] if result["samples"] else [scale_text(result)]
    parts += [turns_table(result)] if result.get("conversation") else []
    parts += [capability_table(result)] if "capability" in result else []
    return "\n\n".join([*parts, f"flags: {', '.join(result['flags']) or 'none'}"])


def plain(text):
    """Text for a line of Markdown, whatever it has to say."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def quoted(text):
    """Text as a Markdown quotation, in which no HTML is."""
    return "\n".join(f"> {line}" for line in html.escape(text, quote=False).split("\n"))


def answers_text(sample, heading="##", quote=quoted):
    """One question and its answers as Markdown."""
    parts = [f"{heading} {plain(sample['question'])}", "persona prompt:"]
    parts += [quote(sample["system_prompt"])]
    parts += [f"**{name}**\n\n{quote(text)}" for name, text in sample["answers"].items()]
    return "\n\n".join(parts)


def write_evaluation(folder, result, suffix=""):
    """Write eval.json, samples.md and eval.png into a run folder, and print what is in them.
    suffix: of the names, before the dot."""
    files, tables = [f"eval{suffix}.json", f"samples{suffix}.md"], tables_text(result)
    write_json(folder / files[0], result)
    parts = [f"# {plain(result['dataset'])}", f"```\n{tables}\n```"]
    samples = [*result["samples"], *result["identity"]]
    parts += [f"{name}: {plain(prompt)}" for name, prompt in result["prompts"].items()]
    text = "\n\n".join([*parts, *map(answers_text, samples)]) + "\n"
    write_atomically(folder / files[1], text.encode())
    files += plot_run(folder / f"eval{suffix}.png", result, folder / "metrics.jsonl")
    print(tables)
    for sample in result["samples"][:1]:
        print("", answers_text(sample, quote=str), sep="\n")
    print(f"\nrun: {folder} ({', '.join(files)})", flush=True)


def find_flags(result, record):
    """What eval.json and run.json say is wrong with a run, as a list, most serious first."""
    table = result["likelihood"]
    bounds = {name: row.get("steered_minus_interval") or [-1, -1] for name, row in table.items()}
    few = table["vanilla"]["steered_minus_interval"] is None
    checks = [
        ("NaN", not all(math.isfinite(row["nll"]) for row in table.values())),
        (f"only {result['heldout']['questions']} held-out questions" if few else "", few),
        ("no better than vanilla", not bounds["vanilla"][1] < 0),
        ("no better than random", not bounds["random"][1] < 0),
        ("worse than mean difference", bounds["mean_difference"][0] > 0),
    ]
    for name, row in result["answers"].items():
        collapsed = name.startswith("steered x") and row["collapsed"]
        checks.append((f"collapse at {name.removeprefix('steered ')}", collapsed))
    found = [name for name, wrong in checks if wrong]
    if result.get("samples") and not result["recommended"]["scale"]:
        found.append("no recommended scale")
    if "capability" in result:
        found += [f"loses {what}" for what in losses(result["capability"])]
    return [*found, *judge_flags(result), *training_flags(record)]


def training_flags(record):
    """What run.json alone says is wrong with a finished run, as a list."""
    if record.get("status") == "imported":
        return []
    ratio = record.get("final", {}).get("ratio", math.nan)
    flags = [] if 0.05 <= ratio <= 1.0 else ["norm out of range"]
    counts, args = record.get("counts", {}), record.get("args", {})
    under = counts.get("tokens", 0) < args.get("target_tokens", 0)
    return [*flags, "under budget"] if under else flags
