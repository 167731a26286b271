"""A run: the stream listed and checked, the models built, one loop a task, the results. `evaluate` is the same run."""

import hashlib
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console

from segadapt import stream
from segadapt.config import AdaptConfig, EvaluateConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.errors import UserError
from segadapt.models.build import Models, build_models
from segadapt.models.discriminative import Segmenter
from segadapt.models.generative import Teacher
from segadapt.protocol import identity, method_of, peak_memory_gib, protocol, versions
from segadapt.record import JsonLines, RunFolder, write_json
from segadapt.task_loop import MEANS, Run, TaskLoop, TaskResult, row_of
from segadapt.terminal import copyable_line, results_table
from segadapt.untrusted import read_json
from segadapt.wandb_mirror import mirrored

SHOWN = MEANS[:5]  # mRecall is mAcc
# Counts of a task that have a column where any is not 0, the last one with their sum.
FAULTS = {"steps_skipped": "skipped", "predictions_not_finite": "not finite", "resets": "resets"}


def run(
    settings: EvaluateConfig,
    *,
    segmenter: Segmenter | None = None,
    teacher: Teacher | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the whole stream; returns what results.json holds.

    Args:
        segmenter, teacher: see build_models; the settings' `checkpoint` then only names them in the protocol line.
    Raises:
        UserError: a mistake in settings, data or checkpoints, before the first step wherever it can be known.
    """
    console = console or Console()
    _check_leaves_something(settings)
    _check_can_diagnose(settings)
    dataset, tasks = build_dataset(settings.data), build_tasks(settings.data)
    entries = _all_entries(settings, dataset, tasks, console)
    flat = [entry for stretch in entries for entry in stretch]
    stream.verify(dataset, flat, workers=settings.data.workers)
    order_sha256 = stream.order_hash(flat)
    folder = RunFolder.open(
        settings.logging.root, settings.experiment.name, run_id=settings.experiment.id, settings=identity(settings)
    )
    models = build_models(settings, dataset.classes, segmenter=segmenter, teacher=teacher)
    _refuse_other_weights(folder, models)
    folder.start_over(asdict(settings))
    sentence = protocol(settings, order_sha256=order_sha256)
    console.print(f"run folder {folder.path}", f"protocol: {sentence}", sep="\n", highlight=False, soft_wrap=True)
    if models.placements:
        console.print("generative model on", *models.map_lines, sep="\n  ", highlight=False, soft_wrap=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    results = []
    samples = stream.read(dataset, flat, short_side_px=settings.data.short_side_px, workers=settings.data.workers)
    with mirrored(settings, folder, job_type=method_of(settings), protocol=sentence) as mirror:
        with JsonLines(folder.path / "records.jsonl") as records, JsonLines(folder.path / "timings.jsonl") as timings:
            timings.append({"started": started})
            shared = Run(
                settings, dataset, models, folder, mirror, console, records, timings, samples, num_tasks=len(tasks)
            )
            for stretch in entries:
                results += TaskLoop(shared, stretch).run()
        summary = {
            "protocol": sentence,
            "method": method_of(settings),
            "started": started,
            "tasks": [row_of(result, dataset.classes) for result in results],
            "mean": {name: _mean(results, name) for name in MEANS},
            "seed": settings.experiment.seed,
            "order_sha256": order_sha256,
            "data_sha256": hashlib.sha256("".join(result.data_sha256 for result in results).encode()).hexdigest(),
            "weights_sha256": models.fingerprints,
            "peak_memory_gib": peak_memory_gib(),
            "versions": versions(models.method.device),
        }
        write_json(folder.path / "results.json", summary)
        mirror.summary({f"mean/{name}": value for name, value in summary["mean"].items()})
    _print_results(console, results, summary["mean"])
    return summary | {"folder": str(folder.path)}


def _check_leaves_something(settings: EvaluateConfig) -> None:
    """UserError: unlabelled images, and neither predictions nor an adapted model to keep."""
    is_unlabelled = settings.data.kind == "files" and settings.data.label_path is None
    saves_model = isinstance(settings, AdaptConfig) and settings.tta.save_adapted
    if is_unlabelled and settings.logging.predictions == "none" and not saves_model:
        raise UserError("data.label_path=null and logging.predictions=none: the run would leave nothing. Set "
                        "logging.predictions=all, or give labels.")  # fmt: skip


def _check_can_diagnose(settings: EvaluateConfig) -> None:
    """UserError: diagnostics are asked for, and there are no labels."""
    is_unlabelled = settings.data.kind == "files" and settings.data.label_path is None
    if isinstance(settings, AdaptConfig) and settings.tta.diagnose_every and is_unlabelled:
        raise UserError(f"tta.diagnose_every={settings.tta.diagnose_every} and data.label_path=null: diagnostics "
                        "compare with labels. Set data.label_path, or tta.diagnose_every=0.")  # fmt: skip


def _refuse_other_weights(folder: RunFolder, models: Models) -> None:
    """UserError: the folder holds finished results of other weights, which a new start would delete."""
    path = folder.path / "results.json"
    if not path.is_file():
        return
    stored = read_json(path, cure="Remove the file, or choose another experiment.id.")
    for model, expected in stored.get("weights_sha256", {}).items():
        if (got := models.fingerprints.get(model)) != expected:
            raise UserError(
                f"Run folder {folder.path} holds results of other weights ({model}: {expected[:12]}; now "
                f"{str(got)[:12]}). Choose another experiment.name or experiment.id, or move the folder away."
            )


def _all_entries(
    settings: EvaluateConfig, dataset: Dataset, tasks: list[Task], console: Console
) -> list[list[stream.Entry]]:
    """The whole stream, listed before anything is loaded: what lies between two resets, mostly one task, in order.

    Says which labels have no image.
    """
    data, entries, said = settings.data, [], set()
    for task in tasks:
        entries.append(
            stream.order(dataset, task, seed=settings.experiment.seed, shuffle=data.shuffle, limit=data.limit)
        )
        missing = getattr(dataset, "missing_images", lambda _: [])(task)
        if missing and tuple(missing) not in said:
            said.add(tuple(missing))
            console.print(f"{task.name}: {len(missing)} labels have no image (first: {missing[0]})", highlight=False)
    if data.order != "mixed":
        return entries
    rounds = [[entry for of_task in entries for entry in of_task if entry.task.visit == visit + 1]
              for visit in range(data.rounds)]  # fmt: skip
    return [stream.mixed(one, seed=settings.experiment.seed, visit=visit + 1) for visit, one in enumerate(rounds)]


def _mean(results: list[TaskResult], name: str) -> float | None:
    """Unweighted mean over the tasks; None without labels."""
    values = [getattr(result.scores, name) for result in results if result.scores]
    return float(np.mean(values)) if values else None


def _print_results(console: Console, results: list[TaskResult], mean: dict[str, Any]) -> None:
    """The final table and one copyable line of mIoU per task and mean, in percent."""
    if not any(result.scores for result in results):
        console.print(f"{sum(result.images for result in results)} unlabelled images: predictions only")
        return
    rows = [
        [r.task.name, r.images, *(getattr(r.scores, name) for name in SHOWN), f"{r.seconds / r.images:.3f}"]
        for r in results
    ]
    rows.append(["mean", sum(r.images for r in results), *(mean[name] for name in SHOWN), ""])
    columns = ["task", "images", "mIoU", "mAcc", "aAcc", "mF1", "mPrec", "s/image"]
    for count, heading in FAULTS.items():
        if any(counts := [getattr(r, count) for r in results]):
            columns.append(heading)
            rows = [[*row, value] for row, value in zip(rows, [*counts, sum(counts)], strict=True)]
    console.print(results_table(rows, columns))
    line = copyable_line([*(r.scores.miou if r.scores else None for r in results), mean["miou"]])
    console.print(f"mIoU %: {line}", highlight=False, soft_wrap=True, markup=False)
