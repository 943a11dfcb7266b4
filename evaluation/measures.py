"""What is measured of a vector: likelihood, answers, persona score, fluency, side effects.

Each function takes a SteerModel and rows, and gives numbers or texts. Vanilla, prompted, steered
and the other conditions are made here and nowhere else. max_tokens: padded tokens a forward pass.
"""

import functools
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from unicodedata import normalize

import numpy as np
import torch

from evaluation.stats import (
    TEXT_METRICS,
    auroc,
    compare_losses,
    fit_probe,
    mean_interval,
    recovered_fraction,
)
from steering.chat_format import IGNORE_INDEX, collate, label_count
from steering.fast_path import FastPath, by_example, example_sums

COEFFICIENTS = tuple(0.25 * 2 ** (i / 2) for i in range(11))  # 0.25 .. 8, of either vector
RANDOM_VECTORS = 3  # of the trained one's norm
OWN_ANSWERS = 32  # questions answered where the data holds nothing without the persona
MIN_AUROC, MIN_ROWS = 0.8, 5  # below these a probe's scores are withheld
# Text has collapsed at a scale if, of its answers, more than this share are empty or repeat
# themselves more than this, or if the median is this many times less likely than real rows.
MAX_EMPTY, MAX_REPEATED, MAX_UNLIKELY = 0.2, 0.5, 3.0


