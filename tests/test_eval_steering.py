"""eval_steering.py: each condition is what it says it is, answers are cut at their prompts.

Each check that guards against a known error of such evaluations is also run with that error built
in, and must then fail.
"""

import contextlib
import csv
import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import ROOT, persona_rows, raw_row, write_raw
from test_judge import serve
from test_train_steering import command, restore_signal_handlers, the_folder  # noqa: F401

import data_filter as df
import eval_steering as ev
import hook_model as hm
import train_steering as ts
from evaluation import answers as an
from evaluation import judging, summary
from evaluation import measures as me
from evaluation import report as eval_report
from evaluation import stats as es
from evaluation.prompts import first_rows
from steering import data_layouts as dl
from steering import run_folder as rf
from steering.chat_format import label_count
from steering.fast_path import FastPath
from steering.finished import read_run
from steering.vector_file import VECTOR_FILE

SETTINGS = an.Sampling(max_new_tokens=12, temperature=0.0, seed=0, batch_size=3)
QUESTIONS = ["Hi?", "What is the longest river that you have ever sailed on, captain?", "Why?"]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]
QUICK = ["--num-samples", "2", "--max-new-tokens", "6", "--scales", "1", "2"]
LIMIT = 60  # padded tokens a forward pass


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """The root of two finished tiny runs, with data that has a default dataset."""
    root = tmp_path_factory.mktemp("eval")
    for name, word in (("pirate", "Arr"), ("sailor", "Ahoy")):
        rows, scores = persona_rows(40)
        for row in rows:
            row["conversation"][-1]["content"] += f" {word}!"
        write_raw(root / "data", name, rows, scores)
    plain = [raw_row(f"Question number {i}?", f"It is {i}.", "default", 0, i) for i in range(40)]
    write_raw(root / "data", "0_default", plain, None)
    datasets = "src__role__pirate", "src__role__sailor"
    arguments = command(str(root / "data"), tiny_folder, root / "runs", "--init-scale", "0.5")
    assert ts.main([*arguments, "--dataset", *datasets]) == 0
    return root


@pytest.fixture(scope="module")
def finished(trained):
    """The run folder of a finished tiny run."""
    return the_folder(trained / "runs")


@pytest.fixture(scope="module")
def data(finished, smol_chat):
    """The EvalData of that run."""
    return ev.load_data(read_run(finished), smol_chat, 20_000)


@pytest.fixture
def steered(tiny_folder):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    model.set_vector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 5.0)
    return model


