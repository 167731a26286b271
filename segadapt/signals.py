"""SIGTERM and SIGINT: the first one asks the loop to stop between two images, the second one stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT)


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
    """Inside, the first SIGTERM or SIGINT is only noted, and then both have their default action, which is to end.

    Only the main thread may set handlers; from any other one nothing is noted.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {signum: signal.getsignal(signum) for signum in STOPPING}

    def note(signum: int, _: object) -> None:
        asked.signum = signal.Signals(signum)
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)

    for signum in STOPPING:
        signal.signal(signum, note)
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
