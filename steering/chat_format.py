"""Chat-format rows for a tokenizer: the text a model sees, and the tokens that carry loss.

    chat = load_chat("Qwen/Qwen3-32B")   # steering/loading.py
    example = chat.encode([row])[0]      # example.input_ids, example.labels
    inputs = chat.inputs(["Hello"])      # what `generate` takes
    text = chat.answers(inputs, model.generate(**inputs))[0]
    for batch in micro_batches(examples, max_tokens=1024):
        input_ids, labels = collate(batch)

torch is imported where tensors are made: counting tokens needs none.
"""

import contextlib
import datetime
import itertools
import os
import re
from dataclasses import dataclass

from steering.data_layouts import OPENS_THOUGHT

IGNORE_INDEX = -100  # label of a token that carries no loss
PROBE = "\ue000probe\ue000"  # private-use characters, in no template and no data
ASKED = "\ue000asked\ue000"


@dataclass
class Example:
    """A row as the model sees it: T input_ids, and T labels (IGNORE_INDEX where no loss is)."""

    row: dict
    input_ids: list
    labels: list


def with_date(template, date):
    """Write a date into a template in place of its calls for today's.

    date: ISO. Raises ValueError if the template asks for the date in another way than a call with
    its format as text.
    """
    day = datetime.date.fromisoformat(date)
    call = r"strftime_now\s*\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)"
    fixed = re.sub(call, lambda match: repr(day.strftime(match[2])), template)
    if "strftime_now" in re.sub(r"strftime_now\s+is\s+(not\s+)?defined", "", fixed):
        raise ValueError("the date in the chat template cannot be fixed: --chat-template")
    return fixed


