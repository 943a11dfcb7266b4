"""Does a rank-1 adapter do what its vector does? Measured on text that it was not fitted on.

products = row_products(model, site, row, examples)      # steering/adapter.py has the idea
missed = missed_by_row(examples, products)               # where a . z is not 1
found = compare_with_adapter(fast, examples, products)   # of the vector that the model has
"""

import contextlib
import functools
import math

import torch
from torch.nn.utils.rnn import pad_sequence

from steering.adapter import as_adapter

# Most of the vector's effect that an adapter may lose. KL(vector || adapter) as a share of
# KL(vanilla || vector), and the mean square of what a . z is off 1, which predicts it.
MAX_LOST = 0.1


def missed_by_row(examples, products):
    """{kind of token: [mean of a . z, root mean square of what it is off 1]}; 1 and 0 are perfect.
    Kinds: answers (label tokens), prompts and other text. The first token of a text is left out:
    in many models its state is one of a kind, and nothing that is added there is heard."""
    kinds = {"answers": [], "prompts": [], "other text": []}
    for example, values in zip(examples, products, strict=True):
        labels, values = torch.tensor(example.labels)[1:], values[1:]
        kinds["answers"].append(values[labels >= 0])
        kinds["prompts" if (labels >= 0).any() else "other text"].append(values[labels < 0])
    found = {kind: torch.cat(parts) for kind, parts in kinds.items() if parts}
    return {
        kind: [values.mean().item(), (values - 1).square().mean().sqrt().item()]
        for kind, values in found.items()
        if len(values)
    }


def compare_with_adapter(fast, examples, products, plain):
    """What the model's vector and the adapter made of it do to the label tokens of a few examples.
    fast: a FastPath of the model; plain: its states(examples) without vector. {"tokens", "nll":
    {"vanilla", "vector", "adapter"}, "kl": KL(vector || adapter), "kl_vector": KL(vanilla ||
    vector), "lost": their ratio}, in nats a token."""
    padded = pad_sequence(products, batch_first=True)
    adapter = functools.partial(as_adapter, fast.model, padded)
    rows = fast.compare(examples, [plain, contextlib.nullcontext, adapter])
    vanilla, kl_vector, vector, kl, adapter = rows.double().mean(dim=1).tolist()
    nll = {"vanilla": vanilla, "vector": vector, "adapter": adapter}
    lost = kl / kl_vector if kl_vector else math.inf
    return {"tokens": len(rows[0]), "nll": nll, "kl": kl, "kl_vector": kl_vector, "lost": lost}


def fit_words(about):
    """What an input row was fitted on, and where it misses, in a line."""
    missed = ", ".join(f"{k} {mean:.2f} +- {off:.2f}" for k, (mean, off) in about["missed"].items())
    return f"a . z of held-out {missed}; fitted on {about['fitted_tokens']:,} tokens"


def adapter_words(about):
    """What was measured of an adapter, in a line."""
    nll = ", ".join(f"{name} {value:.3f}" for name, value in about["nll"].items())
    kl = f"{about['kl']:.2g} of {about['kl_vector']:.2g} nats, {about['lost']:.1%}"
    return (
        f"NLL {nll}; the adapter is off the vector by KL {kl} ({about['tokens']} held-out tokens)"
    )
