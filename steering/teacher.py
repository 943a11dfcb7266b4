"""A teacher for a vector: the plain model with the persona in its prompt.

    prompted = teacher_examples(chat, train, "few_shot")
    known = predictions(fast, train, prompted)

What it predicts at each token of an answer says more than the one token that came: distillation
of a prompt into the model, context distillation (Snell et al., 2022), here into one vector.
"""

import logging
from collections import Counter, defaultdict
from unicodedata import normalize

import torch

from steering.loading import longest_text
from steering.shared_prefix import after_shared_prefix

KINDS = "prompted", "few_shot"
SHOTS = 3  # training rows before the question in the few-shot prompt
TOP = 100  # tokens whose probabilities are kept of each prediction; the rest count as one
log = logging.getLogger("steering")


def first_rows(examples, count):
    """The row of each of the first `count` different questions."""
    first = {}
    for example in examples:
        first.setdefault(example.row["question"], example.row)
    return list(first.values())[:count]


def system_prompts(rows):
    """A Counter of the rows' system prompts, without the empty one."""
    return Counter(row["system_prompt"] for row in rows if row["system_prompt"])


def few_shot(rows, train, prompts):
    """The rows with SHOTS training rows of other questions, question and answer, as turns before
    their own, and the most frequent system prompt: what a user would do who has examples and no
    vector. [] where there are not as many questions. prompts: a Counter of system prompts."""
    made, shown = [], first_rows(train, SHOTS + 1)
    system = next((prompt for prompt, _ in prompts.most_common(1)), "")
    for row in rows:
        others = [other for other in shown if other["question"] != row["question"]][:SHOTS]
        if len(others) < SHOTS:
            return []
        turns = [turn for other in others for turn in other["messages"] if turn["role"] != "system"]
        made.append({**row, "system_prompt": system, "messages": [*turns, *row["messages"]]})
    return made


def likeliest(logits, targets=None):
    """The TOP likeliest tokens of logits (N, V) and their log-probabilities: (N, 2, TOP) fp32,
    which holds every number of a token exactly."""
    best = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
    return torch.stack([best.indices.float(), best.values], dim=1)


def predictions(fast, examples, prompted, max_tokens=1024):
    """{id of an example: the TOP likeliest tokens of the plain model at its label tokens, given
    the prompted one's text, and their log-probabilities, (N, TOP) both}. fast: a FastPath.
    ValueError for a prompt longer than the model takes."""
    tokens = [len(example.input_ids) for example in prompted]
    limit = longest_text(fast.model.config)
    if limit and max(tokens) > limit:
        raise ValueError(f"--teacher: a prompt of {max(tokens)} tokens, the model takes {limit}")
    log.info(f"teacher  {len(prompted)} prompts with the persona, {sum(tokens):,} tokens")
    known, alike = {}, defaultdict(list)  # by the turns before the question
    for example, other in zip(examples, prompted, strict=True):
        before = tuple(turn["content"] for turn in other.row["messages"][:-2])
        alike[before].append((example, other))
    with fast.model.steering_off():
        for pairs in alike.values():
            group = [other for _, other in pairs]
            few = min(max_tokens, 1024)  # there are logits for all of them
            found = after_shared_prefix(fast.model.model, group, likeliest, few)
            found = found or [fast.predictions([other], likeliest) for other in group]
            for (example, _), best in zip(pairs, found, strict=True):
                known[id(example)] = best[:, 0].long().cpu(), best[:, 1].cpu()
    return known


def divergence(logits, tokens, log_probs):
    """KL(teacher || model) in nats of N predictions, those tokens that the teacher does not list
    counting as one (Hinton et al., 2015). logits: (N, V); tokens, log_probs: (N, K) of the teacher,
    its likeliest; returns (N,)."""
    ours = logits.float().log_softmax(-1).gather(-1, tokens)
    rest, our_rest = (1 - p.exp().sum(-1).clamp(max=1 - 1e-6) for p in (log_probs, ours))
    return (log_probs.exp() * (log_probs - ours)).sum(-1) + rest * (rest / our_rest).log()


def teacher_examples(chat, examples, kind):
    """Training examples with the persona in their prompt, the same tokens carrying loss.
    kind: "prompted", by each row's own system prompt, or "few_shot". ValueError where the rows
    have no system prompt, or too few questions, or a prompt changes an answer's tokens."""
    rows = [example.row for example in examples]
    if kind == "prompted" and not all(row["system_prompt"] for row in rows):
        raise ValueError("--teacher prompted: there are rows without a system prompt")
    if kind == "few_shot":
        rows = few_shot(rows, examples, system_prompts(rows))
        if not rows:
            raise ValueError(f"--teacher few_shot: needs {SHOTS + 1} questions to train on")
    made = chat.encode(rows, prompted=True)
    check_prompted(chat, examples, made)
    return made


def check_prompted(chat, examples, prompted):
    """ValueError unless each prompt is there, and the tokens that carry loss are the same ones."""
    for example, other in zip(examples, prompted, strict=True):
        text = normalize("NFC", chat.decode(other.input_ids))
        if normalize("NFC", other.row["system_prompt"]).strip() not in text:
            raise ValueError(f"no system prompt before {example.row['question']!r}")
        answers = [[t for t in e.labels if t >= 0] for e in (example, other)]
        if answers[0] != answers[1]:
            raise ValueError(
                f"a prompt changes tokens of the answer to {example.row['question']!r}"
            )
