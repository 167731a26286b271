"""One task of a run: reset; for each image predict, score, adapt, record."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from segadapt import metrics, stream
from segadapt.config import AdaptConfig, EvaluateConfig
from segadapt.datasets import Dataset, Task
from segadapt.models.build import Models
from segadapt.models.combined import Combined
from segadapt.models.diagnostics import examine
from segadapt.models.out_of_memory import explain_out_of_memory
from segadapt.models.source import Prediction
from segadapt.record import JsonLines, RunFolder, write_json, write_png_palette
from segadapt.terminal import TaskProgress
from segadapt.wandb_mirror import Mirror

MEANS = ("miou", "macc", "aacc", "mf1", "mprecision", "mrecall")
PLOTTED = ("running_miou", "loss", "grad_norm", "kept", "agreement", "teacher_agrees")


@dataclass(frozen=True)
class TaskResult:
    """One row of the results; scores None where the images have no labels."""

    task: Task
    images: int
    seconds: float
    scores: metrics.Scores | None
    counts_CC: np.ndarray
    data_sha256: str  # over the digests of its images and labels, in stream order
    steps_skipped: int  # loss or gradient was not finite
    steps_refused: int  # by model.trust.max_agreement
    predictions_not_finite: int  # scored all the same: their argmax is class 0


@dataclass(frozen=True)
class Run:
    """What all tasks of a run share."""

    settings: EvaluateConfig
    dataset: Dataset
    models: Models
    folder: RunFolder
    mirror: Mirror
    console: Console
    records: JsonLines
    timings: JsonLines
    samples: Iterator[stream.Prepared]
    num_tasks: int


class TaskLoop:
    """One task: the state is its confusion matrix, its place, what it has read, and how many steps were skipped."""

    def __init__(self, run: Run, task: Task, *, images: int):
        self.shared, self.task, self.images, self.slug = run, task, images, slug_of(task)
        self.matrix = metrics.ConfusionMatrix(len(run.dataset.classes), run.models.method.device)
        self.data = hashlib.sha256()
        self.counts_CC = self.matrix.counts()
        self.labelled = self.skipped = self.refused = self.broken = 0

    def run(self) -> TaskResult:
        """Reset unless continual, then predict, score, adapt and record each image."""
        shared, task, method = self.shared, self.task, self.shared.models.method
        if not (isinstance(shared.settings, AdaptConfig) and shared.settings.tta.continual):
            method.reset()
        shared.models.assert_placed()
        start = time.perf_counter()
        progress = TaskProgress(
            task.name,
            task_number=task.index + 1,
            num_tasks=shared.num_tasks,
            num_images=self.images,
            console=shared.console,
        )
        with progress:
            for index in range(self.images):
                began = time.perf_counter()
                sample = next(shared.samples)
                ready = time.perf_counter()
                assert sample.entry.task == task, (sample.entry, task)
                with explain_out_of_memory(method, f"{sample.entry.key} of {task.name}"):
                    diagnosis = self._diagnose(index, sample)  # before the step: of the weights that it starts from
                    prediction = method.step(sample.image_3HW, task=task.name, key=sample.entry.key)
                miou, classes = self._score_and_save(index, sample, prediction)
                self.data.update(sample.digest.encode())
                self._record(index, sample, prediction, miou, classes, diagnosis)
                done = time.perf_counter()
                shared.timings.append({"task": task.name, "key": sample.entry.key, "seconds": round(done - ready, 6),
                                     "waited_for_data": round(ready - began, 6)})  # fmt: skip
                progress.advance(float("nan") if miou is None else miou)
        with explain_out_of_memory(method, f"end of {task.name}"):
            method.flush()
        counts_CC = self.counts_CC
        scores = metrics.scores(counts_CC) if self.labelled else None
        seconds, data = time.perf_counter() - start, self.data.hexdigest()
        result = TaskResult(
            task, self.images, seconds, scores, counts_CC, data, self.skipped, self.refused, self.broken
        )
        row = row_of(result, shared.dataset.classes)
        write_json(shared.folder.path / "tasks" / f"{self.slug}.json", row | {"confusion_matrix": counts_CC})
        shared.mirror.summary({f"{self.slug}/{name}": row[name] for name in MEANS})
        if isinstance(shared.settings, AdaptConfig) and shared.settings.tta.save_adapted:
            method.segmenter.save(shared.folder.path / "adapted" / self.slug)
        if self.skipped or self.broken:
            shared.console.print(
                f"{task.name}: {self.skipped} steps skipped, loss or gradient was not finite; "
                f"{self.broken} predictions from logits that were not finite"
            )
        if self.refused:
            shared.console.print(
                f"{task.name}: {self.refused} steps refused, teacher and segmenter agreed on more than "
                "model.trust.max_agreement of the pixels"
            )
        return result

    def _score_and_save(
        self, index: int, sample: stream.Prepared, prediction: Prediction
    ) -> tuple[float | None, dict[str, list[int]] | None]:
        """Count the pixels; write the PNG if asked; returns the task's running mIoU and the image's own counts.

        The counts: class index -> [correct, label, predicted] px. Both are None without labels.
        """
        logging = self.shared.settings.logging
        wants_file = logging.predictions == "all" or (logging.predictions == "sample" and index < logging.sample_images)
        if sample.label_HW is None and not wants_file:
            return None, None
        classes_HW = metrics.predict_at_label_size(prediction.logits_Chw, sample.size_px)
        if wants_file:
            path = self.shared.folder.path / "predictions" / self.slug / f"{sample.entry.key}.png"
            write_png_palette(path, classes_HW.cpu().numpy(), self.shared.dataset.palette_C3)
        if sample.label_HW is None:
            return None, None
        self.matrix.update(classes_HW, sample.label_HW.to(classes_HW.device))
        self.labelled += 1
        before_CC, self.counts_CC = self.counts_CC, self.matrix.counts()
        return metrics.scores(self.counts_CC).miou, _pixels_by_class(self.counts_CC - before_CC)

    def _diagnose(self, index: int, sample: stream.Prepared) -> dict[str, Any] | None:
        """Every n-th image of a task: can the teacher, as it is now, teach at the noise of this image's own step?"""
        settings, method = self.shared.settings, self.shared.models.method
        if not isinstance(settings, AdaptConfig) or not isinstance(method, Combined):
            return None
        if not settings.tta.diagnose_every or index % settings.tta.diagnose_every:
            return None
        assert sample.label_HW is not None
        (tally,) = examine(
            method, sample.image_3HW, sample.label_HW, task=self.task.name, key=sample.entry.key, sigmas=[None]
        )
        return tally.summary()

    def _record(
        self,
        index: int,
        sample: stream.Prepared,
        prediction: Prediction,
        miou: float | None,
        classes: dict[str, list[int]] | None,
        diagnosis: dict[str, Any] | None,
    ) -> None:
        """One line of the record of truth, and its copy."""
        line: dict[str, Any] = {"task": self.task.name, "index": index, "key": sample.entry.key, "data": sample.digest,
                                "running_miou": miou}  # fmt: skip
        if classes is not None:
            line |= {"classes": classes}
        self.broken += not prediction.is_finite
        if prediction.loss is not None:
            self.skipped += not prediction.is_step_finite
            self.refused += prediction.is_refused
            line |= {
                "loss": prediction.loss,
                "grad_norm": prediction.grad_norm,
                "is_updated": prediction.is_updated,
            }
        if prediction.candidates:
            line |= {
                "is_refused": prediction.is_refused,
                "candidates": prediction.candidates,
                "single_class_windows": sum(count == 1 for count in prediction.candidates),
                "kept": prediction.kept,
                "agreement": prediction.agreement,
                "teacher_agrees": prediction.teacher_agrees,
            }
        if diagnosis is not None:
            line |= {"diagnosis": diagnosis}
        self.shared.records.append(line)
        shown = {name: line[name] for name in PLOTTED if line.get(name) is not None}
        self.shared.mirror.log({f"{self.slug}/{name}": value for name, value in shown.items()}, step=index)


