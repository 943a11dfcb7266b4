"""Whether vectors are of their own persona: each one on the held-out rows of all the others."""

import numpy as np
import torch

from evaluation.answers import announce
from evaluation.report import short_names


def specificity(runs, limit, nll):
    """NLL of each persona's held-out rows under each vector, among runs of one model, layer and
    split by question.

    runs: FinishedRun objects, of which `limit` a group count, since every vector meets every
    persona; nll(run, vectors): of a run's held-out rows under each. Returns a list of {"model",
    "layer", "runs", "names", "nll": [vector][persona], "vanilla": [persona]}.
    """
    groups = {}
    for run in runs:
        split = [run.args.get(option) for option in ("heldout_fraction", "split_seed")]
        groups.setdefault((run.args["model"], run.args["layer"], *split), []).append(run)
    matrices = []
    for (model, layer, *_), group in groups.items():
        members = group[:limit]
        if len(members) < 2:
            continue
        announce(f"{len(members)} vectors on each other's held-out rows")
        vectors = [run.vector for run in members]
        vectors.append(torch.zeros_like(vectors[0]))
        *rows, vanilla = np.array([nll(run, vectors) for run in members]).T.tolist()
        matrices.append({
            "model": model,
            "layer": layer,
            "runs": [str(run.folder) for run in members],
            "names": short_names([{"dataset": run.dataset, "run": run.folder} for run in members]),
            "nll": rows,
            "vanilla": vanilla,
        })  # fmt: skip
    return matrices
