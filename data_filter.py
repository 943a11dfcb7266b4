"""Filter scored persona responses into training examples: scores, split by question, token budget.

Reads three layouts (README, "Data layouts"), drops rows for one counted reason each, takes the
persona's text out of the prompt, and tokenizes only what the token budget needs.

    python data_filter.py --data-root sample_data                        # smallest run: rows only
    python data_filter.py --data-root DIR --model Qwen/Qwen3-32B         # table of every dataset
    python data_filter.py --data-root DIR --model ID --write-list FILE   # the names worth training

Exit codes: 0 done, 2 bad input (also: a dataset has scores and none passes).
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from chat_format import ChatFormat, load_tokenizer
from data_layouts import (
    dataset_parts,
    find_datasets,
    parse_name,
    parse_row,
    read_rows,
    read_scores,
)

# Why a row is dropped; the first that holds is counted.
MALFORMED, NO_RESPONSE, MISSING_SCORE = "malformed", "no response", "missing score"
LABEL, BELOW, DUPLICATE, TOO_LONG = "label", "below threshold", "duplicate", "too long"
REASONS = (MALFORMED, NO_RESPONSE, MISSING_SCORE, LABEL, BELOW, DUPLICATE, TOO_LONG)


def requested_names(args, datasets):
    """Names of --dataset and --list-file, each once, known or not; all datasets if neither is."""
    if not (args.dataset or args.list_file):
        return list(datasets)
    names = list(args.dataset or [])
    if args.list_file:
        lines = Path(args.list_file).read_text(encoding="utf-8").splitlines()
        names += [line.split("#")[0].strip() for line in lines]
    if not any(names):
        raise ValueError(f"no dataset is named by --dataset {args.dataset} or {args.list_file}")
    if args.source_model and args.kind:  # bare names
        prefix = f"{args.source_model}__{args.kind}__"
        pooled = [[p if "__" in p else prefix + p for p in n.split("+")] for n in names if n]
        names = ["+".join(parts) for parts in pooled]
    return [name for name in dict.fromkeys(names) if name]


# ------------------------------------------------------------------ filter, split, budget


@dataclass
class Filtered:
    """Rows kept of one dataset, rows dropped by reason, and a message for every broken line."""

    rows: list = field(default_factory=list)
    total: int = 0
    dropped: Counter = field(default_factory=Counter)
    problems: list = field(default_factory=list)
    has_scores: bool = False

    @property
    def kept(self):
        """Number of rows kept; too long is found out, and counted, only by tokenizing."""
        return len(self.rows) - self.dropped[TOO_LONG]

    def counts(self):
        """Say it in one line: "79 rows: 70 kept, 9 below threshold"."""
        dropped = [f"{self.dropped[r]:,} {r}" for r in REASONS if self.dropped[r]]
        return f"{self.total:,} rows: " + ", ".join([f"{self.kept:,} kept", *dropped])

    @property
    def is_baseline(self):
        """Whether nothing is kept because nobody scored it: to be skipped, not an error."""
        return not self.rows and not self.has_scores and self.dropped[MISSING_SCORE] > 0


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


def filter_dataset(name, datasets, args):
    """Read one dataset ("A+B" pooled) and keep the rows that pass, as a Filtered.

    args: a namespace of `add_data_arguments`. Raises ValueError for an unknown name, an unreadable
    file and, with --strict, a broken line.
    """
    result, seen = Filtered(), set()
    for part in dataset_parts(name, datasets):
        kind, (rows_path, scores_path) = parse_name(part)[1], datasets[part]
        threshold = args.role_min_score if kind == "role" else args.trait_min_score
        scores = None if scores_path is None else read_scores(scores_path)
        for number, raw, error in read_rows(rows_path):
            result.total += 1
            try:
                if error:
                    raise ValueError(error)
                row = parse_row(raw, scores, args.keep_system_prompt)
            except ValueError as problem:
                where = f"{rows_path.parent.name}/{rows_path.name}:{number}: {problem}"
                if args.strict:
                    raise ValueError(f"{where} (--strict)") from None
                result.problems.append(where)
                result.dropped[MALFORMED] += 1
                continue
            row["key"] = row["key"] and f"{part} {row['key']}"
            result.has_scores |= row["extract_score"] is not None
            reason = drop_reason(row, kind, threshold, args.include_missing_scores, seen)
            if reason:
                result.dropped[reason] += 1
            else:
                result.rows.append(row)
    return result


def hash_unit(*parts):
    """A number in [0, 1) from sha256 of the parts: the same on every machine and hash seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_question(items, fraction, seed, salt="heldout"):
    """Split rows or Examples into (the others, those of chosen questions).

    A hash of salt, seed and the question's text chooses, so every dataset has the same split.
    """
    groups = [], []
    for item in items:
        row = item if isinstance(item, dict) else item.row
        groups[hash_unit(salt, seed, row["question"]) < fraction].append(item)
    return groups


