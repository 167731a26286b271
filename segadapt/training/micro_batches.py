"""What a process reads: its micro-batches, step by step."""

from collections.abc import Iterator, Sequence
from typing import Any

from segadapt.config_loop import LoopSettings
from segadapt.stream import Samples, batches
from segadapt.training.parallel import World


def steps_of(
    samples: Samples,
    t: LoopSettings,
    world: World,
    *,
    first: int,
    workers: int,
    is_pinned: bool = False,
) -> Iterator[Sequence[Any]]:
    """The micro-batches of this process, step by step, from step `first` on.

    Step i takes the items i B .. i B + B - 1 of the samples, whatever the number of processes and micro-batches: each
    micro-batch is a stretch of them, and each process, or those that work together, have their part of it.
    """
    part = t.batch_size // (world.parts * t.accumulate)
    firsts = (
        step * t.batch_size + (micro * world.parts + world.part) * part
        for step in range(first, t.iters)
        for micro in range(t.accumulate)
    )
    stretches = [range(item, item + part) for item in firsts]
    read = batches(samples, stretches, workers=workers, is_pinned=is_pinned)
    yield from zip(*[read] * t.accumulate, strict=True)
