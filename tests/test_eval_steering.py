"""eval_steering.py as a whole: what it writes, prints, refuses, keeps and does again."""

import csv
import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from conftest import (
    QUICK,
    ROOT,
    command,
    divergences_of,
    persona_rows,
    raw_row,
    serve,
    the_folder,
    write_raw,
)

import data_filter as df
import eval_steering as ev
import hook_model as hm
import train_steering as ts
from evaluation import answers as an
from evaluation import summary
from evaluation.conditions import Condition
from evaluation.likelihood import Reader, nll_under
from evaluation.report import short_names
from evaluation.rows import EvalData, questions_of
from evaluation.specificity import specificity
from evaluation.stats import mean_interval
from evaluation.table import number_at, value_at
from steering import data_layouts as dl
from steering import run_folder as rf
from steering.fast_path import FastPath, token_mean
from steering.files import read_json_lines
from steering.finished import read_run
from steering.vector_file import VECTOR_FILE


def evaluate(folder, *arguments):
    """The eval.json of a run after an evaluation that has to go well."""
    assert ev.main(["--run", str(folder), *QUICK, *arguments]) == 0
    return json.loads((folder / "eval.json").read_text())


def lines_of(path):
    """The lines of a report.csv as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- questions


def test_evaluated_questions_were_neither_trained_on_nor_chosen_by(data):
    groups = [set(questions_of(g)) for g in (data.train, data.validation, data.heldout)]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 40
    assert set(questions_of(data.plain_heldout)) == groups[2]
    assert set(questions_of(data.plain_train)) <= groups[0] | groups[1]
    data.check()


@pytest.mark.parametrize("part", ["train", "validation", "plain_train"])
def test_a_leaked_question_is_caught(data, part):
    leaky = EvalData(**vars(data))
    setattr(leaky, part, [*getattr(data, part), data.heldout[0]])
    with pytest.raises(AssertionError, match="1 held-out questions leaked"):
        leaky.check()


def test_a_split_by_row_leaks_questions_that_were_asked_under_five_prompts(
    finished, smol_chat, monkeypatch
):
    rows = []
    scores = {}
    for i in range(20):
        for p in range(5):
            rows.append(raw_row(f"Question number {i}?", f"Arr {i} {p}.", "pos", p, i))
            scores[f"pos_p{p}_q{i}"] = 3
    run = read_run(finished)
    write_raw(Path(run.args["data_root"]), "five", rows, scores)
    run.dataset = "src__role__five"
    run.record["questions"] = {}  # those that are there are of the other dataset
    ev.load_data(run, smol_chat, 20_000).check()

    def by_row(items, fraction, seed, salt="heldout"):
        parts = ([], [])
        for i, item in enumerate(items):
            parts[df.hash_unit(salt, seed, i) < fraction].append(item)
        return parts

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
        assert {*record["questions"][name]} == {sha(q) for q in questions_of(rows)}
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


# ---------------------------------------------------------------- what it writes


def test_whole_script_writes_numbers_samples_and_a_picture(finished, capsys):
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    scale = result["recommended"]["scale"]
    use = f"steered x{scale:g}"

    conditions = list(result["conditions"])
    first = ["dataset", "vanilla", "prompted", "few_shot", "random", "mean_difference"]
    assert conditions[: len(first)] == first
    steered = [name for name in conditions if name.startswith("steered x")]
    assert conditions == first + steered
    assert {"steered x1", "steered x2", use} <= {*steered}
    assert [value_at(result, name, "scale") for name in steered] == sorted(
        float(name.removeprefix("steered x")) for name in steered
    )

    # Every condition is scored, but for the dataset's own answers; random vectors do not answer.
    for name in conditions:
        nll = value_at(result, name, "nll")
        assert (nll is None) == (name == "dataset")
        if nll:
            assert nll["low"] <= nll["mean"] <= nll["high"]
            perplexity = number_at(result, name, "perplexity")
            assert perplexity == pytest.approx(math.exp(nll["mean"]))
    answered = [name for name in conditions if value_at(result, name, "words") is not None]
    assert {*first} - {*answered} == {"random"}
    assert {"steered x1", "steered x2", use} <= {*answered}
    for sample in [*result["samples"], *result["identity"]]:
        assert [name for name in answered if name in sample["answers"]] == list(sample["answers"])
    assert len(result["samples"]) == 2
    assert [sample["question"] for sample in result["identity"]] == list(an.IDENTITY)
    with_kl = [name for name in conditions if value_at(result, name, "kl")]
    assert with_kl == [name for name in answered if name not in first[:4]]
    assert number_at(result, "steered x1", "kl") > 0

    assert result["plain"]["source"] == "src__role__0_default"
    assert "under budget" in result["flags"]
    samples = (finished / "samples.md").read_text()
    for sample in result["samples"]:
        assert f"## {sample['question']}" in samples
    for name in answered:
        assert f"\n{name} " in printed
        assert f"\n{name} " in samples
    assert f"{number_at(result, 'steered x1', 'nll'):.4f}" in printed
    assert str(finished) in printed
    assert (finished / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_of_the_rows_and_vectors_that_they_name(
    finished, data, tiny_folder, smol_chat, monkeypatch
):
    yardsticks = []
    real = ev.measures.answer_columns

    def columns(reader, rows, texts, probe, yardstick):
        assert texts["dataset"] == [row["messages"][-1]["content"] for row in rows]
        yardsticks.append(yardstick)
        return real(reader, rows, texts, probe, yardstick)

    monkeypatch.setattr(ev.measures, "answer_columns", columns)
    result = evaluate(finished, "--restart")
    assert yardsticks == [number_at(result, "vanilla", "perplexity")]

    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    vector = read_run(finished).vector
    fast = FastPath(model)
    nll = nll_under(fast, data.heldout, 60)
    assert number_at(result, "steered x2", "nll") == pytest.approx(nll(2 * vector), rel=1e-5)
    assert number_at(result, "vanilla", "nll") == pytest.approx(nll(0 * vector), rel=1e-5)
    model.set_vector(2 * vector)
    kl = token_mean(divergences_of(fast), data.plain_heldout, 60)
    assert number_at(result, "steered x2", "kl") == pytest.approx(kl, rel=1e-3)
    wrong = token_mean(divergences_of(fast), data.heldout, 60)
    assert wrong != pytest.approx(kl, rel=1e-2)

    reader = Reader(model, smol_chat, 60)
    difference, *_ = ev.compare_states(reader, data)
    best = result["coefficients"]["mean_difference"]["chosen"]
    assert best != 1.0
    expected = nll(best * difference)
    assert number_at(result, "mean_difference", "nll") == pytest.approx(expected, rel=1e-6)

    for i, sample in enumerate(result["samples"]):
        assert sample["question"] == data.heldout[i].row["question"]
    written = {}
    for line in read_json_lines(finished.parent.parent / "kept_answers.jsonl"):
        if len(line["turns"]) == 1:
            written[line["turns"][0]["content"]] = line["answer"]
    for sample in [*result["samples"], *result["identity"]]:
        assert sample["answers"]["vanilla"] == written[sample["question"]]
    assert len({*written.values()}) > 2


def test_identity_questions_that_were_trained_on_are_not_asked(data):
    rows = an.identity_rows(data.heldout[0].row, {an.IDENTITY[1]})
    assert [row["question"] for row in rows] == [an.IDENTITY[0], *an.IDENTITY[2:]]


def test_an_added_condition_and_an_added_measure_are_in_every_output(
    finished, tmp_path, monkeypatch, capsys
):
    real = ev.list_conditions

    def with_half(data, vector, *rest):
        conditions, missing = real(data, vector, *rest)
        return [*conditions, Condition("half", (vector / 2,))], missing

    monkeypatch.setattr(ev, "list_conditions", with_half)
    letters = ev.measures.Measure("letters", "answers", "{:.1f} abc", of_answer=len)
    monkeypatch.setattr(ev.measures, "MEASURES", [*ev.measures.MEASURES, letters])
    result = evaluate(finished, "--restart")
    said = capsys.readouterr().out
    assert ev.main(["--run", str(finished), "--report-only", "--report-dir", str(tmp_path)]) == 0
    samples = (finished / "samples.md").read_text()
    page = (tmp_path / "report.html").read_text()
    for text in (said, samples, page):
        assert "half" in text
        assert "letters" in text
    found = number_at(result, "half", "letters")
    assert f"{found:.1f} abc" in said
    (line,) = [line for line in lines_of(tmp_path / "report.csv") if line["condition"] == "half"]
    assert float(line["letters"]) == found
    assert float(line["nll"]) == number_at(result, "half", "nll")


def test_without_plain_rows_the_models_own_answers_serve(finished, tmp_path, capsys):
    rows, scores = persona_rows(40)
    write_raw(tmp_path, "pirate", rows, scores)
    result = evaluate(finished, "--data-root", str(tmp_path), "--restart")
    assert "data has changed" in capsys.readouterr().err
    assert result["plain"]["source"] == "the model's own answers"


def test_rows_without_system_prompts_have_no_prompted_baseline(finished, tmp_path, capsys):
    rows, scores = persona_rows(40)
    bare = [{**row, "system_prompt": "", "conversation": row["conversation"][1:]} for row in rows]
    write_raw(tmp_path, "pirate", bare, scores)
    result = evaluate(finished, "--data-root", str(tmp_path), "--restart")
    assert "prompted" not in result["conditions"]
    said = capsys.readouterr().out
    assert "no prompted: the rows have no system prompt" in said
    assert "recovered is undefined: there is no prompted condition" in said


def test_rows_without_a_system_prompt_are_left_out_of_every_condition(finished, tmp_path, capsys):
    rows, scores = persona_rows(60)
    for row in rows[::7]:
        row |= {"system_prompt": "", "conversation": row["conversation"][1:]}
    write_raw(tmp_path, "pirate", rows, scores)
    result = evaluate(finished, "--data-root", str(tmp_path), "--restart")
    left_out = result["heldout"]["left_out"]
    assert left_out > 0
    assert f"{left_out} held-out rows without" in capsys.readouterr().err
    assert number_at(result, "prompted", "nll")
    assert all(sample["system_prompt"] for sample in result["samples"])


def test_flags_say_what_is_wrong():
    good = {"vanilla": -0.3, "random": -0.9, "mean_difference": -0.2}
    record = {"final": {"ratio": 0.3}, "counts": {"tokens": 50}, "args": {"target_tokens": 50}}

    def flags(record=record, **minus):
        conditions = {"steered x1": {"nll": {"mean": minus.pop("nll", 3.0)}, "scale": 1.0}}
        conditions["steered x1"]["collapsed"] = minus.pop("collapsed", False)
        few = minus.pop("questions", 20)
        for name, mean in (good | minus).items():
            spread = [mean - 0.01 * sign for sign in (-1, 1)] * (few // 2)
            conditions[name] = {"steered_minus": mean_interval(spread, list(range(few)))}
        result = {"conditions": conditions, "samples": [1], "recommended": {"scale": 1.0}}
        return summary.find_flags(result | {"heldout": {"questions": few}}, record)

    assert flags() == []
    assert flags(vanilla=0.0) == ["no better than vanilla"]
    assert flags(random=0.1) == ["no better than random"]
    assert flags(mean_difference=0.1) == ["worse than mean difference"]
    assert flags(nll=math.nan) == ["NaN"]
    assert flags(collapsed=True) == ["collapse at x1"]
    assert flags(questions=4) == ["only 4 held-out questions"]
    assert flags({**record, "final": {"ratio": 1.5}}) == ["norm out of range"]
    assert flags({**record, "counts": {"tokens": 49}}) == ["under budget"]
    assert flags({"status": "imported"}) == []


# ---------------------------------------------------------------- what is done again


def test_a_finished_evaluation_is_done_anew_only_if_something_that_matters_changed(
    finished, monkeypatch
):
    before = evaluate(finished, "--restart")
    with monkeypatch.context() as patch:
        patch.setattr(ev, "load_from_options", None)  # would fail if called
        assert evaluate(finished, "--micro-batch-tokens", "99") == before

    after = evaluate(finished, "--seed", "1")
    assert after["config"]["seed"] == 1
    assert number_at(after, "vanilla", "nll") == number_at(before, "vanilla", "nll")
    assert number_at(after, "random", "nll") != number_at(before, "random", "nll")

    def fails(*_):
        raise ValueError("no model")

    with monkeypatch.context() as patch:  # one that fails takes nothing away
        patch.setattr(ev, "load_from_options", fails)
        kept = (finished / "eval.json").read_bytes()
        assert ev.main(["--run", str(finished), *QUICK, "--seed", "2"]) == 2
        assert (finished / "eval.json").read_bytes() == kept

    again = evaluate(finished, "--restart")
    del again["seconds"], before["seconds"]
    assert again == before  # seeded throughout


def test_an_evaluation_is_done_anew_after_a_stop_token_was_added(
    finished, tiny_folder, tmp_path, monkeypatch
):
    copy = shutil.copytree(tiny_folder, tmp_path / "tiny-llama")
    before = evaluate(finished)

    def fails(*_):
        raise ValueError("no model")

    monkeypatch.setattr(ev, "load_from_options", fails)
    assert evaluate(finished, "--model", str(copy)) == before
    settings = copy / "generation_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"eos_token_id": [values["eos_token_id"], 9]}))
    assert ev.main(["--run", str(finished), *QUICK, "--model", str(copy)]) == 2


def test_an_evaluation_by_another_version_is_done_anew(finished):
    result = evaluate(finished)
    path = finished / "eval.json"
    path.write_text(json.dumps({"config": result["config"], "likelihood": {}}))
    again = evaluate(finished)
    assert again["conditions"] == result["conditions"]


def test_each_pass_is_one_line_with_its_time(finished, capsys):
    assert ev.main(["--run", str(finished), *QUICK, "--restart"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d \S.*", line) for line in lines), lines
    passes = [line[9:] for line in lines]
    assert "states of training, plain and held-out rows" in passes
    assert {"held-out rows: prompted", f"evaluating {finished}"} <= {*passes}
    # The scales to try, and all conditions, of which the plain model's answers are kept.
    assert [line for line in passes if line.startswith("writing ")] == [
        "writing 8 answers, 8 at once", "writing 28 answers, 28 at once",
    ]  # fmt: skip
    assert len(passes) == len(set(passes)) < 25


def test_runs_side_by_side_are_evaluated_as_each_alone(trained, capsys):
    folders = sorted(
        path.parent for path in (trained / "runs").rglob("steering_vector.safetensors")
    )
    alone = [evaluate(folder, "--restart") for folder in folders]
    capsys.readouterr()
    assert ev.main(["--run", *map(str, folders), *QUICK, "--restart"]) == 0
    said = capsys.readouterr().err
    assert said.count("writing ") == 2  # of both runs together
    for folder, before in zip(folders, alone, strict=True):
        after = json.loads((folder / "eval.json").read_text())
        for key in before.keys() - {"seconds", "conditions", "coefficients", "probe", "norms"}:
            assert after[key] == before[key], key
        for condition, row in before["conditions"].items():
            for measure in row:
                numbers = [number_at(r, condition, measure) for r in (before, after)]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-4), (condition, measure)


def test_rows_without_the_persona_run_through_the_lower_layers_once_for_all_runs(
    trained, smol_chat, monkeypatch
):
    seen = []
    real = FastPath._layer_outputs

    def layer_outputs(self, input_ids, *more):
        seen.extend(map(smol_chat.decode, input_ids.tolist()))
        return real(self, input_ids, *more)

    monkeypatch.setattr(FastPath, "_layer_outputs", layer_outputs)
    folders = sorted(path.parent for path in (trained / "runs").rglob(VECTOR_FILE))
    assert ev.main(["--run", *map(str, folders), *QUICK, "--restart"]) == 0
    times = [sum(f"It is {i}." in text for text in seen) for i in range(40)]
    assert max(times) == 1 and sum(times) > 30  # The token budget leaves a few out.


def test_a_run_that_fails_does_not_stop_those_beside_it(trained, tmp_path, capsys):
    runs = shutil.copytree(trained / "runs", tmp_path / "runs")
    good, bad = sorted(path.parent for path in runs.rglob("steering_vector.safetensors"))
    for path in runs.rglob("eval.json"):
        path.unlink()
    record = json.loads((bad / "run.json").read_text())
    record["args"]["data_root"] = "/nowhere"
    (bad / "run.json").write_text(json.dumps(record))
    assert ev.main(["--run", str(runs), *QUICK]) == 2
    assert "/nowhere: no such folder" in capsys.readouterr().err
    assert (good / "eval.json").exists() and not (bad / "eval.json").exists()


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
        assert json.loads(path.read_text())["conditions"] != before["conditions"]
        assert list(finished.glob("samples-tiny-llama-*.md"))
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    assert evaluate(finished, "--model", str(moved)) == before  # the run's own, elsewhere
    assert len(list(finished.glob("eval-*-??????.json"))) == 1


def test_an_evaluation_done_anew_says_that_it_was_judged_before(finished, capsys):
    with serve(lambda *_: "2") as endpoint:
        judge = ["--judge", endpoint.url, "--judge-model", "other"]
        assert "judges" in evaluate(finished, *judge)
    assert "judges" not in evaluate(finished, "--restart")
    assert "judges: the same options add" in capsys.readouterr().err


def test_a_folder_in_which_another_process_works_is_not_evaluated_twice(finished, capsys):
    with rf.lock_folder(finished):
        assert ev.main(["--run", str(finished), *QUICK]) == 2
        assert "another process works there" in capsys.readouterr().err
        # Of several, it is in good hands.
        sailor = finished.with_name("src__role__sailor")
        (sailor / "eval.json").unlink(missing_ok=True)
        assert ev.main(["--run", str(finished), str(sailor), *QUICK]) == 0
    assert "another process works there" in capsys.readouterr().err
    assert (sailor / "eval.json").exists()


def test_vectors_of_other_splits_by_question_do_not_meet_each_others_rows():
    def run(name, split_seed):
        args = {"model": "m", "layer": 1, "split_seed": split_seed, "heldout_fraction": 0.2}
        dataset = f"m__role__{name}"
        return SimpleNamespace(folder=name, dataset=dataset, args=args, vector=torch.ones(2))

    runs = [run("a", 0), run("b", 1), run("c", 0)]
    (matrix,) = specificity(runs, 9, lambda run, vectors: [1.0] * len(vectors))
    assert matrix["runs"] == matrix["names"] == ["a", "c"]
    assert not specificity(runs, 0, None) and not specificity(runs, 1, None)


def test_runs_are_found_below_one_that_has_not_finished(tmp_path):
    for name in ("pirate", "pirate/seed0", "pirate/seed1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    assert rf.find_runs([tmp_path / "pirate"]) == [tmp_path / "pirate"]  # what is wrong is said
    (tmp_path / "pirate" / "seed1" / VECTOR_FILE).touch()
    assert rf.find_runs([tmp_path / "pirate"]) == [tmp_path / "pirate" / "seed1"]
    (tmp_path / "pirate" / VECTOR_FILE).touch()
    assert rf.find_runs([tmp_path / "pirate"]) == [tmp_path / "pirate"]


def test_persona_text_stays_out_of_prompts_even_if_the_run_kept_it(finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    record["args"]["keep_system_prompt"] = True
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / VECTOR_FILE).write_bytes((finished / VECTOR_FILE).read_bytes())
    assert read_run(tmp_path).args["keep_system_prompt"] is False


# ---------------------------------------------------------------- the judge


def test_a_judged_evaluation_is_continued_and_nothing_is_judged_twice(
    finished, monkeypatch, capsys
):
    evaluate(finished)
    for path in finished.glob("judgements.jsonl"):
        path.unlink()
    monkeypatch.setattr(ev, "load_from_options", None)  # the answers are those that are there
    judge = ["--judge-model", "j", "--judge-workers", "1", "--judge"]

    def some(prompt, count):
        if "number 1" in prompt or count <= 4:
            return "2"
        return 400

    def persona(prompt, count):
        return "PERSONA" if "PERSONA:" in prompt else "1"

    replies = [some]
    with serve(lambda *about: replies[-1](*about)) as endpoint:
        assert ev.main(["--run", str(finished), *QUICK, *judge, endpoint.url]) == 1
        said = capsys.readouterr()
        assert "HTTP 400" in said.err
        asked = int(re.search(r"(\d+) requests", said.out)[1])
        judged = len((finished / "judgements.jsonl").read_text().splitlines())
        result = json.loads((finished / "eval.json").read_text())
        assert result["judges"][0]["failed"] == asked - judged > 0

        endpoint.seen.clear()
        dry = [*judge, endpoint.url, "--judge-dry-run"]
        assert ev.main(["--run", str(finished), *QUICK, *dry]) == 0
        assert not endpoint.seen
        assert f"{asked - judged} requests" in capsys.readouterr().out

        replies.append(persona)
        result = evaluate(finished, *judge, endpoint.url)
    assert result["judges"][0]["failed"] == 0
    assert 1.0 <= number_at(result, "vanilla", "judge_persona") <= 2.0
    assert number_at(result, "steered x1", "judge_identity") == 1.0
    assert value_at(result, "dataset", "judge_identity") is None
    assert "judge j " in capsys.readouterr().out


# ---------------------------------------------------------------- many runs


def test_folder_of_runs_gives_one_report(trained, tmp_path, capsys):
    runs = trained / "runs"
    assert ev.main(["--run", str(runs), *QUICK, "--report-dir", str(tmp_path)]) == 0
    assert "report of 2 runs" in capsys.readouterr().out
    lines = lines_of(tmp_path / "report.csv")
    assert {line["dataset"] for line in lines} == {"src__role__pirate", "src__role__sailor"}
    for line in lines:
        result = json.loads(Path(line["run"], "eval.json").read_text())
        if line["nll"]:
            assert float(line["nll"]) == number_at(result, line["condition"], "nll")
        assert line["flags"] == "; ".join(result["flags"])

    (matrix,) = json.loads((tmp_path / "specificity.json").read_text())["matrices"]
    for i, run in enumerate(matrix["runs"]):  # the diagonal is what each run's own evaluation says
        result = json.loads(Path(run, "eval.json").read_text())
        steered = number_at(result, "steered x1", "nll")
        assert matrix["nll"][i][i] == pytest.approx(steered, rel=1e-5)
        assert matrix["vanilla"][i] == pytest.approx(number_at(result, "vanilla", "nll"), rel=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert "Specificity" in page
    alone = ["--run", str(runs), "--report-dir", str(tmp_path), "--report-only"]
    assert ev.main(alone) == 0  # without a model
    assert (tmp_path / "report.html").read_text() == page


def test_personas_at_several_layers_are_read_by_one_probe_and_compared(
    trained, tiny_folder, tmp_path, monkeypatch, capsys
):
    runs = tmp_path / "runs"
    arguments = command(str(trained / "data"), tiny_folder, runs, "--init-scale", "0.5")
    datasets = ["src__role__pirate", "src__role__sailor"]
    assert ts.main([*arguments, "--dataset", *datasets, "--layer", "1", "2"]) == 0
    assert ev.main(["--run", str(runs), *QUICK, "--probe-layer", "4"]) == 2
    assert "--probe-layer 4 is out of range" in capsys.readouterr().err

    read = []
    real = FastPath.plain_states

    def plain_states(self, examples, layer=None):
        read.extend((layer, tuple(example.input_ids)) for example in examples if layer == 3)
        return real(self, examples, layer)

    monkeypatch.setattr(FastPath, "plain_states", plain_states)
    flags = [*QUICK, "--probe-layer", "3", "--num-samples", "0"]
    assert ev.main(["--run", str(runs), *flags]) == 0
    assert read and len(read) == len({*read})  # each row once for all layers

    flags = [*QUICK, "--probe-layer", "3", "--kl-budget", "0.001"]  # which tiny vectors can spend
    assert ev.main(["--run", str(runs), *flags]) == 0
    said = capsys.readouterr().out
    assert f"Layers of {tiny_folder}, 2 personas" in said
    assert "persona by probe at layer 3, KL budget 0.001" in said
    assert said.count("(no interval of less than 4 personas)") == 2  # in persona, in NLL
    aurocs = set()
    for path in runs.rglob("eval.json"):
        result = json.loads(path.read_text())
        aurocs.add((result["dataset"], result["probe"]["auroc"]))
        largest = result["recommended"]["largest"]
        assert number_at(result, f"steered x{largest:g}", "probe") is not None
    assert len(aurocs) == 2  # the probe of a persona is the same one at each layer


def test_a_judge_that_is_down_costs_neither_evaluation_nor_matrix(trained, tmp_path, monkeypatch):
    runs = ["--run", str(trained / "runs"), *QUICK, "--report-dir", str(tmp_path)]
    assert ev.main(runs) == 0
    before = (tmp_path / "specificity.json").read_text()
    assert json.loads(before)["matrices"]
    monkeypatch.setattr(time, "sleep", lambda _: None)
    down = ["--judge", "http://127.0.0.1:9/v1", "--judge-model", "j"]
    assert ev.main([*runs, *down]) == 1
    assert (tmp_path / "specificity.json").read_text() == before
    assert "Specificity" in (tmp_path / "report.html").read_text()


def test_a_run_that_breaks_ends_neither_the_others_nor_the_report(trained, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(trained / "runs", runs)
    first, second = sorted(path.parent for path in runs.rglob(VECTOR_FILE))
    (first / VECTOR_FILE).write_bytes(b"torn")
    for path in second.glob("eval*"):
        path.unlink()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{}")
    names = [str(runs), str(tmp_path / "bad")]
    assert ev.main(["--run", *names, *QUICK, "--report-dir", str(tmp_path / "report")]) == 2
    said = capsys.readouterr()
    assert "no readable run.json" in said.err
    assert "report of 3 runs" in said.out
    assert (second / "eval.json").exists()


# ---------------------------------------------------------------- answers alone, and bad input


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
    folders = []
    for place in ("a", "b", "c"):  # the same persona, layer and run name, three times
        folders.append(tmp_path / place / "layer1" / "src__role__pirate")
        shutil.copytree(finished, folders[-1])
    (folders[1] / "run.json").write_text("{")
    assert ev.main(["--run", *map(str, folders), "--prompt", "Hi?", "--scales", "1"]) == 2
    said = capsys.readouterr()
    assert said.out.count("--- scale 1\n") == 2
    assert "no readable run.json" in said.err
    rows = [{"dataset": "src__role__pirate", "run": folder} for folder in folders]
    assert len({*short_names(rows)}) == 3


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


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "no readable run.json"),
        ("old", "no readable run.json"),
        ("unfinished", "this run has not finished"),
        ("torn", "not a readable safetensors file"),
        ("foreign", "trained on model org/other"),
    ],
)
def test_a_run_that_cannot_be_used_exits_2_with_one_line(finished, tmp_path, capsys, name, message):
    folder = tmp_path / "run"
    if name != "none":
        folder.mkdir()
        shutil.copy(finished / "run.json", folder)
    if name == "old":
        (folder / "run.json").write_text('{"args": {}, "config": {}}')
    if name == "torn":
        (folder / VECTOR_FILE).write_bytes((finished / VECTOR_FILE).read_bytes()[:50])
    if name == "foreign":
        vector = hm.load_vector(finished / VECTOR_FILE)[0]
        hm.save_vector(folder / VECTOR_FILE, vector, {"model": "org/other", "layer": 1})
    assert ev.main(["--run", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    "arguments, messages",
    [
        (
            ["--run", "x", "--batch-size", "0", "--temperature", "-1"],
            ["--batch-size 0", "--temperature -1"],
        ),
        (["--vector", "x", "--report-only"], ["--report-only goes with --run"]),
        (["--run", "x", "--layer", "3"], ["a run knows its own"]),
        (["--run", "x", "--seed", "-1"], ["--seed -1: not in"]),
        (["--vector", "x"], ["--vector needs --model and --dataset"]),
    ],
)
def test_bad_options_are_reported_all_at_once(arguments, messages, capsys):
    with pytest.raises(SystemExit) as stop:
        ev.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for message in messages:
        assert message in error


def test_lexicon_counts_whole_words_only(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    from count_lexicon import count, lexicon_pattern

    pattern = lexicon_pattern(Path(ROOT, "demo", "pirate_lexicon.txt"))
    texts = ["Arr, matey.", "Start with a yearly carrot.", "Shiver me timbers", "You are ready."]
    samples = [{"answers": {"steered x1": text}} for text in texts]
    assert count(samples, pattern) == {"steered x1": 2}
