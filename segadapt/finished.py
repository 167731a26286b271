"""Finished runs read back from their folders: scores, pixel counts, and the bootstrap interval of a paired gain.

T tasks   n images of a task   C classes   3 correct, label, predicted px   U images in all   R resamples
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from segadapt import untrusted
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator

RESAMPLES = 2000
LEVEL = 95  # %, of the interval


@dataclass(frozen=True)
class Run:
    """What one method came to with one seed; read from one folder, or joined of several that hold a task each."""

    settings: dict[str, Any]  # dotted names, those of the first folder
    tasks: tuple[str, ...]
    folders: tuple[Path, ...]  # T, where each task was run
    miou_T: np.ndarray
    data: tuple[str, ...]  # T, SHA-256 of the images and labels in stream order
    segmenter: str  # SHA-256 of its source weights

    @property
    def folder(self) -> Path:
        """The first one, for messages."""
        return self.folders[0]

    def images(self, task: str) -> tuple[list[str], np.ndarray]:
        """Keys of a task in stream order, and their pixel counts, float64 [n, C, 3]. UserError: see pixel_counts."""
        return pixel_counts(self.folders[self.tasks.index(task)])[task]

    def seconds_an_image(self) -> list[float]:
        """Of every image, without the wait for data."""
        lines = [line for folder in dict.fromkeys(self.folders) for line in read_lines(folder / "timings.jsonl")]
        return [line["seconds"] for line in lines if "seconds" in line]


def read_json(path: Path) -> Any:
    """UserError: the run has not finished, or the file is none of ours."""
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the folder of a finished run. Run it, or correct the glob.")
    return untrusted.read_json(path, cure="Run it again.")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} to {'a.b': 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    items = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    return {name: leaf for key, item in items for name, leaf in flat(item, key).items()}


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings in which they are not all equal."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


@cache
def load(folder: Path) -> Run:
    """Read a run, its counts left on the disk. UserError: unfinished, of another verb, or unlabelled."""
    results, settings = read_json(folder / "results.json"), flat(read_json(folder / "settings.json"))
    if "tasks" not in results:
        raise UserError(f"{folder}: results without tasks; expected a run of adapt or evaluate. Leave it out.")
    tasks = results["tasks"]
    if any(task["miou"] is None for task in tasks):
        raise UserError(f"{folder}: images without labels have no mIoU; expected labelled ones. Leave it out.")
    names = tuple(task["task"] for task in tasks)
    miou_T = np.array([task["miou"] for task in tasks])
    data = tuple(task["data_sha256"] for task in tasks)
    return Run(settings, names, (folder,) * len(names), miou_T, data, results["weights_sha256"]["discriminative"])


def join(runs: Sequence[Run], tasks: Sequence[str]) -> Run:
    """These tasks of several runs as one run; what none of them holds is left out. ValueError: no run."""
    if not runs:
        raise ValueError("join: no run")
    at = {task: (run, index) for run in reversed(runs) for index, task in enumerate(run.tasks)}
    found = [(task, *at[task]) for task in tasks if task in at]
    return Run(
        runs[0].settings,
        tuple(task for task, _, _ in found),
        tuple(run.folders[index] for _, run, index in found),
        np.array([run.miou_T[index] for _, run, index in found]),
        tuple(run.data[index] for _, run, index in found),
        runs[0].segmenter,
    )


@lru_cache(maxsize=16)  # at full size the counts of one folder take as much memory as its images
def pixel_counts(folder: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """task -> (keys, counts [n, C, 3]) of a run's records; they must give its mIoU. UserError: no counts."""
    tasks, records = read_json(folder / "results.json")["tasks"], read_lines(folder / "records.jsonl")
    if any("classes" not in record for record in records):
        raise UserError(f"{folder}: records without the column classes (pixel counts); expected labelled images and a "
                        "run of this version. Run it again.")  # fmt: skip
    out = {}
    for task in tasks:
        own = [record for record in records if record["task"] == task["task"]]
        counts_nC3 = np.zeros((len(own), len(task["per_class"]), 3))
        for index, record in enumerate(own):
            for number, counts_3 in record["classes"].items():
                counts_nC3[index, int(number)] = counts_3
        error = abs(float(miou(counts_nC3.sum(axis=0))) - task["miou"])
        assert error < 1e-9, f"{folder}, {task['task']}: records.jsonl and results.json differ by {error} in mIoU"
        out[task["task"]] = [record["key"] for record in own], counts_nC3
    return out


def miou(counts_C3: np.ndarray) -> np.ndarray:
    """[..., C, 3] to [...]: mean IoU of the classes present or predicted, as metrics.scores; NaN without any."""
    correct_C, label_C, predicted_C = np.moveaxis(counts_C3, -1, 0)
    union_C = label_C + predicted_C - correct_C
    is_defined_C = union_C > 0
    iou_C = np.divide(correct_C, union_C, out=np.zeros_like(union_C), where=is_defined_C)
    num_defined = is_defined_C.sum(axis=-1).astype(float)
    return np.divide(iou_C.sum(axis=-1), num_defined, out=np.full(num_defined.shape, np.nan), where=num_defined > 0)


def bootstrap(pairs: Sequence[tuple[Run, Run]], *, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Percentile interval of the gain in mean mIoU, over images drawn with replacement (paired bootstrap, Efron 1979).

    One draw of images serves both runs of a pair, all tasks and all seeds, as the same image may be in several of them.

    Args:
        pairs: (run, the run that it is compared with), one a seed; both of a pair have the same tasks and images.
    Returns:
        Lower and upper end, fractions; None: too few images, some resample left a task empty.
    """
    keys = {(run.folders[t], task): run.images(task)[0] for run, _ in pairs for t, task in enumerate(run.tasks)}
    images = sorted({key for of_task in keys.values() for key in of_task})
    column_of = {key: column for column, key in enumerate(images)}
    draws_RU = numpy_generator(0, "bootstrap").multinomial(
        len(images), np.full(len(images), 1 / len(images)), resamples
    )
    gain_R = np.zeros(resamples)
    for run, other in pairs:
        assert run.tasks == other.tasks, (run.folder, other.folder)
        for task in run.tasks:
            for sign, one in ((1, run), (-1, other)):
                own, counts_nC3 = one.images(task)
                assert own == run.images(task)[0], (run.folder, other.folder, task)
                weights_Rn = draws_RU[:, [column_of[key] for key in own]].astype(float)
                resampled_RC3 = (weights_Rn @ counts_nC3.reshape(len(own), -1)).reshape(resamples, -1, 3)
                gain_R += sign * miou(resampled_RC3) / len(run.tasks) / len(pairs)
    if np.isnan(gain_R).any():
        return None
    low, high = np.percentile(gain_R, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)