class ChatFormat:
    """How a tokenizer's chat template writes a prompt, and which tokens of an example carry loss.

    An example is the text: generation prompt + response + what the template writes after an answer.
    So training sees what generation starts from. Loss: the response and its end-of-turn token
    (`end_of_turn`, "" if the template has none). What a template writes between its generation
    prompt and an answer belongs to the prompt, and a thought that it opens there is closed.
    date: ISO, for a template that asks for today's; today if None. For other templates it is None.
    tokens, positions: how many the model has embeddings of, and how many a text may have; None if
    that is not known. doubts: what may be wrong with a template, for a log.
    """

    def __init__(self, tokenizer, date=None, tokens=None, positions=None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: add --chat-template FILE")
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.positions = positions
        self.doubts = []
        self.date = None
        self.header = ""  # between a generation prompt and an answer, such as "<|channel|>final"
        self.opened = ""  # what a generation prompt ends in that no finished answer begins with
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            self.date = date or datetime.date.today().isoformat()
            template = with_date(template, self.date)
        self.options = {"chat_template": template}
        if "enable_thinking" in template:
            self.options["enable_thinking"] = False

        # Templates of models that see images want a turn's content as a list of parts.
        self.in_parts = False
        self.in_parts = not self._shows("user", ["user"])
        self.has_system_role = self._shows("system", ["system", "user"])
        shows_user = self._shows("user", ["user"])
        if not (shows_user and self._shows("assistant", ["user", "assistant"])):
            raise ValueError("the chat template fails on, or leaves out, a user or assistant turn")

        # What the template puts around an answer: a header or a space before it, "<|im_end|>\n"
        # after it.
        user = {"role": "user", "content": ASKED}
        turns = [user, {"role": "assistant", "content": PROBE}]
        before, _, self.tail = self._render(turns).rpartition(PROBE)
        self._compare_openings(
            self._render([user], add_generation_prompt=True).rpartition(ASKED)[2],
            before.rpartition(ASKED)[2],
        )

        # A turn ends in the first token after it that the tokenizer was given by name.
        added = tokenizer.added_tokens_decoder
        ids = {token.content: i for i, token in added.items()}
        ids.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        named = any_of(ids)
        end = named.search(self.tail)
        if not end:
            # Then what begins the next turn ends this one, unless the template knows one turn only.
            with contextlib.suppress(Exception):
                self.tail = self._render([*turns, user]).rpartition(PROBE)[2]
            end = named.search(self.tail)
            self.tail = self.tail[: end.end()] if end else ""
        self.end_of_turn = end[0] if end else ""
        self.end_of_turn_id = ids.get(self.end_of_turn)
        if not end:
            self.doubts.append("no special token ends a turn in the template: no stop is trained")
        special = [token.content for token in added.values() if token.special]
        self.special = any_of([*special, *tokenizer.all_special_tokens, self.end_of_turn])

    def _compare_openings(self, generated, finished):
        """Find `header`, `lead` and `opened`: what a generation prompt says before an answer, and
        what the template writes before one that is finished."""
        common = os.path.commonprefix([generated, finished])  # noqa: RUF071 (no paths)
        rest = generated.removeprefix(common)
        # A thought is closed by `prompt_text`, and a template that has a switch for thoughts means
        # what it writes; an end that differs in white space alone is only a careless template.
        is_meant = ends_in_thought(generated) or "enable_thinking" in self.options
        if rest.strip() and not is_meant:
            self.opened = rest
            self.doubts.append(
                f"the template's generation prompt ends in {rest[-60:]!r}, and a finished answer "
                "does not begin with that: it is left out (--chat-template FILE, if that is wrong)"
            )
        around = ""
        if self.opened or finished.startswith(generated):
            around = finished.removeprefix(common)
        self.header = around.rstrip(" ")
        self.lead = around.removeprefix(self.header)

    def at(self, date):
        """Give the same with another date, where the template asks for one."""
        if date in (None, self.date):
            return self
        return ChatFormat(self.tokenizer, date, self.tokens, self.positions)

    def _render(self, messages, **options):
        if self.in_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **self.options, **options
        )

    def _shows(self, role, roles):
        """Whether the template writes the content of the turn of `role`, among turns of `roles`."""
        turns = [{"role": r, "content": PROBE if r == role else "?"} for r in roles]
        try:
            return PROBE in self._render(turns)
        except Exception:  # a template's own error, or Jinja's, or what its expressions run into
            return False

    def prompt_text(self, messages):
        """Write the text up to where the answer starts.

        The system prompt is merged into the user turn where the template has no system role.
        """
        if messages[0]["role"] == "system" and not self.has_system_role:
            system, user, *rest = messages
            merged = f"{system['content']}\n\n{user['content']}".strip()
            messages = [{"role": "user", "content": merged}, *rest]
        text = self._render(messages, add_generation_prompt=True).removesuffix(self.opened)
        opener = ends_in_thought(text)
        if opener:
            text = f"{text.rstrip()}\n\n{end_of_thought(opener)}\n\n"
        return text + self.header

    def messages(self, row, prompted=False):
        """Give the row's messages; prompted: with its own system prompt put back in front."""
        messages = row["messages"]
        if prompted and row["system_prompt"] and messages[0]["role"] != "system":
            return [{"role": "system", "content": row["system_prompt"]}, *messages]
        return messages

    def inputs(self, conversations, device="cpu"):
        """Make left-padded input_ids and attention_mask, both (B, T), that ask for an answer each.

        conversations: a list of lists of messages, or of single questions as strings; ValueError
        otherwise.
        """
        import torch

        if not conversations or not isinstance(conversations, list):
            raise ValueError(f"{conversations!r:.60}: a list of conversations belongs here")
        texts = []
        for turns in conversations:
            if turns and isinstance(turns, str):
                turns = [{"role": "user", "content": turns}]
            if not turns or not isinstance(turns, list):
                raise ValueError(f"{turns!r:.60}: a question or a list of messages belongs here")
            texts.append(self.prompt_text(turns))

        ids = [torch.tensor(prompt, device=device) for prompt in self.tokenize(texts)]
        mask = [torch.ones_like(prompt) for prompt in ids]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_side="left"),
            "attention_mask": pad(mask, batch_first=True, padding_side="left"),
        }

    def answers(self, inputs, output, stop_ids=()):
        """Decode what `generate` wrote after `inputs`, up to a stop token: B strings.

        output: (B, T + new) ids, or (B * k, T + new) of num_return_sequences=k. Raises
        AssertionError if it does not begin with the inputs.
        """
        prompts = inputs["input_ids"].tolist()
        answers_each = len(output) // len(prompts)
        assert answers_each * len(prompts) == len(output) > 0, "not an output for these inputs"
        stops = {*stop_ids, self.end_of_turn_id}
        texts = []
        for i, ids in enumerate(output.tolist()):
            prompt = prompts[i // answers_each]
            assert ids[: len(prompt)] == prompt, "an answer does not start where its prompt ends"
            written = itertools.takewhile(lambda token: token not in stops, ids[len(prompt) :])
            texts.append(self.decode(list(written), skip_special_tokens=True).strip())
        return texts

    def decode(self, ids, **options):
        """Decode token ids.

        No space is taken away before "." or "'s", as transformers below 5.7 do for tokenizers such
        as Llama 3's.
        """
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)

    def encode(self, rows, prompted=False):
        """Tokenize rows into Examples; prompted: with their system prompts put back.

        Raises ValueError for a row that spells out a special token, which would become a real one,
        and whatever the template raises for one that it refuses.
        """
        if not rows:
            return []
        prompts = []
        answers = []
        for row in rows:
            for text in (row["system_prompt"], *(turn["content"] for turn in row["messages"])):
                forged = self.special.search(text)
                if forged:
                    raise ValueError(f"the special token {forged[0]} is spelled out in a text")
            *before, answer = self.messages(row, prompted)
            prompts.append(self.prompt_text(before))
            answers.append(self.lead + answer["content"] + self.tail)

        starts = self.tokenize(prompts)
        wholes = self.tokenize([p + a for p, a in zip(prompts, answers, strict=True)])
        examples = []
        for row, answer, start, ids in zip(rows, answers, starts, wholes, strict=True):
            # Where tokens span the boundary, generation, given the prompt, never sees them.
            if ids[: len(start)] != start:
                ids = start + self.tokenize([answer])[0]
            stop = len(ids)
            if self.end_of_turn:
                stop -= ids[::-1].index(self.end_of_turn_id)
            labels = [IGNORE_INDEX] * len(ids)
            labels[len(start) : stop] = ids[len(start) : stop]
            examples.append(Example(row, ids, labels))
        return examples

    def encode_each(self, rows):
        """Encode rows one by one if need be: (Examples, what is wrong with each other row)."""
        with contextlib.suppress(Exception):
            return self.encode(rows), []
        examples = []
        problems = []
        for row in rows:
            try:
                examples += self.encode([row])
            except Exception as error:  # of the template, or of a text in the row
                problems.append(f"{row['question']:.60}: {error}")
        return examples, problems

    def tokenize(self, texts):
        """Tokenize chat-formatted texts, whose special tokens the template has written.

        Raises ValueError for a token that the model has no embedding of.
        """
        options = {"add_special_tokens": False, "split_special_tokens": False}
        rows = self.tokenizer(texts, **options)["input_ids"]
        highest = max(itertools.chain.from_iterable(rows), default=0)
        if self.tokens and highest >= self.tokens:
            raise ValueError(
                f"the tokenizer's {self.decode([highest])!r} is token {highest}, and the model has "
                f"embeddings of 0..{self.tokens - 1}: they do not belong together"
            )
        return rows


