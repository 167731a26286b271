"""Processes agree on when to stop and to save, seldom enough not to wait for each other in each step."""

import math
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segadapt.checkpoint import Checkpoints
from segadapt.signals import Asked
from segadapt.training.agreement import MOST_STEPS, SECONDS, Agreement
from segadapt.training.parallel import World

STEPS = 120


class Joined(World):
    """One of two processes that are threads."""

    def largest(self, values: np.ndarray) -> np.ndarray:
        told[self.rank] = values
        barrier.wait()
        both = np.maximum(*told)
        barrier.wait()
        return both


told: list[np.ndarray] = [np.zeros(3, np.int64)] * 2
barrier = threading.Barrier(2, timeout=10)


def agreed(*, a_step_s: list[float], images: int | None, signal_at: int | None) -> list[list[tuple[int, int, bool]]]:
    """Of both processes: each step with what was agreed on; the second is the one that the signal comes to."""
    found: list[list[tuple[int, int, bool]]] = [[], []]

    def process(rank: int) -> None:
        asked, now = Asked(), [0.0]
        checkpoints = Checkpoints(Path("run"), seconds=None, images=images)
        world = Joined("ddp", rank=rank, size=2)
        agreement = Agreement(world, checkpoints, asked, validate_every=STEPS, clock=lambda: now[0])
        for step in range(1, STEPS + 1):
            if rank == 1 and step == signal_at:
                asked.signum = signal.SIGTERM
            signum, is_due = agreement.at(step)
            found[rank].append((step, signum, is_due))
            now[0] += a_step_s[rank]
            if signum:
                return
            if is_due and rank == 0:  # the first process alone writes
                checkpoints.newest = step

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@given(
    st.lists(st.floats(0.001, 3), min_size=2, max_size=2),
    st.none() | st.integers(1, STEPS),
    st.none() | st.integers(1, STEPS),
)
def test_both_agree_on_the_same_steps_a_checkpoint_in_its_step_a_signal_in_a_second(a_step_s, images, signal_at):
    first, second = agreed(a_step_s=a_step_s, images=images, signal_at=signal_at)
    assert first == second
    stopped = first[-1][0] if first[-1][1] else None
    last = stopped or STEPS
    assert [step for step, _, is_due in first if is_due] == list(range(images or last + 1, last + 1, images or 1))
    wait = max(1, min(MOST_STEPS, math.ceil(SECONDS / a_step_s[0])))
    if signal_at is not None and signal_at + wait <= STEPS:
        assert stopped is not None
        assert signal_at <= stopped <= signal_at + wait


@pytest.mark.parametrize(
    ("a_step_s", "validate_every", "asks"),
    [
        (0.25, 100, [1, 2, 6, 10, 14, 18, 22]),  # once a second
        (0.001, 100, [1, 2, 12, 22]),
        (2.0, 100, list(range(1, 24))),
        (0.25, 5, [1, 2, 5, 9, 10, 14, 15, 19, 20]),  # a step that validates may take long
    ],
)
def test_when_they_wait_for_each_other(monkeypatch, a_step_s, validate_every, asks):
    asked_at = []
    monkeypatch.setattr(World, "largest", lambda self, values: (asked_at.append(step), values)[1])
    now, asked, checkpoints = [0.0], Asked(), Checkpoints(Path("run"), seconds=None, images=None)
    world = World("ddp", size=2)
    agreement = Agreement(world, checkpoints, asked, validate_every=validate_every, clock=lambda: now[0])
    for step in range(1, 24):
        assert agreement.at(step) == (0, False)
        now[0] += a_step_s
    assert asked_at == asks


@pytest.mark.parametrize("signal_at", [1, 5])
def test_one_process_alone_hears_at_once(signal_at):
    asked, checkpoints = Asked(), Checkpoints(Path("run"), seconds=None, images=None)
    agreement = Agreement(World(), checkpoints, asked, validate_every=STEPS, clock=lambda: 0.0)
    for step in range(1, signal_at):
        assert agreement.at(step) == (0, False)
    asked.signum = signal.SIGINT
    assert agreement.at(signal_at) == (signal.SIGINT, False)
