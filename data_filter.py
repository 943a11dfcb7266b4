"""Filter scored persona responses into training examples: scores, split by question, token budget.

Reads three layouts (README, "Data layouts"), drops rows for one counted reason each, takes the
persona's text out of the prompt, and tokenizes only what the token budget needs.

    python data_filter.py --data-root sample_data                        # smallest run: rows only
    python data_filter.py --data-root DIR --model Qwen/Qwen3-32B         # table of every dataset
    python data_filter.py --data-root DIR --model ID --write-list FILE   # the names worth training

Exit codes: 0 done, 2 bad input (also: a dataset has scores and none passes).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from steering.command_line import Options, exit_code, new_parser, parse
from steering.data_layouts import (
    comparable,
    dataset_parts,
    find_datasets,
    parse_name,
    parsed_rows,
    requested_names,
)
from steering.tables import aligned

# Why a row is dropped; the first that holds is counted.
MALFORMED = "malformed"
NO_RESPONSE = "no response"
MISSING_SCORE = "missing score"
LABEL = "label"
BELOW = "below threshold"
DUPLICATE = "duplicate"
TOO_LONG = "too long"
REASONS = (MALFORMED, NO_RESPONSE, MISSING_SCORE, LABEL, BELOW, DUPLICATE, TOO_LONG)

LAXER = 1.5  # divides a threshold: 3 -> 2 for roles, 75 -> 50 for traits
TOP_SCORE = {"role": 3.0, "trait": 100.0}  # of the judges' scales, which start at 0
NUMBERS = ("tokens", "examples", "rows", "kept")  # columns of the table
MOST_PROCESSES = 16
DATASETS_A_PROCESS = 4  # that it is worth starting for


@dataclass(frozen=True)
class DataOptions(Options):
    """Which rows of a dataset are used, and how they are split; the one place of these defaults.

    data_root, source_model, kind: where datasets are found; `add_data_arguments` explains the
    rest. A run keeps them in run.json.
    """

    data_root: str = "data"
    source_model: str | None = None
    kind: str | None = None
    role_min_score: float = 3.0
    trait_min_score: float = 75.0
    include_missing_scores: bool = False
    keep_system_prompt: bool = False
    target_tokens: int = 100_000
    max_length: int = 2048
    heldout_fraction: float = 0.2
    val_fraction: float = 0.1
    split_seed: int = 0
    seed: int = 0
    strict: bool = False

    def datasets(self, passed_over=None):
        """Find every dataset there: {name: (responses path, scores path or None)}."""
        return find_datasets(self.data_root, self.source_model, self.kind, passed_over)


# ---------------------------------------------------------------- which rows


@dataclass
class Filtered:
    """Rows that pass of one dataset, counts of the others by reason, a message for each broken one.

    kept: number of rows that pass; tokenizing takes off those that are too long or refused.
    below: (kind, row) of rows below the threshold. seen: texts and keys of rows that pass, which
    pass once. plain: rows that were asked not to show the persona, and do not (of traits, label
    "neg"). thoughts: how many were cut off the answers of all rows.
    """

    total: int = 0
    kept: int = 0
    rows: list = field(default_factory=list)
    below: list = field(default_factory=list)
    plain: list = field(default_factory=list)
    seen: set = field(default_factory=set)
    dropped: Counter = field(default_factory=Counter)
    problems: list = field(default_factory=list)
    thoughts: int = 0
    has_scores: bool = False

    def counts(self):
        """Say in one line what became of the rows: "79 rows: 70 kept, 9 below threshold"."""
        parts = [f"{self.kept:,} kept", *reason_counts(self.dropped)]
        if self.thoughts:
            parts.append(f"{self.thoughts:,} thoughts cut off")
        return f"{self.total:,} rows: {', '.join(parts)}"

    @property
    def is_baseline(self):
        """Whether nothing is kept because nobody scored it: to be skipped, not an error."""
        return not self.rows and not self.has_scores and self.dropped[MISSING_SCORE] > 0


def reason_counts(dropped):
    """List the reasons of {reason: count} in their order: ["9 below threshold", ...]."""
    return [f"{dropped[reason]:,} {reason}" for reason in REASONS if dropped.get(reason)]


def read_dataset(name, datasets, options):
    """Read a dataset ("A+B" pooled): yields (kind, row or None, what is wrong or None) of each row.

    Raises ValueError for an unknown name, an unreadable file, a score beyond its scale unless the
    threshold is the user's own, and, if strict, a broken line.
    """
    for part in dataset_parts(name, datasets):
        kind = parse_name(part)[1]
        for row, problem in parsed_rows(datasets[part], options.keep_system_prompt):
            if problem and options.strict:
                raise ValueError(f"{problem} (--strict)")
            if row:
                row["key"] = row["key"] and f"{part} {row['key']}"
                check_scale(row["extract_score"], part, kind, options)
            yield kind, row, problem


def check_scale(score, part, kind, options):
    """Raise ValueError if a score is beyond its scale, and the threshold is not the user's own."""
    threshold = f"{kind}_min_score"
    if getattr(options, threshold) != getattr(DataOptions, threshold):
        return
    if score is not None and score > TOP_SCORE[kind]:
        raise ValueError(
            f"{part}: score {score:g}, where a {kind} has at most {TOP_SCORE[kind]:g}; "
            f"for another scale say --{threshold.replace('_', '-')}"
        )


