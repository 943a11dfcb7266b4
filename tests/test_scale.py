"""Scales, prompts, answers kept, conversations: evaluation/scale.py and evaluation/answers.py."""

import csv
import functools
import json
import math

import pytest
import torch
from conftest import CONFIGS, tiny
from test_eval_steering import QUICK, data, finished, steered, trained  # noqa: F401
from test_train_steering import the_folder

import eval_steering as ev
import export_vector as ex
import hook_model as hm
from evaluation import answers as an
from evaluation import measures as me
from evaluation import scale as sc
from evaluation.kept import Kept
from evaluation.prompts import SHOTS, first_rows
from evaluation.shared_prefix import after_shared_prefix, common_tokens
from steering.chat_format import Example, label_count
from steering.fast_path import FastPath, example_sums
from steering.finished import read_run
from steering.vector_file import VECTOR_FILE, load_vector

DIRECTION = 0.05 * torch.randn(32, generator=torch.Generator().manual_seed(0))
SAMPLING = an.Sampling(max_new_tokens=5, temperature=0.0)


def test_the_largest_scale_within_the_budget_is_found_in_few_steps():
    for limit in (0.0, 0.05, 0.1, 0.73, 1.0, 1.29, 2.5, 3.95, 4.0, 9.0):
        asked = []

        def divergence(scale, limit=limit, asked=asked):
            asked.append(scale)
            return scale / limit if limit else math.nan

        best = max((s / 10 for s in range(41) if limit and s / 10 <= limit), default=0.0)
        assert sc.largest_scale(divergence, 1.0) == best and len(asked) <= 6


def kl_of(model, data, scale):  # noqa: F811
    """KL on plain rows of the questions to choose by, in nats a token, at a scale of DIRECTION."""
    plain, fast = data.plain_chooser, FastPath(model)
    model.set_vector(DIRECTION, scale)
    sums = example_sums(fast.divergences, plain, 60)
    return sum(sums) / sum(map(label_count, plain))


def recommend(model, chat, data, budget=None, probe=None, count=3):  # noqa: F811
    budget = kl_of(model, data, 1.25) if budget is None else budget
    return sc.recommend_scale(model, chat, data, DIRECTION, probe, budget, SAMPLING, count, 60)


@pytest.fixture
def described(monkeypatch):
    """{scale: (persona, collapsed)} that stands in for what the answers of a scale are like."""
    table = {}

    def describe(model, chat, rows, texts, probe, yardstick, max_tokens):
        found = {scale: table.get(scale, (0.5, False)) for scale in texts}
        return {
            scale: {"persona": probe and {"mean": persona}, "collapsed": collapsed}
            for scale, (persona, collapsed) in found.items()
        }

    monkeypatch.setattr(sc, "describe_answers", describe)
    return table


def test_a_scale_is_within_the_budget_and_the_next_is_not(steered, smol_chat, data):  # noqa: F811
    found = recommend(steered, smol_chat, data)
    assert found["questions"] == sorted({*me.questions_of(data.validation)})
    assert {*me.questions_of(data.plain_chooser)} <= {*found["questions"]}
    scales = [candidate["scale"] for candidate in found["candidates"]]
    assert scales == [0.7, 0.8, 1.0, 1.2] and found["scale"] in scales
    for candidate in found["candidates"]:
        kl = kl_of(steered, data, candidate["scale"])
        assert candidate["kl"] == pytest.approx(kl, rel=1e-3) and kl <= found["kl_budget"]
    assert kl_of(steered, data, 1.3) > found["kl_budget"]


