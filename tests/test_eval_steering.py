"""eval_steering.py: each condition is what it says it is, answers are cut at their prompts."""

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, persona_rows, write_raw
from test_train_steering import command, restore_signal_handlers, the_folder  # noqa: F401

import data_layouts as dl
import eval_steering as ev
import hook_model as hm
import train_steering as ts

SETTINGS = argparse.Namespace(max_new_tokens=12, temperature=0.0, seed=0, batch_size=3)
QUESTIONS = ["Hi?", "What is the longest river that you have ever sailed on, captain?", "Why?"]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """The run folder of a finished tiny run."""
    root = tmp_path_factory.mktemp("eval")
    rows, scores = persona_rows()
    write_raw(root / "data", "pirate", rows, scores)
    write_raw(root / "data", "sailor", rows, scores)
    arguments = command(str(root / "data"), tiny_folder, root / "runs", "--init-scale", "0.5")
    assert ts.main(arguments) == 0
    return the_folder(root / "runs")


@pytest.fixture
def steered(tiny_folder):
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    model.set_vector(torch.randn(32, generator=torch.Generator().manual_seed(0)), 5.0)
    return model


def test_greedy_answers_equal_the_argmax_of_the_steered_forward(steered, smol_chat):
    steered.model.generation_config.repetition_penalty = 5.0  # a model's own, which must not act
    answers = ev.generate_answers(steered, smol_chat, CONVERSATIONS, SETTINGS)
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        ids = smol_chat.tokenize([smol_chat.prompt_text(messages)])[0]
        start = len(ids)
        for _ in range(12):  # token by token, no cache, no padding
            with torch.no_grad():
                token = steered(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == smol_chat.end_of_turn_id:
                break
            ids.append(token)
        expected = smol_chat.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert answer == expected
    with steered.steering_off():
        assert ev.generate_answers(steered, smol_chat, CONVERSATIONS, SETTINGS) != answers


def test_answers_hold_no_prompt_text_and_stop_at_the_end_of_turn(smol, smol_chat):
    model = hm.load_model(smol, 12, device="cpu")
    settings = argparse.Namespace(**{**vars(SETTINGS), "max_new_tokens": 40})
    conversations = [[{"role": "user", "content": "Say only the word yes."}], CONVERSATIONS[1]]
    short, long = ev.generate_answers(model, smol_chat, conversations, settings)
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
        settings = argparse.Namespace(**{**vars(SETTINGS), "temperature": 1.0, "seed": seed})
        return ev.generate_answers(steered, smol_chat, CONVERSATIONS, settings)

    assert sample(0) == sample(0) != sample(1)


def test_likelihoods_are_of_the_conditions_they_name(finished, tiny_folder, smol_chat):
    args, record, vector = ev.read_run(finished)
    examples, _ = ev.heldout_examples(record["dataset"], smol_chat, args, 20_000)
    model = hm.load_model(tiny_folder, 1, dtype="fp32", device="cpu")
    model.set_vector(vector)
    result = ev.likelihood(model, smol_chat, examples, max_tokens=60)
    # The reference: the model's own loss, row by row, on text that the template renders whole.
    tokenizer, plain = smol_chat.tokenizer, model.model
    nll = dict.fromkeys(("vanilla", "prompted", "steered"), 0.0)
    tokens = 0
    for example in examples:
        question, answer = example.row["messages"]
        system = {"role": "system", "content": "Be a pirate."}
        for condition, messages in (
            ("vanilla", [question, answer]),
            ("prompted", [system, question, answer]),
            ("steered", [question, answer]),
        ):
            ids = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
            ids = torch.tensor([tokenizer(ids, add_special_tokens=False)["input_ids"]])
            count = len(smol_chat.tokenize([answer["content"] + "<|im_end|>"])[0])
            labels = ids.clone()
            labels[:, :-count] = -100
            off = model.steering_off() if condition != "steered" else torch.no_grad()
            with off, torch.no_grad():
                nll[condition] += plain(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    for condition, total in nll.items():
        assert result[condition]["nll"] == pytest.approx(total / tokens, rel=1e-4)
        assert result[condition]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert len({round(values["nll"], 6) for values in result.values()}) == 3


def test_evaluated_questions_were_not_trained_on(finished, smol_chat):
    args, record, _ = ev.read_run(finished)
    examples, _ = ev.heldout_examples(record["dataset"], smol_chat, args, 20_000)
    datasets = dl.find_datasets(args.data_root)
    train_set, val_set, _ = ts.prepare(record["dataset"], datasets, smol_chat, args)
    groups = [{e.row["question"] for e in part} for part in (train_set, val_set, examples)]
    assert all(groups)
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20


def test_whole_script_writes_json_and_samples(finished, capsys):
    assert ev.main(["--run", str(finished), "--num-samples", "2", "--scales", "1", "2"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((finished / "eval.json").read_text())
    assert set(result["likelihood"]) == {"vanilla", "prompted", "steered"}
    assert len(result["samples"]) == 2
    conditions = ["vanilla", "prompted", "steered x1", "steered x2"]
    assert list(result["samples"][0]["answers"]) == conditions
    samples = (finished / "samples.md").read_text()
    for sample in result["samples"]:
        assert f"## {sample['question']}" in samples
    assert f"{result['likelihood']['steered']['nll']:.4f}" in printed and str(finished) in printed


def test_prompt_prints_an_answer_per_scale_and_writes_nothing(finished, capsys):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir())
    arguments = [
        "--run",
        str(finished),
        "--prompt",
        "Hi?",
        "--scales",
        "0",
        "40",
        "--temperature",
        "0",
    ]
    assert ev.main(arguments) == 0
    printed = capsys.readouterr().out
    zero, forty = printed.split("--- scale 40\n")
    assert zero.startswith("--- scale 0\n") and zero.removeprefix("--- scale 0\n") != forty
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir()) == before


def test_persona_text_stays_out_of_prompts_even_if_the_run_kept_it(finished, tmp_path):
    record = json.loads((finished / "run.json").read_text())
    record["args"]["keep_system_prompt"] = True
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / ev.VECTOR_FILE).write_bytes((finished / ev.VECTOR_FILE).read_bytes())
    assert ev.read_run(tmp_path)[0].keep_system_prompt is False


def test_vector_snippet_of_the_readme_runs(finished, tiny_folder, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = code.replace("Qwen/Qwen3-32B", tiny_folder).replace("layer=22", "layer=1, dtype='fp32'")
    exec(code.replace("RUN_DIR", str(finished)), {})
    assert capsys.readouterr().out.strip()


def test_bad_input_exits_2_with_one_line(finished, tiny_folder, tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((finished / "run.json").read_text())
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "run.json").write_text((finished / "run.json").read_text())
    (torn / ev.VECTOR_FILE).write_bytes((finished / ev.VECTOR_FILE).read_bytes()[:50])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.json").write_text((finished / "run.json").read_text())
    vector = hm.load_vector(finished / ev.VECTOR_FILE)[0]
    hm.save_vector(foreign / ev.VECTOR_FILE, vector, {"model": "org/other", "layer": 1})
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
