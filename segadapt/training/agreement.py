"""When the processes of a training tell each other of signals, and of checkpoints by the first one's clock.

They wait for each other then. Told in every step, each step would take as long as the slowest process's: where the CPU
that launches kernels is what a step waits for, processes are late by turns, and a second evens that out.
"""

import signal
import time
from collections.abc import Callable

import numpy as np

from segadapt.checkpoint import Checkpoints
from segadapt.signals import Asked
from segadapt.training.parallel import World

SECONDS = 1.0  # from one time to the next, as nearly as whole steps allow
MOST_STEPS = 10  # meanwhile: steps may become slower


class Agreement:
    """Of all processes of a training, which ask `at` for each step in turn.

    Args:
        checkpoints: their clock and `newest` are those of the first process.
        validate_every: steps; such a step, whose validation may take long, is never without an agreement.
        clock: seconds.
    """

    def __init__(
        self,
        world: World,
        checkpoints: Checkpoints,
        asked: Asked,
        *,
        validate_every: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._world, self._checkpoints, self._asked, self._clock = world, checkpoints, asked, clock
        self._validate_every = validate_every
        self._next = self._last = 0  # steps
        self._since = clock()

    def at(self, step: int) -> tuple[int, bool]:
        """Number of the signal that has come to a process, or 0, and whether a checkpoint is due after this step.

        The same in all processes. A checkpoint that is due by the number of steps is never late.
        """
        if step < self._next:
            return 0, False
        is_due, steps = False, 0
        if self._world.is_main:
            is_due, steps = self._checkpoints.is_due(step), self._steps_until_next(step)
        told = self._world.largest(np.array([self._asked.signum or 0, is_due, steps]))
        self._last, self._since, self._next = step, self._clock(), step + int(told[2])
        return int(told[0]), bool(told[1])

    def _steps_until_next(self, step: int) -> int:
        if self._world.size == 1 or self._last == 0:
            return 1
        a_step_s = (self._clock() - self._since) / (step - self._last)
        most = MOST_STEPS if a_step_s * MOST_STEPS <= SECONDS else int(SECONDS / a_step_s)
        to_validation = self._validate_every - step % self._validate_every
        return int(max(1, min(most, to_validation, self._checkpoints.due_in(step))))


def at_the_end(world: World, asked: Asked) -> signal.Signals | None:
    """The signal that has come to a process of a training; all wait here for the first one, which saves."""
    signum = int(world.largest(np.array([asked.signum or 0]))[0])
    return signal.Signals(signum) if signum else None
