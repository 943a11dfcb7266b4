"""train_steering.py: arithmetic of the loop, what a run leaves behind, resume, bad input."""

import concurrent.futures
import contextlib
import datetime
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    StopAfter,
    persona_rows,
    read_vector,
    steps_in,
    the_folder,
    tiny,
    write_raw,
)
from safetensors import safe_open

import hook_model as hm
import train_steering as ts
from steering import loading
from steering import run as rn
from steering import run_folder as rf
from steering.chat_format import Example, collate
from steering.fast_path import FastPath
from steering.files import read_json, read_json_lines, write_atomically, write_json
from steering.vector_file import VECTOR_FILE, load_vector

SMALL_STEPS = "--batch-size 2 --gradient-accumulation 1 "


def examples(*lengths):
    """Examples of these lengths, the first two tokens without loss."""
    rows = []
    for i, length in enumerate(lengths):
        ids = [(3 + 7 * i + j) % 150 + 5 for j in range(length)]
        rows.append(Example({"question": f"Q{i}?"}, ids, [-100, -100, *ids[2:]]))
    return rows


class NeverStop:
    exit_code = None


def steered(architecture="llama"):
    """A tiny SteerModel without a vector."""
    return hm.SteerModel(tiny(architecture), 1)


def fit(folder, train_set, flags="", val_set=(), stop=NeverStop, model=None):
    """Run the training loop alone, on examples; returns (SteerModel, final numbers)."""
    folder.mkdir(exist_ok=True)
    args = ts.parse_args(["--dataset", "x", "--lr", "0.05", *flags.split()])
    model = model or steered()
    config = {"name": "x"}
    splits = SimpleNamespace(train=train_set, validation=list(val_set))
    run = rn.Run(folder, rn.newest_state(folder, config, {}), args, splits, stop)
    run.record = {"config": config, "dataset": "x"}
    return model, ts.train(model, train_set, list(val_set), args, run)


def checkpoint(folder, step):
    """The state in a checkpoint."""
    path = folder / f"checkpoint-{step:05d}.pt"
    return torch.load(path, weights_only=True)["state"]


def metrics(folder, key):
    """The values of a key in metrics.jsonl, in order."""
    return [row[key] for row in read_json_lines(folder / "metrics.jsonl") if key in row]


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gemma3"])
@pytest.mark.parametrize(
    "flags",
    [  # one batch of six, six of one, three of like length
        "--batch-size 6 --gradient-accumulation 1 --micro-batch-tokens 1000",
        "--batch-size 1 --gradient-accumulation 6 --micro-batch-tokens 1",
        "--batch-size 4 --gradient-accumulation 2 --micro-batch-tokens 38",
    ],
)
def test_accumulated_gradient_equals_one_big_batch(tmp_path, architecture, flags):
    rows = examples(4, 19, 7, 12, 5, 30)
    fit(tmp_path, rows, flags + " --max-steps 1", model=steered(architecture))
    # Adam's first moment is (1 - beta1) x gradient.
    gradient = checkpoint(tmp_path, 1)["optimizer_state"]["state"][0]["exp_avg"] / 0.1
    # The reference: one padded batch, loss by the model's own head and labels argument.
    model = steered(architecture)
    ids, labels = collate(rows)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    expected = model.steering.vector.grad
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    assert metrics(tmp_path, "loss") == [pytest.approx(loss.item(), rel=1e-5)]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_cache_and_micro_batches_change_nothing_but_rounding(tmp_path, caplog, architecture):
    found = []
    for flags, cached in (
        ("--prefix-cache off --num-epochs 3", "100 tokens x 32 = 0.00 GiB: turned off"),
        ("--prefix-cache auto --num-epochs 3", "100 tokens x 32 = 0.00 GiB on cpu"),
        ("--prefix-cache host --num-epochs 3 --micro-batch-tokens 20", "100 tokens x 32"),
        ("--prefix-cache auto --num-epochs 1", "23 tokens x 32"),  # the others come up once
    ):
        folder = tmp_path / str(len(found))
        rows = examples(4, 19, 7, 12, 5, 30)
        flags = f"{flags} --batch-size 3 --gradient-accumulation 1"
        caplog.clear()
        with caplog.at_level("INFO", logger="steering"):
            found.append(fit(folder, rows, flags, examples(4, 19), model=steered(architecture)))
        assert f"prefix   {cached}" in caplog.text
    whole, final = found[0]
    for model, numbers in found[1:3]:
        error = model.steering.vector - whole.steering.vector
        assert error.norm() < 1e-3 * whole.steering.vector.norm()
        assert numbers["best_val"] == pytest.approx(final["best_val"], rel=1e-5)


