"""Runs that are killed lose nothing: their vectors are, byte for byte, those of undisturbed runs.

`make test` does two kills, `make test-full` twenty, and a sweep with kills, poison and a full disk.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Loop, persona_rows, steps_in, the_folder, write_raw

import train_steering as ts
from steering.run_folder import lock_folder, run_path
from steering.vector_file import VECTOR_FILE

STEPS = 40
OPTIONS = ["--layer", "1", "--device", "cpu", "--init-scale", "0.5", "--val-every", "7"]
OPTIONS += ["--max-steps", str(STEPS), "--save-every", "1"]


def command(data, model, output, *datasets):
    """The arguments of a short training that writes a checkpoint at every step."""
    where = ["--data-root", str(data), "--model", model, "--output-dir", str(output)]
    return [*where, *OPTIONS, "--dataset", *datasets]


def vector_files(root):
    """{dataset: bytes} of the vectors below a folder; every dataset must have one only."""
    files = list(root.rglob(VECTOR_FILE))
    found = {path.parent.name: path.read_bytes() for path in files}
    assert len(found) == len(files)
    return found


def kill_in_the_middle(arguments, folder, moment, writing):
    """Start a run, kill -9 it after `moment` new steps, or next time it writes a checkpoint.

    Returns whether it was killed before it had finished.
    """
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_steering.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )

    def steps():
        with contextlib.suppress(OSError):
            return (folder / "metrics.jsonl").read_text().count('"loss"')
        return 0

    before = steps()
    while process.poll() is None and steps() < before + moment:
        time.sleep(0.002)
    while writing and process.poll() is None and not list(folder.glob(".partial*")):
        pass
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.full)])
def test_killed_run_ends_with_the_same_vector_bit_for_bit(tiny_folder, tmp_path, count):
    dataset = write_raw(tmp_path / "data", "pirate", *persona_rows(24))
    assert ts.main(command(tmp_path / "data", tiny_folder, tmp_path / "quiet", dataset)) == 0
    rough = command(tmp_path / "data", tiny_folder, tmp_path / "rough", dataset)
    folder = run_path(tmp_path / "rough", tiny_folder, 1, dataset)
    pick = random.Random(count)
    kills = 0
    partial = set()
    while kills < count:
        moment = pick.randint(0, STEPS // count)
        if kill_in_the_middle(rough, folder, moment, writing=kills % 2 == 1):
            kills += 1
            partial |= {path.name for path in folder.glob(".partial*")}  # a file a kill
        else:  # it finished before it was killed: the next round starts from nothing
            shutil.rmtree(tmp_path / "rough")
    assert ts.main(rough) == 0
    assert steps_in(folder) == list(range(1, STEPS + 1))
    print(f"{kills} kills survived, {len(partial)} of them in the middle of writing a file")
    assert vector_files(tmp_path / "quiet") == vector_files(tmp_path / "rough")
    assert partial or count < 20
    # What a killed writer left behind is swept an hour later.
    for path in folder.glob(".partial*"):
        os.utime(path, times=(0, 0))
    with lock_folder(folder):
        assert not list(folder.glob(".partial*"))


def test_layers_of_several_personas_are_the_same_after_kills(tiny_folder, tmp_path):
    names = []
    for number in range(3):
        rows, scores = persona_rows(20 + number)
        names.append(write_raw(tmp_path / "data", f"role{number}", rows, scores))
    layers = ["--layer", "0", "1", "2", "--max-steps", "12"]
    quiet = command(tmp_path / "data", tiny_folder, tmp_path / "quiet", *names)
    assert ts.main([*quiet, *layers]) == 0
    rough = [*command(tmp_path / "data", tiny_folder, tmp_path / "rough", *names), *layers]
    for layer, name in ((1, names[0]), (2, names[1])):
        folder = run_path(tmp_path / "rough", tiny_folder, layer, name)
        assert kill_in_the_middle(rough, folder, 5, writing=False)
        assert not (folder / VECTOR_FILE).exists()
    assert ts.main(rough) == 0

    def vectors(root):
        return {path.relative_to(root): path.read_bytes() for path in root.rglob(VECTOR_FILE)}

    assert len(vectors(tmp_path / "quiet")) == 9
    assert vectors(tmp_path / "quiet") == vectors(tmp_path / "rough")


# ---------------------------------------------------------------- a whole sweep


@pytest.fixture
def disk(tmp_path):
    """A disk of 300 KiB; None if this machine does not let us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.full
