"""What is measured of a vector: likelihood, answers, persona score, fluency, side effects.

Each function takes the model and rows and gives numbers or texts; eval_steering.py calls them in
turn. Vanilla, prompted, steered and the other conditions are made here and nowhere else.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

import data_filter as df
from chat_format import IGNORE_INDEX
from data_layouts import find_datasets, plain_rows
from eval_stats import auroc, fit_probe, mean_interval, text_statistics
from hook_model import example_sums, label_count, response_means
from train_steering import prepare

COEFFICIENTS = tuple(0.25 * 2 ** (i / 2) for i in range(11))  # 0.25 .. 8, of either vector
OWN_ANSWERS = 32  # questions answered where the data holds nothing without the persona
MIN_AUROC, MIN_ROWS = 0.8, 5  # below these a probe's scores are withheld
# Text has collapsed at a scale if, of its answers, more than this share are empty or repeat
# themselves more than this, or if the median is this many times less likely than real rows.
MAX_EMPTY, MAX_REPEATED, MAX_UNLIKELY = 0.2, 0.5, 3.0


# ------------------------------------------------------------------ rows


@dataclass
class EvalData:
    """Examples of a dataset by what they are for; no question is in two of the three parts.

    train, validation, heldout: rows of the persona; plain_train, plain_heldout: of the same model
    without it, plain_source saying whose.
    """

    train: list
    validation: list
    heldout: list
    plain_train: list
    plain_heldout: list
    plain_source: str

    def check(self):
        """AssertionError if a question that is reported on was seen, or chosen by."""
        seen = questions_of([*self.train, *self.validation, *self.plain_train])
        reported = questions_of([*self.heldout, *self.plain_heldout])
        leaked = {*seen} & {*reported}
        assert not leaked, f"{len(leaked)} held-out questions leaked, such as {min(leaked)!r}"


def questions_of(examples):
    """The question of every example."""
    return [example.row["question"] for example in examples]


def heldout_examples(name, chat, datasets, args, tokens):
    """Examples of held-out questions, up to `tokens` of them; ValueError if there is none."""
    filtered = df.filter_dataset(name, datasets, args)
    _, rows = df.split_by_question(filtered.rows, args.heldout_fraction, args.split_seed)
    examples, _, _ = df.take_budget(rows, chat, tokens, args.max_length, args.seed)
    if not examples:
        raise ValueError(
            f"{name}: no row of a held-out question is kept (--heldout-fraction "
            f"{args.heldout_fraction}; {filtered.counts()})"
        )
    return examples


def load_data(name, chat, args, tokens):
    """EvalData of a run's dataset: the rows it trained on, and up to `tokens` held-out tokens.

    Raises ValueError if no row of a held-out question is kept.
    """
    datasets = find_datasets(args.data_root, args.source_model, args.kind)
    train, validation, _ = prepare(name, datasets, chat, args)
    heldout = heldout_examples(name, chat, datasets, args, tokens)
    rows, source = plain_rows(name, datasets)
    groups = df.split_by_question(rows, args.heldout_fraction, args.split_seed)
    budgets = sum(len(example.input_ids) for example in train), tokens
    plain = [
        df.take_budget(group, chat, budget, args.max_length, args.seed)[0]
        for group, budget in zip(groups, budgets, strict=True)
    ]
    return EvalData(train, validation, heldout, *plain, source)


def answer_examples(chat, rows, texts):
    """Examples of texts as answers to the rows' questions, without persona; empty ones left out."""
    kept = []
    for row, text in zip(rows, texts, strict=True):
        if text:
            turns = [*row["messages"][:-1], {"role": "assistant", "content": text}]
            kept.append({**row, "messages": turns})
    return chat.encode(kept)


def without_end(examples, chat):
    """The same examples without loss on the end-of-turn token, which cut answers do not have."""
    shorter = []
    for example in examples:
        labels = list(example.labels)
        if chat.end_of_turn:
            last = max(i for i, label in enumerate(labels) if label >= 0)
            labels[last] = IGNORE_INDEX
        shorter.append(replace(example, labels=labels))
    return shorter


def first_rows(examples, count):
    """The row of each of the first `count` different questions."""
    first = {}
    for example in examples:
        first.setdefault(example.row["question"], example.row)
    return list(first.values())[:count]


def within_budget(examples, tokens):
    """The first examples that make up the tokens."""
    total = np.cumsum([len(example.input_ids) for example in examples])
    return examples[: int(np.searchsorted(total, tokens)) + 1]


