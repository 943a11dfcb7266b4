"""interop/capability.py: tasks of lm-evaluation-harness, under the conditions that it names."""

import json
import types

import lm_eval
import pytest
import torch
from conftest import QUICK
from consumers.local_task import write_task

import eval_steering as ev
from evaluation.table import value_at
from interop import capability as cp

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
    """A folder of two small tasks, which lm_eval takes seconds to index."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "small_choice", ROWS, target_delimiter="")
    write_task(folder, "small_write", ROWS, **WRITE)
    return folder


@pytest.fixture
def tasks(folder):
    return cp.Tasks(("small_choice",), 4, str(folder), 2)


@pytest.fixture
def add(steered, smol_chat, tiny_folder, tasks, tmp_path):
    """add_capability of the steered tiny model: result -> result."""
    shelf = types.SimpleNamespace(model=lambda run: steered, chat=lambda run: smol_chat)

    def add_to(result):
        vector = steered.steering.vector.detach().clone()
        args = {"model": tiny_folder, "layer": 1}
        run = types.SimpleNamespace(folder=tmp_path, args=args, vector=vector)
        cp.add_capability(result, run, tasks, shelf)
        return result

    return add_to


def evaluated(scale=1.5, system_prompt="Be a pirate."):
    """An evaluation's dict before capability."""
    measures = {"old acc": {"table": "capability"}, "nll": {"table": "likelihood"}}
    rows = {"vanilla": {"nll": 3.0, "old acc": 0.5}}
    about = {"recommended": {"scale": scale}, "system_prompt": system_prompt}
    return {**about, "measures": measures, "conditions": rows}


@pytest.fixture
def passes(monkeypatch):
    """[(scale of the vector, system prompt)] of each time that tasks are run."""
    seen = []
    real = cp.run_tasks

    def run(model, chat, prompt, tasks):
        seen.append((model.steering.scale, prompt))
        return real(model, chat, prompt, tasks)

    monkeypatch.setattr(cp, "run_tasks", run)
    return seen


def test_scores_are_of_the_conditions_they_name_and_asked_for_once(add, steered, folder, passes):
    result = add(evaluated())
    assert passes == [(0.0, None), (0.0, "Be a pirate."), (1.5, None)]
    found = result["capability"]
    assert list(found["conditions"]) == ["vanilla", "prompted", "steered x1.5"]
    assert list(result["measures"]) == ["nll", "small_choice acc"]
    assert result["measures"]["small_choice acc"]["better"] == "higher"
    for condition, scores in found["conditions"].items():
        share = scores["small_choice acc"]["value"]
        half = 1.96 * (share * (1 - share) / 3) ** 0.5  # of 4 rows
        value = value_at(result, condition, "small_choice acc")
        assert share * 4 in (0, 1, 2, 3, 4) and (value["mean"], value["n"]) == (share, 4)
        assert [value["low"], value["high"]] == pytest.approx([share - half, share + half])
    assert result["conditions"]["vanilla"].keys() == {"nll", "small_choice acc"}
    passes.clear()
    assert add(evaluated())["capability"] == found and not passes  # all of them are kept
    steered.set_vector(steered.steering.vector.detach() * -1.01)
    assert add(evaluated(None, ""))["capability"]["scale"] == 1.0
    assert passes == [(1.0, None)]  # of another vector; the plain model's are there
    passes.clear()
    write_task(folder, "small_choice", ROWS[::-1], target_delimiter="")
    add(result)
    assert len(passes) == 3  # of another task of that name
    add(result)
    assert len(passes) == 3 and steered.steering.scale == 1.0


def test_log_likelihoods_are_those_of_the_steered_model(steered, smol_chat, tasks, monkeypatch):
    """The harness sees the model with its vector, the template's own prompt, and nothing else."""
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
                text = smol_chat.prompt_text(turns)  # White space at its end is the answer's.
                start = len(smol_chat.tokenize([text.rstrip()])[0])
                for choice, found in zip(row["choices"], sample["filtered_resps"], strict=True):
                    ids = torch.tensor(smol_chat.tokenize([text + choice]))
                    with torch.no_grad():
                        logits = steered(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
                    expected = logits.gather(1, ids[0, start:, None]).sum().item()
                    assert float(found[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("place", "fault", "message"),
    [
        ("interop.capability.run_tasks", lambda *_: {}, "vanilla: .* in 0 of 0 forward passes"),
        ("hook_model.SteerModel.scaled", lambda model, _: model.steering.scaled(0),
         r"steered x1\.5: the vector acted in 0 of [1-9]"),
        ("hook_model.SteerModel.scaled", lambda model, _: model.steering.scaled(1),
         r"vanilla: the vector acted in (\d+) of \1 forward"),
        ("steering.chat_format.ChatFormat.prompt_text", lambda _, turns: turns[-1]["content"],
         "the system prompt is not in the prompt of a task"),
    ],
)  # fmt: skip
def test_a_task_that_did_not_see_vector_or_prompt_is_an_error(
    place, fault, message, add, monkeypatch
):
    monkeypatch.setattr(place, fault)
    with pytest.raises(RuntimeError, match=message):
        add(evaluated())


def test_whole_script_adds_scores(finished, folder, monkeypatch, capsys):
    flags = ["--run", str(finished), *QUICK, "--capability-tasks", str(folder)]
    flags += ["--capability-limit", "3", "--capability", "small_choice", "small_write"]
    assert ev.main(flags) == 0
    names = ["small_choice acc", "small_write exact_match"]
    said = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    for name in names:
        assert name in said and value_at(result, "prompted", name)["n"] == 3
    monkeypatch.setattr(cp, "run_tasks", None)  # would fail if called
    assert ev.main([*flags, "--restart"]) == 0  # from what is kept
    again = json.loads((finished / "eval.json").read_text())
    assert again["capability"] == result["capability"]
    assert ev.main([*flags, "no_such_task"]) == 2
    assert "--capability no_such_task: lm_eval has no such task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "stderr", "higher", "lost"),
    [
        (0.8, 0.6, 0.05, True, ["maths acc -0.20"]),
        (0.8, 0.67, 0.05, True, []),  # within 1.96 errors of the difference
        (0.6, 0.8, 0.05, True, []),
        (0.8, 0.1, None, True, []),
        (0.6, 0.8, 0.05, False, ["maths acc +0.20"]),
        (0.8, 0.6, 0.05, False, []),
    ],
)
def test_losses_are_flagged_beyond_their_errors(before, after, stderr, higher, lost):
    scores = {}
    for condition, value in (("vanilla", before), ("steered x1.2", after)):
        scores[condition] = {"maths acc": {"value": value, "stderr": stderr, "higher": higher}}
    result = {"recommended": {"scale": 1.2}, "capability": {"conditions": scores}}
    assert cp.losses(result) == lost
    assert cp.losses({"recommended": {"scale": 1.2}}) == []
