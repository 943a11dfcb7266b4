"""Rank-1 LoRA adapters that add a steering vector, for servers that swap adapters by request.

    site = find_site(model)               # of a SteerModel; ValueError where the trick does not fit
    row = fit_row(model, site, examples)
    products = row_products(model, site, row, examples)   # a . z of every token, ideally 1

The output of decoder layer k is x + attention + down(z), down being the MLP's last linear layer. A
LoRA of rank 1 on it adds v (a . z), which is v wherever a . z = 1. Such an `a` belongs to the model
and the layer and not to a persona: it is fitted once, by ridge regression of the number 1 on z, and
every persona is lora_A = a, lora_B = v. The text it is fitted on must be varied: on chat alone,
a . z is 0.65 elsewhere. So calibration/ goes into every fit, besides rows of the personas.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from steering.chat_format import IGNORE_INDEX, Example, collate
from steering.fast_path import FastPath, by_example, in_batches, replaced_forwards
from steering.files import read_json_lines, write_atomically
from steering.loading import is_same_model, model_digest, read_config
from steering.memory import free_memory
from steering.vector_file import load_vector, vector_bytes

DOWN_PROJECTIONS = (  # where decoder layers keep the last linear layer of their MLP
    "mlp.down_proj",  # Llama, Qwen 2 and 3, Mistral, Phi 3, SmolLM3
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon
    "mlp.fc2",  # Phi 2
    "fc2",  # OPT
    "mlp.c_proj",  # StarCoder 2
    "ffn.down_proj",  # MPT
    "feed_forward.down_proj",  # Bamba, Falcon H1
    "feed_forward.w2",  # LFM 2
)
RIDGE = 0.01  # of the median diagonal of G; from 1e-5 to 0.1 nothing changes
OPENING = 8  # tokens on either side of where an answer begins
OPENING_WEIGHT = 8.0  # There the persona is decided.
MAX_TOKENS = 1024  # padded, a forward pass
ROW_FILE = "lora_a.safetensors"
SAMPLE = Path(__file__).with_name("calibration")


@dataclass
class Site:
    """The linear layer that an adapter is for: the module, and its name in the transformers model
    as it is loaded here, such as model.layers.12.mlp.down_proj."""

    module: nn.Linear
    name: str


def find_site(model):
    """The Site of a SteerModel at its layer; ValueError, with the reason, where the trick is not
    exact: what is added to the module's output must be added to the layer's output, unchanged."""
    no = f"no adapter for {model.name} ({model.config.model_type}), layer {model.layer}:"
    parts = dict(model.layers[model.layer].named_modules())
    path = next((path for path in parts if path in DOWN_PROJECTIONS), None)
    module = parts.get(path)
    if not isinstance(module, nn.Linear):
        if any("expert" in name or "router" in name for name in parts):
            raise ValueError(f"{no} its MLP is a mixture of experts")
        raise ValueError(f"{no} no nn.Linear is at {', '.join(DOWN_PROJECTIONS)}")
    off = lost_on_the_way(model, module)
    most = 1e-3 if module.weight.dtype == torch.float32 else 0.02
    if not off < most:
        raise ValueError(
            f"{no} what {path} adds does not reach the layer's output unchanged (off by {off:.0%}):"
            " a norm after the MLP, as in Gemma 2, or a factor on it"
        )
    return Site(module, name_of(module, model.model))


def name_of(module, model):
    """The name of a module in a model."""
    return next(name for name, other in model.named_modules() if other is module)


def served_name(model, site, trust_remote_code=False):
    """The name of a Site's module in the class that the model's config names, which vLLM and others
    load. It may be one with an image tower, of which we load the text part alone.
    Raises ValueError where transformers does not have that class, or not with this layer."""
    loaded = type(model.model).__name__
    served = (read_config(model.name, trust_remote_code).architectures or [loaded])[0]
    if served == loaded:
        return site.name
    layer = model.layers[model.layer]
    modules = modules_of(served, model.name, trust_remote_code)
    alike = [name for name, kind in modules.items() if kind is type(layer)]
    there = [name for name in alike if name.endswith(f".{model.layer}")]
    if len(there) != 1:
        what = f"layer {model.layer} of {loaded} is not in {served}, which its config names"
        raise ValueError(f"no adapter for {model.name}: {what}")
    return f"{there[0]}.{name_of(site.module, layer)}"


@functools.cache  # an export of many runs asks for the same model again and again
def modules_of(architecture, name, trust_remote_code):
    """{name: class} of the modules of a model by name, built as a class of transformers by name.
    ValueError where that is not possible."""
    import transformers

    config = read_config(name, trust_remote_code)
    try:
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
    except Exception as error:  # whatever the code of an architecture runs into
        what = f"transformers does not make the {architecture} that its config names"
        raise ValueError(f"no adapter for {name}: {what} ({error!r:.200})") from error
    return {path: type(module) for path, module in model.named_modules()}


@torch.no_grad()
def lost_on_the_way(model, module):
    """How much of what is added to a module's output does not reach the output of its layer."""
    ids = torch.arange(1, 9, device=model.input_device)[None]
    fast = FastPath(model)
    with model.steering_off():
        plain = fast.layer_output(ids).float()
        noise = plain[0, -1].roll(1)  # (n,), of the size that states have
        forward = module.forward
        with replaced_forwards({module: lambda z: forward(z) + noise.to(z)}):
            moved = fast.layer_output(ids).float() - plain
    off = (moved - noise).abs().median()
    return (off / noise.abs().median()).item()


