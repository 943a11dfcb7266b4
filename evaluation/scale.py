"""Which scale to use a vector at: found on questions that nothing is reported of.

Larger scales show more of the persona and change more of everything else. The budget bounds the
second, as KL(vanilla || steered) on plain rows, and the first decides among what is left.
"""

import contextlib
import functools
import math

from evaluation.answers import DoesNotFit, announce, answers_to
from evaluation.conditions import Condition
from evaluation.likelihood import CHOOSE_TOKENS, nll_of
from evaluation.measures import answer_columns
from evaluation.rows import first_rows, first_tokens, questions_of
from evaluation.table import number_of, steered_name
from steering.fast_path import token_mean

MAX_SCALE = 4.0
TRIES = 10  # scales whose KL is looked at; four are enough where KL grows with the scale's square
NEAR = 0.95  # of the budget is as good as all of it
FRACTIONS = (1.0, 0.85, 0.7, 0.55)  # of the largest scale within the budget, to answer at
CLOSE = 0.05  # Persona scores of a few answers differ by so much by chance.


def rounded(scale):
    """A scale with three digits."""
    return float(f"{scale:.3g}")


def largest_scale(divergence, budget):
    """A scale, at most MAX_SCALE, at which divergence(scale) is between NEAR and all of the budget;
    less where it leaps, 0.0 if none is found within it. divergence grows with the scale."""
    low = 0.0
    high = math.inf
    scale = 1.0
    for _ in range(TRIES):
        found = divergence(scale)
        if found <= budget:  # False for NaN
            low = scale
            if found >= NEAR * budget or scale == MAX_SCALE:
                break
        else:
            high = scale
        # Small changes of the states change KL by their square.
        guess = MAX_SCALE
        if found > 0:
            guess = min(scale * math.sqrt((1 + NEAR) / 2 * budget / found), MAX_SCALE)
        if not low < guess < high:  # also for NaN
            guess = (low + min(high, MAX_SCALE)) / 2
        scale = rounded(guess)
    return low


def divergence_on(reader, vector, plain):
    """A function: scale -> KL(vanilla || steered by a vector (n,)) on plain examples, in nats a
    token. Each scale is looked at once."""
    model = reader.model
    fast = reader.fast
    fast.cache_prefix(plain, max_tokens=reader.max_tokens)
    before_head = {}  # of the plain model, whose states are the same at every scale

    def divergences(batch):
        unsteered = model.steering_off
        if fast.is_fast(batch):  # If not, they are logits, too large to keep.
            key = tuple(map(id, batch))
            if key not in before_head:
                with model.steering_off():
                    before_head[key] = fast.states(batch)
            unsteered = before_head[key]
        return fast.compare(batch, [unsteered, contextlib.nullcontext])[1]

    @functools.cache
    def divergence(scale):
        model.set_vector(vector, scale)
        return token_mean(divergences, plain, reader.max_tokens)

    return divergence


def recommend_scale(reader, writer, data, vector, probe, args):
    """{"scale", "largest", "why", "candidates", "questions" ...}: the scale of a vector (n,) to use
    it at. A generator as `answers_to`. data: an EvalData, of which no held-out row is read; args:
    kl_budget, nats a token, and num_samples, questions to answer at a scale.

    Of scales within the budget whose answers have not collapsed, it is the one with the best
    persona score: the largest of those that are CLOSE to it, since the score grows with the scale.
    Without a probe, the largest of all. largest: the scale that spends the budget. A scale is None,
    and "why" says it, where there is none.
    """
    announce("scales, on questions to choose by")
    examples = first_tokens(data.chooser, CHOOSE_TOKENS)
    plain = first_tokens(data.plain_chooser, CHOOSE_TOKENS)
    rows = first_rows(data.chooser, args.num_samples)
    seen = {*questions_of([*examples, *plain]), *(row["question"] for row in rows)}
    result = {
        "scale": None,
        "largest": None,
        "why": None,
        "kl_budget": args.kl_budget,
        "chosen_on": data.chosen_on,
        "questions": sorted(seen),
        "candidates": [],
    }

    divergence = divergence_on(reader, vector, plain)
    top = largest_scale(divergence, args.kl_budget)
    if not top:
        result["why"] = "KL is over the budget at every scale that was tried"
        return result
    result["largest"] = top
    if not rows:
        result["why"] = "no answers were asked for"
        return result

    # What answers are like at each of some scales, the smallest first.
    asks = {}
    try:
        for scale in sorted({rounded(top * share) for share in FRACTIONS}):
            steered = Condition(steered_name(scale), (vector * scale,))
            asks[scale] = writer.ask_under(steered, rows)
    except DoesNotFit as error:
        result["why"] = str(error)
        return result
    texts = yield from answers_to(asks)
    with reader.model.steering_off():
        nll = token_mean(nll_of(reader.fast), examples, reader.max_tokens)
    yardstick = math.exp(min(nll, 700.0))
    columns = answer_columns(reader, rows, texts, probe, yardstick)
    for scale in texts:
        result["candidates"].append({
            "scale": scale,
            "kl": divergence(scale),
            "persona": number_of(columns["probe"].get(scale)),
            "collapsed": columns["collapsed"][scale],
        })  # fmt: skip

    usable = [found for found in result["candidates"] if not found["collapsed"]]
    if not usable:
        result["why"] = "text collapses at every scale that was tried"
        return result
    best = max(found["persona"] or 0.0 for found in usable)
    near = [f["scale"] for f in usable if (f["persona"] or 0.0) >= best - CLOSE]
    result["scale"] = max(near)
    return result
