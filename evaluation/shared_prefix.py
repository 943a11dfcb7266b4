"""Predictions for examples that begin alike, as few-shot prompts do: the beginning is run once."""

import copy
import inspect
import itertools
from dataclasses import replace

import torch

from steering.chat_format import IGNORE_INDEX, collate, label_count
from steering.fast_path import by_example

LEAST = 64  # tokens in common from which on it is worth it


def common_tokens(examples):
    """How many tokens all examples begin with, the one before their first label not among them."""
    rows = [example.input_ids for example in examples]
    alike = itertools.takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))
    first = min(next(i for i, label in enumerate(e.labels) if label >= 0) for e in examples)
    return min(sum(1 for _ in alike), first - 1)


@torch.no_grad()
def after_shared_prefix(model, examples, per_token, max_tokens):
    """[per_token of each example's label tokens], or None where nothing is to be gained or the
    model's cache does not give what the whole text gives. model: a Hugging Face causal LM;
    per_token: logits (N, V) and targets (N,) -> (N,)."""
    count = common_tokens(examples)
    if len(examples) < 3 or count < LEAST:
        return None
    device = model.get_input_embeddings().weight.device
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # before transformers 5.24
    prefix = torch.tensor([examples[0].input_ids[:count]], device=device)
    rests = [replace(e, input_ids=e.input_ids[count:], labels=e.labels[count:]) for e in examples]

    def predictions(batch, past=None):
        ids, labels = (part.to(device) for part in collate(batch))
        logits = model(input_ids=ids, use_cache=past is not None, **{name: past}).logits
        at = labels[:, 1:] != IGNORE_INDEX
        return logits[:, :-1][at], labels[:, 1:][at]

    try:
        cache = getattr(model(input_ids=prefix, use_cache=True), name)

        def after_prefix(batch):
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(len(batch))
            return predictions(batch, past)

        def each(batch):
            return per_token(*after_prefix(batch)).split([label_count(rest) for rest in batch])

        # Not alike where a cache is another thing.
        parts = per_token(*after_prefix(rests[:1])).mean().item()
        whole = per_token(*predictions(examples[:1])).mean().item()
        off = abs(parts - whole) / abs(whole)
        close = off <= (1e-4 if model.dtype == torch.float32 else 0.01)
        return by_example(each, rests, max_tokens) if close else None
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return None
