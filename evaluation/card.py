"""The card of an exported vector: README.md of its folder, as the Hugging Face Hub shows it.

    text = card(source, vector, scale=1.3, formats=["gguf"], names=["steering_vector.gguf"])

What it is, where it is from, what the evaluation found, and the lines that load it in each tool.
"""

import json
import re
from pathlib import Path
from string import Template

from evaluation import report
from evaluation.judge import SCALES
from steering.data_layouts import parse_name

SNIPPETS = Path(__file__).with_name("snippets.md")  # what loads each format


def snippets():
    """[(format, tool, fenced lines with $model and $layer)] of snippets.md."""
    text = SNIPPETS.read_text(encoding="utf-8")
    return re.findall(r"^## (\w+): (.*?)\n\n(```.*?```)$", text, re.MULTILINE | re.DOTALL)


def card(source, vector, scale, formats, names):
    """The card as Markdown with front matter; what is not known is left out.
    source: an export_vector.Source; vector: (n,), what the files hold: `scale` times the trained
    one; formats, names: what they are and are called."""
    front = ["---", "tags:", "- steering-vector", "- control-vector", "- persona", "---"]
    model, layer = source.metadata["model"], source.metadata["layer"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not source.metadata["model_is_local"]:
        front[1:1] = [f"base_model: {model}", "base_model_relation: adapter"]  # on the Hub
    untrained = source.record and not source.record["final"].get("steps")  # a run to evaluate it
    made = "imported" if untrained or "imported_from" in source.metadata else "trained"
    place = f"the output of decoder block {layer} (counted from 0), at every token"
    facts = {
        "base model": f"`{model}` ({source.metadata['model_type']}), frozen",
        "layer": f"{layer}: added to {place}",
        "scale": f"the files hold {scale:g} x the vector as {made}",
        "vector": f"{len(vector):,} numbers, norm {vector.norm():.4g}",
        **origin(source),
        "files": ", ".join(f"`{name}`" for name in names),
    }
    title = source.metadata.get("dataset", source.metadata.get("imported_from", "unnamed"))
    if untrained:
        title = source.metadata.get("imported_from", source.metadata.get("started_from", title))
    rows = [f"| {name} | {plain(words)} |" for name, words in facts.items()]
    table = ["| | |", "|---|---|", *rows]
    parts = ["\n".join(front), f"# Steering vector: {plain(title)}", "\n".join(table)]
    parts += ["## Does it work?", *evaluation(source.result), "## How to load it"]
    name = json.dumps(model, ensure_ascii=False)
    for kind, tool, lines in snippets():
        if kind in formats:
            parts.append(f"### {tool}\n\n{Template(lines).substitute(model=name, layer=layer)}")
    return "\n\n".join(parts) + "\n"


def plain(text):
    """Text for a line of Markdown, whatever a foreign file had to say."""
    text = " ".join(str(text).split())
    return text.replace("<", "&lt;").replace("|", "\\|")


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
    kinds = sorted({parse_name(part)[1] for part in name.split("+")})
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
    """Paragraphs: the tables of eval.json, and its first question with the answers."""
    if not result:
        return ["No evaluation is at hand."]
    tables = report.likelihood_text(result)
    about = (
        "On questions that training never saw; `x1.3` is 1.3 times the vector that the run ended "
        "with. NLL: nats per response token, on rows of the persona. Recovered: 1 is as much as "
        "the prompt of the persona gives."
    )
    if result["samples"]:
        tables += "\n\n" + report.answers_table(result)
        about += (
            f" Answers: {len(result['samples'])} a condition, of at most "
            f"{result['config']['max_new_tokens']} tokens; probe: probability of the persona by "
            "a linear probe; KL: from the plain model, on rows without the persona."
        )
    flags = f"Flags: {', '.join(result['flags']) or 'none'}."
    sample = [report.answers_text(sample, "###") for sample in result["samples"][:1]]
    return [about, f"```\n{tables}\n```", flags, *sample]
