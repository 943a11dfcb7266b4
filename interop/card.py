"""The card of an exported vector: README.md of its folder, as the Hugging Face Hub shows it.

    text = card(source, vector, 1.3, ["gguf"], ["steering_vector.gguf"], "pirate")

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
from steering.data_layouts import parse_name, pooled_names

TEMPLATE = Path(__file__).with_name("card.md")


def card(source, vector, scale, formats, names, folder):
    """The card as Markdown with front matter; what is not known is left out.
    source: an export_vector.Source; vector: (n,), what the files hold: `scale` times the trained
    one; formats, names: what they are and are called; folder: the name of theirs."""
    about, front = source.metadata, ""
    template, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("<!--")
    snippets = re.findall(r"^## ([\w-]+): (.*?)\n\n(.*?```)$(?=\n\n## |\s*\Z)", rest, re.M | re.S)
    model, layer = about["model"], about["layer"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not about["model_is_local"]:  # on the Hub
        front = f"base_model: {model}\nbase_model_relation: adapter\n"
    untrained = source.record and not source.record["final"].get("steps")  # a run to evaluate it
    title = about.get("dataset", about.get("imported_from", "unnamed"))
    if untrained:
        title = about.get("imported_from", about.get("started_from", title))
    made = "imported" if untrained or "imported_from" in about else "trained"
    place = f"the output of decoder block {layer} (counted from 0), at every token"
    quantized = f", {about['quantize']} in training" if "quantize" in about else ""
    facts = {
        "base model": f"`{model}` ({about['model_type']}), frozen{quantized}",
        "layer": f"{layer}: added to {place}",
        "scale": f"the files hold {scale:g} x the vector as {made}",
        "vector": f"{len(vector):,} numbers, norm {vector.norm():.4g}",
        **origin(source),
        **(adapter_facts(source.adapter) if {"lora", "lora-gguf"} & {*formats} else {}),
        "files": ", ".join(f"`{name}`" for name in names),
    }
    fill = {"model": json.dumps(model, ensure_ascii=False), "layer": layer}
    turns = [{"role": "user", "content": "How was your day?"}]
    steer = json.dumps({"id": folder, "layer": layer, "scale": 1.0})
    bodies = {
        "ask": {"model": folder, "messages": turns},
        "ask_hotwire": {"model": model, "messages": turns, "vllm_xargs": {"hotwire": steer}},
    }
    fill |= {key: shlex.quote(json.dumps(body, ensure_ascii=False)) for key, body in bodies.items()}
    fill |= {"words": shlex.quote(model), "named": shlex.quote(f"{folder}=.")}
    fill["key"] = json.dumps(re.sub(r"\W", "_", folder))
    loading = [f"### {t}\n\n{Template(c).substitute(fill)}" for f, t, c in snippets if f in formats]
    facts = "\n".join(f"| {name} | {summary.plain(words)} |" for name, words in facts.items())
    parts = {"facts": facts, "evaluation": evaluation(source.result)}
    parts |= {"front": front, "title": summary.plain(title), "snippets": "\n\n".join(loading)}
    return Template(template).substitute(parts)


def adapter_facts(about):
    """{name: words}: what was measured of a lora adapter."""
    names = f"rows of {len(about['datasets'])} datasets and a varied sample"
    return {"adapter": f"{adapter_words(about)}. Input row: {fit_words(about)} of {names}"}


def origin(source):
    """{name: words}: the data, its scores and the training, as run.json has them; or the import."""
    record, metadata = source.record, source.metadata
    keys = ("imported_from", "started_from")
    facts = {key.replace("_", " "): metadata[key] for key in keys if key in metadata}
    if not record:
        return facts
    if not record["final"].get("steps"):
        return facts | {"training": "none here"}
    args, counts, final, name = record["args"], record["counts"], record["final"], record["dataset"]
    kinds = sorted({parse_name(part)[1] for part in pooled_names(name)})
    bounds = [f"{args[f'{kind}_min_score']:g} of {SCALES[kind][1]} ({kind}s)" for kind in kinds]
    facts["data"] = f"`{name}`: {counts['summary']}"
    facts["scores"] = f"rows are kept that a judge gave at least {', '.join(bounds)}"
    facts["training"] = (
        f"{counts['train']} rows, {final['steps']} steps (best: {final['best_step']}), "
        f"{final['label_tokens']:,} label tokens, lr {final['lr']:.3g}, seed {args['seed']}; norm "
        f"{final['ratio']:.2f} of the median token norm of the residual stream at the layer"
    )
    return facts


def evaluation(result):
    """The tables of eval.json and its first question with the answers, as Markdown."""
    if not result:
        return "No evaluation is at hand."
    about = (
        "On questions that training never saw; `x1.3` is 1.3 times the vector that the run ended "
        "with, * the recommended scale. NLL: nats per response token, on rows of the persona. "
        "Recovered: 1 is as much as the prompt of the persona gives. "
        f"Answers: {len(result['samples'])} a condition, of at "
        f"most {result['config']['max_new_tokens']} tokens; probe: probability of the persona by "
        "a linear probe; KL: from the plain model, on rows without the persona."
    )
    sample = [summary.answers_text(sample, "###") for sample in result["samples"][:1]]
    return "\n\n".join([about, f"```\n{summary.tables_text(result)}\n```", *sample])
