"""SIGTERM and SIGINT: the first one asks the loop to stop between two images, the second one stops at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT)
TOGETHER_S = 1.0  # a scheduler and a grid both tell the process: one request


class Stopped(BaseException):
    """The run was asked to stop and did; no error, so no handler of errors may take it for one.

    Args:
        signum: exit status is 128 + this.
        line: what was reached and how to go on, for the user.
    """

    def __init__(self, signum: signal.Signals, line: str):
        super().__init__(line)
        self.signum = signum


class Asked:
    """Whether to stop: the first signal that came, or None."""

    signum: signal.Signals | None = None


@contextmanager
def noted_signals() -> Iterator[Asked]:
    """Inside, the first SIGTERM or SIGINT is only noted; one more than TOGETHER_S after it ends the process.

    Only the main thread may set handlers; from any other one nothing is noted.
    """
    asked, first = Asked(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {signum: signal.getsignal(signum) for signum in STOPPING}

    def note(signum: int, _: object) -> None:
        nonlocal first
        if asked.signum is None:
            asked.signum, first = signal.Signals(signum), time.monotonic()
        elif time.monotonic() - first > TOGETHER_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in STOPPING:
        signal.signal(signum, note)
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
