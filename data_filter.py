"""Filter scored persona responses into training examples: scores, split by question, token budget.

Reads three layouts (README, "Data layouts"), drops rows for one counted reason each, takes the
persona's text out of the prompt, and tokenizes only what the token budget needs.

    python data_filter.py --data-root sample_data                        # smallest run: rows only
    python data_filter.py --data-root DIR --model Qwen/Qwen3-32B         # table of every dataset
    python data_filter.py --data-root DIR --model ID --write-list FILE   # the names worth training

Exit codes: 0 done, 2 bad input (also: a dataset has scores and none passes).
"""

import argparse
import difflib
import hashlib
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from chat_format import ChatFormat, load_tokenizer

# Why a row is dropped; the first that holds is counted.
MALFORMED, NO_RESPONSE, MISSING_SCORE = "malformed", "no response", "missing score"
LABEL, BELOW, DUPLICATE, TOO_LONG = "label", "below threshold", "duplicate", "too long"
REASONS = (MALFORMED, NO_RESPONSE, MISSING_SCORE, LABEL, BELOW, DUPLICATE, TOO_LONG)

# ------------------------------------------------------------------ names and layouts


def parse_name(name):
    """Split "{source_model}__{role|trait}__{name}" into its parts; ValueError if it is not one."""
    match = re.fullmatch(r"(?!\.)([^/\\\s]+?)__(role|trait)__([^/\\\s]+)", name)
    if not match or ".." in name:
        raise ValueError(
            f'dataset name "{name}" is not of the form {{source_model}}__{{role|trait}}__{{name}} '
            '(without "/" and ".."; bare names need --source-model and --kind)'
        )
    return match.groups()


def find_datasets(root, source_model=None, kind=None):
    """Every dataset under `root`: {name: (responses path, scores path or None if in the rows)}.

    source_model, kind: keep only these; the assistant-axis layout names neither, so it needs both.
    Raises ValueError if the root is missing or holds none of the three layouts.
    """
    root, found = Path(root), {}
    if not root.is_dir():
        raise ValueError(f"--data-root {root}: no such folder")
    for folder in [*root.glob("*/roles_240"), *root.glob("*/traits_240")]:  # raw personas
        for path in folder.glob("responses/*.jsonl"):
            name = f"{folder.parent.name}__{folder.name.removesuffix('s_240')}__{path.stem}"
            found[name] = (path, folder / "extract_scores" / f"{path.stem}.json")
    for path in root.glob("responses/*.jsonl"):  # assistant-axis pipeline
        if not (source_model and kind):
            raise ValueError(f"{root} has the assistant-axis layout: add --source-model and --kind")
        name = f"{source_model}__{kind}__{path.stem}"
        found[name] = (path, root / "scores" / f"{path.stem}.json")
    for path in root.iterdir():  # processed
        name = path.name.removesuffix(".jsonl").removesuffix(".parquet")
        if re.search("__(role|trait)__", name) and (path.is_dir() or name != path.name):
            found[name] = (path, None)
    if not found:
        raise ValueError(
            f"--data-root {root}: no known layout. Looked for <source_model>/{{roles,traits}}_240/"
            "responses/*.jsonl, responses/*.jsonl, <source_model>__role__<name>[.jsonl|.parquet]"
        )
    parts = {name: parse_name(name) for name in sorted(found)}
    return {
        name: found[name]
        for name, (source, its_kind, _) in parts.items()
        if source_model in (None, source) and kind in (None, its_kind)
    }


def dataset_parts(name, datasets):
    """The names pooled by "A+B"; ValueError, with the closest names, if one is unknown."""
    for part in name.split("+"):
        parse_name(part)
        if part not in datasets:
            close = difflib.get_close_matches(part, datasets, n=3)
            hint = f"closest: {', '.join(close)}" if close else "none has a similar name"
            raise ValueError(f'unknown dataset "{part}" ({len(datasets)} found; {hint})')
    return name.split("+")


def requested_names(args, datasets):
    """Full names of --dataset and --list-file, each once; every dataset if neither is given."""
    if not (args.dataset or args.list_file):
        return list(datasets)
    names = list(args.dataset or [])
    if args.list_file:
        lines = Path(args.list_file).read_text(encoding="utf-8").splitlines()
        names += [line.split("#")[0].strip() for line in lines]
    if not any(names):
        raise ValueError(f"--list-file {args.list_file} names no dataset")
    if args.source_model and args.kind:  # bare names
        prefix = f"{args.source_model}__{args.kind}__"
        pooled = [[p if "__" in p else prefix + p for p in n.split("+")] for n in names if n]
        names = ["+".join(parts) for parts in pooled]
    return ["+".join(dataset_parts(name, datasets)) for name in dict.fromkeys(names) if name]


