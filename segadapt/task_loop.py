"""One stretch of a run: reset; for each image predict, score, adapt, record."""

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from segadapt import class_scores, metrics, samples, stream, submission
from segadapt.config import AdaptConfig, EvaluateConfig, RunConfig
from segadapt.datasets import Dataset, Task
from segadapt.models.build import Models
from segadapt.models.combined import Combined
from segadapt.models.diagnostics import examine
from segadapt.models.generative.guided import LEAST_BOXES
from segadapt.models.generative.witness import Maps, Witness
from segadapt.models.non_finite import react
from segadapt.models.out_of_memory import explain_out_of_memory
from segadapt.models.source import Prediction
from segadapt.pictures import picture_of
from segadapt.protocol import peak_memory
from segadapt.record import JsonLines, RunFolder, write_json, write_png_palette
from segadapt.terminal import TaskProgress, Terminal
from segadapt.wandb_mirror import Mirror

MEANS = ("miou", "macc", "aacc", "mf1", "mprecision", "mrecall", "mfscore")
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
    resets: int  # by tta.non_finite


@dataclass(frozen=True)
class Run:
    """What all tasks of a run share."""

    settings: RunConfig
    dataset: Dataset
    models: Models
    folder: RunFolder
    mirror: Mirror
    terminal: Terminal
    records: JsonLines
    timings: JsonLines
    prepared: Iterator[stream.Prepared]
    shown: frozenset[stream.Entry]  # kept to be looked at
    file_ids_C: np.ndarray | None  # of a submission, see submission.py
    num_tasks: int

    @property
    def console(self) -> Console:
        """For a person."""
        return self.terminal.console


TALLIED = ("images", "labelled", "skipped", "refused", "broken", "resets", "unguided", "seconds", "digests")