def any_of(texts):
    """A pattern of any of the texts, the longest first; without white space and single signs."""
    longest_first = sorted((t for t in texts if len(t.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def ends_in_thought(text):
    """What a text ends in, if that opens a thought: "<think>"; "" otherwise."""
    found = re.search(rf"({OPENS_THOUGHT})\s*$", text)
    return found[1] if found else ""


def end_of_thought(opener):
    """What ends a thought: "<think>" -> "</think>", "<|START_THINKING|>" -> "<|END_THINKING|>"."""
    if opener == "<|channel>thought":
        return "<channel|>"
    if "START" in opener:
        return opener.replace("START", "END")
    return f"{opener[0]}/{opener[1:]}"


def label_count(example):
    """Count the tokens of an example that carry loss, once labels are shifted by one."""
    return sum(label >= 0 for label in example.labels[1:])


def collate(examples):
    """Right-pad examples: input_ids and labels, both (B, T).

    No mask: under causal attention pad tokens come after every real one, and carry no loss.
    """
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(example.input_ids) for example in examples]
    labels = [torch.tensor(example.labels) for example in examples]
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE_INDEX)


def micro_batches(examples, max_tokens):
    """Group examples of like length: lists of at most `max_tokens` padded tokens, or of one row."""
    batches = []
    for example in sorted(examples, key=lambda e: len(e.input_ids)):
        length = len(example.input_ids)  # the longest of its batch so far
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append(example)
    return batches
