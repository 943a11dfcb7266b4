"""Read persona datasets in three layouts (README, "Data layouts"): raw objects in, rows out.

    datasets = find_datasets("data")                   # {name: (responses path, scores path)}
    for row, problem in parsed_rows(datasets[name]):   # persona text out of the prompt
        ...                                            # a broken line has no row, but a problem

Another kind of file is another function in READERS, other folders another loop in find_datasets.
"""

import difflib
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from unicodedata import normalize


def parse_name(name):
    """Split "{source_model}__{role|trait}__{name}" into its parts; ValueError if it is not one.
    A name is any text that can be part of a file's name: spaces are, "/", ".." and tabs are not."""
    part = r"[^/\\\x00-\x1f\x7f]+"
    match = re.fullmatch(rf"(?!\.)({part}?)__(role|trait)__({part})", name)
    if not match or ".." in name:
        raise ValueError(
            f'dataset name "{name}" is not of the form {{source_model}}__{{role|trait}}__{{name}} '
            '(without "/" and ".."; bare names need --source-model and --kind)'
        )
    return match.groups()


def pooled_names(name):
    """The names in "A+B", each with its own "__role__" or "__trait__"; a "+" may be in a name."""
    parts = re.split(r"\+(?=[^+]*__(?:role|trait)__)", name)
    return parts if all(re.search("__(role|trait)__", part) for part in parts) else [name]


def find_datasets(root, source_model=None, kind=None, passed_over=None):
    """Every dataset under `root`: {name: (responses path, scores path or None if in the rows)}.
    source_model, kind: keep only these; the assistant-axis layout names neither, so it needs both.
    passed_over: a list that gets the files whose name is none. Raises ValueError if the root is
    missing, holds none of the three layouts, or two files of one dataset."""
    root, found = Path(root), []
    if not root.is_dir():
        raise ValueError(f"--data-root {root}: no such folder")
    for folder in [*root.glob("*/roles_240"), *root.glob("*/traits_240")]:  # raw personas
        for path in folder.glob("responses/[!.]*.jsonl"):
            name = f"{folder.parent.name}__{folder.name.removesuffix('s_240')}__{path.stem}"
            found.append((name, path, folder / "extract_scores" / f"{path.stem}.json"))
    for path in root.glob("responses/[!.]*.jsonl"):  # assistant-axis pipeline
        if not (source_model and kind):
            raise ValueError(f"{root} has the assistant-axis layout: add --source-model and --kind")
        name = f"{source_model}__{kind}__{path.stem}"
        found.append((name, path, root / "scores" / f"{path.stem}.json"))
    for path in root.glob("[!.]*"):  # processed
        name = path.name if path.is_dir() else path.name.removesuffix(path.suffix)
        if re.search("__(role|trait)__", name):
            found.append((name, path, None))
    wanted = {}
    for name, path, scores in sorted(found, key=lambda one: one[:2]):
        try:
            if not path.is_dir() and path.suffix not in READERS:
                raise ValueError(f"not a folder or one of {', '.join(filter(None, READERS))}")
            source, its_kind, _ = parse_name(name)
        except ValueError as error:
            print(f"WARNING: {path} passed over: {error}", file=sys.stderr)
            if passed_over is not None:
                passed_over.append(path)
            continue
        if name in wanted:
            raise ValueError(f"two files of one dataset, {name}: {wanted[name][0]} and {path}")
        if source_model in (None, source) and kind in (None, its_kind):
            wanted[name] = path, scores
    if not wanted and not (found and (source_model or kind)):
        raise ValueError(
            f"--data-root {root}: no known layout. Looked for <source_model>/{{roles,traits}}_240/"
            f"responses/*.jsonl, responses/*.jsonl, <source_model>__role__<name>{'|'.join(READERS)}"
        )
    if not wanted:
        kinds = sorted({"__".join(name.split("__")[:2]) for name, _, _ in found})
        raise ValueError(
            f"--data-root {root}: nothing of --source-model {source_model} --kind {kind}; "
            f"found {', '.join(kinds)}"
        )
    return wanted


