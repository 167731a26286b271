"""The verb `diagnose`: can this teacher teach this segmenter, and at which noise level? Uses labels, changes nothing.

A diagnosis reads labels. Never choose settings by it on a test split: take held-out validation images.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from typing import Any

from rich.console import Console

from segadapt import stream
from segadapt.config_verbs import DiagnoseConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.diagnosis import best_sigma, images_of, plot, sentences, table_of, verdict_of
from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.models.combined import Combined
from segadapt.models.diagnostics import Tally, examine
from segadapt.models.discriminative import Segmenter
from segadapt.models.generative import Teacher
from segadapt.models.out_of_memory import explain_out_of_memory
from segadapt.parse import wants_teacher
from segadapt.protocol import choice_of, identity, peak_memory_gib, short_sides, versions, windows_of, without
from segadapt.record import RunFolder, write_bytes, write_json
from segadapt.terminal import TaskProgress
from segadapt.wandb_mirror import mirrored

CLEAN = Task(0)


def run(
    settings: DiagnoseConfig,
    *,
    segmenter: Segmenter | None = None,
    teacher: Teacher | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure all tasks at all noise levels; returns what diagnosis.json holds.

    Args:
        segmenter, teacher: see build_models; the settings' `checkpoint` then only names them in the protocol line.
    Raises:
        UserError: a mistake in settings, data or checkpoints, before the first measurement.
    """
    console = console or Console()
    check_settings(settings)
    dataset, data, seed = build_dataset(settings.data), settings.data, settings.experiment.seed
    tasks = tasks_of(settings)
    entries = [stream.order(dataset, task, seed=seed, shuffle=data.shuffle, limit=data.limit) for task in tasks]
    flat = [entry for of_task in entries for entry in of_task]
    stream.verify(dataset, flat, workers=data.workers)
    folder = RunFolder.open(
        settings.logging.root, settings.experiment.name, run_id=settings.experiment.id, settings=identity_of(settings)
    )
    with folder.locked():
        models = build_models(frozen(settings), dataset.classes, segmenter=segmenter, teacher=teacher)
        combined = models.method
        assert isinstance(combined, Combined)
        models.assert_placed()
        folder.start_over(asdict(settings))
        sentence = protocol(settings, order_sha256=stream.order_hash(flat))
        console.print(f"run folder {folder.path}", f"protocol: {sentence}", sep="\n", highlight=False, soft_wrap=True)
        if models.placements:
            console.print("generative model on", *models.map_lines, sep="\n  ", highlight=False, soft_wrap=True)
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with mirrored(settings, folder, job_type="diagnose", protocol=sentence) as mirror:
            rows = []
            for number, (task, of_task) in enumerate(zip(tasks, entries, strict=True), 1):
                progress = TaskProgress(
                    task.name, task_number=number, num_tasks=len(tasks), num_images=len(of_task), console=console
                )
                rows.append(measure(settings, combined, dataset, task, of_task, progress))
                write_json(folder.path / "tasks" / f"{number - 1:02d}_{task.name.replace('/', '-')}.json", rows[-1])
            verdict = verdict_of(rows)
            diagnosis = {
                "protocol": sentence,
                "method": "diagnose",
                "started": started,
                "tasks": rows,
                "verdict": verdict,
                "seed": seed,
                "weights_sha256": models.fingerprints,
                "peak_memory_gib": peak_memory_gib(),
                "versions": versions(combined.device),
            }
            write_json(folder.path / "diagnosis.json", diagnosis)
            title = f"teacher {settings.model.generative.checkpoint}, {images_of(rows)} images a task"
            for kind in ("png", "svg"):
                write_bytes(folder.path / f"diagnosis.{kind}", plot(rows, title=title, kind=kind))
            mirror.summary({name: value for name, value in verdict.items() if not isinstance(value, str | list)})
        console.print(table_of(rows))
        said = (f"plot {folder.path / 'diagnosis.png'}", *sentences(verdict))
        console.print(*said, sep="\n", highlight=False, markup=False, soft_wrap=True)
    return diagnosis | {"folder": str(folder.path)}


