"""Runs that older code left behind stay what they were: done, evaluated, exported; or are refused.

tests/old_runs/ was written by the code before the folders steering/ and evaluation/ existed: one
run finished and evaluated, one stopped by a signal. Its data and model are made again here.
"""

import json
import shutil

import pytest
import torch
from conftest import ROOT, persona_rows, raw_row, write_raw
from test_train_steering import restore_signal_handlers  # noqa: F401

import eval_steering as ev
import export_vector as ex
import hook_model as hm
import train_steering as ts
from steering import run_state as rs
from steering.vector_file import VECTOR_FILE, load_vector, write_json

PIRATE = "runs/tiny-llama-833766/layer1/src__role__pirate"
SAILOR = "runs/tiny-llama-833766/layer1/src__role__sailor"
QUICK = ["--num-samples", "2", "--max-new-tokens", "6", "--scales", "1", "2"]


@pytest.fixture
def old(tiny_folder, tmp_path, monkeypatch):
    """The working directory in which those runs were made."""
    rows, scores = persona_rows(40)
    write_raw(tmp_path / "data", "pirate", rows, scores)
    write_raw(tmp_path / "data", "sailor", rows[::-1], scores)
    plain = [raw_row(f"Question number {i}?", f"It is {i}.", "default", 0, i) for i in range(40)]
    write_raw(tmp_path / "data", "0_default", plain, None)
    (tmp_path / "tiny-llama").symlink_to(tiny_folder)
    shutil.copytree(ROOT / "tests" / "old_runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(folder):
    """The command that made an old run."""
    return json.loads((folder / "run.json").read_text())["command"][1:]


def edit(path, change):
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_old_finished_run_is_done_evaluated_and_exported(old, monkeypatch, capsys):
    before = (old / PIRATE / VECTOR_FILE).read_bytes()
    assert ts.main(command(old / PIRATE)) == 0
    said = capsys.readouterr().out
    assert "done already" in said and "WARNING" not in said
    assert ex.main([PIRATE, "--format", "all", "--out", "out", "--any-model"]) == 0
    assert torch.equal(
        load_vector(old / "out" / VECTOR_FILE)[0], load_vector(PIRATE + "/" + VECTOR_FILE)[0]
    )
    assert "eval.json left out" in capsys.readouterr().out  # by a version whose brackets were wrong
    kept = json.loads((old / PIRATE / "eval.json").read_text())["likelihood"]
    assert ev.main(["--run", PIRATE, *QUICK]) == 0
    assert "an older version recommended no scale" in capsys.readouterr().err  # why it is done anew
    anew = json.loads((old / PIRATE / "eval.json").read_text())["likelihood"]
    for condition, row in kept.items():
        assert anew[condition]["nll"] == pytest.approx(row["nll"], abs=2e-3)
    assert json.loads((old / PIRATE / "eval.old.json").read_text())["likelihood"] == kept
    with monkeypatch.context() as patch:
        patch.setattr(hm, "load_model", None)  # the new one is kept
        assert ev.main(["--run", PIRATE, *QUICK]) == 0
    assert ev.main(["--run", "runs", "--report-only"]) == 0
    assert (old / PIRATE / VECTOR_FILE).read_bytes() == before


def test_option_that_an_old_run_lacks_has_its_default(old, monkeypatch, capsys):
    lacking = ("max_length", "include_missing_scores", "split_seed", "device_map", "warmup_ratio")

    def forget(record):
        for key in lacking:
            record["args"].pop(key, None), record["config"].pop(key, None)

    edit(old / PIRATE / "run.json", forget)
    assert ts.main(command(old / PIRATE)) == 0 and "done already" in capsys.readouterr().out
    assert ts.main([*command(old / PIRATE), "--warmup-ratio", "0.5"]) == 2
    assert "warmup_ratio: 0.1 there, 0.5 here" in capsys.readouterr().out
    assert ev.main(["--run", PIRATE, *QUICK]) == 0
    edit(old / PIRATE / "eval.json", lambda result: result["config"].pop("temperature"))
    with monkeypatch.context() as patch:
        patch.setattr(hm, "load_model", None)
        assert ev.main(["--run", PIRATE, *QUICK]) == 0
    assert ev.main(["--run", PIRATE, *QUICK, "--temperature", "0"]) == 0  # another one: done anew
    assert json.loads((old / PIRATE / "eval.json").read_text())["config"]["temperature"] == 0


def test_new_flag_with_a_default_changes_no_finished_run(old, monkeypatch, capsys):
    real = ts.make_parser

    def with_beta2():
        parser = real()
        parser.add_argument("--beta2", type=float, default=0.999)
        return parser

    monkeypatch.setattr(ts, "make_parser", with_beta2)
    ts.option_defaults.cache_clear()
    try:
        assert ts.main(command(old / PIRATE)) == 0 and "done already" in capsys.readouterr().out
        assert ts.main([*command(old / PIRATE), "--print-todo"]) == 0
        assert capsys.readouterr().out == ""
        assert ts.main([*command(old / PIRATE), "--beta2", "0.9"]) == 2
        assert "beta2: 0.999 there, 0.9 here" in capsys.readouterr().out
    finally:
        ts.option_defaults.cache_clear()


def test_old_skipped_run_stays_skipped_though_the_default_of_epochs_is_another(tmp_path):
    config = {"name": "m__role__0_default", "num_epochs": 4}
    write_json(tmp_path / "run.json", {"status": "skipped", "config": config})
    new = {**config, "num_epochs": None, "auto_epochs": [150, 4]}
    assert rs.is_done(tmp_path, new, {"num_epochs": None})
    assert not rs.is_done(tmp_path, {**new, "num_epochs": 2}, {"num_epochs": None})


def test_old_unfinished_run_is_refused_and_named_and_restart_sets_it_aside(old, capsys):
    assert ts.main(command(old / SAILOR)) == 2  # today's default is not what it began with
    said = capsys.readouterr().out
    assert "num_epochs: 4 there, None here" in said and "Add --num-epochs 4 to go on" in said
    as_then = [*command(old / SAILOR), "--num-epochs", "4"]
    for arguments in (as_then, [*as_then, "--accept-code-change"]):
        assert ts.main(arguments) == 2
        said = capsys.readouterr().out
        assert "checkpoint-00005.safetensors was written by an older version" in said
        assert "--restart sets it aside" in said
    assert len(list((old / SAILOR).glob("checkpoint-*"))) == 1
    assert ts.main([*command(old / SAILOR), "--restart", "--max-steps", "4"]) == 0
    assert (old / SAILOR / "old-1" / "checkpoint-00005.safetensors").exists()
    assert rs.read_run(old / SAILOR).record["status"] == "done"
