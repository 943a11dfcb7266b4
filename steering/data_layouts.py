"""Read persona datasets in three layouts (README, "Data layouts"): raw objects in, rows out.

    datasets = find_datasets("data")                   # {name: (responses path, scores path)}
    for row, problem in parsed_rows(datasets[name]):   # persona text out of the prompt
        ...                                            # a broken line has a problem, and no row

Another kind of file is another function in READERS; other folders are another loop in
`candidate_files`.
"""

import difflib
import hashlib
import json
import math
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from unicodedata import normalize

from steering.files import read_text

EXACT = 2**53  # from here on, not every whole number is a float
# What models write around their thoughts before an answer.
THOUGHT = r"(?:[\w:]*think\w*|thought|reason\w*)"
OPENS_THOUGHT = (
    rf"<{THOUGHT}>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought"
    r"|<\|channel\|>analysis<\|message\|>"
)
ENDS_THOUGHT = (
    rf"</{THOUGHT}>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>"
    r"|<\|channel\|>final<\|message\|>"
)

# ---------------------------------------------------------------- names and files


def parse_name(name):
    """Split "{source_model}__{role|trait}__{name}" into its three parts.

    Each part is text that can stand in a file's name: spaces may, "/", ".." and tabs may not.
    Raises ValueError for any other name.
    """
    part = r"[^/\\\x00-\x1f\x7f]+"
    match = re.fullmatch(rf"(?!\.)({part}?)__(role|trait)__({part})", name)
    if not match or ".." in name:
        raise ValueError(
            f'dataset name "{name}" is not of the form {{source_model}}__{{role|trait}}__{{name}} '
            '(without "/" and ".."; bare names need --source-model and --kind)'
        )
    return match.groups()


def pooled_names(name):
    """Split "A+B" into full dataset names; a "+" that is not between two of them is kept."""
    parts = re.split(r"\+(?=[^+]*__(?:role|trait)__)", name)
    if all(re.search("__(role|trait)__", part) for part in parts):
        return parts
    return [name]


def persona_of(dataset):
    """A dataset's name without source model and kind, a pooled one's as "A+B"; any other name as it
    is."""
    try:
        return "+".join(parse_name(part)[2] for part in pooled_names(dataset))
    except ValueError:
        return dataset


def candidate_files(root, source_model, kind):
    """Yield (dataset name, responses path, scores path or None) of all that may be a dataset.

    Raises ValueError for the assistant-axis layout if source_model or kind is missing: its files
    name neither.
    """
    # Raw personas.
    for folder in [*root.glob("*/roles_240"), *root.glob("*/traits_240")]:
        prefix = f"{folder.parent.name}__{folder.name.removesuffix('s_240')}"
        for path in folder.glob("responses/[!.]*.jsonl"):
            scores = folder / "extract_scores" / f"{path.stem}.json"
            yield f"{prefix}__{path.stem}", path, scores

    # The assistant-axis pipeline.
    for path in root.glob("responses/[!.]*.jsonl"):
        if not (source_model and kind):
            raise ValueError(f"{root} has the assistant-axis layout: add --source-model and --kind")
        yield f"{source_model}__{kind}__{path.stem}", path, root / "scores" / f"{path.stem}.json"

    # Processed: the scores are in the rows. A folder's name may have dots.
    for path in root.glob("[!.]*"):
        name = path.name if path.is_dir() else path.stem
        if re.search("__(role|trait)__", name):
            yield name, path, None


