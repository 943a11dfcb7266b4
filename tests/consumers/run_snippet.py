"""Run a card's Python snippet as its reader would, and save what the `model` it makes computes.

python run_snippet.py snippet.py ids.npy out.npz      # in the export folder, by the tool's Python

ids.npy: (1, T). out.npz: logits (1, T, V) fp32, tokens (1, T + 40) of greedy decoding.
"""

import sys
from pathlib import Path

import numpy as np
import torch

snippet, ids_file, out = sys.argv[1:]
names = {}
exec(compile(Path(snippet).read_text(), snippet, "exec"), names)
model, ids = names["model"], torch.from_numpy(np.load(ids_file))
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
with torch.no_grad():
    logits = model(input_ids=ids).logits
    tokens = model.generate(input_ids=ids, **options)
np.savez(out, logits=logits.float().numpy(), tokens=tokens.numpy())
