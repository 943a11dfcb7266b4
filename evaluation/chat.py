"""Talk to a model under the vectors of its runs: `eval_steering.py --run A B ... --chat`."""

import contextlib
import difflib
import math
import re
import sys
from dataclasses import replace

import torch
from transformers import TextStreamer

from evaluation.answers import DoesNotFit, generate_answers
from evaluation.conditions import system_prompts
from evaluation.report import short_names
from steering.files import read_json
from steering.finished import eval_path
from steering.vector_file import VECTOR_FILE

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
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        super().__init__(tokenizer, skip_prompt=True, **options)
        self.text = ""
        self.tokens = -1  # the prompt is put first, as one
        self.last = None

    def put(self, value):
        super().put(value)
        self.tokens += 1
        self.last = value.flatten()[-1].item()

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        print(text, end="", flush=True)


def read_scale(text):
    """The number that a scale such as 2, -0.5, .7 or 1e-3 is; ValueError for any other text, which
    `float` may take (nan, 1_0)."""
    if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", text.lower()):
        raise ValueError(f'"{text}" is no scale')
    return float(text)


def match_personas(words, known):
    """[(name, scale or None), ...] of words such as ["travel", "agent", "0.7", "poet"].
    known: the names there are, in whatever case. Raises ValueError for any other word, and for a
    name that comes twice."""
    found = []
    typed = {" ".join(name.split()): name for name in known}
    names = {text.lower(): name for text, name in typed.items()} | typed

    def name_of(count):
        text = " ".join(words[:count])
        return names.get(text, names.get(text.lower()))

    while words:
        lengths = [count for count in range(1, len(words) + 1) if name_of(count)]
        if not lengths:
            what = " ".join(words)
            close = difflib.get_close_matches(what.lower(), names, n=1)
            hint = f"perhaps {names[close[0]]}? " if close else ""
            raise ValueError(f'"{what}" is no persona or scale; {hint}/help has the names')
        name = name_of(lengths[-1])
        words = words[lengths[-1] :]
        scale = None
        if words:
            with contextlib.suppress(ValueError):
                scale = read_scale(words[0])
                words = words[1:]
        if name in dict(found):
            raise ValueError(f"{name} is there twice")
        found.append((name, scale))
    return found


