"""Does a rank-1 adapter do what its vector does? Measured on text that it was not fitted on.

row, fitted = fit_and_measure(model, site, chat, examples, heldout)  # adapter.py has the idea
measured = compare_with_adapter(model, site, row, examples)          # for each vector in turn
check_loss(fitted, measured)
"""

import contextlib
import functools

import torch
from torch.nn.utils.rnn import pad_sequence

from interop.adapter import MAX_TOKENS, as_adapter, fit_row, row_products, sample_examples
from steering.chat_format import micro_batches
from steering.fast_path import FastPath

# Most of the vector's effect that an adapter may lose. KL(vector || adapter) as a share of
# KL(vanilla || vector), and the mean square of what a . z is off 1, which predicts it.
MAX_LOST = 0.1


def fit_and_measure(model, site, chat, examples, heldout):
    """(input row (features,), how it was fitted), on examples and on the sample of calibration/.

    heldout: Examples to measure it on. How: a dict for JSON, {"missed": of `missed_by_row`,
    "fitted_tokens": how many}.
    """
    sample, sample_heldout = sample_examples(chat)
    row = fit_row(model, site, examples + sample)
    measured_on = heldout + sample_heldout
    products = row_products(model, site, row, measured_on)
    tokens = sum(len(example.input_ids) for example in examples + sample)
    return row, {"missed": missed_by_row(measured_on, products), "fitted_tokens": tokens}


def missed_by_row(examples, products):
    """{kind of token: [mean of a . z, root mean square of what it is off 1]}; 1 and 0 are perfect.

    Kinds: answers (label tokens), prompts and other text. The first token of a text is left out:
    in many models its state is one of a kind, and nothing that is added there is heard.
    """
    kinds = {"answers": [], "prompts": [], "other text": []}
    for example, values in zip(examples, products, strict=True):
        is_label = torch.tensor(example.labels)[1:] >= 0
        rest = "prompts" if is_label.any() else "other text"
        kinds["answers"].append(values[1:][is_label])
        kinds[rest].append(values[1:][~is_label])
    found = {}
    for kind, parts in kinds.items():
        values = torch.cat([torch.empty(0), *parts])
        if len(values):
            off = (values - 1).square().mean().sqrt()
            found[kind] = [values.mean().item(), off.item()]
    return found


def compare_with_adapter(model, site, row, examples):
    """What the model's vector, and the adapter made of it, do to the label tokens of held-out rows.

    In nats a token: {"rows", "tokens", "nll": {"vanilla", "vector", "adapter"}, "kl": KL(vector ||
    adapter), "kl_vector": KL(vanilla || vector), "lost": kl as a share of kl_vector}.
    """
    fast = FastPath(model)
    fast.cache_prefix(examples)
    parts = []
    for batch in micro_batches(examples, MAX_TOKENS):
        products = pad_sequence(row_products(model, site, row, batch), batch_first=True)  # (B, T)
        adapter = functools.partial(as_adapter, model, products)
        contexts = [model.steering_off, contextlib.nullcontext, adapter]
        found = fast.compare(batch, contexts)  # (5, N)
        parts.append(found.double())
    sums = torch.cat(parts, dim=1)
    vanilla, kl_vector, vector, kl, adapter = sums.mean(dim=1).tolist()
    return {
        "rows": len(examples),
        "tokens": sums.shape[1],
        "nll": {"vanilla": vanilla, "vector": vector, "adapter": adapter},
        "kl": kl,
        "kl_vector": kl_vector,
        "lost": kl / max(kl_vector, 1e-9),
    }


def check_loss(fitted, measured):
    """ValueError if an adapter loses more than MAX_LOST of its vector."""
    losses = [measured["lost"]]
    losses += [off**2 for _, off in fitted["missed"].values()]
    if not all(lost <= MAX_LOST for lost in losses):
        raise ValueError(
            f"adapters lose {max(losses):.0%} of this vector, {MAX_LOST:.0%} at most "
            f"({adapter_words(measured)}; {fit_words(fitted)}). --force exports it all the same; "
            "--format peft is exact, for PEFT alone"
        )


def fit_words(fitted):
    """What an input row was fitted on, and where it misses, in a line."""
    missed = [f"{kind} {mean:.2f} +- {off:.2f}" for kind, (mean, off) in fitted["missed"].items()]
    return f"a . z of held-out {', '.join(missed)}; fitted on {fitted['fitted_tokens']:,} tokens"


def adapter_words(measured):
    """What was measured of an adapter, in a line."""
    nll = ", ".join(f"{name} {value:.3f}" for name, value in measured["nll"].items())
    kl = f"{measured['kl']:.2g} of {measured['kl_vector']:.2g} nats, {measured['lost']:.1%}"
    where = f"{measured['tokens']:,} held-out tokens of {measured['rows']} rows"
    return f"NLL {nll}; the adapter is off the vector by KL {kl} ({where})"
