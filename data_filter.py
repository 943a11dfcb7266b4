"""Filter scored persona responses into training examples: scores, split by question, token budget.

Reads three layouts (README, "Data layouts"), drops rows for one counted reason each, takes the
persona's text out of the prompt, and tokenizes only what the token budget needs.

    python data_filter.py --data-root sample_data                        # smallest run: rows only
    python data_filter.py --data-root DIR --model Qwen/Qwen3-32B         # table of every dataset
    python data_filter.py --data-root DIR --model ID --write-list FILE   # the names worth training

Exit codes: 0 done, 2 bad input (also: a dataset has scores and none passes).
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from steering.command_line import aligned, exit_code, new_parser, parse
from steering.data_layouts import (
    dataset_parts,
    find_datasets,
    parse_name,
    parsed_rows,
    requested_names,
)
from steering.parallel import in_processes

# Why a row is dropped; the first that holds is counted.
MALFORMED, NO_RESPONSE, MISSING_SCORE = "malformed", "no response", "missing score"
LABEL, BELOW, DUPLICATE, TOO_LONG = "label", "below threshold", "duplicate", "too long"
REASONS = (MALFORMED, NO_RESPONSE, MISSING_SCORE, LABEL, BELOW, DUPLICATE, TOO_LONG)
NUMBERS = "tokens", "examples", "rows", "kept"  # of the table
PLAIN_SCORE = 50.0  # below it, a trait's "neg" row is one without the persona
TOP_SCORE = {"role": 3.0, "trait": 100.0}  # of the judges' scales, which start at 0


@dataclass(frozen=True)
class DataOptions:
    """Which rows of a dataset are used, and how they are split. The one place of these defaults.
    data_root, source_model, kind: where datasets are found; the rest is said in
    `add_data_arguments`. A run keeps them in run.json."""

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

    @classmethod
    def of(cls, values):
        """The options in a dict, of parsed arguments or run.json; one it lacks has its default."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})

    def datasets(self, passed_over=None):
        """Every dataset there: {name: (responses path, scores path or None)}, else ValueError."""
        return find_datasets(self.data_root, self.source_model, self.kind, passed_over)


@dataclass
class Filtered:
    """Rows kept of one dataset, rows dropped by reason, and a message for every broken line.
    plain: its rows that were asked not to show the persona, and do not (of traits, label "neg")."""

    total: int
    rows: list = field(default_factory=list)
    plain: list = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)
    refused: int = 0  # of those malformed, by the chat template
    problems: list = field(default_factory=list)
    has_scores: bool = False

    @property
    def kept(self):
        """Number of rows kept; too long or refused is found out, and counted, by tokenizing."""
        return len(self.rows) - self.dropped[TOO_LONG] - self.refused

    def counts(self):
        """Say it in one line: "79 rows: 70 kept, 9 below threshold"."""
        parts = [f"{self.kept:,} kept", *reason_counts(self.dropped)]
        return f"{self.total:,} rows: {', '.join(parts)}"

    @property
    def is_baseline(self):
        """Whether nothing is kept because nobody scored it: to be skipped, not an error."""
        return not self.rows and not self.has_scores and self.dropped[MISSING_SCORE] > 0


def reason_counts(dropped):
    """["9 below threshold", ...] of {reason: count}, in the order of REASONS."""
    return [f"{dropped[reason]:,} {reason}" for reason in REASONS if dropped.get(reason)]


def drop_reason(row, kind, threshold, include_missing_scores, seen):
    """The first reason to drop a row, or None to keep it; `seen` collects what was kept."""
    score, response = row["extract_score"], row["messages"][-1]["content"]
    same_as = {(row["question"], response)} | ({row["key"]} if row["key"] else set())
    if not response:
        return NO_RESPONSE
    if score is None and not include_missing_scores:
        return MISSING_SCORE
    if row["label"] == "default" or (kind == "trait" and row["label"] != "pos"):
        return LABEL
    if score is not None and score < threshold:
        return BELOW
    if same_as & seen:
        return DUPLICATE
    seen.update(same_as)
    return None


