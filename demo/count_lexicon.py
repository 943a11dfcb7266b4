"""Count the answers of an evaluated run that contain a word of a lexicon, per condition.

python demo/count_lexicon.py RUN_DIR demo/pirate_lexicon.txt
"""

import json
import re
import sys
from pathlib import Path


def lexicon_pattern(path):
    """A regular expression for any whole word (or phrase) of the file, whatever its case."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def count(samples, pattern):
    """{condition: number of answers with a hit}."""
    conditions = samples[0]["answers"]
    return {c: sum(bool(pattern.search(s["answers"][c])) for s in samples) for c in conditions}


def main():
    """Print the counts and the run's folder."""
    run, lexicon = sys.argv[1:]
    result = json.loads(Path(run, "eval.json").read_text(encoding="utf-8"))
    samples, scale = result["samples"], result["recommended"]["scale"]
    use = scale and f"steered x{scale:g}"
    print(f"answers with a word of {lexicon}, of {len(samples)} held-out questions:")
    for condition, hits in count(samples, lexicon_pattern(lexicon)).items():
        print(f"  {condition:<16} {hits:>3}" + "  the recommended scale" * (condition == use))
    print(f"run: {run}")


if __name__ == "__main__":
    main()
