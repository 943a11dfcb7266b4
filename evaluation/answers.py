"""Answers: how they are written, under which conditions, and to which questions.

    writer = Writer(model, chat, Sampling(max_new_tokens=80), kept)
    texts = writer.write(writer.ask_under(condition, rows))

What is asked for at a time is written at a time, each answer under a vector of its own. What the
plain model answers, prompted or not, is kept in a file: the runs of a model share it.
"""

import functools
import hashlib
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass, replace

import torch

from evaluation.kept import Kept
from steering.chat_format import IGNORE_INDEX, ChatFormat
from steering.fast_path import of_each
from steering.loading import longest_text

PADDING = 32  # padded tokens of prompts cost about as much as a step of a batch more
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


def seeded_noise(conversations, sampling, device):
    """A logits processor under which the greedy choice is a sample at the temperature.

    Gumbel noise of a generator for each row, which its messages and the seed decide: an answer does
    not depend on the batch that it is written in. device: where it is made, since a host needs
    longer for a large vocabulary than a GPU for a step of the model.
    """
    generators = []
    for turns in conversations:
        digest = hashlib.sha256(json.dumps([sampling.seed, turns]).encode()).digest()
        seed = int.from_bytes(digest[:7], "big")
        generators.append(torch.Generator(device).manual_seed(seed))

    def processor(input_ids, scores):  # scores: (B, V)
        noise = torch.empty(scores.shape, device=device)
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / sampling.temperature - noise.log().to(scores.device)

    return processor


@torch.no_grad()
def generate_answers(model, chat, conversations, sampling, vectors=None, streamer=None):
    """An answer to each list of messages, as text, in one batch, without its (left-padded) prompt.

    vectors: one for each, (N, n), in place of the model's own; zeros are the plain model. Sampled
    from the model's whole distribution at the temperature, 0: greedily. streamer: a transformers
    streamer, that sees the tokens of a single conversation as they come. DoesNotFit if prompts,
    with the answers, may be too long for the model.
    """
    from transformers import GenerationConfig

    own = model.model.generation_config
    stop_ids = own.eos_token_id
    if not isinstance(stop_ids, list):
        stop_ids = [stop_ids]
    stop_ids = sorted({*stop_ids, chat.end_of_turn_id} - {None})
    inputs = chat.inputs(conversations, model.input_device)
    check_length(model, inputs["input_ids"].shape[1] + sampling.max_new_tokens)
    options = {
        "eos_token_id": stop_ids or None,
        "pad_token_id": [*stop_ids, 0][0],
        "max_new_tokens": sampling.max_new_tokens,
        "vectors": vectors,
        "streamer": streamer,
    }
    if sampling.temperature:
        noise = seeded_noise(conversations, sampling, model.input_device)
        options["logits_processor"] = [noise]
    # Nothing of the model's own taste: a fresh config is greedy, without penalties.
    model.model.generation_config = GenerationConfig()
    try:
        output = model.generate(**inputs, **options)
    finally:
        model.model.generation_config = own
    return chat.answers(inputs, output, stop_ids)


@dataclass(frozen=True)
class Ask:
    """Something to answer: messages, and the vector (n,) to do it under, None for none. length: of
    the prompt, in tokens."""

    turns: list
    vector: torch.Tensor | None = None
    length: int = 0