def read_dataset(name, datasets, options):
    """[(kind, row, None) or (kind, None, what is wrong with it)] of a dataset ("A+B" pooled).
    Raises ValueError for an unknown name, an unreadable file, a score beyond its scale unless the
    threshold is the user's own, and, if strict, a broken line."""
    rows = []
    for part in dataset_parts(name, datasets):
        kind = parse_name(part)[1]
        for row, problem in parsed_rows(datasets[part], options.keep_system_prompt):
            if problem and options.strict:
                raise ValueError(f"{problem} (--strict)")
            if row:
                row["key"] = row["key"] and f"{part} {row['key']}"
                check_scale(row["extract_score"], part, kind, options)
            rows.append((kind, row, problem))
    return rows


def check_scale(score, part, kind, options):
    """ValueError if a score is beyond its kind's scale, and the threshold is not the user's own."""
    threshold, top = f"{kind}_min_score", TOP_SCORE[kind]
    usual = getattr(options, threshold) == getattr(DataOptions, threshold)
    if usual and score is not None and score > top:
        about = f"{part}: score {score:g}, where a {kind} has at most {top:g}"
        raise ValueError(f"{about}; for another scale say --{threshold.replace('_', '-')}")


def filter_rows(rows, options):
    """What `read_dataset` gave as a Filtered: the rows that pass, and what became of the others."""
    result, seen = Filtered(total=len(rows)), set()
    for kind, row, problem in rows:
        if problem:
            result.problems.append(problem)
            result.dropped[MALFORMED] += 1
            continue
        threshold = options.role_min_score if kind == "role" else options.trait_min_score
        score, response = row["extract_score"], row["messages"][-1]["content"]
        result.has_scores |= score is not None
        if kind == "trait" and row["label"] == "neg" and response:
            result.plain += [row] if (score or 0.0) < PLAIN_SCORE else []
        reason = drop_reason(row, kind, threshold, options.include_missing_scores, seen)
        if reason:
            result.dropped[reason] += 1
        else:
            result.rows.append(row)
    return result


def filter_dataset(name, datasets, options):
    """The rows of one dataset that pass, as a Filtered; ValueError as `read_dataset` has it."""
    return filter_rows(read_dataset(name, datasets, options), options)


def plain_datasets(name, datasets):
    """Default datasets of a dataset's source model, those of its kind first: names, maybe none."""
    source, kind, _ = parse_name(dataset_parts(name, datasets)[0])
    kinds = kind, "trait" if kind == "role" else "role"
    defaults = "0_default", "1_default", "default"
    all_names = [f"{source}__{its_kind}__{default}" for its_kind in kinds for default in defaults]
    return [other for other in all_names if other in datasets]


def plain_rows(name, datasets, filtered):
    """(rows of the source model without a dataset's persona, whose they are); [] if there are none.
    A trait's own neg rows; otherwise the first default dataset that has a response, whatever its
    labels and scores. Lines that do not parse are left out."""
    if filtered.plain:
        return filtered.plain, "neg rows of the dataset"
    for other in plain_datasets(name, datasets):
        rows = parsed_rows(datasets[other], scored=False)
        if rows := [row for row, _ in rows if row and row["messages"][-1]["content"]]:
            return rows, other
    return [], "nobody's"


def hash_unit(*parts):
    """A number in [0, 1) from sha256 of the parts: the same on every machine and hash seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_question(items, fraction, seed, salt="heldout"):
    """Split rows or Examples into (the others, those of chosen questions).
    A hash of salt, seed and the question's text chooses, so every dataset has the same split."""
    groups = [], []
    for item in items:
        row = item if isinstance(item, dict) else item.row
        groups[hash_unit(salt, seed, row["question"]) < fraction].append(item)
    return groups


def take_budget(rows, chat, target_tokens, max_length, seed):
    """Shuffle rows by seed and tokenize them, batch by batch, until the token budget is reached.
    target_tokens: tokens of whole chat-formatted examples (the one that crosses it is kept), None
    takes all. Returns (examples, tokens, rows longer than max_length, what is wrong with each row
    that the template refuses); rows on disk in another order give the same examples in the same
    order."""
    digests = [hash_unit(seed, row["question"], row["messages"][-1]["content"]) for row in rows]
    order = sorted(range(len(rows)), key=digests.__getitem__)
    examples, tokens, too_long, refused = [], 0, 0, []
    for start in range(0, len(order), 64):
        batch, problems = chat.encode_each([rows[i] for i in order[start : start + 64]])
        refused += problems
        for example in batch:
            if target_tokens is not None and tokens >= target_tokens:
                return examples, tokens, too_long, refused
            if len(example.input_ids) > max_length:
                too_long += 1
            else:
                examples.append(example)
                tokens += len(example.input_ids)
    return examples, tokens, too_long, refused


