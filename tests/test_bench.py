"""bench/: the scripts run, and the floor is the work that the fast path really does."""

import sys

import pytest
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "bench"))
import bench_gpu
import sweep

from steering.fast_path import FastPath
from train_steering import token_loss


def test_gpu_bench_runs_on_a_cpu_with_a_tiny_shape(capsys):
    flags = ["--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--steps", "1"]
    bench_gpu.main([*flags, "--rows", "4", "--length", "24", "--micro-batch-tokens", "48", "96"])
    lines = capsys.readouterr().out.splitlines()
    assert "tiny, layer 2 of 4, fp32 on cpu" in lines[0]
    assert any("96 tokens" in line for line in lines if line.startswith("matrix products"))
    table = [line.split() for line in lines if line.startswith(("full ", "cached "))]
    assert [row[:2] for row in table] == [
        ["full", "48"], ["full", "96"], ["cached", "48"], ["cached", "96"]
    ]  # fmt: skip
    assert all(float(row[3].replace(",", "")) > 0 for row in table)


def test_floor_is_what_a_counter_of_operations_sees_of_a_cached_step():
    model = bench_gpu.build("tiny", 1, "fp32", "cpu")
    rows = bench_gpu.make_rows(4, 12, 1000)
    fast = FastPath(model)
    fast.cache_prefix(rows)
    fast.losses(rows, token_loss)  # the check against the plain path, once, is not part of a step
    with FlopCounterMode(display=False) as counter:
        fast.losses(rows, token_loss).sum().backward()
    assert bench_gpu.floor_flops("tiny", 1, rows) == pytest.approx(
        counter.get_total_flops(), rel=0.1
    )


def test_sweep_target_is_one_percent_above_the_best_of_all_runs():
    assert sweep.target_of([[(0, 0, 4.0), (10, 1, 3.0)], [(0, 0, 4.0), (9, 1, 2.0)]]) == 2.02