@dataclass
class Writer:
    """Writes answers with a SteerModel, as many at once as memory takes. kept: answers of the plain
    model, which are not written again."""

    model: object
    chat: ChatFormat
    sampling: Sampling
    kept: Kept

    def ask(self, conversations, vector=None):
        """An Ask for each list of messages. DoesNotFit if it is too long for the model."""
        prompts = self.chat.tokenize([self.chat.prompt_text(turns) for turns in conversations])
        asks = []
        for turns, prompt in zip(conversations, prompts, strict=True):
            check_length(self.model, len(prompt) + self.sampling.max_new_tokens)
            asks.append(Ask(list(turns), vector, len(prompt)))
        return asks

    def ask_under(self, condition, rows):
        """An Ask for the question of each row under a Condition. DoesNotFit as of `ask`."""
        prompted = condition.prompt is not None
        if prompted:
            rows = condition.prompt(rows)
        conversations = [self.chat.messages(row, prompted)[:-1] for row in rows]
        return self.ask(conversations, *condition.vectors)

    def write(self, asks):
        """The answer to each Ask, as text. What is kept, and what is asked twice of the plain
        model, is not written again."""
        sampling = self.sampling
        about = [sampling.max_new_tokens, sampling.temperature, sampling.seed]
        keys = []
        missing = {}
        for number, ask in enumerate(asks):
            key = number
            if ask.vector is None:
                key = self.kept.key(*about, ask.turns)
            keys.append(key)
            if key not in self.kept.found:
                missing[key] = ask

        texts = {}
        batches = self.batches(missing)
        rows = ", ".join(str(len(batch)) for batch in batches)
        announce(f"writing {len(missing)} answers, {rows or 0} at once")
        for batch, found in of_each(functools.partial(self.write_batch, missing), batches):
            for key, text in zip(batch, found, strict=True):
                texts[key] = text
                if missing[key].vector is None:
                    self.kept.add(key, turns=missing[key].turns, answer=text)
        return [texts[key] if key in texts else self.kept.found[key]["answer"] for key in keys]

    def batches(self, asks):
        """Lists of keys of {key: Ask} to write at once: equal parts of at most batch_size, of
        prompts of like length, since padding costs more than another batch from some length on."""
        groups = []
        padding = 0
        for key in sorted(asks, key=lambda key: asks[key].length):
            if groups:
                longer = asks[key].length - asks[groups[-1][-1]].length
                padding += len(groups[-1]) * longer
            if not groups or padding > PADDING * self.sampling.max_new_tokens:
                groups.append([])
                padding = 0
            groups[-1].append(key)

        batches = []
        for group in groups:
            parts = math.ceil(len(group) / self.sampling.batch_size)
            size = math.ceil(len(group) / parts)
            batches += [group[start : start + size] for start in range(0, len(group), size)]
        return batches

    def write_batch(self, asks, batch):
        """The answers to some keys of {key: Ask}, in one `generate`."""
        turns = [asks[key].turns for key in batch]
        nothing = torch.zeros(self.model.hidden_size)
        vectors = [nothing if asks[key].vector is None else asks[key].vector for key in batch]
        return generate_answers(self.model, self.chat, turns, self.sampling, torch.stack(vectors))


def answers_to(asks):
    """{condition: an answer to each} of {condition: Asks}. A generator, as all are that need
    answers: it yields Asks, and is sent their answers. `run_together` does that."""
    texts = iter((yield [ask for each in asks.values() for ask in each]))
    return {name: list(itertools.islice(texts, len(each))) for name, each in asks.items()}


def run_together(evaluations, write):
    """Run generators that yield Asks side by side, so that what all of them ask for is written at
    once; write: a function of Asks that gives their answers. Returns what each one returned, or the
    exception that it ended in."""
    ended = {}
    waiting = dict.fromkeys(range(len(evaluations)))
    while waiting:
        asked = {}
        for number, texts in waiting.items():
            try:
                asked[number] = evaluations[number].send(texts)
            except StopIteration as end:
                ended[number] = end.value
            except Exception as error:  # the others may do better
                ended[number] = error
        every = [ask for asks in asked.values() for ask in asks]
        try:
            texts = iter(write(every) if every else [])
        except Exception as error:  # it is that of all
            for number in asked:
                evaluations[number].close()
                ended[number] = error
            break
        waiting = {}
        for number, asks in asked.items():
            waiting[number] = list(itertools.islice(texts, len(asks)))
    return [ended[number] for number in range(len(evaluations))]


def run_alone(asking, writer):
    """What a single generator that yields Asks returns, its answers by a Writer."""
    (found,) = run_together([asking], writer.write)
    if isinstance(found, Exception):
        raise found
    return found


def write_answers(writer, conditions, rows):
    """({condition: an answer to each row}, {condition: why it has none}) of those that answer; a
    generator as `answers_to`."""
    asks = {}
    missing = {}
    for condition in conditions:
        if condition.answered and rows:
            try:
                asks[condition.name] = writer.ask_under(condition, rows)
            except DoesNotFit as error:
                missing[condition.name] = str(error)
    texts = yield from answers_to(asks)
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
