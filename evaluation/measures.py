"""What is measured of each condition: one entry a measure, and the functions that find them.

A column is {condition: value}; `add_column` of evaluation/table.py puts it into the table, from
where every output takes it. To add a measure of single answers, add an entry with `of_answer`. To
add another one, add an entry, and give its column to `add_columns` where eval_steering.py does.
"""

import contextlib
import math

import numpy as np
import torch

from evaluation.answers import announce, answer_examples, without_end
from evaluation.likelihood import nll_of
from evaluation.probe import persona_scores
from evaluation.rows import first_tokens, questions_of
from evaluation.stats import (
    distinct_words,
    is_empty,
    mean_interval,
    ratio,
    recovered_fractions,
    repeated,
    word_count,
)
from evaluation.table import TRAINED, Measure, add_column
from steering.chat_format import label_count
from steering.fast_path import FastPath, by_example, example_sums

PLAIN_TOKENS = 8_000  # of plain rows that side effects are measured on, at most
# Text has collapsed if, of its answers, more than this share are empty or repeat themselves more
# than this, or if the median is this many times less likely than real rows of the persona.
MAX_EMPTY = 0.2
MAX_REPEATED = 0.5
MAX_UNLIKELY = 3.0

MEASURES = [
    Measure(
        "nll",
        "likelihood",
        "{:.4f}",
        unit="nats a token",
        better="lower",
        about="negative log-likelihood of the persona's held-out answers",
    ),
    Measure("perplexity", "likelihood", "{:.2f}", better="lower", about="the exponential of nll"),
    Measure(
        "steered_minus",
        "likelihood",
        "{:+.3f}",
        unit="nats a token",
        about="nll of the vector as it was trained minus this nll, paired by question",
    ),
    Measure(
        "recovered",
        "likelihood",
        "{:.2f}",
        better="higher",
        about="(vanilla - this) / (vanilla - prompted) of nll: 1 is the system prompt's gain",
    ),
    Measure(
        "probe",
        "answers",
        "{:.2f}",
        better="higher",
        about="probability of the persona, by a linear probe on the plain model's states",
    ),
    Measure(
        "text_perplexity",
        "answers",
        "{:.1f}",
        better="lower",
        about="perplexity of the median answer to the plain model",
    ),
    Measure(
        "distinct",
        "answers",
        "{:.2f}",
        better="higher",
        about="share of the words that are different ones",
        of_answer=distinct_words,
    ),
    Measure(
        "repeated",
        "answers",
        "{:.2f}",
        better="lower",
        about="share of sequences of 4 words or 24 characters that came before",
        of_answer=repeated,
    ),
    Measure(
        "empty",
        "answers",
        "{:.2f}",
        better="lower",
        about="share of the answers that are empty",
        of_answer=is_empty,
    ),
    Measure("words", "answers", "{:.0f}", about="words of an answer", of_answer=word_count),
    Measure(
        "collapsed",
        "answers",
        "{}",
        better="lower",
        about="whether text is empty, repeats itself or is unlikely",
    ),
    Measure(
        "kl",
        "answers",
        "{:.3f}",
        unit="nats a token",
        better="lower",
        about="KL(vanilla || this) on plain rows: what else the vector changes",
    ),
    Measure(
        "kl_p95",
        "answers",
        "{:.2f}",
        unit="nats a token",
        better="lower",
        about="the 95th percentile over tokens of that KL: what it does to the worst of them",
    ),
]


def add_columns(result, columns):
    """Put {measure: {condition: value}} into an evaluation's dict, in the order of MEASURES."""
    for measure in MEASURES:
        if measure.name in columns:
            add_column(result, measure, columns[measure.name])


def likelihood_columns(losses, examples):
    """Columns of `condition_losses`, and why "recovered" is not among them, or None.
    losses: {condition: nats of each example}, vanilla and TRAINED among them."""
    tokens = [label_count(example) for example in examples]
    questions = questions_of(examples)
    nll = {}
    perplexity = {}
    minus = {}
    for condition, values in losses.items():
        nll[condition] = ratio(values, tokens, questions)
        perplexity[condition] = math.exp(min(nll[condition]["mean"], 700.0))
        if condition != TRAINED:
            minus[condition] = ratio(np.subtract(losses[TRAINED], values), tokens, questions)
    recovered, why_not = recovered_fractions(losses, tokens, questions)
    columns = {"nll": nll, "perplexity": perplexity, "steered_minus": minus, "recovered": recovered}
    return columns, why_not


def answer_columns(reader, rows, texts, probe, yardstick):
    """Columns of what answers are like. Answers are read by the plain model, after the question
    alone. texts: {condition: answers to the rows}; probe: of `train_probe`, or None; yardstick:
    perplexity to the plain model of real rows of the persona."""
    columns = {measure.name: {} for measure in MEASURES if measure.of_answer}
    columns |= {"probe": {}, "text_perplexity": {}, "collapsed": {}}
    model = reader.model
    for condition, answers in texts.items():
        for measure in MEASURES:
            if measure.of_answer:
                found = [measure.of_answer(text) for text in answers]
                found = [value for value in found if value is not None]
                if found:
                    columns[measure.name][condition] = float(np.mean(found))

        perplexity = math.inf
        examples = without_end(answer_examples(reader.chat, rows, answers), reader.chat)
        if examples:
            fast = FastPath(model)  # One pass: the probe reads what layers 0..k make for the rest.
            fast.cache_prefix(examples, max_tokens=reader.max_tokens)
            with model.steering_off():
                losses = example_sums(nll_of(fast), examples, reader.max_tokens)
            nll = np.array(losses) / list(map(label_count, examples))
            perplexity = math.exp(min(float(np.median(nll)), 700.0))
            columns["text_perplexity"][condition] = perplexity
            if probe:
                scores = persona_scores(reader, probe, examples, fast)
                asked = questions_of(examples)
                columns["probe"][condition] = mean_interval(scores, asked, (0, 1))
        columns["collapsed"][condition] = (
            columns["empty"][condition] > MAX_EMPTY
            or columns["repeated"][condition] > MAX_REPEATED
            or perplexity > MAX_UNLIKELY * yardstick
        )
    return columns


def side_effect_columns(reader, conditions, examples):
    """Columns of KL(vanilla || condition) in nats a token on plain rows, its mean and its 95th
    percentile, of all conditions that answer under a vector."""
    steered = [condition for condition in conditions if condition.vectors and condition.answered]
    announce(f"side effects on plain rows: {', '.join(c.name for c in steered)}")
    model = reader.model
    examples = first_tokens(examples, PLAIN_TOKENS)
    fast = reader.fast
    fast.cache_prefix(examples, max_tokens=reader.max_tokens)

    def divergences(batch):
        with model.steering_off():
            plain = fast.states(batch)
        found = []
        for condition in steered:
            model.set_vector(*condition.vectors)
            found.append(fast.compare(batch, [plain, contextlib.nullcontext])[1])
        each = torch.stack(found, dim=1).cpu()  # (N, C)
        return each.split([label_count(example) for example in batch])

    rows = by_example(divergences, examples, reader.max_tokens)  # of each example (tokens, C)
    sums = np.array([row.sum(dim=0).tolist() for row in rows])
    highest = np.quantile(torch.cat(rows).numpy(), 0.95, axis=0)
    tokens = list(map(label_count, examples))
    questions = questions_of(examples)
    columns = {"kl": {}, "kl_p95": {}}
    for number, condition in enumerate(steered):
        columns["kl"][condition.name] = ratio(sums[:, number], tokens, questions)
        columns["kl_p95"][condition.name] = float(highest[number])
    return columns
