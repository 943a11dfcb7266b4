"""Scales, answers that are kept, conversations."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK, divergences_of, the_folder

import eval_steering as ev
import export_vector as ex
from evaluation import answers as an
from evaluation import scale as sc
from evaluation.conversations import converse, persona_by_turn
from evaluation.kept import Kept
from evaluation.likelihood import Reader
from evaluation.probe import response_means
from evaluation.rows import EvalData, questions_of
from evaluation.table import number_at
from steering.chat_format import label_count
from steering.fast_path import FastPath, example_sums
from steering.vector_file import VECTOR_FILE, load_vector

DIRECTION = 0.05 * torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("limit", [0.02, 0.1, 0.73, 0.99, 1.0, 1.29, 2.5, 3.95, 4.0, 9.0])
def test_the_largest_scale_spends_the_budget_and_not_more(limit, power):
    asked = []

    def divergence(scale):
        asked.append(scale)
        return 2.0 * (scale / limit) ** power

    scale = sc.largest_scale(divergence, 2.0)
    assert scale in asked and len(asked) <= sc.TRIES
    assert divergence(scale) <= 2.0
    if limit > sc.MAX_SCALE:
        assert scale == sc.MAX_SCALE
    elif power > 1 or limit > 0.02:  # the square is too far from it there
        assert divergence(scale) >= 0.9 * 2.0
    if power == 2.0:
        assert len(asked) <= 6  # with the one of the line above


def test_a_divergence_that_is_no_number_or_leaps_leaves_a_scale_below_or_none():
    assert sc.largest_scale(lambda scale: math.nan, 1.0) == 0.0
    assert sc.largest_scale(lambda scale: 5.0, 1.0) == 0.0
    assert sc.largest_scale(lambda scale: 0.0, 1.0) == sc.MAX_SCALE
    found = sc.largest_scale(lambda scale: 0.1 if scale < 0.3 else math.inf, 1.0)
    assert 0.2 < found < 0.3


def kl_of(model, data, scale):
    """KL on plain rows of the questions to choose by, in nats a token, at a scale of DIRECTION."""
    plain = data.plain_chooser
    model.set_vector(DIRECTION, scale)
    sums = example_sums(divergences_of(FastPath(model)), plain, 60)
    return sum(sums) / sum(map(label_count, plain))


@pytest.fixture
def recommend(steered, smol_chat, data, tmp_path):
    """A function: the recommendation for DIRECTION; the budget is what KL is at scale 1.25."""
    sampling = an.Sampling(max_new_tokens=5, temperature=0.0)
    reader = Reader(steered, smol_chat, 60)
    writer = an.Writer(steered, smol_chat, sampling, Kept(tmp_path / "kept"))

    def search(budget=None, probe=None, count=3):
        if budget is None:
            budget = kl_of(steered, data, 1.25)
        args = SimpleNamespace(kl_budget=budget, num_samples=count)
        asking = sc.recommend_scale(reader, writer, data, DIRECTION, probe, args)
        return an.run_alone(asking, writer)

    return search


@pytest.fixture
def described(monkeypatch):
    """{scale: (persona, collapsed)} that stands in for what the answers of a scale are like."""
    table = {}

    def columns(reader, rows, texts, probe, yardstick):
        found = {scale: table.get(scale, (0.5, False)) for scale in texts}
        personas = {scale: persona for scale, (persona, _) in found.items()}
        collapsed = {scale: broken for scale, (_, broken) in found.items()}
        return {"probe": personas if probe else {}, "collapsed": collapsed}

    monkeypatch.setattr(sc, "answer_columns", columns)
    return table


def test_a_scale_is_within_the_budget_and_the_next_is_not(recommend, steered, data):
    found = recommend()
    assert found["questions"] == sorted({*questions_of(data.validation)})
    assert {*questions_of(data.plain_chooser)} <= {*found["questions"]}
    scales = [candidate["scale"] for candidate in found["candidates"]]
    assert scales == [sc.rounded(found["largest"] * share) for share in sc.FRACTIONS[::-1]]
    assert found["scale"] in scales
    for candidate in found["candidates"]:
        kl = kl_of(steered, data, candidate["scale"])
        assert candidate["kl"] == pytest.approx(kl, rel=1e-3)
        assert kl <= found["kl_budget"]
    assert found["candidates"][-1]["kl"] >= sc.NEAR * found["kl_budget"]
    assert found["largest"] == scales[-1] <= 1.25


@pytest.mark.parametrize(
    "scores, best",
    [
        ([0.1, 0.2, 0.9, 0.8], 2),
        ([0.1, 0.9, 0.86, 0.8], 2),  # as good as the one before, for all that few answers say
        ([0.1, 0.2, 0.3, 0.8], 3),
    ],
)
def test_the_best_persona_wins_among_scales_at_which_text_holds(recommend, described, scores, best):
    scales = [candidate["scale"] for candidate in recommend()["candidates"]]
    for scale, score in zip(scales, scores, strict=True):
        described[scale] = (score, False)
    assert recommend(probe=True)["scale"] == scales[best]
    assert recommend()["scale"] == scales[3]  # without a probe: the largest
    described[scales[3]] = (0.9, True)
    assert recommend(probe=True)["scale"] == scales[2]
    found = recommend()
    assert found["scale"] == scales[2] and found["largest"] == scales[3]


def test_where_no_scale_is_to_be_had_it_says_why(recommend, described, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(an, "longest_text", lambda config: 8)
        found = recommend()
        assert "than the 8 that the model takes" in found["why"]
        assert found["scale"] is None and found["largest"]
    with monkeypatch.context() as patched:
        patched.setattr(sc, "largest_scale", lambda divergence, budget: 0.0)
        found = recommend()
        assert "over the budget" in found["why"] and found["largest"] is None
    assert "no answers" in recommend(count=0)["why"]
    scales = [candidate["scale"] for candidate in recommend()["candidates"]]
    described |= dict.fromkeys(scales, (0.9, True))
    found = recommend()
    assert "collapses" in found["why"]
    assert found["scale"] is None


def test_without_answers_there_are_numbers_and_a_table(finished, capsys):
    assert ev.main(["--run", str(finished), "--num-samples", "0", "--restart"]) == 0
    said = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    assert "few_shot " in said
    assert "no recommended scale: no answers were asked for" in said
    assert not (result["samples"] or result["identity"])
    assert number_at(result, "steered x0.5", "kl") > 0
    assert number_at(result, "steered x0.5", "words") is None


def test_a_scale_chosen_on_held_out_questions_is_caught(finished, monkeypatch, capsys):
    monkeypatch.setattr(EvalData, "chooser", property(lambda self: self.heldout))
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 1
    assert "held-out questions leaked" in capsys.readouterr().err


def test_export_uses_the_recommended_scale(finished, tmp_path, capsys):
    (finished / "eval.json").unlink(missing_ok=True)
    to = ["--out", str(tmp_path / "out"), "--format", "safetensors", "--scale", "recommended"]
    assert ex.main([str(finished), *to]) == 2
    assert "no recommended scale (eval_steering.py finds one)" in capsys.readouterr().err
    assert ev.main(["--run", str(finished), *QUICK]) == 0
    scale = json.loads((finished / "eval.json").read_text())["recommended"]["scale"]
    said = capsys.readouterr().out
    assert f"steered x{scale:g} *" in said
    assert "* the recommended scale" in said
    assert ex.main([str(finished), *to]) == 0
    vector, header = load_vector(tmp_path / "out" / VECTOR_FILE)
    assert torch.equal(vector, load_vector(finished / VECTOR_FILE)[0] * scale)
    assert float(header["scale"]) == scale
    assert f"steered x{scale:g} *" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        ex.main([str(finished), *to[:-1], "best"])
    assert '--scale best: must be finite and not 0, or "recommended"' in capsys.readouterr().err


# ---------------------------------------------------------------- answers that are kept


def test_answers_of_the_plain_model_are_written_once_for_all_runs(trained, written_at_once):
    def plain():
        asked = [pair for call in written_at_once for pair in call]
        return [json.dumps(turns) for vector, turns in asked if not vector.any()]

    runs = trained / "runs"
    for path in runs.rglob("eval*.json"):
        path.unlink()
    for path in runs.rglob("kept_answers.jsonl"):
        path.unlink()
    assert ev.main(["--run", str(runs), *QUICK]) == 0
    asked = plain()
    assert asked and len(asked) == len({*asked})
    (path,) = runs.rglob("kept_answers.jsonl")
    assert path.parent == the_folder(runs).parent.parent  # where all layers of the model are
    assert len(path.read_text().splitlines()) == len(asked)
    written_at_once.clear()
    folder = the_folder(runs)
    before = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").unlink()
    assert ev.main(["--run", str(folder), *QUICK]) == 0
    assert written_at_once and not plain()
    assert json.loads((folder / "eval.json").read_text())["samples"] == before["samples"]
    path.unlink()
    assert ev.main(["--run", str(folder), *QUICK, "--restart"]) == 0
    assert plain()


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


def test_every_question_comes_up_at_every_turn_after_what_was_said():
    heard = []

    class Writer:
        def ask(self, conversations, vector=None):
            return [an.Ask(json.loads(json.dumps(turns)), vector) for turns in conversations]

    def write(asks):
        heard.append(asks)
        return [f"{len(heard)}" for _ in asks]

    ways = {"prompted": ("Be it.", None), "steered": ("", DIRECTION)}
    (said,) = an.run_together([converse(Writer(), ways, 4)], write)
    assert list(said) == list(ways) and len(heard) == 4  # a turn of both at once
    for talks in said.values():
        for turn in range(4):
            assert {talk[turn]["question"] for talk in talks} == {*an.EVERYDAY[:4]}
            assert all(talk[turn]["answer"] == f"{turn + 1}" for talk in talks)
    vectors = [ask.vector for ask in heard[-1]]
    assert vectors == [None] * 4 + [DIRECTION] * 4
    assert heard[-1][4].turns[0]["role"] == "user"
    first, *rest = heard[-1][2].turns
    assert first == {"role": "system", "content": "Be it."}
    assert [turn["role"] for turn in rest] == ["user", "assistant"] * 3 + ["user"]
    assert [turn["content"] for turn in rest[1::2]] == ["1", "2", "3"]


def test_turns_are_scored_and_shown(finished, capsys):
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


def test_conversations_too_long_for_the_model_lose_nothing_else(finished, monkeypatch, capsys):
    def ask(writer, conversations, vector=None):
        if len(conversations[0]) > 3:
            raise an.DoesNotFit("as long as that")
        return real(writer, conversations, vector)

    real = an.Writer.ask
    monkeypatch.setattr(an.Writer, "ask", ask)
    assert ev.main(["--run", str(finished), *QUICK, "--turns", "4"]) == 0
    assert "no conversation: as long as that" in capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    assert "conversation" not in result and result["samples"]


def test_scores_of_turns_are_those_of_their_answers(steered, smol_chat):
    talks = []
    for i in range(2):
        pairs = []
        for turn in range(2):
            answer = "" if i * turn else " ".join(["word"] * (1 + i + turn))
            pairs.append({"question": f"Q{turn}?", "answer": answer})
        talks.append(pairs)

    def probe(states):
        return states.norm(dim=1) / 100

    found = persona_by_turn(Reader(steered, smol_chat, 60), talks, probe)
    turns = [{"role": "user", "content": "Q1?"}, {"role": "assistant", "content": "word word"}]
    row = {"question": "Q1?", "system_prompt": "", "messages": turns}
    (example,) = an.without_end(smol_chat.encode([row]), smol_chat)
    alone = probe(response_means(FastPath(steered), [example], 60)).item()
    assert found["by_turn"][1] == pytest.approx(alone, rel=1e-4)  # the other answer is empty