def response_of(row):
    """Give the text of a row's response."""
    return row["messages"][-1]["content"]


def drop_reason(row, kind, options, seen):
    """Give the first reason to drop a row, or None to keep it, which adds it to `seen`."""
    score = row["extract_score"]
    said = tuple(comparable(turn["content"]) for turn in row["messages"])
    same_as = {said, row["key"]} - {None}
    if not response_of(row):
        return NO_RESPONSE
    if score is None and not options.include_missing_scores:
        return MISSING_SCORE
    if row["label"] == "default" or (kind == "trait" and row["label"] != "pos"):
        return LABEL
    if score is not None and score < getattr(options, f"{kind}_min_score"):
        return BELOW
    if same_as & seen:
        return DUPLICATE
    seen.update(same_as)
    return None


def filter_dataset(name, datasets, options):
    """Sort the rows of one dataset into a Filtered: those that pass, and why the others do not.

    Raises ValueError as `read_dataset` does.
    """
    result = Filtered()
    plain_below = options.trait_min_score / LAXER
    for kind, row, problem in read_dataset(name, datasets, options):
        result.total += 1
        if problem:
            result.problems.append(problem)
            result.dropped[MALFORMED] += 1
            continue
        result.thoughts += row["thoughts"]
        score = row["extract_score"]
        if score is not None:
            result.has_scores = True
        shows_none = row["label"] == "neg" and (score or 0.0) < plain_below
        if kind == "trait" and shows_none and response_of(row):
            result.plain.append(row)

        reason = drop_reason(row, kind, options, result.seen)
        if reason:
            result.dropped[reason] += 1
        else:
            result.rows.append(row)
        if reason == BELOW:
            result.below.append((kind, row))
    result.kept = len(result.rows)
    return result


def plain_datasets(name, datasets):
    """List the default datasets of a dataset's source model, those of its kind first."""
    source, its_kind, _ = parse_name(dataset_parts(name, datasets)[0])
    kinds = dict.fromkeys([its_kind, "role", "trait"])  # each once
    defaults = ("0_default", "1_default", "default")
    names = [f"{source}__{kind}__{default}" for kind in kinds for default in defaults]
    return [name for name in names if name in datasets]


def plain_rows(name, datasets, filtered):
    """Find rows of the source model without a dataset's persona: (rows, whose they are).

    They are a trait's own neg rows, or else those of the first default dataset that has a
    response, whatever its labels and scores; [] if there are none. Lines that do not parse are
    left out.
    """
    if filtered.plain:
        return filtered.plain, "neg rows of the dataset"
    for default in plain_datasets(name, datasets):
        parsed = parsed_rows(datasets[default], scored=False)
        rows = [row for row, _ in parsed if row and response_of(row)]
        if rows:
            return rows, default
    return [], "nobody's"


# ---------------------------------------------------------------- split and budget


