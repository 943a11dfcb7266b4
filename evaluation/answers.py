"""Answers: how they are written, under which conditions, and to which questions.

    writer = Writer(model, chat, Sampling(max_new_tokens=80), kept)
    texts = writer.answers(condition, rows)

What the plain model answers, prompted or not, is kept in a file: the runs of a model share it.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass, replace

import torch

from evaluation.kept import Kept
from steering.chat_format import IGNORE_INDEX, ChatFormat
from steering.loading import longest_text

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


class DoesNotFit(ValueError):
    """A condition's texts are longer than the model takes; the message says by how much."""


def check_length(model, tokens):
    """DoesNotFit if a text of so many tokens is too long for the model."""
    limit = longest_text(model.config)
    if limit and tokens > limit:
        raise DoesNotFit(f"{tokens} tokens are more than the {limit} that the model takes")


def answer_examples(chat, rows, texts):
    """Examples of texts as answers to the rows' questions, without persona.
    Left out are empty ones, and such as spell out a special token."""
    answered = []
    for row, text in zip(rows, texts, strict=True):
        if text:
            turns = [*row["messages"][:-1], {"role": "assistant", "content": text}]
            answered.append({**row, "messages": turns})
    return chat.encode_each(answered)[0]


def without_end(examples, chat):
    """The same examples without loss on the end-of-turn token, which cut answers do not have."""
    if not chat.end_of_turn:
        return examples
    shorter = []
    for example in examples:
        labels = list(example.labels)
        last = max(i for i, label in enumerate(labels) if label >= 0)
        labels[last] = IGNORE_INDEX
        shorter.append(replace(example, labels=labels))
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
    not depend on the batch that it is written in.
    """
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
    transformers streamer, that sees the tokens of a single conversation as they come. DoesNotFit if
    prompts, with the answers, may be too long for the model.
    """
    from transformers import GenerationConfig

    own = model.model.generation_config
    stop_ids = own.eos_token_id
    if not isinstance(stop_ids, list):
        stop_ids = [stop_ids]
    stop_ids = sorted({*stop_ids, chat.end_of_turn_id} - {None})
    options = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "repetition_penalty": 1.0,
        "eos_token_id": stop_ids or None,
        "pad_token_id": [*stop_ids, 0][0],
        "max_new_tokens": sampling.max_new_tokens,
    }
    if streamer:
        options["streamer"] = streamer
    answers = []
    model.model.generation_config = GenerationConfig()  # nothing of the model's own taste
    try:
        for start in range(0, len(conversations), sampling.batch_size):
            batch = conversations[start : start + sampling.batch_size]
            if sampling.temperature:
                options["logits_processor"] = [seeded_noise(batch, sampling)]
            inputs = chat.inputs(batch, model.input_device)
            check_length(model, inputs["input_ids"].shape[1] + sampling.max_new_tokens)
            answers += chat.answers(inputs, model.generate(**inputs, **options), stop_ids)
    finally:
        model.model.generation_config = own
    return answers


@dataclass
class Writer:
    """Writes answers with a SteerModel. kept: answers of the plain model, which are not written
    again."""

    model: object
    chat: ChatFormat
    sampling: Sampling
    kept: Kept

    def answers(self, condition, rows):
        """An answer to the question of each row under a condition. DoesNotFit as of
        `generate_answers`."""
        conversations = [row["messages"][:-1] for row in rows]
        if condition.prompt:
            prompted = condition.prompt(rows)
            conversations = [self.chat.messages(row, prompted=True)[:-1] for row in prompted]
        if not condition.vectors:
            return self.plain(conversations)
        return self.steered(conversations, *condition.vectors)

    def steered(self, conversations, vector):
        """An answer to each list of messages under a vector (n,)."""
        self.model.set_vector(vector)
        return generate_answers(self.model, self.chat, conversations, self.sampling)

    def plain(self, conversations):
        """An answer of the plain model to each list of messages."""
        sampling = self.sampling
        about = [sampling.max_new_tokens, sampling.temperature, sampling.seed]
        keys = [self.kept.key(*about, turns) for turns in conversations]
        missing = {}
        for key, turns in zip(keys, conversations, strict=True):
            if key not in self.kept.found:
                missing[key] = turns
        with self.model.steering_off():
            texts = generate_answers(self.model, self.chat, list(missing.values()), sampling)
        for (key, turns), text in zip(missing.items(), texts, strict=True):
            self.kept.add(key, turns=list(turns), answer=text)
        return [self.kept.found[key]["answer"] for key in keys]


def write_answers(writer, conditions, rows):
    """({condition: an answer to each row}, {condition: why it has none}) of those that answer."""
    texts = {}
    missing = {}
    if not rows:
        return texts, missing
    for condition in conditions:
        if not condition.answered:
            continue
        announce(f"answers: {condition.name}")
        try:
            texts[condition.name] = writer.answers(condition, rows)
        except DoesNotFit as error:
            missing[condition.name] = str(error)
    return texts, missing


def side_by_side(rows, texts):
    """[{"question", "system_prompt", "answers": {condition: text}}]; texts: of `write_answers`."""
    samples = []
    for i, row in enumerate(rows):
        answers = {condition: each[i] for condition, each in texts.items()}
        samples.append({
            "question": row["messages"][-2]["content"],
            "system_prompt": row["system_prompt"],
            "answers": answers,
        })  # fmt: skip
    return samples


def identity_rows(row, seen):
    """Rows that ask the IDENTITY questions with the system prompt of a row, their answers empty;
    without those in `seen`."""
    rows = []
    for question in IDENTITY:
        if question not in seen:
            rows.append({**row, "question": question, "messages": asking(question)})
    return rows


def asking(question):
    """The messages of a question whose answer is empty."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
