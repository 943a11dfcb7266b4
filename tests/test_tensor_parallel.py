"""--tensor-parallel: processes of torchrun that share a model train the vector of a single one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, read_vector, steps_in, the_folder, tiny
from safetensors.torch import load_file, save_file

import train_steering as ts
from steering.loading import load_tokenizer

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(count, argv):
    """torchrun of the training script with so many processes."""
    line = [*TORCHRUN, str(count), "train_steering.py", *argv, "--tensor-parallel"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=ENV, start_new_session=True, **pipe)


def finished(process, seconds=100):
    """(exit code, what it said) of a process; it is killed after so many seconds."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.fixture(scope="module")
def folders(smol, tmp_path_factory):
    """{architecture: folder of a tiny model}."""
    tokenizer = load_tokenizer(smol)
    found = {}
    for architecture in ("qwen3", "llama"):
        path = tmp_path_factory.mktemp("models") / architecture
        tiny(architecture, vocab_size=len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        found[architecture] = str(path)
    return found


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_two_processes_train_the_vector_of_one_and_go_on_where_they_were_killed(
    architecture, folders, data_root, tmp_path
):
    assert ts.main(command(data_root, folders[architecture], tmp_path / "one")) == 0
    argv = command(data_root, folders[architecture], tmp_path / "two")
    code, said = finished(start(2, argv))
    assert code == 0, said
    assert said.count("done     best val") == 1  # one rank speaks, and writes
    one = read_vector(tmp_path / "one")
    two = read_vector(tmp_path / "two")
    assert (one - two).norm() < 1e-3 * one.norm()
    there = the_folder(tmp_path / "two")
    assert steps_in(there) == steps_in(the_folder(tmp_path / "one"))

    # From the checkpoint of step 4 on: the same vector, bit for bit.
    for file in ("steering_vector.safetensors", "checkpoint-00006.pt"):
        (there / file).unlink()
    code, said = finished(start(2, argv))
    assert code == 0 and "resume   after step 4" in said
    assert torch.equal(read_vector(tmp_path / "two"), two)


def test_each_process_has_half_of_the_layers(folders, tmp_path):
    script = tmp_path / "share.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from hook_model import load_from_options
from steering import ranks
ranks.start("cpu")
from steering.loading import LoadOptions
for folder in {[*folders.values()]!r}:
    options = LoadOptions(folder, "fp32", "cpu", tensor_parallel=True)
    layers = load_from_options(options, 1).layers
    local = [p.to_local() if hasattr(p, "to_local") else p for p in layers.parameters()]
    share = sum(p.numel() for p in local) / sum(p.numel() for p in layers.parameters())
    smallest, largest = ranks.least(share), -ranks.least(-share)
    if ranks.rank() == 0:
        print("share", smallest, largest, flush=True)
""")
    line = [*TORCHRUN, "2", str(script)]
    said = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=100).stdout
    shares = re.findall(r"^share (\S+) (\S+)$", said, re.MULTILINE)
    assert len(shares) == 2
    for smallest, largest in shares:
        assert 0.45 < float(smallest) <= float(largest) < 0.55


def children_of(process):
    """The ids of the ranks that torchrun has started."""
    return subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()


def read_until_resumed(process):
    for line in process.stdout:
        if "resume   after step" in line:
            return


def test_killed_rank_ends_all_and_the_same_command_goes_on(data_root, tiny_folder, tmp_path):
    argv = command(data_root, tiny_folder, tmp_path, "--save-every", "5")
    argv[argv.index("--max-steps") + 1] = "100000"
    process = start(2, argv)
    while not list(tmp_path.rglob("checkpoint-*.pt")):
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(int(children_of(process)[-1]), signal.SIGKILL)
    code, said = finished(process, 100)
    assert code != 0 and "Signal 9 (SIGKILL)" in said
    assert not list(tmp_path.rglob("steering_vector.safetensors"))
    process = start(2, argv)
    read_until_resumed(process)
    process.terminate()  # a checkpoint, and the end
    code, said = finished(process, 100)
    assert "by a signal after step" in said

    process = start(2, argv)  # torchrun itself is killed: nobody is left behind
    read_until_resumed(process)
    children = children_of(process)
    assert len(children) == 2
    process.kill()
    deadline = time.time() + 30
    while left := [child for child in children if Path("/proc", child).exists()]:
        assert time.time() < deadline, left
        time.sleep(0.2)


def test_what_it_needs_is_said(data_root, tiny_folder, tmp_path, capsys):
    argv = command(data_root, tiny_folder, tmp_path, "--tensor-parallel")
    assert ts.main(argv) == 2
    assert "torchrun --nproc-per-node N" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ts.parse_args([*argv, "--quantize", "4bit"])
    code, said = finished(start(3, argv[:-1]))
    assert code != 0 and "3 processes do not divide num_attention_heads, 4" in said


def test_a_model_that_lacks_weights_is_refused_by_all_processes(folders, data_root, tmp_path):
    broken = shutil.copytree(folders["llama"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, said = finished(start(2, command(data_root, str(broken), tmp_path / "out")))
    assert code != 0 and "lack 1 weight (model.layers.1.mlp.up_proj.weight)" in said
    assert not list(tmp_path.rglob("steering_vector.safetensors"))
