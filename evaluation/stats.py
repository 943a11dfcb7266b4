"""Numbers of an evaluation: paired intervals, recovered fraction, probe and AUROC, text metrics.

Arrays in, numbers out; nothing here knows a model or a file. An interval is a dict
{"mean", "low", "high", "n"}: 95% over n questions, low and high None where n is too small.
"""

import math
import re
import warnings
from statistics import NormalDist

import numpy as np
import torch

MIN_QUESTIONS = 8  # An interval that is built on fewer does not cover what it says.
DRAWS = 20_000  # of random weights


def student_t(freedom):
    """The 97.5% quantile of Student's t, to 0.001 from 7 degrees of freedom on.
    By its expansion in those of the normal distribution (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def by_question(values, weights, questions):
    """Sums over the rows of each question: (values (Q,), weights (Q,)). All three one a row."""
    numbers = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    groups = [numbers[question] for question in questions]
    return np.bincount(groups, values), np.bincount(groups, weights)


def jackknife(values, weights, questions):
    """(Sum of values / sum of weights, what leaving out each question does to it (Q,))."""
    values, weights = by_question(values, weights, questions)
    mean = float(values.sum() / weights.sum())
    with np.errstate(invalid="ignore"):  # A single question leaves nothing.
        without = (values.sum() - values) / (weights.sum() - weights)
    return mean, without - mean


def ratio(values, weights, questions, least=MIN_QUESTIONS):
    """Sum of values / sum of weights with its interval over questions, by a jackknife.

    All one a row; the rows of a question stay together. Differences of two conditions, as values,
    give a paired interval. least: questions that it takes.
    """
    mean, changes = jackknife(values, weights, questions)
    found = {"mean": mean, "low": None, "high": None, "n": len(changes)}
    if len(changes) >= least:
        half = student_t(len(changes) - 1) * math.sqrt(np.square(changes).sum())
        found["low"] = mean - half
        found["high"] = mean + half
    return found


def quotient(first, second, weights, questions):
    """(Sum of first / sum of second) with its interval over questions, by Fieller's theorem: all
    ratios r for which first - r * second may be 0 in the mean. It holds where the second is close
    to 0, too. All one a row, of MIN_QUESTIONS or more, and the interval of the second, as `ratio`
    gives it, above 0: there is none of this otherwise.
    """
    a, a_changes = jackknife(first, weights, questions)
    b, b_changes = jackknife(second, weights, questions)
    squared = student_t(len(b_changes) - 1) ** 2
    x = b * b - squared * np.square(b_changes).sum()  # above 0 where b's interval is
    y = a * b - squared * (a_changes * b_changes).sum()
    z = a * a - squared * np.square(a_changes).sum()
    spread = math.sqrt(max(y * y - x * z, 0.0))
    low = (y - spread) / x
    high = (y + spread) / x
    return {"mean": a / b, "low": low, "high": high, "n": len(b_changes)}


def mean_interval(values, questions, scale=None):
    """Mean of one number a row with its interval over questions; None without rows.

    scale: (lowest, highest) that a number can be, if there are such. Then the interval is within
    them, and holds where nearly all numbers are at one end, by Gaffke's bound: the means of what
    was seen, weighted at random (Dirichlet), with the end of the scale as one more number.
    """
    if not len(values):
        return None
    ones = [1] * len(values)
    found = ratio(values, ones, questions)
    if scale is not None and found["n"] >= MIN_QUESTIONS:
        sums, counts = by_question(values, ones, questions)
        each = sums / counts
        draws = np.random.default_rng(0).dirichlet(np.ones(len(each) + 1), DRAWS)
        weights = draws[:, 1:]  # The rest is that of an end.
        lowest, highest = scale
        found["low"] = float(lowest + np.quantile(weights @ (each - lowest), 0.025))
        found["high"] = float(highest - np.quantile(weights @ (highest - each), 0.025))
    return found


def ranks(values):
    """Ranks from 0, equal values sharing their mean rank: (N,) -> (N,)."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[group]


def correlation(first, second):
    """Rank correlation of two arrays (N,); None where one of them is the same everywhere."""
    first = ranks(first)
    second = ranks(second)
    if len(first) < 3 or not first.std() or not second.std():
        return None
    return float(np.clip(np.corrcoef(first, second)[0, 1], -1.0, 1.0))