@pytest.mark.parametrize("count, epochs", [(2, 4), (4, 3), (5, 2), (12, 1), (20, 1)])
def test_epochs_are_as_many_as_make_enough_steps(tmp_path, monkeypatch, count, epochs):
    monkeypatch.setattr(ts, "AUTO_STEPS", 6)  # of two rows
    assert fit(tmp_path, examples(*[4] * count))[1]["steps"] == epochs * -(-count // 2)


def test_every_row_is_used_once_an_epoch_and_the_last_window_is_kept(tmp_path):
    flags = "--batch-size 2 --gradient-accumulation 2 --num-epochs 3"
    _, final = fit(tmp_path, examples(*[10] * 7), flags)
    assert metrics(tmp_path, "tokens") == [40, 30] * 3
    assert final["steps"] == 6 and final["label_tokens"] == 3 * 7 * 8


def test_base_model_is_bit_unchanged_and_the_vector_alone_is_trained(tmp_path):
    model, _ = fit(tmp_path, examples(8, 9), "--max-steps 3")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["steering.vector"]
    assert model.steering.vector.norm() > 0
    before = dict(tiny("llama").named_parameters())
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_best_vector_of_all_validations_is_kept_and_patience_stops(tmp_path, monkeypatch):
    scripted = iter([9.0, 5.0, 6.0, 4.0, 6.0, 7.0, 8.0, 1.0])
    model = steered()
    seen = []

    def mean(losses, val_set, max_tokens):
        seen.append(model.steering.vector.detach().clone())
        return next(scripted)

    monkeypatch.setattr(ts.fast_path, "token_mean", mean)
    flags = "--max-steps 40 --val-every 1 --patience 3"
    _, final = fit(tmp_path, examples(8, 8, 8, 8), flags, examples(10), model=model)
    assert final["steps"] == 6 and final["best_step"] == 3  # validations before training, at 1 .. 6
    assert final["best_val"] == 4.0
    assert torch.equal(model.steering.vector, seen[3]) and not torch.equal(seen[3], seen[6])


def test_loss_that_is_not_finite_stops_with_step_and_advice(tmp_path):
    model = steered()
    model.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"step 1: loss nan.*--lr"):
        fit(tmp_path, examples(8), model=model)


def test_vector_no_better_than_its_start_is_a_failed_run(training, monkeypatch):
    worse = itertools.count(1000)
    monkeypatch.setattr(ts.fast_path, "token_mean", lambda *_: next(worse))
    assert "better than the start" in training(code=1)
    assert not (training.folder / VECTOR_FILE).exists()
    assert training.record["status"] == "failed" and "than the start" in training.record["error"]