@dataclass
class Splits:
    """Examples of one dataset by what they are for; no question is in two of the three.
    validation is cut from the questions that are not held out; tokens: of it and `train` together;
    filtered: the dataset's rows, and why others were dropped; taught: what --teacher sees."""

    train: list
    validation: list
    heldout: list
    tokens: int
    filtered: Filtered
    taught: list = field(default_factory=list)

    def counts(self):
        """What became of the dataset's rows, as run.json keeps it."""
        rows = self.filtered
        return {
            "rows": rows.total, "kept": rows.kept, "dropped": +rows.dropped, "tokens": self.tokens,
            "train": len(self.train), "validation": len(self.validation), "summary": rows.counts(),
        }  # fmt: skip


def split_dataset(name, datasets, chat, options, heldout_tokens=0, rows=None):
    """Filter one dataset, split it by question and tokenize what the budgets ask for, as Splits.
    chat: a ChatFormat; heldout_tokens: budget of held-out examples, 0 for none; rows: of
    `read_dataset`, which is called, and may raise ValueError, if there are none yet."""
    filtered = filter_rows(rows or read_dataset(name, datasets, options), options)
    seed, limit = options.seed, options.max_length
    rows, others = split_by_question(filtered.rows, options.heldout_fraction, options.split_seed)
    examples, tokens, filtered.dropped[TOO_LONG], refused = take_budget(
        rows, chat, options.target_tokens, limit, seed
    )
    train, validation = split_by_question(
        examples, options.val_fraction, options.split_seed, "validation"
    )
    heldout = []
    if heldout_tokens:
        heldout, _, _, more = take_budget(others, chat, heldout_tokens, limit, seed)
        refused += more
    if refused and options.strict:
        raise ValueError(f"{name}: {refused[0]} (--strict)")
    filtered.refused, filtered.problems = len(refused), filtered.problems + refused
    filtered.dropped[MALFORMED] += len(refused)
    return Splits(train, validation, heldout, tokens, filtered)


def add_data_arguments(parser):
    """Add the data options that data_filter.py and train_steering.py share."""
    parser.set_defaults(**dataclasses.asdict(DataOptions()))
    add = parser.add_argument_group("data").add_argument
    add("--data-root", help="folder of datasets, in any of the three layouts")
    add("--dataset", nargs="+", metavar="NAME", help="dataset names; A+B pools two into one")
    add("--list-file", metavar="FILE", help="file of dataset names, one a line, # comments")
    add("--source-model", help="of bare names and of the assistant-axis layout; takes no others")
    add("--kind", choices=("role", "trait"), help="as --source-model: role or trait")
    add("--role-min-score", type=float, help="lowest score kept of a role, 0-3")
    add("--trait-min-score", type=float, help="lowest score kept of a trait, 0-100")
    add("--include-missing-scores", action="store_true", help="DANGER: keep rows nobody scored")
    add("--keep-system-prompt", action="store_true", help="leave the persona's text in the prompt")
    add("--target-tokens", type=int, help="token budget of training and validation examples")
    add("--max-length", type=int, help="drop examples of more tokens")
    add("--heldout-fraction", type=float, help="share of questions held out for the evaluation")
    add("--split-seed", type=int, help="seed of the split by question")
    add("--seed", type=int, help="seed of rows taken, their order, the initial vector")
    add("--chat-template", metavar="FILE", help="Jinja chat template in place of the tokenizer's")
    add("--strict", action="store_true", help="stop at the first broken line")


DATA_BOUNDS = {  # of the numbers among them
    "count": "target_tokens max_length", "share": "heldout_fraction", "seed": "seed split_seed",
    "number": "role_min_score trait_min_score",
}  # fmt: skip


def inspect_dataset(name, datasets, chat, options):
    """A line of the table, as a dict; broken lines go to stderr. chat None: rows are only counted.
    One unreadable file must not hide the others: unless strict, it is a line that says so."""
    try:
        return table_line(name, datasets, chat, options)
    except Exception as error:
        if options.strict:
            raise
        numbers = dict.fromkeys(NUMBERS, 0)
        return {"dataset": name, "status": f"error: {error}", "dropped": {}, **numbers}