def take_budget(rows, chat, target_tokens, max_length, seed):
    """Shuffle rows by seed and tokenize them, batch by batch, until the token budget is reached.

    target_tokens: tokens of whole chat-formatted examples (the one that crosses it is kept), None
    takes all. Returns (examples, tokens, rows longer than max_length); rows on disk in another
    order give the same examples in the same order.
    """
    digests = [hash_unit(seed, row["question"], row["messages"][-1]["content"]) for row in rows]
    order = sorted(range(len(rows)), key=digests.__getitem__)
    examples, tokens, too_long = [], 0, 0
    for start in range(0, len(order), 64):
        for example in chat.encode([rows[i] for i in order[start : start + 64]]):
            if target_tokens is not None and tokens >= target_tokens:
                return examples, tokens, too_long
            if len(example.input_ids) > max_length:
                too_long += 1
            else:
                examples.append(example)
                tokens += len(example.input_ids)
    return examples, tokens, too_long


# ------------------------------------------------------------------ command line


def add_data_arguments(parser):
    """Add the data options that data_filter.py and train_steering.py share."""
    add = parser.add_argument_group("data").add_argument
    add("--data-root", default="data", help="folder of datasets, in any of the three layouts")
    add("--dataset", nargs="+", metavar="NAME", help="dataset names; A+B pools two into one")
    add("--list-file", metavar="FILE", help="file of dataset names, one a line, # comments")
    add("--source-model", help="source model of bare names and of the assistant-axis layout")
    add("--kind", choices=("role", "trait"), help="kind of bare names and of that layout")
    add("--role-min-score", type=float, default=3.0, help="lowest score kept of a role, 0-3")
    add("--trait-min-score", type=float, default=75.0, help="lowest score kept of a trait, 0-100")
    add("--include-missing-scores", action="store_true", help="DANGER: keep rows nobody scored")
    add("--keep-system-prompt", action="store_true", help="leave the persona's text in the prompt")
    add("--target-tokens", type=int, default=100_000, help="budget of training examples, tokens")
    add("--max-length", type=int, default=2048, help="drop longer examples (of those tokenized)")
    add("--heldout-fraction", type=float, default=0.2, help="share of questions held out")
    add("--split-seed", type=int, default=0, help="seed of the split by question")
    add("--seed", type=int, default=0, help="seed of the order of rows and the initial vector")
    add("--chat-template", metavar="FILE", help="Jinja chat template in place of the tokenizer's")
    add("--strict", action="store_true", help="stop at the first broken line")


def check_data_arguments(args):
    """What is wrong with the data options, as a list of messages."""
    fraction, roles, traits = args.heldout_fraction, args.role_min_score, args.trait_min_score
    checks = [
        (args.target_tokens >= 1, f"--target-tokens {args.target_tokens}: must be at least 1"),
        (args.max_length >= 2, f"--max-length {args.max_length}: must be at least 2"),
        (0 <= fraction < 1, f"--heldout-fraction {fraction}: not in [0, 1)"),
        (math.isfinite(roles), f"--role-min-score {roles}: not finite"),
        (math.isfinite(traits), f"--trait-min-score {traits}: not finite"),
    ]
    return [message for passed, message in checks if not passed]


def budgeted(filtered, chat, args):
    """Training examples of the kept rows: (examples, tokens); counts the rows that are too long."""
    rows, _ = split_by_question(filtered.rows, args.heldout_fraction, args.split_seed)
    examples, tokens, filtered.dropped[TOO_LONG] = take_budget(
        rows, chat, args.target_tokens, args.max_length, args.seed
    )
    return examples, tokens


