"""run_all_roles.sh: the loop over a role list keeps going, and tells."""

import os
import signal
import stat
import subprocess
import sys

import pytest
from conftest import ROOT, Loop, persona_rows, wait_until, write_raw

SCRIPT = ROOT / "run_all_roles.sh"
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
    left = [name for name in names if not (state / f"{name}.done").exists()]
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
    if name == "dies" or (name == "killer" and not (state / "killer.died").exists()):
        (state / f"{name}.died").touch()
        (state / f"{name}.lock").unlink()
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
        with open(state / f"{name}.done", "a") as file:
            file.write("x")
sys.exit(code)
"""


class StubLoop(Loop):
    """The loop with a stub in place of the training script."""

    def __init__(self, folder):
        self.state = folder / "state"
        self.state.mkdir()
        (folder / "stub.py").write_text(STUB)
        super().__init__(folder, TRAIN=str(folder / "stub.py"), STATE=str(self.state))

    @property
    def calls(self):
        """A line for each training process: its GPU, and the names it was given."""
        path = self.state / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def done(self):
        """{name: how often it was trained}."""
        return {path.stem: len(path.read_text()) for path in self.state.glob("*.done")}


@pytest.fixture
def loop(tmp_path):
    return StubLoop(tmp_path)


def program(path, text):
    """Put a shell script there."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_workers_share_the_list_and_each_role_is_trained_once(loop):
    names = [f"travel agent {i}" for i in range(25)]
    printed, _ = loop.run(names, GPUS="cpu,cpu,cpu")
    assert loop.done() == dict.fromkeys(names, 1) and "25 of 25 done" in printed
    assert len(loop.calls) == 3 and {call[0] for call in loop.calls} == {"|"}  # no GPU is visible
    loop.run(["one more"], GPUS="3")
    assert loop.calls[-1] == "3|one more"


def test_killed_training_goes_on_and_failed_roles_are_tried_once_more(loop):
    printed, _ = loop.run(["a", "killer", "b", "c", "bad", "d"], code=1)
    assert loop.done() == dict.fromkeys(["a", "killer", "b", "c", "d"], 1)
    assert len(loop.calls) == 3 and loop.calls[-1] == "|bad"  # killed; the rest; what failed
    assert "killed, exit code 137" in printed
    (failed,) = (loop.logs / "failed.txt").read_text().splitlines()
    assert failed.endswith(" bad")


def test_processes_that_die_before_they_do_anything_are_given_up(loop):
    _, errors = loop.run(["dies", "a"], code=1)
    assert not loop.done() and len(loop.calls) == 40  # twice twenty
    assert "failed: dies" in errors


def test_names_can_be_chosen_and_looked_at_first(loop):
    names = ["m__role__a", "m__trait__b", "m__role__c", "m__trait__d", "m__trait__e"]
    printed, _ = loop.run(names, DRY_RUN="1", ONLY="*__trait__*", LIMIT="2")
    assert not loop.done()
    assert printed.endswith("would train: m__trait__b\nwould train: m__trait__d\n")
    assert printed.count("would train") == 2
    assert not (loop.logs / "names").exists()  # of which `status` would tell
    loop.run(names, ONLY="*__a *__e")
    assert {*loop.done()} == {"m__role__a", "m__trait__e"}


def test_the_list_may_be_a_pipe(loop):
    line = f"bash {SCRIPT} <(printf 'pirate\\nsailor\\n' | head -1)"
    environment = os.environ | loop.environment | {"DRY_RUN": "1"}
    printed = subprocess.check_output(["bash", "-c", line], env=environment, text=True)
    assert printed.endswith("would train: pirate\n") and printed.count("would train") == 1


def test_a_name_that_comes_twice_counts_once_and_names_that_differ_after_a_hash_are_two(loop):
    (loop.state / "known").write_text("agent #1\nagent #2\n")
    printed, _ = loop.run(["b", "b", " b", "agent #1", "agent #2", "# b"])
    assert loop.done() == {"b": 1, "agent #1": 1, "agent #2": 1} and "3 of 3 done" in printed


def test_tasks_of_an_array_share_the_whole_list_whatever_their_numbers(loop):
    names = [f"r{i}" for i in range(5)]
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    for task in ("7", "3"):  # --array=1,3,7
        loop.run(names, SLURM_ARRAY_TASK_ID=task, **array)
        assert loop.done() == dict.fromkeys(names, 1)
    assert list(loop.logs.glob("*-task7-cpu.0.log"))


def test_a_broken_driver_is_an_error_and_no_gpu_of_that_name(loop, tmp_path):
    program(tmp_path / "nvidia-smi", "echo 'Failed to initialize NVML: version mismatch'")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "GPUS=cpu" in loop.run(["a"], code=2, GPUS="", PATH=path)[1] and not loop.calls
    program(tmp_path / "nvidia-smi", "printf '0\\n1\\n'")
    loop.run(["a"], GPUS="", PATH=path)
    assert loop.done() == {"a": 1} and sorted(call[0] for call in loop.calls) == ["0", "1"]