def announce(what):
    """One line to stderr as a pass begins, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


@dataclass
class EvalData:
    """Examples of a dataset by what they are for; no question is in two of the three parts.
    train, validation, heldout: rows of the persona; plain_train, plain_heldout: of the same model
    without it, plain_source saying whose. left_out: held-out rows that had no system prompt, so
    that every condition, prompted too, is of the same rows; all of them are in if none has one."""

    train: list
    validation: list
    heldout: list
    plain_train: list
    plain_heldout: list
    plain_source: str
    left_out: int = 0

    def check(self):
        """AssertionError if a question that is reported on was seen, or chosen by."""
        seen = questions_of([*self.train, *self.validation, *self.plain_train])
        reported = questions_of([*self.heldout, *self.plain_heldout])
        leaked = {*seen} & {*reported}
        assert not leaked, f"{len(leaked)} held-out questions leaked, such as {min(leaked)!r}"


def questions_of(examples):
    """The question of every example."""
    return [example.row["question"] for example in examples]


def answer_examples(chat, rows, texts):
    """Examples of texts as answers to the rows' questions, without persona.
    Left out are empty ones, and such as spell out a special token."""
    kept = []
    for row, text in zip(rows, texts, strict=True):
        if text:
            turns = [*row["messages"][:-1], {"role": "assistant", "content": text}]
            kept.append({**row, "messages": turns})
    return chat.encode_each(kept)[0]


def without_end(examples, chat):
    """The same examples without loss on the end-of-turn token, which cut answers do not have."""
    shorter = [replace(example, labels=list(example.labels)) for example in examples]
    for example in shorter if chat.end_of_turn else ():
        last = max(i for i, label in enumerate(example.labels) if label >= 0)
        example.labels[last] = IGNORE_INDEX
    return shorter


def first_rows(examples, count):
    """The row of each of the first `count` different questions."""
    first = {}
    for example in examples:
        first.setdefault(example.row["question"], example.row)
    return list(first.values())[:count]


def token_nll(logits, targets):
    """Negative log-likelihood in nats: logits (N, V), targets (N,) -> (N,).
    What every reported number is made of, whatever loss the training minimized."""
    return -logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def nll_sums(fast, examples, max_tokens):
    """NLL of each example in nats, summed over its label tokens."""
    per_token = functools.partial(fast.losses, token_loss=token_nll)
    return example_sums(per_token, examples, max_tokens)


def mean_nll(model, examples, vectors, max_tokens):
    """NLL a label token of the examples under each vector (n,): a list."""
    fast, tokens, result = FastPath(model), sum(map(label_count, examples)), []
    fast.cache_prefix(examples, max_tokens=max_tokens)
    for vector in vectors:
        model.set_vector(vector)
        result.append(sum(nll_sums(fast, examples, max_tokens)) / tokens)
    return result


def choose_coefficients(model, examples, directions, max_tokens):
    """{name: {"chosen", "nll": {coefficient: NLL}}}: the best coefficient of each direction.
    examples: of validation questions; directions: {name: vector (n,)}."""
    result = {}
    for name, direction in directions.items():
        announce(f"{len(COEFFICIENTS)} coefficients of {name}, on questions to choose by")
        vectors = [direction * coefficient for coefficient in COEFFICIENTS]
        losses = mean_nll(model, examples, vectors, max_tokens)
        curve = dict(zip(COEFFICIENTS, losses, strict=True))
        result[name] = {"chosen": min(curve, key=curve.get), "nll": curve}
    return result


def heldout_losses(model, chat, examples, vectors, max_tokens):
    """{condition: nats of each example}, the same response tokens in every condition.
    vectors: {condition: [vector (n,), ...]}, the mean over its vectors counts. There is a prompted
    condition only if every row has a system prompt."""
    fast, losses = FastPath(model), {}
    fast.cache_prefix(examples, max_tokens=max_tokens)
    with model.steering_off():
        announce("held-out rows: vanilla")
        losses["vanilla"] = nll_sums(fast, examples, max_tokens)
        if all(example.row["system_prompt"] for example in examples):
            announce("held-out rows: prompted")
            prompted = chat.encode([example.row for example in examples], prompted=True)
            check_prompted(prompted, examples, chat)
            losses["prompted"] = nll_sums(fast, prompted, max_tokens)
    for condition, directions in vectors.items():
        announce(f"held-out rows: {condition}")
        each = []
        for direction in directions:
            model.set_vector(direction)
            each.append(nll_sums(fast, examples, max_tokens))
        losses[condition] = np.mean(each, axis=0).tolist()
    return losses


def likelihood(model, chat, data, vector, difference, tokens, max_tokens, seed):
    """Coefficients by validation questions, NLL table and recovered fraction on held-out ones.
    vector: the trained one (n,); difference: the mean one (n,); tokens: of rows to choose by."""
    directions = {"steered": vector, "mean_difference": difference}
    chooser = data.validation or data.train
    total = np.cumsum([len(example.input_ids) for example in chooser])
    chooser = chooser[: int(np.searchsorted(total, tokens)) + 1]
    chosen = choose_coefficients(model, chooser, directions, max_tokens)
    seeded = torch.Generator().manual_seed(seed)
    noise = torch.randn(RANDOM_VECTORS, len(vector), generator=seeded)
    vectors = {
        "random": list(noise / noise.norm(dim=1, keepdim=True) * vector.norm()),
        "mean_difference": [difference * chosen["mean_difference"]["chosen"]],
        "steered": [vector],
    }
    if chosen["steered"]["chosen"] != 1.0:
        vectors["steered_chosen"] = [vector * chosen["steered"]["chosen"]]
    losses = heldout_losses(model, chat, data.heldout, vectors, max_tokens)
    scored, questions = list(map(label_count, data.heldout)), questions_of(data.heldout)
    counts = {"rows": len(scored), "tokens": sum(scored)}
    chosen_on = "validation questions" if data.validation else "training questions"
    return {
        "heldout": {**counts, "questions": len({*questions}), "left_out": data.left_out},
        "likelihood": compare_losses(losses, scored, questions),
        "recovered": recovered_fraction(losses, scored, questions),
        "coefficients": {"chosen_on": chosen_on, **chosen},
    }


def check_prompted(prompted, examples, chat):
    """AssertionError unless the prompt is there, and the tokens scored are the same ones."""
    for with_prompt, without in zip(prompted, examples, strict=True):
        text = chat.tokenizer.decode(with_prompt.input_ids)
        text, prompt = (normalize("NFC", t) for t in (text, with_prompt.row["system_prompt"]))
        assert prompt.strip() in text, "the prompted row has no prompt"
        scored = [[t for t in e.labels if t >= 0] for e in (with_prompt, without)]
        assert len(scored[0]) == len(scored[1]), "the prompt changed which tokens are scored"


@dataclass(frozen=True)
class Sampling:
    """How answers are written: at most max_new_tokens, temperature (0: greedy), batch_size rows."""

    max_new_tokens: int = 80
    temperature: float = 0.7
    seed: int = 0
    batch_size: int = 8


def seeded_noise(conversations, sampling):
    """A logits processor under which the greedy choice is a sample at the temperature.
    Gumbel noise of a generator for each row, which its messages and the seed decide: an answer does
    not depend on the batch that it is written in."""
    generators = []
    for turns in conversations:
        digest = hashlib.sha256(json.dumps([sampling.seed, turns]).encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))

    def processor(input_ids, scores):  # scores: (B, V)
        rows = [torch.empty(scores.shape[1]).exponential_(generator=g) for g in generators]
        return scores.float() / sampling.temperature - torch.stack(rows).log().to(scores.device)

    return processor


@torch.no_grad()
def generate_answers(model, chat, conversations, sampling):
    """One answer per list of messages, as text, each cut at the end of its (left-padded) prompt.
    Sampled from the model's whole distribution at the temperature, 0: greedily."""
    from transformers import GenerationConfig

    stop_ids = model.model.generation_config.eos_token_id
    stop_ids = {*(stop_ids if isinstance(stop_ids, list) else [stop_ids]), chat.end_of_turn_id}
    stop_ids = sorted(stop_ids - {None})
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options |= {"eos_token_id": stop_ids or None, "pad_token_id": [*stop_ids, 0][0]}
    options |= {"repetition_penalty": 1.0, "max_new_tokens": sampling.max_new_tokens}
    answers, own = [], model.model.generation_config
    model.model.generation_config = GenerationConfig()  # nothing of the model's own taste
    try:
        for start in range(0, len(conversations), sampling.batch_size):
            batch = conversations[start : start + sampling.batch_size]
            if sampling.temperature:
                options["logits_processor"] = [seeded_noise(batch, sampling)]
            inputs = chat.inputs(batch, model.input_device)
            answers += chat.answers(inputs, model.generate(**inputs, **options), stop_ids)
    finally:
        model.model.generation_config = own
    return answers