def test_sweep_with_kills_poison_and_a_full_disk_loses_nothing(
    tiny_folder, tmp_path, disk, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # another number of threads sums in another order
    good = ["role__pirate", "role__noir_detective", "role__drill_sergeant", "trait__melodramatic"]
    good = [f"sample__{name}" for name in good]
    data = shutil.copytree(ROOT / "sample_data", tmp_path / "data")
    poison = data / "sample" / "roles_240"
    shutil.copy(poison / "responses" / "pirate.jsonl", poison / "responses" / "poison.jsonl")
    (poison / "extract_scores" / "poison.json").write_text('{"pos_p0_q0": 3, ')
    names = ["sample__role__poison", *good, "sample__role__0_default"]
    quiet = command(data, tiny_folder, tmp_path / "quiet", *good)
    subprocess.run([sys.executable, ROOT / "train_steering.py", *quiet], check=True)
    loop = Loop(tmp_path, DATA_ROOT=str(data), GPUS="cpu,cpu")
    options = ["--model", tiny_folder, *OPTIONS]

    # A disk that fills up: clear failures, nothing torn. Then there is room again.
    if disk:
        (disk / "ballast").write_bytes(bytes(230 * 1024))
        loop.run(names, *options, code=1, OUTPUT_DIR=str(disk / "runs"))
        shutil.copytree(disk / "runs", loop.output)  # what a user would go on from
    else:  # no file above 5 kB, which a checkpoint needs
        limited = tmp_path / "python"
        limited.write_text(f'#!/bin/sh\nulimit -f 10\nexec {sys.executable} "$@"\n')
        limited.chmod(0o755)
        loop.run(names, *options, code=1, PYTHON=str(limited))
    said = "".join(path.read_text() for path in loop.logs.glob("*.log"))
    assert "No space left" in said or "File too large" in said
    assert not list(loop.output.rglob(VECTOR_FILE))

    # Workers killed at random, while the sweep goes on.
    pick = random.Random(1)
    kills = 0
    process = loop.start(names, *options)
    workers = ["pgrep", "-f", f"train_steering.py.*{loop.output}.*/queue"]
    while process.poll() is None:
        time.sleep(pick.uniform(4, 8))
        found = subprocess.run(workers, capture_output=True, text=True).stdout.split()
        if found and kills < 4:  # fewer than one dataset may have
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pick.choice(found)), signal.SIGKILL)
                kills += 1
    printed, errors = process.communicate()
    print(printed, errors)
    assert process.returncode == 1 and "failed: sample__role__poison" in errors and kills >= 3
    vectors = vector_files(loop.output)
    print(f"{kills} workers killed; {len(vectors)} of {len(good)} vectors")
    loop.run(names, *options, code=1)  # again the poisoned one, and nothing else
    assert vectors == vector_files(loop.output) == vector_files(tmp_path / "quiet")
    for name in good:
        log = (the_folder(loop.output, name) / "train.log").read_text()
        assert log.count("\ndone ") == 1  # none was trained twice


@pytest.mark.full
def test_rerun_over_five_hundred_finished_names_does_nothing(tiny_folder, tmp_path):
    rows, scores = persona_rows(8)
    names = [write_raw(tmp_path / "data", f"r{i}", rows, scores) for i in range(500)]
    loop = Loop(tmp_path, DATA_ROOT=str(tmp_path / "data"))
    options = ["--model", tiny_folder, "--layer", "1", "--device", "cpu", "--max-steps", "1"]
    options += ["--init-scale", "0.1", "--val-fraction", "0"]
    loop.run(names, *options)
    assert len(vector_files(loop.output)) == 500
    (log,) = loop.logs.glob("*.log")
    before = log.read_text()
    assert before.count("loading  ") == 1
    started = time.perf_counter()
    printed, _ = loop.run(names, *options)
    print(f"{printed.strip()}; {time.perf_counter() - started:.1f} s")
    assert "500 of 500 done or in work elsewhere, 0 to train" in printed
    assert log.read_text() == before  # no training was started, so no model loaded
