"""run_all_roles.sh: the loop over a role list keeps going, and tells."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT, persona_rows, write_raw

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
        "# a comment\n\nsrc__role__nobody\n  src__role__pirate  # comment\nsrc__role__0_default\n"
        "src__role__travel agent"
    )
    rows, scores = persona_rows()
    write_raw(data_root, "travel agent", rows, scores)
    flags = ["--model", tiny_folder, "--layer", "1", "--max-steps", "2", "--device", "cpu"]
    result = loop(listing, tmp_path, *flags, DATA_ROOT=data_root)
    assert result.returncode == 1, result.stderr
    assert "failed: src__role__nobody" in result.stderr and "3 of 4 done" in result.stdout
    assert len(list(tmp_path.glob("runs/*/layer1/src__role__pirate/steering_vector.*"))) == 1
    (log,) = (tmp_path / "logs").glob("*-cpu.0.log")
    assert log.read_text().count("unknown dataset") == 2  # tried once more
    assert log.read_text().count("done     ") == 2  # and the others not
    assert len(list(tmp_path.glob("runs/*/layer1/src__role__travel agent/steering_vector.*"))) == 1
    assert "src__role__nobody" in (tmp_path / "logs" / "failed.txt").read_text()
    table = [line.split() for line in result.stdout.splitlines() if line.startswith("src__role")]
    names = ["src__role__0_default", "src__role__pirate", "src__role__travel"]
    assert [row[0] for row in table] == names
    assert table[0][-1] == "skipped" and (tmp_path / "runs" / "report.csv").exists()
    listing.write_text("src__role__pirate\nsrc__role__0_default\n")
    again = loop(listing, tmp_path, *flags, DATA_ROOT=data_root)
    assert again.returncode == 0
    assert "2 of 2 done or in work elsewhere, 0 to train" in again.stdout
    variables = {**os.environ, "PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs")}
    status = subprocess.run(
        ["bash", str(SCRIPT), "status"], env=variables, capture_output=True, text=True
    )
    assert "2 done / 0 running / 0 failed / 0 left of 2" in status.stdout, status.stderr
    assert loop(listing, tmp_path, "--layer", "99", DATA_ROOT=data_root).returncode == 2


STUB = f"""
import argparse, os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from steering.data_layouts import requested_names
"""
STUB += """
state = pathlib.Path(os.environ["STATE"])
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--list-file", "--write-todo", "--data-root", "--output-dir"):
    parser.add_argument(name)
parser.add_argument("--only", nargs="+")
parser.add_argument("--limit", type=int)
parser.set_defaults(dataset=None, source_model=None, kind=None)
args = parser.parse_args()
known = state / "known"  # datasets, where a name is not as plain as in most tests
datasets = dict.fromkeys(known.read_text().splitlines()) if known.exists() else {}
names = requested_names(datasets, args)
if args.write_todo:
    if (state / "broken").exists():
        sys.exit("error: the stub is broken")
    left = [name for name in names if not (state / name).exists()]
    pathlib.Path(args.write_todo).write_text("".join(name + "\\n" for name in left))
    print(f"{len(names) - len(left)} of {len(names)} done or in work elsewhere")
    sys.exit()
with open(state / "calls", "a") as calls:
    calls.write(os.environ.get("CUDA_VISIBLE_DEVICES", "unset") + "|" + "|".join(names) + "\\n")
