"""The judge against a real server on loopback, llama.cpp's with SmolLM2: make test-full."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, interop_python, persona_rows, serving, the_folder, write_raw

import train_steering as ts
from evaluation import judging

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
    subprocess.run([*evaluate], cwd=ROOT, check=True, capture_output=True)
    judge = [*evaluate, "--judge", address, "--judge-model", "smollm2", "--judge-workers", "2"]

    first = subprocess.Popen(judge, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    path, lines = run / "judgements.jsonl", []
    while len(lines) < 15:  # in the middle of some 60
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
        lines = path.read_bytes().splitlines() if path.exists() else []
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 130
    half = path.read_text().splitlines()

    second = subprocess.run(judge, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    print(second.stdout)
    result = json.loads((run / "eval.json").read_text())
    answers = judging.to_ask(result, "role")
    lines = path.read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert 15 <= len(half) < len(answers) == len(set(keys)) == len(keys)
    assert lines[: len(half)] == half
    assert result["judges"][0]["asked_now"] == len(answers) - len(half)
    asked = log.read_text().count("POST /v1/chat/completions")
    assert asked == len(answers)
    print(f"{len(half)} judged, interrupted, {len(answers) - len(half)} more; server saw {asked}")
