"""Numbers of an evaluation: paired intervals, recovered fraction, probe and AUROC, text metrics.

Arrays in, numbers out; nothing here knows a model or a file.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

DRAWS = 2000  # bootstrap resamples of the questions


def resampled_means(values, weights, questions, seed=0):
    """Bootstrap over questions: {name: (sum of values) / (sum of weights) of each resample (D,)}.
    values: {name: one number a row}; weights, questions: one a row. Every name sees the same
    resamples, so differences between names are paired; rows of a question stay together."""
    names = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    groups = np.array([names[question] for question in questions])

    def by_question(numbers):  # (Q,)
        return np.bincount(groups, np.asarray(numbers, dtype=np.float64), len(names))

    picks = np.random.default_rng(seed).integers(0, len(names), (DRAWS, len(names)))
    total = by_question(weights)[picks].sum(axis=1)  # (D,)
    return {name: by_question(v)[picks].sum(axis=1) / total for name, v in values.items()}


def interval(samples):
    """[2.5%, 97.5%] of bootstrap samples."""
    return [float(bound) for bound in np.quantile(samples, [0.025, 0.975])]


def mean_interval(values, questions, seed=0):
    """{"mean", "interval"} of one number a row, bootstrapped over questions; None without rows."""
    if not len(values):
        return None
    samples = resampled_means({"x": values}, np.ones(len(values)), questions, seed)["x"]
    return {"mean": float(np.mean(values)), "interval": interval(samples)}


def compare_losses(losses, tokens, questions, seed=0):
    """Each condition's NLL per token with its interval, and steered minus it, paired.
    losses: {condition: nats a row}, "steered" among them; tokens: label tokens a row."""
    samples = resampled_means(losses, tokens, questions, seed)
    nll = {condition: float(sum(values) / sum(tokens)) for condition, values in losses.items()}
    table = {}
    for condition, value in nll.items():
        table[condition] = {"nll": value, "interval": interval(samples[condition])}
        table[condition]["perplexity"] = math.exp(min(value, 700.0))
        if condition != "steered":
            table[condition]["steered_minus"] = nll["steered"] - value
            difference = samples["steered"] - samples[condition]
            table[condition]["steered_minus_interval"] = interval(difference)
    return table


def recovered_fraction(losses, tokens, questions, seed=0):
    """(vanilla - steered) / (vanilla - prompted): how much of prompting's gain the vector gives.
    {"value", "interval"}, or {"value": None, "why"} where the interval of vanilla - prompted does
    not lie above zero: a fraction of no gain says nothing."""
    if "prompted" not in losses:
        return {"value": None, "why": "the rows have no system prompt to prompt with"}
    samples = resampled_means(losses, tokens, questions, seed)
    nll = {condition: sum(values) / sum(tokens) for condition, values in losses.items()}
    gain = nll["vanilla"] - nll["prompted"]
    low, high = interval(samples["vanilla"] - samples["prompted"])
    if low <= 0:
        why = f"prompting does not help: vanilla - prompted {gain:.4f} [{low:.4f}, {high:.4f}]"
        return {"value": None, "why": why}
    fractions = samples["vanilla"] - samples["steered"]
    fractions = fractions / np.maximum(samples["vanilla"] - samples["prompted"], 1e-9)
    value = float((nll["vanilla"] - nll["steered"]) / gain)
    return {"value": value, "interval": interval(fractions)}


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


def repeated_words(text):
    """Share of 4-word sequences that came before."""
    words = words_of(text)
    fours = list(zip(*(words[i:] for i in range(4)), strict=False))
    return 1 - len(set(fours)) / len(fours) if fours else 0.0


class TextMetric(NamedTuple):
    """measure: a text -> a number, or None where there is none; form: how its mean is written."""

    measure: Callable
    form: str


# What answers are measured by, one by one: the mean over a condition's answers is in eval.json, and
# a column of the console's table, samples.md, report.md and report.csv. Add an entry to add one.
TEXT_METRICS = {
    "distinct": TextMetric(distinct_words, "{:.2f}"),
    "repeated": TextMetric(repeated_words, "{:.2f}"),
    "empty": TextMetric(lambda text: float(not text), "{:.2f}"),
    "words": TextMetric(lambda text: float(len(words_of(text))), "{:.0f}"),
}
