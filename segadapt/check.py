"""The verb `check`: read all data, and if asked load both models and take a step, before a run is paid for.

N images   C classes
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from segadapt import check_images, stream
from segadapt.check_images import ImageFacts
from segadapt.check_models import check_models, estimated_s, step_lines
from segadapt.check_samples import write_sample
from segadapt.config_verbs import CheckConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, build_tasks, of_split
from segadapt.errors import UserError
from segadapt.record import write_json
from segadapt.terminal import Cell, results_table
from segadapt.training.class_weights import RATIO, RECIPES, class_weights, ratio

MOST_PROBLEMS = 20  # shown; check.json has all
MOST_SIZES = 10  # shown
FOLDER = "check"  # below {logging.root}/{experiment.name}


def run(settings: CheckConfig) -> None:
    """Print what is there, and write it to {logging.root}/{experiment.name}/check/check.json, with pictures if asked.

    Raises:
        UserError: once, at the end, if any image, label or model would stop a run; its causes are printed before.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    folder = Path(settings.logging.root) / settings.experiment.name / FOLDER
    splits = [settings.data.split, *settings.check.splits]
    if len(set(splits)) != len(splits):
        raise UserError(f"check.splits={settings.check.splits} beside data.split={settings.data.split}: expected other "
                        "splits, each once. Correct the list.")  # fmt: skip
    datasets = {split: build_dataset(of_split(settings.data, split)) for split in splits}
    dataset = datasets[settings.data.split]
    found = read_tasks(settings, datasets, folder, console)
    problems, facts = found["problems"], found.pop("facts")
    if settings.check.load_models and facts:
        try:
            step, more = check_models(settings, dataset, commonest(facts))
            problems += more
            images, read_s = found["stream_images"], found["read_s"]
            found |= {"step": step, "estimated_s": estimated_s(step, images=images, read_s=read_s)}
            console.print("", *step["models"], *step_lines(step), sep="\n")
            console.print(f"the whole run: about {timedelta(seconds=round(found['estimated_s']))} for {images} images, "
                          f"after loading; an estimate from {step['step_s']:.2f} s a step and {read_s:.2f} s to read "
                          "an image")  # fmt: skip
        except UserError as error:
            problems.append(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", found)
    console.print(f"\nall of this: {folder / 'check.json'}")
    if found["samples"]:
        console.print(f"{len(found['samples'])} pictures: {folder / 'samples'}")
    if problems:
        console.print(*(f"problem: {problem}" for problem in problems[:MOST_PROBLEMS]), sep="\n")
        shown = min(len(problems), MOST_PROBLEMS)
        raise UserError(
            f"problems found: {len(problems)}, shown: {shown}; expected none. Correct them and check again."
        )
    console.print("no problem found")


def read_tasks(settings: CheckConfig, datasets: dict[str, Dataset], folder: Path, console: Console) -> dict[str, Any]:
    """Read the images of every condition of the stream once, in each split; say what is there, draw samples.

    Returns:
        what check.json holds of the data, and under "facts" the ImageFacts of the first task that could be read.
    """
    data = settings.data
    found: dict[str, Any] = {"tasks": [], "class_weights": {}, "samples": [], "problems": [], "facts": []}
    seen: dict[str, tuple[str, str]] = {}
    shown: dict[str, np.ndarray] = {}
    stream_images, read, seconds = 0, 0, 0.0
    has_labels = data.kind != "files" or data.label_path is not None
    for (split, dataset), task in product(datasets.items(), build_tasks(data)):
        part = task.name if len(datasets) == 1 else split if task.corruption is None else f"{split} {task.name}"
        try:
            entries = stream.order(dataset, task, seed=settings.experiment.seed, shuffle=data.shuffle, limit=data.limit)
        except UserError as error:
            found["problems"].append(f"{part}: {error}")
            continue
        stream_images += len(entries) if split == data.split else 0
        if task.visit > 1:  # the same images once more
            continue
        entries, start = entries[: settings.check.images], time.perf_counter()
        items = list(check_images.scan(dataset, entries, short_side_px=data.short_side_px, workers=data.workers))
        seconds, read = seconds + time.perf_counter() - start, read + len(entries)
        facts = [item for item in items if isinstance(item, ImageFacts)]
        found["problems"] += [f"{part}: {item}" for item in items if isinstance(item, str)]
        row = {"task": part, "split": split, **_task_row(settings, dataset, task, facts, part, seen)}
        row["images"] = len(entries)
        _print_task(console, row, found["tasks"])
        found["tasks"].append(row)
        pixels_NC = check_images.pixels_of(facts)
        if pixels_NC is not None:
            shown.setdefault(split, pixels_NC.sum(axis=0))
        if pixels_NC is not None and split == data.split and not found["class_weights"]:
            found["class_weights"] = {recipe: class_weights(recipe, pixels_NC) for recipe in RECIPES}
            recipe = settings.check.class_weights
            line = weights_line(recipe, found["class_weights"][recipe], most=ratio(pixels_NC), split=split)
            console.print(line)
        found["facts"] = found["facts"] or facts
        pictures = folder / "samples" / (split if len(datasets) > 1 else "")
        for item in facts[: settings.check.samples]:
            found["samples"].append(str(write_sample(pictures, settings, dataset, item.entry)))
    if has_labels and not found["class_weights"]:
        console.print(f"class weights: none, as no labelled image of {data.split} could be read")
    found["split_notes"] = check_images.split_notes(shown, next(iter(datasets.values())).classes) if shown else []
    console.print(*found["split_notes"], sep="\n", end="\n" if found["split_notes"] else "")
    return found | {"stream_images": stream_images, "read_s": seconds / max(1, read)}


def _task_row(
    settings: CheckConfig,
    dataset: Dataset,
    task: Task,
    facts: Sequence[ImageFacts],
    part: str,
    seen: dict[str, tuple[str, str]],
) -> dict[str, Any]:
    """What check.json holds of a task, beside its names; see `check_images.repeats`."""
    repeated, missing = check_images.repeats(facts, part, seen), getattr(dataset, "missing_images", lambda _: [])(task)
    pixels_NC = check_images.pixels_of(facts)
    classes = []
    if pixels_NC is not None:
        totals = zip(dataset.classes, pixels_NC.sum(axis=0), (pixels_NC > 0).sum(axis=0), strict=True)
        classes = [{"class": name, "pixels": int(pixels), "images": int(shown)} for name, pixels, shown in totals]
    return {
        "origin": check_images.origin(settings, task),
        "read": len(facts),
        "portrait": sum(item.size_px[0] > item.size_px[1] for item in facts),
        "turned": [item.entry.key for item in facts if item.is_turned],
        "repeated": [[key, *first] for key, first in repeated],
        "labels_without_image": missing,
        "notes": check_images.notes(facts, dataset.classes, part=part, missing_images=missing, repeated=repeated),
        "sizes": check_images.sizes(facts, settings),
        "classes": classes,
        "ignored_pixels": sum(item.ignored for item in facts),
    }


def _print_task(console: Console, row: dict[str, Any], before: Sequence[dict[str, Any]]) -> None:
    """Heading, notes and tables of a task; tables that an earlier task has as well are not printed again."""
    console.print(f"\n{row['task']}: {row['read']} of {row['images']} images read, {row['origin']}", *row["notes"],
                  sep="\n")  # fmt: skip
    for name, table in (("sizes", sizes_table), ("classes", classes_table)):
        alike = next((other["task"] for other in before if other[name] == row[name]), None)
        if alike:
            console.print(f"{name}: as of {alike}")
        elif row[name]:
            console.print(table(row))


def sizes_table(row: dict[str, Any]) -> Table:
    """The commonest sizes on disk, what they become for each model, and how many windows the teacher sees."""
    lines: list[list[Cell]] = []
    for size in row["sizes"][:MOST_SIZES]:
        own = {f"{of} ": size[f"{of}_px"] for of in ("segmenter", "teacher") if f"{of}_px" in size}
        resized = [f"{of}{y} x {x}" for of, (y, x) in ({"": size["resized_px"]} | own).items()]
        height, width = size["size_px"]
        lines.append([f"{height} x {width}", ", ".join(resized), size["windows"] or "none", size["images"]])
    if others := row["sizes"][MOST_SIZES:]:
        lines.append([f"{len(others)} other sizes", "", "", sum(size["images"] for size in others)])
    portrait = row["portrait"]
    columns = ["height x width, px", "resized, px", "windows", "images"]
    return results_table(lines, columns, title=f"{portrait} portrait, {row['read'] - portrait} landscape or square")


def classes_table(row: dict[str, Any]) -> Table:
    """Share of the labelled pixels, and the number of images that show a class."""
    total = max(1, sum(line["pixels"] for line in row["classes"]))
    lines = [[line["class"], line["pixels"] / total, line["images"]] for line in row["classes"]]
    return results_table(lines, ["class", "pixels %", "images"])


def weights_line(recipe: str, weights_C: np.ndarray, *, most: float, split: str) -> str:
    """Class weights in label order, copyable; '-' for classes in no label.

    Args:
        most: of class_weights.ratio.
    """
    numbers = ", ".join("-" if math.isnan(weight) else f"{weight:.4g}" for weight in weights_C)
    worth = "worth a try" if most > RATIO else "hardly needed"
    return (f"class weights: {worth}, the commonest class has {most:.0f} times the pixels of the rarest; weights for "
            f"training belong to the training split, these are of {split}\n"
            f"{recipe} ({RECIPES[recipe][0]}): [{numbers}]")  # fmt: skip


def commonest(facts: Sequence[ImageFacts]) -> stream.Entry:
    """The first image of the commonest size: its step stands for all."""
    size_px = Counter(item.resized_px for item in facts).most_common(1)[0][0]
    return next(item.entry for item in facts if item.resized_px == size_px)
