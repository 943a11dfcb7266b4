"""What judges are asked of an evaluation, and what their verdicts come to.

Of every answer: the persona by the dataset's rubric, and coherence; overall is their harmonic mean,
each as a share of its scale (as in AxBench). Of the answers to identity questions: who speaks, and
whether it is a caricature. Of conversations: the persona, turn by turn.
"""

import sys
from collections import Counter

import numpy as np

from evaluation.judge import SCALES, WORDS, Judge, JudgeError, rubrics_for
from evaluation.kept import Kept
from evaluation.stats import drift_by_turn, mean_interval, spearman

ALIKE = 0.05  # share of the scale within which a judge finds vanilla and persona alike
CHARACTERS = 4  # a token, about


def make_judges(urls, models, dataset, rubric_dir, max_tokens):
    """A Judge of a dataset for each model, at its own address or all at the last one."""
    rubrics = rubrics_for(dataset, rubric_dir)
    keys = ["JUDGE_API_KEY", "JUDGE_API_KEY_2"]  # of an address, which no other gets
    places = list(zip(urls, keys, strict=False))
    places += places[-1:] * (len(models) - len(urls))
    about = zip(places, models, strict=True)
    return [Judge(url, model, rubrics, max_tokens, key) for (url, key), model in about]


def judgements(run):
    """What is Kept of a run's judgements: in its dataset's folder, that runs of other seeds share,
    and what older versions kept in its own."""
    folder = run.folder.absolute()
    shared = folder.parent if folder.parent.name == run.dataset else folder
    kept = Kept(shared / "judgements.jsonl")
    kept.found |= Kept(folder / "judgements.jsonl").found
    return kept


def to_ask(result, kind):
    """Every (kind, question, answer) to judge of an eval.json's dict; kind: role or trait."""
    asked = []
    for part, kinds in (("samples", (kind, "coherence")), ("identity", ("identity", "caricature"))):
        for sample in result[part]:
            answers = sample["answers"].values()
            asked += [(k, sample["question"], answer) for answer in answers for k in kinds]
    for talks in result.get("conversation", {}).values():
        pairs = (pair for talk in talks["talks"] for pair in talk)
        asked += [(kind, pair["question"], pair["answer"]) for pair in pairs]
    return list(dict.fromkeys(item for item in asked if item[2]))


def announce_cost(judge, asked, kept):
    """Print what asking for the rest will take: requests, and tokens by their characters."""
    missing = judge.missing(asked, kept).values()
    tokens = sum(len(judge.prompt(*item)) for item in missing) // CHARACTERS
    print(
        f"judge {judge.model}: {len(asked) - len(missing)} judged before, {len(missing)} requests "
        f"to make, about {tokens:,} tokens in, at most {len(missing) * judge.max_tokens:,} out",
        flush=True,
    )


def add_scores(result, judges, kept, workers=8, dry_run=False):
    """Add the judges' scores to an eval.json's dict; 1 if one of them failed, else 0.
    judges: Judge objects; kept: a Kept of their judgements; dry_run: only say what it takes."""
    kind = next(iter(judges[0].rubrics))
    asked, reports, verdicts, code = to_ask(result, kind), [], [], 0
    for judge in judges:
        announce_cost(judge, asked, kept)
        if dry_run:
            continue
        try:
            found = dict(zip(asked, judge.score(asked, kept, workers), strict=True))
        except JudgeError as error:  # the evaluation is there all the same
            print(f"error: {error}", file=sys.stderr)
            code = 1
            continue
        verdicts.append(found)
        reports.append({
            "model": judge.model, "url": judge.url, "scale": SCALES[kind],
            "rubrics": judge.rubrics, "asked_now": judge.asked, "failed": len(judge.failures),
            "conditions": by_condition(result, found, kind),
            "by_turn": conversations(result, found, kind),
        })  # fmt: skip
        warnings, code = judge.failures[:3], 1 if judge.failures else code
        if unparsable := sum(verdict == "unparsable" for verdict in found.values()):
            warnings.append(
                f"{unparsable} replies in {kept.path} hold no clear score (--judge-tokens?)"
            )
        for warning in warnings:
            print(f"WARNING: {warning}", file=sys.stderr)
    if reports:
        result["judges"] = reports
        result["agreement"] = agreement(result, verdicts, kind) if len(verdicts) > 1 else None
    return code


