"""What a report shows, read from run folders: streams, classes, confusions, pairs of images, times.

T tasks   n images of a task   C classes   3 correct, label, predicted px
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from segadapt.errors import UserError
from segadapt.finished import Run, differing, load, miou, read_json, read_lines
from segadapt.results import build_tables, by_protocol, rows_of
from segadapt.tables import Table, mean_of

SOURCE = "source"  # the method that the others are compared with

Seed = tuple[Any, ...]  # of the run, of its corruptions


@dataclass(frozen=True)
class Method:
    """One row of the table: a method with one set of settings, over its seeds."""

    name: str
    runs: dict[Seed, Run]

    @property
    def first(self) -> Run:
        """Of the smallest seed; what needs one run shows this one."""
        return self.runs[min(self.runs, key=str)]

    @property
    def folders(self) -> list[Path]:
        """All run folders, each once."""
        return list(dict.fromkeys(folder for one in self.runs.values() for folder in one.folders))


@dataclass(frozen=True)
class Pair:
    """One image under the source and under a method; fractions, NaN where neither labels nor predictions are."""

    task: str
    key: str
    seed: Seed
    source: float  # mIoU of this image alone
    adapted: float


@dataclass(frozen=True)
class Report:
    """Runs under one protocol."""

    table: Table
    methods: list[Method]  # as the rows of the table
    classes: tuple[str, ...]
    source: int | None  # which method the others are compared with; None: it is not there
    unfinished: list[Path]  # left out

    @property
    def tasks(self) -> tuple[str, ...]:
        """Columns of the table."""
        return self.table.tasks

    @property
    def is_compared(self) -> bool:
        """There is a source, and something beside it."""
        return self.source is not None and len(self.methods) > 1

    @property
    def compared(self) -> list[int]:
        """Methods that have a source beside them; without one all of them."""
        return [index for index in range(len(self.methods)) if index != self.source] or list(range(len(self.methods)))


def gather(folders: Sequence[Path], *, resamples: int) -> Report:
    """Read and join the runs of these folders; those that have not finished are left out, and named.

    Args:
        resamples: of the bootstrap of the gains; 0: no intervals.
    Raises:
        UserError: none has finished; more than one protocol; see `results.build_tables`.
    """
    unfinished = [folder for folder in folders if not (folder / "results.json").is_file()]
    finished = [load(folder) for folder in folders if folder not in unfinished]
    if not finished:
        raise UserError(f"{folders[0]} has not finished; expected a run with results.json. Give its command again, it "
                        "goes on where it stopped.")  # fmt: skip
    groups = by_protocol(finished)
    if len(groups) > 1:
        protocols = [protocol for protocol, _ in groups]
        names = differing(protocols)
        shown = "; ".join(", ".join(f"{name}={protocol.get(name)}" for name in names[:3]) for protocol in protocols[:2])
        raise UserError(f"{len(groups)} protocols in one report ({shown}); expected runs that may be compared. Name "
                        "the folders of one of them.")  # fmt: skip
    ((protocol, group),) = groups
    (table,) = build_tables(finished, against=SOURCE, resamples=resamples, is_timed=True)
    methods = [Method(name, by_seed) for name, by_seed in rows_of(protocol, group, table.tasks, against=SOURCE)]
    assert [method.name for method in methods] == [row.name for row in table.rows]
    source = next((index for index, one in enumerate(methods) if one.first.settings["method"] == SOURCE), None)
    classes = tuple(task_file(methods[0].first, methods[0].first.tasks[0])["per_class"])
    return Report(table, methods, classes, source, unfinished)


# --- one run ---


def _folder(one: Run, task: str) -> Path:
    return one.folders[one.tasks.index(task)]


@cache
def _task_files(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a task -> name of its file without suffix, and what it holds."""
    values = {path.stem: read_json(path) for path in sorted((folder / "tasks").glob("*.json"))}
    return {value["task"]: (stem, value) for stem, value in values.items()}