def inspect_dataset(name, datasets, chat, args):
    """(table line as a dict, broken lines) of one dataset; chat None: rows are only counted."""
    filtered, tokens, examples = filter_dataset(name, datasets, args), None, None
    min_role, min_trait = args.role_min_score, args.trait_min_score
    status = "ok" if chat else "not tokenized"
    if chat:
        found, tokens = budgeted(filtered, chat, args)
        examples = len(found)
    if filtered.is_baseline:
        status = "no examples: no scores"
    elif not filtered.rows or examples == 0:
        status = "no examples: none passes" if not filtered.rows else "no examples: all held out"
    elif chat and tokens < args.target_tokens:
        status = f"under budget: {tokens:,} of {args.target_tokens:,}"
    if chat and tokens < args.target_tokens and filtered.dropped[BELOW]:
        lower = argparse.Namespace(**vars(args))  # 3 -> 2 for roles, 75 -> 50 for traits
        lower.role_min_score, lower.trait_min_score = min_role / 1.5, min_trait / 1.5
        _, more = budgeted(filter_dataset(name, datasets, lower), chat, lower)
        threshold = getattr(lower, f"{parse_name(name)[1]}_min_score")
        status += f" (score >= {threshold:g} gives {more:,})" if more > tokens else ""
    line = {"dataset": name, "status": status, "tokens": tokens, "examples": examples}
    line |= {"rows": filtered.total, "kept": filtered.kept, "dropped": +filtered.dropped}
    return line, filtered.problems


def print_table(lines):
    """The validation table: a line a dataset, then totals."""
    total = {"dataset": f"{len(lines)} datasets", "dropped": Counter()}
    for key in ("tokens", "examples", "rows", "kept"):
        total[key] = None if lines[0][key] is None else sum(line[key] or 0 for line in lines)
    for line in lines:
        total["dropped"].update(line["dropped"])
    total["status"] = f"{sum(line['status'] == 'ok' for line in lines)} ok"
    width = max(len(line["dataset"]) for line in [*lines, total])
    form = f"{{:{width}}} {{:>11}} {{:>9}} {{:>8}} {{:>8}}  {{}}; {{}}"
    print(form.format("dataset", "tokens", "examples", "rows", "kept", "status", "dropped"))
    for line in [*lines, total]:
        numbers = [line[key] for key in ("tokens", "examples", "rows", "kept")]
        cells = ["-" if number is None else f"{number:,}" for number in numbers]
        dropped = [f"{line['dropped'][r]:,} {r}" for r in REASONS if line["dropped"].get(r)]
        reasons = ", ".join(dropped) or "none dropped"
        print(form.format(line["dataset"], *cells, line["status"], reasons))


def parse_args(argv=None):
    """Command line of data_filter.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_arguments(parser)
    parser.add_argument("--model", help="whose tokenizer counts: HF id, folder or .gguf")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    parser.add_argument(
        "--write-list", metavar="FILE", help="write the names that reach the budget"
    )
    args = parser.parse_args(argv)
    problems = check_data_arguments(args)
    if args.write_list and not args.model:
        problems.append("--write-list needs --model, whose tokens the budget counts")
    if problems:
        parser.error("; ".join(problems))
    return args


def run(args):
    """Print the table of the requested datasets, write what was asked for, return the exit code."""
    datasets = find_datasets(args.data_root, args.source_model, args.kind)
    names = requested_names(args, datasets)
    for name in names:
        dataset_parts(name, datasets)
    if args.include_missing_scores:
        print("WARNING: --include-missing-scores keeps rows that nobody scored", file=sys.stderr)
    chat = None
    if args.model:
        chat = ChatFormat(load_tokenizer(args.model, args.chat_template, args.trust_remote_code))
    lines = []
    for name in tqdm(names, unit="dataset", disable=None):
        try:
            line, problems = inspect_dataset(name, datasets, chat, args)
        except (ValueError, OSError) as error:  # one unreadable file must not hide the others
            if args.strict:
                raise
            zeros = dict.fromkeys(("tokens", "examples", "rows", "kept"), 0)
            line, problems = (
                {"dataset": name, "status": f"error: {error}", **zeros, "dropped": {}},
                [],
            )
        for problem in problems:
            tqdm.write(f"{name}: {problem}", file=sys.stderr)
        lines.append(line)
    print_table(lines)
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
    args = parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
