"""Logits of a batch whose rows each take an adapter of their own, by PEFT.

python run_peft.py MODEL ids.npy out.npz name=folder ...     # ids.npy: (1, T)

out.npz: logits (T, V) by name, and those of the plain model as "__base__". The row of each name
stands in one batch with all others.
"""

import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

name, ids_file, out, *adapters = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
names = ["__base__"]
for adapter in adapters:
    key, folder = adapter.split("=", 1)
    if len(names) == 1:
        model = PeftModel.from_pretrained(model, folder, adapter_name=key)
    else:
        model.load_adapter(folder, key)
    names.append(key)
ids = torch.from_numpy(np.load(ids_file)).repeat(len(names), 1)
with torch.no_grad():
    logits = model.eval()(input_ids=ids, adapter_names=names).logits
np.savez(out, **dict(zip(names, logits.numpy(), strict=True)))
