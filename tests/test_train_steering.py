"""train_steering.py: arithmetic of the loop, what a run leaves behind, resume, bad input."""

import concurrent.futures
import contextlib
import datetime
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, persona_rows, tiny, write_raw
from safetensors import safe_open

import hook_model as hm
import train_steering as ts
from evaluation import report
from steering import loading
from steering import run as rn
from steering import run_folder as rf
from steering.chat_format import Example, collate
from steering.fast_path import FastPath
from steering.files import write_atomically
from steering.sweep import Sweep
from steering.vector_file import VECTOR_FILE, load_vector

QUICK = ["--layer", "1", "--lr", "0.05", "--dtype", "fp32", "--device", "cpu", "--max-steps", "6"]
QUICK += ["--save-every", "2", "--val-every", "2", "--val-fraction", "0.2"]


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def command(data_root, model, output, *more, dataset="src__role__pirate"):
    base = ["--data-root", data_root, "--model", model, "--output-dir", str(output)]
    return [*base, "--dataset", dataset, *QUICK, *more]


def the_folder(output, dataset="src__role__pirate"):
    (folder,) = Path(output).glob(f"*/layer1/{dataset}")
    return folder


def read_vector(output, **where):
    return hm.load_vector(the_folder(output, **where) / VECTOR_FILE)[0]


def steps_in(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def examples(lengths, start=3):
    rows = []
    for i, length in enumerate(lengths):
        ids = [(start + 7 * i + j) % 150 + 5 for j in range(length)]
        rows.append(Example({"question": f"Q{i}?"}, ids, [-100, -100, *ids[2:]]))
    return rows


class NeverStop:
    exit_code = None


def fit(tmp_path, train_set, *flags, val_set=(), stop=NeverStop, architecture="llama", model=None):
    """Run the training loop alone on a tiny model; returns (model, final numbers, folder)."""
    args = ts.parse_args(["--dataset", "x", "--lr", "0.05", *flags])
    model = hm.SteerModel(model or tiny(architecture), 1)
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    run = a_run(folder, args, train_set, val_set, stop)
    final = ts.train(model, train_set, list(val_set), args, run)
    return model, final, folder


def a_run(folder, args, train_set, val_set=(), stop=NeverStop):
    """What a sweep hands to the loop, for examples that are there already."""
    config = {"name": "x"}
    splits = SimpleNamespace(train=train_set, validation=list(val_set))
    run = rn.Run(folder, rn.newest_state(folder, config, {}), args, splits, stop)
    run.record = {"config": config, "dataset": "x"}
    return run


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gemma3"])
def test_accumulated_gradient_equals_one_big_batch(tmp_path, architecture):
    rows, vectors, losses = examples([4, 19, 7, 12, 5, 30]), [], []
    settings = (("a", "6", "1", "1000"), ("b", "1", "6", "1"), ("c", "4", "2", "38"))
    for name, batch, accumulation, tokens in settings:
        flags = ["--batch-size", batch, "--gradient-accumulation", accumulation, "--max-steps", "1"]
        flags += ["--micro-batch-tokens", tokens]  # one batch of 6, 6 of one, 3 of like length
        (tmp_path / name).mkdir()
        model, _, folder = fit(tmp_path / name, rows, *flags, architecture=architecture)
        content = torch.load(folder / "checkpoint-00001.pt", weights_only=True)
        saved = content["state"]["optimizer_state"]
        # Adam's first moment is (1 - beta1) x gradient.
        vectors.append(saved["state"][0]["exp_avg"] / 0.1)
        losses.append(json.loads((folder / "metrics.jsonl").read_text())["loss"])
    # The reference: one padded batch, loss by the model's own head and labels argument.
    model = hm.SteerModel(tiny(architecture), 1)
    ids, labels = collate(rows)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    for vector, value in zip(vectors, losses, strict=True):
        error = (vector - model.steering.vector.grad).norm() / model.steering.vector.grad.norm()
        assert error < 1e-4
        assert value == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_cache_and_micro_batches_change_nothing_but_rounding(tmp_path, caplog, architecture):
    rows, val_set, vectors, bests = examples([4, 19, 7, 12, 5, 30]), examples([4, 19]), [], []
    for i, (cache, tokens) in enumerate((("off", "1000"), ("auto", "1000"), ("host", "20"))):
        flags = ["--batch-size", "3", "--gradient-accumulation", "1", "--num-epochs", "3"]
        flags += ["--prefix-cache", cache, "--micro-batch-tokens", tokens]
        (tmp_path / str(i)).mkdir()
        with caplog.at_level("INFO", logger="steering"):
            caplog.clear()
            model, final, _ = fit(
                tmp_path / str(i), rows, *flags, val_set=val_set, architecture=architecture
            )
        assert ("turned off" in caplog.text) == (cache == "off")
        assert "prefix   100 tokens x 32 = 0.00 GiB" in caplog.text  # 77 + 23 to validate on
        vectors.append(model.steering.vector.detach().clone())
        bests.append(final["best_val"])
    for vector, best in zip(vectors[1:], bests[1:], strict=True):
        assert (vector - vectors[0]).norm() < 1e-3 * vectors[0].norm()
        assert best == pytest.approx(bests[0], rel=1e-5)


def test_one_epoch_caches_only_what_is_validated_again(tmp_path, monkeypatch):
    rows, val_set = examples([8] * 4), examples([8])
    kept, real = [], FastPath.cache_prefix

    def cache_prefix(self, examples, *rest):
        kept.extend(examples)
        return real(self, examples, *rest)

    monkeypatch.setattr(FastPath, "cache_prefix", cache_prefix)
    fit(tmp_path, rows, "--num-epochs", "1", val_set=val_set)
    assert kept == val_set


@pytest.mark.parametrize("count, epochs", [(2, 4), (4, 3), (5, 2), (12, 1), (20, 1)])
def test_epochs_are_as_many_as_make_enough_steps(tmp_path, monkeypatch, count, epochs):
    monkeypatch.setattr(ts, "AUTO_STEPS", 6)  # of two rows
    rows = examples([4] * count)
    assert fit(tmp_path, rows)[1]["steps"] == epochs * len(range(0, count, 2))


def test_every_row_is_used_once_an_epoch_and_the_last_window_is_kept(tmp_path):
    rows = examples([10] * 7)
    flags = ["--batch-size", "2", "--gradient-accumulation", "2", "--num-epochs", "3"]
    _, final, folder = fit(tmp_path, rows, *flags)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in metrics] == [40, 30] * 3
    assert final["steps"] == 6 and final["label_tokens"] == 3 * 7 * 8


