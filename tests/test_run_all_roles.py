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
    variables = {"PYTHON": sys.executable, "LOG_DIR": str(tmp_path / "logs")}
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
        "# a comment\n\nsrc__role__nobody\n  src__role__pirate  # with a comment\nsrc__role__sailor"
    )
    flags = ["--model", tiny_folder, "--layer", "1", "--max-steps", "2", "--device", "cpu"]
    result = loop(listing, tmp_path, *flags, DATA_ROOT=data_root)
    assert result.returncode == 1, result.stderr
    assert "failed: src__role__nobody" in result.stderr and "2 of 3 done" in result.stdout
    for role in ("pirate", "sailor"):
        assert len(list(tmp_path.glob(f"runs/*/layer1/src__role__{role}/steering_vector.*"))) == 1
        assert "done     " in (tmp_path / "logs" / f"src__role__{role}.log").read_text()
    assert "unknown dataset" in (tmp_path / "logs" / "src__role__nobody.log").read_text()
    listing.write_text("src__role__sailor\n")
    again = loop(listing, tmp_path, *flags, DATA_ROOT=data_root)
    assert again.returncode == 0 and "done already" in again.stdout


def test_stopped_role_stops_the_loop_and_usage_errors_exit_2(tmp_path):
    stub = tmp_path / "stub.py"
    stub.write_text("import sys; print(sys.argv); sys.exit(75 if 'b' in sys.argv else 0)\n")
    listing = tmp_path / "list with spaces.txt"
    listing.write_bytes(b"a\r\nb\r\nc\r\n")
    result = loop(listing, tmp_path, "--lr", "0.1", TRAIN=str(stub))
    assert result.returncode == 75 and not (tmp_path / "logs" / "c.log").exists()
    assert "'--lr', '0.1'" in (tmp_path / "logs" / "a.log").read_text()
    assert loop(tmp_path / "none.txt", tmp_path).returncode == 2
    listing.write_text("# nothing\n")
    assert loop(listing, tmp_path).returncode == 2
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