# ------------------------------------------------------------------ likelihood


def choose_coefficients(model, examples, directions, args, bar):
    """{name: {"chosen", "nll": {coefficient: NLL}}}: the best coefficient of each direction.

    examples: of validation questions; directions: {name: vector (n,)}.
    """
    tokens = sum(map(label_count, examples))
    model.cache_prefix(examples, max_tokens=args.micro_batch_tokens)
    result = {}
    for name, direction in directions.items():
        curve = {}
        for coefficient in COEFFICIENTS:
            bar.next(f"coefficient {coefficient:.2g} of {name}")
            model.set_vector(direction, coefficient)
            losses = example_sums(model.losses, examples, args.micro_batch_tokens)
            curve[coefficient] = sum(losses) / tokens
        result[name] = {"chosen": min(curve, key=curve.get), "nll": curve}
    return result


def heldout_losses(model, chat, examples, vectors, args, bar):
    """{condition: nats of each example}, the same response tokens in every condition.

    vectors: {condition: [vector (n,), ...]}, the mean over its vectors counts. There is a prompted
    condition only if every row has a system prompt.
    """
    losses, limit = {}, args.micro_batch_tokens
    model.cache_prefix(examples, max_tokens=limit)
    with model.steering_off():
        bar.next("held-out: vanilla")
        losses["vanilla"] = example_sums(model.losses, examples, limit)
        bar.next("held-out: prompted")
        if all(example.row["system_prompt"] for example in examples):
            prompted = chat.encode([example.row for example in examples], prompted=True)
            check_prompted(prompted, examples, chat)
            losses["prompted"] = example_sums(model.losses, prompted, limit)
    for condition, directions in vectors.items():
        bar.next(f"held-out: {condition}")
        each = []
        for direction in directions:
            model.set_vector(direction)
            each.append(example_sums(model.losses, examples, limit))
        losses[condition] = np.mean(each, axis=0).tolist()
    return losses


def check_prompted(prompted, examples, chat):
    """AssertionError unless the prompt is there, and the tokens scored are the same ones."""
    for with_prompt, without in zip(prompted, examples, strict=True):
        text = chat.tokenizer.decode(with_prompt.input_ids)
        assert with_prompt.row["system_prompt"].strip() in text, "the prompted row has no prompt"
        scored = [[t for t in e.labels if t >= 0] for e in (with_prompt, without)]
        assert len(scored[0]) == len(scored[1]), "the prompt changed which tokens are scored"


# ------------------------------------------------------------------ answers


@torch.no_grad()
def generate_answers(model, chat, conversations, options):
    """One answer per list of messages, as text, each cut at the end of its (left-padded) prompt.

    options: a namespace with max_new_tokens, temperature (0 is greedy), seed, batch_size.
    """
    stop_ids = model.model.generation_config.eos_token_id
    stop_ids = {*(stop_ids if isinstance(stop_ids, list) else [stop_ids]), chat.end_of_turn_id}
    stop_ids = sorted(stop_ids - {None})
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    torch.manual_seed(options.seed)
    answers = []
    for start in range(0, len(conversations), options.batch_size):
        batch = conversations[start : start + options.batch_size]
        inputs = chat.inputs(batch, model.input_device)
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop_ids or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
            repetition_penalty=1.0,
            **sampling,
        )
        answers += chat.answers(inputs, output, stop_ids)
    return answers


def compare_answers(model, chat, rows, directions, args, bar):
    """{condition: an answer to each row's question}, rows being those of `first_rows`.

    directions: {condition: vector (n,)}, besides vanilla and prompted.
    """
    if not rows:
        return {}
    plain = [row["messages"][:-1] for row in rows]
    with model.steering_off():
        bar.next("answers: vanilla")
        answers = {"vanilla": generate_answers(model, chat, plain, args)}
        bar.next("answers: prompted")
        if all(row["system_prompt"] for row in rows):
            prompted = [chat.messages(row, prompted=True)[:-1] for row in rows]
            answers["prompted"] = generate_answers(model, chat, prompted, args)
    for condition, direction in directions.items():
        bar.next(f"answers: {condition}")
        model.set_vector(direction)
        answers[condition] = generate_answers(model, chat, plain, args)
    return answers