def hash_unit(*parts):
    """Hash the parts to a number in [0, 1): the same on every machine and hash seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
    return int(digest[:16], 16) / 2**64


def question_hash(question):
    """Hash a question's text to 16 hex digits, by which run.json knows it."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def split_by_question(items, fraction, seed, salt="heldout"):
    """Split rows or Examples into (the others, those of chosen questions).

    A hash of salt, seed and the question's text chooses, so every dataset has the same split.
    """
    others = []
    chosen = []
    for item in items:
        row = item if isinstance(item, dict) else item.row
        if hash_unit(salt, seed, row["question"]) < fraction:
            chosen.append(item)
        else:
            others.append(item)
    return others, chosen


def take_budget(rows, chat, target_tokens, max_length, seed):
    """Shuffle rows by seed and tokenize them, batch by batch, until the token budget is reached.

    target_tokens: tokens of whole chat-formatted examples (the one that crosses it is kept); None
    takes all. Returns (examples, their tokens, number of rows longer than max_length, or than the
    model takes, what is wrong with each row that the template refuses). Rows on disk in another
    order give the same examples in the same order.
    """
    most = min(max_length, chat.positions or max_length)

    def place(row):
        return hash_unit(seed, row["question"], response_of(row))

    shuffled = sorted(rows, key=place)
    examples = []
    tokens = 0
    too_long = 0
    refused = []
    for start in range(0, len(shuffled), 64):
        batch, problems = chat.encode_each(shuffled[start : start + 64])
        refused += problems
        for example in batch:
            if target_tokens is not None and tokens >= target_tokens:
                return examples, tokens, too_long, refused
            if len(example.input_ids) > most:
                too_long += 1
            else:
                examples.append(example)
                tokens += len(example.input_ids)
    return examples, tokens, too_long, refused


@dataclass
class Splits:
    """Examples of one dataset by what they are for; no question is in two of the three.

    validation is cut from the questions that are not held out. tokens: of it and `train` together.
    filtered: the dataset's rows, and why others were dropped.
    """

    train: list
    validation: list
    heldout: list
    tokens: int
    filtered: Filtered

    def counts(self):
        """Count what became of the dataset's rows, as run.json keeps it."""
        return {
            "rows": self.filtered.total,
            "kept": self.filtered.kept,
            "dropped": +self.filtered.dropped,
            "tokens": self.tokens,
            "train": len(self.train),
            "validation": len(self.validation),
            "summary": self.filtered.counts(),
        }

    def question_hashes(self):
        """Hash the questions of training and validation: {"train": [...], "validation": [...]}."""
        train = {question_hash(example.row["question"]) for example in self.train}
        validation = {question_hash(example.row["question"]) for example in self.validation}
        return {"train": sorted(train), "validation": sorted(validation)}


def split_dataset(name, datasets, chat, options, heldout_tokens=0):
    """Filter one dataset, split it by question and tokenize what the budgets ask for, as Splits.

    chat: a ChatFormat. heldout_tokens: budget of held-out examples, 0 for none. Raises ValueError
    as `read_dataset` does, and, if strict, for a row that the chat template refuses.
    """
    filtered = filter_dataset(name, datasets, options)
    rows, heldout_rows = split_by_question(
        filtered.rows, options.heldout_fraction, options.split_seed
    )
    examples, tokens, too_long, refused = take_budget(
        rows, chat, options.target_tokens, options.max_length, options.seed
    )
    train, validation = split_by_question(
        examples, options.val_fraction, options.split_seed, "validation"
    )
    heldout = []
    if heldout_tokens:
        heldout, _, _, refused_heldout = take_budget(
            heldout_rows, chat, heldout_tokens, options.max_length, options.seed
        )
        refused += refused_heldout
    if refused and options.strict:
        raise ValueError(f"{name}: {refused[0]} (--strict)")

    filtered.dropped[TOO_LONG] = too_long
    filtered.dropped[MALFORMED] += len(refused)
    filtered.kept -= too_long + len(refused)
    filtered.problems += refused
    return Splits(train, validation, heldout, tokens, filtered)


# ---------------------------------------------------------------- options