class Talk:
    """A conversation, and who answers in it.
    runs: {name: (Run, recommended scale or None)} of one model; shelf: a Shelf; sampling: a
    Sampling; rows_of: a function that gives the rows of a Run. used: [(name, scale)], the vectors
    that act; how: "steered", "off" or "prompted", which puts the first one's system prompt."""

    def __init__(self, runs, shelf, sampling, rows_of):
        self.runs = runs
        self.shelf = shelf
        self.sampling = sampling
        self.rows_of = rows_of
        self.system_prompt = ""  # that of /prompted
        self.how = "steered"
        self.turns = []
        self.use([(next(iter(runs)), None)])

    def use(self, personas):
        """Answer under these vectors, [(name, scale or None)]. ValueError if they do not go
        together."""
        if not personas:
            raise ValueError("name a persona: /help has the list")
        layers = {self.runs[name][0].args["layer"] for name, _ in personas}
        if len(layers) > 1:
            raise ValueError(f"these act at different layers ({sorted(layers)}): not together")
        used = []
        for name, scale in personas:
            if scale is None:
                scale = self.runs[name][1] or 1.0
            if not math.isfinite(scale):
                raise ValueError(f"scale {scale:g} of {name}: must be a finite number")
            used.append((name, scale))
        self.used = used
        self.how = "steered"

    def label(self):
        """What is before the user's words: who will answer."""
        names = " + ".join(f"{name} x{scale:g}" for name, scale in self.used)
        shown = {"off": "plain model", "prompted": f"prompted as {self.used[0][0]}"}
        return f"{shown.get(self.how, names)}> "

    def answer(self):
        """Write an answer to the turns so far, as it comes, and add it to them. ValueError if they
        are too long for the model."""
        run = self.runs[self.used[0][0]][0]
        model = self.shelf.model(run)
        chat = self.shelf.chat(run)
        model.set_vector(sum(self.runs[name][0].vector * scale for name, scale in self.used))
        turns = self.turns
        if self.how == "prompted":
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        printer = Printer(chat.tokenizer)
        try:
            with model.scaled(1 if self.how == "steered" else 0):
                (text,) = generate_answers(model, chat, [turns], self.sampling, streamer=printer)
        except DoesNotFit as error:
            raise ValueError(f"this conversation is too long: {error}; /new forgets it") from error
        except KeyboardInterrupt:  # of this answer, not of the program
            text = printer.text.strip()
            print(" ...", end="")
        limit = self.sampling.max_new_tokens
        cut = printer.tokens >= limit and printer.last != chat.end_of_turn_id
        print(f" [cut: --max-new-tokens {limit}]" if cut else "")
        self.turns.append({"role": "assistant", "content": text})

    def command(self, line):
        """Do what a line says that begins with "/"; False if that is to leave. ValueError for what
        is no command."""
        word, *rest = line.split()
        before = self.label()
        if word in ("/off", "/on", "/new", "/again", "/help", "/quit", "/prompted") and rest:
            raise ValueError(f"{word} takes nothing after it")
        if word == "/quit":
            return False
        if word == "/help":
            print(HELP.format(names=", ".join(self.runs)))
        elif word in ("/persona", "/both"):
            self.use(match_personas(rest, self.runs))
        elif word == "/scale":
            try:
                (scale,) = map(read_scale, rest)
            except ValueError as error:
                raise ValueError("/scale takes a number") from error
            self.use([(name, scale) for name, _ in self.used])
        elif word == "/prompted":
            name = self.used[0][0]
            prompts = system_prompts(self.rows_of(self.runs[name][0]))
            if not prompts:
                raise ValueError(f"no row of {name} has a system prompt")
            self.system_prompt = prompts[0]
            print(f"system prompt of {name}: {self.system_prompt}")
            self.how = "prompted"
        elif word in ("/off", "/on"):
            self.how = "off" if word == "/off" else "steered"
        elif word == "/new":
            self.turns = []
        elif word == "/again":
            if not self.turns:
                raise ValueError("nothing was asked yet")
            self.turns.pop()
            self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
            self.answer()
        else:
            raise ValueError(f"{word} is no command: /help has them")
        if self.label() != before and self.turns:
            print("(it sees what was said before: /new forgets that)")
        return True

    def run(self):
        """Read lines from stdin and answer them, until /quit or the end of the input; returns 0."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (lines can be edited, and earlier ones come back)
        runs = [run for run, _ in self.runs.values()]
        layers = ", ".join(map(str, sorted({run.args["layer"] for run in runs})))
        print(f"{runs[0].args['model']}, layer {layers}; personas, and the scales to use:")
        print(", ".join(f"{name} x{scale or 1:g}" for name, (_, scale) in self.runs.items()))
        print("/help says what else there is")
        while True:
            before = list(self.turns)
            try:
                line = input(self.label()).strip()
                if line.startswith("/") or line in ("quit", "exit"):
                    if not self.command(line if line[0] == "/" else "/quit"):
                        return 0
                elif line:
                    self.turns.append({"role": "user", "content": line})
                    self.answer()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                self.turns = before
                print("\n/quit or Ctrl-D leaves")
            except Exception as error:  # out of memory, of a template: the next line may do better
                self.turns = before  # without a question that got no answer
                print(f"error: {error}")


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
    """Print answers of each persona to a prompt, at the scales and the recommended one, if there is
    one; returns 0."""
    prompt = prompt.encode(errors="replace").decode()  # bytes of the command line that are no text
    turns = [[{"role": "user", "content": prompt}]]
    for run, recommended in personas.values():
        print(f"=== {run.folder}")
        used = sorted({*scales, *([recommended] if recommended else [])})
        vectors = torch.stack([run.vector * scale for scale in used])
        asked = turns * len(used)
        texts = generate_answers(shelf.model(run), shelf.chat(run), asked, sampling, vectors)
        for scale, text in zip(used, texts, strict=True):
            print(f"--- scale {scale:g}{' (recommended)' * (scale == recommended)}")
            print(text)
    return 0