def dataset_parts(name, datasets):
    """The names pooled by "A+B"; ValueError, with the closest names, if one is unknown."""
    parts = [name] if name in datasets else pooled_names(name)
    for part in parts:
        parse_name(part)
        if part not in datasets:
            close = difflib.get_close_matches(part, datasets, n=3)
            hint = f"closest: {', '.join(close)}" if close else "none has a similar name"
            among = "found, of this --source-model and --kind if given"
            raise ValueError(f'unknown dataset "{part}" ({len(datasets)} {among}; {hint})')
    return parts


def requested_names(datasets, names=None, list_file=None, source_model=None, kind=None):
    """Names given and names in the list file, each once, known or not; without any, all datasets.
    In the list a name is a line, spaces and all; what follows a "#" at a line's start or after a
    space is a comment, unless the whole line is a name. source_model, kind: what bare names are
    completed by, if both are given."""
    if not (names or list_file):
        return list(datasets)
    prefix = f"{source_model}__{kind}__" if source_model and kind else ""
    lines = Path(list_file).read_text(encoding="utf-8-sig").splitlines() if list_file else []
    wanted = []
    for line in [*(names or []), *lines]:
        whole = line.strip()
        known = whole in datasets or prefix + whole in datasets
        name = whole if known else re.sub(r"(^|\s)#.*", "", whole).strip()
        parts = [name] if known else name.split("+")
        wanted.append(name and "+".join(p if "__" in p else prefix + p for p in parts))
    if not any(wanted):
        raise ValueError(f"no dataset is named by --dataset {names} or {list_file}")
    return [name for name in dict.fromkeys(wanted) if name]