def test_the_best_persona_wins_among_scales_at_which_text_holds(
    steered, smol_chat, data, described  # noqa: F811
):  # fmt: skip
    scales = [c["scale"] for c in recommend(steered, smol_chat, data)["candidates"]]
    assert recommend(steered, smol_chat, data)["scale"] == scales[-1]  # no probe: the largest
    for scores, best in (
        ([0.1, 0.2, 0.9, 0.8], 2),
        ([0.1, 0.9, 0.86, 0.8], 2),  # as good as the one before, for all that six answers say
        ([0.1, 0.2, 0.3, 0.8], 3),
    ):
        described |= {s: (score, False) for s, score in zip(scales, scores, strict=True)}
        assert recommend(steered, smol_chat, data, probe=True)["scale"] == scales[best]
    described[scales[3]] = 0.9, True
    assert recommend(steered, smol_chat, data, probe=True)["scale"] == scales[2]
    assert recommend(steered, smol_chat, data)["scale"] == scales[2]
    described |= dict.fromkeys(scales, (0.9, True))
    found = recommend(steered, smol_chat, data)
    assert found["scale"] is None and "collapses" in found["why"]


def test_where_no_scale_is_to_be_had_it_says_why(steered, smol_chat, data):  # noqa: F811
    found = recommend(steered, smol_chat, data, budget=1e-9)
    assert found["scale"] is None and "over the budget" in found["why"]
    found = recommend(steered, smol_chat, data, count=0)
    assert found["scale"] is None and "no answers" in found["why"]


def test_without_answers_there_are_numbers_and_a_table(finished, capsys):  # noqa: F811
    assert ev.main(["--run", str(finished), "--num-samples", "0", "--restart"]) == 0
    said = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    assert "few-shot " in said and "no recommended scale: no answers were asked for" in said
    assert not (result["answers"] or result["samples"] or result["identity"])
    assert list(result["side_effects"])[:2] == ["steered x0.5", "steered x1"]


