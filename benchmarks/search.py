"""A search's run folders to one Markdown table, the chosen one first; with --best, to that one of the arguments.

python benchmarks/search.py OUT/search-source/s0 OUT/search-broad/*
python benchmarks/search.py --best OUT/source-5,OUT/source-1 OUT/a-5,OUT/a-1 OUT/b-5,OUT/b-1

Folders joined by a comma are one candidate: its mean is over the tasks of all of them. Safe is what loses at most
--most-loss points to the source on every task. Chosen is, of the safe ones whose mean is within --equal points of the
best safe mean, the one of the smallest learning rate (of the segmenter), then the best mean: differences that small are
chance, and a rate too high drifts. Where none is safe, the least loss.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.errors import UserError
from segadapt.finished import differing, flat, read_json
from segadapt.tables import markdown, short
from segadapt.terminal import percent


@dataclass(frozen=True)
class Tried:
    """One candidate: runs that differ in their images alone."""

    folder: str  # as given
    settings: dict[str, Any]  # dotted names, of the first run
    results: dict[str, Any]

    @property
    def is_source(self) -> bool:
        """Nothing was adapted."""
        return self.settings["method"] == "source"

    @property
    def miou_T(self) -> list[float]:
        """Fractions, of its tasks."""
        return [task["miou"] for task in self.results["tasks"]]

    @property
    def rate(self) -> float:
        """Learning rate of the segmenter."""
        own = self.settings.get("tta.optimizer.lr_discriminative")
        return float(self.settings["tta.optimizer.lr"] if own is None else own)

    def worst(self, source: "Tried") -> float:
        """Smallest gain over the source of any task, a fraction."""
        return min(own - other for own, other in zip(self.miou_T, source.miou_T, strict=True))


def read(given: str) -> Tried:
    """The runs of one argument as one. UserError: unfinished."""
    folders = [Path(part) for part in given.split(",")]
    first, *more = [read_json(folder / "results.json") for folder in folders]
    tasks = first["tasks"] + [task for results in more for task in results["tasks"]]
    mean = {"miou": sum(task["miou"] for task in tasks) / len(tasks)}
    images = "".join(results["data_sha256"] for results in [first, *more])
    settings = flat(read_json(folders[0] / "settings.json"))
    return Tried(given, settings, first | {"tasks": tasks, "mean": mean, "data_sha256": images})


def ranked(arguments: list[str], most_loss: float, equal: float) -> list[Tried]:
    """The source and the candidates, the chosen one first.

    Args:
        arguments: as on the command line; one of them is the source.
        most_loss: points of mIoU that a candidate may lose on a task.
        equal: points of mean mIoU that do not count.

    Raises:
        UserError: not of the same images, segmenter and teacher, or not one source.
    """
    tried = [read(given) for given in arguments]
    first: dict[str, tuple[str, str]] = {}
    for one in tried:
        of_one = one.results["weights_sha256"] | {"images": one.results["data_sha256"]}
        for name, digest in of_one.items():
            expected, other = first.setdefault(name, (digest, one.folder))
            if digest != expected:
                raise UserError(f"{one.folder} and {other} are not of the same {name}; expected runs that differ in "
                                "settings alone. Name the runs of one search.")  # fmt: skip
    sources = [one for one in tried if one.is_source]
    if len(sources) != 1 or len(tried) == 1:
        raise UserError(f"{len(sources)} source runs (tta.forward_mode=discriminative_only) and "
                        f"{len(tried) - len(sources)} adapted ones; expected one, and one or more. Name the runs of "
                        "one search.")  # fmt: skip
    source, adapted = sources[0], [one for one in tried if not one.is_source]
    excess = {one.folder: max(round(-one.worst(source) - most_loss / 100, 9), 0) for one in adapted}
    safe_means = [one.results["mean"]["miou"] for one in adapted if not excess[one.folder]]

    def rank(one: Tried) -> tuple[float, bool, float, float]:
        mean = one.results["mean"]["miou"]
        is_best = not excess[one.folder] and round(max(safe_means) - mean - equal / 100, 9) <= 0
        return excess[one.folder], not is_best, one.rate if is_best else 0.0, -mean

    return [source, *sorted(adapted, key=rank)]


def table(tried: list[Tried]) -> str:
    """One row a run, the source first: the settings in which the adapted ones differ, tasks, mean, worst gain."""
    source, *candidates = tried
    names = differing([one.settings for one in candidates])
    lines = []
    for one in tried:
        settings = ["source" if one.is_source else json.dumps(one.settings.get(name)).strip('"') for name in names]
        scores = [*map(percent, one.miou_T), percent(one.results["mean"]["miou"])]
        lines.append([*settings, *scores, "" if one.is_source else f"{100 * one.worst(source):+.2f}"])
    return markdown([*names, *(short(task["task"]) for task in source.results["tasks"]), "mean", "worst gain"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--most-loss", type=float, default=0.2, help="points of mIoU, on each task")
    parser.add_argument("--equal", type=float, default=0.5, help="points of mean mIoU that do not count")
    given = parser.parse_args()
    try:
        tried = ranked(given.folders, given.most_loss, given.equal)
        print(tried[1].folder if given.best else table(tried))
    except UserError as error:
        sys.stderr.write(f"search.py: {error}\n")
        sys.exit(2)