def test_run_that_failed_before_its_first_checkpoint_may_get_other_settings(
    training, tiny_folder, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(FastPath, "median_residual_norm", lambda *_: 1 / 0)
        training(code=1)
    other = "--batch-size 2 --gradient-accumulation 4"
    training(other)
    # The same model, spelled otherwise: done already, not another run.
    assert "done already" in training(f"{other} --model {tiny_folder}/")


def test_schedules_warm_up_and_end_near_zero():
    cosine = [ts.lr_factor(step, 100, 10, "cosine") for step in range(100)]
    assert cosine[0] == pytest.approx(1 / 11) and max(cosine) == cosine[10] == 1.0
    assert cosine[99] < 0.001 and cosine[10:] == sorted(cosine[10:], reverse=True)
    assert ts.lr_factor(55, 100, 10, "linear") == pytest.approx(0.5)
    assert ts.lr_factor(99, 100, 10, "constant") == 1.0


def test_a_residual_stream_a_thousand_times_shorter_gives_the_same_vector_in_its_unit(tmp_path):
    """So no step depends on a unit: not the learning rate, not a bound on the gradient."""
    rows = examples(8, 12, 9, 11, 10, 7)
    vectors = []
    for factor in (1.0, 0.001):
        model = tiny("llama", rms_norm_eps=1e-12)
        weights = [model.model.embed_tokens.weight]
        for layer in model.model.layers:
            weights += [layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight]
        for weight in weights:
            weight.data *= factor
        model.lm_head.weight.data.copy_(tiny("llama").lm_head.weight)
        model = hm.SteerModel(model, 1)
        _, final = fit(tmp_path / str(factor), rows, "--lr auto --max-steps 12", model=model)
        norm = FastPath(model).median_residual_norm(rows)
        assert final["lr"] == pytest.approx(ts.AUTO_LR * norm / 32**0.5, rel=1e-4)
        assert final["ratio"] > 0.05
        vectors.append(model.steering.vector.detach() / factor)
    assert torch.allclose(*vectors, rtol=1e-2, atol=1e-3 * vectors[0].abs().max())


def test_out_of_memory_halves_the_micro_batch_and_does_the_step_again(
    tmp_path, monkeypatch, caplog
):
    rows = examples(8, 9, 20, 21)
    flags = "--batch-size 4 --gradient-accumulation 1 --micro-batch-tokens 84"
    whole, _ = fit(tmp_path / "a", rows, flags)
    real = FastPath.losses

    def losses(self, batch, token_loss, most=1):
        longest = max(len(example.input_ids) for example in batch)
        if len(batch) > most and longest > 10 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, token_loss)

    monkeypatch.setattr(FastPath, "losses", losses)
    halved, _ = fit(tmp_path / "b", rows, flags)
    for tokens in (42, 21):  # by when two short rows have left a gradient
        assert f"out of memory, now --micro-batch-tokens {tokens}\n" in caplog.text
    assert torch.allclose(halved.steering.vector, whole.steering.vector, atol=1e-5)
    assert steps_in(tmp_path / "b") == [1, 2, 3, 4]
    monkeypatch.setattr(FastPath, "losses", lambda *given: losses(*given, most=0))
    with pytest.raises(torch.OutOfMemoryError):  # a row alone is as small as it gets
        fit(tmp_path / "c", rows, "--batch-size 1")


# ---------------------------------------------------------------- what a run leaves behind


def test_run_leaves_behind_what_the_readme_lists(training, tiny_folder):
    shown = training("--save-every 1")
    folder = training.folder
    checkpoints = {f"checkpoint-0000{step}.pt" for step in (4, 5, 6)}  # the newest
    others = {VECTOR_FILE, "run.json", "metrics.jsonl", "train.log"}
    assert {path.name for path in folder.iterdir()} == checkpoints | others
    assert (folder / VECTOR_FILE).stat().st_size < 100_000
    assert all((folder / name).stat().st_size < 1_000_000 for name in checkpoints)
    with safe_open(folder / VECTOR_FILE, framework="pt") as file:
        assert list(file.keys()) == ["steering_vector"]
        vector = file.get_tensor("steering_vector")
        header = file.metadata()
    assert vector.shape == (32,) and vector.dtype == torch.float32
    known = {"model": tiny_folder, "layer": "1", "steps": "6", "seed": "0"}
    known["dataset"] = "src__role__pirate"
    assert known.items() <= header.items()
    assert int(header["label_tokens"]) > 0 and header["format_version"]
    record = training.record
    assert record["status"] == "done" and record["args"]["lr"] == 0.05
    assert record["counts"]["kept"] == 20 and record["final"]["steps"] == 6
    assert record["torch"] == torch.__version__ and {"config_hash", "git_commit"} <= {*record}
    for part in ("train", "validation"):
        assert len(record["questions"][part]) == record["counts"][part]  # a question a row
    assert record["final"]["prefix_seconds"] > 0 and record["wall_seconds"] > 0
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]
    # The log is what the console showed, one line a step.
    log = (folder / "train.log").read_text()
    assert log in shown and log.count("| loss ") == 6
    for fact in ("32 trained", "frozen", "20 kept", "median residual norm", "steps    6"):
        assert fact in log