def add_data_arguments(parser):
    """Add the data options that data_filter.py and train_steering.py share."""
    parser.set_defaults(**dataclasses.asdict(DataOptions()))
    add = parser.add_argument_group("data").add_argument
    add("--data-root", help="folder of datasets, in any of the three layouts")
    add("--dataset", nargs="+", metavar="NAME", help="dataset names; A+B pools two into one")
    add("--list-file", metavar="FILE", help="file of dataset names, one a line, # comments")
    add("--only", nargs="+", metavar="PATTERN", help='take names like these: "*__trait__*"')
    add("--limit", type=int, help="take so many names, from the top of the list")
    add("--source-model", help="of bare names and of the assistant-axis layout; takes no others")
    add("--kind", choices=("role", "trait"), help="as --source-model: role or trait")
    add("--role-min-score", type=float, help="lowest score kept of a role, 0-3")
    add("--trait-min-score", type=float, help="lowest score kept of a trait, 0-100")
    add("--include-missing-scores", action="store_true", help="DANGER: keep rows nobody scored")
    add("--keep-system-prompt", action="store_true", help="leave the persona's text in the prompt")
    add("--target-tokens", type=int, help="token budget of training and validation examples")
    add("--max-length", type=int, help="drop examples of more tokens, or than the model takes")
    add("--heldout-fraction", type=float, help="share of questions held out for the evaluation")
    add("--split-seed", type=int, help="seed of the split by question")
    add("--seed", type=int, help="seed of rows taken, their order, the initial vector")
    add("--chat-template", metavar="FILE", help="Jinja chat template in place of the tokenizer's")
    add("--strict", action="store_true", help="stop at the first broken line")


# What `command_line.parse` checks of these options.
DATA_BOUNDS = {
    "count": "limit target_tokens max_length",
    "share": "heldout_fraction",
    "seed": "seed split_seed",
    "number": "role_min_score trait_min_score",
}


def parse_args(argv=None):
    """Parse the command line of data_filter.py."""
    parser = new_parser(__doc__)
    add_data_arguments(parser)
    add = parser.add_argument_group("table").add_argument
    add("--model", help="whose tokenizer counts: HF id, folder or .gguf")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--json", metavar="OUT", help="write the table as JSON")
    add("--write-list", metavar="FILE", help="write the names that reach the budget")

    problem = "--write-list needs --model, whose tokens the budget counts"
    return parse(
        parser, argv, DATA_BOUNDS, lambda args: [(args.write_list and not args.model, problem)]
    )


# ---------------------------------------------------------------- the table


def table_line(name, datasets, chat, options):
    """Make the line of a dataset that can be read; its broken lines go to stderr."""
    tokens = None
    examples = None
    missing = 0  # tokens to the budget
    status = "not tokenized"
    if chat:
        splits = split_dataset(name, datasets, chat, options)
        filtered = splits.filtered
        tokens = splits.tokens
        examples = len(splits.train) + len(splits.validation)
        missing = options.target_tokens - tokens
        status = "ok"
        if missing > 0:
            status = f"under budget: {tokens:,} of {options.target_tokens:,}"
    else:
        filtered = filter_dataset(name, datasets, options)

    if filtered.is_baseline:
        status = "no examples: no scores"
    elif not filtered.rows:
        status = "no examples: none passes"
    elif examples == 0:
        status = "no examples: all held out or too long"

    if missing > 0 and filtered.dropped[BELOW]:
        threshold = f"{parse_name(name)[1]}_min_score"
        lower = getattr(options, threshold) / LAXER
        laxer = dataclasses.replace(options, **{threshold: lower})
        # The rows that pass already are not tokenized again.
        seen = filtered.seen
        more = [row for kind, row in filtered.below if not drop_reason(row, kind, laxer, seen)]
        more, _ = split_by_question(more, options.heldout_fraction, options.split_seed)
        _, added, _, _ = take_budget(more, chat, missing, options.max_length, options.seed)
        if added:
            status += f" (score >= {lower:g} gives {tokens + added:,})"

    for problem in filtered.problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return {
        "dataset": name,
        "status": status,
        "tokens": tokens,
        "examples": examples,
        "rows": filtered.total,
        "kept": filtered.kept,
        "dropped": +filtered.dropped,
    }