def add_own_answers(model, chat, data, args, bar):
    """Fill in plain rows by the model's own unsteered answers to the same questions."""
    data.plain_source = "the model's own answers"
    with model.steering_off():
        rows = first_rows(data.train, OWN_ANSWERS)
        texts = generate_answers(model, chat, [row["messages"][:-1] for row in rows], args)
        data.plain_train = answer_examples(chat, rows, texts)
        bar.next("the model's own answers to held-out questions")
        rows = first_rows(data.heldout, OWN_ANSWERS)
        texts = generate_answers(model, chat, [row["messages"][:-1] for row in rows], args)
        data.plain_heldout = answer_examples(chat, rows, texts)
    if not (data.plain_train and data.plain_heldout):
        raise ValueError("no row without the persona, and all answers of the plain model are empty")


# ------------------------------------------------------------------ what answers are like


def train_probe(persona, plain, persona_heldout, plain_heldout):
    """(function: mean states (N, n) -> probability of the persona (N,), or None; what it is worth).

    Fitted on training questions; its AUROC is of held-out ones. None, so that nothing is scored by
    it, where rows are too few or it cannot tell the two apart.
    """
    sizes = list(map(len, (persona, plain, persona_heldout, plain_heldout)))
    about = {"rows": dict(zip(("train", "plain", "heldout", "plain_heldout"), sizes, strict=True))}
    for fitted, scored in ((persona, persona_heldout), (plain, plain_heldout)):
        same = {tuple(row) for row in fitted.tolist()} & {tuple(row) for row in scored.tolist()}
        assert not same, "the probe is scored on rows that it was fitted on"
    if min(sizes) < MIN_ROWS:
        why = f"too few rows for a probe ({sizes}; {MIN_ROWS} of each are needed)"
        return None, about | {"auroc": None, "withheld": why}
    probe = fit_probe(persona, plain)
    value = auroc(probe(persona_heldout), probe(plain_heldout))
    about |= {"auroc": value, "withheld": None}
    if value < MIN_AUROC:
        about["withheld"] = f"cannot tell persona from plain: held-out AUROC {value:.2f}"
        return None, about
    return probe, about


def describe_answers(model, chat, rows, answers, probe, yardstick, args, bar):
    """{condition: what its answers are like}: persona by probe, fluency, and if text collapsed.

    Answers are read by the plain model, after the question alone. yardstick: perplexity to it of
    real rows of the persona.
    """
    result, questions = {}, [row["question"] for row in rows]
    for condition, texts in answers.items():
        bar.next(f"reading: {condition}")
        asked = [q for q, text in zip(questions, texts, strict=True) if text]
        examples = without_end(answer_examples(chat, rows, texts), chat)
        statistics = [text_statistics(text) for text in texts]
        distinct = [s["distinct"] for s in statistics if s["distinct"] is not None]
        about = {"empty": 1 - len(asked) / len(texts), "perplexity": None, "persona": None}
        about["words"] = float(np.mean([s["words"] for s in statistics]))
        about["distinct"] = float(np.mean(distinct)) if distinct else None
        about["repeated"] = float(np.mean([s["repeated"] for s in statistics]))
        if examples:
            with model.steering_off():
                losses = example_sums(model.losses, examples, args.micro_batch_tokens)
            counts = map(label_count, examples)
            nll = [loss / count for loss, count in zip(losses, counts, strict=True)]
            about["perplexity"] = math.exp(min(float(np.median(nll)), 700.0))
            if probe:
                means = response_means(model, examples, args.micro_batch_tokens)
                about["persona"] = mean_interval(probe(means).tolist(), asked, args.seed)
        unlikely = (about["perplexity"] or math.inf) > MAX_UNLIKELY * yardstick
        broken = about["empty"] > MAX_EMPTY or about["repeated"] > MAX_REPEATED
        result[condition] = about | {"collapsed": bool(broken or unlikely)}
    return result


def side_effects(model, examples, directions, args, bar):
    """{condition: {"mean", "interval"}}: KL(vanilla || steered) in nats a token, on plain rows."""
    result = {}
    model.cache_prefix(examples, max_tokens=args.micro_batch_tokens)
    tokens, questions = list(map(label_count, examples)), questions_of(examples)
    for condition, direction in directions.items():
        bar.next(f"side effects: {condition}")
        model.set_vector(direction)
        sums = example_sums(model.divergences, examples, args.micro_batch_tokens)
        per_token = [value / count for value, count in zip(sums, tokens, strict=True)]
        result[condition] = mean_interval(per_token, questions, args.seed)
    return result
