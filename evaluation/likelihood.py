"""Likelihood: how probable the persona's own answers are under each condition.

    losses, missing = condition_losses(reader, conditions, examples)

Every condition scores the same tokens, those of the rows' answers.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np

from evaluation.answers import DoesNotFit, announce, check_length
from evaluation.conditions import check_prompted
from evaluation.rows import first_tokens
from evaluation.shared_prefix import after_shared_prefix
from steering.chat_format import ChatFormat
from steering.fast_path import FastPath, example_sums, token_mean

LEAST, MOST = -2.0, 3.0  # octaves: coefficients from 1/4 to 8
CHOOSE_TOKENS = 4_000  # of rows to choose by, at most


@dataclass
class Reader:
    """What reads examples: a SteerModel, its ChatFormat, padded tokens a forward pass, and the
    FastPath that keeps what layers 0..k make of the rows that are read more than once.
    probe_layer: the layer whose states tell the persona, if it is not that of the vector;
    known_means: what `probe_states` has found there."""

    model: object
    chat: ChatFormat
    max_tokens: int
    fast: FastPath = None
    probe_layer: int | None = None
    known_means: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.fast is None:
            self.fast = FastPath(self.model)


def token_nll(logits, targets):
    """Negative log-likelihood in nats: logits (N, V), targets (N,) -> (N,).
    What every reported number is made of, whatever loss the training minimized."""
    return -logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def nll_of(fast):
    """A function: examples -> NLL of their label tokens (N,), for `example_sums`, `token_mean`."""
    return functools.partial(fast.losses, token_loss=token_nll)


def nll_under(fast, examples, max_tokens):
    """A function: vector (n,) -> NLL a label token of the examples under it. fast: a FastPath."""
    fast.cache_prefix(examples, max_tokens=max_tokens)

    def nll(vector):
        fast.model.set_vector(vector)
        return token_mean(nll_of(fast), examples, max_tokens)

    return nll


def condition_losses(reader, conditions, examples):
    """({condition: nats of each example}, {condition: why it is not there}) of those to score."""
    model = reader.model
    fast = reader.fast
    fast.cache_prefix(examples, max_tokens=reader.max_tokens)
    losses = {}
    missing = {}
    for condition in conditions:
        if not condition.scored:
            continue
        announce(f"held-out rows: {condition.name}")
        if condition.prompt:
            try:
                losses[condition.name] = prompted_losses(reader, condition, examples)
            except DoesNotFit as error:
                missing[condition.name] = str(error)
            continue
        each = []
        for vector in condition.vectors:
            model.set_vector(vector)
            each.append(example_sums(nll_of(fast), examples, reader.max_tokens))
        if not condition.vectors:
            with model.steering_off():
                each.append(example_sums(nll_of(fast), examples, reader.max_tokens))
        losses[condition.name] = np.mean(each, axis=0).tolist()
    return losses, missing


def prompted_losses(reader, condition, examples):
    """Nats of each example's answer under a condition's prompt, of the plain model."""
    prompted = reader.chat.encode(condition.prompt([e.row for e in examples]), prompted=True)
    check_prompted(reader.chat, examples, prompted)
    check_length(reader.model, max(len(example.input_ids) for example in prompted))
    with reader.model.steering_off():
        shared = after_shared_prefix(reader.model.model, prompted, token_nll, reader.max_tokens)
        if shared:
            return [nats.sum().item() for nats in shared]
        return example_sums(nll_of(reader.fast), prompted, reader.max_tokens)


def choose_coefficients(reader, data, directions):
    """{"chosen_on", name: {"chosen", "nll": {coefficient: NLL}}}: the coefficient of each direction
    that makes rows of the questions to choose by most likely.
    data: an EvalData; directions: {name: vector (n,)}."""
    result = {"chosen_on": data.chosen_on}
    examples = first_tokens(data.chooser, CHOOSE_TOKENS)
    nll = nll_under(reader.fast, examples, reader.max_tokens)
    for name, direction in directions.items():
        announce(f"coefficients of {name}, on questions to choose by")
        curve = search_coefficient(lambda c, direction=direction: nll(direction * c))
        result[name] = {"chosen": min(curve, key=curve.get), "nll": curve}
    return result


def search_coefficient(nll):
    """{coefficient: NLL} of those tried for the least of nll(coefficient), which has one valley.
    From 1 by octaves until it is bracketed, then by half ones: some six, between 1/4 and 8.
    Not a number, which is never more nor less than another, counts as infinite."""
    tried = {}
    best = 0.0
    for step in (1.0, 0.5):
        before = None
        while best != before:
            for octave in (best, best - step, best + step):
                if octave not in tried and LEAST <= octave <= MOST:
                    found = nll(2.0**octave)
                    tried[octave] = math.inf if math.isnan(found) else found
            before = best
            best = min(tried, key=tried.get)
    return {2.0**octave: tried[octave] for octave in sorted(tried)}