def task_file(one: Run, task: str) -> dict[str, Any]:
    """A row of results.json with its confusion matrix. UserError: it is missing."""
    files = _task_files(_folder(one, task))
    if task not in files:
        raise UserError(f"{_folder(one, task) / 'tasks'}: no file of {task}; expected what a finished run leaves. "
                        "Restore it, or run again with experiment.restart=true.")  # fmt: skip
    return files[task][1]


def slug(one: Run, task: str) -> str:
    """As the run's folders of this task are named."""
    task_file(one, task)
    return _task_files(_folder(one, task))[task][0]


@lru_cache(maxsize=16)
def _records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    of_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_lines(folder / "records.jsonl"):
        of_task[record["task"]].append(record)
    return dict(of_task)


def records(one: Run, task: str) -> list[dict[str, Any]]:
    """In stream order."""
    return _records(_folder(one, task))[task]


# --- a method over its seeds ---


def running(method: Method, task: str) -> np.ndarray:
    """Running mIoU after each image, mean over the seeds: [n]; the last one is the task's mIoU. Empty: not run."""
    lines = [[np.nan if record["running_miou"] is None else record["running_miou"] for record in records(one, task)]
             for one in method.runs.values() if task in one.tasks]  # fmt: skip
    shortest = min(map(len, lines), default=0)  # a seed may have drawn fewer images
    return mean_of(np.array([line[-shortest:] for line in lines], float)) if lines else np.zeros(0)


def class_ious(method: Method, tasks: Iterable[str], *, beside: Method) -> np.ndarray:
    """IoU of each class, mean over the tasks and seeds that both have and where it is defined: float64 [C].

    NaN where there is none.
    """
    found = [[np.nan if value is None else value for value in task_file(one, task)["per_class"].values()]
             for seed, one in method.runs.items() for task in tasks
             if task in one.tasks and seed in beside.runs and task in beside.runs[seed].tasks]  # fmt: skip
    num_classes = len(task_file(method.first, method.first.tasks[0])["per_class"])
    return mean_of(np.array(found, float)) if found else np.full(num_classes, np.nan)


def confusion(method: Method) -> np.ndarray:
    """int64 [C label, C prediction], pixels of all tasks and seeds."""
    found = [task_file(one, task)["confusion_matrix"] for one in method.runs.values() for task in one.tasks]
    return np.array(found, np.int64).sum(axis=0)


def image_counts(one: Run, task: str) -> dict[str, np.ndarray]:
    """Image key -> pixel counts [C, 3]."""
    keys, counts_nC3 = one.images(task)
    return dict(zip(keys, counts_nC3, strict=True))


def pairs(source: Method, method: Method) -> tuple[list[Pair], int]:
    """Images of the same key, seed and pixels under both; and how many of the method's have none."""
    found, alone = [], 0
    for seed, one in method.runs.items():
        other = source.runs.get(seed)
        for task in one.tasks:
            mine = image_counts(one, task)
            if other is None or task not in other.tasks:
                alone += len(mine)
                continue
            theirs, digests = image_counts(other, task), {line["key"]: line["data"] for line in records(other, task)}
            for record in records(one, task):
                key = record["key"]
                if digests.get(key) != record["data"]:
                    alone += 1
                    continue
                found.append(Pair(task, key, seed, float(miou(theirs[key])), float(miou(mine[key]))))
    return found, alone


@dataclass(frozen=True)
class Speed:
    """Of one method over all its folders."""

    images: int
    median: float  # s an image, without the wait for data
    slowest: float  # s, the 95th percentile
    waited: float  # s an image, mean wait for data
    memory_gib: list[float]  # most on each GPU; empty without


def speed(method: Method) -> Speed:
    """From timings.jsonl and results.json."""
    lines = [line for folder in method.folders for line in read_lines(folder / "timings.jsonl") if "seconds" in line]
    seconds = [line["seconds"] for line in lines]
    memory = [read_json(folder / "results.json").get("peak_memory_gib", []) for folder in method.folders]
    most = [max(own[gpu] for own in memory if gpu < len(own)) for gpu in range(max(map(len, memory)))]
    waited = float(np.mean([line.get("waited_for_data", 0.0) for line in lines]))
    return Speed(len(lines), float(np.median(seconds)), float(np.percentile(seconds, 95)), waited, most)
