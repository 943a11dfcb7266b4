"""Numbers of an evaluation: paired intervals, recovered fraction, probe and AUROC, text metrics.

Arrays in, numbers out; nothing here knows a model or a file.
"""

import math
import re
import warnings
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

MIN_QUESTIONS = 8  # no interval that is built on fewer covers what it says


def student_t(freedom):
    """The 97.5% quantile of Student's t, to 0.001 from 7 degrees of freedom on.
    By its expansion in those of the normal distribution (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    terms = z, *terms, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return sum(term / freedom**power for power, term in enumerate(terms))


def ratio(values, weights, questions):
    """(sum of values / sum of weights, its 95% interval over questions, or None if they are few).
    All one a row; the rows of a question stay together. A jackknife: what leaving out each question
    in turn does to the ratio, times Student's t. Differences of two conditions, as values, give a
    paired interval."""
    names = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    groups, count = [names[question] for question in questions], len(names)
    values, weights = (np.bincount(groups, np.asarray(x, float), count) for x in (values, weights))
    found = float(values.sum() / weights.sum())
    if count < MIN_QUESTIONS:
        return found, None
    without = (values.sum() - values) / (weights.sum() - weights)  # (Q,)
    half = student_t(count - 1) * math.sqrt(np.square(without - found).sum())
    return found, [found - half, found + half]


def mean_interval(values, questions):
    """{"mean", "interval"} of one number a row, as `ratio` gives them; None without rows."""
    if not len(values):
        return None
    return dict(zip(("mean", "interval"), ratio(values, [1] * len(values), questions), strict=True))


def ranks(values):
    """Ranks from 0, equal values sharing their mean rank: (N,) -> (N,)."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]


def spearman(first, second, questions):
    """(rank correlation of two scores a row, its 95% interval over questions or None).
    None, None where one of them is the same everywhere. A jackknife as `ratio`, of Fisher's z."""

    def correlation(kept):
        a, b = (ranks(np.asarray(scores, float)[kept]) for scores in (first, second))
        if len(a) < 3 or not (a.std() and b.std()):
            return None
        return float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))

    names = np.array(questions)
    found, each = correlation(np.full(len(names), True)), [*dict.fromkeys(questions)]
    without = [correlation(names != question) for question in each]
    if found is None or None in without or len(each) < MIN_QUESTIONS or abs(found) > 1 - 1e-9:
        return found, None
    z, *others = np.arctanh(np.clip([found, *without], -1 + 1e-9, 1 - 1e-9))
    half = student_t(len(each) - 1) * math.sqrt(np.square(np.array(others) - z).sum())
    return found, np.tanh([z - half, z + half]).tolist()


def drift_by_turn(scores):
    """How scores (talks, turns), NaN where there is none, go on: {"by_turn": [mean or None],
    "drift": `mean_interval` over talks of the mean of the later half of turns minus the other}."""
    half = (scores.shape[1] + 1) // 2
    each = [column[~np.isnan(column)] for column in scores.T]
    with warnings.catch_warnings(action="ignore"):  # of talks without a score
        falls = np.nanmean(scores[:, half:], axis=1) - np.nanmean(scores[:, :half], axis=1)
    drift = mean_interval(falls[~np.isnan(falls)], np.flatnonzero(~np.isnan(falls)).tolist())
    return {"by_turn": [float(c.mean()) if len(c) else None for c in each], "drift": drift}


def compare_losses(losses, tokens, questions):
    """Each condition's NLL per token with its interval, and steered minus it, paired.
    losses: {condition: nats a row}, "steered" among them; tokens: label tokens a row."""
    table = {}
    for condition, values in losses.items():
        nll, bounds = ratio(values, tokens, questions)
        row = {"nll": nll, "interval": bounds, "perplexity": math.exp(min(nll, 700.0))}
        if condition != "steered":
            differences = np.subtract(losses["steered"], values)
            paired = ratio(differences, tokens, questions)
            row["steered_minus"], row["steered_minus_interval"] = paired
        table[condition] = row
    return table


def recovered_fraction(losses, tokens, questions):
    """(vanilla - steered) / (vanilla - prompted): how much of prompting's gain the vector gives.
    {"value", "interval"}, or {"value": None, "why"} where the interval of vanilla - prompted does
    not lie above zero: a fraction of no gain says nothing."""
    if "prompted" not in losses:
        return {"value": None, "why": "the rows have no system prompt to prompt with"}
    gains = np.subtract(losses["vanilla"], losses["prompted"])
    gain, bounds = ratio(gains, tokens, questions)
    if bounds is None:
        count = len(set(questions))
        return {"value": None, "why": f"{count} held-out questions, {MIN_QUESTIONS} are needed"}
    if not bounds[0] > 0:  # nor is it NaN
        why = f"prompting does not help: vanilla - prompted {gain:.4f}"
        return {"value": None, "why": f"{why} [{bounds[0]:.4f}, {bounds[1]:.4f}]"}
    value, interval = ratio(np.subtract(losses["vanilla"], losses["steered"]), gains, questions)
    return {"value": value, "interval": interval}


def fit_probe(positive, negative, l2=0.01):
    """Logistic regression on standardized features, as a function (N, n) -> probabilities (N,).
    positive, negative: (N, n) features of the two classes, which weigh the same. l2: weight of the
    penalty |w|^2 / 2 beside the summed loss, for rows scaled to a length of about 1."""
    features = torch.cat([positive, negative]).double()
    mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
    targets = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    weights = torch.cat([torch.full((len(c),), 0.5 / len(c)) for c in (positive, negative)])
    weights = weights.double() * len(features)
    scaled = (features - mean) / spread / math.sqrt(features.shape[1])  # rows of length about 1
    theta = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = scaled @ theta[:-1] + theta[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, weights, reduction="sum"
        )
        value = value + 0.5 * l2 * theta[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    direction, bias = theta.detach()[:-1], theta.detach()[-1]

    def probability(rows):
        scaled = (rows.double() - mean) / spread / math.sqrt(rows.shape[1])
        return torch.sigmoid(scaled @ direction + bias)

    return probability


def auroc(positive, negative):
    """Probability that a positive scores above a negative, ties counting half."""
    positive, negative = np.asarray(positive), np.asarray(negative)
    above = (positive[:, None] > negative).mean()
    return float(above + 0.5 * (positive[:, None] == negative).mean())


def words_of(text):
    """The words of a text, in lower case."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def distinct_words(text):
    """Share of words that are different ones; None without words."""
    words = words_of(text)
    return len(set(words)) / len(words) if words else None


def repeated(text):
    """Share of 4-word sequences that came before, or of 24 characters if that is more: loops of
    signs, or of a script without spaces, have no words."""

    def share(parts, length):
        windows = [tuple(parts[i : i + length]) for i in range(len(parts) - length + 1)]
        return 1 - len(set(windows)) / len(windows) if windows else 0.0

    return max(share(words_of(text), 4), share(" ".join(text.split()), 24))


class TextMetric(NamedTuple):
    """measure: a text -> a number, or None where there is none; form: how its mean is written."""

    measure: Callable
    form: str


# What answers are measured by, one by one: the mean over a condition's answers is in eval.json, and
# a column of the console's table, samples.md, report.md and report.csv. Add an entry to add one.
TEXT_METRICS = {
    "distinct": TextMetric(distinct_words, "{:.2f}"),
    "repeated": TextMetric(repeated, "{:.2f}"),
    "empty": TextMetric(lambda text: float(not text), "{:.2f}"),
    "words": TextMetric(lambda text: float(len(words_of(text))), "{:.0f}"),
}
