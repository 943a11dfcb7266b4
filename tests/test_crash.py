"""Runs that are killed lose nothing: their vectors are, byte for byte, those of undisturbed runs.

`make test` does a few kills, `make test-full` twenty, and a sweep with kills, poison and a full
disk.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, persona_rows, write_raw

from steering.run_folder import lock_folder
from steering.vector_file import VECTOR_FILE

STEPS = 40


def train(data, model, output, *more):
    """The command of a short run that writes a checkpoint at every step."""
    options = ["--data-root", data, "--model", model, "--output-dir", output, "--layer", "1"]
    options += ["--device", "cpu", "--init-scale", "0.5", "--max-steps", STEPS, "--save-every", 1]
    return [sys.executable, "train_steering.py", *map(str, [*options, "--val-every", 7, *more])]


def run(command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def vector_files(root):
    """{dataset: bytes} of the vectors below a folder; every dataset must have one only."""
    files = list(Path(root).rglob(VECTOR_FILE))
    found = {path.parent.name: path.read_bytes() for path in files}
    assert len(found) == len(files)
    return found


def kill_in_the_middle(command, folder, moment, writing):
    """Start a run, kill -9 it after `moment` new steps, or next time it writes a checkpoint.

    Returns whether it was killed before it had finished.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    metrics = folder / "metrics.jsonl"

    def steps():
        with contextlib.suppress(OSError):
            return metrics.read_text().count('"loss"')
        return 0

    before = steps()
    while process.poll() is None and steps() < before + moment:
        time.sleep(0.002)
    while writing and process.poll() is None and not list(folder.glob(".partial*")):
        pass
    process.kill()
    return process.wait() == -signal.SIGKILL


def check_kills(count, tiny_folder, tmp_path):
    rows, scores = persona_rows(24)
    write_raw(tmp_path / "data", "pirate", rows, scores)
    quiet = train(
        tmp_path / "data", tiny_folder, tmp_path / "quiet", "--dataset", "src__role__pirate"
    )
    assert run(quiet).returncode == 0
    (folder,) = Path(tmp_path / "quiet").glob("*/layer1/*")
    rough = train(
        tmp_path / "data", tiny_folder, tmp_path / "rough", "--dataset", "src__role__pirate"
    )
    target = tmp_path / "rough" / folder.relative_to(tmp_path / "quiet")
    pick, kills, partial = random.Random(count), 0, set()
    while kills < count:
        moment, writing = pick.randint(0, max(1, STEPS // count)), kills % 2 == 1
        if kill_in_the_middle(rough, target, moment, writing):
            kills += 1
            partial |= {path.name for path in target.glob(".partial*")}  # a file a kill
        else:  # it finished before it was killed: the next round starts from nothing
            shutil.rmtree(tmp_path / "rough")
    assert run(rough).returncode == 0
    steps = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, STEPS + 1))
    different = vector_files(tmp_path / "quiet") != vector_files(tmp_path / "rough")
    print(
        f"{kills} kills survived, {len(partial)} of them in the middle of writing a file; ", end=""
    )
    print(f"vectors lost 0, vectors different {int(different)}")
    assert not different and (partial or count < 20)
    # What a killed writer left behind is swept an hour later.
    for path in target.glob(".partial*"):
        os.utime(path, times=(0, 0))
    with lock_folder(target):
        assert not list(target.glob(".partial*"))


def test_killed_run_ends_with_the_same_vector_bit_for_bit(tiny_folder, tmp_path):
    check_kills(3, tiny_folder, tmp_path)


@pytest.mark.full
def test_run_killed_twenty_times_ends_with_the_same_vector_bit_for_bit(tiny_folder, tmp_path):
    check_kills(20, tiny_folder, tmp_path)


# ---------------------------------------------------------------- a whole sweep


