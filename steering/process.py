"""What a training process has of its own: console and log file, and the signals that stop it."""

import contextlib
import logging
import os
import signal
import sys

from tqdm import tqdm

log = logging.getLogger("steering")


class Console(logging.Handler):
    """Log to stdout, above the bar, without tracebacks; goes on if stdout is gone (`| head`)."""

    def emit(self, record):
        try:
            tqdm.write(record.getMessage(), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # broken pipe, closed, None
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def start_logging(level=logging.INFO):
    """Log to the console. A full disk or a closed console does not stop a run."""
    log.setLevel(level)
    log.handlers[:] = [Console()]
    logging.raiseExceptions = False


@contextlib.contextmanager
def log_file(path):
    """Context: what is logged goes to this file too."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class StopRequest:
    """Remembers a signal that asks to stop until the step is over; a second Ctrl-C stops at once.
    A second SIGTERM does not: a scheduler may send one, and a shell loop pass it on once more.
    in_loop: whether a run is under way, which ends after its step; elsewhere a signal stops at
    once."""

    def __init__(self):
        self.exit_code = None
        self.in_loop = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            under_nohup = signal.getsignal(number) == signal.SIG_IGN
            if number != signal.SIGHUP or not under_nohup:
                signal.signal(number, self)

    def __call__(self, number, frame):
        second_ctrl_c = self.exit_code is not None and number == signal.SIGINT
        self.exit_code = 130 if number == signal.SIGINT else 75
        if second_ctrl_c or not self.in_loop:
            raise SystemExit(self.exit_code)