def data_digest(name, datasets):
    """sha256 over every file behind a dataset name: what "the same data" means to a run."""
    digest = hashlib.sha256()
    for path in (p for part in dataset_parts(name, datasets) for p in datasets[part] if p):
        files = [path]
        if path.is_dir():  # without what other tools leave in it
            files = sorted(f for f in path.rglob("*") if not f.name.startswith((".", "cache-")))
        for file in files:
            if file.is_file():
                with open(file, "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


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


# By suffix, "" for a folder: path -> (number, raw object, what is wrong with it or None), each row.
READERS = {".jsonl": read_jsonl, ".parquet": read_arrow, "": read_arrow}


def read_scores(path):
    """{"{label}_p{prompt_index}_q{question_index}": score}; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        scores = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unreadable scores ({error})") from error
    if not isinstance(scores, dict):
        raise ValueError(f"{path}: not one JSON object but {type(scores).__name__}")
    number = re.compile(r"(?<=_[pq])\d+(\.0+)?(?=_q|$)")  # 7 or, as pandas writes it, 7.0
    return {number.sub(lambda m: str(int(float(m[0]))), key): s for key, s in scores.items()}


def parse_score(value):
    """A score as float; None where there is none (None, NaN); ValueError for True, "N/A", inf."""
    try:
        score = math.nan if value is None else float(value)
    except (ValueError, TypeError, OverflowError):
        score = math.inf
    if isinstance(value, bool) or math.isinf(score):
        raise ValueError(f"score {value!r:.40} is not a number")
    return None if math.isnan(score) else score


def whole(value):
    """A whole number, however it is spelled (7, 7.0, "7"), as an int; ValueError otherwise."""
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError(f"index {value!r:.40} is not a whole number")
    return int(float(value))


def remove_persona(messages, system_prompt, question):
    """(messages that ask the question and no more, the persona's text that stood there).
    Source models without a system role were asked "{system_prompt}\\n\\n{question}" by the user.
    White space aside, the first user turn IS the question afterwards. Raises ValueError if more or
    less than the system prompt would have to go for that (where that is not known, whole lines
    before the question are taken for it), or if the persona is in the question or a later turn."""
    messages = [m for m in messages if m["role"] != "system"]
    texts = messages[0]["content"], question, system_prompt or ""
    first, asked, persona = (normalize("NFC", " ".join(text.split())) for text in texts)
    before, after = first.removesuffix(asked).strip(), first.removeprefix(asked).strip()
    there = before if first.endswith(asked) else after if first.startswith(asked) else None
    if there and persona:  # which may be a template, "You are {name}."
        filled = re.sub(r"\\\{.*?\\\}", ".*", re.escape(persona))
        fits = there in persona or re.fullmatch(filled, there)
    elif there:
        lines = normalize("NFC", texts[0]).rstrip().removesuffix(normalize("NFC", question.strip()))
        fits = there == before and lines.rstrip(" \t").endswith("\n")
    else:
        fits = there is not None
    if not asked or not fits:
        raise ValueError("the first user turn is not the question, with or without system prompt")
    users = [" ".join(m["content"].split()) for m in messages[1:] if m["role"] == "user"]
    users.append(asked)
    if any(text in turn for text in filter(None, (persona, there)) for turn in users):
        raise ValueError("the system prompt is still in a user turn")
    return [{"role": "user", "content": question}, *messages[1:]], there


def parse_row(raw, scores, keep_system_prompt=False):
    """One raw object as a row: question, system_prompt, messages, label, extract_score, key.
    question: the last user turn, which may come after others, that are context. scores: the score
    file's dict, or None where the row holds `extract_score`. The last message is
    the response, stripped as chat templates do, "" if there is none. Messages have their role and
    content and nothing else, since templates act on other keys. Raises ValueError."""
    turns = "conversation" if scores is not None or "conversation" in raw else "messages"
    indices = ("prompt_index", "question_index") if scores is not None else ()
    for needed in (turns, "question", "label", *indices):
        if raw.get(needed) is None:
            raise ValueError(f'no "{needed}" key; found {sorted(raw)}')
    messages, question = raw[turns], raw["question"]
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.get("role") in roles and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ValueError(f'"{turns}" must be a list of {{role, content}} with text in both')
    messages = [{key: m[key] for key in ("role", "content")} for m in messages]
    system = [m["content"] for m in messages if m["role"] == "system"]
    system_prompt = raw.get("system_prompt") or "\n\n".join(system)
    if not isinstance(question, str) or not isinstance(system_prompt, str):
        raise ValueError('"question" and "system_prompt" must be text')
    if [m["role"] for m in messages if m["role"] != "system"][:1] != ["user"]:
        raise ValueError("the conversation does not start with a user turn")
    "".join([question, system_prompt, *(m["content"] for m in messages)]).encode()  # surrogates
    question = question.strip()
    if not keep_system_prompt:
        messages, there = remove_persona(messages, system_prompt, question)
        system_prompt = system_prompt or there
    elif system_prompt and messages[0]["content"].strip() == question:  # it is nowhere in it
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if len(users := [m["content"] for m in messages if m["role"] == "user"]) > 1:
        question = users[-1].strip()  # what the response answers
    last = messages[-1]
    response = last["content"].strip() if last["role"] == "assistant" else ""
    key = None
    if scores is not None:
        key = f"{raw['label']}_p{whole(raw['prompt_index'])}_q{whole(raw['question_index'])}"
    return {
        "question": question, "system_prompt": system_prompt, "label": raw["label"], "key": key,
        "messages": [*messages[:-1], {"role": "assistant", "content": response}],
        "extract_score": parse_score(scores.get(key) if key else raw.get("extract_score")),
    }  # fmt: skip


def parsed_rows(paths, keep_system_prompt=False, scored=True):
    """Yield (row, None), or (None, what is wrong with it and where), for every row of a dataset.
    paths: (responses, scores or None), as `find_datasets` gives them. A row that nobody can make
    sense of is a problem, whatever its reading ran into. scored: whether it matters, after the
    last row, which of the scores were of rows: ValueError if none was."""
    rows_path, scores_path = paths
    scores = None if scores_path is None else read_scores(scores_path)
    read, keys = READERS["" if rows_path.is_dir() else rows_path.suffix], set()
    for number, raw, error in read(rows_path):
        try:
            if error:
                raise ValueError(error)
            row = parse_row(raw, scores, keep_system_prompt)
            keys.add(row["key"])
            yield row, None
        except Exception as problem:  # the next row may do better
            yield None, f"{rows_path.parent.name}/{rows_path.name}:{number}: {problem}"
    met = keys & {*(scores or ())}
    if scored and scores and not met and keys:
        rows, there = f"such as {min(keys)!r}", f"such as {min(scores)!r}"
        raise ValueError(f"{scores_path}: no score is of a row; rows {rows}, scores {there}")
    if scored and 0 < len(met) < len(scores or ()):
        where = f"{scores_path.parent.name}/{scores_path.name}"
        print(f"NOTE: {len(met)} of {len(scores)} scores in {where} are of rows", file=sys.stderr)