class TaskTally:
    """What a task has come to: its confusion matrix, what it has read, and how many steps were skipped."""

    def __init__(self, run: Run, task: Task):
        self.task, self.slug = task, slug_of(task)
        self.matrix = metrics.ConfusionMatrix(len(run.dataset.classes), run.models.method.device)
        self.counts_CC = self.matrix.counts()
        self.images = self.labelled = self.skipped = self.refused = self.broken = self.resets = self.unguided = 0
        self.seconds = 0.0
        self.digests: list[str] = []  # of its images and labels, in stream order

    def result(self) -> TaskResult:
        """As it is now."""
        scores = metrics.scores(self.counts_CC) if self.labelled else None
        data_sha256 = hashlib.sha256("".join(self.digests).encode()).hexdigest()
        return TaskResult(
            self.task, self.images, self.seconds, scores, self.counts_CC, data_sha256, self.skipped, self.refused,
            self.broken, self.resets,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """All of it, as `checkpoint.encode` takes it."""
        return {name: getattr(self, name) for name in TALLIED} | {"counts_CC": torch.from_numpy(self.counts_CC)}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """As it was when `state_dict` gave these values."""
        for name in TALLIED:
            setattr(self, name, values[name])
        self.counts_CC = values["counts_CC"].numpy()
        self.matrix.restore(values["counts_CC"])


class TaskLoop:
    """What lies between two resets: one task, or several interleaved.

    Attributes:
        images: of it, that are done.
        is_finished: what follows its last image is done too.
    """

    def __init__(self, run: Run, entries: Sequence[stream.Entry], *, num_earlier: int = 0, num_later: int = 0):
        """num_earlier, num_later: images of the run before and behind these."""
        self.shared, self.entries, self.others = run, entries, (num_earlier, num_later)
        tasks = sorted({entry.task for entry in entries}, key=lambda task: task.index)
        self.tallies = {task: TaskTally(run, task) for task in tasks}
        self.images, self.is_finished = 0, False

    def state_dict(self) -> dict[str, Any]:
        """How far it is and what it has come to; the method's own state is apart."""
        tallies = [tally.state_dict() for tally in self.tallies.values()]
        return {"images": self.images, "is_finished": self.is_finished, "tallies": tallies}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """As it was when `state_dict` gave these values."""
        self.images, self.is_finished = values["images"], values["is_finished"]
        for tally, state in zip(self.tallies.values(), values["tallies"], strict=True):
            tally.load_state_dict(state)

    @property
    def results(self) -> list[TaskResult]:
        """Of its tasks, as they are now."""
        return [tally.result() for tally in self.tallies.values()]

    def run(self) -> Generator[None, None, None]:
        """Reset unless continual, then predict, score, adapt and record each image; yields after each one.

        Goes on after the images that are done.
        """
        if self.is_finished:
            return
        shared, method = self.shared, self.shared.models.method
        tta = shared.settings.tta if isinstance(shared.settings, AdaptConfig) else None
        if not self.images and (tta is None or not tta.continual):
            method.reset()
        shared.models.assert_placed()
        names = [task.name for task in self.tallies]
        progress = TaskProgress(
            names[0] if len(names) == 1 else f"{len(names)} mixed",
            task_number=next(iter(self.tallies)).index + 1,
            num_tasks=shared.num_tasks,
            num_images=len(self.entries),
            num_done=self.images,
            num_earlier=self.others[0],
            num_later=self.others[1],
            console=shared.console,
            memory=peak_memory,
        )
        with progress:
            for entry in self.entries[self.images :]:
                task, tally = entry.task, self.tallies[entry.task]
                began = time.perf_counter()
                sample = next(shared.prepared)
                ready = time.perf_counter()
                assert sample.entry == entry, (sample.entry, entry)
                with explain_out_of_memory(method, f"{entry.key} of {task.name}", sample.image_3HW):
                    if tta is not None and tta.episodic:
                        method.reset()
                    diagnosis = self._diagnose(tally, sample)  # before the step: of the weights that it starts from
                    prediction, maps = self._step(sample)
                if tta is not None:
                    tally.resets += react(tta.non_finite, method, prediction, what=f"{entry.key} of {task.name}")
                miou, classes = self._score_and_save(tally, sample, prediction, maps)
                tally.digests.append(sample.digest)
                self._record(tally, sample, prediction, miou, classes, diagnosis)
                done = time.perf_counter()
                tally.images += 1
                tally.seconds += done - began
                shared.timings.append({"task": task.name, "key": entry.key, "seconds": round(done - ready, 6),
                                     "waited_for_data": round(ready - began, 6)})  # fmt: skip
                progress.advance(float("nan") if miou is None else miou)
                shared.terminal.event(
                    "image", task=task.name, index=tally.images - 1, key=entry.key, running_miou=miou,
                    loss=prediction.loss, is_updated=prediction.is_updated, seconds=round(done - ready, 6),
                )  # fmt: skip
                self.images += 1
                yield
        with explain_out_of_memory(method, f"end of {names[-1]}"):
            method.flush()
        for tally in self.tallies.values():
            self._finish(tally)
        self.is_finished = True

    def _finish(self, tally: TaskTally) -> None:
        """Write and say what a task came to."""
        shared, result = self.shared, tally.result()
        row = row_of(result, shared.dataset.classes)
        counts_CC = {"confusion_matrix": result.counts_CC}
        folder, settings = shared.folder.path / "tasks", shared.settings
        write_json(folder / f"{tally.slug}.json", row | counts_CC)
        if isinstance(settings, EvaluateConfig) and tally.labelled:
            has_picture = settings.evaluate.confusion_picture
            class_scores.write(folder, tally.slug, result.counts_CC, shared.dataset.classes, has_picture=has_picture)
        shared.mirror.summary({f"{tally.slug}/{name}": row[name] for name in MEANS})
        if isinstance(shared.settings, AdaptConfig) and shared.settings.tta.save_adapted:
            shared.models.method.save(shared.folder.path / "adapted" / tally.slug)
        brief = {name: value for name, value in row.items() if name not in ("per_class", "data_sha256")}
        shared.terminal.event("task", **brief)
        if tally.skipped or tally.broken:
            shared.terminal.warnings.print(
                f"{tally.task.name}: {tally.skipped} steps skipped, loss or gradient was not finite; "
                f"{tally.broken} predictions from logits that were not finite; {tally.resets} resets"
            )
        if tally.unguided:
            shared.console.print(
                f"{tally.task.name}: {tally.unguided} images with the grid's windows, as they had fewer than "
                f"{LEAST_BOXES} regions of high entropy"
            )
        if tally.refused:
            shared.console.print(
                f"{tally.task.name}: {tally.refused} steps refused, teacher and segmenter agreed on more than "
                "model.trust.max_agreement of the pixels"
            )

    def _step(self, sample: stream.Prepared) -> tuple[Prediction, Maps | None]:
        """The method's step; and what the teacher said, of the images that are kept to be looked at."""
        method, entry = self.shared.models.method, sample.entry
        if entry not in self.shared.shown or not isinstance(method, Combined):
            return method.step(sample.image_3HW, task=entry.task.name, key=entry.key), None
        method.witness = Witness(draws=method.window.draws)
        try:
            prediction = method.step(sample.image_3HW, task=entry.task.name, key=entry.key)
            return prediction, method.witness.maps()
        finally:
            method.witness = None

    def _score_and_save(
        self, tally: TaskTally, sample: stream.Prepared, prediction: Prediction, maps: Maps | None
    ) -> tuple[float | None, dict[str, list[int]] | None]:
        """Count the pixels; write the files that are asked for; returns the task's running mIoU and the image's counts.

        The counts: class index -> [correct, label, predicted] px. Both are None without labels.
        """
        logging = self.shared.settings.logging
        is_sampled = logging.predictions == "sample" and tally.images < logging.sample_images
        wants_file = logging.predictions == "all" or is_sampled
        is_shown, file_ids_C = sample.entry in self.shared.shown, self.shared.file_ids_C
        if sample.label_HW is None and not wants_file and not is_shown and file_ids_C is None:
            return None, None
        classes_HW = metrics.predict_at_label_size(prediction.logits_Chw, sample.size_px)
        if wants_file:
            path = self.shared.folder.path / "predictions" / tally.slug / f"{sample.entry.key}.png"
            write_png_palette(path, classes_HW.cpu().numpy(), self.shared.dataset.palette_C3)
        if file_ids_C is not None:
            path = self.shared.folder.path / submission.FOLDER / tally.slug / f"{sample.entry.key}.png"
            submission.write(path, classes_HW.cpu().numpy(), file_ids_C)
        if is_shown:
            folder = self.shared.folder.path / samples.FOLDER / tally.slug
            samples.write(folder, sample, classes_HW, self.shared.dataset.palette_C3, maps)
        if sample.label_HW is None:
            return None, None
        tally.matrix.update(classes_HW, sample.label_HW.to(classes_HW.device))
        tally.labelled += 1
        before_CC, tally.counts_CC = tally.counts_CC, tally.matrix.counts()
        return metrics.scores(tally.counts_CC).miou, _pixels_by_class(tally.counts_CC - before_CC)

    def _diagnose(self, tally: TaskTally, sample: stream.Prepared) -> dict[str, Any] | None:
        """Every n-th image of a task: can the teacher, as it is now, teach at the noise of this image's own step?"""
        settings, method = self.shared.settings, self.shared.models.method
        if not isinstance(settings, AdaptConfig) or not isinstance(method, Combined):
            return None
        if not settings.tta.diagnose_every or tally.images % settings.tta.diagnose_every:
            return None
        assert sample.label_HW is not None
        (found,) = examine(
            method, sample.image_3HW, sample.label_HW, task=tally.task.name, key=sample.entry.key, sigmas=[None]
        )
        return found.summary()

    def _record(
        self,
        tally: TaskTally,
        sample: stream.Prepared,
        prediction: Prediction,
        miou: float | None,
        classes: dict[str, list[int]] | None,
        diagnosis: dict[str, Any] | None,
    ) -> None:
        """One line of the record of truth, and its copy."""
        line: dict[str, Any] = {"task": tally.task.name, "index": tally.images, "key": sample.entry.key,
                                "data": sample.digest, "running_miou": miou}  # fmt: skip
        if classes is not None:
            line |= {"classes": classes}
        tally.broken += not prediction.is_finite
        if prediction.loss is not None:
            tally.skipped += not prediction.is_step_finite
            tally.refused += prediction.is_refused
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
        if prediction.is_guided is not None:
            tally.unguided += not prediction.is_guided
            line |= {"is_guided": prediction.is_guided}
        if diagnosis is not None:
            line |= {"diagnosis": diagnosis}
        self.shared.records.append(line)
        shown: dict[str, Any] = {name: line[name] for name in PLOTTED if line.get(name) is not None}
        wandb = self.shared.settings.logging.wandb
        if wandb.mode != "disabled" and tally.images < wandb.images:
            shown["image"] = picture_of(
                sample.image_3HW, prediction.logits_Chw, sample.label_HW, classes=self.shared.dataset.classes,
                caption=sample.entry.key,
            )  # fmt: skip
        self.shared.mirror.log({f"{tally.slug}/{name}": value for name, value in shown.items()}, step=tally.images)


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
        "resets": result.resets,
        "seconds": round(result.seconds, 3),
    }
