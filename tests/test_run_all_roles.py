"""run_all_roles.sh: the loop over a role list keeps going, and tells."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = ROOT / "run_all_roles.sh"


def loop(listing, tmp_path, *extra, **environment):
    variables = {"PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs"), "GPUS": "cpu"}
    variables |= {"OUTPUT_DIR": str(tmp_path / "runs"), **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), str(listing), *extra],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_failing_role_is_reported_and_the_others_still_run(data_root, tiny_folder, tmp_path):
    listing = tmp_path / "roles.txt"
    listing.write_text(
        "# a comment\n\nsrc__role__nobody\n  src__role__pirate  # comment\nsrc__role__0_default"
    )
    flags = ["--model", tiny_folder, "--layer", "1", "--max-steps", "2", "--device", "cpu"]
    result = loop(listing, tmp_path, *flags, DATA_ROOT=data_root)
    assert result.returncode == 1, result.stderr
    assert "failed: src__role__nobody" in result.stderr and "2 of 3 done" in result.stdout
    assert len(list(tmp_path.glob("runs/*/layer1/src__role__pirate/steering_vector.*"))) == 1
    (log,) = (tmp_path / "logs").glob("*-cpu.0.log")
    assert log.read_text().count("unknown dataset") == 2  # tried once more
    assert log.read_text().count("done     ") == 1  # and the others not
    assert "src__role__nobody" in (tmp_path / "logs" / "failed.txt").read_text()
    table = [line.split() for line in result.stdout.splitlines() if line.startswith("src__role")]
    assert [row[0] for row in table] == ["src__role__0_default", "src__role__pirate"]
    assert table[0][-1] == "skipped" and (tmp_path / "runs" / "report.csv").exists()
    listing.write_text("src__role__pirate\nsrc__role__0_default\n")
    again = loop(listing, tmp_path, *flags, DATA_ROOT=data_root)
    assert again.returncode == 0 and "2 done or in work elsewhere, 0 to train" in again.stdout
    variables = {**os.environ, "PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs")}
    status = subprocess.run(
        ["bash", str(SCRIPT), "status"], env=variables, capture_output=True, text=True
    )
    assert "2 done / 0 running / 0 failed / 0 left of 2" in status.stdout, status.stderr
    assert loop(listing, tmp_path, "--layer", "99", DATA_ROOT=data_root).returncode == 2


STUB = """
import os, pathlib, signal, sys
state = pathlib.Path(os.environ["STATE"])
arguments = sys.argv[1:]
if "--print-todo" in arguments:
    names = pathlib.Path(arguments[arguments.index("--list-file") + 1]).read_text().split()
    print("".join(name + "\\n" for name in names if not (state / name).exists()), end="")
    sys.exit()
names = arguments[arguments.index("--dataset") + 1 :]
with open(state / "calls", "a") as calls:
    calls.write(" ".join(names) + "\\n")
code = 0
for name in names:
    if name == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "stop":
        sys.exit(75)
    if name == "bad":
        code = 1
    else:
        with open(state / name, "a") as file:
            file.write("x")
sys.exit(code)
"""


def stub_loop(tmp_path, names, **environment):
    """Run the loop with a stub for a training script: (result, {name: times done}, its calls)."""
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "stub.py").write_text(STUB)
    listing = tmp_path / "list with spaces.txt"
    listing.write_bytes("\r\n".join(names).encode())
    variables = {"TRAIN": str(tmp_path / "stub.py"), "STATE": str(tmp_path / "state")}
    result = loop(listing, tmp_path, **variables, **environment)
    files = [path for path in (tmp_path / "state").iterdir() if path.name != "calls"]
    calls = tmp_path / "state" / "calls"
    calls = calls.read_text().splitlines() if calls.exists() else []
    return result, {path.name: len(path.read_text()) for path in files}, calls


def test_workers_share_the_list_and_each_role_is_trained_once(tmp_path):
    names = [f"r{i}" for i in range(25)]
    result, done, calls = stub_loop(tmp_path, names, GPUS="cpu,cpu,cpu", ROLES_PER_LOAD="4")
    assert result.returncode == 0, result.stderr
    assert done == dict.fromkeys(names, 1)
    assert max(len(call.split()) for call in calls) == 4
    assert "25 of 25 done" in result.stdout


def test_killed_training_gives_its_roles_back(tmp_path):
    names = ["a", "killer", "b", "c", "bad", "d"]
    result, done, calls = stub_loop(tmp_path, names, ROLES_PER_LOAD="6")
    assert result.returncode == 1 and done == dict.fromkeys("abcd", 1)
    tried = " ".join(calls).split()
    assert tried.count("killer") == 5
    failed = (tmp_path / "logs" / "failed.txt").read_text()
    assert failed.count("killer, exit code 137") == failed.count("bad, exit code 1") == 1


def test_names_can_be_chosen_and_looked_at_first(tmp_path):
    names = ["m__role__a", "m__trait__b", "m__role__c", "m__trait__d", "m__trait__e"]
    result, done, _ = stub_loop(tmp_path, names, DRY_RUN="1", ONLY="*__trait__*", LIMIT="2")
    assert result.returncode == 0 and not done
    assert "would train: m__trait__b\nwould train: m__trait__d\n" in result.stdout
    assert "m__trait__e" not in result.stdout and "m__role" not in result.stdout
    result, done, _ = stub_loop(tmp_path, names, ONLY="*__a *__e")
    assert set(done) == {"m__role__a", "m__trait__e"}


def test_slurm_array_tasks_shard_the_list(tmp_path):
    names = [f"r{i}" for i in range(10)]
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}
    seen = []
    for task in "012":
        _, done, _ = stub_loop(tmp_path, names, SLURM_ARRAY_TASK_ID=task, **array)
        seen.append(len(done))
    assert done == dict.fromkeys(names, 1) and seen == [4, 7, 10]


def test_stopped_role_stops_the_loop_and_usage_errors_exit_2(tmp_path):
    result, done, _ = stub_loop(tmp_path, ["a", "stop", "c"], ROLES_PER_LOAD="1")
    assert result.returncode == 75 and set(done) == {"a"}
    assert loop(tmp_path / "none.txt", tmp_path).returncode == 2
    assert stub_loop(tmp_path, ["# nothing"])[0].returncode == 2
    refused = loop(tmp_path / "list with spaces.txt", tmp_path, "--restart")
    assert refused.returncode == 2 and "--restart" in refused.stderr
    assert loop("--help", tmp_path).returncode == loop("status", tmp_path / "new").returncode == 2
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("whole_group", [True, False])
def test_sigterm_saves_a_checkpoint_and_the_loop_exits_75(
    data_root, tiny_folder, tmp_path, whole_group
):
    listing = tmp_path / "roles.txt"
    listing.write_text("src__role__pirate\nsrc__role__sailor\n")
    flags = ["--model", tiny_folder, "--layer", "1", "--max-steps", "400", "--save-every", "1000"]
    variables = {"PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs")}
    variables |= {"OUTPUT_DIR": str(tmp_path / "runs"), "DATA_ROOT": data_root}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(listing), *flags, "--device", "cpu"],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not any('"step": 2' in path.read_text() for path in tmp_path.rglob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    send = os.killpg if whole_group else os.kill  # as schedulers do, or by hand
    send(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert len(list(tmp_path.rglob("checkpoint-*"))) == 1  # written before the loop has ended
    assert not list(tmp_path.rglob("lock")) and not list(tmp_path.glob("runs/**/*sailor*"))