def table_line(name, datasets, chat, options):
    """`inspect_dataset` of a dataset that can be read."""
    rows, chat = read_dataset(name, datasets, options), chat and chat.remembering()
    splits = chat and split_dataset(name, datasets, chat, options, rows=rows)
    filtered = splits.filtered if chat else filter_rows(rows, options)
    tokens = splits.tokens if chat else None
    examples = len(splits.train) + len(splits.validation) if chat else None
    status = "ok" if chat else "not tokenized"
    if filtered.is_baseline:
        status = "no examples: no scores"
    elif not filtered.rows or examples == 0:
        status = "no examples: none passes" if not filtered.rows else "no examples: all held out"
    elif chat and tokens < options.target_tokens:
        status = f"under budget: {tokens:,} of {options.target_tokens:,}"
    if chat and tokens < options.target_tokens and filtered.dropped[BELOW]:
        key = f"{parse_name(name)[1]}_min_score"
        lower = getattr(options, key) / 1.5  # 3 -> 2 for roles, 75 -> 50 for traits
        laxer = dataclasses.replace(options, **{key: lower})
        more = split_dataset(name, datasets, chat, laxer, rows=rows).tokens
        status += f" (score >= {lower:g} gives {more:,})" if more > tokens else ""
    sys.stderr.writelines(f"{name}: {problem}\n" for problem in filtered.problems)
    return {
        "dataset": name, "status": status, "tokens": tokens, "examples": examples,
        "rows": filtered.total, "kept": filtered.kept, "dropped": +filtered.dropped,
    }  # fmt: skip


def print_table(lines, passed_over=0):
    """The validation table: a line a dataset, then totals; passed_over: files without a name."""
    keys, over = NUMBERS, f" ({passed_over} file{'s' * (passed_over > 1)} passed over)"
    total = {"dataset": f"{len(lines)} datasets{over * bool(passed_over)}", "dropped": Counter()}
    total["status"] = f"{sum(line['status'] == 'ok' for line in lines)} ok"
    for key in keys:
        total[key] = None if lines[0][key] is None else sum(line[key] or 0 for line in lines)
    table = [["dataset", *keys, "status; dropped"]]
    for line in [*lines, total]:
        total["dropped"].update(line["dropped"] if line is not total else {})
        numbers = ["-" if line[key] is None else f"{line[key]:,}" for key in keys]
        reasons = ", ".join(reason_counts(line["dropped"])) or "none dropped"
        table.append([line["dataset"], *numbers, f"{line['status']}; {reasons}"])
    print("\n".join(aligned(table, left=(0, len(keys) + 1))))


def parse_args(argv=None):
    """Command line of data_filter.py."""
    parser = new_parser(__doc__)
    add_data_arguments(parser)
    add = parser.add_argument_group("table").add_argument
    add("--model", help="whose tokenizer counts: HF id, folder or .gguf")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--json", metavar="OUT", help="write the table as JSON")
    add("--write-list", metavar="FILE", help="write the names that reach the budget")
    text = "--write-list needs --model, whose tokens the budget counts"
    return parse(parser, argv, DATA_BOUNDS, lambda a: [(a.write_list and not a.model, text)])


def run(args):
    """Print the table of the requested datasets, write what was asked for, return the exit code."""
    options, passed_over = DataOptions.of(vars(args)), []
    datasets = options.datasets(passed_over)
    names = requested_names(datasets, args.dataset, args.list_file, args.source_model, args.kind)
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
    lines = list(in_processes(inspect_dataset, names, datasets, chat, options, unit="dataset"))
    print_table(lines, len(passed_over))
    if args.json:
        Path(args.json).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if args.write_list:
        good = [line["dataset"] for line in lines if line["status"] == "ok"]
        Path(args.write_list).write_text("".join(f"{name}\n" for name in good), encoding="utf-8")
        print(f"{len(good)} names -> {args.write_list}, {len(lines) - len(good)} left out")
    bad = ("no examples: none", "no examples: all", "error")
    return 2 if any(line["status"].startswith(bad) for line in lines) else 0


def main(argv=None):
    """Command line entry; returns the exit code."""
    return exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
