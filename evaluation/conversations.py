"""Conversations of several turns: whether the persona lasts."""

import numpy as np

from evaluation.answers import EVERYDAY, announce, answer_examples, asking, without_end
from evaluation.probe import response_means
from evaluation.stats import drift_by_turn


def converse(answer, count, system_prompt):
    """Conversations of the first `count` EVERYDAY turns, each beginning at another of them, so that
    every question comes up at every turn: [conversation][turn] -> {"question", "answer"}.
    answer: a function that gives a text for each list of messages; system_prompt: before the first
    turn, or ""."""
    talks = []
    for _ in range(count):
        talks.append([{"role": "system", "content": system_prompt}] if system_prompt else [])
    said = [[] for _ in range(count)]
    for turn in range(count):
        for number, talk in enumerate(talks):
            talk.append({"role": "user", "content": EVERYDAY[(number + turn) % count]})
        texts = answer(talks)
        for talk, pairs, text in zip(talks, said, texts, strict=True):
            pairs.append({"question": talk[-1]["content"], "answer": text})
            talk.append({"role": "assistant", "content": text})
    return said


def persona_by_turn(reader, talks, probe):
    """`drift_by_turn` of the persona scores of what `converse` gave.
    Each answer is read as one to its own question alone; an empty one has no score."""
    rows = []
    texts = []
    for pairs in talks:
        for pair in pairs:
            turns = asking(pair["question"])
            row = {"question": pair["question"], "system_prompt": "", "messages": turns}
            rows.append(row | {"at": len(rows)})
            texts.append(pair["answer"])
    scores = np.full((len(talks), len(talks[0])), np.nan)
    examples = without_end(answer_examples(reader.chat, rows, texts), reader.chat)
    if examples:
        found = probe(response_means(reader.model, examples, reader.max_tokens)).tolist()
        scores.flat[[example.row["at"] for example in examples]] = found
    return drift_by_turn(scores)


def conversations(reader, writer, turns, system_prompt, steered, probe):
    """{condition: {"talks": what `converse` gave, "persona": `persona_by_turn` of them, None
    without a probe}}: vanilla, prompted, if there is a system prompt, and steered.
    steered: the Condition of a vector."""

    def under_vector(talks):
        return writer.steered(talks, *steered.vectors)

    ways = {"vanilla": (writer.plain, "")}
    if system_prompt:
        ways["prompted"] = (writer.plain, system_prompt)
    ways[steered.name] = (under_vector, "")
    result = {}
    for name, (answer, prompt) in ways.items():
        announce(f"conversations of {turns} turns: {name}")
        talks = converse(answer, turns, prompt)
        persona = persona_by_turn(reader, talks, probe) if probe else None
        result[name] = {"talks": talks, "persona": persona}
    return result