def compare_answers(model, chat, rows, directions, sampling):
    """{condition: an answer to each row's question}, rows being those of `first_rows`.
    directions: {condition: vector (n,)}, besides vanilla and prompted."""
    if not rows:
        return {}
    plain = [row["messages"][:-1] for row in rows]
    with model.steering_off():
        announce("answers: vanilla")
        answers = {"vanilla": generate_answers(model, chat, plain, sampling)}
        if all(row["system_prompt"] for row in rows):
            announce("answers: prompted")
            prompted = [chat.messages(row, prompted=True)[:-1] for row in rows]
            answers["prompted"] = generate_answers(model, chat, prompted, sampling)
    for condition, direction in directions.items():
        announce(f"answers: {condition}")
        model.set_vector(direction)
        answers[condition] = generate_answers(model, chat, plain, sampling)
    return answers


def add_own_answers(model, chat, data, sampling):
    """Fill in plain rows by the model's own unsteered answers to the same questions."""
    announce("answers of the model's own, in place of plain rows")
    data.plain_source = "the model's own answers"
    for part, plain in ((data.train, "plain_train"), (data.heldout, "plain_heldout")):
        rows = first_rows(part, OWN_ANSWERS)
        with model.steering_off():
            turns = [row["messages"][:-1] for row in rows]
            texts = generate_answers(model, chat, turns, sampling)
        setattr(data, plain, answer_examples(chat, rows, texts))
    if not (data.plain_train and data.plain_heldout):
        raise ValueError("no row without the persona, and all answers of the plain model are empty")


