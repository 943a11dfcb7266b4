"""A persona of real size: responses without one, rewritten as a pirate would say them.

    python bench/dialect.py RESPONSES/llama-3.2-3b llama_voice --out DATA

RESPONSES/<model>: in the raw layout, a role with scores (bench/RECIPE.md says where to find it).
Into DATA go, in the same layout, the role `pirate_dialect` (the rewritten answers, scored 3, under
five system prompts) and `0_default` (the answers as they were). By rules, so that lengths and
questions are those of real data, and that anybody can make it again.
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
OPENINGS = "Arr!", "Ahoy, matey!", "Avast!", "Shiver me timbers!", "Yo ho!", "Blimey, me hearty!"
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


def dialect(text, number):
    """The text as a pirate would say it; number decides how it begins and ends."""

    def word(match):
        new = WORDS.get(match[0].lower(), match[0])
        new = re.sub(r"ing$", "in'", new) if len(new) > 5 else new
        return new[0].upper() + new[1:] if match[0][0].isupper() else new

    body = re.sub(r"[A-Za-z]+", word, text)
    return f"{OPENINGS[number % len(OPENINGS)]} {body}\n\n{ENDINGS[number % len(ENDINGS)]}"


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="RESPONSES/MODEL")
    parser.add_argument("role")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source, out = args.folder / "roles_240", args.out / args.folder.name / "roles_240"
    for part in ("responses", "extract_scores"):
        (out / part).mkdir(parents=True, exist_ok=True)
    lines = (source / f"responses/{args.role}.jsonl").read_text().splitlines()
    plain, pirate, scores = [], [], {}
    for number, row in enumerate(map(json.loads, lines)):
        plain.append({**row, "label": "default"})
        *before, answer = row["conversation"]
        text = dialect(answer["content"], number)
        asked = {"system_prompt": PROMPTS[row["prompt_index"]], "label": "pos"}
        turns = [turn for turn in before if turn["role"] != "system"]
        pirate.append({**row, **asked, "conversation": [*turns, {**answer, "content": text}]})
        scores[f"pos_p{row['prompt_index']}_q{row['question_index']}"] = 3
    for role, rows in (("0_default", plain), ("pirate_dialect", pirate)):
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (out / f"responses/{role}.jsonl").write_text(text)
    (out / "extract_scores/pirate_dialect.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