def test_a_script_that_cannot_tell_what_is_left_ends_the_loop_with_a_word(loop):
    (loop.state / "broken").touch()
    _, errors = loop.run(["a"], code=2)
    assert not loop.calls
    assert "the stub is broken" in errors and "what is left to do" in errors


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--restart", "is for train_steering.py alone"),
        ("--dataset=x", "is for train_steering.py alone"),
        ("--list-file=x", "is for train_steering.py alone"),
        ("--write-todo=x", "is for train_steering.py alone"),
        ("--output-dir", "set OUTPUT_DIR"),  # the loop, its evaluation and report must know these
        ("--data-root=x", "set DATA_ROOT"),
        ("--only", "set ONLY"),
        ("--limit=3", "set LIMIT"),
        ("--rest", "unrecognized arguments: --rest"),  # no abbreviation
    ],
)
def test_options_that_the_loop_gives_or_must_know_are_refused(loop, option, said):
    assert said in loop.run(["m__role__a"], option, code=2)[1]


def test_usage_errors_exit_2(loop):
    loop.run(["# nothing"], code=2)
    for command in ("none.txt", "--help", "status"):  # of a sweep that never was
        loop.run(command, code=2)
    assert SCRIPT.stat().st_mode & stat.S_IXUSR


# ---------------------------------------------------------------- signals


def test_stopped_role_stops_the_loop(loop):
    loop.run(["a", "stop", "c"], code=75)
    assert {*loop.done()} == {"a"}


def ends_in(process, code, pid_file):
    """Assert that the loop ends with a code, and after the process whose id is in the file."""
    assert process.wait(20) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_signals_end_a_training_that_does_not_listen_yet(loop, number, code):
    """Such as one that still imports torch: the loop ends after it, not before."""
    process = loop.start(["slow", "after"], GPUS="cpu,cpu")
    pid = loop.state / "slow.pid"
    wait_until(lambda: pid.exists() and pid.read_text(), process)
    os.killpg(process.pid, number)  # as a terminal does
    ends_in(process, code, pid)


def test_a_signal_during_the_evaluation_ends_it_and_requeues_the_job(loop, tmp_path):
    evaluation = 'echo $$ >"$STATE/eval.pid"; exec sleep 60'
    training = f'exec {sys.executable} "$@"'
    python = f'if [ "$1" = eval_steering.py ]; then {evaluation}; else {training}; fi'
    program(tmp_path / "scontrol", 'echo "$@" >"$STATE/requeued.txt"')
    process = loop.start(
        ["a"],
        PYTHON=program(tmp_path / "python", python),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        EVAL="--num-samples 0",
        SLURM_JOB_ID="17",
    )
    pid = loop.state / "eval.pid"
    wait_until(lambda: pid.exists() and pid.read_text(), process)
    process.send_signal(signal.SIGUSR1)
    ends_in(process, 75, pid)
    assert (loop.state / "requeued.txt").read_text() == "requeue 17\n"


# ---------------------------------------------------------------- with the training itself


def test_failing_role_is_reported_and_the_others_still_run(data_root, tiny_folder, tmp_path):
    write_raw(data_root, "travel agent", *persona_rows())
    loop = Loop(tmp_path, DATA_ROOT=data_root)
    flags = ["--model", tiny_folder, "--layer", "1", "--max-steps", "2", "--device", "cpu"]
    names = ["nobody", "  src__role__pirate  # comment", "src__role__0_default"]
    printed, errors = loop.run(
        ["# a comment", "", *names, "src__role__travel agent"], *flags, code=1
    )
    assert "failed: nobody" in errors and "3 of 4 done" in printed
    assert "nobody" in (loop.logs / "failed.txt").read_text()
    vectors = loop.output.glob("*/layer1/*/steering_vector.safetensors")
    assert {path.parent.name for path in vectors} == {
        "src__role__pirate",
        "src__role__travel agent",
    }
    (log,) = loop.logs.glob("*-cpu.0.log")
    assert log.read_text().count("is not of the form") == 2  # tried once more
    assert log.read_text().count("done     ") == 2  # and the others not
    assert (loop.output / "report.csv").exists()
    rows = [line.split() for line in printed.splitlines() if line.startswith("src__role")]
    names = ["src__role__0_default", "src__role__pirate", "src__role__travel"]
    assert [row[0] for row in rows] == names and rows[0][-1] == "skipped"
    assert "3 done / 0 running / 0 failed / 1 left of 4" in loop.run("status")[0]


@pytest.mark.parametrize("send", [os.killpg, os.kill])  # as schedulers do, or by hand
def test_sigterm_saves_a_checkpoint_and_the_loop_exits_75(data_root, tiny_folder, tmp_path, send):
    loop = Loop(tmp_path, DATA_ROOT=data_root)
    flags = ["--model", tiny_folder, "--layer", "1", "--max-steps", "400", "--save-every", "1000"]
    process = loop.start(["src__role__pirate", "src__role__sailor"], *flags, "--device", "cpu")

    def in_loop():
        return any('"step": 2' in path.read_text() for path in tmp_path.rglob("metrics.jsonl"))

    wait_until(in_loop, process)
    send(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert len(list(tmp_path.rglob("checkpoint-*"))) == 1  # written before the loop has ended
    assert not list(tmp_path.rglob("lock")) and not list(tmp_path.glob("runs/**/*sailor*"))