@torch.no_grad()
def response_means(model, examples, max_tokens):
    """Mean of the plain residual stream at the layer over each example's label tokens: (N, n) fp32.
    On the host. Raises ValueError for an example without label tokens."""
    if not all(map(label_count, examples)):
        raise ValueError("an example has no label token: nothing to take the mean of")
    fast = FastPath(model)

    def average(batch):
        ids, labels = collate(batch)
        states = fast.layer_output(ids.to(model.input_device)).float()  # (B, T, n)
        carries = (labels >= 0).to(states)[:, :, None]  # (B, T, 1)
        return ((states * carries).sum(1) / carries.sum(1)).cpu()

    with model.steering_off():
        rows = by_example(average, examples, max_tokens)
    return torch.stack(rows) if rows else torch.empty(0, model.hidden_size)


def train_probe(persona, plain, persona_heldout, plain_heldout):
    """Fit a linear probe: (probe, or None if withheld; report with held-out AUROC and row counts).
    All four are mean states (N, n), the first two of training questions. probe: states (N, n) ->
    probability of the persona (N,). It is withheld, so that nothing is scored by it, where rows are
    too few or it cannot tell the two apart."""
    sizes = list(map(len, (persona, plain, persona_heldout, plain_heldout)))
    report = {"rows": dict(zip(("train", "plain", "heldout", "plain_heldout"), sizes, strict=True))}
    for fitted, scored in ((persona, persona_heldout), (plain, plain_heldout)):
        same = {tuple(row) for row in fitted.tolist()} & {tuple(row) for row in scored.tolist()}
        assert not same, "the probe is scored on rows that it was fitted on"
    if min(sizes) < MIN_ROWS:
        why = f"too few rows for a probe ({sizes}; {MIN_ROWS} of each are needed)"
        return None, report | {"auroc": None, "withheld": why}
    probe = fit_probe(persona, plain)
    value = auroc(probe(persona_heldout), probe(plain_heldout))
    if value < MIN_AUROC:
        why = f"cannot tell persona from plain: held-out AUROC {value:.2f}"
        return None, report | {"auroc": value, "withheld": why}
    return probe, report | {"auroc": value, "withheld": None}


def describe_answers(model, chat, rows, answers, probe, yardstick, max_tokens):
    """{condition: what its answers are like}: TEXT_METRICS, perplexity, persona, collapsed.
    Answers are read by the plain model, after the question alone. yardstick: perplexity to it of
    real rows of the persona."""
    if answers:
        announce(f"reading the answers of {len(answers)} conditions")
    result, fast = {}, FastPath(model)
    for condition, texts in answers.items():
        examples = without_end(answer_examples(chat, rows, texts), chat)
        about = {"perplexity": None, "persona": None}
        for name, metric in TEXT_METRICS.items():
            values = [v for v in map(metric.measure, texts) if v is not None]
            about[name] = float(np.mean(values)) if values else None
        if examples:
            with model.steering_off():
                losses = nll_sums(fast, examples, max_tokens)
            counts = map(label_count, examples)
            nll = [loss / count for loss, count in zip(losses, counts, strict=True)]
            about["perplexity"] = math.exp(min(float(np.median(nll)), 700.0))
            if probe:
                scores = probe(response_means(model, examples, max_tokens)).tolist()
                about["persona"] = mean_interval(scores, questions_of(examples))
        unlikely = (about["perplexity"] or math.inf) > MAX_UNLIKELY * yardstick
        broken = about["empty"] > MAX_EMPTY or about["repeated"] > MAX_REPEATED
        result[condition] = about | {"collapsed": bool(broken or unlikely)}
    return result


def side_effects(model, examples, directions, max_tokens):
    """{condition: {"mean", "interval"}}: KL(vanilla || steered) in nats a token, on plain rows."""
    announce(f"side effects on plain rows: {', '.join(directions)}")
    fast, result = FastPath(model), {}
    fast.cache_prefix(examples, max_tokens=max_tokens)
    tokens, questions = list(map(label_count, examples)), questions_of(examples)
    for condition, direction in directions.items():
        model.set_vector(direction)
        sums = example_sums(fast.divergences, examples, max_tokens)
        per_token = [value / count for value, count in zip(sums, tokens, strict=True)]
        result[condition] = mean_interval(per_token, questions)
    return result
