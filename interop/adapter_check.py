"""Does a rank-1 adapter do what its vector does? Measured on text that it was not fitted on.

products = row_products(model, site, row, examples)  # interop/adapter.py has the idea
missed = missed_by_row(examples, products)           # where a . z is not 1
batches = to_compare(fast, examples, products)       # once, and for each vector in turn:
found = compare_with_adapter(fast, batches)
"""

import contextlib
import functools
import math

import torch
from torch.nn.utils.rnn import pad_sequence

from interop.adapter import as_adapter
from steering.chat_format import micro_batches

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


def to_compare(fast, examples, products, max_tokens=1024):
    """What `compare_with_adapter` takes, whatever the vector: [(micro-batch, a . z (B, T), what its
    head reads without vector)]. fast: a FastPath of the model; max_tokens: padded, a batch."""
    of_example = {id(e): values for e, values in zip(examples, products, strict=True)}
    with fast.model.steering_off():
        return [
            (
                batch,
                pad_sequence([of_example[id(example)] for example in batch], batch_first=True),
                fast.states(batch),
            )
            for batch in micro_batches(examples, max_tokens)
        ]


def compare_with_adapter(fast, batches):
    """What the model's vector and the adapter made of it do to the label tokens of held-out rows.
    batches: of `to_compare`. In nats a token: {"rows", "tokens", "nll": {"vanilla", "vector",
    "adapter"}, "kl": KL(vector || adapter), "kl_vector": KL(vanilla || vector), "lost": kl as a
    share of kl_vector}."""
    vector, found = contextlib.nullcontext, []
    for batch, products, plain in batches:
        adapter = functools.partial(as_adapter, fast.model, products)
        found.append(fast.compare(batch, [plain, vector, adapter]).double())
    sums = torch.cat(found, dim=1)
    vanilla, kl_vector, vector, kl, adapter = sums.mean(dim=1).tolist()
    return {
        "rows": sum(len(batch) for batch, _, _ in batches), "tokens": sums.shape[1],
        "nll": {"vanilla": vanilla, "vector": vector, "adapter": adapter},
        "kl": kl, "kl_vector": kl_vector, "lost": kl / kl_vector if kl_vector else math.inf,
    }  # fmt: skip


def fit_words(about):
    """What an input row was fitted on, and where it misses, in a line."""
    missed = ", ".join(f"{k} {mean:.2f} +- {off:.2f}" for k, (mean, off) in about["missed"].items())
    return f"a . z of held-out {missed}; fitted on {about['fitted_tokens']:,} tokens"


def adapter_words(about):
    """What was measured of an adapter, in a line."""
    nll = ", ".join(f"{name} {value:.3f}" for name, value in about["nll"].items())
    kl = f"{about['kl']:.2g} of {about['kl_vector']:.2g} nats, {about['lost']:.1%}"
    where = f"{about['tokens']:,} held-out tokens of {about['rows']} rows"
    return f"NLL {nll}; the adapter is off the vector by KL {kl} ({where})"
