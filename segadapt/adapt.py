"""A run: the stream listed and checked, the models built, one loop a task, the results. `evaluate` is the same run."""

import hashlib
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from segadapt import __version__, class_scores, samples, stream, submission
from segadapt.checkpoint import Checkpoints
from segadapt.config import AdaptConfig, EvaluateConfig, RunConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.errors import UserError
from segadapt.models.build import Models, build_models
from segadapt.models.discriminative import Segmenter
from segadapt.models.generative import Teacher
from segadapt.protocol import identity, method_of, peak_memory_gib, protocol, rule_of, versions
from segadapt.record import JsonLines, RunFolder, write_json
from segadapt.resume import earlier_state, finished_results
from segadapt.rules import loaded_px
from segadapt.signals import Stopped, noted_signals
from segadapt.task_loop import MEANS, Run, TaskLoop, TaskResult, row_of
from segadapt.terminal import (
    Terminal,
    copyable_line,
    latex_row,
    markdown_row,
    open_terminal,
    paper_values,
    results_table,
)
from segadapt.wandb_mirror import mirrored

SHOWN = MEANS[:5]  # mRecall is mAcc
# Counts of a task that have a column where any is not 0, the last one with their sum.
FAULTS = {"steps_skipped": "skipped", "predictions_not_finite": "not finite", "resets": "resets"}