def small_disk(folder):
    """Mount a tmpfs of 300 KiB there; None if this machine does not let us."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    return folder if subprocess.run(mount, capture_output=True).returncode == 0 else None


@pytest.fixture
def disk(tmp_path):
    folder = small_disk(tmp_path / "disk")
    yield folder
    if folder:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.full
def test_sweep_with_kills_poison_and_a_full_disk_loses_nothing(tiny_folder, tmp_path, disk):
    good = ["role__pirate", "role__noir_detective", "role__drill_sergeant", "trait__melodramatic"]
    good = [f"sample__{name}" for name in good]
    shutil.copytree(ROOT / "sample_data", tmp_path / "data")
    poison = tmp_path / "data" / "sample" / "roles_240"
    shutil.copy(poison / "responses" / "pirate.jsonl", poison / "responses" / "poison.jsonl")
    (poison / "extract_scores" / "poison.json").write_text('{"pos_p0_q0": 3, ')
    listing = tmp_path / "roles.txt"
    listing.write_text("\n".join(["sample__role__poison", *good, "sample__role__0_default"]) + "\n")
    quiet = train(tmp_path / "data", tiny_folder, tmp_path / "quiet", "--dataset", *good)
    one = {"OMP_NUM_THREADS": "1"}  # another number of threads sums in another order
    assert run(quiet, env={**os.environ, **one}).returncode == 0

    def sweep(output, python=sys.executable):
        variables = {"PYTHON": str(python), "LOG_DIR": str(tmp_path / "logs"), "GPUS": "cpu,cpu"}
        variables |= {"OUTPUT_DIR": str(output), "DATA_ROOT": str(tmp_path / "data")}
        start = quiet.index("--layer")
        options = ["--model", tiny_folder, *quiet[start : quiet.index("--dataset")]]
        command = ["bash", "run_all_roles.sh", str(listing), *options]
        variables = {**os.environ, **variables, **one}
        log = open(tmp_path / "sweep.log", "a")  # noqa: SIM115 (for its child)
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)

    # A disk that fills up: clear failures, nothing torn. Then there is room again.
    output = tmp_path / "rough"
    if disk:
        (disk / "ballast").write_bytes(bytes(230 * 1024))
        assert sweep(disk / "runs").wait() == 1
        shutil.copytree(disk / "runs", output)  # what a user would go on from
    else:  # no file above 5 kB, which a checkpoint needs
        limited = tmp_path / "python"
        limited.write_text(f'#!/bin/sh\nulimit -f 10\nexec {sys.executable} "$@"\n')
        limited.chmod(0o755)
        assert sweep(output, limited).wait() == 1
    said = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))
    assert "No space left" in said or "File too large" in said
    assert not list(output.rglob(VECTOR_FILE))
    # Workers killed at random, while the sweep goes on.
    pick, kills = random.Random(1), 0
    process = sweep(output)
    while process.poll() is None:
        time.sleep(pick.uniform(4, 8))
        found = run(["pgrep", "-f", f"train_steering.py.*{output}.*/queue"]).stdout.split()
        if found and kills < 4:  # fewer than one dataset may have
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pick.choice(found)), signal.SIGKILL)
                kills += 1
    assert process.returncode == 1  # the poisoned one
    said = (tmp_path / "sweep.log").read_text()
    print(said)
    vectors = vector_files(output)
    again = sweep(output)  # again the poisoned one, and nothing else
    assert again.wait() == 1 and vectors == vector_files(output)
    assert "failed: sample__role__poison" in said and kills >= 3
    print(f"{kills} workers killed; {len(vectors)} of {len(good)} vectors")
    assert vectors == vector_files(tmp_path / "quiet")
    logs = {name: next(output.glob(f"*/layer1/{name}/train.log")).read_text() for name in good}
    assert all(text.count("\ndone ") == 1 for text in logs.values())  # none was trained twice


@pytest.mark.full
def test_rerun_over_five_hundred_finished_names_does_nothing(tiny_folder, tmp_path):
    rows, scores = persona_rows(8)
    names = [write_raw(tmp_path / "data", f"r{i}", rows, scores) for i in range(500)]
    listing = tmp_path / "roles.txt"
    listing.write_text("\n".join(names))
    options = ["--model", tiny_folder, "--layer", "1", "--device", "cpu", "--max-steps", "1"]
    options += ["--init-scale", "0.1", "--val-fraction", "0"]
    variables = {"PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs"), "GPUS": "cpu"}
    variables |= {"OUTPUT_DIR": str(tmp_path / "runs"), "DATA_ROOT": str(tmp_path / "data")}
    variables = {**os.environ, **variables}
    command = ["bash", "run_all_roles.sh", str(listing), *options]
    first = run(command, env=variables)
    assert first.returncode == 0 and len(vector_files(tmp_path / "runs")) == 500, first.stderr
    (log,) = (tmp_path / "logs").glob("*.log")
    before = log.read_text()
    assert before.count("loading  ") == 1
    started = time.perf_counter()
    again = run(command, env=variables)
    print(f"{again.stdout.strip()}; {time.perf_counter() - started:.1f} s")
    assert (
        again.returncode == 0 and "500 of 500 done or in work elsewhere, 0 to train" in again.stdout
    )
    assert log.read_text() == before  # no training was started, so no model loaded
