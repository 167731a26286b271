"""What recording and checkpoints cost beside the step, in one process: JSON.

python benchmarks/overhead.py [--images 100] [key=value ...]     settings of `segadapt adapt`; default: ToyTown-C, fog

Images are recorded (line, time, running score's line, W&B's null object) and not recorded in turn; the ratio of the two
medians is what recording costs. On a busy machine that ratio is mostly noise, so the time inside the recording calls is
told too. Afterwards the state is saved --saves times; a checkpoint's share is its time over the interval at which the
default settings make one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from segadapt import samples, stream
from segadapt.checkpoint import MOST_SHARE, Checkpoints, size_of
from segadapt.config import AdaptConfig
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.parse import from_overrides
from segadapt.record import JsonLines, RunFolder
from segadapt.task_loop import Run, TaskLoop
from segadapt.terminal import open_terminal
from segadapt.wandb_mirror import NoWandb

DEFAULTS = ("experiment=toytown_c", "data.corruptions=[fog]", "runtime=cpu")


class Timed:
    """A call whose time is added up where it is switched on, and that does nothing where it is off."""

    def __init__(self, call: Any):
        self.call, self.is_on, self.seconds = call, True, 0.0

    def __call__(self, *arguments: Any) -> None:
        if self.is_on:
            began = time.perf_counter()
            self.call(*arguments)
            self.seconds += time.perf_counter() - began


def measure(settings: AdaptConfig, folder: Path, *, images: int, saves: int) -> dict[str, Any]:
    """See above; the first two images, which warm up, are not counted."""
    dataset, task = build_dataset(settings.data), build_tasks(settings.data)[0]
    entries = stream.order(dataset, task, seed=settings.experiment.seed, shuffle=True, limit=images + 2)
    models, data = build_models(settings, dataset.classes), settings.data
    prepared = stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers)
    shown = samples.choose(entries, seed=settings.experiment.seed, count=settings.logging.samples)
    terminal = open_terminal("auto", Console(quiet=True))
    spent: dict[bool, list[float]] = {True: [], False: []}
    inside = []
    with JsonLines(folder / "records.jsonl") as records, JsonLines(folder / "timings.jsonl") as timings:
        run = Run(settings, dataset, models, RunFolder(folder, "overhead"), NoWandb(), terminal, records, timings,
                  prepared, shown, None, num_tasks=1)  # fmt: skip
        loop = TaskLoop(run, entries)
        calls = [Timed(loop._record), Timed(timings.append)]
        loop._record, timings.append = calls  # type: ignore[method-assign]
        began = time.perf_counter()
        for number, _ in enumerate(loop.run()):
            now = time.perf_counter()
            if number >= 2:
                spent[calls[0].is_on].append(now - began)
                inside += [sum(call.seconds for call in calls)] if calls[0].is_on else []
            for call in calls:
                call.is_on, call.seconds = number % 2 == 1, 0.0
            began = time.perf_counter()
        checkpoints, costs = Checkpoints(folder, seconds=None, images=None), []
        state = {"method": models.method.state_dict(), "loops": [loop.state_dict()]}
        for number in range(1, saves + 1):
            began = time.perf_counter()
            records.sync()
            timings.sync()
            checkpoints.write(number, state)
            costs.append(time.perf_counter() - began)
    image_s, recorded_s = (statistics.median(spent[is_on]) for is_on in (False, True))
    save_s = statistics.median(costs)
    assert settings.runtime.checkpoint_seconds is not None
    interval_s = max(settings.runtime.checkpoint_seconds, save_s / MOST_SHARE)
    recording, saving = 100 * statistics.median(inside) / image_s, 100 * save_s / interval_s
    return {
        "images": images,
        "image_s": image_s,
        "recorded_image_s": recorded_s,
        "on_off_percent": 100 * (recorded_s / image_s - 1),
        "recording_percent": recording,
        "checkpoint_s": save_s,
        "checkpoint_mib": size_of(state) / 2**20,
        "interval_s": interval_s,
        "checkpoint_percent": saving,
        "total_percent": recording + saving,
    }


def main(arguments: list[str]) -> dict[str, Any]:
    """What is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    a = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # not in /tmp, which may be memory
        settings = from_overrides("adapt", [*DEFAULTS, *a.overrides, f"logging.root={folder}"], AdaptConfig)
        return measure(settings, Path(folder), images=a.images, saves=a.saves)


if __name__ == "__main__":
    try:
        found = main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"overhead.py: {error}\n")
        sys.exit(2)
    print(json.dumps({name: round(value, 6) for name, value in found.items()}, indent=2))