def find_datasets(root, source_model=None, kind=None, passed_over=None):
    """Find every dataset under `root`: {name: (responses path, scores path or None)}.

    source_model, kind: keep only these. passed_over: a list that gets the files that look like
    datasets and are none. Raises ValueError if the root is missing or holds no dataset, or if two
    files are the same dataset.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data-root {root}: no such folder")
    found = sorted(candidate_files(root, source_model, kind), key=lambda candidate: candidate[:2])

    wanted = {}
    for name, path, scores in found:
        try:
            if not path.is_dir() and path.suffix not in READERS:
                raise ValueError(f"not a folder or one of {', '.join(filter(None, READERS))}")
            its_source, its_kind, _ = parse_name(name)
        except ValueError as error:
            print(f"WARNING: {path} passed over: {error}", file=sys.stderr)
            if passed_over is not None:
                passed_over.append(path)
            continue
        if name in wanted:
            raise ValueError(f"two files of one dataset, {name}: {wanted[name][0]} and {path}")
        if source_model in (None, its_source) and kind in (None, its_kind):
            wanted[name] = (path, scores)

    if not wanted and found and (source_model or kind):
        kinds = sorted({"__".join(name.split("__")[:2]) for name, _, _ in found})
        raise ValueError(
            f"--data-root {root}: nothing of --source-model {source_model} --kind {kind}; "
            f"found {', '.join(kinds)}"
        )
    if not wanted:
        raise ValueError(
            f"--data-root {root}: no known layout. Looked for <source_model>/{{roles,traits}}_240/"
            f"responses/*.jsonl, responses/*.jsonl, <source_model>__role__<name>{'|'.join(READERS)}"
        )
    return wanted


def dataset_parts(name, datasets):
    """Split "A+B" into its datasets; ValueError names the closest ones if one is unknown."""
    parts = [name] if name in datasets else pooled_names(name)
    for part in parts:
        parse_name(part)
        if part not in datasets:
            closest = ", ".join(difflib.get_close_matches(part, datasets)) or "no name is similar"
            raise ValueError(
                f'unknown dataset "{part}" ({len(datasets)} found, of this --source-model and '
                f"--kind if given; closest: {closest})"
            )
    return parts


def requested_names(datasets, args):
    """List the dataset names that the options ask for, each once, whether they exist or not.

    args: dataset and list_file name them, or all datasets are meant; source_model and kind, if
    both are given, complete bare names; then only keeps the names that match one of its shell
    patterns, in full or as the user wrote them, and limit the first ones of those. In a list file
    a name is a line, spaces and all; what follows a "#" at a line's start or after a space is a
    comment, unless the whole line is a name. Raises ValueError if no name is left.
    """
    prefix = ""
    if args.source_model and args.kind:
        prefix = f"{args.source_model}__{args.kind}__"
    lines = list(args.dataset or [])
    if args.list_file:
        lines += read_text(args.list_file).splitlines()

    as_written = {}  # {full name: what the user wrote}
    for line in lines:
        written = line.strip()
        if prefix + written in datasets:
            full = prefix + written
        elif written in datasets:
            full = written
        else:
            written = re.sub(r"(^|\s)#.*", "", written).strip()
            parts = [part if "__" in part else prefix + part for part in written.split("+")]
            full = "+".join(parts)
        if written:
            as_written.setdefault(full, written)
    if not (args.dataset or args.list_file):
        as_written = {name: name for name in datasets}
    elif not as_written:
        raise ValueError(f"no dataset is named by --dataset {args.dataset} or {args.list_file}")

    names = list(as_written)
    if args.only:
        names = [
            full
            for full, written in as_written.items()
            if any(fnmatchcase(full, p) or fnmatchcase(written, p) for p in args.only)
        ]
    if as_written and not names:
        raise ValueError(f"--only {' '.join(args.only)}: none of {len(as_written)} names matches")
    return names[: args.limit]


def data_digest(name, datasets):
    """Hash every file that is read for a dataset name: what "the same data" means to a run."""
    digest = hashlib.sha256()
    for part in dataset_parts(name, datasets):
        path, scores = datasets[part]
        read = arrow_files(path) if path.is_dir() else [path]
        for file in [*read, scores]:
            if file and file.is_file():
                with open(file, "rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- files


def read_jsonl(path):
    """Yield (line number, object, error or None) for every line that is not blank."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line), None
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield number, None, f"not JSON ({error})"


def arrow_files(folder):
    """List the data files of a `save_to_disk` folder, as the state.json of each of its splits, or
    its own, names them. Raises ValueError if there is none, or a state.json is unreadable."""
    files = []
    for state in sorted([*folder.glob("state.json"), *folder.glob("[!.]*/state.json")]):
        try:
            named = json.loads(state.read_bytes())["_data_files"]
            files += [state.with_name(file["filename"]) for file in named]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{state}: unreadable ({error!r})") from error
    if not files:
        raise ValueError(f"{folder}: not a save_to_disk folder (no state.json names a data file)")
    return files


def read_arrow(path):
    """Yield (row number, object, None) from a .parquet file or a `save_to_disk` folder."""
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException, ipc
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs pyarrow (pip install pyarrow)") from error

    tables = []
    try:
        if path.is_file():
            tables.append(parquet.read_table(path))
        else:
            for file in arrow_files(path):
                tables.append(ipc.open_stream(file.read_bytes()).read_all())
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: unreadable ({type(error).__name__}: {error})") from error

    number = 0
    for table in tables:
        for row in table.to_pylist():
            number += 1
            yield number, row, None


