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
import re
from dataclasses import dataclass

IGNORE_INDEX = -100  # label of a token that carries no loss
THOUGHT = r"think\w*|thought|reason\w*"  # what models call the tag around their thoughts


@dataclass
class Example:
    """A row as the model sees it: T input_ids, and T labels (IGNORE_INDEX where no loss is)."""

    row: dict
    input_ids: list
    labels: list


class ChatFormat:
    """How a tokenizer's chat template writes a prompt, and which tokens of an example carry loss.
    An example is the text: generation prompt + response + what the template writes after an answer.
    So training sees what generation starts from. Loss: the response and its end-of-turn token
    (`end_of_turn`, "" if the template has none). What a template writes between its generation
    prompt and an answer belongs to the prompt, and a thought that it opens there is closed.
    date: what a template that asks for today's is told, ISO; None: today. None of other ones."""

    PROBE = "\ue000probe\ue000"  # private-use characters, in no template and no data
    header, in_parts = "", False

    def __init__(self, tokenizer, date=None):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: add --chat-template FILE")
        template = tokenizer.get_chat_template()
        self.tokenizer, self.options, self.date = tokenizer, {"chat_template": template}, None
        if "enable_thinking" in template:
            self.options["enable_thinking"] = False
        if "strftime_now" in template:
            self.date = date or datetime.date.today().isoformat()
            day = datetime.date.fromisoformat(self.date)
            call = r"strftime_now\s*\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)"
            fixed = re.sub(call, lambda m: repr(day.strftime(m[2])), template)
            if "strftime_now" in re.sub(r"strftime_now\s+is\s+(not\s+)?defined", "", fixed):
                raise ValueError("the date in the chat template cannot be fixed: --chat-template")
            self.options["chat_template"] = fixed
        self.in_parts = not self._renders_text_of("user")  # as models that see images have it
        self.has_system_role = self._renders_text_of("system", "user")
        if not (self._renders_text_of("user") and self._renders_text_of("assistant", after="user")):
            raise ValueError("the chat template fails on, or leaves out, a user or assistant turn")
        # What it puts around an answer: "", " " or a header before it, "<|im_end|>\n" after it.
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": self.PROBE}]
        before, _, self.tail = self._render(turns).rpartition(self.PROBE)
        prompt = self.prompt_text(turns[:1])
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.header = self.lead.rstrip(" ")
        self.lead = self.lead.removeprefix(self.header)
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        longest_first = sorted((t for t in special if len(t.strip()) > 1), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        end = self.special.search(self.tail)
        if not end:  # then what begins the next turn ends this one
            with contextlib.suppress(Exception):  # a template of one turn
                self.tail = self._render([*turns, turns[0]]).rpartition(self.PROBE)[2]
            end = self.special.search(self.tail)
            self.tail = self.tail[: end.end()] if end else ""
        self.end_of_turn = end[0] if end else ""
        self.end_of_turn_id = special.get(self.end_of_turn)

    def at(self, date):
        """The same with another date, where the template asks for one."""
        return self if date in (None, self.date) else ChatFormat(self.tokenizer, date)

    def _render(self, messages, **options):
        if self.in_parts:
            part = {"type": "text"}
            messages = [{**m, "content": [{**part, "text": m["content"]}]} for m in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **self.options, **options
        )

    def _renders_text_of(self, role, *others, after=None):
        """Whether the template writes the content of a turn of this role."""
        roles = [*([after] if after else []), role, *others]
        turns = [{"role": r, "content": self.PROBE if r == role else "?"} for r in roles]
        try:
            return self.PROBE in self._render(turns)
        except Exception:  # a template's own error, or Jinja's, or what its expressions run into
            return False

    def prompt_text(self, messages):
        """The text up to where the answer starts; system merged into user if there is no role."""
        if messages[0]["role"] == "system" and not self.has_system_role:
            system, user, *rest = messages
            merged = f"{system['content']}\n\n{user['content']}".strip()
            messages = [{"role": "user", "content": merged}, *rest]
        text = self._render(messages, add_generation_prompt=True)
        if thought := re.search(rf"<({THOUGHT})>\s*$", text):
            text = f"{text.rstrip()}\n\n</{thought[1]}>\n\n"
        return text + self.header

    def messages(self, row, prompted=False):
        """The row's messages; prompted: with its own system prompt put back in front."""
        if not prompted or not row["system_prompt"] or row["messages"][0]["role"] == "system":
            return row["messages"]
        return [{"role": "system", "content": row["system_prompt"]}, *row["messages"]]

    def inputs(self, conversations, device="cpu"):
        """Left-padded input_ids and attention_mask (B, T) that ask for an answer to each.
        conversations: a list of lists of messages, or of single questions as strings; ValueError
        otherwise."""
        import torch

        if not conversations or not isinstance(conversations, list):
            raise ValueError(f"{conversations!r:.60}: a list of conversations belongs here")
        prompts = []
        for turns in conversations:
            if not turns or not isinstance(turns, (str, list)):
                raise ValueError(f"{turns!r:.60}: a question or a list of messages belongs here")
            turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
            prompts.append(self.prompt_text(turns))
        prompts = self.tokenize(prompts)
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        arrays = {"input_ids": ids, "attention_mask": mask}
        return {name: torch.tensor(rows, device=device) for name, rows in arrays.items()}

    def answers(self, inputs, output, stop_ids=()):
        """Texts of what `generate` wrote after `inputs`, up to a stop token: B strings.
        output: (B, T + new) ids, or (B * k, T + new) of num_return_sequences=k. Raises
        AssertionError if it does not begin with the inputs."""
        prompts, texts = inputs["input_ids"].tolist(), []
        each = len(output) // len(prompts)
        assert each * len(prompts) == len(output) > 0, "not an output for these inputs"
        for i, ids in enumerate(output.tolist()):
            prompt = prompts[i // each]
            assert ids[: len(prompt)] == prompt, "an answer does not start where its prompt ends"
            new = ids[len(prompt) :]
            stops = (i for i, t in enumerate(new) if t in stop_ids or t == self.end_of_turn_id)
            new = new[: next(stops, len(new))]
            texts.append(self.decode(new, skip_special_tokens=True).strip())
        return texts

    def decode(self, ids, **options):
        """The text of token ids. No space is taken away before "." or "'s", as transformers below
        5.7 do for tokenizers such as Llama 3's."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)

    def encode(self, rows, prompted=False):
        """Tokenize rows into Examples; prompted: with their system prompts put back.
        Raises ValueError for a row that spells out a special token, which would become a real one,
        and whatever the template raises for one that it refuses."""
        prompts, answers = [], []
        for row in rows:
            *before, answer = self.messages(row, prompted)
            for text in (row["system_prompt"], *(turn["content"] for turn in row["messages"])):
                if found := self.special.search(text):
                    raise ValueError(f"the special token {found[0]} is spelled out in a text")
            prompts.append(self.prompt_text(before))
            answers.append(self.lead + answer["content"] + self.tail)
        if not rows:
            return []
        whole = self.tokenize([p + a for p, a in zip(prompts, answers, strict=True)])
        examples = []
        for row, ids, start, answer in zip(
            rows, whole, self.tokenize(prompts), answers, strict=True
        ):
            if ids[: len(start)] != start:  # tokens that generation, given the prompt, never sees
                ids = start + self.tokenize([answer])[0]
            stop = len(ids)
            if self.end_of_turn:
                stop -= ids[::-1].index(self.end_of_turn_id)
            labels = [IGNORE_INDEX] * len(start) + ids[len(start) : stop]
            examples.append(Example(row, ids, labels + [IGNORE_INDEX] * (len(ids) - stop)))
        return examples

    def encode_each(self, rows):
        """(Examples of the rows that can be encoded, what is wrong with each of the others)."""
        try:
            return self.encode(rows), []
        except Exception as error:  # of the template, or of a text in the row
            if len(rows) == 1:
                return [], [f"{rows[0]['question']:.60}: {error}"]
        each = [self.encode_each([row]) for row in rows]
        return [e for found, _ in each for e in found], [p for _, wrong in each for p in wrong]

    def remembering(self):
        """The same, whose `encode_each` tokenizes a row, the object, once."""
        return _Remembering(self)

    def tokenize(self, texts):
        """Token ids of chat-formatted texts, whose special tokens the template has written."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


class _Remembering:
    """A ChatFormat as far as `encode_each` goes; known: {id of a row: (row, what came of it)}."""

    def __init__(self, chat):
        self.chat, self.known = chat, {}

    def encode_each(self, rows):
        """As ChatFormat has it."""
        new = [row for row in rows if id(row) not in self.known]
        examples, problems = self.chat.encode_each(new)
        found = {id(example.row): example for example in examples}
        problems = iter(problems)  # in the order of the rows that they are of
        for row in new:
            self.known[id(row)] = row, found.get(id(row)) or next(problems)
        each = [self.known[id(row)][1] for row in rows]
        problems = [about for about in each if isinstance(about, str)]
        return [about for about in each if not isinstance(about, str)], problems


def label_count(example):
    """Tokens of an example that carry loss, once labels are shifted by one."""
    return sum(label >= 0 for label in example.labels[1:])


def collate(examples):
    """Right-padded input_ids and labels, both (B, T), of examples with those two lists.
    No mask: under causal attention pad tokens come after every real one, and carry no loss."""
    import torch

    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, example in enumerate(examples):
        ids[i, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[i, : len(example.labels)] = torch.tensor(example.labels)
    return ids, labels


def micro_batches(examples, max_tokens):
    """Lists of examples of like length, each at most `max_tokens` padded tokens (or one row)."""
    batches = []
    for example in sorted(examples, key=lambda e: len(e.input_ids)):
        length = len(example.input_ids)  # the longest of its batch so far
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append(example)
    return batches
