"""Answers: how they are written, under which prompts and vectors, and to which questions.

Vanilla, prompted, few-shot and steered answers are made here and nowhere else. What the plain model
answers, prompted or not, is kept in a file: the runs of a model share it.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, replace

import torch

from evaluation.prompts import few_shot, system_prompts
from steering.chat_format import IGNORE_INDEX
from steering.loading import longest_text

MAX_PROMPTS = 5  # different system prompts of a dataset to try, the most frequent
IDENTITY = (  # what an assistant and a persona answer differently
    "Who are you?",
    "What is your name?",
    "Where do you come from?",
    "Are you playing a role right now?",
    "Are you an AI language model?",
)
EVERYDAY = (  # the turns of a conversation, in any order
    "What should I cook for dinner tonight?",
    "I slept badly again. Any idea what I could do about it?",
    "My neighbor plays loud music every evening. How do I talk to him?",
    "Can you explain to me how a bank loan works?",
    "I have to write a short speech for my sister's wedding. How do I begin?",
    "What is a good way to learn a new language?",
    "My houseplant has yellow leaves. What is wrong with it?",
    "Which book would you recommend for a long train ride?",
    "I feel stuck in my job. What would you do?",
    "How do I pack a suitcase for a week in the rain?",
)


def announce(what):
    """One line to stderr as a pass begins, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


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
def generate_answers(model, chat, conversations, sampling, streamer=None):
    """One answer per list of messages, as text, each cut at the end of its (left-padded) prompt.
    Sampled from the model's whole distribution at the temperature, 0: greedily. streamer: a
    transformers streamer, that sees the tokens of a single conversation as they come."""
    from transformers import GenerationConfig

    stop_ids = model.model.generation_config.eos_token_id
    stop_ids = {*(stop_ids if isinstance(stop_ids, list) else [stop_ids]), chat.end_of_turn_id}
    stop_ids = sorted(stop_ids - {None})
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options |= {"eos_token_id": stop_ids or None, "pad_token_id": [*stop_ids, 0][0]}
    options |= {"repetition_penalty": 1.0, "max_new_tokens": sampling.max_new_tokens}
    options |= {"streamer": streamer} if streamer else {}
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


def plain_answers(model, chat, conversations, sampling, kept):
    """`generate_answers` of the plain model; those that are in `kept` are not written again."""
    how = sampling.max_new_tokens, sampling.temperature, sampling.seed
    keys = [kept.key(*how, turns) for turns in conversations]
    missing = dict(zip(keys, conversations, strict=True))
    missing = {key: turns for key, turns in missing.items() if key not in kept.found}
    with model.steering_off():
        texts = generate_answers(model, chat, list(missing.values()), sampling)
    for (key, turns), text in zip(missing.items(), texts, strict=True):
        kept.add(key, turns=list(turns), answer=text)
    return [kept.found[key]["answer"] for key in keys]


def prompted_rows(rows, train, each_prompt=False):
    """{condition: the rows, to be prompted with by `chat.messages(row, prompted=True)`}.
    prompted: by the row's own system prompt, if each has one; few_shot: `few_shot`; each_prompt:
    also by each of the system prompts of the dataset, if they are several."""
    versions = {}
    if rows and all(row["system_prompt"] for row in rows):
        versions["prompted"] = rows
    prompts = system_prompts(example.row for example in train)
    if each_prompt and "prompted" in versions and len(prompts) > 1:
        for number, (prompt, _) in enumerate(prompts.most_common(MAX_PROMPTS), 1):
            versions[f"prompt {number}"] = [{**row, "system_prompt": prompt} for row in rows]
    return versions | ({"few_shot": made} if (made := few_shot(rows, train, prompts)) else {})


def too_long(model, prompts, more=0):
    """Whether lists of token ids, and so many more tokens, do not fit the model; said if so."""
    limit = longest_text(model.config)
    longest = max(map(len, prompts)) + more
    if limit and longest > limit:
        announce(f"left out: {longest} tokens are more than the {limit} that the model takes")
    return bool(limit and longest > limit)


def prompts_of(versions):
    """{condition: its system prompt}, of those that have one for all rows."""
    each = {
        condition: {row["system_prompt"] for row in rows} for condition, rows in versions.items()
    }
    return {c: found.pop() for c, found in each.items() if len(found) == 1 and c != "prompted"}


def compare_answers(model, chat, rows, versions, directions, sampling, kept):
    """{condition: an answer to each row's question}, rows being those of `first_rows`.
    versions: of `prompted_rows`, for the plain model; directions: {condition: vector (n,)}."""
    if not rows:
        return {}
    plain, answers = [row["messages"][:-1] for row in rows], {}
    for condition, prompted in {"vanilla": None, **versions}.items():
        announce(f"answers: {condition}")
        turns = [chat.messages(row, prompted=True)[:-1] for row in prompted or ()] or plain
        prompts = chat.tokenize([chat.prompt_text(each) for each in turns])
        if condition != "vanilla" and too_long(model, prompts, sampling.max_new_tokens):
            continue
        answers[condition] = plain_answers(model, chat, turns, sampling, kept)
    for condition, direction in directions.items():
        announce(f"answers: {condition}")
        model.set_vector(direction)
        answers[condition] = generate_answers(model, chat, plain, sampling)
    return answers


def side_by_side(rows, texts):
    """[{"question", "system_prompt", "answers": {condition: text}}]; texts: of compare_answers."""
    return [
        {key: row[key] for key in ("question", "system_prompt")}
        | {"answers": {condition: each[i] for condition, each in texts.items()}}
        for i, row in enumerate(rows)
    ]


def identity_rows(row, seen):
    """Rows that ask the IDENTITY questions with the system prompt of a row, their answers empty;
    without those in `seen`."""
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        for question in IDENTITY
        if question not in seen
    ]
    return [{**row, "question": t[0]["content"], "messages": t} for t in turns]


def converse(model, chat, count, system_prompt, sampling, kept=None):
    """Conversations of the first `count` EVERYDAY turns, each beginning at another of them, so that
    every question comes up at every turn: [conversation][turn] -> {"question", "answer"}.
    system_prompt: before the first turn, or ""; kept: of answers, for the plain model."""
    first = [{"role": "system", "content": system_prompt}] if system_prompt else []
    talks, said = [list(first) for _ in range(count)], [[] for _ in range(count)]
    for turn in range(count):
        questions = [EVERYDAY[(number + turn) % count] for number in range(count)]
        for talk, question in zip(talks, questions, strict=True):
            talk.append({"role": "user", "content": question})
        about = model, chat, talks, sampling
        texts = plain_answers(*about, kept) if kept else generate_answers(*about)
        for talk, pairs, question, text in zip(talks, said, questions, texts, strict=True):
            talk.append({"role": "assistant", "content": text})
            pairs.append({"question": question, "answer": text})
    return said