# By suffix, "" for a folder: path -> (number, raw object, what is wrong with it or None), each row.
READERS = {".jsonl": read_jsonl, ".parquet": read_arrow, "": read_arrow}


def read_scores(path):
    """Read a score file: {"{label}_p{prompt_index}_q{question_index}": score}.

    Returns {} if there is no such file. Raises ValueError for one that is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        scores = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: unreadable scores ({error})") from error
    if not isinstance(scores, dict):
        raise ValueError(f"{path}: not one JSON object but {type(scores).__name__}")
    # An index is 7, or 7.0 as pandas writes it, or 07.
    index = re.compile(r"(?<=_[pq])0*(\d+)(\.0+)?(?=_q|$)")
    return {index.sub(r"\1", key): score for key, score in scores.items()}


# ---------------------------------------------------------------- rows


def parse_score(value):
    """Read a score as a float; None where there is none (None, NaN).

    Raises ValueError for what is no number of a scale: True, "N/A", inf.
    """
    if value is None:
        return None
    try:
        score = float(value)
    except (ValueError, TypeError, OverflowError):
        score = math.inf
    if isinstance(value, bool) or math.isinf(score):
        raise ValueError(f"score {value!r:.40} is not a number")
    if math.isnan(score):
        return None
    return score


def whole(value):
    """Read a whole number, however it is spelled (7, 7.0, "7"); ValueError for any other value, and
    for a float so large that it may have been another number once."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        number = int(value)
    elif not isinstance(value, int):
        number = float(value)
    if isinstance(value, bool) or number != int(number):
        raise ValueError(f"index {value!r:.40} is not a whole number")
    if isinstance(number, float) and abs(number) >= EXACT:
        raise ValueError(f"index {value!r:.40} is too large for a float: write it as an integer")
    return int(number)


def comparable(text):
    """Reduce a text to what is compared: accents composed, every white space one space. Two
    questions are the same one if this is the same of both."""
    return normalize("NFC", " ".join(text.split()))


def without_thought(text):
    """Cut off the thought that a model wrote before an answer; "" if it is not ended.

    A thought may have been opened by the prompt: then only its end is in the text.
    """
    answer = re.split(ENDS_THOUGHT, text)[-1].strip()
    if re.match(OPENS_THOUGHT, answer):
        return ""
    return answer


def remove_persona(messages, system_prompt, question):
    """Cut the first user turn back to the question.

    messages: without system ones. Source models without a system role were asked
    "{system_prompt}\\n\\n{question}" by the user. White space aside, the turn must be the question
    with the system prompt, or a part of it, before or after; where the system prompt is not known,
    whole lines before the question are taken for it. Returns (messages, the text that was cut).
    Raises ValueError if anything else would have to be cut, or if the persona is in the question
    or in a later turn.
    """
    opening = messages[0]["content"]
    first = comparable(opening)
    asked = comparable(question)
    persona = comparable(system_prompt)

    cut = ""
    fits = False
    if asked and first.endswith(asked):
        cut = first.removesuffix(asked).strip()
        own_line = rf"\n[ \t]*{re.escape(normalize('NFC', question))}\s*$"
        fits = not cut or (not persona and re.search(own_line, normalize("NFC", opening)))
    elif asked and first.startswith(asked):
        cut = first.removeprefix(asked).strip()
    if cut and persona:
        # The system prompt may be a template, "You are {name}.".
        filled_in = re.sub(r"\\\{.*?\\\}", ".*", re.escape(persona))
        fits = cut in persona or re.fullmatch(filled_in, cut)
    if not fits:
        raise ValueError("the first user turn is not the question, with or without system prompt")

    later = [comparable(m["content"]) for m in messages[1:] if m["role"] == "user"]
    for turn in [asked, *later]:
        if any(text and text in turn for text in (persona, cut)):
            raise ValueError("the system prompt is still in a user turn")
    return [{"role": "user", "content": question}, *messages[1:]], cut