def data_digest(name, datasets):
    """sha256 over every file behind a dataset name: what "the same data" means to a run."""
    digest = hashlib.sha256()
    for path in (p for part in dataset_parts(name, datasets) for p in datasets[part] if p):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------ reading rows


def read_jsonl(path):
    """Yield (line number, object, error or None) for every line that is not blank."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                if line.strip():
                    row = json.loads(line)
                    yield number, row, None if isinstance(row, dict) else "not a JSON object"
            except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                yield number, None, f"not JSON ({error})"


def read_arrow(path):
    """Yield (row number, object, None) from a .parquet file or a `save_to_disk` folder."""
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException, ipc
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pyarrow (pip install pyarrow)") from error
    try:
        if path.is_file():
            tables = [parquet.read_table(path)]
        else:  # one state.json per split names its files
            states = {p.parent: json.loads(p.read_text()) for p in sorted(path.rglob("state.json"))}
            files = [p / file["filename"] for p, s in states.items() for file in s["_data_files"]]
            tables = [ipc.open_stream(file.read_bytes()).read_all() for file in files]
    except (ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
    if not tables:
        raise ValueError(f"{path}: not a save_to_disk folder (no state.json names a data file)")
    rows = (row for table in tables for batch in table.to_batches() for row in batch.to_pylist())
    yield from ((number, row, None) for number, row in enumerate(rows, 1))


def read_scores(path):
    """{"{label}_p{prompt_index}_q{question_index}": score}; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: unreadable scores ({error})") from error
    if not isinstance(scores, dict):
        raise ValueError(f"{path}: not one JSON object but {type(scores).__name__}")
    return scores


def parse_score(value):
    """A score as float; None where there is none (None, NaN); ValueError for True, "N/A", inf."""
    try:
        score = math.nan if value is None else float(value)
    except (ValueError, TypeError):
        score = math.inf
    if isinstance(value, bool) or math.isinf(score):
        raise ValueError(f"score {value!r} is not a number")
    return None if math.isnan(score) else score


def remove_persona(messages, system_prompt, question):
    """Messages without system turns, a merged first user turn cut back to the question.

    Source models without a system role were asked "{system_prompt}\\n\\n{question}" by the user.
    Raises ValueError if the system prompt still stands in a user turn afterwards.
    """
    messages = [dict(m) for m in messages if m["role"] != "system"]
    first, persona = messages[0]["content"].strip(), (system_prompt or "").strip()
    if persona and first != question and first.startswith(persona):
        first = first[len(persona) :].strip() or question
    elif system_prompt is None and first.endswith("\n\n" + question):
        first = question
    messages[0]["content"] = first
    users = [m["content"] for m in messages if m["role"] == "user"]
    if persona and persona not in question and any(persona in text for text in users):
        raise ValueError("the system prompt is still in a user turn")
    return messages


def parse_row(raw, scores, keep_system_prompt=False):
    """One raw object as a row: question, system_prompt, messages, label, extract_score, key.

    scores: the score file's dict, or None where the row holds `extract_score`. The last message is
    the response, stripped as chat templates do, "" if there is none. Raises ValueError.
    """
    turns = "conversation" if scores is not None or "conversation" in raw else "messages"
    indices = ("prompt_index", "question_index") if scores is not None else ()
    for needed in (turns, "question", "label", *indices):
        if raw.get(needed) is None:
            raise ValueError(f'no "{needed}" key; found {sorted(raw)}')
    messages, question = raw[turns], raw["question"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict)
        and m.get("role") in ("system", "user", "assistant")
        and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ValueError(f'"{turns}" must be a list of {{role, content}} with text in both')
    system = [m["content"] for m in messages if m["role"] == "system"]
    system_prompt = raw.get("system_prompt")
    if system_prompt is None and system:
        system_prompt = system[0]
    if not isinstance(question, str) or not isinstance(system_prompt, str | None):
        raise ValueError('"question" and "system_prompt" must be text')
    if [m["role"] for m in messages if m["role"] != "system"][:1] != ["user"]:
        raise ValueError("the conversation does not start with a user turn")
    "".join([question, *(m["content"] for m in messages)]).encode()  # lone surrogates raise
    question = question.strip()
    if not keep_system_prompt:
        messages = remove_persona(messages, system_prompt, question)
    last = messages[-1]
    response = last["content"].strip() if last["role"] == "assistant" else ""
    key = None
    if scores is not None:
        key = f"{raw['label']}_p{raw['prompt_index']}_q{raw['question_index']}"
    return {
        "question": question,
        "system_prompt": system_prompt or "",
        "messages": [*messages[:-1], {"role": "assistant", "content": response}],
        "label": raw["label"],
        "extract_score": parse_score(scores.get(key) if key else raw.get("extract_score")),
        "key": key,
    }


