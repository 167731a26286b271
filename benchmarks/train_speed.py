"""Images per second of `segadapt train`, of bare forward and backward of the same model, and of its data alone.

python benchmarks/train_speed.py data=camvid data.data_root=$CAMVID model/discriminative=segformer_b0_scratch ...
python benchmarks/train_speed.py --tiny runtime=cpu             a small net and crops, under a minute

All in one process, with the settings of the overrides and random weights; the first figures of the loop, while caches
and clocks settle, are left out. Wanted: loop / bare of 0.9 or more, and data faster than both.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.datasets import Dataset
from segadapt.losses import ClassWeights
from segadapt.models.set_up import set_up
from segadapt.parse import from_overrides
from segadapt.training import loop
from segadapt.training.learner import AllLayers
from segadapt.training.parallel import World
from segadapt.training.preparation import cached, labelled_split
from segadapt.training.samples import TrainingSamples, build_samples

TINY = (
    "data.count=16", "data.workers=0", "data.short_side_px=96", "train.transforms.crop_px=96", "train.batch_size=4",
    "train.validation_images=1", "train.schedule.warmup_iters=0",
)  # fmt: skip
LINES = 5  # of the loop's speed, each the mean of a fifth of the steps


def loop_speed(settings: TrainConfig) -> tuple[float, list[float]]:
    """Images per second, the median of all but the first of LINES figures; and peak memory of each GPU, GiB."""
    loop.LOG_EVERY = max(1, settings.train.iters // LINES)
    results = train.run(settings, console=Console(quiet=True))
    lines = [json.loads(line) for line in Path(results["folder"], "timings.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(speeds[1:]), results["peak_memory_gib"]


def samples_of(settings: TrainConfig, dataset: Dataset) -> TrainingSamples:
    """All that a run of these settings reads."""
    return build_samples(settings, dataset, count=settings.train.iters * settings.train.batch_size)


def bare_speed(settings: TrainConfig) -> float:
    """Images per second of forward, losses and backward of one batch that stays on the device."""
    main, dataset = set_up(settings.runtime), labelled_split(settings, settings.data.split)
    segmenter = train.build(settings, dataset.classes, main)
    objective = train.build_objective(settings, segmenter, ClassWeights(None, None))
    learner = AllLayers(settings, segmenter.train(), objective, World())
    first = next(loop.steps_of(samples_of(settings, dataset), settings.train, World(), first=0, workers=0))
    on_device = [batch.to(main) for batch in first]
    began = 0.0
    for step in range(settings.train.iters):
        if step == settings.train.iters // LINES:
            _wait(main)
            began = time.perf_counter()
        segmenter.net.zero_grad(set_to_none=True)
        learner.backward(on_device, None, 1)
    _wait(main)
    counted = settings.train.iters - settings.train.iters // LINES
    return counted * settings.train.batch_size / (time.perf_counter() - began)


def data_speed(settings: TrainConfig) -> float:
    """Images per second that the workers deliver, of all batches but those of the first fifth."""
    dataset = cached(labelled_split(settings, settings.data.split), settings)
    batches = loop.steps_of(
        samples_of(settings, dataset), settings.train, World(), first=0, workers=settings.data.workers
    )
    began, first = 0.0, settings.train.iters // LINES
    for step, _ in enumerate(batches):
        if step == first:
            began = time.perf_counter()
    return (settings.train.iters - first - 1) * settings.train.batch_size / (time.perf_counter() - began)


def _wait(main: torch.device) -> None:
    if main.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--iters", type=int, default=0, help="steps of each measurement; 0: 200, tiny 20")
    arguments, overrides = parser.parse_known_args()
    iters = arguments.iters or (20 if arguments.tiny else 200)
    with tempfile.TemporaryDirectory() as root:
        own = (f"logging.root={root}", f"train.iters={iters}", f"train.validate_every={iters}")
        chosen = from_overrides("train", [*(TINY if arguments.tiny else ()), *own, *overrides], TrainConfig)
        (loop_rate, _), bare, data = loop_speed(chosen), bare_speed(chosen), data_speed(chosen)
    print(f"loop {loop_rate:.1f} images/s, bare {bare:.1f}, data alone {data:.1f}; loop / bare {loop_rate / bare:.3f}")
