"""steering/memory.py: what glibc keeps of freed tensors goes back before memory runs out."""

import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import torch
from steering import memory
memory.keep_freed()
large, small = [], []
for i in range(40):  # between large ones that go, small ones that stay: the heap cannot shrink
    large.append(torch.ones(5_000_000))
    small.append(torch.ones(50_000))
del large
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
freed = memory.Freed()
for free in (1e15, 1.0):
    memory.free_memory = lambda device: free
    freed.give_back()
    print(held(), flush=True)
"""


def test_holes_between_tensors_are_given_back_when_memory_is_short():
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    before, after = map(float, said.split())
    assert before > 700 and after < before - 600  # MiB