def test_run_may_start_from_another_runs_vector(training, tmp_path):
    training()
    start = shutil.copy(training.folder / VECTOR_FILE, tmp_path)
    more = f"--init-vector {start} --run-name again"
    training(f"{more} --lr 0.1")
    first = read_json_lines(training.folder / "again" / "metrics.jsonl")[0]
    best = training.record["final"]["best_val"]
    assert first == {"step": 0, "val_loss": pytest.approx(best, rel=1e-5)}
    assert "was trained at layer 1, the model is set to 2" in training(f"{more} --layer 2", code=2)
    said = training("--init-vector nowhere --run-name b", code=2)
    assert "nowhere: not a readable safetensors file" in said


def test_finished_run_is_skipped_and_other_settings_are_refused(training):
    training()
    folder = training.folder
    first = training.vector
    stamp = (folder / VECTOR_FILE).stat().st_mtime_ns
    assert "done already" in training("--save-every 3")  # does not change the vector
    assert (folder / VECTOR_FILE).stat().st_mtime_ns == stamp
    said = training("--lr 0.1", code=2)
    assert "lr: 0.05 there, 0.1 here" in said and "--run-name" in said
    assert torch.equal(training.vector, first)
    training("--lr 0.1 --run-name fast")
    assert not torch.equal(load_vector(folder / "fast" / VECTOR_FILE)[0], first)
    (folder / "judgements.jsonl").write_text("")  # of answers, for runs of every name
    training("--lr 0.1 --restart")  # the old run is kept aside
    assert (folder / "judgements.jsonl").exists() and (folder / "fast" / VECTOR_FILE).exists()
    assert torch.equal(load_vector(folder / "old-1" / VECTOR_FILE)[0], first)
    assert not torch.equal(training.vector, first)


def test_changed_data_is_another_run(training, data_root):
    training()
    write_raw(data_root, "pirate", *persona_rows(19))
    assert "data: " in training(code=2)


def test_weights_replaced_at_the_same_path_are_another_run(training, tiny_folder, tmp_path):
    model = tmp_path / "a" / "final"
    shutil.copytree(tiny_folder, model)
    training(f"--model {model}")
    vector = training.folder / VECTOR_FILE
    other = tiny("llama", vocab_size=read_json(model / "config.json")["vocab_size"])
    other.model.layers[0].mlp.up_proj.weight.data *= 1.01
    other.save_pretrained(model)
    assert "model_digest: files-" in training(f"--model {model}", code=2)
    with pytest.raises(ValueError, match="or its files changed"):
        hm.load_model(model, 1).load_vector(vector)
    hm.load_model(model, 1).load_vector(vector, any_model=True)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")  # the same files by another name
    hm.load_model(copy, 1).load_vector(vector)


def test_finished_run_stays_done_where_auto_is_another_dtype(training, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "cpu_has_bf16", lambda: False)
    training("--dtype auto")
    monkeypatch.setattr(loading, "cpu_has_bf16", lambda: True)
    said = training(f"--dtype auto --write-todo {tmp_path / 'todo'}")
    assert said == "1 of 1 done or in work elsewhere, 0 to train\n"
    assert (tmp_path / "todo").read_text() == ""
    assert "done already" in training("--dtype auto")
    training("--dtype bf16", code=2)  # asked for: another setting


