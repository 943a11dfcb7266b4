"""Talk to a model under the vectors of its runs: `eval_steering.py --run A B ... --chat`."""

import contextlib
import difflib
import math
import sys
from collections import Counter
from dataclasses import replace

from transformers import TextStreamer

from evaluation.answers import generate_answers, too_long
from evaluation.report import short_names
from steering.run_state import eval_path
from steering.vector_file import VECTOR_FILE, read_json

HELP = """\
/persona NAME [SCALE]           speak as another of: {names}
/both NAME SCALE NAME SCALE ..  several vectors at once
/scale SCALE                    of the vector; all of them, where there are several
/off, /on                       the plain model; the vector again
/prompted                       the plain model, under the persona's system prompt
/again                          another answer to the last question
/new                            forget what was said
/quit                           or Ctrl-D; Ctrl-C stops an answer
A scale that is not given is the one that the evaluation of a run recommends, 1 if there is none."""


class Printer(TextStreamer):
    """Prints an answer as it is written, and keeps it in `text`."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        print(text, end="", flush=True)


def match_personas(words, known):
    """[(name, scale or None), ...] of words such as ["travel", "agent", "0.7", "poet"].
    known: the names there are. Raises ValueError for any other word."""
    found = []
    while words:
        lengths = [n for n in range(1, len(words) + 1) if " ".join(words[:n]) in known]
        if not lengths:
            close = difflib.get_close_matches(" ".join(words), known, n=3, cutoff=0.4)
            raise ValueError(
                f'no persona "{" ".join(words)}"; there is {", ".join(close or known)}'
            )
        name, words, scale = " ".join(words[: lengths[-1]]), words[lengths[-1] :], None
        if words:
            with contextlib.suppress(ValueError):
                scale, words = float(words[0]), words[1:]
        found.append((name, scale))
    return found


class Talk:
    """A conversation, and who answers in it.
    runs: {name: (Run, recommended scale or None)} of one model; shelf: a Shelf; sampling: a
    Sampling; rows_of: a function that gives the rows of a Run. used: [(name, scale)], the vectors
    that act; how: "steered", "off" or "prompted", which puts the first one's system prompt."""

    def __init__(self, runs, shelf, sampling, rows_of):
        self.runs, self.shelf, self.sampling = runs, shelf, sampling
        self.rows_of, self.how, self.turns = rows_of, "steered", []
        self.use([(next(iter(runs)), None)])

    def use(self, personas):
        """Answer under these vectors, [(name, scale or None)]. ValueError if they do not go
        together."""
        if not personas:
            raise ValueError("name a persona: /help has the list")
        layers = {self.runs[name][0].args["layer"] for name, _ in personas}
        if len(layers) > 1:
            raise ValueError(f"these act at different layers ({sorted(layers)}): not together")
        used = [(name, self.runs[name][1] or 1.0 if s is None else s) for name, s in personas]
        if not all(math.isfinite(scale) for _, scale in used):
            raise ValueError(f"scale {used[0][1]:g}: must be a finite number")
        self.used = used
        self.how = "steered"

    def label(self):
        """What is before the user's words: who will answer."""
        names = " + ".join(f"{name} x{scale:g}" for name, scale in self.used)
        shown = {"off": "plain model", "prompted": f"prompted as {self.used[0][0]}"}
        return f"{shown.get(self.how, names)}> "

    def answer(self):
        """Write an answer to the turns so far, as it comes, and add it to them. ValueError if they
        are too long for the model, or there is no system prompt."""
        run = self.runs[self.used[0][0]][0]
        model, chat = self.shelf.model(run), self.shelf.chat(run)
        model.set_vector(sum(self.runs[name][0].vector * scale for name, scale in self.used))
        turns = self.turns
        if self.how == "prompted":
            prompt = most_frequent_prompt(self.rows_of(run))
            turns = [{"role": "system", "content": prompt}, *turns]
        tokens = chat.tokenize([chat.prompt_text(turns)])
        if too_long(model, tokens, self.sampling.max_new_tokens):
            raise ValueError("this conversation is too long for the model: /new forgets it")
        printer = Printer(chat.tokenizer)
        try:
            with model.scaled(1 if self.how == "steered" else 0):
                text = generate_answers(model, chat, [turns], self.sampling, printer)[0]
        except KeyboardInterrupt:  # of this answer, not of the program
            text = printer.text.strip()
            print(" ...", end="")
        print()
        self.turns.append({"role": "assistant", "content": text})

    def command(self, line):
        """Do what a line says that begins with "/"; False if that is to leave."""
        word, *rest = line.split()
        if word == "/quit":
            return False
        if word in ("/persona", "/both"):
            self.use(match_personas(rest, self.runs))
        elif word == "/scale" and len(rest) == 1:
            self.use([(name, float(rest[0])) for name, _ in self.used])
        elif word in ("/off", "/on", "/prompted") and not rest:
            self.how = {"/on": "steered"}.get(word, word[1:])
        elif word == "/new" and not rest:
            self.turns = []
        elif word == "/again" and self.turns:
            self.turns.pop()
            self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
            self.answer()
        else:
            print(HELP.format(names=", ".join(self.runs)))
        return True

    def run(self):
        """Read lines from stdin and answer them, until /quit or the end of the input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (lines can be edited, and earlier ones come back)
        print("/help says what there is")
        while True:
            try:
                line = input(self.label()).strip()
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.turns.append({"role": "user", "content": line})
                    self.answer()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves")
            except (ValueError, RuntimeError) as error:  # also out of memory
                print(f"error: {error}")
                if self.turns and self.turns[-1]["role"] == "user":  # which got no answer
                    self.turns.pop()


def personas(runs, shelf, any_model):
    """{name: (Run, the scale that its evaluation recommends, or None)}.
    any_model: whatever model the vectors were trained on. ValueError if a vector does not fit, or
    the runs are of several models."""
    if len({run.args["model"] for run in runs}) > 1:
        raise ValueError("these runs are of several models: name runs of one")
    names = short_names([{"dataset": run.dataset, "run": run.folder} for run in runs])
    for run in runs:
        shelf.model(run).load_vector(run.folder / VECTOR_FILE, any_model=any_model)
    scales = [read_json(eval_path(run)).get("recommended", {}).get("scale") for run in runs]
    return dict(zip(names, zip(runs, scales, strict=True), strict=True))


def print_answers(personas, shelf, prompt, scales, sampling):
    """Answers of each persona to a prompt, at the scales and the recommended one, if there is."""
    turns = [[{"role": "user", "content": prompt}]]
    for name, (run, recommended) in personas.items():
        model, chat = shelf.model(run), shelf.chat(run)
        model.set_vector(run.vector)
        if len(personas) > 1:
            print(f"=== {name}")
        for scale in sorted({*scales, *([recommended] if recommended else [])}):
            print(f"--- scale {scale:g}{' (recommended)' * (scale == recommended)}")
            with model.scaled(scale):
                print(generate_answers(model, chat, turns, sampling)[0])


def most_frequent_prompt(rows):
    """The most frequent system prompt of rows; ValueError if none has one."""
    prompts = Counter(row["system_prompt"] for row in rows if row["system_prompt"])
    if not prompts:
        raise ValueError("no row of this persona has a system prompt")
    return prompts.most_common(1)[0][0]
