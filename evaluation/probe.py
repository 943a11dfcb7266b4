"""Mean states over answers, and the linear probe on them that tells the persona from plain text."""

import torch

from evaluation.stats import auroc, fit_probe
from steering.chat_format import collate, label_count
from steering.fast_path import by_example

MEAN_TOKENS = 40_000  # of rows to take mean states of, at most
MIN_AUROC = 0.8  # Below it, a probe's scores are withheld.
MIN_ROWS = 5  # of each class; below it as well


@torch.no_grad()
def response_means(fast, examples, max_tokens, layer=None):
    """Mean of the plain residual stream at the layer over each example's label tokens: (N, n) fp32.
    On the host. fast: a FastPath; layer: another one than its own. Raises ValueError for an example
    without label tokens."""
    if not all(map(label_count, examples)):
        raise ValueError("an example has no label token: nothing to take the mean of")

    def average(batch):
        labels = collate(batch)[1]
        states = fast.plain_states(batch, layer).float()  # (B, T, n)
        carries = (labels >= 0).to(states)[:, :, None]  # (B, T, 1)
        return ((states * carries).sum(1) / carries.sum(1)).cpu()

    return torch.stack(by_example(average, examples, max_tokens))


def probe_states(reader, examples):
    """What a probe at the Reader's probe_layer is fitted on: as `response_means`. Each example is
    read once, however many layers have vectors of its persona."""
    known = reader.known_means
    keys = []
    unread = {}
    for example in examples:
        key = (tuple(example.input_ids), tuple(example.labels))
        keys.append(key)
        if key not in known:
            unread[key] = example
    if unread:
        rows = list(unread.values())
        means = response_means(reader.fast, rows, reader.max_tokens, reader.probe_layer)
        known.update(zip(unread, means, strict=True))
    return torch.stack([known[key] for key in keys])


def persona_scores(reader, probe, examples, fast=None):
    """The probability of the persona of each example, by a probe: of `train_probe`.
    fast: a FastPath that has read the examples, in place of the Reader's."""
    means = response_means(fast or reader.fast, examples, reader.max_tokens, reader.probe_layer)
    return probe(means).tolist()


def train_probe(persona, plain, persona_heldout, plain_heldout):
    """Fit a linear probe: (probe, or None of too few rows; report with held-out AUROC and counts).

    All four are mean states (N, n), the first two of training questions. probe: states (N, n) ->
    probability of the persona (N,). The report's "withheld" says why no score is to be reported, if
    so: rows are too few, or it cannot tell the held-out ones apart.
    """
    check_apart(persona, persona_heldout)
    check_apart(plain, plain_heldout)
    rows = {
        "train": len(persona),
        "plain": len(plain),
        "heldout": len(persona_heldout),
        "plain_heldout": len(plain_heldout),
    }
    report = {"rows": rows, "auroc": None, "withheld": None}
    probe = None
    if min(len(persona), len(plain)) >= MIN_ROWS:
        probe = fit_probe(persona, plain)
    if min(rows.values()) < MIN_ROWS:
        counts = list(rows.values())
        report["withheld"] = f"too few rows for a probe ({counts}; {MIN_ROWS} of each are needed)"
        return probe, report
    report["auroc"] = auroc(probe(persona_heldout), probe(plain_heldout))
    if report["auroc"] < MIN_AUROC:
        report["withheld"] = f"cannot tell persona from plain: held-out AUROC {report['auroc']:.2f}"
    return probe, report


def check_apart(fitted, scored):
    """AssertionError if rows of states are in both."""
    same = {tuple(row) for row in fitted.tolist()} & {tuple(row) for row in scored.tolist()}
    assert not same, "the probe is scored on rows that it was fitted on"
