"""A direction by another tool's own documented call, in an environment of its own: see peers.py.

    .venv-peers/bin/python bench/peers_fit.py repeng JOB.json
    .venv-peers/bin/python bench/peers_fit.py steering-vectors JOB.json

JOB.json: model (folder), layer (0-based block whose output is read), pairs ([[text with the
persona, without], ...]), out: a file for the direction, as JSON, with the seconds of fitting and
the loss of the first text, by which peers.py sees that the model is the same one.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def fit_repeng(model, tokenizer, pairs, layer):
    """As repeng's README: PCA of the differences at the last token."""
    from repeng import ControlModel, ControlVector, DatasetEntry

    tokenizer.pad_token_id = 0
    entries = [DatasetEntry(positive=persona, negative=plain) for persona, plain in pairs]
    wrapped = ControlModel(model, [layer])
    vector = ControlVector.train(wrapped, tokenizer, entries, hidden_layers=[layer])
    return vector.directions[layer]


def fit_steering_vectors(model, tokenizer, pairs, layer):
    """As steering-vectors' README: the mean difference at the last token."""
    from steering_vectors import train_steering_vector

    samples = [tuple(pair) for pair in pairs]
    vector = train_steering_vector(model, tokenizer, samples, layers=[layer])
    return vector.layer_activations[layer]


METHODS = {"repeng": fit_repeng, "steering-vectors": fit_steering_vectors}


def main():
    """Fit one direction and write it."""
    method, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32)
    ids = tokenizer(job["pairs"][0][0], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    started = time.perf_counter()
    direction = METHODS[method](model, tokenizer, job["pairs"], job["layer"])
    seconds = time.perf_counter() - started
    numbers = torch.as_tensor(direction).float().tolist()
    found = {"vector": numbers, "seconds": seconds, "loss": loss}
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