def slug_of(task: Task) -> str:
    """'00_gaussian_noise-5': index and name, so that no task overwrites another."""
    return f"{task.index:02d}_{task.name.replace('/', '-')}"


def _pixels_by_class(counts_CC: np.ndarray) -> dict[str, list[int]]:
    """{class index: [correct, label, predicted] px} of the classes that a confusion matrix holds."""
    correct_C, label_C, predicted_C = np.diagonal(counts_CC), counts_CC.sum(axis=1), counts_CC.sum(axis=0)
    present_C = np.flatnonzero(label_C + predicted_C)
    return {str(c): [int(correct_C[c]), int(label_C[c]), int(predicted_C[c])] for c in present_C}


def row_of(result: TaskResult, classes: tuple[str, ...]) -> dict[str, Any]:
    """One task as results.json holds it: fractions, NaN as null."""
    row: dict[str, Any] = {"task": result.task.name, "images": result.images}
    row |= {name: getattr(result.scores, name) if result.scores else None for name in MEANS}
    per_class = result.scores.iou_C.tolist() if result.scores else [None] * len(classes)
    return row | {
        "per_class": dict(zip(classes, per_class, strict=True)),
        "data_sha256": result.data_sha256,
        "steps_skipped": result.steps_skipped,
        "steps_refused": result.steps_refused,
        "predictions_not_finite": result.predictions_not_finite,
        "seconds": round(result.seconds, 3),
    }