def parse_row(raw, scores, keep_system_prompt=False):
    """Turn a raw object into a row: question, system_prompt, messages, label, extract_score, key,
    thoughts.

    scores: the score file's dict, or None where the object holds `extract_score`. question: the
    last user turn, which may come after others, that are context; as `comparable` makes it, so that
    the same question is one text wherever questions are compared: what is asked is in messages. The
    last message is the response, stripped as chat templates do, "" if there is none. Messages keep
    their role and content only, since templates act on other keys. thoughts: how many of them were
    cut off answers. A NaN counts as a value that is not there. Raises ValueError.
    """
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    raw = {name: value for name, value in raw.items() if value == value}  # NaN is not itself
    turns_key = "messages"
    needed = ["question", "label"]
    if scores is not None:
        needed += ["prompt_index", "question_index"]
    if scores is not None or "conversation" in raw:
        turns_key = "conversation"
    for name in [turns_key, *needed]:
        if raw.get(name) is None:
            raise ValueError(f'no "{name}" key; found {sorted(raw)}')
    if isinstance(raw[turns_key], str):
        raise ValueError(f'"{turns_key}" is a string: if that is JSON, write what json.loads gives')

    messages = []
    thoughts = 0
    for turn in raw[turns_key]:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in ("system", "user", "assistant")
            or not isinstance(turn.get("content"), str)
        ):
            raise ValueError(f'"{turns_key}" must be a list of {{role, content}} with text in both')
        content = turn["content"]
        if turn["role"] == "assistant":
            content = without_thought(content)
            thoughts += content != turn["content"].strip()
        messages.append({"role": turn["role"], "content": content})
    spoken = [m for m in messages if m["role"] != "system"]
    if not spoken or spoken[0]["role"] != "user":
        raise ValueError("the conversation does not start with a user turn")

    question = raw["question"]
    system_prompt = raw.get("system_prompt")
    if not system_prompt:
        system_prompt = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    if not isinstance(question, str) or not isinstance(system_prompt, str):
        raise ValueError('"question" and "system_prompt" must be text')
    # Half a surrogate pair is no text either: no tokenizer takes it.
    "".join([question, system_prompt, *(m["content"] for m in messages)]).encode()

    question = question.strip()
    if not keep_system_prompt:
        messages, cut = remove_persona(spoken, system_prompt, question)
        system_prompt = system_prompt or cut
    elif system_prompt and comparable(messages[0]["content"]) == comparable(question):
        # The system prompt is a field alone, in no turn.
        messages = [{"role": "system", "content": system_prompt}, *messages]

    asked = [m["content"] for m in messages if m["role"] == "user"]
    if len(asked) > 1:
        question = asked[-1]
    response = ""
    if messages[-1]["role"] == "assistant":
        response = messages[-1]["content"]

    key = None
    score = raw.get("extract_score")
    if scores is not None:
        key = f"{raw['label']}_p{whole(raw['prompt_index'])}_q{whole(raw['question_index'])}"
        score = scores.get(key)
    return {
        "question": comparable(question),
        "system_prompt": system_prompt,
        "label": raw["label"],
        "key": key,
        "messages": [*messages[:-1], {"role": "assistant", "content": response}],
        "extract_score": parse_score(score),
        "thoughts": thoughts,
    }


def parsed_rows(paths, keep_system_prompt=False, scored=True):
    """Yield (row, None), or (None, what is wrong with it and where), for every row of a dataset.

    paths: (responses, scores or None), as `find_datasets` gives them. A row that nobody can make
    sense of is a problem, whatever its reading ran into. scored: whether the scores matter; then
    ValueError follows the last row if no score is of a row, and a note if some are of none.
    """
    path, scores_path = paths
    scores = None
    if scores_path is not None:
        scores = read_scores(scores_path)
    suffix = "" if path.is_dir() else path.suffix
    keys = set()
    for number, raw, error in READERS[suffix](path):
        try:
            if error:
                raise ValueError(error)
            row = parse_row(raw, scores, keep_system_prompt)
        except Exception as problem:  # the next row may do better
            yield None, f"{path.parent.name}/{path.name}:{number}: {problem}"
        else:
            keys.add(row["key"])
            yield row, None

    if not (scored and scores and keys):
        return
    of_rows = len(keys & set(scores))
    if not of_rows:
        examples = f"rows such as {min(keys)!r}, scores such as {min(scores)!r}"
        raise ValueError(f"{scores_path}: no score is of a row; {examples}")
    if of_rows < len(scores):
        place = f"{scores_path.parent.name}/{scores_path.name}"
        print(f"NOTE: {of_rows} of {len(scores)} scores in {place} are of rows", file=sys.stderr)
