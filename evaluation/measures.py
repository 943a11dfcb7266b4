"""What is measured of a vector: likelihood, persona score, fluency, side effects, and its scale.

Each function takes a SteerModel and rows, and gives numbers. max_tokens: padded tokens a forward
pass. The answers are those of evaluation/answers.py.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.answers import (
    announce,
    answer_examples,
    converse,
    plain_answers,
    prompted_rows,
    too_long,
    without_end,
)
from evaluation.prompts import check_prompted, first_rows
from evaluation.shared_prefix import after_shared_prefix
from evaluation.stats import (
    TEXT_METRICS,
    auroc,
    compare_losses,
    drift_by_turn,
    fit_probe,
    mean_interval,
    ratio,
    recovered_fraction,
)
from steering.chat_format import collate, label_count
from steering.fast_path import FastPath, by_example, example_sums, token_mean

OCTAVES = -2.0, 3.0  # coefficients from 1/4 to 8
RANDOM_VECTORS = 3  # of the trained one's norm
CHOOSE_TOKENS, MEAN_TOKENS = 4_000, 40_000  # of rows to choose by; to take mean states of, at most
PLAIN_TOKENS = 8_000  # of plain rows that side effects are measured on, at most
OWN_ANSWERS = 32  # questions answered where the data holds nothing without the persona
MIN_AUROC, MIN_ROWS = 0.8, 5  # below these a probe's scores are withheld
# Text has collapsed at a scale if, of its answers, more than this share are empty or repeat
# themselves more than this, or if the median is this many times less likely than real rows.
MAX_EMPTY, MAX_REPEATED, MAX_UNLIKELY = 0.2, 0.5, 3.0


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

    @property
    def chosen_on(self):
        """Whose questions coefficients and scales are chosen by."""
        return "validation questions" if self.validation else "training questions"

    @property
    def chooser(self):
        """Examples of the questions to choose by."""
        return self.validation or self.train

    @property
    def plain_chooser(self):
        """Plain examples of these questions, else of all training ones."""
        asked = {*questions_of(self.chooser)}
        return [e for e in self.plain_train if e.row["question"] in asked] or self.plain_train

    def check(self, chosen_by=()):
        """AssertionError if a question that is reported on was seen, or chosen by."""
        seen = [*questions_of([*self.train, *self.validation, *self.plain_train]), *chosen_by]
        reported = questions_of([*self.heldout, *self.plain_heldout])
        leaked = {*seen} & {*reported}
        assert not leaked, f"{len(leaked)} held-out questions leaked, such as {min(leaked)!r}"


def questions_of(examples):
    """The question of every example."""
    return [example.row["question"] for example in examples]


def token_nll(logits, targets):
    """Negative log-likelihood in nats: logits (N, V), targets (N,) -> (N,).
    What every reported number is made of, whatever loss the training minimized."""
    return -logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def nll_of(fast):
    """A function: examples -> NLL of their label tokens (N,), for `example_sums`, `token_mean`."""
    return functools.partial(fast.losses, token_loss=token_nll)


def mean_nll(model, examples, vectors, max_tokens):
    """NLL a label token of the examples under each vector (n,): a list."""
    fast, result = FastPath(model), []
    fast.cache_prefix(examples, max_tokens=max_tokens)
    for vector in vectors:
        model.set_vector(vector)
        result.append(token_mean(nll_of(fast), examples, max_tokens))
    return result


def search_coefficient(nll):
    """{coefficient: NLL} of those tried for the least of nll(coefficient), which has one valley.
    From 1 by octaves until it is bracketed, then by half ones: some six, between 1/4 and 8."""
    tried, best = {}, 0.0
    for step in (1.0, 0.5):
        before = None
        while best != before:
            for octave in (best, best - step, best + step):
                if octave not in tried and OCTAVES[0] <= octave <= OCTAVES[1]:
                    tried[octave] = nll(2.0**octave)
            before, best = best, min(tried, key=tried.get)
    return {2.0**octave: tried[octave] for octave in sorted(tried)}


def choose_coefficients(model, examples, directions, max_tokens):
    """{name: {"chosen", "nll": {coefficient: NLL}}}: the best coefficient of each direction.
    examples: of questions to choose by; directions: {name: vector (n,)}."""
    fast, result = FastPath(model), {}
    fast.cache_prefix(examples, max_tokens=max_tokens)
    for name, direction in directions.items():
        announce(f"coefficients of {name}, on questions to choose by")

        def nll(coefficient, direction=direction):
            model.set_vector(direction, coefficient)
            return token_mean(nll_of(fast), examples, max_tokens)

        curve = search_coefficient(nll)
        result[name] = {"chosen": min(curve, key=curve.get), "nll": curve}
    return result


def heldout_losses(model, chat, examples, vectors, max_tokens, train=()):
    """{condition: nats of each example}, the same response tokens in every condition.
    vectors: {condition: [vector (n,), ...]}, the mean over its vectors counts. train: examples for
    the few-shot prompt. There is a prompted condition only if every row has a system prompt."""
    fast, losses = FastPath(model), {}
    fast.cache_prefix(examples, max_tokens=max_tokens)
    with model.steering_off():
        announce("held-out rows: vanilla")
        losses["vanilla"] = example_sums(nll_of(fast), examples, max_tokens)
        for condition, rows in prompted_rows([e.row for e in examples], train).items():
            announce(f"held-out rows: {condition}")
            prompted = chat.encode(rows, prompted=True)
            check_prompted(chat, examples, prompted)
            if too_long(model, [example.input_ids for example in prompted]):
                continue
            shared = after_shared_prefix(model.model, prompted, token_nll, max_tokens)
            sums = [nats.sum().item() for nats in shared] if shared else None
            losses[condition] = sums or example_sums(nll_of(fast), prompted, max_tokens)
    for condition, directions in vectors.items():
        announce(f"held-out rows: {condition}")
        each = []
        for direction in directions:
            model.set_vector(direction)
            each.append(example_sums(nll_of(fast), examples, max_tokens))
        losses[condition] = np.mean(each, axis=0).tolist()
    return losses


def first_tokens(examples, tokens):
    """The first examples, up to the one that reaches so many tokens."""
    total = np.cumsum([len(example.input_ids) for example in examples])
    return examples[: int(np.searchsorted(total, tokens)) + 1]


def likelihood(model, chat, data, vector, difference, scale, max_tokens, seed):
    """Coefficients by questions to choose by, NLL table and recovered fraction on held-out ones.
    vector: the trained one (n,); difference: the mean one (n,); scale: the recommended, or None."""
    directions = {"steered": vector, "mean_difference": difference}
    chooser = first_tokens(data.chooser, CHOOSE_TOKENS)
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
    if scale not in (None, 1.0, chosen["steered"]["chosen"]):
        vectors["steered_recommended"] = [vector * scale]
    losses = heldout_losses(model, chat, data.heldout, vectors, max_tokens, data.train)
    scored, questions = list(map(label_count, data.heldout)), questions_of(data.heldout)
    counts = {"rows": len(scored), "tokens": sum(scored)}
    return {
        "heldout": {**counts, "questions": len({*questions}), "left_out": data.left_out},
        "likelihood": compare_losses(losses, scored, questions),
        "recovered": recovered_fraction(losses, scored, questions),
        "coefficients": {"chosen_on": data.chosen_on, **chosen},
    }


def add_own_answers(model, chat, data, sampling, kept):
    """Fill in plain rows by the model's own unsteered answers to the same questions."""
    announce("answers of the model's own, in place of plain rows")
    data.plain_source = "the model's own answers"
    seen = first_rows(data.train, OWN_ANSWERS) + first_rows(data.validation, OWN_ANSWERS // 4)
    heldout = first_rows(data.heldout, OWN_ANSWERS)
    for rows, plain in ((seen, "plain_train"), (heldout, "plain_heldout")):
        turns = [row["messages"][:-1] for row in rows]
        texts = plain_answers(model, chat, turns, sampling, kept)
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
    """Fit a linear probe: (probe, or None of too few rows; report with held-out AUROC and counts).
    All four are mean states (N, n), the first two of training questions. probe: states (N, n) ->
    probability of the persona (N,). "withheld" says why no score is to be reported, if so: rows are
    too few, or it cannot tell the held-out ones apart."""
    sizes = list(map(len, (persona, plain, persona_heldout, plain_heldout)))
    report = {"rows": dict(zip(("train", "plain", "heldout", "plain_heldout"), sizes, strict=True))}
    for fitted, scored in ((persona, persona_heldout), (plain, plain_heldout)):
        same = {tuple(row) for row in fitted.tolist()} & {tuple(row) for row in scored.tolist()}
        assert not same, "the probe is scored on rows that it was fitted on"
    probe = fit_probe(persona, plain) if min(sizes[:2]) >= MIN_ROWS else None
    if min(sizes) < MIN_ROWS:
        why = f"too few rows for a probe ({sizes}; {MIN_ROWS} of each are needed)"
        return probe, report | {"auroc": None, "withheld": why}
    value = auroc(probe(persona_heldout), probe(plain_heldout))
    if value < MIN_AUROC:
        why = f"cannot tell persona from plain: held-out AUROC {value:.2f}"
        return probe, report | {"auroc": value, "withheld": why}
    return probe, report | {"auroc": value, "withheld": None}


def describe_answers(model, chat, rows, answers, probe, yardstick, max_tokens):
    """{condition: what its answers are like}: TEXT_METRICS, perplexity, persona, collapsed.
    Answers are read by the plain model, after the question alone. yardstick: perplexity to it of
    real rows of the persona."""
    result, fast = {}, FastPath(model)
    for condition, texts in answers.items():
        examples = without_end(answer_examples(chat, rows, texts), chat)
        about = {"perplexity": None, "persona": None}
        for name, metric in TEXT_METRICS.items():
            values = [v for v in map(metric.measure, texts) if v is not None]
            about[name] = float(np.mean(values)) if values else None
        if examples:
            with model.steering_off():
                losses = example_sums(nll_of(fast), examples, max_tokens)
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
    fast, examples = FastPath(model), first_tokens(examples, PLAIN_TOKENS)
    fast.cache_prefix(examples, max_tokens=max_tokens)

    def divergences(batch):
        with model.steering_off():
            plain = fast.states(batch)
        found = []
        for direction in directions.values():
            model.set_vector(direction)
            found.append(fast.compare(batch, [plain, contextlib.nullcontext])[1])
        return torch.stack(found, dim=1)  # (N, D)

    sums = example_sums(divergences, examples, max_tokens)
    about = list(map(label_count, examples)), questions_of(examples)
    found = (ratio(row, *about) for row in zip(*sums, strict=True))
    return {c: {"mean": kl, "interval": i} for c, (kl, i) in zip(directions, found, strict=True)}


def persona_by_turn(model, chat, talks, probe, max_tokens):
    """`drift_by_turn` of the persona scores of what `converse` gave; None without a probe.
    Each answer is read as one to its own question alone; an empty one has no score."""
    if not probe:
        return None
    rows, texts = [], [pair["answer"] for pairs in talks for pair in pairs]
    for at, question in enumerate(pair["question"] for pairs in talks for pair in pairs):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        rows.append({"question": question, "system_prompt": "", "messages": turns, "at": at})
    scores = np.full((len(talks), len(talks[0])), np.nan)
    examples = without_end(answer_examples(chat, rows, texts), chat)
    found = probe(response_means(model, examples, max_tokens)).tolist() if examples else []
    scores.flat[[example.row["at"] for example in examples]] = found
    return drift_by_turn(scores)


def conversations(model, chat, turns, scale, system_prompt, probe, sampling, kept, max_tokens):
    """{condition: {"talks": what `converse` gave, "persona": `persona_by_turn` of them}}: vanilla,
    prompted, if there is a system prompt, and steered by `scale` times the vector that is set.
    kept: answers of the plain model."""
    used = {"vanilla": ("", 0), "prompted": (system_prompt, 0), f"steered x{scale:g}": ("", scale)}
    result = {}
    for condition, (prompt, factor) in used.items():
        if condition == "prompted" and not prompt:
            continue
        announce(f"conversations of {turns} turns: {condition}")
        with model.scaled(factor):
            talks = converse(model, chat, turns, prompt, sampling, None if factor else kept)
        persona = persona_by_turn(model, chat, talks, probe, max_tokens)
        result[condition] = {"talks": talks, "persona": persona}
    return result


def specificity(runs, limit, nll):
    """NLL of each persona's held-out rows under each vector, among runs of one model and layer.
    runs: Run objects, of which `limit` a group count, since every vector meets every persona;
    nll(run, vectors): of a run's held-out rows. A list of {"model", "layer", "runs", "nll":
    [vector][persona], "vanilla"}."""
    groups, matrices = {}, []
    for run in runs:
        groups.setdefault((run.args["model"], run.args["layer"]), []).append(run)
    for (model, layer), group in groups.items():
        if len(group) > 1:
            members = group[:limit]
            announce(f"{len(members)} vectors on each other's held-out rows")
            vectors = [*(run.vector for run in members), torch.zeros_like(members[0].vector)]
            *rows, vanilla = np.array([nll(run, vectors) for run in members]).T.tolist()
            matrix = {"model": model, "layer": layer, "nll": rows, "vanilla": vanilla}
            matrices.append({**matrix, "runs": [str(run.folder) for run in members]})
    return matrices
