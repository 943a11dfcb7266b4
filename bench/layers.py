"""Which layer keeps most of the likelihood gain at equal side effects, without writing an answer.

    python bench/layers.py runs       # trained runs at several layers; a Markdown table

Each vector is scaled until KL(vanilla || steered) on plain rows of the questions to choose by is
the budget. What the scaled vector makes held-out answers likelier by is its gain. It is kept in the
run's layer.json, so a run is measured once.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_steering as ev
from evaluation.answers import Sampling, Writer, announce, run_alone
from evaluation.kept import kept_beside
from evaluation.likelihood import Reader, nll_under
from evaluation.rows import first_tokens
from evaluation.scale import divergence_on, largest_scale
from hook_model import load_from_options
from steering.files import read_json, write_json
from steering.finished import Shelf, read_run
from steering.run_folder import find_runs

BUDGET = 0.75  # KL, nats a token
TOKENS = 1200  # of held-out rows, and of plain ones
MEANS = {"gain": "{:.3f}", "gain_as_trained": "{:.3f}", "scale": "{:.2f}"}  # over runs


def measure(run, shelf):
    """{"scale", "gain", "gain_as_trained"} of a FinishedRun: the scale that spends the BUDGET, what
    the vector gains there, and at scale 1, in nats a token."""
    path = run.folder / "layer.json"
    if path.exists():
        return read_json(path)
    announce(str(run.folder))
    model = shelf.model(run)
    chat = shelf.chat(run)
    data = ev.load_data(run, chat, TOKENS)
    kept = kept_beside(run, model, chat, "evaluation/answers.py")
    writer = Writer(model, chat, Sampling(), kept)
    run_alone(ev.add_own_answers(data, writer), writer)
    data.check()

    reader = Reader(model, chat, 1024)
    plain = first_tokens(data.plain_chooser, TOKENS)
    scale = largest_scale(divergence_on(reader, run.vector, plain), BUDGET)
    nll = nll_under(reader.fast, data.heldout, reader.max_tokens)
    vanilla = nll(torch.zeros_like(run.vector))
    found = {
        "scale": scale,
        "gain": vanilla - nll(run.vector * scale),
        "gain_as_trained": vanilla - nll(run.vector),
    }
    write_json(path, found)
    return found


def print_table(found):
    """Print a line a layer in Markdown. found: {layer: {run: what `measure` found}}, a run called
    by its folder below that of the layer."""
    names = sorted(set.intersection(*map(set, found.values())))
    print(f"| layer | {' | '.join(names)} | mean | as trained | scale |")
    print("|---" * (len(names) + 4) + "|")
    for layer, each in sorted(found.items()):
        cells = [f"{each[name]['gain']:.3f}" for name in names]
        for key, form in MEANS.items():
            cells.append(form.format(np.mean([each[name][key] for name in names])))
        print(f"| {layer} | {' | '.join(cells)} |")


def main(argv=None):
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="folder of runs of one model and setting")
    args = parser.parse_args(argv)
    shelf = Shelf(load_from_options)
    found = defaultdict(dict)
    for folder in find_runs([args.runs]):
        run = read_run(folder)
        layer = run.args["layer"]
        name = str(folder).rpartition(f"layer{layer}/")[2]
        found[layer][name] = measure(run, shelf)
    print_table(found)


if __name__ == "__main__":
    main()
