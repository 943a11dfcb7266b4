"""How much memory there is, what goes where, and whether it has run out."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch


def is_out_of_memory(error):
    """Whether an exception says that memory has run out, of a GPU or of the host."""
    texts = "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or re.search(texts, str(error)) is not None


def cache_place(where, size, device):
    """The device that a cache of `size` bytes goes to; None where it is off or does not fit."""
    host = torch.device("cpu")
    if where == "off":
        return None
    if where != "host":
        share = 0.25 if where == "auto" else 0.9
        if size <= free_memory(device) * share:
            return device
    if where != "device" and size <= free_memory(host) * 0.5:
        return host
    return None


def keep_freed():
    """Have glibc keep freed blocks for the next tensors; a tenth to a fifth of a CPU step.
    By default every large one is mapped, zeroed page by page, and unmapped again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: map none
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give none back


class Freed:
    """What glibc keeps of freed blocks, by `keep_freed`. Holes that no later tensor fits into add
    up: a training on rows of 580 tokens, with a vocabulary of 152,000, grew to 17 GiB."""

    def __init__(self):
        self.left = 0  # bytes of the process after the last time

    def give_back(self):
        """Give it to the system, if the process has grown to more than what is free."""
        with contextlib.suppress(OSError, AttributeError):  # no /proc, another C library
            if resident() > max(1.25 * self.left, free_memory(torch.device("cpu"))):
                ctypes.CDLL(None).malloc_trim(0)
                self.left = resident()


def peak_memory():
    """Peak memory so far in GiB: of the GPU if there is one, of the process otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def resident():
    """Bytes of memory that this process holds; OSError where there is no /proc."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_memory(device):
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: a guess
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max": none
        limit, used, stat = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat")
        )
        cached = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)  # given up when needed
        free = min(free, int(limit) - int(used) + int(cached[1] if cached else 0))
    return free
