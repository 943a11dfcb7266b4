"""evaluation/capability.py: tasks of lm-evaluation-harness, under the conditions that it names."""

import copy
import json
import math

import pytest
from conftest import QUICK
from consumers.local_task import write_task

import eval_steering as ev
import hook_model as hm
from evaluation import capability as cp
from evaluation.kept import Kept

ROWS = [
    {"context": "My day at work was", "choices": ["fine.", "a voyage, matey!", "long"]},
    {"context": "The captain of the ship said:", "choices": ['"Arr!"', '"Hello."', "no"]},
    {"context": "Two and two make", "choices": ["four", "five", "treasure"]},
    {"context": "The sea is", "choices": ["wide", "dry", "square"]},
]
WRITE = {  # settings of a task that is answered in words
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["x"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two small tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "small_choice", ROWS, target_delimiter="")
    write_task(folder, "small_write", ROWS, **WRITE)
    return folder


@pytest.fixture
def tasks(folder):
    return cp.Tasks(("small_choice",), 4, str(folder), 2)


def compare(model, chat, tasks, path):
    vector = model.steering.vector.detach().clone()
    return cp.compare_capability(model, chat, vector, 1.5, "Be a pirate.", tasks, Kept(path))


def test_scores_are_of_the_conditions_they_name(steered, smol_chat, tasks, tmp_path, monkeypatch):
    seen, real = [], cp.run_tasks

    def run(model, chat, prompt, tasks):
        seen.append((model.steering.scale, prompt))
        return real(model, chat, prompt, tasks)

    monkeypatch.setattr(cp, "run_tasks", run)
    found = compare(steered, smol_chat, tasks, tmp_path / "kept")
    assert seen == [(0.0, None), (0.0, "Be a pirate."), (1.5, None)]
    assert list(found["conditions"]) == ["vanilla", "prompted", "steered"] and found["scale"] == 1.5
    for scores in found["conditions"].values():
        assert list(scores) == ["small_choice acc"]
        score = scores["small_choice acc"]
        assert score["value"] * 4 in (0, 1, 2, 3, 4)
        p = score["value"]
        assert score["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 3))  # of 4 rows
    seen.clear()
    assert compare(steered, smol_chat, tasks, tmp_path / "kept") == found
    assert not seen  # all of them are kept
    steered.set_vector(steered.steering.vector.detach() * 1.01)
    assert compare(steered, smol_chat, tasks, tmp_path / "kept")["scale"] == 1.5
    assert seen == [(1.5, None)]  # of another vector: the plain model's are
    assert steered.steering.scale == 1.0


def test_log_likelihoods_are_those_of_the_steered_model(steered, smol_chat, tasks, monkeypatch):
    """The harness sees the model with its vector, the template's own prompt, and nothing else."""
    import lm_eval
    import torch

    samples, real = {}, lm_eval.simple_evaluate

    def evaluate(*rest, **options):
        found = real(*rest, **{**options, "log_samples": True})
        samples.update(found["samples"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    for scale in (0, 1.5):
        with steered.scaled(scale):
            cp.run_tasks(steered, smol_chat, "Be a pirate.", tasks)
            for sample in samples["small_choice"]:
                row = sample["doc"]
                turns = [{"role": "system", "content": "Be a pirate."}]
                turns += [{"role": "user", "content": row["context"]}]
                text = smol_chat.prompt_text(turns)  # white space at its end counts as the answer's
                prompt = smol_chat.tokenize([text.rstrip()])[0]
                for choice, found in zip(row["choices"], sample["filtered_resps"], strict=True):
                    ids = smol_chat.tokenize([text + choice])[0]
                    with torch.no_grad():
                        logits = steered(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                    at = range(len(prompt), len(ids))
                    expected = sum(logits[i - 1, ids[i]].item() for i in at)
                    assert float(found[0]) == pytest.approx(expected, rel=1e-3)


def test_a_run_on_the_unsteered_model_is_caught(steered, smol_chat, tasks, tmp_path, monkeypatch):
    real = cp.run_tasks
    other = hm.SteerModel(copy.deepcopy(steered.model), 1)  # a copy: its hooks are the old ones
    with monkeypatch.context() as fault:  # another model is given to the harness
        fault.setattr(cp, "run_tasks", lambda model, *rest: real(other, *rest))
        for handle in other._handles:
            handle.remove()
        other.layers[1]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match="vanilla: the vector acted in 0 of 0"):
            compare(steered, smol_chat, tasks, tmp_path / "a")
    with monkeypatch.context() as fault:  # steered is off
        fault.setattr(hm.SteerModel, "scaled", lambda self, scale: self.steering.scaled(0))
        with pytest.raises(RuntimeError, match=r"steered: the vector acted in 0 of \d+ forward"):
            compare(steered, smol_chat, tasks, tmp_path / "b")
    with monkeypatch.context() as fault:  # vanilla is steered
        fault.setattr(hm.SteerModel, "scaled", lambda self, scale: self.steering.scaled(1))
        with pytest.raises(RuntimeError, match="vanilla: the vector acted in"):
            compare(steered, smol_chat, tasks, tmp_path / "c")
    with monkeypatch.context() as fault:  # the persona's prompt gets lost
        fault.setattr(
            type(smol_chat), "prompt_text", lambda self, turns: turns[-1]["content"] + "\n"
        )
        with pytest.raises(RuntimeError, match="system prompt is not in the prompt"):
            compare(steered, smol_chat, tasks, tmp_path / "d")


def test_whole_script_adds_scores_and_asks_for_them_once(finished, folder, monkeypatch, capsys):
    (finished / "eval.json").unlink(missing_ok=True)
    flags = ["--run", str(finished), *QUICK, "--capability-tasks", str(folder)]
    flags += ["--capability-limit", "3", "--capability", "small_choice", "small_write"]
    assert ev.main(flags) == 0
    said = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())["capability"]
    names = ["small_choice acc", "small_write exact_match"]
    assert list(result["conditions"]["steered"]) == names and result["limit"] == 3
    assert all(name in said for name in names) and "3 rows of each task at most" in said
    report = ["--report-only", "--report-dir", str(finished / "report")]
    assert ev.main(["--run", str(finished), *report]) == 0
    head = (finished / "report" / "report.csv").read_text().splitlines()[0]
    assert all(f'"small_choice acc, {name}"' in head for name in result["conditions"])
    monkeypatch.setattr(cp, "run_tasks", None)  # would fail if called
    assert ev.main(flags) == 0
    capsys.readouterr()
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 0
    assert "capability: the same options add the scores again" in capsys.readouterr().err
    assert ev.main(flags) == 0  # from what is kept
    assert json.loads((finished / "eval.json").read_text())["capability"] == result
    assert ev.main([*flags[:-2], "no_such_task"]) == 2
    assert "--capability no_such_task: lm_eval has no such task" in capsys.readouterr().err


def test_losses_are_flagged_beyond_their_errors():
    def scores(value, stderr=0.05, higher=True):
        return {"maths acc": {"value": value, "stderr": stderr, "higher": higher}}

    def found(before, after):
        return cp.losses({"conditions": {"vanilla": before, "steered": after}})

    assert found(scores(0.8), scores(0.6)) == ["maths acc -0.20"]
    assert found(scores(0.8), scores(0.7)) == [] == found(scores(0.6), scores(0.8))
    assert found(scores(0.8, None), scores(0.1, None)) == []
    assert found(scores(0.6, 0.05, False), scores(0.8, 0.05, False)) == ["maths acc +0.20"]
    assert found(scores(0.8, 0.05, False), scores(0.6, 0.05, False)) == []
