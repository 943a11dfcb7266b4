"""Rank-1 LoRA adapters that add a steering vector, for servers that swap adapters by request.

    site = find_site(model)               # of a SteerModel; ValueError where the trick does not fit
    row, missed = fit_row(model, site, examples)
    products = row_products(model, site, row, examples)   # a . z of every token, ideally 1

The output of decoder layer k is x + attention + down(z), down being the MLP's last linear layer. A
LoRA of rank 1 on it adds v (a . z), which is v wherever a . z = 1. Such an `a` belongs to the model
and the layer and not to a persona: it is fitted once, by ridge regression of the number 1 on z, and
every persona is lora_A = a, lora_B = v. The text it is fitted on must be varied: on chat alone,
a . z is 0.65 elsewhere. So calibration/ goes into every fit, besides rows of the personas.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from steering.chat_format import IGNORE_INDEX, Example, collate
from steering.fast_path import (
    FastPath,
    by_example,
    in_batches,
    replaced_forwards,
)
from steering.files import write_atomically
from steering.loading import is_same_model, model_digest
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
OPENING, OPENING_WEIGHT = 8, 8.0  # tokens on either side of where an answer begins
ROW_FILE, SAMPLE = "lora_a.safetensors", Path(__file__).with_name("calibration")


@dataclass
class Site:
    """The linear layer that an adapter is for: the module, and its name in the transformers model,
    such as model.layers.12.mlp.down_proj."""

    module: nn.Linear
    name: str


@torch.no_grad()
def find_site(model):
    """The Site of a SteerModel at its layer; ValueError, with the reason, where the trick is not
    exact: what is added to the module's output must be added to the layer's output, unchanged."""
    layer, kind = model.layers[model.layer], model.config.model_type
    found = [(path, module) for path, module in layer.named_modules() if path in DOWN_PROJECTIONS]
    no = f"no adapter for {model.name} ({kind}), layer {model.layer}: "
    if not found or not isinstance(found[0][1], nn.Linear):
        names = " ".join(name for name, _ in layer.named_modules())
        why = "no nn.Linear is at " + ", ".join(DOWN_PROJECTIONS)
        mixture = "expert" in names or "router" in names
        raise ValueError(no + ("its MLP is a mixture of experts" if mixture else why))
    path, module = found[0]
    ids = torch.arange(1, 9, device=model.input_device)[None]
    fast = FastPath(model)
    with model.steering_off():
        plain = fast.layer_output(ids)
        plain_dtype, plain = plain.dtype, plain.float()
        noise = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0))
        noise = noise.to(plain) * plain.norm(dim=-1).median() / len(noise) ** 0.5
        handle = module.register_forward_hook(lambda m, i, output: output + noise.to(output))
        try:
            moved = fast.layer_output(ids).float() - plain
        finally:
            handle.remove()
    off = ((moved - noise).abs().median() / noise.abs().median()).item()
    if not off < (1e-3 if plain_dtype == torch.float32 else 0.02):
        why = f"what {path} adds does not reach the layer's output unchanged (off by {off:.0%}): "
        raise ValueError(f"{no}{why}a norm after the MLP, as in Gemma 2, or a factor on it")
    (name,) = (name for name, other in model.model.named_modules() if other is module)
    return Site(module, name)


def inputs_of(model, site, examples):
    """z (B, T, features) of a batch, right-padded; it never sees the vector, added after it."""
    ids, caught = collate(examples)[0], []
    handle = site.module.register_forward_pre_hook(lambda m, inputs: caught.append(inputs[0]))
    try:
        FastPath(model).layer_output(ids.to(model.input_device))
    finally:
        handle.remove()
    return caught[0].reshape(*ids.shape, -1)  # some models flatten rows and tokens


def token_weights(example):
    """How much each token of an example counts in the fit: (T,)."""
    weights = torch.ones(len(example.input_ids))
    start = next((i for i, label in enumerate(example.labels) if label >= 0), None)
    if start is not None:
        weights[max(0, start - OPENING) : start + OPENING] = OPENING_WEIGHT
    return weights


@torch.no_grad()
def fit_row(model, site, examples, max_tokens=1024):
    """(a (features,) fp32 on the host, the share of the number 1 that it misses on these tokens).
    examples: chat-formatted, or plain text without labels; max_tokens: padded, a forward pass. Only
    G = sum of z z^T is kept, on the device if that has room. Tokens where an answer begins count
    OPENING_WEIGHT times: there the persona is decided."""
    n, device = site.module.in_features, site.module.weight.device
    if device.type == "meta" or free_memory(device) < 3 * 4 * n * n:
        device = torch.device("cpu")
    gram, total = torch.zeros(n, n, device=device), torch.zeros(n, device=device)

    def add(batch):
        z = inputs_of(model, site, batch)
        rows = [states[: len(e.input_ids)] for states, e in zip(z, batch, strict=True)]
        rows = torch.cat(rows).to(device, torch.float32)
        weights = torch.cat([token_weights(example) for example in batch]).to(device)
        weighted = rows * weights[:, None]
        gram.addmm_(weighted.T, rows)
        total.add_(weighted.sum(dim=0))
        return weights.sum().item()

    weight = 0.0
    with tqdm(total=len(examples), desc=f"fitting a at layer {model.layer}", disable=None) as bar:
        for batch, of_batch in in_batches(add, examples, max_tokens):
            weight += of_batch
            bar.update(len(batch))
    gram, mean = gram.cpu().double().div_(weight), total.cpu().double() / weight
    if not gram.isfinite().all():
        raise ValueError(f"{site.name}: NaN or infinity in what enters it (--dtype bf16 or fp32?)")
    diagonal = gram.diagonal()
    ridge = RIDGE * diagonal[diagonal > 0].median()  # a ReLU may let nothing through
    factor = torch.linalg.cholesky(gram.diagonal_scatter(diagonal + ridge))
    row = torch.cholesky_solve(mean[:, None], factor)[:, 0]
    return row.float(), 1 - (mean @ row).item()


@torch.no_grad()
def row_products(model, site, row, examples, max_tokens=1024):
    """a . z of every token of every example: a list of (T,) tensors on the host."""

    def multiply(batch):
        z = inputs_of(model, site, batch)
        values = (z.float() @ row.to(z.device)).cpu()
        return [v[: len(e.input_ids)] for e, v in zip(batch, values, strict=True)]

    return by_example(multiply, examples, max_tokens)


def sample_examples(chat):
    """calibration/ as (Examples to fit on, every fifth document, to measure on).
    Conversations as the chat template writes them, other documents as they are, without labels."""
    documents = []
    for path in sorted(SAMPLE.glob("*.txt")):
        texts = path.read_text(encoding="utf-8").split("\n%%%\n")
        for ids in chat.tokenizer(texts)["input_ids"]:  # with the first token that servers add
            documents.append(Example({}, ids, [IGNORE_INDEX] * len(ids)))
    lines = (SAMPLE / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{"system_prompt": "", "question": "", **json.loads(line)} for line in lines]
    documents += chat.encode_each(rows)[0]
    return [e for i, e in enumerate(documents) if i % 5], documents[::5]


def save_row(path, row, model, site, about):
    """Write an input row (features,) beside the runs; about: what it was fitted and measured on."""
    header = {"model": model.name, "model_digest": model_digest(model.name), "layer": model.layer}
    header |= {"module": site.name, "about": json.dumps(about)}
    write_atomically(path, vector_bytes(row, header, "lora_a"))


def load_row(path, model, site):
    """(input row (features,), about) as `save_row` wrote them. Raises ValueError for a file that is
    of another model or layer, or no such file."""
    row, header = load_vector(path, "lora_a")
    there = header.get("model"), header.get("layer"), header.get("module")
    ours = model.name, str(model.layer), site.name
    fits = is_same_model(header, model.name) and there[1:] == ours[1:]
    if not fits or len(row) != site.module.in_features:
        named = [f"{len(row)} numbers for {' '.join(map(str, there))}", " ".join(ours)]
        raise ValueError(f"{path} has {named[0]}; here it is {named[1]}. Remove it to fit another")
    try:
        about = json.loads(header["about"])
        kinds = {"datasets": list, "fitted_tokens": int, "split": list, "missed": dict}
        assert all(isinstance(about[key], kind) for key, kind in kinds.items())
        assert all(len(pair) == 2 and sum(pair) < float("inf") for pair in about["missed"].values())
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        what = "its header does not say what it was fitted on"
        raise ValueError(f"{path}: {what}. Remove it to fit another") from error
    return row, about


def as_adapter(model, products):
    """Context: the model's vector counts a . z times at each token, as an adapter adds it.
    products: a . z, (B, T), of the tokens that the model is called with."""
    vector = model.steering.scale * model.steering.added().detach()

    def add(states):
        return states + (products.to(states.device)[..., None] * vector).to(states.dtype)

    return replaced_forwards({model.steering: add})