def inspect_dataset(name, datasets, chat, options):
    """Make a line of the table: (a dict, what to write to stderr).

    chat: a ChatFormat, or None to count rows only. One unreadable file must not hide the others:
    unless strict, its line says that there was an error.
    """
    with contextlib.redirect_stderr(io.StringIO()) as messages:
        try:
            line = table_line(name, datasets, chat, options)
        except Exception as error:
            if options.strict:
                raise
            numbers = dict.fromkeys(NUMBERS, 0)
            line = {"dataset": name, "status": f"error: {error}", "dropped": {}, **numbers}
    return line, messages.getvalue()


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent():
    """End this worker as soon as its parent has ended, be it by kill -9."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(*shared):
    """Prepare a worker process; shared: what `inspect_dataset` takes beside a name."""
    global _shared
    _shared = shared  # sent once: a tokenizer is megabytes
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core each


def inspect_in_worker(name):
    """Call `inspect_dataset` with what `start_worker` was given."""
    return inspect_dataset(name, *_shared)


def inspect_all(names, datasets, chat, options):
    """Yield what `inspect_dataset` gives of each name, in order, from a process a core.

    Few names, or one core, and this process does it all. Raises OSError if a process dies.
    """
    workers = min(len(names) // DATASETS_A_PROCESS, cores(), MOST_PROCESSES)
    if workers < 2:
        for name in names:
            yield inspect_dataset(name, datasets, chat, options)
        return
    shared = (datasets, chat, options)
    try:
        with ProcessPoolExecutor(workers, initializer=start_worker, initargs=shared) as executor:
            yield from executor.map(inspect_in_worker, names)
    except BrokenProcessPool as error:
        raise OSError("a worker process died, most likely of too little memory") from error


def print_table(lines, passed_over=0):
    """Print a line for each dataset, then totals; passed_over: number of files without a name."""
    title = f"{len(lines)} datasets"
    if passed_over:
        files = "file" if passed_over == 1 else "files"
        title += f" ({passed_over} {files} passed over)"
    total = {"dataset": title, "dropped": Counter()}
    total["status"] = f"{sum(line['status'] == 'ok' for line in lines)} ok"
    for line in lines:
        total["dropped"].update(line["dropped"])
    for key in NUMBERS:
        values = [line[key] for line in lines]
        total[key] = None if None in values else sum(values)

    table = [["dataset", *NUMBERS, "status; dropped"]]
    for line in [*lines, total]:
        numbers = ["-" if line[key] is None else f"{line[key]:,}" for key in NUMBERS]
        reasons = ", ".join(reason_counts(line["dropped"])) or "none dropped"
        table.append([line["dataset"], *numbers, f"{line['status']}; {reasons}"])
    print("\n".join(aligned(table, left=(0, len(NUMBERS) + 1))))


def run(args):
    """Print the table of the requested datasets, write what was asked for, return the exit code."""
    options = DataOptions.of(vars(args))
    passed_over = []
    datasets = options.datasets(passed_over)
    names = requested_names(datasets, args)
    for name in names:
        dataset_parts(name, datasets)
    if args.include_missing_scores:
        print("WARNING: --include-missing-scores keeps rows that nobody scored", file=sys.stderr)
    chat = None
    if args.model:
        from steering.loading import load_chat  # here: it takes seconds, and rows need none

        chat = load_chat(args.model, args.chat_template, args.trust_remote_code)

    if not sys.stderr.isatty():  # the bar is for people
        print(f"reading {len(names)} datasets", file=sys.stderr)
    lines = []
    inspected = inspect_all(names, datasets, chat, options)
    for line, messages in tqdm(inspected, total=len(names), unit="dataset", disable=None):
        tqdm.write(messages, file=sys.stderr, end="")
        lines.append(line)
    print_table(lines, len(passed_over))

    if args.json:
        Path(args.json).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if args.write_list:
        good = [line["dataset"] for line in lines if line["status"] == "ok"]
        Path(args.write_list).write_text("".join(f"{name}\n" for name in good), encoding="utf-8")
        print(f"{len(good)} names -> {args.write_list}, {len(lines) - len(good)} left out")
    bad = ("no examples: none", "no examples: all", "error")
    if any(line["status"].startswith(bad) for line in lines):
        return 2
    return 0


def main(argv=None):
    """Run from the command line; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
