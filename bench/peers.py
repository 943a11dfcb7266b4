"""Other tools' vectors, the mean difference, a prompt and ours, at equal side effects.

    make .venv-peers/ready
    python bench/peers.py --run runs/M/layer12 --out runs/peers      # trained runs; a table
    python bench/peers.py --table runs/peers                         # of what is there, in Markdown

Every method gets the rows of training questions of a run's dataset, with the persona and without
it, and the run's layer. Runs of one dataset (seeds) are trained vectors of one comparison. Other
tools are called as their READMEs do it, by peers_fit.py. Each vector is scaled to the same
KL(vanilla || steered) on plain rows of the questions to choose by. What is reported is of
held-out questions: NLL of the persona's answers, the persona in answers by our probe and by the
share of lexicon words (a probe favours what resembles its training), repetition, KL.
"""

import argparse
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_steering as ev
from data_filter import response_of
from evaluation import measures
from evaluation.answers import Sampling, Writer, run_alone, write_answers
from evaluation.conditions import Condition, prompt_conditions
from evaluation.kept import kept_beside
from evaluation.likelihood import CHOOSE_TOKENS, Reader, condition_losses
from evaluation.rows import first_rows, first_tokens
from evaluation.scale import divergence_on, largest_scale
from evaluation.stats import words_of
from evaluation.table import number_of
from hook_model import load_from_options
from steering.chat_format import label_count
from steering.files import read_json, write_json
from steering.finished import Shelf, read_run
from steering.run_folder import find_runs

PEERS = ("repeng", "steering-vectors")
LEVELS = (0.25, 0.5, 0.75)  # KL, nats a token
LEXICON = 60  # words
COLUMNS = {  # of the table, and how they are printed
    "kl": "{:.2f}",
    "nll_gain": "{:+.3f}",
    "probe": "{:.2f}",
    "lexicon": "{:.3f}",
    "repeated": "{:.2f}",
    "seconds": "{:.0f}",
}


def texts_of(chat, examples):
    """What the model read of each example, up to the end of the answer."""
    texts = []
    for example in examples:
        last = max(i for i, label in enumerate(example.labels) if label >= 0)
        texts.append(chat.decode(example.input_ids[:last]))  # without the end of the turn
    return texts


def pairs_of(chat, data):
    """[(text of a persona's row, of a plain one)]: of the same question where there is one."""
    plain = {}
    for example in data.plain_train:
        plain.setdefault(example.row["question"], example)
    chosen = []
    for number, example in enumerate(data.train):
        other = data.plain_train[number % len(data.plain_train)]
        chosen.append(plain.get(example.row["question"], other))
    return list(zip(texts_of(chat, data.train), texts_of(chat, chosen), strict=True))


def save_for_peers(model, chat, folder):
    """Write the model as transformers 4 reads it."""
    model.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters", {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        write_json(folder / "config.json", config)


@torch.no_grad()
def fit_with(tool, python, job, folder, model, chat):
    """(direction (n,), seconds) of another tool; job: of peers_fit.py. AssertionError if the model
    is another one there."""
    out = folder / f"{tool}.json"
    path = folder / "job.json"
    write_json(path, {**job, "out": str(out)})
    subprocess.run([python, ROOT / "bench" / "peers_fit.py", tool, path], check=True)
    found = read_json(out)
    ids = chat.tokenizer(job["pairs"][0][0], return_tensors="pt").input_ids
    with model.steering_off():
        loss = model(input_ids=ids.to(model.input_device), labels=ids).loss.item()
    assert abs(loss - found["loss"]) < 0.05, f"loss {found['loss']} there, {loss} here"
    return torch.tensor(found["vector"]), found["seconds"]


def lexicon_of(persona, plain):
    """The LEXICON words of which the persona's answers have most beyond plain ones: those in the
    share of answers that differs most."""
    with_persona = Counter(word for text in persona for word in set(words_of(text)))
    without = Counter(word for text in plain for word in set(words_of(text)))
    ahead = {}
    for word, count in with_persona.items():
        ahead[word] = count / len(persona) - without[word] / len(plain)
    return set(sorted(ahead, key=ahead.get, reverse=True)[:LEXICON])


def lexicon_share(text, lexicon):
    """Share of a text's words that are in the lexicon; 0.0 without words."""
    words = words_of(text)
    return sum(word in lexicon for word in words) / max(1, len(words))


def answers_of(examples):
    """The answer of each row."""
    return [response_of(example.row) for example in examples]