code = 0
for name in names:
    try:
        lock = os.open(state / f"{name}.lock", os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        continue
    if name == "killer" and not (state / "killer.died").exists():
        (state / "killer.died").touch()
        (state / "killer.lock").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "dies":
        (state / "dies.lock").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "stop":
        sys.exit(75)
    if name == "slow":
        (state / "slow.pid").write_text(str(os.getpid()))
        time.sleep(60)
    if name == "bad":
        code = 1
        (state / "bad.lock").unlink()
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
    files = [path for path in (tmp_path / "state").iterdir() if not path.suffix]
    calls = tmp_path / "state" / "calls"
    calls = calls.read_text().splitlines() if calls.exists() else []
    return result, {p.name: len(p.read_text()) for p in files if p.name != "calls"}, calls


def test_workers_share_the_list_and_each_role_is_trained_once(tmp_path):
    names = [f"travel agent {i}" for i in range(25)]
    result, done, calls = stub_loop(tmp_path, names, GPUS="cpu,cpu,cpu")
    assert result.returncode == 0, result.stderr
    assert done == dict.fromkeys(names, 1)
    assert len(calls) == 3 and {call.split("|")[0] for call in calls} == {""}  # no GPU is visible
    assert "25 of 25 done" in result.stdout
    _, _, calls = stub_loop(tmp_path, ["one more"], GPUS="3")
    assert calls[-1] == "3|one more"


def test_killed_training_goes_on_and_failed_roles_are_tried_once_more(tmp_path):
    names = ["a", "killer", "b", "c", "bad", "d"]
    result, done, calls = stub_loop(tmp_path, names)
    assert result.returncode == 1 and done == dict.fromkeys(["a", "killer", "b", "c", "d"], 1)
    assert len(calls) == 3 and calls[-1] == "|bad"  # killed; the rest; what failed, once more
    assert "killed, exit code 137" in result.stdout
    failed = (tmp_path / "logs" / "failed.txt").read_text().splitlines()
    assert len(failed) == 1 and failed[0].endswith(" bad")


def test_names_can_be_chosen_and_looked_at_first(tmp_path):
    names = ["m__role__a", "m__trait__b", "m__role__c", "m__trait__d", "m__trait__e"]
    result, done, _ = stub_loop(tmp_path, names, DRY_RUN="1", ONLY="*__trait__*", LIMIT="2")
    assert result.returncode == 0 and not done
    assert "would train: m__trait__b\nwould train: m__trait__d\n" in result.stdout
    assert "m__trait__e" not in result.stdout and "m__role" not in result.stdout
    result, done, _ = stub_loop(tmp_path, names, ONLY="*__a *__e")
    assert set(done) == {"m__role__a", "m__trait__e"}


def test_tasks_of_an_array_share_the_whole_list_whatever_their_numbers(tmp_path):
    names = [f"r{i}" for i in range(5)]
    for task in ("7", "3"):  # --array=1,3,7
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": "1"}
        result, done, _ = stub_loop(tmp_path, names, SLURM_ARRAY_TASK_COUNT="3", **array)
        assert result.returncode == 0 and done == dict.fromkeys(names, 1)
    assert [path.name for path in (tmp_path / "logs").glob("*-task7-cpu.0.log")]


def test_stopped_role_stops_the_loop_and_usage_errors_exit_2(tmp_path):
    result, done, _ = stub_loop(tmp_path, ["a", "stop", "c"])
    assert result.returncode == 75 and set(done) == {"a"}
    assert loop(tmp_path / "none.txt", tmp_path).returncode == 2
    assert stub_loop(tmp_path, ["# nothing"])[0].returncode == 2
    (tmp_path / "list with spaces.txt").write_text("m__role__a")
    for option in ("--restart", "--dataset=x", "--list-file=x", "--write-todo=x"):
        refused = loop(tmp_path / "list with spaces.txt", tmp_path, option)
        assert refused.returncode == 2 and "is for train_steering.py alone" in refused.stderr
    for option, variable in (
        ("--output-dir", "OUTPUT_DIR"),
        ("--data-root=x", "DATA_ROOT"),
        ("--only", "ONLY"),
        ("--limit=3", "LIMIT"),
    ):  # what the loop, its evaluation and its report must know too
        refused = loop(tmp_path / "list with spaces.txt", tmp_path, option, "x")
        assert refused.returncode == 2 and f"set {variable}" in refused.stderr.replace(
            "ONLY or ", ""
        )
    abbreviated = loop(tmp_path / "list with spaces.txt", tmp_path, "--rest")
    assert abbreviated.returncode == 2 and "unrecognized arguments: --rest" in abbreviated.stderr
    assert loop("--help", tmp_path).returncode == loop("status", tmp_path / "new").returncode == 2
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


def test_the_list_may_be_a_pipe(data_root, tiny_folder, tmp_path):
    variables = {"PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs"), "DRY_RUN": "1"}
    variables |= {"OUTPUT_DIR": str(tmp_path / "runs"), "DATA_ROOT": data_root}
    command = f"bash {SCRIPT} <(printf 'src__role__pirate\\nsrc__role__sailor\\n' | head -1)"
    done = subprocess.run(
        ["bash", "-c", f"{command} --model {tiny_folder} --layer 1 --device cpu"],
        env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("1 to train\nwould train: src__role__pirate\n")


def test_a_name_that_comes_twice_counts_once(tmp_path):
    result, done, _ = stub_loop(tmp_path, ["b", "b", " b", "d"])
    assert result.returncode == 0 and done == {"b": 1, "d": 1} and "2 of 2 done" in result.stdout


def test_a_broken_driver_is_an_error_and_no_gpu_of_that_name(tmp_path):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'")
    fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result, done, calls = stub_loop(tmp_path, ["a"], GPUS="", PATH=path)
    assert result.returncode == 2 and not calls and "GPUS=cpu" in result.stderr
    fake.write_text("#!/bin/sh\nprintf '0\\n1\\n'")
    _, done, calls = stub_loop(tmp_path, ["a"], GPUS="", PATH=path)
    assert done == {"a": 1} and sorted(call[0] for call in calls) == ["0", "1"]


def test_processes_that_die_before_they_do_anything_are_given_up(tmp_path):
    result, done, calls = stub_loop(tmp_path, ["dies", "a"])
    assert result.returncode == 1 and not done and len(calls) == 40  # twice twenty
    assert "failed: dies" in result.stderr


def test_names_that_differ_after_a_hash_are_two(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "known").write_text("agent #1\nagent #2\n")
    _, done, _ = stub_loop(tmp_path, ["agent #1", "agent #2"])
    done.pop("known")
    assert done == {"agent #1": 1, "agent #2": 1}


def test_a_signal_during_the_evaluation_ends_it_and_requeues_the_job(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "list.txt").write_text("a\n")
    tools = {
        "python": f'[ "$1" = eval_steering.py ] || exec {sys.executable} "$@"\n'
        'echo $$ >"$STATE/eval.pid"; exec sleep 60',
        "scontrol": 'echo "$@" >"$STATE/requeued.txt"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"TRAIN": str(tmp_path / "stub.py"), "STATE": str(tmp_path / "state")}
    variables |= {"PYTHON": str(tmp_path / "python"), "LOG_DIR": str(tmp_path / "logs")}
    variables |= {"GPUS": "cpu", "EVAL": "--num-samples 0", "SLURM_JOB_ID": "17"}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUTPUT_DIR": str(tmp_path / "runs")}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(tmp_path / "list.txt")],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pid = tmp_path / "state" / "eval.pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75
    assert (tmp_path / "state" / "requeued.txt").read_text() == "requeue 17\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_script_that_cannot_tell_what_is_left_ends_the_loop_with_a_word(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "broken").touch()
    result, _, calls = stub_loop(tmp_path, ["a"])
    assert result.returncode == 2 and not calls
    assert "the stub is broken" in result.stderr and "what is left to do" in result.stderr


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_signals_end_a_training_that_does_not_listen_yet(tmp_path, number, code):
    """Such as one that still imports torch: the loop ends after it, not before."""
    (tmp_path / "state").mkdir()
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "list.txt").write_text("slow\nafter\n")
    variables = {"TRAIN": str(tmp_path / "stub.py"), "STATE": str(tmp_path / "state")}
    variables |= {"PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs"), "GPUS": "cpu,cpu"}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(tmp_path / "list.txt")],
        env={**os.environ, **variables, "OUTPUT_DIR": str(tmp_path / "runs")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pid = tmp_path / "state" / "slow.pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(20) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


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
