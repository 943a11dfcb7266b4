"""Conversations of several turns: whether the persona lasts."""

import numpy as np

from evaluation.answers import EVERYDAY, announce, answer_examples, answers_to, asking, without_end
from evaluation.probe import persona_scores
from evaluation.stats import drift_by_turn


def converse(writer, ways, count):
    """{way: conversations of the first `count` EVERYDAY turns}, each beginning at another of them,
    so that every question comes up at every turn: [conversation][turn] -> {"question", "answer"}.
    ways: {way: (system prompt before the first turn, or "", vector (n,) or None)}. A generator as
    `answers_to`."""
    talks = {}
    said = {}
    for way, (prompt, _) in ways.items():
        opening = [{"role": "system", "content": prompt}] if prompt else []
        talks[way] = [list(opening) for _ in range(count)]
        said[way] = [[] for _ in range(count)]
    for turn in range(count):
        asks = {}
        for way, (_, vector) in ways.items():
            for number, talk in enumerate(talks[way]):
                talk.append({"role": "user", "content": EVERYDAY[(number + turn) % count]})
            asks[way] = writer.ask(talks[way], vector)
        texts = yield from answers_to(asks)
        for way in ways:
            for talk, pairs, text in zip(talks[way], said[way], texts[way], strict=True):
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
            asked = {"question": pair["question"], "messages": asking(pair["question"])}
            rows.append({**asked, "system_prompt": "", "at": len(rows)})
            texts.append(pair["answer"])
    scores = np.full((len(talks), len(talks[0])), np.nan)
    examples = without_end(answer_examples(reader.chat, rows, texts), reader.chat)
    if examples:
        found = persona_scores(reader, probe, examples)
        scores.flat[[example.row["at"] for example in examples]] = found
    return drift_by_turn(scores)


def conversations(reader, writer, turns, system_prompt, steered, probe):
    """{condition: {"talks": what `converse` gave, "persona": `persona_by_turn` of them, None
    without a probe}}: vanilla, prompted, if there is a system prompt, and steered. A generator as
    `answers_to`. steered: the Condition of a vector."""
    ways = {"vanilla": ("", None)}
    if system_prompt:
        ways["prompted"] = (system_prompt, None)
    ways[steered.name] = ("", *steered.vectors)
    announce(f"conversations of {turns} turns")
    said = yield from converse(writer, ways, turns)
    result = {}
    for name, talks in said.items():
        persona = persona_by_turn(reader, talks, probe) if probe else None
        result[name] = {"talks": talks, "persona": persona}
    return result