def inputs_of(model, site, examples):
    """z (T, features) of each of a batch of examples; it never sees the vector, added after it."""
    ids = collate(examples)[0]
    caught = []
    forward = site.module.forward

    def catch(z):
        caught.append(z)
        return forward(z)

    with replaced_forwards({site.module: catch}):
        FastPath(model).layer_output(ids.to(model.input_device))
    padded = caught[0].reshape(*ids.shape, -1)  # some models flatten rows and tokens
    return [z[: len(example.input_ids)] for example, z in zip(examples, padded, strict=True)]


def token_weights(example):
    """How much each token of an example counts in the fit: (T,)."""
    weights = torch.ones(len(example.labels))
    answer = [i for i, label in enumerate(example.labels) if label >= 0]
    if answer:
        weights[max(0, answer[0] - OPENING) : answer[0] + OPENING] = OPENING_WEIGHT
    return weights


@torch.no_grad()
def fit_row(model, site, examples):
    """a (features,), fp32 on the host, with a . z as near to 1 as can be on these tokens.

    examples: chat-formatted, or plain text without labels. Only G = sum of z z^T is kept, on the
    device if that has room. Raises ValueError for a model whose numbers are not finite.
    """
    n = site.module.in_features
    device = site.module.weight.device
    if device.type == "meta" or free_memory(device) < 3 * 4 * n * n:
        device = torch.device("cpu")
    gram = torch.zeros(n, n, device=device)
    total = torch.zeros(n, device=device)
    weight = 0.0
    inputs = functools.partial(inputs_of, model, site)
    bar = tqdm(total=len(examples), desc=f"fitting a at layer {model.layer}", disable=None)
    with bar:
        for batch, z in in_batches(inputs, examples, MAX_TOKENS):
            rows = torch.cat(z).to(device, torch.float32)  # (N, features)
            weights = torch.cat([token_weights(example) for example in batch])  # (N,)
            weighted = rows * weights.to(device)[:, None]
            gram.addmm_(weighted.T, rows)
            total += weighted.sum(dim=0)
            weight += weights.sum().item()
            bar.update(len(batch))
    gram = gram.cpu().double().div_(weight)
    mean = total.cpu().double() / weight
    if not gram.isfinite().all():
        raise ValueError(f"{site.name}: NaN or infinity in what enters it (--dtype bf16 or fp32?)")
    diagonal = gram.diagonal()
    ridge = RIDGE * diagonal[diagonal > 0].median()  # a ReLU may let nothing through
    factor = torch.linalg.cholesky(gram.diagonal_scatter(diagonal + ridge))
    return torch.cholesky_solve(mean[:, None], factor)[:, 0].float()


@torch.no_grad()
def row_products(model, site, row, examples):
    """a . z of every token of every example: a list of (T,) tensors on the host."""

    def multiply(batch):
        each = inputs_of(model, site, batch)
        return [(z.float() @ row.to(z.device)).cpu() for z in each]

    return by_example(multiply, examples, MAX_TOKENS)


def sample_examples(chat):
    """calibration/ as (Examples to fit on, every fifth document, to measure on).
    Conversations as the chat template writes them, other documents as they are, without labels."""
    documents = []
    for path in sorted(SAMPLE.glob("*.txt")):
        texts = path.read_text(encoding="utf-8").split("\n%%%\n")
        for ids in chat.tokenizer(texts)["input_ids"]:  # with the first token that servers add
            documents.append(Example({}, ids, [IGNORE_INDEX] * len(ids)))
    rows = []
    for talk in read_json_lines(SAMPLE / "conversations.jsonl"):
        rows.append({"system_prompt": "", "question": "", **talk})
    documents += chat.encode_each(rows)[0]
    return [document for i, document in enumerate(documents) if i % 5], documents[::5]


def save_row(path, row, model, site, fitted):
    """Write an input row (features,) beside the runs; fitted: how it was fitted, for JSON."""
    header = {
        "model": model.name,
        "model_digest": model_digest(model.name),
        "layer": model.layer,
        "module": site.name,
        "about": json.dumps(fitted),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, vector_bytes(row, header, "lora_a"))


def load_row(path, model, site):
    """(input row (features,), how it was fitted) as `save_row` wrote them. Raises ValueError for a
    file that is of another model or layer, or no such file."""
    row, header = load_vector(path, "lora_a")
    place = {"layer": str(model.layer), "module": site.name}
    fits = place.items() <= header.items() and is_same_model(header, model.name)
    if not fits or len(row) != site.module.in_features:
        what = f"not for {site.name} of {model.name}, layer {model.layer}"
        raise ValueError(f"{path} is {what}: {header}. Remove it to fit another")
    return row, json.loads(header["about"])


def as_adapter(model, products):
    """Context: the model's vector counts a . z times at each token, as an adapter adds it.
    products: a . z, (B, T), of the tokens that the model is called with."""
    vector = model.steering.scale * model.steering.added().detach()

    def add(states):
        added = products.to(states.device)[..., None] * vector
        return states + added.to(states.dtype)

    return replaced_forwards({model.steering: add})