# ------------------------------------------------------------------ filter, split, budget


@dataclass
class Filtered:
    """Rows kept of one dataset, rows dropped by reason, and a message for every broken line."""

    rows: list = field(default_factory=list)
    total: int = 0
    dropped: Counter = field(default_factory=Counter)
    problems: list = field(default_factory=list)
    has_scores: bool = False

    def counts(self):
        """Say it in one line: "79 rows: 70 kept, 9 below threshold"."""
        dropped = [f"{self.dropped[r]:,} {r}" for r in REASONS if self.dropped[r]]
        return f"{self.total:,} rows: " + ", ".join([f"{len(self.rows):,} kept", *dropped])


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
        read = read_jsonl if rows_path.suffix == ".jsonl" else read_arrow
        for number, raw, error in read(rows_path):
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
    add("--max-length", type=int, default=2048, help="drop longer examples, tokens")
    add("--heldout-fraction", type=float, default=0.2, help="share of questions held out")
    add("--split-seed", type=int, default=0, help="seed of the split by question")
    add("--seed", type=int, default=0, help="seed of the order of rows and the initial vector")
    add("--chat-template", metavar="FILE", help="Jinja chat template in place of the tokenizer's")
    add("--strict", action="store_true", help="stop at the first broken line")


def check_data_arguments(args):
    """What is wrong with the data options, as a list of messages."""
    checks = [
        (args.target_tokens >= 1, f"--target-tokens {args.target_tokens}: must be at least 1"),
        (args.max_length >= 2, f"--max-length {args.max_length}: must be at least 2"),
        (
            0 <= args.heldout_fraction < 1,
            f"--heldout-fraction {args.heldout_fraction}: not in [0, 1)",
        ),
        (math.isfinite(args.role_min_score), f"--role-min-score {args.role_min_score}: not finite"),
        (
            math.isfinite(args.trait_min_score),
            f"--trait-min-score {args.trait_min_score}: not finite",
        ),
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
    if not filtered.rows:
        status = "no examples: " + ("none passes" if filtered.has_scores else "no scores")
    elif examples == 0:
        status = "no examples: none left to train on"
    elif chat and tokens < args.target_tokens:
        status = f"under budget: {tokens:,} of {args.target_tokens:,}"
    if chat and tokens < args.target_tokens and filtered.dropped[BELOW]:
        lower = argparse.Namespace(**vars(args))  # 3 -> 2 for roles, 75 -> 50 for traits
        lower.role_min_score, lower.trait_min_score = min_role / 1.5, min_trait / 1.5
        _, more = budgeted(filter_dataset(name, datasets, lower), chat, lower)
        threshold = getattr(lower, f"{parse_name(name)[1]}_min_score")
        status += f" (score >= {threshold:g} gives {more:,})" if more > tokens else ""
    line = {"dataset": name, "status": status, "tokens": tokens, "examples": examples}
    line |= {"rows": filtered.total, "kept": len(filtered.rows), "dropped": +filtered.dropped}
    return line, filtered.problems


def print_table(lines):
    """The validation table: a line a dataset, then totals."""
    total = {"dataset": f"{len(lines)} datasets", "dropped": Counter()}
    for key in ("tokens", "examples", "rows", "kept"):
        total[key] = None if lines[0][key] is None else sum(line[key] for line in lines)
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
    if args.include_missing_scores:
        print("WARNING: --include-missing-scores keeps rows that nobody scored", file=sys.stderr)
    chat = None
    if args.model:
        chat = ChatFormat(load_tokenizer(args.model, args.chat_template, args.trust_remote_code))
    lines = []
    for name in tqdm(names, unit="dataset", disable=None):
        line, problems = inspect_dataset(name, datasets, chat, args)
        for problem in problems:
            tqdm.write(f"{name}: {problem}", file=sys.stderr)
        lines.append(line)
    print_table(lines)
    if args.json:
        Path(args.json).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if args.write_list:
        good = [line["dataset"] for line in lines if line["status"] == "ok"]
        Path(args.write_list).write_text("".join(f"{name}\n" for name in good), encoding="utf-8")
        print(f"{len(good)} names -> {args.write_list}")
    return 2 if any(line["status"].startswith("no examples: none") for line in lines) else 0


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
