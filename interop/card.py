"""The card of an exported vector: README.md of its folder, as the Hugging Face Hub shows it.

    text = card(source, ["gguf"], ["steering_vector.gguf"], "pirate")

card.md is its template: what the vector is, what the evaluation found, and what loads each format.
"""

import json
import re
import shlex
from pathlib import Path
from string import Template

from evaluation import summary
from evaluation.judge import SCALES
from interop.adapter_check import adapter_words, fit_words
from interop.formats import WITH_ROW
from steering.data_layouts import parse_name, pooled_names
from steering.vector_file import origin_of

TEMPLATE = Path(__file__).with_name("card.md")


def card(source, formats, names, folder):
    """The card as Markdown with front matter; what is not known is left out.
    source: a formats.Source as the files hold it; formats, names: what they are and are called;
    folder: the name of theirs."""
    template, _, sections = TEMPLATE.read_text(encoding="utf-8").partition("<!--")
    metadata = source.metadata
    model = metadata["model"]
    front = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not metadata["model_is_local"]:  # on the Hub
        front = f"base_model: {model}\nbase_model_relation: adapter\n"
    title = origin_of(metadata, "unnamed")
    facts = facts_of(source, formats)
    facts["files"] = ", ".join(names)
    parts = {
        "front": front,
        "title": summary.plain(title),
        "facts": "\n".join(f"| {name} | {summary.plain(text)} |" for name, text in facts.items()),
        "evaluation": evaluation(source.result),
        "snippets": snippets(sections, source, formats, folder),
    }
    return Template(template).substitute(parts)


def facts_of(source, formats):
    """{name: words} of what the vector is, and of where it comes from."""
    metadata = source.metadata
    is_imported = source.record.get("status") == "imported"  # to be evaluated
    made = "trained"
    if is_imported or "imported_from" in metadata:
        made = "imported"
    elif "blend_of" in metadata:
        made = "blended"
    frozen = f"{metadata['model']} ({metadata['model_type']}), frozen"
    if "quantize" in metadata:
        frozen += f", {metadata['quantize']} in training"
    place = f"the output of decoder block {source.layer} (counted from 0), at every token"
    facts = {
        "base model": frozen,
        "layer": f"{source.layer}: added to {place}",
        "scale": f"the files hold {source.scale:g} x the vector as {made}",
        "vector": f"{len(source.vector):,} numbers, norm {source.vector.norm():.4g}",
    }
    for key in ("imported_from", "started_from", "blend_of"):
        if key in metadata:
            facts[key.replace("_", " ")] = metadata[key]
    if is_imported:
        facts["training"] = "none here"
    elif source.record:
        facts |= training_facts(source.record)
    if {*WITH_ROW} & {*formats}:
        names = f"rows of {len(source.fitted['datasets'])} datasets and a varied sample"
        fit = f"{fit_words(source.fitted)} of {names}"
        facts["adapter"] = f"{adapter_words(source.measured)}. Input row: {fit}"
    return facts


def training_facts(record):
    """{name: words} of the data, their scores and the training, as run.json has them."""
    options = record["args"]
    counts = record["counts"]
    final = record["final"]
    kinds = sorted({parse_name(part)[1] for part in pooled_names(record["dataset"])})
    bounds = [f"{options[f'{k}_min_score']:g} of {SCALES[k][1]} ({k}s)" for k in kinds]
    return {
        "data": f"{record['dataset']}: {counts['summary']}",
        "scores": f"rows are kept that a judge gave at least {', '.join(bounds)}",
        "training": f"{counts['train']} rows, {final['steps']} steps (best: {final['best_step']}), "
        f"{final['label_tokens']:,} label tokens, lr {final['lr']:.3g}, seed {options['seed']}; "
        f"norm {final['ratio']:.2f} of the median token norm of the residual stream at the layer",
    }


def evaluation(result):
    """The tables of eval.json, what their columns are, and its first question with the answers."""
    if not result:
        return "No evaluation is at hand."
    about = (
        "On questions that training never saw; `x1.3` is 1.3 times the vector that the run ended "
        f"with, * the recommended scale. Answers: {len(result['samples'])} a condition, of at most "
        f"{result['config']['max_new_tokens']} tokens."
    )
    columns = []
    for name, column in result["measures"].items():
        columns.append(f"- {summary.plain(name)}: {summary.plain(column['about'])}")
    sample = [summary.answers_text(sample, "###") for sample in result["samples"][:1]]
    tables = summary.fenced(summary.tables_text(result))
    return "\n\n".join([about, tables, "\n".join(columns), *sample])


def snippets(sections, source, formats, folder):
    """What loads each of the formats, as Markdown: the sections of card.md, filled in."""
    model = source.metadata["model"]
    turns = [{"role": "user", "content": "How was your day?"}]
    request = json.dumps({"model": folder, "messages": turns}, ensure_ascii=False)
    loader = "AutoModelForCausalLM"
    if "language_model" in source.module:  # one that also sees images
        loader = "AutoModelForImageTextToText"
    fill = {
        "loader": loader,
        "model": json.dumps(model, ensure_ascii=False),
        "layer": source.layer,
        "key": json.dumps(re.sub(r"\W", "_", folder)),
        "words": shlex.quote(model),
        "named": shlex.quote(f"{folder}=."),
        "ask": shlex.quote(request),
    }
    section = r"^## ([\w-]+): (.*?)\n\n(.*?```)$(?=\n\n## |\s*\Z)"
    found = []
    for name, tool, text in re.findall(section, sections, re.MULTILINE | re.DOTALL):
        if name in formats:
            found.append(f"### {tool}\n\n{Template(text).substitute(fill)}")
    return "\n\n".join(found)