def check_settings(settings: DiagnoseConfig) -> None:
    """UserError: no labels, no teacher, no clean images, or noise levels that cannot be asked."""
    data, sigmas = settings.data, settings.diagnose.sigmas
    if data.kind == "files" and data.label_path is None:
        raise UserError("data.label_path=null: diagnose compares both models with labels. Set data.label_path.")
    if not wants_teacher(settings.tta):
        t = settings.tta
        raise UserError(f"tta.forward_mode={t.forward_mode}, tta.method={t.method}: diagnose asks the teacher, which "
                        "these do not load. Set tta.forward_mode=tta and tta.method=generative.")  # fmt: skip
    if settings.diagnose.clean and data.corruptions and "{corruption}" in str(data.image_path):
        raise UserError(f"diagnose.clean=true, but data.image_path={data.image_path} names no clean images. Set "
                        "diagnose.clean=false, or diagnose them in a run of their own.")  # fmt: skip
    if not sigmas or len(set(sigmas)) != len(sigmas) or not all(0 < sigma <= 1 for sigma in sigmas):
        raise UserError(f"diagnose.sigmas={sigmas}: expected one or more noise levels, each once, above 0 and at most "
                        "1. Correct the list.")  # fmt: skip


def tasks_of(settings: DiagnoseConfig) -> list[Task]:
    """The clean set first, if asked, then the corruptions."""
    tasks = build_tasks(settings.data)
    return [CLEAN, *tasks] if settings.diagnose.clean and tasks != [CLEAN] else tasks


def identity_of(settings: DiagnoseConfig) -> dict[str, Any]:
    """All settings that can change the figures: how a run would update is none of them."""
    return without(identity(settings), ("tta", "model.update", "method")) | {"method": "diagnose"}


def frozen(settings: DiagnoseConfig) -> DiagnoseConfig:
    """The same settings without training of the teacher, which then needs no memory for gradients and moments."""
    update = replace(settings.model.update, discriminative=True, generative=False, lora_rank=0, prompt_offset=False)
    return replace(settings, model=replace(settings.model, update=update))


def protocol(settings: DiagnoseConfig, *, order_sha256: str) -> str:
    """One sentence that says what was measured."""
    model, data = settings.model, settings.data
    g, levels = model.generative, ", ".join(f"{sigma:g}" for sigma in settings.diagnose.sigmas)
    limit = "all images" if data.limit is None else f"at most {data.limit} images"
    return "; ".join([
        f"method diagnose; segmenter {model.discriminative.checkpoint}; teacher {g.checkpoint}",
        f"{windows_of(g)}; sigma {levels}; draws {settings.diagnose.draws}",
        f"LogitNorm {'on' if model.loss.logit_norm else 'off'}, temperature {model.loss.temperature:g}",
        f"classes {choice_of(model.loss)}, at most {model.loss.classes_threshold} a window",
        *(["class embeddings shuffled"] if g.shuffle_classes else []),
        "both scored on the latent grid, labels at cell centres, no update",
        f"{short_sides(settings)}; {settings.runtime.precision}; seed {settings.experiment.seed}",
        f"data {data.name} {data.split}, {limit} of each task, order {order_sha256[:12]}",
    ])  # fmt: skip


def measure(
    settings: DiagnoseConfig,
    combined: Combined,
    dataset: Dataset,
    task: Task,
    entries: Sequence[stream.Entry],
    progress: TaskProgress,
) -> dict[str, Any]:
    """One task: what the models say of its images, summed at each noise level."""
    asked, data = settings.diagnose, settings.data
    totals: list[Tally] = []
    with progress:
        for sample in stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers):
            assert sample.label_HW is not None
            with explain_out_of_memory(combined, f"{sample.entry.key} of {task.name}"):
                tallies = examine(
                    combined, sample.image_3HW, sample.label_HW, task=task.name, key=sample.entry.key,
                    sigmas=asked.sigmas, draws=asked.draws,
                )  # fmt: skip
            totals = [reduce(add, pair) for pair in zip(totals, tallies, strict=True)] if totals else tallies
            progress.advance(totals[0].summary()["segmenter"]["miou"])
    levels: list[dict[str, Any]] = [
        {"sigma": sigma} | total.summary() for sigma, total in zip(asked.sigmas, totals, strict=True)
    ]
    shared = {name: levels[0][name] for name in ("images", "pixels", "segmenter")}
    for level in levels:
        for name in shared:
            del level[name]
    return {"task": task.name} | shared | {"best_sigma": best_sigma(levels), "levels": levels}
