"""How much memory there is, what goes where, and whether it has run out."""

import contextlib
import os
import re
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
    if where != "host" and size <= free_memory(device) * (0.25 if where == "auto" else 0.9):
        return device
    return host if where != "device" and size <= free_memory(host) * 0.5 else None


def free_memory(device):
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS: a guess
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's or job's own limit; "max": none
        limit, used, stat = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat")
        )
        cached = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)  # given up when needed
        free = min(free, int(limit) - int(used) + int(cached[1] if cached else 0))
    return free