def run(
    settings: RunConfig,
    *,
    segmenter: Segmenter | None = None,
    teacher: Teacher | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the whole stream; returns what results.json holds.

    Args:
        segmenter, teacher: see build_models; the settings' `checkpoint` then only names them in the protocol line.
        console: see open_terminal.
    Raises:
        UserError: a mistake in settings, data or checkpoints, before the first step wherever it can be known.
    """
    terminal = open_terminal(settings.logging.terminal, console)
    console = terminal.console
    _check_leaves_something(settings)
    _check_can_diagnose(settings)
    dataset, tasks = build_dataset(settings.data), build_tasks(settings.data)
    submission.file_ids(settings, len(dataset.classes))  # or a UserError, before anything is read
    entries = _all_entries(settings, dataset, tasks, terminal.warnings)
    flat = [entry for stretch in entries for entry in stretch]
    stream.verify(dataset, flat, workers=settings.data.workers)
    folder = RunFolder.open(
        settings.logging.root, settings.experiment.name, run_id=settings.experiment.id, settings=identity(settings)
    )
    with folder.locked() as gone:
        if gone is not None:
            said = f"{folder.path} is taken over: {gone} is gone"
            terminal.warnings.print(said, highlight=False, soft_wrap=True, markup=False)
        models = build_models(settings, dataset.classes, segmenter=segmenter, teacher=teacher)
        origin = {
            "order_sha256": stream.order_hash(flat),
            "manifest_sha256": stream.manifest_hash(dataset, flat),
            "weights_sha256": models.fingerprints,
        }
        results = None if settings.experiment.restart else finished_results(folder, origin)
        if results is None:
            results = _adapt(settings, dataset, entries, models, folder, origin, terminal, num_tasks=len(tasks))
        else:
            Checkpoints(folder.path, seconds=None, images=None).clear()
            console.print(f"{folder.path} is finished; experiment.restart=true would start anew", highlight=False,
                          soft_wrap=True)  # fmt: skip
    _print_results(terminal, results, folder.path)
    if isinstance(settings, EvaluateConfig) and settings.evaluate.per_class:
        console.print(*class_scores.tables(folder.path), sep="\n")
    return results | {"folder": str(folder.path)}


def _adapt(
    settings: RunConfig,
    dataset: Dataset,
    entries: list[list[stream.Entry]],
    models: Models,
    folder: RunFolder,
    origin: Mapping[str, Any],
    terminal: Terminal,
    *,
    num_tasks: int,
) -> dict[str, Any]:
    """The stream from its start, or from where an earlier start stopped; returns what results.json holds.

    Raises:
        Stopped: a signal came; the same command goes on.
    """
    runtime, flat, console = settings.runtime, [entry for stretch in entries for entry in stretch], terminal.console
    checkpoints = Checkpoints(folder.path, seconds=runtime.checkpoint_seconds, images=runtime.checkpoint_images)
    state = None if settings.experiment.restart else earlier_state(checkpoints, folder, settings, origin, console)
    folder.start_over(asdict(settings), keep=state is not None)
    sentence, done = protocol(settings, order_sha256=origin["order_sha256"]), checkpoints.newest
    said = f"protocol: {sentence}; segmenter trained with loss reduction {models.loss_reduction}"
    console.print(f"run folder {folder.path}", said, sep="\n", highlight=False, soft_wrap=True)
    if models.placements:
        console.print("generative model on", *models.map_lines, sep="\n  ", highlight=False, soft_wrap=True)
    if state is not None:
        console.print(f"goes on after image {done} of {len(flat)}", highlight=False)
    terminal.event(
        "start", folder=folder.path, method=method_of(settings), protocol=sentence, images=len(flat), done=done,
        tasks=list(dict.fromkeys(entry.task.name for entry in flat)), placement=models.map_lines,
    )  # fmt: skip
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    started = now if state is None else state["started"]
    data = settings.data
    prepared = stream.read(dataset, flat[done:], short_side_px=loaded_px(settings), workers=data.workers)
    with (
        noted_signals() as asked,
        mirrored(settings, folder, job_type=method_of(settings), protocol=sentence) as mirror,
        JsonLines(folder.path / "records.jsonl", keep_bytes=state["records"] if state else 0) as records,
        JsonLines(folder.path / "timings.jsonl", keep_bytes=state["timings"] if state else 0) as timings,
    ):
        timings.append({"started": now, "images": done, "segadapt": __version__})
        shown = samples.choose(flat, seed=settings.experiment.seed, count=settings.logging.samples)
        file_ids_C = submission.file_ids(settings, len(dataset.classes))
        shared = Run(settings, dataset, models, folder, mirror, terminal, records, timings, prepared, shown, file_ids_C,
                     num_tasks=num_tasks)  # fmt: skip
        loops, first = [], 0
        for stretch in entries:
            later = len(flat) - first - len(stretch)
            loops.append(TaskLoop(shared, stretch, num_earlier=first, num_later=later))
            first += len(stretch)
        if state is not None:
            models.method.load_state_dict(state["method"])
            for loop, its_state in zip(loops, state["loops"], strict=True):
                loop.load_state_dict(its_state)

        def whole_state() -> dict[str, Any]:
            return {
                "origin": {**origin, "segadapt": __version__},
                "started": started,
                "records": records.sync(),
                "timings": timings.sync(),
                "method": models.method.state_dict(),
                "loops": [loop.state_dict() for loop in loops],
            }

        for loop in loops:
            with closing(loop.run()) as images:
                for _ in images:
                    done += 1
                    if asked.signum is not None or checkpoints.is_due(done):
                        checkpoints.write(done, whole_state())
                    if asked.signum is not None:
                        where = f"after image {done} of {len(flat)}"
                        raise Stopped(asked.signum, f"{asked.signum.name} {where}; the same command goes on from there")
        results = {
            "protocol": sentence,
            "rule": rule_of(settings),
            "loss_reduction": models.loss_reduction,
            "method": method_of(settings),
            "started": started,
            **_scores([result for loop in loops for result in loop.results], dataset.classes),
            "seed": settings.experiment.seed,
            **origin,
            "peak_memory_gib": peak_memory_gib(),
            "versions": versions(models.method.device),
        }
        write_json(folder.path / "results.json", results)
        checkpoints.clear()
        memory = {f"peak_memory_gib/cuda:{gpu}": gib for gpu, gib in enumerate(results["peak_memory_gib"])}
        mirror.summary({f"mean/{name}": value for name, value in results["mean"].items()} | memory)
        columns = ["task", "images", *MEANS, "seconds"]
        mirror.table("tasks", columns, [[row[name] for name in columns] for row in results["tasks"]])
    if asked.signum is not None:
        raise Stopped(asked.signum, f"{asked.signum.name} after the last image; {folder.path} is finished")
    return results


# --- before the run ---


def _check_leaves_something(settings: RunConfig) -> None:
    """UserError: unlabelled images, and neither predictions, a submission nor an adapted model to keep."""
    is_unlabelled = settings.data.kind == "files" and settings.data.label_path is None
    saves_model = isinstance(settings, AdaptConfig) and settings.tta.save_adapted
    submits = isinstance(settings, EvaluateConfig) and settings.evaluate.submission != "none"
    if is_unlabelled and settings.logging.predictions == "none" and not saves_model and not submits:
        raise UserError("data.label_path=null and logging.predictions=none: the run would leave nothing. Set "
                        "logging.predictions=all, or give labels.")  # fmt: skip


def _check_can_diagnose(settings: RunConfig) -> None:
    """UserError: diagnostics are asked for, and there are no labels."""
    is_unlabelled = settings.data.kind == "files" and settings.data.label_path is None
    if isinstance(settings, AdaptConfig) and settings.tta.diagnose_every and is_unlabelled:
        raise UserError(f"tta.diagnose_every={settings.tta.diagnose_every} and data.label_path=null: diagnostics "
                        "compare with labels. Set data.label_path, or tta.diagnose_every=0.")  # fmt: skip


def _all_entries(
    settings: RunConfig, dataset: Dataset, tasks: list[Task], warnings: Console
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
            warnings.print(f"{task.name}: {len(missing)} labels have no image (first: {missing[0]})", highlight=False)
    if data.order != "mixed":
        return entries
    rounds = [[entry for of_task in entries for entry in of_task if entry.task.visit == visit + 1]
              for visit in range(data.rounds)]  # fmt: skip
    return [stream.mixed(one, seed=settings.experiment.seed, visit=visit + 1) for visit, one in enumerate(rounds)]


def _scores(results: list[TaskResult], classes: tuple[str, ...]) -> dict[str, Any]:
    """Of all tasks, their means, and the hash over what was read."""
    return {
        "tasks": [row_of(result, classes) for result in results],
        "mean": {name: _mean(results, name) for name in MEANS},
        "data_sha256": hashlib.sha256("".join(result.data_sha256 for result in results).encode()).hexdigest(),
    }


def _mean(results: list[TaskResult], name: str) -> float | None:
    """Unweighted mean over the tasks; None without labels."""
    values = [getattr(result.scores, name) for result in results if result.scores]
    return float(np.mean(values)) if values else None


def _print_results(terminal: Terminal, results: Mapping[str, Any], folder: Path) -> None:
    """The final table, one copyable line of mIoU per task and mean, in percent, and rows for published tables."""
    tasks, mean, console = results["tasks"], results["mean"], terminal.console
    brief = [{name: row[name] for name in ("task", "images", "miou")} for row in tasks]
    shown = {name: results[name] for name in ("method", "protocol", "seed", "mean", "peak_memory_gib")}
    terminal.event("result", folder=folder, **shown, tasks=brief)
    if all(row["miou"] is None for row in tasks):
        line = f"{sum(row['images'] for row in tasks)} unlabelled images: predictions only"
        console.print(line)
        terminal.result(f"{folder}: {line}")
        return
    rows = [
        [row["task"], row["images"], *(row[name] for name in SHOWN), f"{row['seconds'] / row['images']:.3f}"]
        for row in tasks
    ]
    rows.append(["mean", sum(row["images"] for row in tasks), *(mean[name] for name in SHOWN), ""])
    columns = ["task", "images", "mIoU", "mAcc", "aAcc", "mF1", "mPrec", "s/image"]
    for count, heading in FAULTS.items():
        if any(counts := [row[count] for row in tasks]):
            columns.append(heading)
            rows = [[*row, value] for row, value in zip(rows, [*counts, sum(counts)], strict=True)]
    console.print(results_table(rows, columns))
    line = f"mIoU %: {copyable_line([*(row['miou'] for row in tasks), mean['miou']])}"
    published = paper_values([row["task"] for row in tasks], [row["miou"] for row in tasks])
    lines = line, *(write(results["method"], published) for write in (latex_row, markdown_row))
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)
    terminal.result(f"{folder}: {line}")
