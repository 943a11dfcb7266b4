"""One evaluation as text: its tables, its flags, samples.md. No model is loaded."""

import html
import math
import re

from evaluation.plots import plot_run
from evaluation.table import bounds_of, condition_to_use, number_at, text_of, value_at
from steering.files import write_atomically, write_json
from steering.tables import aligned


def table_text(result, table):
    """The measures of one table as columns, the conditions that have any of them as rows."""
    columns = {}
    for name, about in result["measures"].items():
        measured = any(name in row for row in result["conditions"].values())
        if about["table"] == table and measured:
            columns[name] = about["form"]
    lines = [[table, *columns]]
    for condition, row in result["conditions"].items():
        if not columns.keys() & row.keys():
            continue
        title = condition
        if condition == condition_to_use(result):
            title += " *"
        cells = [text_of(row.get(name), form) for name, form in columns.items()]
        lines.append([title, *cells])
    return "\n".join(aligned(lines))


def tables_text(result):
    """All tables of an evaluation, with what there is to say of them, and the flags, as text."""
    heldout = result["heldout"]
    about = [
        f"{result['dataset']}: {heldout['rows']} rows of {heldout['questions']} held-out questions"
    ]
    undefined = result["recovered_undefined"]
    if undefined:
        about.append(f"recovered is undefined: {undefined}")
    for condition, why in result["missing"].items():
        about.append(f"no {condition}: {why}")
    about.append(probe_text(result))
    about.append(f"* {scale_text(result)}")

    parts = ["\n".join(about)]
    for table in dict.fromkeys(measure["table"] for measure in result["measures"].values()):
        text = table_text(result, table)
        if "\n" in text:
            parts.append(text)
    if "conversation" in result:
        parts.append(turns_table(result["conversation"]))
    parts.append(f"flags: {', '.join(result['flags']) or 'none'}")
    return "\n\n".join(parts)


def probe_text(result):
    """What the persona score by probe is worth, as a line."""
    probe = result["probe"]
    if probe["withheld"]:
        return f"no persona score by probe: {probe['withheld']}"
    rows = probe["rows"]
    return (
        f"probe: held-out AUROC {probe['auroc']:.3f} ({rows['heldout']} persona rows, "
        f"{rows['plain_heldout']} plain: {result['plain']['source']})"
    )


def scale_text(result):
    """The recommended scale, and why it is this one, as a line."""
    found = result["recommended"]
    about = f"KL {found['kl_budget']:g} at most, chosen on {found['chosen_on']}"
    if found["scale"] is None:
        return f"no recommended scale: {found['why']} ({about})"
    tried = []
    for candidate in found["candidates"]:
        persona = text_of(candidate["persona"], "{:.2f}")
        said = "collapsed" if candidate["collapsed"] else persona
        tried.append(f"x{candidate['scale']:g} {said}")
    return f"the recommended scale ({about}; persona by probe there: {', '.join(tried)})"


def turns_table(talks):
    """Persona scores by turn of the conversations, as text."""
    lines = []
    for condition, found in talks.items():
        if found["persona"]:
            means = [text_of(mean, "{:.2f}") for mean in found["persona"]["by_turn"]]
            lines.append([condition, *means, text_of(found["persona"]["drift"], "{:.2f}")])
    if not lines:
        return "no persona score by turn: there is no probe"
    turns = [str(turn) for turn in range(1, len(lines[0]) - 1)]
    return "\n".join(aligned([["by turn", *turns, "second half - first"], *lines]))


# What can be markup in a line of Markdown: "_" only if it ends a word, "#" if it ends the line.
MARKUP = re.compile(r"[\\`*\[\]|~$]|_(?=_*\b)|#(?=#*$)")


def plain(text):
    """Text as one line of Markdown, or a cell of its tables, that shows it as it is."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return MARKUP.sub(r"\\\g<0>", line)


def fenced(text):
    """Text as a block of Markdown that shows it as it is: its fence is longer than any row of
    backticks in it. All that some reader takes for the end of a line becomes one."""
    fence = "```"
    while fence in text:
        fence += "`"
    lines = "\n".join(text.splitlines())
    return f"{fence}\n{lines}\n{fence}"


def answers_text(sample, heading="##", line=plain, block=fenced):
    """One question and its answers as Markdown; `str` for line and block: for a console."""
    parts = [f"{heading} {line(sample['question'])}", "persona prompt:"]
    parts.append(block(sample["system_prompt"]))
    for condition, text in sample["answers"].items():
        parts.append(f"**{line(condition)}**")
        parts.append(block(text))
    return "\n\n".join(parts)


def write_evaluation(folder, result, suffix=""):
    """Write eval.json, samples.md and eval.png into a run folder, and print what is in them.
    suffix: of the names, before the dot."""
    tables = tables_text(result)
    write_json(folder / f"eval{suffix}.json", result)

    parts = [f"# {plain(result['dataset'])}", fenced(tables)]
    for condition, prompt in result["prompts"].items():
        parts += [f"{plain(condition)}:", fenced(prompt)]
    for sample in [*result["samples"], *result["identity"]]:
        parts.append(answers_text(sample))
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / f"samples{suffix}.md", text.encode())

    files = [f"eval{suffix}.json", f"samples{suffix}.md"]
    files += plot_run(folder / f"eval{suffix}.png", result, folder / "metrics.jsonl")
    print(tables)
    for sample in result["samples"][:1]:
        print()
        print(answers_text(sample, line=str, block=str))
    print(f"\nrun: {folder} ({', '.join(files)})", flush=True)


def find_flags(result, record):
    """What eval.json and run.json say is wrong with a run, as a list, most serious first."""
    flags = []
    numbers = [number_at(result, condition, "nll") for condition in result["conditions"]]
    if not all(math.isfinite(number) for number in numbers if number is not None):
        flags.append("NaN")
    gain = bounds_of(value_at(result, "vanilla", "steered_minus"))
    if not gain:
        flags.append(f"only {result['heldout']['questions']} held-out questions")
    for condition in ("vanilla", "random"):
        bounds = bounds_of(value_at(result, condition, "steered_minus"))
        if bounds and not bounds[1] < 0:
            flags.append(f"no better than {condition}")
    bounds = bounds_of(value_at(result, "mean_difference", "steered_minus"))
    if bounds and bounds[0] > 0:
        flags.append("worse than mean difference")
    for condition, row in result["conditions"].items():
        if "scale" in row and row.get("collapsed"):
            flags.append(f"collapse at {condition.removeprefix('steered ')}")
    if result["samples"] and not result["recommended"]["scale"]:
        flags.append("no recommended scale")
    return flags + training_flags(record)


def training_flags(record):
    """What run.json alone says is wrong with a finished run, as a list."""
    if record.get("status") == "imported":
        return []
    flags = []
    if not 0.05 <= record.get("final", {}).get("ratio", math.nan) <= 1.0:
        flags.append("norm out of range")
    tokens = record.get("counts", {}).get("tokens", 0)
    if tokens < record.get("args", {}).get("target_tokens", 0):
        flags.append("under budget")
    return flags
