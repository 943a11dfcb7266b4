"""Which scale to use a vector at: found on questions that nothing is reported of.

Larger scales show more of the persona and change more of everything else. The budget bounds the
second, as KL(vanilla || steered) on plain rows, and the first decides among what is left.
"""

import math

from evaluation.answers import announce, generate_answers
from evaluation.measures import (
    CHOOSE_TOKENS,
    describe_answers,
    first_tokens,
    nll_of,
    questions_of,
)
from evaluation.prompts import first_rows
from steering.fast_path import FastPath, token_mean

STEP, MAX_SCALE = 0.1, 4.0  # scales are multiples of STEP
FRACTIONS = (1.0, 0.85, 0.7, 0.55)  # of the largest scale within the budget, to answer at
CLOSE = 0.05  # persona scores of a few answers differ by so much by chance


def largest_scale(divergence, budget):
    """The largest multiple of STEP, up to MAX_SCALE, at which divergence(scale) is within the
    budget, 0.0 if none is; divergence grows with the scale."""
    low, high = 0, round(MAX_SCALE / STEP) + 1
    while high - low > 1:
        middle = (low + high) // 2
        within = divergence(round(middle * STEP, 6)) <= budget  # False for NaN
        low, high = (middle, high) if within else (low, middle)
    return round(low * STEP, 6)


def recommend_scale(model, chat, data, vector, probe, budget, sampling, count, max_tokens):
    """{"scale", "candidates", "questions" ...}: the scale of a vector (n,) to use it at.
    Of scales within the budget (nats a token) whose answers to `count` questions have not
    collapsed, the one with the best persona score: the largest of those that are CLOSE to it, since
    the score grows with the scale. Without a probe, the largest of all. scale is None, and "why"
    says it, where there is none. data: an EvalData, of which no held-out row is read."""
    announce("scales, on questions to choose by")
    examples = first_tokens(data.chooser, CHOOSE_TOKENS)
    plain = first_tokens(data.plain_chooser, CHOOSE_TOKENS)
    rows = first_rows(data.chooser, count)
    fast, divergences = FastPath(model), {}
    fast.cache_prefix(plain, max_tokens=max_tokens)

    def divergence(scale):
        if scale not in divergences:
            model.set_vector(vector, scale)
            divergences[scale] = token_mean(fast.divergences, plain, max_tokens)
        return divergences[scale]

    top = largest_scale(divergence, budget)
    seen = {*questions_of([*examples, *plain]), *(row["question"] for row in rows)}
    result = {
        "scale": None, "why": None, "kl_budget": budget, "chosen_on": data.chosen_on,
        "questions": sorted(seen), "candidates": [],
    }  # fmt: skip
    if not (top and rows):
        above = f"KL {divergences[min(divergences)]:.3g} at {min(divergences):g} is over the budget"
        return result | {"why": "no answers were asked for" if top else above}
    with model.steering_off():
        nll = token_mean(nll_of(FastPath(model)), examples, max_tokens)
    yardstick = math.exp(min(nll, 700.0))
    asked, texts = [row["messages"][:-1] for row in rows], {}
    for scale in sorted({round(max(1, round(top * f / STEP)) * STEP, 6) for f in FRACTIONS}):
        model.set_vector(vector, scale)
        texts[scale] = generate_answers(model, chat, asked, sampling)
    described = describe_answers(model, chat, rows, texts, probe, yardstick, max_tokens)
    for scale, about in described.items():
        persona = about["persona"] and about["persona"]["mean"]
        found = {"scale": scale, "kl": divergence(scale), "persona": persona}
        result["candidates"].append(found | {"collapsed": about["collapsed"]})
    usable = [c for c in result["candidates"] if not c["collapsed"]]
    if not usable:
        return result | {"why": "text collapses at every scale that was tried"}
    best = max(c["persona"] or 0.0 for c in usable)
    near = (c["scale"] for c in usable if (c["persona"] or 0.0) >= best - CLOSE)
    return result | {"scale": max(near)}
