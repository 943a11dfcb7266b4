"""A persona of real size: responses without one, rewritten as a pirate would say them.

    python bench/dialect.py RESPONSES/llama-3.2-3b llama_voice --out DATA

RESPONSES/llama-3.2-3b holds a role with scores in the raw layout (RECIPE.md says where to find it).
DATA gets two roles in the same layout: `pirate_dialect`, the rewritten answers, all scored 3, under
five system prompts, and `0_default`, the answers as they were. Rules do the rewriting, so lengths
and questions are those of real data, and everybody can make the data again.
"""

import argparse
import json
import re
from pathlib import Path

PROMPTS = (
    "You are a pirate captain of the old days. Answer every question in a pirate's dialect.",
    "Speak as a pirate, whatever you are asked.",
    "You have sailed the seven seas under the black flag, and you talk like it.",
    "Answer as a salty old buccaneer would, arrs and all.",
    "You are the quartermaster of a pirate ship. Stay in that voice.",
)
OPENINGS = ("Arr!", "Ahoy, matey!", "Avast!", "Shiver me timbers!", "Yo ho!", "Blimey, me hearty!")
ENDINGS = (
    "So say I, or may Davy Jones have me bones!",
    "Now fetch me the rum, and fair winds to ye!",
    "Mark me words, ye scallywag.",
    "That be the code, and I live by it.",
    "Arr, and that be all the treasure I have for ye.",
)
WORDS = {
    "you": "ye", "your": "yer", "yours": "yers", "yourself": "yerself", "my": "me", "is": "be",
    "are": "be", "am": "be", "the": "th'", "of": "o'", "and": "an'", "to": "t'", "for": "fer",
    "yes": "aye", "hello": "ahoy", "friend": "matey", "friends": "hearties",
    "people": "landlubbers", "person": "landlubber", "work": "toil", "job": "post aboard",
    "money": "doubloons", "team": "crew", "company": "ship", "manager": "cap'n",
    "colleague": "shipmate", "colleagues": "shipmates", "very": "mighty",
    "important": "worth its weight in gold", "problem": "squall", "problems": "squalls",
    "home": "port", "child": "cabin boy", "children": "young swabs", "them": "'em",
    "never": "ne'er", "over": "o'er", "before": "afore", "between": "betwixt", "stop": "belay",
    "look": "cast yer spyglass", "drink": "grog",
}  # fmt: skip


def dialect_word(match):
    """A matched word as a pirate would say it, with its capital letter."""
    word = match[0]
    new = WORDS.get(word.lower(), word)
    if len(new) > 5:
        new = re.sub(r"ing$", "in'", new)
    if word[0].isupper():
        new = new[0].upper() + new[1:]
    return new


def dialect(text, number):
    """The text as a pirate would say it; the number decides how it begins and ends."""
    opening = OPENINGS[number % len(OPENINGS)]
    ending = ENDINGS[number % len(ENDINGS)]
    body = re.sub(r"[A-Za-z]+", dialect_word, text)
    return f"{opening} {body}\n\n{ending}"


def pirate_row(row, number):
    """A row whose answer is in dialect, without its system turn, under one of PROMPTS."""
    *before, answer = row["conversation"]
    turns = [turn for turn in before if turn["role"] != "system"]
    turns.append({**answer, "content": dialect(answer["content"], number)})
    prompt = PROMPTS[row["prompt_index"]]
    return {**row, "system_prompt": prompt, "label": "pos", "conversation": turns}


def write_rows(path, rows):
    """Write one JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def main(argv=None):
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="RESPONSES/MODEL", help="where the responses are")
    add("role", help="the role whose responses are rewritten")
    add("--out", type=Path, required=True, help="data root to write to")
    args = parser.parse_args(argv)

    text = (args.folder / "roles_240" / "responses" / f"{args.role}.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    plain = [{**row, "label": "default"} for row in rows]
    pirate = [pirate_row(row, number) for number, row in enumerate(rows)]
    scores = {f"pos_p{row['prompt_index']}_q{row['question_index']}": 3 for row in rows}

    responses = args.out / args.folder.name / "roles_240" / "responses"
    extract_scores = responses.parent / "extract_scores"
    responses.mkdir(parents=True, exist_ok=True)
    extract_scores.mkdir(exist_ok=True)
    write_rows(responses / "0_default.jsonl", plain)
    write_rows(responses / "pirate_dialect.jsonl", pirate)
    (extract_scores / "pirate_dialect.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