def read(verdicts, kind, question, answer, bad):
    """A verdict, if it is a score or a word; else None, counted in `bad` by its reason.
    An empty answer has the lowest score, and is no caricature of anything."""
    if not answer:
        return None if kind in ("identity", "caricature") else float(SCALES[kind][0])
    verdict = verdicts.get((kind, question, answer))
    if type(verdict) is float or verdict in WORDS.get(kind, ()):
        return verdict
    bad[verdict or "failed"] += 1
    return None


def overall(persona, coherence, kind):
    """Their harmonic mean, each as a share of its scale; None without one of them."""
    if None in (persona, coherence):
        return None
    low, high = SCALES[kind]
    parts = (persona - low) / (high - low), coherence / SCALES["coherence"][1]
    return 2 * parts[0] * parts[1] / (sum(parts) or 1.0)


def by_condition(result, verdicts, kind):
    """{condition: {"score", "coherence", "overall", "caricature", "identity", "above_vanilla", and
    how many replies were a refusal, unparsable or failed}}: means with intervals, the last one of
    score minus vanilla's; identity: {word: how many}, and caricature, where they were asked."""
    table, vanilla = {}, {}
    for condition in ("vanilla", *(c for c in result["answers"] if c != "vanilla")):
        bad, who = Counter(refusal=0, unparsable=0, failed=0), Counter()
        scores = {"score": {}, "coherence": {}, "overall": {}, "caricature": {}}
        for sample in result["samples"]:
            question = sample["question"]
            about = question, sample["answers"][condition], bad
            score = scores["score"][question] = read(verdicts, kind, *about)
            coherence = scores["coherence"][question] = read(verdicts, "coherence", *about)
            scores["overall"][question] = overall(score, coherence, kind)
        for sample in result["identity"]:
            if condition in sample["answers"]:
                about = sample["question"], sample["answers"][condition], bad
                who[read(verdicts, "identity", *about)] += 1
                scores["caricature"][about[0]] = read(verdicts, "caricature", *about)
        vanilla = vanilla or scores["score"]
        both = {
            q: s - vanilla[q] for q, s in scores["score"].items() if None not in (s, vanilla[q])
        }
        table[condition] = {
            **{name: mean_of(found) for name, found in scores.items()}, **bad,
            "identity": {w: who[w] for w in WORDS["identity"]}, "above_vanilla": mean_of(both),
        }  # fmt: skip
    return {condition: table[condition] for condition in result["answers"]}


def mean_of(scores):
    """`mean_interval` of {question: score, or None}."""
    found = {question: score for question, score in scores.items() if score is not None}
    return mean_interval(list(found.values()), list(found))


def conversations(result, verdicts, kind):
    """{condition: `drift_by_turn` of the persona scores} of conversations, {} without any."""
    table = {}
    for condition, found in result.get("conversation", {}).items():
        scores = [
            [read(verdicts, kind, p["question"], p["answer"], Counter()) for p in pairs]
            for pairs in found["talks"]
        ]
        table[condition] = drift_by_turn(np.array(scores, float))  # None: NaN
    return table


def agreement(result, verdicts, kind):
    """`spearman` of the persona scores that two judges, and no matter which others, gave the same
    answers: {"spearman", "interval", "answers"}."""
    pairs = []
    for sample in result["samples"]:
        for answer in sample["answers"].values():
            scores = [found.get((kind, sample["question"], answer)) for found in verdicts[:2]]
            if all(type(score) is float for score in scores):
                pairs.append((*scores, sample["question"]))
    value, interval = spearman(*(zip(*pairs, strict=True) if pairs else ((), (), ())))
    return {"spearman": value, "interval": interval, "answers": len(pairs)}


def judge_flags(result):
    """What is wrong with the judges of an eval.json's dict, as a list. A judge has to score the
    dataset's own rows, which show the persona, above what the plain model answers."""
    flags = []
    for judge in result.get("judges", ()):
        if "dataset" not in judge["conditions"]:  # --num-samples 0
            continue
        found, (low, high) = judge["conditions"]["dataset"]["above_vanilla"], judge["scale"]
        if not found:
            flags.append(f"judge {judge['model']}: no reply to compare the persona and vanilla by")
        elif not (found["mean"] > ALIKE * (high - low) and (found["interval"] or [1.0])[0] > 0):
            flags.append(f"judge {judge['model']} scores vanilla like the persona")
    agreed = result.get("agreement")
    if agreed and not (agreed["spearman"] or 0.0) > 0.3:
        found = "undefined" if agreed["spearman"] is None else f"{agreed['spearman']:.2f}"
        flags.append(f"judges disagree ({found})")
    return flags
