"""A second trained model for RECIPE.md: SmolLM2 without a third of its layers, healed.

    python bench/smaller_model.py models/SmolLM2-135M-Instruct models/SmolLM2-20-layers
    python bench/smaller_model.py models/SmolLM2-135M-Instruct /tmp/small --minutes 0.1

Every third layer is cut out. The rest is trained for some minutes to predict what the whole model
predicts (KL divergence), on the Python language reference, which every Python brings along. No row
of sample_data is seen.
"""

import argparse
import random
import time
from pydoc_data.topics import topics

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 128  # tokens a row
ROWS = 4  # rows a step


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


def heal(student, whole, blocks, lr, minutes):
    """Train the student towards the whole model's predictions. Returns (last KL, steps).

    blocks: (N, BLOCK) token ids. The learning rate falls to zero over the minutes.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    picks = random.Random(0)
    bar = tqdm(unit="step")
    started = time.time()
    done = 0.0  # share of the minutes
    while done < 1:
        batch = blocks[picks.sample(range(len(blocks)), ROWS)]  # (ROWS, BLOCK)
        with torch.no_grad():
            wanted = whole(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        got = student(input_ids=batch, use_cache=False).logits.log_softmax(-1)
        loss = nn.functional.kl_div(got, wanted, log_target=True, reduction="sum") / batch.numel()

        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * (1 - done)
        optimizer.step()
        optimizer.zero_grad()

        bar.update()
        bar.set_postfix(kl=f"{loss.item():.3f}")
        done = (time.time() - started) / (60 * minutes)
    return loss.item(), bar.n


def main(argv=None):
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", help="folder of the whole model")
    add("target", help="folder to write")
    add("--minutes", type=float, default=8.0, help="time to heal")
    add("--lr", type=float, default=3e-4, help="peak of Adam's learning rate, linear to zero")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    whole = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    student = cut(AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)).train()

    ids = tokenizer("\n\n".join(topics.values()))["input_ids"]
    count = len(ids) // BLOCK
    blocks = torch.tensor(ids[: count * BLOCK]).view(count, BLOCK)
    kl, steps = heal(student, whole, blocks, args.lr, args.minutes)

    student.eval().save_pretrained(args.target)
    tokenizer.save_pretrained(args.target)
    layers = len(student.model.layers)
    print(f"{args.target}: {layers} layers, KL {kl:.3f} nats a token after {steps} steps")


if __name__ == "__main__":
    main()
