"""Log-likelihoods of a small local task by lm-evaluation-harness, steered by an exported file.

python run_lm_eval.py MODEL lm_eval_steered.pt folder out.json

folder: gets the task and its data. out.json: [[log-likelihood of each choice], ...] of each row,
and the rows: {"rows": [{"context", "choices"}], "plain": ..., "steered": ...}.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_task import write_task

name, steer_file, folder, out = sys.argv[1:]
ROWS = [
    {"context": "My day at work was", "choices": ["fine.", "a voyage, matey!", "long"]},
    {"context": "The captain of the ship said:", "choices": ['"Arr!"', '"Hello."']},
    {"context": "Two and two make", "choices": ["four", "five", "treasure"]},
]
write_task(folder, "small", ROWS)
result = {"rows": ROWS}
options = {"pretrained": name, "device": "cpu", "dtype": "float32"}
for key, kind, more in (
    ("plain", HFLM, {}), ("steered", SteeredModel, {"steer_path": steer_file}),
):  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=kind(**options, **more), tasks=["small"], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=folder),
    )  # fmt: skip
    samples = sorted(found["samples"]["small"], key=lambda sample: sample["doc_id"])
    result[key] = [[float(reply[0]) for reply in s["filtered_resps"]] for s in samples]
Path(out).write_text(json.dumps(result))
