"""A search's run folders to one Markdown table, best mean mIoU first; with --best, to the best of the arguments.

python benchmarks/search.py OUT/search-source/s0 OUT/search-broad/*
python benchmarks/search.py --best OUT/a-severe,OUT/a-mild OUT/b-severe,OUT/b-mild

Folders joined by a comma are one candidate: its mean is over the tasks of all of them.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import differing, flat, markdown, percent, read_json, short

from segadapt.errors import UserError


@dataclass(frozen=True)
class Tried:
    """One candidate: runs that differ in their images alone."""

    folder: str  # as given
    settings: dict[str, Any]  # dotted names, of the first run
    results: dict[str, Any]


def read(given: str) -> Tried:
    """The runs of one argument as one. UserError: unfinished."""
    folders = [Path(part) for part in given.split(",")]
    first, *more = [read_json(folder / "results.json") for folder in folders]
    tasks = first["tasks"] + [task for results in more for task in results["tasks"]]
    mean = {"miou": sum(task["miou"] for task in tasks) / len(tasks)}
    images = "".join(results["data_sha256"] for results in [first, *more])
    settings = flat(read_json(folders[0] / "settings.json"))
    return Tried(given, settings, first | {"tasks": tasks, "mean": mean, "data_sha256": images})


def ranked(arguments: list[str]) -> list[Tried]:
    """The candidates, best mean mIoU first. UserError: not of the same images, segmenter and teacher."""
    tried = [read(given) for given in arguments]
    first: dict[str, tuple[str, str]] = {}
    for one in tried:
        of_one = one.results["weights_sha256"] | {"images": one.results["data_sha256"]}
        for name, digest in of_one.items():
            expected, other = first.setdefault(name, (digest, one.folder))
            if digest != expected:
                raise UserError(f"{one.folder} and {other} are not of the same {name}; expected runs that differ in "
                                "settings alone. Name the runs of one search.")  # fmt: skip
    return sorted(tried, key=lambda one: -one.results["mean"]["miou"])


def best(tried: list[Tried]) -> str:
    """The best adapted candidate, as it was given."""
    return next(one.folder for one in tried if one.settings["method"] != "source")


def table(tried: list[Tried]) -> str:
    """One row a run: the settings in which the adapted ones differ, the tasks and their mean; a source run has none."""
    names = differing([one.settings for one in tried if one.settings["method"] != "source"])
    lines = []
    for one in tried:
        is_source = one.settings["method"] == "source"
        settings = ["source" if is_source else json.dumps(one.settings.get(name)).strip('"') for name in names]
        scores = [*(task["miou"] for task in one.results["tasks"]), one.results["mean"]["miou"]]
        lines.append([*settings, *map(percent, scores)])
    return markdown([*names, *(short(task["task"]) for task in tried[0].results["tasks"]), "mean"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--best", action="store_true")
    given = parser.parse_args()
    try:
        print((best if given.best else table)(ranked(given.folders)))
    except UserError as error:
        sys.stderr.write(f"search.py: {error}\n")
        sys.exit(2)