def test_a_scale_chosen_on_held_out_questions_is_caught(finished, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(me.EvalData, "chooser", property(lambda self: self.heldout))
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 1
    assert "held-out questions leaked" in capsys.readouterr().err


def test_report_and_export_use_the_recommended_scale(finished, tmp_path, capsys):  # noqa: F811
    (finished / "eval.json").unlink(missing_ok=True)
    to = ["--out", str(tmp_path / "out"), "--format", "safetensors", "--scale", "recommended"]
    assert ex.main([str(finished), *to]) == 2
    assert "no recommended scale (eval_steering.py finds one)" in capsys.readouterr().err
    assert ev.main(["--run", str(finished), *QUICK]) == 0
    result = json.loads((finished / "eval.json").read_text())
    scale = result["recommended"]["scale"]
    said = capsys.readouterr().out
    assert f"steered x{scale:g} *" in said and "* the recommended scale" in said
    assert ex.main([str(finished), *to]) == 0
    vector, header = load_vector(tmp_path / "out" / VECTOR_FILE)
    assert torch.equal(vector, load_vector(finished / VECTOR_FILE)[0] * scale)
    assert float(header["scale"]) == scale
    assert f"steered x{scale:g} *" in (tmp_path / "out" / "README.md").read_text()
    only = ["--report-only", "--report-dir", str(tmp_path)]
    assert ev.main(["--run", str(finished), *only]) == 0
    with open(tmp_path / "report.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["scale"]) == scale
    assert float(line["kl"]) == result["side_effects"][f"steered x{scale:g}"]["mean"]
    with pytest.raises(SystemExit):
        ex.main([str(finished), *to[:-1], "best"])
    assert '--scale best: must be finite and not 0, or "recommended"' in capsys.readouterr().err


# ---------------------------------------------------------------- prompts


def test_prompts_are_the_rows_own_each_of_the_datasets_and_one_with_examples(data):  # noqa: F811
    rows = first_rows(data.heldout, 2)
    train = [Example({**e.row}, [], []) for e in data.train]
    for i, example in enumerate(train):
        example.row["system_prompt"] = ("Be it.", "Act it.")[i % 3 == 0]
    versions = an.prompted_rows(rows, train, each_prompt=True)
    assert list(versions) == ["prompted", "prompt 1", "prompt 2", "few_shot"]
    assert versions["prompted"] == rows
    assert {row["system_prompt"] for row in versions["prompt 1"]} == {"Be it."}
    for row, shown in zip(rows, versions["few_shot"], strict=True):
        *shots, question, answer = shown["messages"]
        assert [question, answer] == row["messages"] and shown["system_prompt"] == "Be it."
        examples = [e.row["messages"] for e in train[:SHOTS]]
        assert shots == [turn for turns in examples for turn in turns]
    assert list(an.prompted_rows(rows, train)) == ["prompted", "few_shot"]
    assert "few_shot" not in an.prompted_rows(rows, train[:2])
    bare = [{**row, "system_prompt": ""} for row in rows]
    assert list(an.prompted_rows(bare, train, each_prompt=True)) == ["few_shot"]


def test_few_shot_losses_are_of_the_same_answer_tokens(data, tiny_folder, smol_chat):  # noqa: F811
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    vectors = {"steered": [torch.zeros(32)]}
    losses = me.heldout_losses(model, smol_chat, data.heldout, vectors, 60, data.train)
    rows = an.prompted_rows([e.row for e in data.heldout], data.train)["few_shot"]
    for row, loss in zip(rows, losses["few_shot"], strict=True):
        turns = [{"role": "system", "content": row["system_prompt"]}, *row["messages"]]
        text = smol_chat.tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        ids = torch.tensor([smol_chat.tokenize([text])[0]])
        count = len(smol_chat.tokenize([row["messages"][-1]["content"] + "<|im_end|>"])[0])
        labels = ids.clone()
        labels[:, :-count] = -100
        with torch.no_grad():
            nats = model.model(input_ids=ids, labels=labels).loss.item() * count
        assert loss == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_shared_beginning_changes_no_loss(architecture):
    model, generator = tiny(architecture), torch.Generator().manual_seed(1)
    start = torch.randint(3, 160, (70,), generator=generator).tolist()
    examples = []
    for length in (4, 9, 6, 5):
        rest = torch.randint(3, 160, (length,), generator=generator).tolist()
        examples.append(Example({}, start + rest, [-100] * 72 + rest[2:]))
    assert common_tokens(examples) == 70
    got = after_shared_prefix(model, examples, me.token_nll, 12)
    for example, found in zip(examples, got, strict=True):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        count = label_count(example)
        nats = model(input_ids=ids, labels=labels).loss.item() * count
        assert found.sum().item() == pytest.approx(nats, rel=1e-4)
    assert after_shared_prefix(model, examples[:2], me.token_nll, 12) is None  # nothing to gain
    with pytest.MonkeyPatch.context() as fault:  # a cache that is not what it should be
        fault.setattr(type(model), "forward", strange(type(model).forward))
        assert after_shared_prefix(model, examples, me.token_nll, 12) is None


def strange(forward):
    """A forward that forgets what its cache holds."""

    @functools.wraps(forward)  # and so its signature
    def forgetful(self, *args, cache=None, past_key_values=None, **kwargs):
        return forward(self, *args, **kwargs)

    return forgetful


# ---------------------------------------------------------------- answers that are kept


def test_answers_of_the_plain_model_are_written_once_for_all_runs(trained, monkeypatch):  # noqa: F811
    runs, asked = trained / "runs", []
    for path in runs.rglob("eval*.json"):
        path.unlink()
    for path in runs.rglob("kept_answers.jsonl"):
        path.unlink()
    real = an.generate_answers

    def generate(model, chat, conversations, sampling):
        asked.extend((model.steering.scale, json.dumps(turns)) for turns in conversations)
        return real(model, chat, conversations, sampling)

    monkeypatch.setattr(an, "generate_answers", generate)
    assert ev.main(["--run", str(runs), *QUICK]) == 0
    plain = [turns for scale, turns in asked if scale == 0]
    assert plain and len(plain) == len({*plain})
    (path,) = runs.rglob("kept_answers.jsonl")
    assert path.parent.name == "layer1" and len(path.read_text().splitlines()) == len(plain)
    asked.clear()
    folder = the_folder(runs)
    before = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").unlink()
    assert ev.main(["--run", str(folder), *QUICK]) == 0
    assert not [turns for scale, turns in asked if scale == 0]
    assert json.loads((folder / "eval.json").read_text())["samples"] == before["samples"]
    path.unlink()
    assert ev.main(["--run", str(folder), *QUICK, "--restart"]) == 0
    assert [turns for scale, turns in asked if scale == 0]


def test_kept_lines_outlive_torn_ones_and_belong_to_what_they_are_about(tmp_path, capsys):
    path = tmp_path / "kept.jsonl"
    kept = Kept(path, "model a")
    kept.add(kept.key("x"), answer=1)
    with open(path, "a") as file:
        file.write('{"key": "torn')
    again = Kept(path, "model a")
    assert again.found[again.key("x")]["answer"] == 1 and len(again.found) == 1
    again.add(again.key("y"), answer=2)
    assert len(Kept(path).found) == 2 and again.key("x") != Kept(path, "model b").key("x")
    nowhere = Kept(tmp_path / "gone" / "kept.jsonl")
    for i in range(3):
        nowhere.add(str(i), answer=i)
    assert len(nowhere.found) == 3 and capsys.readouterr().err.count("keeps nothing") == 1


# ---------------------------------------------------------------- conversations


def test_every_question_comes_up_at_every_turn_after_what_was_said(steered, smol_chat, monkeypatch):  # noqa: F811
    heard = []

    def answer(model, chat, conversations, sampling):
        heard.append(json.loads(json.dumps(conversations)))
        return [f"{len(heard)}" for _ in conversations]

    monkeypatch.setattr(an, "generate_answers", answer)
    talks = an.converse(steered, smol_chat, 4, "Be it.", SAMPLING)
    for turn in range(4):
        assert {talk[turn]["question"] for talk in talks} == {*an.EVERYDAY[:4]}
        assert all(talk[turn]["answer"] == f"{turn + 1}" for talk in talks)
    first, *rest = heard[-1][2]
    assert first == {"role": "system", "content": "Be it."}
    assert [turn["role"] for turn in rest] == ["user", "assistant"] * 3 + ["user"]
    assert [turn["content"] for turn in rest[1::2]] == ["1", "2", "3"]


def test_turns_are_scored_and_shown(finished, capsys):  # noqa: F811
    assert ev.main(["--run", str(finished), *QUICK, "--turns", "3"]) == 0
    said = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    scale = result["recommended"]["scale"]
    assert list(result["conversation"]) == ["vanilla", "prompted", f"steered x{scale:g}"]
    for found in result["conversation"].values():
        assert [len(talk) for talk in found["talks"]] == [3] * 3
        assert len(found["persona"]["by_turn"]) == 3
    assert "second half - first" in said
    with pytest.raises(SystemExit):
        ev.main(["--run", str(finished), "--turns", "11"])
    assert "--turns 11: 0 to 10" in capsys.readouterr().err


def test_scores_of_turns_are_those_of_their_answers(steered, smol_chat):  # noqa: F811
    talks = [
        [{"question": f"Q{t}?", "answer": "" if i * t else " ".join(["word"] * (1 + i + t))}
         for t in range(2)]
        for i in range(2)
    ]  # fmt: skip

    def probe(states):
        return states.norm(dim=1) / 100

    found = me.persona_by_turn(steered, smol_chat, talks, probe, 60)
    turns = [{"role": "user", "content": "Q1?"}, {"role": "assistant", "content": "word word"}]
    row = {"question": "Q1?", "system_prompt": "", "messages": turns}
    (example,) = an.without_end(smol_chat.encode([row]), smol_chat)
    alone = probe(me.response_means(steered, [example], 60)).item()
    assert found["by_turn"][1] == pytest.approx(alone, rel=1e-4)  # the other answer is empty
    assert me.persona_by_turn(steered, smol_chat, talks, None, 60) is None


def test_an_older_evaluation_is_done_anew_with_a_word(finished, capsys):  # noqa: F811
    assert ev.main(["--run", str(finished), *QUICK]) == 0
    path = finished / "eval.json"
    result = json.loads(path.read_text())
    result["config"]["format_version"] = "3"
    path.write_text(json.dumps(result))
    assert read_run(finished).dataset
    capsys.readouterr()
    assert ev.main(["--run", str(finished), *QUICK]) == 0
    assert "an older version recommended no scale" in capsys.readouterr().err
