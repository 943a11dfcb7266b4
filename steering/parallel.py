"""One function over many items, in several processes."""

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

LEAST, MOST = 4, 16  # items a process is worth starting for; processes
_work = []  # the function, and what it shares


def in_processes(function, items, *shared, unit="item"):
    """Yield function(item, *shared) of each item, in order, under a bar that counts units; what it
    prints to stderr comes in that order too. function: of a module; shared: what goes to each
    process once. Few items, or one core, and all is done in this process. OSError if one dies."""
    workers, executor = min(len(items) // LEAST, cores(), MOST), None
    _work[:] = function, shared
    if workers > 1:
        executor = ProcessPoolExecutor(workers, initializer=_start, initargs=(function, shared))
    try:
        each = (executor.map if executor else map)(_call, items)
        for result, said in tqdm(each, total=len(items), unit=unit, disable=None):
            if said:
                tqdm.write(said, file=sys.stderr, end="")
            yield result
    except BrokenProcessPool as error:
        raise OSError("a worker process died, most likely of too little memory") from error
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)


def cores():
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _start(function, shared):
    """What a worker does first. Ctrl-C is for the parent, and whatever ends that ends the worker; a
    core each is what tokenizers get."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work[:] = function, shared


def _call(item):
    """(the function's result, what it printed to stderr)."""
    function, shared = _work
    with contextlib.redirect_stderr(io.StringIO()) as said:
        result = function(item, *shared)
    return result, said.getvalue()
