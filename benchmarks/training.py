"""Tables of benchmarks/training.sh: mIoU of validation and test, mean and spread over seeds, parameters, speed, gains.

python benchmarks/training.py OUT NAME [NAME ...] [--json FILE] [--cost FILE] [--methods METHOD ...]

    --cost      also GFLOPs and speed of inference, of what cost.py wrote
    --methods   also the source's mIoU on each task of CamVid-C, and the gains of the other methods
    --json      all figures, each run in all and a class

What is not finished is "-" in the table, and null or missing in the JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from safetensors import safe_open

from segadapt.record import write_json
from segadapt.tables import markdown, short
from segadapt.terminal import percent


def read(path: Path) -> Any:
    """None: it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None


def spread(values: list[float]) -> str:
    """'51.20 +- 0.31 (3)' of fractions: mean, standard deviation, number; '-' of none."""
    if not values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation} ({len(values)})"


def shown(value: float | None, form: str) -> str:
    """'-' of None."""
    return "-" if value is None else form.format(value)


# --- what is there ---


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


def training_speed(folder: Path) -> float | None:
    """Images per second, the median of all but the first figure, while caches fill. None: there are no others."""
    lines = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line][1:]
    return statistics.median(speeds) if speeds else None


def run(folder: Path, test: Any) -> dict[str, Any]:
    """What is kept of a finished run and its test."""
    train = read(folder / "results.json")
    return {
        "steps": train["steps"],
        "seconds": train["seconds"],
        "images_per_second": training_speed(folder),
        "peak_memory_gib": train["peak_memory_gib"],
        "validation": train["validation"] | {"iou": train["per_class"]},
        "test": test and test["mean"] | {"iou": test["tasks"][0]["per_class"]},
        "versions": train["versions"],
    }


def adapted(out: Path, name: str, methods: list[str]) -> dict[str, Any]:
    """Of each method that has run on a network: mIoU of the tasks and their mean, all of one training seed."""
    folders = [out / f"camvid-adapt-{name}-{method}" for method in methods]
    seed = min((path.parent.name for folder in folders for path in folder.glob("s*/results.json")), default="s0")
    found = {method: read(folder / seed / "results.json") for method, folder in zip(methods, folders, strict=True)}
    return {
        method: {"mean": one["mean"]["miou"], "tasks": {task["task"]: task["miou"] for task in one["tasks"]}}
        for method, one in found.items()
        if one is not None
    }


def network(out: Path, name: str, cost: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """All figures of a network or loss; runs that are not finished are left out."""
    folders = sorted(path.parent for path in (out / f"camvid-train-{name}").glob("s*/results.json"))
    is_saved = bool(folders) and (folders[0] / "model" / "model.safetensors").is_file()
    tests = (read(out / f"camvid-test-{name}" / folder.name / "results.json") for folder in folders)
    measured = cost["networks"].get(name) if cost else None
    size = parameters(folders[0] / "model") if is_saved else None
    own = {
        "parameters": measured["parameters"] if measured else size,  # the net itself knows its buffers
        "runs": {folder.name: run(folder, test) for folder, test in zip(folders, tests, strict=True)},
    }
    if cost:
        own["cost"] = measured
    if methods:
        own["adapted"] = adapted(out, name, methods)
    return own


# --- the table ---


def row(name: str, own: dict[str, Any], methods: list[str]) -> list[str]:
    """As `header`."""
    runs, size = own["runs"].values(), own["parameters"]
    speeds = [one["images_per_second"] for one in runs if one["images_per_second"] is not None]
    cells = [
        name,
        "-" if size is None else f"{size / 1e6:.2f} M",
        spread([one["validation"]["miou"] for one in runs]),
        spread([one["test"]["miou"] for one in runs if one["test"]]),
        shown(statistics.median(speeds) if speeds else None, "{:.0f}"),
        shown(statistics.mean(one["seconds"] for one in runs) if runs else None, "{:.0f}"),
    ]
    if "cost" in own:
        cost = own["cost"] or {}
        cells += [shown(cost.get("gflops"), "{:.1f}"), shown(cost.get("images_per_second"), "{:.1f}")]
    found = own.get("adapted", {})
    return [*cells, *(scores(found, method) for method in methods)]


def scores(found: dict[str, Any], method: str) -> str:
    """Of the source '24.10 (9.80, 21.20)', the mean and each task; of others '+2.97 (+9.40, -0.80)', gains over it."""
    own, source = found.get(method), found.get("source")
    if own is None or source is None:
        return "-"
    if method == "source":
        return f"{percent(own['mean'])} ({', '.join(map(percent, own['tasks'].values()))})"
    gains = [percent(miou - source["tasks"][task], "+") for task, miou in own["tasks"].items()]
    return f"{percent(own['mean'] - source['mean'], '+')} ({', '.join(gains)})"


def header(networks: dict[str, Any], methods: list[str]) -> list[str]:
    """Columns; the tasks are those of any run."""
    cells = ["", "parameters", "validation mIoU %", "test mIoU %", "training, images/s", "s"]
    if any("cost" in own for own in networks.values()):
        cells += ["GFLOPs", "inference, images/s"]
    tasks = next((one["tasks"] for own in networks.values() for one in own.get("adapted", {}).values()), {})
    said = f"mean ({', '.join(map(short, tasks))})"
    return [*cells, *(f"{method}, {said}" for method in methods)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cost", type=Path)
    parser.add_argument("--methods", nargs="+", default=[])
    given = parser.parse_args()
    cost = (read(given.cost) or {"networks": {}}) if given.cost else {}
    networks = {name: network(given.out, name, cost, given.methods) for name in given.names}
    print(markdown(header(networks, given.methods), [row(name, own, given.methods) for name, own in networks.items()]))
    if given.json is not None:
        machine = {key: value for key, value in cost.items() if key != "networks"}
        write_json(given.json, {"cost": machine, "networks": networks} if cost else networks)
