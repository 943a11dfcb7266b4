"""The card of an exported vector: README.md of its folder, as the Hugging Face Hub shows it.

    text = card(source, vector, scale=1.3, formats=["gguf"], names=["steering_vector.gguf"])

What it is, where it is from, what the evaluation found, and the lines that load it in each tool.
"""

import json
import re
from string import Template

import eval_report
from judge import SCALES

from steering.data_layouts import parse_name

# What loads each format: (format, tool, language, lines), $model and $layer to be filled in.
SNIPPETS = [
    (
        "safetensors",
        "hook_model.py (the scripts that trained it)",
        "python",
        """\
from chat_format import ChatFormat, load_tokenizer
from hook_model import load_model

name = $model
model, chat = load_model(name, layer=$layer), ChatFormat(load_tokenizer(name))
model.load_vector("steering_vector.safetensors")
inputs = chat.inputs(["How was your day?"], model.input_device)
print(chat.answers(inputs, model.generate(**inputs, max_new_tokens=100, scale=1.0))[0])
""",
    ),
    (
        "gguf",
        "llama.cpp",
        "sh",
        """\
llama-cli --model MODEL.gguf --control-vector-scaled steering_vector.gguf:1.0 \\
    --control-vector-layer-range $layer $layer
""",
    ),
    (
        "gguf",
        "repeng",
        "python",
        """\
from repeng import ControlModel, ControlVector
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained($model, dtype="auto")
model = ControlModel(model, layer_ids=[$layer])
model.set_control(ControlVector.import_gguf("steering_vector.gguf"), 1.0)
""",
    ),
    (
        "gguf",
        "EasySteer (not checked)",
        "python",
        """\
from vllm import LLM
from vllm.steer_vectors.request import SteerVectorRequest

llm = LLM($model, enable_steer_vector=True, enforce_eager=True)
place = {"target_layers": [$layer], "prefill_trigger_tokens": [-1], "generate_trigger_tokens": [-1]}
steer = SteerVectorRequest("persona", 1, steer_vector_local_path="steering_vector.gguf", **place)
print(llm.generate("How was your day?", steer_vector_request=steer))
""",
    ),
    (
        "pt",
        "steering-vectors",
        "python",
        """\
import torch
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained($model, dtype="auto")
vector = torch.load("layer_$layer.pt", weights_only=True)
handle = SteeringVector({$layer: vector}).patch_activations(model, multiplier=1.0)
""",
    ),
    (
        "pt",
        "transformers alone",
        "python",
        """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained($model, dtype="auto")
vector = torch.load("layer_$layer.pt", weights_only=True)
block = model.model.layers[$layer]  # where most models keep their decoder layers
block.register_forward_hook(lambda module, inputs, output: output + 1.0 * vector.to(output))
""",
    ),
    (
        "chatspace",
        "chatspace",
        "python",
        """\
from chatspace.steering.model import TransformerSteerModel

model = TransformerSteerModel.from_pretrained(".", torch_dtype="auto")
""",
    ),
]


def card(source, vector, scale, formats, names):
    """The card as Markdown with front matter; what is not known is left out.

    source: an export_vector.Source; vector: (n,), what the files hold: `scale` times the trained
    one; formats, names: what they are and are called.
    """
    front = ["---", "tags:", "- steering-vector", "- control-vector", "- persona", "---"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.model) and not source.local:  # on the Hub
        front[1:1] = [f"base_model: {source.model}", "base_model_relation: adapter"]
    untrained = source.record and source.record["final"]["steps"] == 0  # a run to evaluate it
    made = "imported" if untrained or "imported_from" in source.metadata else "trained"
    place = f"the output of decoder block {source.layer} (counted from 0), at every token"
    facts = {
        "base model": f"`{source.model}` ({source.model_type}), frozen",
        "layer": f"{source.layer}: added to {place}",
        "scale": f"the files hold {scale:g} x the vector as {made}",
        "vector": f"{len(vector):,} numbers, norm {vector.norm():.4g}",
        **origin(source),
        "files": ", ".join(f"`{name}`" for name in names),
    }
    title = source.metadata.get("dataset", source.metadata.get("imported_from", "unnamed"))
    if untrained:
        title = source.metadata["started_from"]
    rows = [f"| {name} | {plain(words)} |" for name, words in facts.items()]
    table = ["| | |", "|---|---|", *rows]
    parts = ["\n".join(front), f"# Steering vector: {plain(title)}", "\n".join(table)]
    parts += ["## Does it work?", *evaluation(source.result), "## How to load it"]
    for kind, tool, language, lines in SNIPPETS:
        if kind in formats:
            name = json.dumps(source.model, ensure_ascii=False)
            code = Template(lines).substitute(model=name, layer=source.layer)
            parts.append(f"### {tool}\n\n```{language}\n{code}```")
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
    if record["final"]["steps"] == 0:
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
    tables = eval_report.likelihood_text(result)
    about = (
        "On questions that training never saw; `x1.3` is 1.3 times the vector that the run ended "
        "with. NLL: nats per response token, on rows of the persona. Recovered: 1 is as much as "
        "the prompt of the persona gives."
    )
    if result["samples"]:
        tables += "\n\n" + eval_report.answers_table(result)
        about += (
            f" Answers: {len(result['samples'])} a condition, of at most "
            f"{result['config']['max_new_tokens']} tokens; probe: probability of the persona by "
            "a linear probe; KL: from the plain model, on rows without the persona."
        )
    flags = f"Flags: {', '.join(result['flags']) or 'none'}."
    sample = [eval_report.answers_text(sample, "###") for sample in result["samples"][:1]]
    return [about, f"```\n{tables}\n```", flags, *sample]