def test_files_beside_a_model_do_not_make_it_another(tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    before = loading.model_digest(str(model))
    (model / "tokenizer").mkdir()
    for name in ("README_tokens.md", "model-q4.gguf", "training_args.json"):
        (model / name).write_text("x")
    assert loading.model_digest(str(model)) == before
    (model / "chat_template.jinja").write_text("other")
    assert loading.model_digest(str(model)) != before
    assert loading.model_digest("nobody/has-this") is None


def test_commit_of_the_hub_that_changes_no_file_of_the_model_changes_no_run(tmp_path, monkeypatch):
    commits = ["a" * 40, "b" * 40, "c" * 40]
    for commit, weights in zip(commits, "wwx", strict=True):  # other weights in the last one
        folder = tmp_path / "snapshots" / commit
        folder.mkdir(parents=True)
        contents = {"config.json": "c", "model.safetensors": weights, "README.md": commit}
        for name, text in contents.items():
            blob = tmp_path / f"{name}-{text}"
            blob.write_text(text)
            (folder / name).symlink_to(blob)
    here = str(tmp_path / "snapshots" / commits[1] / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: here)
    digest = f"commit-{commits[1][:16]}"
    assert loading.model_digest("who/model") == digest
    ours = {"model": "who/model", "model_digest": digest}
    for other, differs in (
        (f"commit-{commits[0][:16]}", []),
        (f"commit-{commits[2][:16]}", ["model_digest"]),
        ("commit-d", ["model_digest"]),
        ("files-a", ["model_digest"]),
    ):
        assert rn.differences(ours, ours | {"model_digest": other}, {}) == differs
        evaluation = {"model": None, "model_digest": other}  # which looks at no cache
        assert rn.differences(ours | {"model": None}, evaluation, {}) == ["model_digest"]


def test_seeds_are_runs_of_their_own(training, tmp_path):
    flags = "--seeds 2 --seed 5"
    training(flags)
    folders = sorted(path.parent for path in training.output.rglob(VECTOR_FILE))
    assert [folder.name for folder in folders] == ["seed5", "seed6"]
    training(f"--seed 6 --output-dir {tmp_path / 'alone'}")
    assert torch.equal(read_vector(tmp_path / "alone"), load_vector(folders[1] / VECTOR_FILE)[0])
    assert training(flags).count("done already") == 2
    todo = tmp_path / "todo"
    assert "1 to train" in training(f"{flags} --seeds 3 --write-todo {todo}")
    assert todo.read_text() == "src__role__pirate\n"
    said = training(f"{flags} --seeds 3 --device cuda --print-status")  # which is not here
    for seed, done in ((5, 1), (6, 1), (7, 0)):
        assert f"status   seed{seed}: {done} done / 0 running" in said
    training(f"{flags} --run-name warm --max-steps 1")
    assert (folders[0].with_name("warm-seed5") / VECTOR_FILE).exists()


def test_layers_are_runs_of_their_own(training, tmp_path):
    folders = [training.output, tmp_path / "alone"]
    said = training("--layer 2 0 2")
    assert said.count("run once") == 1 and "layers 0..2 run once, kept after each of 0, 2" in said
    files = sorted(training.output.rglob(VECTOR_FILE))
    assert [path.parts[-3] for path in files] == ["layer0", "layer2"]
    for layer, path in ((0, files[0]), (2, files[1])):
        training(f"--layer {layer} --output-dir {folders[1]}")
        (alone,) = folders[1].rglob(f"layer{layer}/*/{VECTOR_FILE}")
        assert alone.read_bytes() == path.read_bytes()
        assert load_vector(path)[1]["layer"] == str(layer)
        assert read_json(path.with_name("run.json"))["config"]["layer"] == layer
    assert training("--layer 0 2").count("done already") == 2
    todo = tmp_path / "todo"
    assert "1 to train" in training(f"--layer 0 1 2 --write-todo {todo}")
    said = training("--layer 0 1 2 --print-status")
    for layer, done in ((0, 1), (1, 0), (2, 1)):
        assert f"status   layer {layer}: {done} done / 0 running" in said


def test_a_layer_out_of_range_ends_it_before_anything_is_trained(training):
    assert "--layer 9 is out of range" in training("--layer 1 9", code=2)
    assert not training.output.exists()
    assert "--init-vector is of one layer" in training("--layer 1 2 --init-vector x", code=2)


# ---------------------------------------------------------------- resume, signals, what goes wrong


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path):
    flags = SMALL_STEPS + "--max-steps 9 --val-every 2 --save-every 4"
    rows = examples(9, 5, 14, 7, 11)
    val_set = examples(8, 6)
    timeless = {"seconds": 0, "prefix_seconds": 0}
    whole, wanted = fit(tmp_path / "whole", rows, flags, val_set)
    last = checkpoint(tmp_path / "whole", 9)["vector_state"]["vector"]  # the best may be earlier
    for step in (1, 3, 4, 7):  # within and at the end of an epoch, at and between checkpoints
        folder = tmp_path / str(step)
        _, none = fit(folder, rows, flags, val_set, stop=StopAfter(step))
        assert none is None and steps_in(folder)[-1] < 9
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 8, "loss": 1}\n{"torn')
        model, final = fit(folder, rows, flags, val_set)
        assert torch.equal(model.steering.vector, whole.steering.vector)
        assert torch.equal(checkpoint(folder, 9)["vector_state"]["vector"], last)
        assert steps_in(folder) == list(range(1, 10))
        assert final | timeless == wanted | timeless


def test_torn_and_foreign_checkpoints_are_passed_over(tmp_path, caplog):
    flags = "--max-steps 6 --save-every 2"
    rows = examples(9, 5, 14)
    whole, _ = fit(tmp_path, rows, flags)
    newest = tmp_path / "checkpoint-00006.pt"
    newest.write_bytes(newest.read_bytes()[:300])
    foreign = {"config": {"name": "y"}, "state": checkpoint(tmp_path, 4)}
    torch.save(foreign, tmp_path / "checkpoint-00005.pt")
    with caplog.at_level("WARNING", logger="steering"):
        model, _ = fit(tmp_path, rows, flags)
    assert torch.equal(model.steering.vector, whole.steering.vector)
    assert "checkpoint-00006.pt " in caplog.text
    assert "checkpoint-00005.pt belongs to other settings" in caplog.text
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_torn_newer_checkpoints_do_not_outlive_those_of_a_new_start(tmp_path):
    for step in (480, 490, 500):
        (tmp_path / f"checkpoint-{step:05d}.pt").write_bytes(b"torn")
    fit(tmp_path, examples(9, 5, 14), "--max-steps 6 --save-every 2")
    assert [path.name[-4:-3] for path in rf.checkpoints(tmp_path)] == ["2", "4", "6"]
    assert rn.newest_state(tmp_path, {"name": "x"}, {}).step == 6


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_can_go_on_whoever_listens(training, number, code):
    flags = ["--max-steps", "60", "--save-every", "1000"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_steering.py", *training.arguments, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # like `| head -0`: a console that goes away costs nothing
    done = []
    while 3 not in done:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
        with contextlib.suppress(ValueError, OSError):
            done = steps_in(training.folder)
    process.send_signal(number)
    assert process.wait(60) == code and process.stderr.read() == ""
    folder = training.folder
    done = steps_in(folder)
    assert [path.name for path in folder.glob("check*")] == [f"checkpoint-{done[-1]:05d}.pt"]
    assert not (folder / VECTOR_FILE).exists() and not (folder / "lock").exists()
    assert f"resume   after step {done[-1]} of 60" in training(" ".join(flags))
    assert steps_in(folder) == list(range(1, 61))
    assert (folder / "train.log").read_text().count("| loss ") == 60


def test_full_disk_is_a_failed_run_that_keeps_its_checkpoints(training, monkeypatch):
    real = os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    said = training(code=1)
    assert "No space left on device" in said and "Traceback" not in said
    folder = training.folder
    assert "Traceback" in (folder / "train.log").read_text()
    assert list(folder.glob("checkpoint-*")) and not list(folder.glob(".partial*"))
    assert not (folder / VECTOR_FILE).exists()
    monkeypatch.setattr(os, "fsync", real)
    assert "resume   after step" in training()


def test_second_process_on_a_run_folder_leaves(training, tiny_folder):
    folder = rf.run_path(training.output, tiny_folder, 1, "src__role__pirate")
    with rf.lock_folder(folder) as held:
        assert held
        assert "another process works in" in training()
        assert [path.name for path in folder.iterdir()] == ["lock"]
    assert not list(folder.iterdir())
    training()


def test_whatever_a_dataset_runs_into_the_next_one_is_trained(training, monkeypatch):
    real = ts.data_filter.split_dataset

    def breaks(name, *rest):
        if name.endswith("pirate"):
            raise KeyError("nobody thought of this")
        return real(name, *rest)

    monkeypatch.setattr(ts.data_filter, "split_dataset", breaks)
    said = training("--dataset src__role__pirate src__role__sailor", code=1)
    assert "FAILED   src__role__pirate: KeyError" in said
    assert read_vector(training.output, "src__role__sailor").any()


def test_run_in_which_processes_die_is_given_up_unless_it_gets_further(training):
    training()
    folder = training.folder
    record = training.record
    (folder / VECTOR_FILE).unlink()
    dead = {"status": "running", "attempts": rn.ATTEMPTS}
    write_json(folder / "run.json", record | dead | {"from_step": 6})
    assert "its process died 5 times in a row" in training(code=1)
    assert training.record["status"] == "failed"
    write_json(folder / "run.json", record | dead | {"from_step": 4})  # not where they died
    training()
    assert (folder / VECTOR_FILE).exists() and training.record["attempts"] == 1


@pytest.mark.parametrize("clock", [0, 2_000_000_000])  # of the file server: far behind, far ahead
def test_run_that_failed_elsewhere_since_the_sweep_began_is_passed_over(
    training, tiny_folder, monkeypatch, clock
):
    folder = rf.run_path(training.output, tiny_folder, 1, "src__role__sailor")
    real = ts.data_filter.split_dataset

    def meanwhile(name, *rest):
        if name.endswith("hopeless"):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", {"status": "failed", "dataset": "x"})
            os.utime(folder / "run.json", times=(clock, clock))
        return real(name, *rest)

    monkeypatch.setattr(ts.data_filter, "split_dataset", meanwhile)
    both = "--dataset src__role__hopeless src__role__sailor"
    assert "just failed there" in training(both, code=2)
    clock += 1  # another failure is another
    assert "just failed there" in training(both, code=2)
    assert not (folder / VECTOR_FILE).exists()
    training("--dataset src__role__sailor")  # a sweep that begins now tries it again
    assert (folder / VECTOR_FILE).exists()


def test_looking_at_a_lock_refuses_no_trainer(tmp_path):
    done = threading.Event()

    def look():
        while not done.is_set():
            rf.is_locked(tmp_path)
            time.sleep(0.001)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        lookers = [pool.submit(look) for _ in range(3)]
        try:
            for _ in range(200):
                with rf.lock_folder(tmp_path) as held:
                    assert held
        finally:
            done.set()
    assert all(looker.exception() is None for looker in lookers)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_one_line(training, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rf.fcntl, "flock", flock)
    said = training(code=2)
    assert "no lock to be had" in said and "--output-dir" in said and "Traceback" not in said


def test_writers_of_one_file_do_not_tear_it_and_leftovers_are_swept(tmp_path):
    path = tmp_path / "report.csv"
    texts = [bytes([65 + i]) * 300_000 for i in range(4)]

    def write(data):
        for _ in range(15):
            write_atomically(path, data)
            assert path.read_bytes() in texts

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert [file.name for file in tmp_path.iterdir()] == ["report.csv"]
    old = tmp_path / ".partial-1-1"
    new = tmp_path / ".partial-2-2"
    for file, age in ((old, 7200), (new, 0)):
        file.write_text("x")
        os.utime(file, times=(time.time() - age,) * 2)
    with rf.lock_folder(tmp_path):
        assert not old.exists() and new.exists()


# ---------------------------------------------------------------- many datasets, templates, input


def test_many_datasets_share_one_model_load_and_the_worst_code_counts(
    training, tmp_path, monkeypatch
):
    loads = []
    real = ts.load_from_options
    monkeypatch.setattr(ts, "load_from_options", lambda *given: loads.append(given) or real(*given))
    start = training.arguments.index("--dataset")
    del training.arguments[start : start + 2]
    listing = tmp_path / "roles.txt"
    names = ("0_default", "hopeless", "pirate", "sailor")
    listing.write_text("".join(f"src__role__{name}\n" for name in names))
    said = training(f"--list-file {listing}", code=2)
    assert "src__role__0_default: skipped, no examples: no scores" in said
    assert "src__role__hopeless: no example left to train on. 20 rows: 0 kept, 20 below" in said
    assert len(loads) == 1
    # Pirate and sailor hold the same rows in another order on disk: the same vector, also alone.
    assert torch.equal(read_vector(training.output, "src__role__sailor"), training.vector)
    skipped = the_folder(training.output, "src__role__0_default")
    assert [path.name for path in skipped.iterdir()] == ["run.json"]
    assert read_json(skipped / "run.json")["status"] == "skipped"
    training("--dataset src__role__0_default")
    assert "done already" in training("--source-model src --kind role --dataset pirate")


def test_run_resumed_on_another_day_keeps_its_date(training, tiny_folder, tmp_path, monkeypatch):
    template = tmp_path / "dated.jinja"
    text = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.content }}"
    template.write_text(text + "<|im_end|>{% endfor %}")
    days = ["2026-01-31"]
    prompts = []
    real = FastPath.cache_prefix

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(days[-1])

    def note(fast, rows, *rest):
        prompts.append(rows[0])
        return real(fast, rows, *rest)

    monkeypatch.setattr("steering.chat_format.datetime.date", Day)
    monkeypatch.setattr(FastPath, "cache_prefix", note)
    with monkeypatch.context() as patch:
        patch.setattr(ts, "StopRequest", lambda: StopAfter(3))
        training(f"--chat-template {template}", code=75)
    days.append("2026-02-01")
    training(f"--chat-template {template}")
    assert training.record["date"] == "2026-01-31"
    assert training.record["end_of_turn"] == "<|im_end|>"
    chat = hm.load_chat(tiny_folder, str(template))
    assert "01 Feb" in chat.tokenizer.decode(chat.encode([prompts[1].row])[0].input_ids)
    assert "31 Jan" in chat.tokenizer.decode(prompts[1].input_ids)