def test_base_model_is_bit_unchanged_and_has_no_gradient(tmp_path):
    before = {name: p.clone() for name, p in tiny("llama").named_parameters()}
    model, _, _ = fit(tmp_path, examples([8, 9]), "--max-steps", "3")
    assert model.steering.vector.norm() > 0
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_best_vector_of_all_validations_is_kept_and_patience_stops(tmp_path, monkeypatch):
    scripted, seen = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 1.0]), []

    def losses(per_token, val_set, max_tokens):
        seen.append(steered[0].steering.vector.detach().clone())
        return [next(scripted)]

    real, steered = hm.SteerModel, []
    monkeypatch.setattr(hm, "SteerModel", lambda *a: steered.append(real(*a)) or steered[-1])
    monkeypatch.setattr(ts.fast_path, "example_sums", losses)
    flags = ["--max-steps", "40", "--val-every", "1", "--patience", "3"]
    model, final, _ = fit(tmp_path, examples([8] * 4), *flags, val_set=examples([2 + 8]))
    assert final["steps"] == 5 and final["best_step"] == 2  # validations before training, at 1 .. 5
    assert final["best_val"] == 4.0 / 8
    assert torch.equal(model.steering.vector, seen[2]) and not torch.equal(seen[2], seen[5])


def test_loss_that_is_not_finite_stops_with_step_and_advice(tmp_path):
    model = tiny("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    (tmp_path / "run").mkdir()
    args = ts.parse_args(["--dataset", "x", "--lr", "1"])
    steered, rows = hm.SteerModel(model, 1), examples([8])
    with pytest.raises(RuntimeError, match=r"step 1: loss nan.*--lr"):
        ts.train(steered, rows, [], args, a_run(tmp_path / "run", args, rows))


def test_vector_no_better_than_its_start_is_a_failed_run(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    worse = itertools.count(1000)
    monkeypatch.setattr(ts.fast_path, "example_sums", lambda *_: [next(worse)])
    assert ts.main(command(data_root, tiny_folder, tmp_path)) == 1
    assert "better than the start" in capsys.readouterr().out
    assert not (the_folder(tmp_path) / VECTOR_FILE).exists()
    record = json.loads((the_folder(tmp_path) / "run.json").read_text())
    assert record["status"] == "failed" and "than the start" in record["error"]


def test_run_that_failed_before_its_first_checkpoint_may_get_other_settings(
    data_root, tiny_folder, tmp_path, monkeypatch
):
    base = command(data_root, tiny_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FastPath, "median_residual_norm", lambda *_: 1 / 0)
        assert ts.main(base) == 1
    assert ts.main([*base, "--batch-size", "2", "--gradient-accumulation", "4"]) == 0
    spelled = ["--batch-size", "2", "--gradient-accumulation", "4", "--model", tiny_folder + "/"]
    assert ts.main([*base, *spelled]) == 0  # the same model: done already, not another run
    the_folder(tmp_path)


def test_schedules_warm_up_and_end_near_zero():
    cosine = [ts.lr_factor(step, 100, 10, "cosine") for step in range(100)]
    assert cosine[0] == pytest.approx(1 / 11) and max(cosine) == cosine[10] == 1.0
    assert cosine[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(cosine[10:]))
    assert ts.lr_factor(55, 100, 10, "linear") == pytest.approx(0.5)
    assert ts.lr_factor(99, 100, 10, "constant") == 1.0


def test_automatic_learning_rate_is_in_units_of_the_residual_stream(tmp_path):
    rows = examples([8, 9])
    model, final, _ = fit(tmp_path, rows, "--lr", "auto", "--max-steps", "1")
    norm = FastPath(model).median_residual_norm(rows)
    assert final["lr"] == pytest.approx(ts.AUTO_LR * norm / 32**0.5)


# ---------------------------------------------------------------- what a run leaves behind


def test_run_leaves_behind_what_the_readme_lists(data_root, tiny_folder, tmp_path, capsys):
    assert ts.main(command(data_root, tiny_folder, tmp_path / "runs")) == 0
    folder = the_folder(tmp_path / "runs")
    names = {path.name for path in folder.iterdir()}
    kept = {f"checkpoint-0000{step}.pt" for step in (2, 4, 6)}
    assert names == kept | {"steering_vector.safetensors", "run.json", "metrics.jsonl", "train.log"}
    assert (folder / VECTOR_FILE).stat().st_size < 100_000
    assert all((folder / name).stat().st_size < 1_000_000 for name in kept)
    with safe_open(folder / VECTOR_FILE, framework="pt") as file:
        assert list(file.keys()) == ["steering_vector"]
        vector, header = file.get_tensor("steering_vector"), file.metadata()
    assert vector.shape == (32,) and vector.dtype == torch.float32
    assert header["model"] == tiny_folder and header["layer"] == "1" and header["steps"] == "6"
    assert header["dataset"] == "src__role__pirate" and header["seed"] == "0"
    assert int(header["label_tokens"]) > 0 and header["format_version"]
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done" and record["args"]["lr"] == 0.05
    assert record["counts"]["kept"] == 20 and record["final"]["steps"] == 6
    assert record["config_hash"] == rn.config_hash(record["config"])
    assert record["torch"] == torch.__version__ and "git_commit" in record
    asked = {part: len(hashes) for part, hashes in record["questions"].items()}
    assert (
        asked["train"] + asked["validation"]
        == record["counts"]["train"] + (record["counts"]["validation"])
    )  # a question a row
    assert record["final"]["prefix_seconds"] > 0 and record["wall_seconds"] > 0
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]
    # The log is what the console showed, one line a step.
    log, shown = (folder / "train.log").read_text(), capsys.readouterr().out
    assert shown.endswith(log)
    assert log.count("| loss ") == 6
    for fact in (
        "32 trained",
        "frozen",
        "20 kept",
        "median residual norm",
        "steps    6",
    ):
        assert fact in log


def test_run_may_start_from_another_runs_vector(data_root, tiny_folder, tmp_path, capsys):
    base = command(data_root, tiny_folder, tmp_path)
    assert ts.main(base) == 0
    folder = the_folder(tmp_path)
    best = json.loads((folder / "run.json").read_text())["final"]["best_val"]
    start = str(shutil.copy(folder / VECTOR_FILE, tmp_path / "start.safetensors"))
    more = ["--init-vector", start, "--run-name", "again", "--lr", "0.001"]
    assert ts.main([*base, *more]) in (0, 1)  # it may not get any better
    first = json.loads((folder / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert first == {"step": 0, "val_loss": pytest.approx(best, rel=1e-5)}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        ts.main([*base, *more, "--layer", "2"])
    assert "was trained at layer 1, the model is set to 2" in capsys.readouterr().out
    assert ts.main([*base, "--init-vector", "nowhere", "--run-name", "b"]) == 2
    assert "nowhere: not a readable safetensors file" in capsys.readouterr().out


def test_console_that_goes_away_costs_nothing(data_root, tiny_folder, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_steering.py", *command(data_root, tiny_folder, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # like `| head -0`
    assert process.wait(120) == 0, process.stderr.read().decode()
    assert process.stderr.read() == b""
    assert (the_folder(tmp_path) / "train.log").read_text().count("| loss ") == 6


def test_finished_run_is_skipped_and_other_settings_are_refused(
    data_root, tiny_folder, tmp_path, capsys
):
    base = command(data_root, tiny_folder, tmp_path)
    assert ts.main(base) == 0
    first = read_vector(tmp_path)
    stamp = (the_folder(tmp_path) / VECTOR_FILE).stat().st_mtime_ns
    assert ts.main([*base, "--save-every", "3"]) == 0  # does not change the vector
    assert "done already" in capsys.readouterr().out
    assert (the_folder(tmp_path) / VECTOR_FILE).stat().st_mtime_ns == stamp
    assert ts.main([*base, "--lr", "0.1"]) == 2
    said = capsys.readouterr().out
    assert "lr: 0.05 there, 0.1 here" in said and "--run-name" in said
    assert torch.equal(read_vector(tmp_path), first)
    assert ts.main([*base, "--lr", "0.1", "--run-name", "fast"]) == 0
    folder = the_folder(tmp_path)
    assert not torch.equal(hm.load_vector(folder / "fast" / VECTOR_FILE)[0], first)
    (folder / "judgements.jsonl").write_text("")  # of answers, for runs of every name
    assert ts.main([*base, "--lr", "0.1", "--restart"]) == 0  # the old run is kept aside
    assert (folder / "judgements.jsonl").exists()
    assert torch.equal(hm.load_vector(folder / "old-1" / VECTOR_FILE)[0], first)
    assert not torch.equal(read_vector(tmp_path), first)
    assert (folder / "fast" / VECTOR_FILE).exists()


def test_changed_data_is_another_run(data_root, tiny_folder, tmp_path, capsys):
    assert ts.main(command(data_root, tiny_folder, tmp_path)) == 0
    rows, scores = persona_rows(19)
    write_raw(data_root, "pirate", rows, scores)
    assert ts.main(command(data_root, tiny_folder, tmp_path)) == 2
    assert "data: " in capsys.readouterr().out


def test_second_process_on_a_run_folder_leaves(data_root, tiny_folder, tmp_path, capsys):
    assert ts.main(command(data_root, tiny_folder, tmp_path / "a")) == 0
    folder = tmp_path / "b" / the_folder(tmp_path / "a").relative_to(tmp_path / "a")
    with rf.lock_folder(folder) as held:
        assert held
        assert ts.main(command(data_root, tiny_folder, tmp_path / "b")) == 0
        assert "another process works in" in capsys.readouterr().out
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not list(folder.iterdir())
    assert ts.main(command(data_root, tiny_folder, tmp_path / "b")) == 0


# ---------------------------------------------------------------- resume and signals


class StopAfter:
    """A StopRequest that a signal reaches during step `step`."""

    def __init__(self, step):
        self.reads, self.step = 0, step

    @property
    def exit_code(self):
        self.reads += 1
        return 75 if self.reads >= self.step else None


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path):
    flags = ["--batch-size", "2", "--gradient-accumulation", "1", "--max-steps", "9"]
    flags += ["--val-every", "2", "--save-every", "4"]
    rows, val_set = examples([9, 5, 14, 7, 11]), examples([8, 6])
    whole = tmp_path / "whole"
    whole.mkdir()
    reference, wanted, folder = fit(whole, rows, *flags, val_set=val_set)

    def last_vector(folder):  # the best one may be of an early step
        state = torch.load(folder / "checkpoint-00009.pt", weights_only=True)["state"]
        return state["vector_state"]["vector"]

    for step in (1, 3, 4, 7):  # within and at the end of an epoch, at and between checkpoints
        place = tmp_path / str(step)
        place.mkdir()
        _, none, part = fit(place, rows, *flags, val_set=val_set, stop=StopAfter(step))
        assert none is None and steps_in(part)[-1] < 9
        (part / "metrics.jsonl").open("a").write('{"step": 8, "loss": 1}\n{"torn')
        model, final, part = fit(place, rows, *flags, val_set=val_set)
        assert torch.equal(model.steering.vector, reference.steering.vector)
        assert torch.equal(last_vector(part), last_vector(folder))
        assert steps_in(part) == list(range(1, 10))
        times = {"seconds": 0, "prefix_seconds": 0}
        assert {**final, **times} == {**wanted, **times}


def test_torn_and_foreign_checkpoints_are_passed_over(tmp_path, caplog):
    flags, rows = ["--max-steps", "6", "--save-every", "2"], examples([9, 5, 14])
    reference, _, folder = fit(tmp_path, rows, *flags)
    newest = folder / "checkpoint-00006.pt"
    newest.write_bytes(newest.read_bytes()[:300])
    content = torch.load(folder / "checkpoint-00004.pt", weights_only=True)
    torch.save(content | {"config": {"name": "y"}}, folder / "checkpoint-00005.pt")
    with caplog.at_level("WARNING", logger="steering"):
        model, _, _ = fit(tmp_path, rows, *flags)
    assert torch.equal(model.steering.vector, reference.steering.vector)
    assert "checkpoint-00006.pt " in caplog.text
    assert "checkpoint-00005.pt belongs to other settings" in caplog.text
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_can_go_on(
    data_root, tiny_folder, tmp_path, number, code
):
    many = ["--max-steps", "60", "--save-every", "1000"]
    arguments = command(data_root, tiny_folder, tmp_path, *many)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_steering.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = tmp_path / "none"
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
        with contextlib.suppress(ValueError):
            metrics = the_folder(tmp_path) / "metrics.jsonl"
    process.send_signal(number)
    assert process.wait(60) == code, process.stderr.read().decode()
    folder = the_folder(tmp_path)
    done = steps_in(folder)
    assert [p.name for p in folder.glob("check*")] == [f"checkpoint-{done[-1]:05d}.pt"]
    assert not (folder / VECTOR_FILE).exists() and not (folder / "lock").exists()
    assert ts.main(arguments) == 0
    assert steps_in(folder) == list(range(1, 61))
    assert f"resume   after step {done[-1]} of 60" in (folder / "train.log").read_text()


def test_full_disk_is_a_failed_run_that_keeps_its_checkpoints(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    base = command(data_root, tiny_folder, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert ts.main(base) == 1
    said = capsys.readouterr().out
    assert "No space left on device" in said and "Traceback" not in said
    assert "Traceback" in (the_folder(tmp_path) / "train.log").read_text()
    assert not list(the_folder(tmp_path).glob(".partial*"))
    left = list(the_folder(tmp_path).glob("checkpoint-*"))
    assert left and not (the_folder(tmp_path) / VECTOR_FILE).exists()
    monkeypatch.setattr(os, "fsync", real)
    assert ts.main(base) == 0
    assert "resume   after step" in capsys.readouterr().out


# ---------------------------------------------------------------- many datasets, bad input


def test_many_datasets_share_one_model_load_and_the_worst_code_counts(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    loads, real = [], ts.load_from_options
    monkeypatch.setattr(ts, "load_from_options", lambda *a: loads.append(a) or real(*a))
    listing = tmp_path / "roles.txt"
    names = ["0_default", "hopeless", "pirate", "sailor"]
    listing.write_text("".join(f"src__role__{name}\n" for name in names))
    base = [
        "--data-root",
        data_root,
        "--model",
        tiny_folder,
        "--output-dir",
        str(tmp_path / "runs"),
    ]
    assert ts.main([*base, "--list-file", str(listing), *QUICK]) == 2
    said = capsys.readouterr().out
    assert "src__role__0_default: skipped, no examples: no scores" in said
    assert "src__role__hopeless: no example left to train on. 20 rows: 0 kept, 20 below" in said
    assert len(loads) == 1
    # Pirate and sailor hold the same rows in another order on disk: the same vector, also alone.
    together = read_vector(tmp_path / "runs", dataset="src__role__sailor")
    assert torch.equal(together, read_vector(tmp_path / "runs"))
    (skipped,) = (tmp_path / "runs").glob("*/layer1/*default*")
    assert [path.name for path in skipped.iterdir()] == ["run.json"]
    assert json.loads((skipped / "run.json").read_text())["status"] == "skipped"
    assert ts.main([*base, "--dataset", "src__role__0_default", *QUICK]) == 0
    bare = ["--source-model", "src", "--kind", "role", "--dataset", "pirate"]
    assert ts.main([*base, *bare, *QUICK]) == 0
    assert "done already" in capsys.readouterr().out


def test_bad_input_exits_2_before_a_model_loads(
    data_root, tiny_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(ts, "load_from_options", None)
    (tmp_path / "file").write_text("in the way")
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}{{ m.content }}")
    good = command(data_root, tiny_folder, tmp_path / "runs")
    for extra, message in (
        (["--layer", "99"], "--layer 99 is out of range"),
        (["--dataset", "src__role__pirat"], "closest: src__role__pirate"),
        (["--dataset", "../src__role__pirate"], 'without "/" and ".."'),
        (["--dataset", "src__role__hopeless"], "20 below threshold"),
        (["--model", str(tmp_path / "no" / "model")], "no such file or folder"),
        (["--data-root", str(tmp_path)], "no known layout"),
        (["--output-dir", str(tmp_path / "file")], "cannot be written"),
        (["--heldout-fraction", "0.999"], "no example left to train on"),
        (["--max-length", "3"], "16 too long"),
        (["--device", "cuda"], "no cuda device here"),
        (["--device", "gpu0"], "not a device"),
        (["--chat-template", str(broken)], "the chat template fails on"),
        (["--source-model", "other"], "found src__role"),
    ):
        if extra == ["--device", "cuda"] and torch.cuda.is_available():
            continue
        assert ts.main([*good, *extra]) == 2, extra
        said = capfd.readouterr()
        (line,) = (said.out + said.err).strip().splitlines()
        assert message in line and "Traceback" not in line
    assert "(use 0..3)" in errors_of(capfd, [*good, "--layer", "99"])
    assert not (tmp_path / "runs").exists()


def errors_of(capfd, arguments):
    with contextlib.suppress(SystemExit):
        ts.main(arguments)
    return capfd.readouterr().err


def test_bad_flags_are_reported_all_at_once(capfd):
    flags = {"--batch-size": "0", "--lr": "fast", "--warmup-ratio": "1", "--save-every": "-1"}
    flags |= {"--init-scale": "nan", "--run-name": "../x", "--target-tokens": "0"}
    error = errors_of(capfd, [part for pair in flags.items() for part in pair])
    for flag in ("batch-size 0", "lr fast", "warmup-ratio 1", "save-every -1", "init-scale nan"):
        assert f"--{flag}" in error
    assert '--run-name "../x"' in error and "--target-tokens 0" in error and "--dataset" in error


def test_malformed_model_folder_is_one_line(data_root, tiny_folder, tmp_path, capfd):
    torn = tmp_path / "torn"
    shutil.copytree(tiny_folder, torn)
    (torn / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(SystemExit) as stop:
        ts.main(command(data_root, str(torn), tmp_path / "runs"))
    assert stop.value.code == 2
    assert "error: --model" in (out := capfd.readouterr().out) and "does not load" in out
    assert not list(tmp_path.glob("runs/*/*/*/lock"))


# ---------------------------------------------------------------- units, files, processes


def test_a_residual_stream_a_thousand_times_shorter_gives_the_same_vector_in_its_unit(tmp_path):
    """So no step depends on a unit: not the learning rate, not a bound on the gradient."""
    vectors, rows = [], examples([8, 12, 9, 11, 10, 7])
    for factor in (1.0, 0.001):
        model = tiny("llama", rms_norm_eps=1e-12)
        with torch.no_grad():
            scaled = [layer.mlp.down_proj.weight for layer in model.model.layers]
            scaled += [layer.self_attn.o_proj.weight for layer in model.model.layers]
            for weight in (model.model.embed_tokens.weight, *scaled):
                weight *= factor
            model.lm_head.weight.copy_(tiny("llama").lm_head.weight)
        folder = tmp_path / str(factor)
        folder.mkdir()
        steer, final, _ = fit(folder, rows, "--lr", "auto", "--max-steps", "12", model=model)
        assert steer.steering.vector.norm() > 0
        vectors.append(steer.steering.vector.detach() / factor)
        assert final["ratio"] > 0.05
    assert torch.allclose(*vectors, rtol=1e-2, atol=1e-3 * vectors[0].abs().max())


def test_weights_replaced_at_the_same_path_are_another_run(
    data_root, tiny_folder, tmp_path, capsys
):
    model = tmp_path / "a" / "final"
    shutil.copytree(tiny_folder, model)
    arguments = command(data_root, str(model), tmp_path / "runs")
    assert ts.main(arguments) == 0
    vector = the_folder(tmp_path / "runs") / VECTOR_FILE
    capsys.readouterr()
    other = tiny("llama", vocab_size=json.loads((model / "config.json").read_text())["vocab_size"])
    other.model.layers[0].mlp.up_proj.weight.data *= 1.01
    other.save_pretrained(model)
    assert ts.main(arguments) == 2 and "model_digest: files-" in capsys.readouterr().out
    with pytest.raises(ValueError, match="or its files changed"):
        hm.load_model(model, 1).load_vector(vector)
    hm.load_model(model, 1).load_vector(vector, any_model=True)
    copy = tmp_path / "copy"  # the same files by another name
    shutil.copytree(tiny_folder, copy)
    hm.load_model(copy, 1).load_vector(vector)


def test_run_resumed_on_another_day_keeps_its_date(data_root, tiny_folder, tmp_path, monkeypatch):
    template = tmp_path / "dated.jinja"
    text = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.content }}"
    template.write_text(text + "<|im_end|>{% endfor %}")
    arguments = command(data_root, tiny_folder, tmp_path / "runs", "--chat-template", str(template))
    kept = []

    class Day(datetime.date):
        today_is = "2026-01-31"

        @classmethod
        def today(cls):
            return cls.fromisoformat(cls.today_is)

    monkeypatch.setattr("steering.chat_format.datetime.date", Day)
    with monkeypatch.context() as patch:
        patch.setattr(ts, "StopRequest", lambda: StopAfter(3))
        assert ts.main(arguments) == 75
    Day.today_is = "2026-02-01"
    real = FastPath.cache_prefix
    monkeypatch.setattr(
        FastPath, "cache_prefix", lambda fast, rows, *a: kept.extend(rows) or real(fast, rows, *a)
    )
    assert ts.main(arguments) == 0
    record = json.loads((the_folder(tmp_path / "runs") / "run.json").read_text())
    assert record["date"] == "2026-01-31" and record["end_of_turn"] == "<|im_end|>"
    chat = hm.load_chat(tiny_folder, str(template))
    assert "01 Feb" in chat.tokenizer.decode(chat.encode([kept[0].row])[0].input_ids)
    assert "31 Jan" in chat.tokenizer.decode(kept[0].input_ids)


def test_a_template_without_end_of_turn_is_warned_of(data_root, tiny_folder, tmp_path, capsys):
    template = tmp_path / "bare.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    arguments = command(data_root, tiny_folder, tmp_path / "runs", "--chat-template", str(template))
    assert ts.main(arguments) == 0
    assert "WARNING: no special token ends a turn" in capsys.readouterr().out
    record = json.loads((the_folder(tmp_path / "runs") / "run.json").read_text())
    assert record["end_of_turn"] == ""


def test_whatever_a_dataset_runs_into_the_next_one_is_trained(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    real = ts.data_filter.split_dataset

    def breaks(name, *rest):
        if name.endswith("pirate"):
            raise KeyError("nobody thought of this")
        return real(name, *rest)

    monkeypatch.setattr(ts.data_filter, "split_dataset", breaks)
    both = ["src__role__pirate", "src__role__sailor"]
    assert ts.main([*command(data_root, tiny_folder, tmp_path / "runs"), "--dataset", *both]) == 1
    assert "FAILED   src__role__pirate: KeyError" in capsys.readouterr().out
    assert read_vector(tmp_path / "runs", dataset="src__role__sailor").any()


def test_run_in_which_processes_die_is_given_up_unless_it_gets_further(
    data_root, tiny_folder, tmp_path, capsys
):
    arguments = command(data_root, tiny_folder, tmp_path / "runs")
    assert ts.main(arguments) == 0
    folder = the_folder(tmp_path / "runs")
    record = json.loads((folder / "run.json").read_text())
    (folder / VECTOR_FILE).unlink()
    last = max(folder.glob("checkpoint-*"))

    def died(attempts, step):
        changes = {"status": "running", "attempts": attempts, "from_step": step}
        (folder / "run.json").write_text(json.dumps(record | changes))

    died(rn.ATTEMPTS, 6)
    assert last.name == "checkpoint-00006.pt" and ts.main(arguments) == 1
    assert "its process died 5 times in a row" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    died(rn.ATTEMPTS, 4)  # further than where they died
    assert ts.main(arguments) == 0 and (folder / VECTOR_FILE).exists()
    assert json.loads((folder / "run.json").read_text())["attempts"] == 1


@pytest.mark.parametrize("clock", [0, 2_000_000_000])  # of the file server: far behind, far ahead
def test_run_that_failed_elsewhere_since_the_sweep_began_is_passed_over(
    data_root, tiny_folder, tmp_path, caplog, clock
):
    args = ts.parse_args(command(data_root, tiny_folder, tmp_path / "runs"))
    defaults = vars(ts.make_parser().parse_args([]))

    def names(began):
        return [run.record["dataset"] for run in began.runs()]

    def failed(stamp):
        folder = next(iter(before.run_json_then)).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"status": "failed", "dataset": "x"}))
        os.utime(folder / "run.json", times=(stamp, stamp))

    before = Sweep(args, ts.split, ts.NOT_IN_CONFIG.split(), defaults, NeverStop)
    failed(clock)
    with caplog.at_level("INFO", logger="steering"):
        assert names(before) == []
    assert "just failed there" in caplog.text
    # A sweep that begins now tries it again, and another failure is another.
    after = Sweep(args, ts.split, ts.NOT_IN_CONFIG.split(), defaults, NeverStop)
    assert names(after) == ["src__role__pirate"]
    failed(clock + 1)
    assert names(after) == []


def test_looking_at_a_lock_refuses_no_trainer(tmp_path):
    done = threading.Event()

    def look():
        while not done.is_set():
            rf.is_locked(tmp_path)
            time.sleep(0.001)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(200):
            with rf.lock_folder(tmp_path) as held:
                assert held
    finally:
        done.set()
    for thread in lookers:
        thread.join()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_one_line(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys, number
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rf.fcntl, "flock", flock)
    assert ts.main(command(data_root, tiny_folder, tmp_path / "runs")) == 2
    said = capsys.readouterr().out
    assert "no lock to be had" in said and "--output-dir" in said and "Traceback" not in said


def test_writers_of_one_file_do_not_tear_it_and_leftovers_are_swept(tmp_path):
    path, texts = tmp_path / "report.csv", [bytes([65 + i]) * 300_000 for i in range(4)]

    def write(data):
        for _ in range(15):
            write_atomically(path, data)
            assert path.read_bytes() in texts

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert [p.name for p in tmp_path.iterdir()] == ["report.csv"]
    for name, age in ((".partial-1-1", 7200), (".partial-2-2", 0)):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    with rf.lock_folder(tmp_path):
        assert not (tmp_path / ".partial-1-1").exists() and (tmp_path / ".partial-2-2").exists()


def test_finished_run_stays_done_where_auto_is_another_dtype(
    data_root, tiny_folder, tmp_path, monkeypatch, capsys
):
    arguments = command(data_root, tiny_folder, tmp_path / "runs", "--dtype", "auto")
    monkeypatch.setattr(loading, "cpu_has_bf16", lambda: False)
    assert ts.main(arguments) == 0
    monkeypatch.setattr(loading, "cpu_has_bf16", lambda: True)
    capsys.readouterr()
    todo = tmp_path / "todo"
    assert ts.main([*arguments, "--write-todo", str(todo)]) == 0 and todo.read_text() == ""
    assert capsys.readouterr().out == "1 of 1 done or in work elsewhere, 0 to train\n"
    assert ts.main(arguments) == 0 and "done already" in capsys.readouterr().out
    assert ts.main([*arguments, "--dtype", "bf16"]) == 2  # asked for: another setting


def test_files_beside_a_model_do_not_make_it_another(tiny_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    before = loading.model_digest(str(model))
    (model / "tokenizer").mkdir()
    for name in ("README_tokens.md", "model-q4.gguf", "training_args.json"):
        (model / name).write_text("x")
    assert loading.model_digest(str(model)) == before
    (model / "chat_template.jinja").write_text("other")
    assert loading.model_digest(str(model)) != before
    assert loading.model_digest("nobody/has-this") is None


def test_commit_of_the_hub_that_changes_no_file_of_the_model_changes_no_run(tmp_path, monkeypatch):
    commits, blobs = ["a" * 40, "b" * 40, "c" * 40], tmp_path / "blobs"
    contents = {"config.json": "ccc", "model.safetensors": "www", "README.md": "abc"}
    for i, commit in enumerate(commits):
        (tmp_path / "snapshots" / commit).mkdir(parents=True)
        for file, each in contents.items():
            each = {"model.safetensors": "wwx"}.get(file, each)  # other weights in the last one
            (blobs / (file + each[i])).parent.mkdir(exist_ok=True)
            (blobs / (file + each[i])).write_text(each[i])
            (tmp_path / "snapshots" / commit / file).symlink_to(blobs / (file + each[i]))
    here = str(tmp_path / "snapshots" / commits[1] / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: here)
    digests = [f"commit-{commit[:16]}" for commit in commits]
    assert loading.model_digest("who/model") == digests[1]
    configs = [{"model": "who/model", "model_digest": d} for d in [*digests, "commit-d", "files-a"]]
    other = [rn.differences(configs[1], config, {}) for config in configs]
    assert other == [[], [], ["model_digest"], ["model_digest"], ["model_digest"]]
    of_an_evaluation = [{**config, "model": None} for config in configs[:2]]
    assert rn.differences(*of_an_evaluation, {}) == ["model_digest"]


def test_torn_newer_checkpoints_do_not_outlive_those_of_a_new_start(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (480, 490, 500):
        (folder / f"checkpoint-{step:05d}.pt").write_bytes(b"torn")
    fit(tmp_path, examples([9, 5, 14]), "--max-steps", "6", "--save-every", "2")
    names = [path.name for path in rf.checkpoints(folder)]
    assert names == [f"checkpoint-0000{step}.pt" for step in (2, 4, 6)]
    assert rn.newest_state(folder, {"name": "x"}, {}).step == 6


# ---------------------------------------------------------------- the real model


def test_training_lowers_nll_of_unseen_real_data_on_the_real_model(smol, tmp_path):
    args = ["--data-root", str(ROOT / "sample_data"), "--model", smol, "--layer", "12"]
    args += ["--dataset", "sample__role__pirate", "--output-dir", str(tmp_path)]
    args += ["--target-tokens", "2000", "--max-steps", "4", "--val-fraction", "0.3"]
    assert ts.main([*args, "--val-every", "4", "--gradient-accumulation", "1"]) == 0
    (folder,) = tmp_path.glob("*/layer12/sample__role__pirate")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.05


def test_out_of_memory_halves_the_micro_batch_and_does_the_step_again(
    tmp_path, monkeypatch, caplog
):
    for name in "abc":
        (tmp_path / name).mkdir()
    rows, flags = examples([8, 9, 10, 11]), ["--batch-size", "4", "--micro-batch-tokens", "64"]
    whole, _, _ = fit(tmp_path / "a", rows, *flags)
    real = FastPath.losses

    def losses(self, batch, token_loss):
        if len(batch) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, token_loss)

    monkeypatch.setattr(FastPath, "losses", losses)
    halved, _, folder = fit(tmp_path / "b", rows, *flags)
    for tokens in (32, 16):
        assert f"out of memory, now --micro-batch-tokens {tokens}\n" in caplog.text
    assert torch.allclose(halved.steering.vector, whole.steering.vector, atol=1e-5)
    assert steps_in(folder) == [1, 2, 3, 4]
    monkeypatch.setattr(FastPath, "losses", lambda *_, **__: losses(None, [1, 2], None))
    with pytest.raises(torch.OutOfMemoryError):  # a row alone is as small as it gets
        fit(tmp_path / "c", examples([8, 9]), "--batch-size", "1")


def test_seeds_are_runs_of_their_own_and_the_report_compares_them(
    data_root, tiny_folder, tmp_path, capsys
):
    arguments = command(data_root, tiny_folder, tmp_path / "runs", "--seeds", "2", "--seed", "5")
    assert ts.main(arguments) == 0
    folders = sorted(path.parent for path in (tmp_path / "runs").rglob(VECTOR_FILE))
    assert [folder.name for folder in folders] == ["seed5", "seed6"]
    alone = command(data_root, tiny_folder, tmp_path / "alone", "--seed", "6")
    assert ts.main(alone) == 0
    ours = load_vector(folders[1] / VECTOR_FILE)[0]
    assert torch.equal(load_vector(the_folder(tmp_path / "alone") / VECTOR_FILE)[0], ours)
    capsys.readouterr()
    assert ts.main(arguments) == 0
    assert capsys.readouterr().out.count("done already") == 2
    todo = tmp_path / "todo"
    assert ts.main([*arguments, "--seeds", "3", "--write-todo", str(todo)]) == 0
    assert todo.read_text() == "src__role__pirate\n" and "1 to train" in capsys.readouterr().out
    assert ts.main([*arguments, "--seeds", "3", "--print-status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:30] for line in lines if "status" in line] == [
        "status   seed5: 1 done / 0 run", "status   seed6: 1 done / 0 run",
        "status   seed7: 0 done / 0 run",
    ]  # fmt: skip
    assert ts.main([*arguments, "--run-name", "warm", "--seeds", "2", "--max-steps", "1"]) == 0
    assert {p.parent.name for p in (tmp_path / "runs").rglob(VECTOR_FILE)} >= {"warm-seed5"}

    assert report.write_report(tmp_path, folders)
    text = (tmp_path / "report.md").read_text()
    vectors = [load_vector(folder / VECTOR_FILE)[0] for folder in folders]
    cosine = torch.cosine_similarity(*vectors, dim=0).item()
    assert "## Seeds" in text and f"| 2 | {cosine:.3f} ({cosine:.3f}) |" in text
    other = [folders[0], the_folder(tmp_path / "alone")]  # alike but for the folder

    def compared(folders):
        rows = [report.report_row(folder) for folder in folders]
        return report.compare_seeds(
            [(row, load_vector(Path(row["run"], VECTOR_FILE))[0]) for row in rows]
        )

    assert compared(other)
    record = json.loads((folders[0] / "run.json").read_text())
    record["config"]["lr"] = 1.0
    (folders[0] / "run.json").write_text(json.dumps(record))
    assert not compared(folders)
