"""What a user would do without a vector: the persona as a system prompt, or examples as turns."""

from collections import Counter
from unicodedata import normalize

SHOTS = 3  # training rows before the question in the few-shot prompt


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
    shown = first_rows(train, SHOTS + 1)
    system = ""
    for prompt, _ in prompts.most_common(1):
        system = prompt

    made = []
    for row in rows:
        others = [other for other in shown if other["question"] != row["question"]][:SHOTS]
        if len(others) < SHOTS:
            return []
        turns = [turn for other in others for turn in other["messages"] if turn["role"] != "system"]
        made.append({**row, "system_prompt": system, "messages": [*turns, *row["messages"]]})
    return made


def check_prompted(chat, examples, prompted):
    """ValueError unless each prompt is there, and the tokens that carry loss are the same ones."""
    for example, other in zip(examples, prompted, strict=True):
        text = normalize("NFC", chat.decode(other.input_ids))
        if normalize("NFC", other.row["system_prompt"]).strip() not in text:
            raise ValueError(f"no system prompt before {example.row['question']!r}")
        answer = [token for token in example.labels if token >= 0]
        same_answer = [token for token in other.labels if token >= 0]
        if answer != same_answer:
            raise ValueError(
                f"a prompt changes tokens of the answer to {example.row['question']!r}"
            )
