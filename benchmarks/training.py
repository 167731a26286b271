"""Table of benchmarks/training.sh: mIoU of validation and test, mean and spread over seeds, parameters, speed, seconds.

python benchmarks/training.py OUT NAME [NAME ...] [--json FILE]         FILE: each run's scores, in all and a class
"""

import argparse
import json
import statistics
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


def runs(out: Path, name: str) -> dict[str, dict[str, Any]]:
    """The results of the finished runs of one network or loss, by seed: {"s0": {"train": ..., "test": ...}}."""
    folders = sorted(path.parent for path in (out / f"camvid-train-{name}").glob("s*/results.json"))
    found = {folder.name: {"folder": folder, "train": read(folder / "results.json")} for folder in folders}
    for seed, own in found.items():
        path = out / f"camvid-test-{name}" / seed / "results.json"
        own["test"] = read(path) if path.is_file() else None
    return found


def row(found: dict[str, dict[str, Any]], name: str) -> list[str]:
    """One network or loss; runs that are not finished are left out."""
    speeds, folders = [], [own["folder"] for own in found.values()]
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
        speeds += [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
    size = (
        f"{parameters(folders[0] / 'model') / 1e6:.2f} M"
        if folders and (folders[0] / "model" / "model.safetensors").is_file()
        else "-"
    )
    return [
        name,
        size,
        spread([own["train"]["validation"]["miou"] for own in found.values()]),
        spread([own["test"]["mean"]["miou"] for own in found.values() if own["test"]]),
        f"{statistics.median(speeds):.0f}" if speeds else "-",
        f"{statistics.mean(own['train']['seconds'] for own in found.values()):.0f}" if found else "-",
    ]


def figures(own: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    test, train = own["test"], own["train"]
    return {
        "steps": train["steps"],
        "validation": train["validation"] | {"iou": train["per_class"]},
        "test": test and test["mean"] | {"iou": test["tasks"][0]["per_class"]},
        "versions": train["versions"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    of_names = {name: runs(given.out, name) for name in given.names}
    head = ["", "parameters", "validation mIoU %", "test mIoU %", "images/s", "s"]
    print(markdown(head, [row(found, name) for name, found in of_names.items()]))
    if given.json is not None:
        kept = {name: {seed: figures(own) for seed, own in found.items()} for name, found in of_names.items()}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")