def spearman(first, second, questions):
    """Rank correlation of two scores a row with its interval over questions; None where one of
    them is the same everywhere. A jackknife as in `ratio`, of Fisher's z."""
    first = np.asarray(first, float)
    second = np.asarray(second, float)
    questions = np.array(questions)
    mean = correlation(first, second)
    if mean is None:
        return None
    names = list(dict.fromkeys(questions.tolist()))
    found = {"mean": mean, "low": None, "high": None, "n": len(names)}
    without = []
    for name in names:
        rest = questions != name
        without.append(correlation(first[rest], second[rest]))
    if len(names) < MIN_QUESTIONS or None in without or abs(mean) > 1 - 1e-9:
        return found
    z = np.arctanh(mean)
    others = np.arctanh(np.clip(without, -1 + 1e-9, 1 - 1e-9))
    half = student_t(len(names) - 1) * math.sqrt(np.square(others - z).sum())
    found["low"] = float(np.tanh(z - half))
    found["high"] = float(np.tanh(z + half))
    return found


def drift_by_turn(scores):
    """How scores (talks, turns), NaN where there is none, go on: {"by_turn": [mean or None],
    "drift": `mean_interval` over talks of the mean of the later half of turns minus the other}."""
    half = (scores.shape[1] + 1) // 2
    with warnings.catch_warnings(action="ignore"):  # of turns, and talks, without a score
        means = np.nanmean(scores, axis=0)
        falls = np.nanmean(scores[:, half:], axis=1) - np.nanmean(scores[:, :half], axis=1)
    by_turn = [None if math.isnan(mean) else mean for mean in means.tolist()]
    there = np.flatnonzero(~np.isnan(falls))
    return {"by_turn": by_turn, "drift": mean_interval(falls[there], there.tolist())}


def recovered_fractions(losses, tokens, questions):
    """(vanilla - condition) / (vanilla - prompted): how much of prompting's gain each one gives.

    losses: {condition: nats a row}; tokens: label tokens a row. Returns ({condition: fraction with
    its interval}, None), or ({}, why) where the interval of vanilla - prompted does not lie above
    zero: a fraction of no gain says nothing.
    """
    if "prompted" not in losses:
        return {}, "there is no prompted condition"
    gains = np.subtract(losses["vanilla"], losses["prompted"])
    gain = ratio(gains, tokens, questions)
    if gain["low"] is None:
        return {}, f"{gain['n']} held-out questions, {MIN_QUESTIONS} are needed"
    if not gain["low"] > 0:  # nor is it NaN
        found = f"{gain['mean']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}]"
        return {}, f"prompting does not help: vanilla - prompted {found}"
    fractions = {}
    for condition, values in losses.items():
        if condition not in ("vanilla", "prompted"):
            gained = np.subtract(losses["vanilla"], values)
            fractions[condition] = quotient(gained, gains, tokens, questions)
    return fractions, None


def fit_probe(positive, negative, l2=0.01):
    """Logistic regression on standardized features, as a function (N, n) -> probabilities (N,).

    positive, negative: (N, n) features of the two classes, which weigh the same. l2: weight of the
    penalty |w|^2 / 2 beside the summed loss, for rows scaled to a length of about 1.
    """
    features = torch.cat([positive, negative]).double()
    mean = features.mean(dim=0)
    spread = features.std(dim=0) + 1e-6

    def scaled(rows):  # to a length of about 1
        return (rows.double() - mean) / spread / math.sqrt(rows.shape[1])

    inputs = scaled(features)
    targets = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    weights = torch.cat([torch.full((len(c),), 0.5 / len(c)) for c in (positive, negative)])
    weights = weights.double() * len(features)
    theta = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = inputs @ theta[:-1] + theta[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets, weights, reduction="sum"
        )
        value = value + 0.5 * l2 * theta[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    theta = theta.detach()

    def probability(rows):
        return torch.sigmoid(scaled(rows) @ theta[:-1] + theta[-1])

    return probability


def auroc(positive, negative):
    """Probability that a positive scores above a negative, ties counting half."""
    positive = np.asarray(positive)[:, None]
    negative = np.asarray(negative)
    return float((positive > negative).mean() + 0.5 * (positive == negative).mean())


def words_of(text):
    """The words of a text, in lower case."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def word_count(text):
    """How many words a text has."""
    return float(len(words_of(text)))


def is_empty(text):
    """1.0 for a text without a character, else 0.0."""
    return float(not text)


def distinct_words(text):
    """Share of words that are different ones; None without words."""
    words = words_of(text)
    if not words:
        return None
    return len(set(words)) / len(words)


def repeated_share(parts, length):
    """Share of the sequences of `length` parts that came before."""
    windows = [tuple(parts[i : i + length]) for i in range(len(parts) - length + 1)]
    if not windows:
        return 0.0
    return 1 - len(set(windows)) / len(windows)


def repeated(text):
    """Share of 4-word sequences that came before, or of 24 characters if that is more: loops of
    signs, or of a script without spaces, have no words."""
    characters = " ".join(text.split())
    return max(repeated_share(words_of(text), 4), repeated_share(characters, 24))
