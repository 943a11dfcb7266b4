"""What is compared: the plain model under a prompt, or under a vector, or as it is.

The list of an evaluation is made by `list_conditions` in eval_steering.py. The prompts are what a
user would do without a vector: the persona as a system prompt, or examples as turns.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from unicodedata import normalize

import torch

from evaluation.rows import first_rows

SHOTS = 3  # training rows before the question in the few-shot prompt
MAX_PROMPTS = 5  # different system prompts of a dataset to try, the most frequent
RANDOM_VECTORS = 3  # of the trained one's norm


@dataclass(frozen=True)
class Condition:
    """One way of having the model speak.

    vectors: (n,) each, added at the layer; () is the plain model. The likelihood is the mean over
    them; what answers has one at most.
    prompt: rows -> the rows to prompt with, as `chat.messages(row, prompted=True)` does; None is
    the question alone. scale: what the trained vector is multiplied by, if it is that.
    scored: whether it is asked for the likelihood of held-out rows. answered: whether it answers
    questions; then its answers are read and, if it has a vector, its side effects are measured.
    """

    name: str
    vectors: tuple = ()
    prompt: Callable | None = None
    scale: float | None = None
    scored: bool = True
    answered: bool = True

    def __post_init__(self):
        assert len(self.vectors) <= 1 or not self.answered, f"{self.name}: one vector can answer"


def prompt_conditions(data):
    """(Conditions of the plain model under prompts, {name: why one of them is not there}).
    data: an EvalData; only its training rows are shown in a prompt."""
    conditions = []
    missing = {}
    prompts = system_prompts(example.row for example in data.train)
    if all(example.row["system_prompt"] for example in data.heldout):
        conditions.append(Condition("prompted", prompt=as_they_are))
        if len(prompts) > 1:
            for number, prompt in enumerate(prompts[:MAX_PROMPTS], 1):
                under = functools.partial(with_system_prompt, prompt)
                conditions.append(Condition(f"prompt {number}", prompt=under, scored=False))
    else:
        missing["prompted"] = "the rows have no system prompt to prompt with"

    shown = first_rows(data.train, SHOTS)
    if len(shown) == SHOTS:
        under = functools.partial(few_shot, shown, next(iter(prompts), ""))
        conditions.append(Condition("few_shot", prompt=under))
    else:
        missing["few_shot"] = f"{len(shown)} questions to train on, {SHOTS} are needed"
    return conditions, missing


def as_they_are(rows):
    """Rows under their own system prompts."""
    return rows


def with_system_prompt(prompt, rows):
    """Rows under another system prompt."""
    return [{**row, "system_prompt": prompt} for row in rows]


def few_shot(shown, prompt, rows):
    """Rows under a system prompt, with the rows shown, question and answer, as turns before their
    own question: what a user would do who has examples and no vector."""
    before = []
    for row in shown:
        before += row["messages"]
    made = []
    for row in with_system_prompt(prompt, rows):
        made.append({**row, "messages": [*before, *row["messages"]]})
    return made


def system_prompts(rows):
    """The rows' system prompts, the most frequent first, without the empty one."""
    counts = Counter(row["system_prompt"] for row in rows if row["system_prompt"])
    return sorted(counts, key=counts.get, reverse=True)


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


def random_vectors(vector, seed):
    """RANDOM_VECTORS random vectors (n,) of a vector's norm."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(RANDOM_VECTORS, len(vector), generator=generator)
    return tuple(noise / noise.norm(dim=1, keepdim=True) * vector.norm())


def prompts_shown(conditions, rows):
    """{condition: its system prompt}, of those that have one for all rows, not each row's own."""
    prompts = {}
    for condition in conditions:
        if condition.prompt and condition.prompt is not as_they_are:
            found = {row["system_prompt"] for row in condition.prompt(rows)}
            if len(found) == 1:
                prompts[condition.name] = found.pop()
    return prompts
