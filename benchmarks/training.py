"""Table of benchmarks/training.sh: mIoU of validation and test, mean and spread over seeds, parameters, speed, seconds.

python benchmarks/training.py OUT NAME [NAME ...]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

from segadapt.tables import markdown


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def spread(values: list[float]) -> str:
    """'51.20 +- 0.31 (3)' of fractions: mean, standard deviation, number; '-' of none."""
    if not values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation} ({len(values)})"


def parameters(model: Path) -> int:
    """Numbers in the weights of a saved model, buffers left out as far as their names tell."""
    total = 0
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                count = 1
                for side in file.get_slice(name).get_shape():
                    count *= side
                total += count
    return total


def row(out: Path, name: str) -> list[str]:
    """One network or loss; runs that are not finished are left out."""
    folders = sorted(path.parent for path in (out / f"camvid-train-{name}").glob("s*/results.json"))
    results = [read(folder / "results.json") for folder in folders]
    tests = [read(path) for path in sorted((out / f"camvid-test-{name}").glob("s*/results.json"))]
    speeds = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
        speeds += [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
    size = f"{parameters(folders[0] / 'model') / 1e6:.2f} M" if folders and (folders[0] / "model").is_dir() else "-"
    return [
        name,
        size,
        spread([found["validation"]["miou"] for found in results]),
        spread([found["mean"]["miou"] for found in tests]),
        f"{statistics.median(speeds):.0f}" if speeds else "-",
        f"{statistics.mean(found['seconds'] for found in results):.0f}" if results else "-",
    ]


if __name__ == "__main__":
    out, names = Path(sys.argv[1]), sys.argv[2:]
    print(
        markdown(["", "parameters", "validation mIoU %", "test mIoU %", "images/s", "s"], [row(out, n) for n in names])
    )
