"""A task of lm-evaluation-harness from a list of rows: nothing to download."""

import json
from pathlib import Path


def write_task(folder, name, rows, **settings):
    """Write rows ({"context", "choices"}, the first of which is right) and a task of that name into
    a folder. settings: of the task's file, beyond those of a multiple choice scored by acc."""
    data, choice = Path(folder, f"{name}.jsonl"), {"output_type": "multiple_choice"}
    choice |= {"doc_to_choice": "choices", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    task = {"task": name, "dataset_path": "json", "test_split": "test", "doc_to_text": "context"}
    task["dataset_kwargs"] = {"data_files": {"test": str(data)}}
    data.write_text("\n".join(map(json.dumps, rows)))
    Path(folder, f"{name}.yaml").write_text(json.dumps(task | choice | settings))  # JSON is YAML