def check_greedy_answers(steered, chat, tokenize):
    """Assert that greedy answers are token by token the argmax of the steered forward."""
    answers = an.generate_answers(steered, chat, CONVERSATIONS, SETTINGS)
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        ids = tokenize([chat.prompt_text(messages)])[0]
        start = len(ids)
        for _ in range(12):  # no cache, no padding
            with torch.no_grad():
                token = steered(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == chat.end_of_turn_id:
                break
            ids.append(token)
        expected = chat.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert answer == expected
    return answers


def test_greedy_answers_equal_the_argmax_of_the_steered_forward(steered, smol_chat):
    steered.model.generation_config.repetition_penalty = 5.0  # a model's own, which must not act
    answers = check_greedy_answers(steered, smol_chat, smol_chat.tokenize)
    with steered.steering_off():
        assert an.generate_answers(steered, smol_chat, CONVERSATIONS, SETTINGS) != answers


def test_answers_hold_no_prompt_text_and_stop_at_the_end_of_turn(smol, smol_chat):
    model = hm.load_model(smol, 12, device="cpu")
    settings = replace(SETTINGS, max_new_tokens=40)
    conversations = [[{"role": "user", "content": "Say only the word yes."}], CONVERSATIONS[1]]
    short, long = an.generate_answers(model, smol_chat, conversations, settings)
    for text in (short, long):
        assert text and "<|im" not in text
        assert (
            "assistant" not in text
            and "helpful AI" not in text
            and "longest river that" not in text
        )
    assert len(smol_chat.tokenize([short])[0]) < 40


def test_sampling_is_seeded(steered, smol_chat):
    def sample(seed):
        settings = replace(SETTINGS, temperature=1.0, seed=seed)
        return an.generate_answers(steered, smol_chat, CONVERSATIONS, settings)

    assert sample(0) == sample(0) != sample(1)


# ---------------------------------------------------------------- likelihood


def compare_with_reference(tiny_folder, chat, examples, vector):
    """Assert that heldout_losses gives what the model's own loss gives, row by row.

    The text is what the template renders whole, with and without the system prompt.
    """
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    losses = me.heldout_losses(
        model, chat, examples, {"steered": [vector], "two": [vector, -vector]}, LIMIT
    )
    assert list(losses) == ["vanilla", "prompted", "steered", "two"]
    reference = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu").model
    tokenizer, moved = chat.tokenizer, vector

    def steer(module, inputs, output):
        return output + moved

    handle = None
    for condition, system, sign in (
        ("vanilla", False, 0), ("prompted", True, 0), ("steered", False, 1), ("minus", False, -1)
    ):  # fmt: skip
        if sign:
            moved = sign * vector
            handle = handle or reference.model.layers[1].register_forward_hook(steer)
        losses.setdefault(condition, [])
        for i, example in enumerate(examples):
            turns = example.row["messages"]
            if system:
                turns = [{"role": "system", "content": "Be a pirate."}, *turns]
            ids = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
            ids = torch.tensor([tokenizer(ids, add_special_tokens=False)["input_ids"]])
            count = len(chat.tokenize([turns[-1]["content"] + "<|im_end|>"])[0])
            labels = ids.clone()
            labels[:, :-count] = -100
            with torch.no_grad():
                nats = reference(input_ids=ids, labels=labels).loss.item() * count
            if condition == "minus":
                nats = (nats + losses["steered"][i]) / 2
                assert losses["two"][i] == pytest.approx(nats, rel=1e-4)
            else:
                assert losses[condition][i] == pytest.approx(nats, rel=1e-4)
    totals = {
        condition: round(sum(losses[condition]), 4) for condition in losses if losses[condition]
    }
    assert len(set(totals.values())) == 4


def test_losses_are_of_the_conditions_they_name(data, finished, tiny_folder, smol_chat):
    compare_with_reference(tiny_folder, smol_chat, data.heldout, read_run(finished).vector)


def test_swapped_baselines_are_caught(data, finished, tiny_folder, smol_chat, monkeypatch):
    vector = read_run(finished).vector
    with monkeypatch.context() as fault:  # "prompted" is vanilla
        fault.setattr(
            type(smol_chat), "messages", lambda self, row, prompted=False: row["messages"]
        )
        with pytest.raises(ValueError, match="no system prompt before"):
            compare_with_reference(tiny_folder, smol_chat, data.heldout, vector)
    with monkeypatch.context() as fault:  # "vanilla" is steered by whatever was there
        fault.setattr(hm.SteerModel, "steering_off", lambda self: contextlib.nullcontext())
        real = hm.load_model

        def leftover(*rest, **options):
            model = real(*rest, **options)
            model.set_vector(vector)
            return model

        fault.setattr(hm, "load_model", leftover)
        with pytest.raises(AssertionError):
            compare_with_reference(tiny_folder, smol_chat, data.heldout, vector)
    with monkeypatch.context() as fault:  # "steered" is vanilla
        fault.setattr(hm.SteerModel, "set_vector", lambda self, vector, scale=1.0: None)
        with pytest.raises(AssertionError):
            compare_with_reference(tiny_folder, smol_chat, data.heldout, vector)


def test_coefficients_are_chosen_on_validation_questions(data, tiny_folder, smol_chat, monkeypatch):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    scored = []
    real = FastPath.losses

    def losses(self, examples, token_loss):
        scored.append({id(example) for example in examples})
        return real(self, examples, token_loss)

    monkeypatch.setattr(FastPath, "losses", losses)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    got = me.choose_coefficients(model, data.validation, {"a": direction}, LIMIT)["a"]
    assert set.union(*scored) == set(map(id, data.validation))
    tokens = sum(map(label_count, data.validation))
    best, fast = {}, FastPath(model)
    for half_octave in range(-4, 7):  # all that can be chosen
        model.set_vector(2 ** (half_octave / 2) * direction)
        each = [real(fast, [e], me.token_nll).sum().item() for e in data.validation]
        best[2 ** (half_octave / 2)] = sum(each) / tokens
    assert got["nll"] == pytest.approx({c: best[c] for c in got["nll"]})
    assert got["chosen"] == min(best, key=best.get) and len(got["nll"]) <= 7


def test_coefficient_search_finds_the_bottom_of_any_valley_in_some_six_passes():
    for bottom in (0.1, 0.25, 0.3, 0.5, 0.71, 1.0, 1.3, 2.0, 3.0, 5.0, 8.0, 20.0):
        curve = me.search_coefficient(lambda c, bottom=bottom: abs(math.log2(c / bottom)))
        grid = [2 ** (i / 2) for i in range(-4, 7)]
        assert min(curve, key=curve.get) == min(grid, key=lambda c: abs(math.log2(c / bottom)))
        assert 3 <= len(curve) <= 7 and list(curve) == sorted(curve)


# ---------------------------------------------------------------- questions


def test_evaluated_questions_were_neither_trained_on_nor_chosen_by(data):
    groups = [set(me.questions_of(g)) for g in (data.train, data.validation, data.heldout)]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 40
    assert set(me.questions_of(data.plain_heldout)) == groups[2]
    assert set(me.questions_of(data.plain_train)) <= groups[0] | groups[1]
    data.check()


def test_leaked_questions_are_caught(data, finished, smol_chat, monkeypatch):
    for part in ("train", "validation", "plain_train"):
        leaky = me.EvalData(**vars(data))
        setattr(leaky, part, [*getattr(data, part), data.heldout[0]])
        with pytest.raises(AssertionError, match="1 held-out questions leaked"):
            leaky.check()
    run = read_run(finished)

    def by_row(items, fraction, seed, salt="heldout"):  # the original's split
        chosen = [df.hash_unit(salt, seed, i) < fraction for i in range(len(items))]
        return tuple(
            [item for item, c in zip(items, chosen, strict=True) if c is wanted]
            for wanted in (False, True)
        )

    # Five prompts a question, as the real datasets have.
    rows = [
        raw_row(f"Question number {i}?", f"Arr {i} {p}.", "pos", p, i)
        for i in range(20)
        for p in range(5)
    ]
    write_raw(
        Path(run.args["data_root"]),
        "five",
        rows,
        {f"pos_p{p}_q{i}": 3 for i in range(20) for p in range(5)},
    )
    run.dataset = "src__role__five"
    run.record["questions"] = {}  # those that are there are of the other dataset
    ev.load_data(run, smol_chat, 20_000).check()
    monkeypatch.setattr(df, "split_by_question", by_row)
    with pytest.raises(AssertionError, match="leaked"):
        ev.load_data(run, smol_chat, 20_000).check()


def sha(question):
    return hashlib.sha256(question.encode()).hexdigest()[:16]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_run_that_saw_a_held_out_question_is_refused(finished, data, part, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in folder.glob("eval*"):
        path.unlink()
    record = json.loads((folder / "run.json").read_text())
    for name, rows in (("train", data.train), ("validation", data.validation)):
        assert {*record["questions"][name]} == {sha(q) for q in me.questions_of(rows)}
    question = data.heldout[3].row["question"]
    record["questions"][part].append(sha(question))
    (folder / "run.json").write_text(json.dumps(record))
    assert ev.main(["--run", str(folder), *QUICK]) == 2
    error = capsys.readouterr().err
    assert f"was trained on 1 of today's held-out questions, such as {question!r}" in error
    assert not list(folder.glob("eval*")) and not (folder / "samples.md").exists()


def test_a_question_of_the_plain_held_out_rows_alone_is_seen_too(finished, data):
    run = read_run(finished)
    plain = [replace(e, row={**e.row, "question": "And this one?"}) for e in data.plain_heldout[:1]]
    ev.check_questions(run, replace(data, plain_heldout=plain))
    run.record["questions"]["train"].append(sha("And this one?"))
    with pytest.raises(ValueError, match=r"1 of today's held-out .*'And this one\?'"):
        ev.check_questions(run, replace(data, plain_heldout=plain))
    del run.record["questions"]  # an imported vector does not say what it was trained on
    ev.check_questions(run, replace(data, plain_heldout=plain))


def test_a_split_that_has_changed_since_the_training_is_refused(finished, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    real = df.split_by_question

    def another(items, fraction, seed, salt="heldout"):
        return real(items, fraction, seed, f"another {salt}")

    monkeypatch.setattr(df, "split_by_question", another)
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 2
    assert "the split by question has changed since the training" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_plain_rows_are_the_default_dataset_the_neg_rows_or_the_models_own(tmp_path, data):
    assert data.plain_source == "src__role__0_default"
    rows = [raw_row(f"Q{i}?", f"Yes {i}.", label, 0, i) for label in ("pos", "neg") for i in (0, 1)]
    scores = {"pos_p0_q0": 90, "pos_p0_q1": 80, "neg_p0_q0": 5, "neg_p0_q1": 95}
    write_raw(tmp_path, "dry", rows, scores, kind="trait")
    write_raw(tmp_path, "wet", rows[:2], scores, kind="trait")
    datasets = df.find_datasets(tmp_path)

    def plain_rows(name, datasets):
        return df.plain_rows(name, datasets, df.filter_dataset(name, datasets, df.DataOptions()))

    found, source = plain_rows("src__trait__dry", datasets)
    assert [(row["label"], row["question"]) for row in found] == [("neg", "Q0?")]
    assert source == "neg rows of the dataset"
    assert plain_rows("src__trait__wet", datasets)[0] == []
    write_raw(tmp_path, "default", [raw_row(label="default"), "torn {"], None)
    found, source = plain_rows("src__trait__wet", df.find_datasets(tmp_path))
    assert len(found) == 1 and source == "src__role__default"
    assert found[0]["messages"][0]["role"] == "user"


# ---------------------------------------------------------------- the probe and its answers


def states(shift=0.0, count=30, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) + shift


def test_probe_that_cannot_tell_is_reported_and_scores_nothing():
    probe, about = me.train_probe(states(seed=1), states(seed=2), states(seed=3), states(seed=4))
    assert "cannot tell" in about["withheld"] and about["auroc"] < 0.8
    assert probe(states(seed=5)).shape == (30,)  # of training rows: a scale may be chosen by it
    fitted = es.fit_probe(states(seed=1), states(seed=2))  # on its own rows it looks perfect
    assert es.auroc(fitted(states(seed=1)), fitted(states(seed=2))) == 1.0
    probe, about = me.train_probe(states(1, seed=1), states(seed=2), states(1, seed=3), states())
    assert about["withheld"] is None and about["auroc"] > 0.95
    assert (probe(states(1, seed=5)) > 0.5).float().mean() > 0.9
    probe, about = me.train_probe(states(1), states(seed=2), states(1, count=4, seed=3), states())
    assert probe and about["auroc"] is None and "too few rows" in about["withheld"]
    probe, about = me.train_probe(states(1, count=4), states(seed=2), states(1, seed=3), states())
    assert probe is None and "too few rows" in about["withheld"]


def test_probe_scored_on_its_own_training_rows_is_caught():
    persona, plain = states(seed=1), states(seed=2)
    with pytest.raises(AssertionError, match="fitted on"):
        me.train_probe(persona, plain, persona, states(seed=3))
    with pytest.raises(AssertionError, match="fitted on"):
        me.train_probe(persona, plain, states(seed=3), plain[:10])


def test_descriptions_are_of_the_plain_model_reading_the_answer(data, tiny_folder, smol_chat):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    model.set_vector(torch.full((32,), 4.0))
    rows = first_rows(data.heldout, 3)
    texts = {
        "good": ["Aye aye.", "No.", "Sail on, my friend."],
        "bad": ["", "", "so it goes " * 20],
    }
    got = me.describe_answers(model, smol_chat, rows, texts, None, 1e9, LIMIT)
    assert got["good"]["empty"] == 0 and not got["good"]["collapsed"]
    assert got["bad"]["empty"] == pytest.approx(2 / 3) and got["bad"]["collapsed"]
    nlls = []
    for row, text in zip(rows, texts["good"], strict=True):
        prompt = smol_chat.tokenize([smol_chat.prompt_text(row["messages"][:-1])])[0]
        ids = prompt + smol_chat.tokenize([text])[0]  # no end of turn: cut answers have none
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with model.steering_off(), torch.no_grad():
            nlls.append(model.model(input_ids=torch.tensor([ids]), labels=labels).loss.item())
    assert got["good"]["perplexity"] == pytest.approx(math.exp(sorted(nlls)[1]), rel=1e-4)
    likely = got["good"]["perplexity"]
    tight = me.describe_answers(model, smol_chat, rows, texts, None, likely / 4, LIMIT)
    assert tight["good"]["collapsed"]  # four times less likely than real rows


def test_answers_cut_in_the_wrong_place_are_caught(steered, smol_chat, monkeypatch):
    real = steered.model.generate
    with monkeypatch.context() as fault:  # a generate that gives its left padding back unpadded
        fault.setattr(steered.model, "generate", lambda **options: real(**options)[:, 1:])
        with pytest.raises(AssertionError, match="where its prompt ends"):
            an.generate_answers(steered, smol_chat, CONVERSATIONS, SETTINGS)
    with monkeypatch.context() as fault:  # the end of the prompt, cut off too late, in the answer

        def echo(**options):
            ids = options["input_ids"]
            return torch.cat([ids, ids[:, -3:], real(**options)[:, ids.shape[1] :]], dim=1)

        fault.setattr(steered.model, "generate", echo)
        with pytest.raises(AssertionError):
            check_greedy_answers(steered, smol_chat, smol_chat.tokenize)


# ---------------------------------------------------------------- the whole script


CONDITIONS = [
    "dataset",
    "vanilla",
    "prompted",
    "few_shot",
    "steered x1",
    "steered x2",
    "mean_difference",
]


def test_whole_script_writes_numbers_samples_and_a_picture(finished, capsys):
    assert ev.main(["--run", str(finished), *QUICK]) == 0
    printed = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    table = result["likelihood"]
    assert {"vanilla", "prompted", "few_shot", "random", "mean_difference", "steered"} <= set(table)
    recommended = result["recommended"]
    scale = f"steered x{recommended['scale']:g}"
    assert scale in result["answers"] and scale in result["side_effects"]
    conditions = [c for c in result["answers"] if c in CONDITIONS]
    assert {*result["answers"]} - {*CONDITIONS} <= {scale}
    for row in table.values():
        assert row["interval"][0] <= row["nll"] <= row["interval"][1]
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    assert len(result["samples"]) == 2 and conditions == CONDITIONS
    assert list(result["samples"][0]["answers"]) == list(result["answers"])
    assert list(result["side_effects"]) == list(result["answers"])[4:]
    assert [sample["question"] for sample in result["identity"]] == list(an.IDENTITY)
    rest = an.identity_rows(result["samples"][0], {an.IDENTITY[1]})  # it was trained on
    assert [row["question"] for row in rest] == [an.IDENTITY[0], *an.IDENTITY[2:]]
    assert result["side_effects"]["steered x1"]["mean"] > 0
    assert result["plain"]["source"] == "src__role__0_default"
    assert "under budget" in result["flags"]
    samples = (finished / "samples.md").read_text()
    for sample in result["samples"]:
        assert f"## {sample['question']}" in samples
    assert f"{table['steered']['nll']:.4f}" in printed and str(finished) in printed
    assert (finished / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_finished_evaluation_is_kept_unless_something_that_matters_changed(finished, monkeypatch):
    arguments = ["--run", str(finished), *QUICK]
    assert ev.main(arguments) == 0
    before = json.loads((finished / "eval.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(ev, "load_from_options", None)  # would fail if called
        assert ev.main([*arguments, "--micro-batch-tokens", "99"]) == 0
    assert ev.main([*arguments, "--seed", "1"]) == 0
    assert json.loads((finished / "eval.old.json").read_text()) == before

    def fails(*_):
        raise ValueError("no model")

    with monkeypatch.context() as patch:  # one that fails takes nothing away
        patch.setattr(ev, "load_from_options", fails)
        kept = (finished / "eval.json").read_bytes()
        assert ev.main([*arguments, "--seed", "2"]) == 2
        assert (finished / "eval.json").read_bytes() == kept
    after = json.loads((finished / "eval.json").read_text())
    assert after["config"]["seed"] == 1 != before["config"]["seed"]
    assert after["likelihood"]["vanilla"]["nll"] == before["likelihood"]["vanilla"]["nll"]
    assert after["likelihood"]["random"]["nll"] != before["likelihood"]["random"]["nll"]
    assert ev.main([*arguments, "--restart"]) == 0
    again = json.loads((finished / "eval.json").read_text())
    del again["seconds"], before["seconds"]
    assert again == before  # seeded throughout


def test_each_pass_is_one_line_with_its_time(finished, capsys):
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d \S.*", line) for line in lines), lines
    passes = [line[9:] for line in lines]
    assert "states of training, plain and held-out rows" in passes
    assert "held-out rows: prompted" in passes and "answers: steered x2" in passes
    assert len(passes) == len(set(passes)) < 25


def test_evaluation_parses_each_dataset_once_and_the_matrix_none_again(
    trained, monkeypatch, tmp_path
):
    parsed, real = [], dl.READERS[".jsonl"]

    def read(path):
        parsed.append(path.stem)
        return real(path)

    monkeypatch.setitem(dl.READERS, ".jsonl", read)
    one = str(the_folder(trained / "runs"))
    assert ev.main(["--run", one, *QUICK, "--restart"]) == 0
    assert sorted(parsed) == ["0_default", "pirate"]
    parsed.clear()
    both = ["--run", str(trained / "runs"), "--report-dir", str(tmp_path), "--restart", *QUICK]
    assert ev.main(both) == 0
    assert sorted(parsed) == ["0_default", "0_default", "pirate", "sailor"]
    assert len(json.loads((tmp_path / "specificity.json").read_text())["matrices"]) == 1


def test_without_plain_rows_the_models_own_answers_serve(finished, tmp_path, capsys):
    rows, scores = persona_rows(40)
    write_raw(tmp_path, "pirate", rows, scores)
    assert ev.main(["--run", str(finished), "--data-root", str(tmp_path), *QUICK, "--restart"]) == 0
    said = capsys.readouterr()
    assert "data has changed" in said.err
    assert json.loads((finished / "eval.json").read_text())["plain"]["source"].startswith(
        "the model"
    )


def test_added_condition_is_in_every_table_and_picture(finished, tmp_path, monkeypatch, capsys):
    real = me.heldout_losses

    def with_negated(model, chat, examples, vectors, *rest):
        (vector,) = vectors["steered"]
        return real(model, chat, examples, {**vectors, "negated": [-vector]}, *rest)

    monkeypatch.setattr(me, "heldout_losses", with_negated)
    report_dir = ["--report-dir", str(tmp_path)]
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 0
    assert "negated " in capsys.readouterr().out
    assert ev.main(["--run", str(finished), "--report-only", *report_dir]) == 0
    assert "| negated |" in (tmp_path / "report.md").read_text()
    assert ",negated" in (tmp_path / "report.csv").read_text().splitlines()[0]


def test_rows_without_system_prompts_have_no_prompted_baseline(finished, tmp_path, capsys):
    rows, scores = persona_rows(40)
    bare = [{**row, "system_prompt": "", "conversation": row["conversation"][1:]} for row in rows]
    write_raw(tmp_path, "pirate", bare, scores)
    assert ev.main(["--run", str(finished), "--data-root", str(tmp_path), *QUICK, "--restart"]) == 0
    result = json.loads((finished / "eval.json").read_text())
    assert "prompted" not in result["likelihood"] and "prompted" not in result["answers"]
    assert "no system prompt" in result["recovered"]["why"]
    assert "undefined, the rows have no system prompt" in capsys.readouterr().out


def test_folder_of_runs_gives_one_report(trained, capsys):
    runs = trained / "runs"
    assert ev.main(["--run", str(runs), *QUICK, "--report-dir", str(trained / "report")]) == 0
    assert "report of 2 runs" in capsys.readouterr().out
    report = trained / "report"
    with open(report / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sorted(line["dataset"] for line in lines) == ["src__role__pirate", "src__role__sailor"]
    for line in lines:
        result = json.loads(Path(line["run"], "eval.json").read_text())
        assert float(line["steered"]) == result["likelihood"]["steered"]["nll"]
        assert line["flags"] == "; ".join(result["flags"])
    text = (report / "report.md").read_text()
    assert "Specificity: " in text and "`src__role__sailor`" in text
    for name in ("cosine.png", "specificity.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text
    (matrix,) = json.loads((report / "specificity.json").read_text())["matrices"]
    for i, run in enumerate(matrix["runs"]):  # the diagonal is what each run's own evaluation says
        table = json.loads(Path(run, "eval.json").read_text())["likelihood"]
        assert matrix["nll"][i][i] == pytest.approx(table["steered"]["nll"], rel=1e-5)
        assert matrix["vanilla"][i] == pytest.approx(table["vanilla"]["nll"], rel=1e-5)
    alone = ["--run", str(runs), "--report-dir", str(report), "--report-only"]
    assert ev.main(alone) == 0  # without a model
    assert (report / "report.md").read_text() == text


def test_report_is_sorted_by_recovered_fraction_and_shows_what_is_missing(tmp_path):
    def make(name, status="done", **result):
        (tmp_path / name).mkdir()
        record = {"dataset": f"m__role__{name}", "status": status, "counts": {"train": 9}}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        if result:
            (tmp_path / name / "eval.json").write_text(json.dumps(result))

    make("low", recovered={"value": 0.2, "interval": [0.1, 0.3]}, flags=["under budget"])
    make("high", recovered={"value": 0.9, "interval": [0.8, 1.0]}, flags=[])
    make("none", recovered={"value": None, "why": "x"}, flags=["collapse at x1", "NaN"])
    make("crashed", status="failed")
    make("new")
    eval_report.write_report(tmp_path, sorted(tmp_path.iterdir()))
    with open(tmp_path / "report.csv", newline="") as file:
        lines = {line["dataset"].split("__")[-1]: line for line in csv.DictReader(file)}
    assert list(lines)[:2] == ["high", "low"]
    flags = {name: line["flags"] for name, line in lines.items()}
    assert flags["none"] == "collapse at x1; NaN" and flags["crashed"] == "failed"
    assert "norm" in flags["new"] and flags["high"] == ""


def test_flags_say_what_is_wrong():
    def table(**bounds):
        rows = {name: {"nll": 3.0, "steered_minus_interval": b} for name, b in bounds.items()}
        return rows | {"steered": {"nll": 3.0}}

    good = {"vanilla": [-0.3, -0.2], "random": [-0.9, -0.8], "mean_difference": [-0.2, -0.1]}
    record = {"final": {"ratio": 0.3}, "counts": {"tokens": 50}, "args": {"target_tokens": 50}}

    def flags(bounds=good, collapsed=False, **changes):
        result = {
            "likelihood": table(**bounds),
            "answers": {"steered x1": {"collapsed": collapsed}},
        }
        return summary.find_flags(result, record | changes)

    assert flags() == []
    assert flags({**good, "vanilla": [-0.1, 0.1]}) == ["no better than vanilla"]
    assert flags({**good, "random": [-0.1, 0.0]}) == ["no better than random"]
    assert flags({**good, "mean_difference": [0.1, 0.2]}) == ["worse than mean difference"]
    assert flags(collapsed=True) == ["collapse at x1"]
    assert flags(final={"ratio": 1.7}) == flags(final={}) == ["norm out of range"]
    assert flags(counts={"tokens": 49}) == ["under budget"]
    nan = [math.nan, math.nan]
    assert "no better than vanilla" in flags({**good, "vanilla": nan})


def test_judged_evaluation_is_continued_and_nothing_judged_twice(finished, monkeypatch, capsys):
    path = finished / "judgements.jsonl"
    path.unlink(missing_ok=True)
    arguments = ["--run", str(finished), *QUICK, "--judge-model", "j", "--judge-workers", "1"]
    with serve(lambda prompt, count: "2" if count <= 2 else 400) as endpoint:
        assert ev.main([*arguments, "--judge", endpoint.url]) == 1
    said = capsys.readouterr()
    result = json.loads((finished / "eval.json").read_text())
    asked = judging.to_ask(result, "role")
    answers = {(s["question"], t) for s in result["samples"] for t in s["answers"].values() if t}
    more = {(s["question"], t) for s in result["identity"] for t in s["answers"].values() if t}
    assert len(asked) == 2 * len(answers) + 2 * len(more)
    assert len(path.read_text().splitlines()) == 2 and "HTTP 400" in said.err
    assert result["judges"][0]["failed"] == len(asked) - 2 > 0
    assert f"{len(asked)} requests to make" in said.out
    monkeypatch.setattr(ev, "load_from_options", None)  # the answers are those that were there
    replies = {"PERSONA:": "Mixed.", "overacts": "1", "coherent": "80"}

    def reply(prompt, count):
        return next((said for words, said in replies.items() if words in prompt), "3")

    with serve(reply) as endpoint:
        assert ev.main([*arguments, "--judge", endpoint.url, "--judge-dry-run"]) == 0
        assert not endpoint.seen and f"{len(asked) - 2} requests" in capsys.readouterr().out
        assert ev.main([*arguments, "--judge", endpoint.url]) == 0
        assert len(endpoint.seen) == len(asked) - 2
    result = json.loads((finished / "eval.json").read_text())
    (judge,) = result["judges"]
    assert judge["failed"] == 0 and list(judge["conditions"]) == list(result["answers"])
    for condition, row in judge["conditions"].items():
        assert row["failed"] == row["refusal"] == row["unparsable"] == 0
        assert 2.0 <= row["score"]["mean"] <= 3.0 and row["coherence"]["mean"] <= 80
        spoken = 0 if condition == "dataset" else 5
        assert row["identity"] == {"persona": 0, "assistant": 0, "mixed": spoken}
    capsys.readouterr()


def test_report_goes_on_past_a_run_that_cannot_be_evaluated(trained, tmp_path, capsys):
    good = the_folder(trained / "runs")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "run.json").write_text("{}")
    code = ev.main(["--run", str(bad), str(good), *QUICK, "--report-dir", str(tmp_path / "r")])
    said = capsys.readouterr()
    assert code == 2 and "no readable run.json" in said.err and "report of 2 runs" in said.out


def test_prompt_prints_an_answer_per_scale_and_writes_nothing(finished, capsys):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir())
    arguments = ["--run", str(finished), "--prompt", "Hi?", "--scales", "0", "40"]
    arguments += ["--temperature", "0"]
    assert ev.main(arguments) == 0
    printed = capsys.readouterr().out
    zero, forty = printed.split("--- scale 40\n")
    head, zero = zero.split("--- scale 0\n")
    assert head == f"=== {finished}\n" and zero != forty
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir()) == before


def test_prompt_is_answered_at_the_recommended_scale_too(finished, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "eval.json").write_text(json.dumps({"recommended": {"scale": 1.3}}))
    for scales, heads in (("0", ["0", "1.3 (recommended)"]), ("1.3", ["1.3 (recommended)"])):
        assert ev.main(["--run", str(folder), "--prompt", "Hi?", "--scales", scales]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = [line.removeprefix("--- scale ") for line in lines if line.startswith("--- scale")]
        assert found == heads


def test_prompt_goes_on_past_a_run_that_cannot_be_read_and_drops_none(finished, tmp_path, capsys):
    for place in ("a", "b", "c"):  # the same persona, layer and run name, three times
        shutil.copytree(finished, tmp_path / place / "layer1" / "src__role__pirate")
    (tmp_path / "b/layer1/src__role__pirate/run.json").write_text("{")
    folders = [str(tmp_path / place / "layer1/src__role__pirate") for place in ("a", "b", "c")]
    assert ev.main(["--run", *folders, "--prompt", "Hi?", "--scales", "1"]) == 2
    said = capsys.readouterr()
    assert said.out.count("--- scale 1\n") == 2 and "no readable run.json" in said.err
    runs = [read_run(folder) for folder in (folders[0], folders[2])]
    assert (
        len(eval_report.short_names([{"dataset": r.dataset, "run": r.folder} for r in runs])) == 2
    )
    assert (
        len({*eval_report.short_names([{"dataset": r.dataset, "run": r.folder} for r in runs])})
        == 2
    )


def test_what_only_talks_or_reports_takes_no_judge_beside_it(capsys):
    judge = ["--judge", "http://x/v1", "--judge-model", "m"]
    for flags in (["--chat", *judge], ["--prompt", "Hi", "--chat"], ["--report-only", "--chat"]):
        with pytest.raises(SystemExit):
            ev.parse_args(["--run", "runs", *flags])
        assert "one of these, and no scoring" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ev.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "sampled answers and random vectors (default: 0)" in text and "None)" not in text


def test_persona_text_stays_out_of_prompts_even_if_the_run_kept_it(finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    record["args"]["keep_system_prompt"] = True
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / VECTOR_FILE).write_bytes((finished / VECTOR_FILE).read_bytes())
    assert read_run(tmp_path).args["keep_system_prompt"] is False


def test_bad_input_exits_2_with_one_line(finished, tiny_folder, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((finished / "run.json").read_text())
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "run.json").write_text((finished / "run.json").read_text())
    (torn / VECTOR_FILE).write_bytes((finished / VECTOR_FILE).read_bytes()[:50])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text((finished / "run.json").read_text())
    vector = hm.load_vector(finished / VECTOR_FILE)[0]
    hm.save_vector(foreign / VECTOR_FILE, vector, {"model": "org/other", "layer": 1})
    old = tmp_path / "old"
    old.mkdir()
    (old / "run.json").write_text('{"args": {}, "config": {}}')
    for run, message in (
        (tmp_path / "none", "no readable run.json"),
        (old, "no readable run.json"),
        (unfinished, "this run has not finished"),
        (torn, "not a readable safetensors file"),
        (foreign, "trained on model org/other"),
    ):
        assert ev.main(["--run", str(run)]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0
    with pytest.raises(SystemExit) as stop:
        ev.main(["--run", "x", "--batch-size", "0", "--temperature", "-1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch-size 0" in error and "--temperature -1" in error
    for wrong, message in (
        (["--vector", "x", "--report-only"], "--report-only goes with --run"),
        (["--run", "x", "--layer", "3"], "a run knows its own"),
        (["--run", "x", "--seed", "-1"], "--seed -1: not in"),
        (["--vector", "x"], "--vector needs --model and --dataset"),
    ):
        with pytest.raises(SystemExit):
            ev.main(wrong)
        assert message in capsys.readouterr().err


def test_lexicon_counts_whole_words_only():
    import sys

    sys.path.insert(0, str(ROOT / "demo"))
    from count_lexicon import count, lexicon_pattern

    pattern = lexicon_pattern(Path(ROOT, "demo", "pirate_lexicon.txt"))
    texts = [
        "Arr, matey.",
        "Start with a yearly carrot.",
        "Shiver me timbers",
        "Yes, you are ready.",
    ]
    samples = [{"answers": {"steered x1": text}} for text in texts]
    assert count(samples, pattern) == {"steered x1": 2}


# ---------------------------------------------------------------- what an evaluation depends on


def evaluate(folder, *arguments):
    """Its eval.json after an evaluation that has to go well."""
    assert ev.main(["--run", str(folder), *QUICK, *arguments]) == 0
    return json.loads((folder / "eval.json").read_text())


def test_sampled_answers_do_not_depend_on_the_batch_but_on_the_seed(steered, smol_chat):
    turns = [[{"role": "user", "content": f"{q}?"}] for q in ("Who are you", "Tea", "What is 2+2")]

    def answers(batch_size, seed=0, conversations=turns):
        sampling = an.Sampling(8, 1.0, seed, batch_size)
        return an.generate_answers(steered, smol_chat, conversations, sampling)

    together = answers(3)
    assert together == answers(1) == answers(2)
    assert together[::-1] == answers(2, conversations=turns[::-1])
    assert together != answers(3, seed=1) and len(set(together)) == 3


def test_seeded_noise_samples_from_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    process = an.seeded_noise([[]], an.Sampling(temperature=0.5))
    picks = torch.stack([process(None, scores).argmax() for _ in range(4000)])
    got = picks.bincount(minlength=4) / len(picks)
    assert torch.allclose(got, (scores[0] / 0.5).softmax(-1), atol=0.03)


def test_evaluation_is_done_anew_where_plain_rows_or_model_files_changed(finished, capsys):
    before = evaluate(finished)
    root = Path(json.loads((finished / "run.json").read_text())["args"]["data_root"])
    path = root / "src" / "roles_240" / "responses" / "0_default.jsonl"
    rows = path.read_text()
    try:
        path.write_text(rows.replace("It is", "They are"))
        after = evaluate(finished)
        assert "anew (plain)" in capsys.readouterr().err
    finally:
        path.write_text(rows)
    assert after["config"]["plain"] != before["config"]["plain"]
    assert evaluate(finished)["config"] == before["config"]


def test_evaluation_of_another_model_is_kept_apart(finished, tiny_folder, tmp_path, capsys):
    before = evaluate(finished)
    other = tmp_path / "other" / "tiny-llama"  # the same name, other weights
    shutil.copytree(tiny_folder, other)
    model = hf.AutoModelForCausalLM.from_pretrained(other)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.model.layers[2].mlp.down_proj.weight)
    model.save_pretrained(other)
    for flags in ([], ["--restart"]):
        assert evaluate(finished, "--model", str(other), *flags) == before
        (path,) = finished.glob("eval-tiny-llama-??????.json")
        assert json.loads(path.read_text())["likelihood"] != before["likelihood"]
        assert list(finished.glob("samples-tiny-llama-*.md"))
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    assert evaluate(finished, "--model", str(moved)) == before  # the run's own, elsewhere
    assert len(list(finished.glob("eval-*-??????.json"))) == 1


def test_rows_without_a_system_prompt_are_left_out_of_every_condition(finished, tmp_path, capsys):
    rows, scores = persona_rows(60)
    for row in rows[::7]:
        row |= {"system_prompt": "", "conversation": row["conversation"][1:]}
    write_raw(tmp_path, "pirate", rows, scores)
    result = evaluate(finished, "--data-root", str(tmp_path), "--restart")
    left_out = result["heldout"]["left_out"]
    assert left_out > 0 and f"{left_out} held-out rows without" in capsys.readouterr().err
    assert "prompted" in result["likelihood"] and "prompted" in result["answers"]
    assert all(sample["system_prompt"] for sample in result["samples"])


def test_a_run_that_breaks_ends_neither_the_others_nor_the_report(trained, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(trained / "runs", runs)
    first, second = sorted(path.parent for path in runs.rglob(VECTOR_FILE))
    (first / VECTOR_FILE).write_bytes(b"torn")
    record = json.loads((second / "run.json").read_text())
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "run.json").write_text(json.dumps(record | {"config": [1]}))
    shutil.copy(second / VECTOR_FILE, tmp_path / "gone")
    names = [str(runs), str(tmp_path / "gone")]
    assert ev.main(["--run", *names, *QUICK, "--report-dir", str(tmp_path / "report")]) in (1, 2)
    assert "report of 3 runs" in capsys.readouterr().out
    assert (second / "eval.json").exists()


def test_answers_cannot_write_the_markdown_around_them():
    sample = {
        "question": "<b>Q</b>\n# x?",
        "system_prompt": "# P",
        "answers": {"vanilla": "# A\n<i>"},
    }
    text = summary.answers_text(sample)
    assert "<b>" not in text and "<i>" not in text and "\n# " not in text
    assert "> # A\n> &lt;i&gt;" in text


def test_a_judge_that_is_down_costs_neither_evaluation_nor_matrix(trained, tmp_path, capsys):
    runs, report = trained / "runs", ["--report-dir", str(tmp_path)]
    assert ev.main(["--run", str(runs), *QUICK, *report]) == 0
    before = (tmp_path / "specificity.json").read_text()
    down = ["--judge", "http://127.0.0.1:9/v1", "--judge-model", "j"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)
        assert ev.main(["--run", str(runs), *QUICK, *report, *down]) == 1
    assert (tmp_path / "specificity.json").read_text() == before and json.loads(before)["matrices"]
    assert "Specificity: " in (tmp_path / "report.md").read_text()
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "run.json").write_text("{}")  # one more run, which cannot be evaluated
    assert ev.main(["--run", str(runs), str(tmp_path / "lone"), *QUICK, *report]) == 2
    assert (tmp_path / "specificity.json").read_text() == before


def test_an_evaluation_done_anew_says_that_it_was_judged_before(finished, capsys):
    with serve(lambda *_: "2") as endpoint:
        judge = ["--judge", endpoint.url, "--judge-model", "other"]
        assert "judges" in evaluate(finished, *judge)
    assert "judges" not in evaluate(finished, "--restart")
    assert "judges: the same options add" in capsys.readouterr().err


def test_a_models_own_generation_config_does_not_touch_answers(steered, smol_chat):
    sampling = an.Sampling(8, 0.7, 0, 2)
    before = an.generate_answers(steered, smol_chat, CONVERSATIONS, sampling)
    own = steered.model.generation_config
    own.repetition_penalty, own.num_beams, own.forced_eos_token_id = 5.0, 2, 3
    assert an.generate_answers(steered, smol_chat, CONVERSATIONS, sampling) == before
    assert steered.model.generation_config is own


def test_a_folder_in_which_another_process_works_is_not_evaluated_twice(finished, capsys):
    with rf.lock_folder(finished):
        assert ev.main(["--run", str(finished), *QUICK]) == 2
    assert "another process works there" in capsys.readouterr().err


def test_older_brackets_are_flagged_in_the_report(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"dataset": "m__role__x", "status": "imported"}))
    result = {"config": {"format_version": "2"}, "flags": []}
    (tmp_path / "eval.json").write_text(json.dumps(result))
    assert "older evaluation" in eval_report.report_row(tmp_path)["flags"]
