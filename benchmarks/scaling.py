"""Weak scaling of `segadapt train`: images per second and memory of each layout, each process with the same work.

python benchmarks/scaling.py --layouts none:1 ddp:2 fsdp:2 2d:4 --images 8 [--iters 60] [--still] OVERRIDE ...
python benchmarks/scaling.py --layouts none:1 ddp:2 --images 2 --iters 10 --tiny runtime=cpu       small, on the CPU

LAYOUT:N is train.parallel over N processes of torchrun, with a batch of N x --images; `efficiency` is its images per
second a process, over those of the first layout. Speeds are medians of the loop's own figures but the first, which
caches and clocks disturb. --still repeats the first batch, so that reading has no part in it. Overrides are those of
`segadapt train`: data, network, losses.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from train_speed import TINY, loop_speed

from segadapt.config_training import TrainConfig
from segadapt.parse import from_overrides
from segadapt.tables import markdown
from segadapt.training import loop


def measured(
    layout: str, processes: int, overrides: list[str], *, images: int, iters: int, is_still: bool, root: Path
) -> dict:
    """What the processes of a layout leave."""
    own = [f"train.parallel={layout}", f"train.batch_size={images * processes}", f"train.iters={iters}",
           f"train.validate_every={iters}", f"logging.root={root}", f"experiment.id={layout}-{processes}"]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch = torchrun if layout != "none" else []
    out = root / f"{layout}-{processes}.json"
    still = ["--still"] if is_still else []
    command = [sys.executable, *launch, __file__, "--worker", str(out), *still, *overrides, *own]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def work(out: Path, overrides: list[str], *, is_still: bool) -> None:
    """One process of a layout; the first one writes."""
    if is_still:
        read = loop.steps_of
        loop.steps_of = lambda *args, **more: itertools.repeat(next(read(*args, **more)))
    speed, memory_gib = loop_speed(from_overrides("train", overrides, TrainConfig))
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps({"images_per_second": speed, "memory_gib": max(memory_gib, default=None)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["none:1"])
    parser.add_argument("--images", type=int, default=8, help="of each process in a step")
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--still", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given, more = parser.parse_known_args()
    if given.worker is not None:
        work(given.worker, more, is_still=given.still)
        sys.exit()
    rows, alone = [], None
    with tempfile.TemporaryDirectory() as folder:
        for name in given.layouts:
            layout, processes = name.split(":")
            overrides = [*(TINY if given.tiny else ()), *more]
            found = measured(layout, int(processes), overrides, images=given.images, iters=given.iters,
                             is_still=given.still, root=Path(folder))  # fmt: skip
            each = found["images_per_second"] / int(processes)
            alone = alone or each
            rows.append([layout, processes, f"{found['images_per_second']:.1f}", f"{each / alone:.3f}",
                         str(found["memory_gib"])])  # fmt: skip
            print(*rows[-1], flush=True)
    print(markdown(["train.parallel", "processes", "images/s", "efficiency", "peak memory GiB"], rows))