def test_a_template_without_end_of_turn_is_warned_of(training, tmp_path):
    template = tmp_path / "bare.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    said = training(f"--chat-template {template}")
    assert "WARNING: no special token ends a turn" in said
    assert training.record["end_of_turn"] == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--layer 99", "--layer 99 is out of range: {model} has 4 layers (use 0..3)"),
        ("--dataset src__role__pirat", "closest: src__role__pirate"),
        ("--dataset ../src__role__pirate", 'without "/" and ".."'),
        ("--dataset src__role__hopeless", "20 below threshold"),
        ("--model {here}/no/model", "no such file or folder"),
        ("--data-root {here}", "no known layout"),
        ("--output-dir {here}/broken.jinja", "cannot be written"),
        ("--heldout-fraction 0.999", "no example left to train on"),
        ("--max-length 3", "16 too long"),
        ("--device cuda", "no cuda device here"),
        ("--device gpu0", "not a device"),
        ("--chat-template {here}/broken.jinja", "the chat template fails on"),
        ("--source-model other", "found src__role"),
    ],
)
def test_bad_input_exits_2_before_a_model_loads(
    training, tiny_folder, tmp_path, monkeypatch, flags, said
):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(ts, "load_from_options", None)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}{{ m.content }}")
    (line,) = training(flags.format(here=tmp_path), code=2).strip().splitlines()
    assert said.format(model=tiny_folder) in line and "Traceback" not in line
    assert not training.output.exists()


def test_bad_flags_are_reported_all_at_once(capsys):
    flags = "--batch-size 0 --lr fast --warmup-ratio 1 --save-every -1 --init-scale nan"
    flags += " --target-tokens 0"
    with pytest.raises(SystemExit, match="2"):
        ts.main([*flags.split(), "--run-name", "../x"])
    error = capsys.readouterr().err
    for flag in flags.removeprefix("--").split(" --"):
        assert f"--{flag}" in error
    assert '--run-name "../x"' in error and "--dataset" in error


# ---------------------------------------------------------------- the real model


def test_training_lowers_nll_of_unseen_real_data_on_the_real_model(smol, tmp_path):
    flags = "--dataset sample__role__pirate --layer 12 --target-tokens 1000 --val-fraction 0.3"
    flags += " --max-steps 2 --val-every 2 --gradient-accumulation 1"
    where = ["--data-root", str(ROOT / "sample_data"), "--output-dir", str(tmp_path)]
    assert ts.main(["--model", smol, *where, *flags.split()]) == 0
    (folder,) = tmp_path.glob("*/layer12/sample__role__pirate")
    losses = metrics(folder, "val_loss")
    assert losses[-1] < losses[0] - 0.05
