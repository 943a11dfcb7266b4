"""Rows by what an evaluation uses them for, and the first ones of them."""

from dataclasses import dataclass

import numpy as np


@dataclass
class EvalData:
    """Examples of a dataset by what they are for; no question is in two of the three parts.

    train, validation, heldout: rows of the persona. plain_train, plain_heldout: of the same model
    without it; plain_source says whose. left_out: held-out rows that had no system prompt, so that
    every condition, prompted too, is of the same rows; all of them are in if none has one.
    """

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
        asked = set(questions_of(self.chooser))
        same = [example for example in self.plain_train if example.row["question"] in asked]
        return same or self.plain_train

    def check(self, chosen_by=()):
        """AssertionError if a question that is reported on was seen, or chosen by."""
        seen = questions_of([*self.train, *self.validation, *self.plain_train])
        reported = questions_of([*self.heldout, *self.plain_heldout])
        leaked = {*seen, *chosen_by} & set(reported)
        assert not leaked, f"{len(leaked)} held-out questions leaked, such as {min(leaked)!r}"


def questions_of(examples):
    """The question of every example."""
    return [example.row["question"] for example in examples]


def first_rows(examples, count):
    """The row of each of the first `count` different questions."""
    first = {}
    for example in examples:
        first.setdefault(example.row["question"], example.row)
    return list(first.values())[:count]


def first_tokens(examples, tokens):
    """The first examples, up to the one that reaches so many tokens."""
    total = np.cumsum([len(example.input_ids) for example in examples])
    return examples[: int(np.searchsorted(total, tokens)) + 1]
