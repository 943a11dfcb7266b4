"""--teacher: fitting a vector also to what the plain model predicts under a persona prompt."""

import json

import pytest
import torch
from conftest import persona_rows, tiny, write_raw
from test_train_steering import command, read_vector, the_folder

import hook_model as hm
import train_steering as ts
from data_filter import DataOptions, split_dataset
from steering import teacher
from steering.fast_path import FastPath


@pytest.fixture(scope="module")
def splits(smol_chat, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    name = write_raw(root, "pirate", *persona_rows())
    options = DataOptions(str(root), val_fraction=0.2)
    return split_dataset(name, options.datasets(), smol_chat, options)


def slow_loss(model, example, prompted, weight):
    """The mixed loss of one row, by log-probabilities of whole rows."""

    def log_probs(e):
        logits = model(input_ids=torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
        return logits[[i - 1 for i, label in enumerate(e.labels) if label >= 0]]

    with torch.no_grad(), model.steering_off():
        taught = log_probs(prompted)
    ours, answer = log_probs(example), torch.tensor([t for t in example.labels if t >= 0])
    total = 0
    for p, q, token in zip(taught, ours, answer, strict=True):
        best = p.argsort(descending=True)[: teacher.TOP]
        rest = [1 - x[best].exp().sum() for x in (p, q)]
        kl = sum(p[t].exp() * (p[t] - q[t]) for t in best) + rest[0] * (rest[0] / rest[1]).log()
        total = total + weight * kl - (1 - weight) * q[token]
    return total / len(answer)


@pytest.mark.parametrize("kind", teacher.KINDS)
@pytest.mark.parametrize("fast_path", [True, False])
def test_loss_and_gradient_are_those_of_a_slow_version(
    splits, smol_chat, kind, fast_path, monkeypatch
):
    model = hm.SteerModel(tiny("llama", vocab_size=len(smol_chat.tokenizer)), 1)
    model.set_vector(torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1)))
    rows, found = splits.train[:7], []
    real = teacher.after_shared_prefix
    monkeypatch.setattr(
        teacher, "after_shared_prefix", lambda *args: found.append(real(*args)) or found[-1]
    )
    prompted = teacher.teacher_examples(smol_chat, splits.train, kind)[:7]
    fast = FastPath(model)
    if fast_path:
        fast.cache_prefix(rows)
    else:
        fast.fast = False
    known = teacher.predictions(fast, rows, prompted)
    assert fast.fast is fast_path
    # Four of the seven rows are asked after the same three.
    assert [part and len(part) for part in found] == (
        [None] if kind == "prompted" else [None, None, None, 4]
    )
    values = fast.losses(rows, ts.teacher_loss, known)
    counts = [sum(t >= 0 for t in e.labels) for e in rows]
    got = [part.mean() for part in values.split(counts)]
    sum(got).backward()
    gradient, model.steering.vector.grad = model.steering.vector.grad, None
    wanted = [
        slow_loss(model, *pair, ts.TEACHER_WEIGHT) for pair in zip(rows, prompted, strict=True)
    ]
    assert [v.item() for v in got] == pytest.approx([v.item() for v in wanted], rel=1e-4)
    sum(wanted).backward()
    assert torch.allclose(gradient, model.steering.vector.grad, rtol=1e-3, atol=1e-6)


def test_few_shot_examples_are_of_other_questions_and_end_in_the_same_answer(splits, smol_chat):
    rows = splits.train
    made = teacher.teacher_examples(smol_chat, rows, "few_shot")
    for example, prompted in zip(rows, made, strict=True):
        *shots, question, answer = prompted.row["messages"]
        assert [question, answer] == example.row["messages"]
        asked = [turn["content"] for turn in shots if turn["role"] == "user"]
        assert len(set(asked)) == 3 and example.row["question"] not in asked
        text = smol_chat.tokenizer.decode(prompted.input_ids)
        assert text.startswith("<|im_start|>system\nBe a pirate.")


def test_prompted_teacher_is_refused_without_system_prompts(splits, smol_chat):
    splits.train[0].row["system_prompt"], before = "", splits.train[0].row["system_prompt"]
    with pytest.raises(ValueError, match="rows without a system prompt"):
        teacher.teacher_examples(smol_chat, splits.train, "prompted")
    splits.train[0].row["system_prompt"] = before
    with pytest.raises(ValueError, match="needs 4 questions"):
        teacher.teacher_examples(smol_chat, splits.train[:3], "few_shot")


def test_run_with_a_teacher_stops_and_goes_on_bit_for_bit(data_root, tiny_folder, tmp_path, capsys):
    vectors = {}
    for kind in (None, *teacher.KINDS):
        flags = ["--teacher", kind] if kind else []
        assert ts.main(command(data_root, tiny_folder, tmp_path / str(kind), *flags)) == 0
        vectors[kind] = read_vector(tmp_path / str(kind))
    assert "teacher  11 prompts with the persona" in capsys.readouterr().out
    assert not torch.equal(vectors[None], vectors["prompted"])
    assert not torch.equal(vectors["few_shot"], vectors["prompted"])
    folder, copy = the_folder(tmp_path / "few_shot"), tmp_path / "again"
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["teacher_weight"] == ts.TEACHER_WEIGHT
    (folder / "steering_vector.safetensors").unlink()
    (folder / "checkpoint-00006.pt").unlink()
    (tmp_path / "few_shot").rename(copy)
    assert ts.main(command(data_root, tiny_folder, copy)) == 2  # another run: no teacher
    again = command(data_root, tiny_folder, copy, "--teacher", "few_shot")
    assert ts.main(again) == 0
    assert "resume   after step 4" in capsys.readouterr().out
    assert torch.equal(read_vector(copy), vectors["few_shot"])
