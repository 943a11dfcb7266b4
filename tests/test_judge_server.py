"""The judge against a real server on loopback, llama.cpp's with SmolLM2: make test-full."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, interop_python, persona_rows, serving, the_folder, write_raw

import train_steering as ts
from steering.files import read_json

pytestmark = pytest.mark.full


@pytest.fixture
def server(packaged_gguf, tmp_path):
    """(address, log) of a llama.cpp server that has answered."""
    log = tmp_path / "server.log"
    python = interop_python("llama-cpp-python")
    where = ["--model", packaged_gguf, "--host", "127.0.0.1", "--n_ctx", 2048, "--port"]
    with serving([python, "-m", "llama_cpp.server", *where], log) as address:
        yield f"{address}/v1", log


def test_interrupted_judge_run_continues_and_judges_nothing_twice(server, tiny_folder, tmp_path):
    address, log = server
    rows, scores = persona_rows(60)
    write_raw(tmp_path / "data", "pirate", rows, scores)
    assert ts.main(command(str(tmp_path / "data"), tiny_folder, tmp_path / "runs")) == 0
    run = the_folder(tmp_path / "runs")
    evaluate = [sys.executable, "eval_steering.py", "--run", str(run), "--max-new-tokens", "30"]
    evaluate += ["--num-samples", "2", "--scales", "1"]
    subprocess.run(evaluate, cwd=ROOT, check=True, capture_output=True)
    judge = [*evaluate, "--judge", address, "--judge-model", "smollm2", "--judge-workers", "2"]

    first = subprocess.Popen(judge, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path = run / "judgements.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 15:  # in the middle of some 60
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 130
    half = path.read_text().splitlines()

    second = subprocess.run(judge, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    (report,) = read_json(run / "eval.json")["judges"]
    lines = path.read_text().splitlines()
    assert lines[: len(half)] == half and len({json.loads(line)["key"] for line in lines}) == len(
        lines
    )
    assert report["asked_now"] == len(lines) - len(half) > 0 and report["failed"] == 0
    asked = log.read_text().count("POST /v1/chat/completions")
    trials = 2  # one a call; and replies without a clear score are asked for once more
    assert len(lines) + trials <= asked <= 2 * len(lines) + trials
    print(f"{len(half)} judged, interrupted, {report['asked_now']} more; server saw {asked}")