def compare(args, runs, shelf):
    """What is found of runs of one dataset, as a JSON-able dict; "methods": {method: [numbers of a
    vector at a level]}."""
    run = runs[0]
    model = shelf.model(run)
    chat = shelf.chat(run)
    data = ev.load_data(run, chat, args.heldout_tokens)
    for other in runs:
        ev.check_questions(other, data)
    sampling = Sampling(args.max_new_tokens, 0.7, 0, ev.ROWS_ON_CPU)
    writer = Writer(model, chat, sampling, kept_beside(run, model, chat, "evaluation/answers.py"))
    run_alone(ev.add_own_answers(data, writer), writer)
    data.check()
    reader = Reader(model, chat, 1024)
    difference, probe, about = ev.compare_states(reader, data)
    if about["withheld"]:
        probe = None

    # (method, direction, seconds), made as long as ours, so that one search fits them all.
    directions = []
    for each in runs:
        directions.append(("trained", each.vector, each.record["wall_seconds"]))
    directions.append(("mean difference", difference, None))
    folder = args.out / run.dataset
    folder.mkdir(parents=True, exist_ok=True)
    copy = args.out / "model"
    save_for_peers(model, chat, copy)
    job = {"model": str(copy), "layer": run.args["layer"], "pairs": pairs_of(chat, data)}
    for tool in PEERS:
        directions.append((tool, *fit_with(tool, args.python, job, folder, model, chat)))
    plain = first_tokens(data.plain_chooser, CHOOSE_TOKENS)
    conditions = [Condition("vanilla")]
    steered = {}  # {condition: (method, level, seconds)}
    for number, (method, direction, seconds) in enumerate(directions):
        vector = direction / direction.norm() * run.vector.norm()
        divergence = divergence_on(reader, vector, plain)
        for level in LEVELS:
            scale = largest_scale(divergence, level)
            if scale:  # None is within the level, if not.
                name = f"{method} {number} @{level:g}"
                conditions.append(Condition(name, (vector * scale,)))
                steered[name] = (method, f"{level:g}", seconds)
    prompts, _ = prompt_conditions(data)
    conditions += [prompt for prompt in prompts if prompt.scored]

    losses, _ = condition_losses(reader, conditions, data.heldout)
    tokens = sum(map(label_count, data.heldout))
    nll = {condition: sum(nats) / tokens for condition, nats in losses.items()}
    rows = first_rows(data.heldout, args.num_samples)
    texts, _ = run_alone(write_answers(writer, conditions, rows), writer)
    texts["dataset"] = [response_of(row) for row in rows]
    yardstick = math.exp(nll["vanilla"])
    columns = measures.answer_columns(reader, rows, texts, probe, yardstick)
    columns |= measures.side_effect_columns(reader, conditions, data.plain_heldout)
    lexicon = lexicon_of(answers_of(data.train), answers_of(data.plain_train))

    found = {}
    for condition, answers in texts.items():
        method, level, seconds = steered.get(condition, (condition, "", None))
        shares = [lexicon_share(text, lexicon) for text in answers]
        numbers = {"level": level, "seconds": seconds, "lexicon": float(np.mean(shares))}
        for name in ("kl", "probe", "repeated"):
            numbers[name] = number_of(columns[name].get(condition))
        if condition in nll:
            numbers["nll_gain"] = nll["vanilla"] - nll[condition]
        found.setdefault(method, []).append(numbers)
    return {"dataset": run.dataset, "auroc": about["auroc"], "methods": found}


def print_table(out):
    """Print the means over datasets, and over the vectors of each, in Markdown."""
    results = [read_json(path) for path in sorted(out.glob("*.result.json"))]
    cells = {}
    for result in results:
        for method, vectors in result["methods"].items():
            for numbers in vectors:
                personas = cells.setdefault((numbers["level"], method), {})
                personas.setdefault(result["dataset"], []).append(numbers)
    print(f"{len(results)} personas: {', '.join(result['dataset'] for result in results)}\n")
    print(f"| KL | method | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for level, method in sorted(cells):
        row = [level or "-", method]
        for name, form in COLUMNS.items():
            means = []
            for vectors in cells[level, method].values():
                values = [n[name] for n in vectors if n.get(name) is not None]
                if values:
                    means.append(np.mean(values))
            row.append(form.format(np.mean(means)) if means else "-")
        print(f"| {' | '.join(row)} |")


def parse_args(argv=None):
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--table", type=Path, metavar="DIR", help="only print what is in this folder")
    add("--run", nargs="+", default=[], metavar="DIR", help="run folders, or folders of runs")
    add("--out", type=Path, default=Path("runs/peers"))
    add("--python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    add("--heldout-tokens", type=int, default=8_000)
    add("--num-samples", type=int, default=8)
    add("--max-new-tokens", type=int, default=60)
    args = parser.parse_args(argv)
    if not (args.table or args.run):
        parser.error("name --run DIR ... or --table DIR")
    return args


def main(argv=None):
    """Command line entry."""
    args = parse_args(argv)
    if args.table:
        print_table(args.table)
        return
    shelf = Shelf(load_from_options)
    runs = {}
    places = set()
    for run in map(read_run, find_runs(args.run)):
        if run.record["status"] == "done":  # not imported
            runs.setdefault(run.dataset, []).append(run)
            places.add((run.args["model"], run.args["layer"]))
    args.out.mkdir(parents=True, exist_ok=True)
    about = args.out / "about.json"
    places |= set(map(tuple, read_json(about).get("places", [])))
    if len(places) > 1:
        raise SystemExit(f"one model and layer in {args.out}, please: {sorted(places)}")
    write_json(about, {"places": sorted(places)})
    for dataset, each in runs.items():
        path = args.out / f"{dataset}.result.json"
        if not path.exists():
            write_json(path, compare(args, each, shelf))
    print_table(args.out)


if __name__ == "__main__":
    main()
