"""The verb `check`: read all data, and if asked load both models and take one step, before a run is paid for.

C classes   H W image px
"""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.console import Console
from rich.table import Table

from segadapt import stream
from segadapt.checkpoint import KEPT, size_of
from segadapt.config import CheckConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.datasets.labels import IGNORE
from segadapt.datasets.resize import resize_short_side, size_at
from segadapt.errors import UserError
from segadapt.models.build import Models, build_models
from segadapt.models.combined import Combined
from segadapt.models.generative import windows
from segadapt.models.generative.guided import LEAST_BOXES, MOST_BOXES
from segadapt.models.generative.plan import GIB
from segadapt.models.generative.sd3 import Sd3
from segadapt.models.out_of_memory import explain_out_of_memory
from segadapt.parse import wants_teacher
from segadapt.terminal import results_table

MOST_PROBLEMS = 20  # shown; all are counted
MOST_SIZES = 10  # shown


@dataclass(frozen=True)
class ImageFacts:
    """What is kept of one image that could be read."""

    entry: stream.Entry
    size_px: tuple[int, int]  # H, W as read
    resized_px: tuple[int, int]  # H, W after the short side was set
    digest: str  # of the pixels as read, corrupted
    pixels_C: np.ndarray | None  # int64, labelled pixels of each class; None: unlabelled


def scan(
    dataset: Dataset, entries: Sequence[stream.Entry], *, short_side_px: int, workers: int
) -> Iterator[ImageFacts | str]:
    """Read every entry in order, `workers` processes ahead; a problem is yielded as its one line, not raised."""
    return stream.ahead(partial(_facts, dataset, short_side_px), entries, workers=workers)


def _facts(dataset: Dataset, short_side_px: int, entry: stream.Entry) -> ImageFacts | str:
    try:
        sample = dataset.load(entry.task, entry.key)
    except UserError as error:
        return f"{entry.task.name}: {error}"
    height, width = resize_short_side(sample.image_HW3, short_side_px).shape[1:]
    pixels_C = None
    if sample.label_HW is not None:
        pixels_C = np.bincount(sample.label_HW.ravel(), minlength=IGNORE + 1)[: len(dataset.classes)]
    digest = hashlib.blake2b(np.ascontiguousarray(sample.image_HW3).data, digest_size=16).hexdigest()
    return ImageFacts(entry, sample.image_HW3.shape[:2], (height, width), digest, pixels_C)


def run(settings: CheckConfig) -> None:
    """Print what is there; no file is written.

    Raises:
        UserError: once, at the end, if any image, label or model would stop a run; its causes are printed before.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    data, seed = settings.data, settings.experiment.seed
    dataset, problems, readable = build_dataset(data), [], None
    for task in build_tasks(data):
        try:
            entries = stream.order(dataset, task, seed=seed, shuffle=data.shuffle, limit=data.limit)
        except UserError as error:
            problems.append(f"{task.name}: {error}")
            continue
        entries = entries[: settings.check.images]
        found = list(scan(dataset, entries, short_side_px=data.short_side_px, workers=data.workers))
        facts = [item for item in found if isinstance(item, ImageFacts)]
        problems += [item for item in found if isinstance(item, str)]
        readable = readable or (facts[0].entry if facts else None)
        missing = getattr(dataset, "missing_images", lambda _: [])(task)
        heading = f"\n{task.name}: {len(facts)} of {len(entries)} images read, {origin(settings, task)}"
        console.print(heading, *notes(facts, missing_images=missing), sep="\n")
        console.print(sizes_table(facts, settings))
        if any(item.pixels_C is not None for item in facts):
            console.print(classes_table(facts, dataset.classes))
    if settings.check.load_models and readable is not None:
        try:
            problems += check_models(settings, dataset, readable, console)
        except UserError as error:
            problems.append(str(error))
    if problems:
        console.print(*(f"problem: {problem}" for problem in problems[:MOST_PROBLEMS]), sep="\n")
        shown = min(len(problems), MOST_PROBLEMS)
        raise UserError(
            f"problems found: {len(problems)}, shown: {shown}; expected none. Correct them and check again."
        )
    console.print("\nno problem found")


def origin(settings: CheckConfig, task: Task) -> str:
    """Where a task's pixels come from."""
    if settings.data.kind == "toytown":
        return "drawn on the fly"
    on_disk = task.corruption is None or "{corruption}" in str(settings.data.image_path)
    return "as they are on disk" if on_disk else "corrupted on the fly"


def notes(facts: Sequence[ImageFacts], *, missing_images: Sequence[str]) -> list[str]:
    """What would not stop a run, but is worth a look."""
    lines = []
    if missing_images:
        lines.append(f"{len(missing_images)} labels have no image (first: {missing_images[0]})")
    if any(item.pixels_C is None for item in facts):
        lines.append("no labels: predictions only")
    if empty := [item.entry.key for item in facts if item.pixels_C is not None and not item.pixels_C.any()]:
        lines.append(f"{len(empty)} labels are ignored throughout (first: {empty[0]})")
    first_of: dict[str, str] = {}
    twins = [(item.entry.key, first_of.setdefault(item.digest, item.entry.key)) for item in facts]
    if twins := [f"{key} = {first}" for key, first in twins if key != first]:
        lines.append(f"{len(twins)} images repeat the pixels of another: {', '.join(twins[:3])}")
    return lines


def sizes_table(facts: Sequence[ImageFacts], settings: CheckConfig) -> Table:
    """The commonest sizes on disk, what they become for each model, and how many windows the teacher sees."""
    own_px = {
        "segmenter": settings.model.discriminative.short_side_px,
        "teacher": settings.model.generative.short_side_px,
    }
    g, count = settings.model.generative, Counter((item.size_px, item.resized_px) for item in facts)
    rows: list[list[str | int]] = []
    for ((height, width), (new_height, new_width)), images in count.most_common(MOST_SIZES):
        count_windows: str | int = "none"
        if wants_teacher(settings.tta):
            size_px = size_at(new_height, new_width, g.short_side_px)
            plan_K3 = windows.plan(*size_px, window_px=g.window_px, stride_px=g.stride_px)
            count_windows = f"{LEAST_BOXES}-{MOST_BOXES} or {len(plan_K3)}" if g.windows == "entropy" else len(plan_K3)
        sizes = {f"{of} ": size_at(new_height, new_width, px) for of, px in own_px.items() if px is not None}
        resized = [f"{of}{y} x {x}" for of, (y, x) in ({"": (new_height, new_width)} | sizes).items()]
        rows.append([f"{height} x {width}", ", ".join(resized), count_windows, images])
    if others := count.total() - sum(int(row[3]) for row in rows):
        rows.append([f"{len(count) - len(rows)} other sizes", "", "", others])
    portrait = sum(item.size_px[0] > item.size_px[1] for item in facts)
    columns = ["height x width, px", "resized, px", "windows", "images"]
    return results_table(rows, columns, title=f"{portrait} portrait, {len(facts) - portrait} landscape or square")


def classes_table(facts: Sequence[ImageFacts], classes: Sequence[str]) -> Table:
    """Share of the labelled pixels, and the number of images that show a class."""
    pixels_NC = np.stack([item.pixels_C for item in facts if item.pixels_C is not None])
    share_C = pixels_NC.sum(axis=0) / max(1, pixels_NC.sum())
    rows = [[name, float(share_C[c]), int((pixels_NC[:, c] > 0).sum())] for c, name in enumerate(classes)]
    return results_table(rows, ["class", "pixels %", "images"])


def check_models(settings: CheckConfig, dataset: Dataset, entry: stream.Entry, console: Console) -> list[str]:
    """Load both models as adapt would and take one step on one image; returns the problems."""
    models = build_models(settings, dataset.classes)
    console.print(*describe(models), sep="\n")
    method, start = models.method, time.perf_counter()
    image_3HW = resize_short_side(dataset.load(entry.task, entry.key).image_HW3, settings.data.short_side_px)
    with explain_out_of_memory(method, f"{entry.key} of {entry.task.name}"):
        step = method.step(image_3HW, task=entry.task.name, key=entry.key)
    is_finite = bool(step.logits_Chw.isfinite().all()) and step.is_step_finite
    said, problems = check_disk(settings.logging.root, size_of(method.state_dict()))
    console.print(said)
    method.reset()
    numbers = "" if step.loss is None else f"loss {step.loss:.6g}, gradient norm {step.grad_norm:.6g}, "
    console.print(f"one step on {entry.task.name} {entry.key}: {numbers}{time.perf_counter() - start:.2f} s")
    for index in range(torch.cuda.device_count()) if method.device.type == "cuda" else ():
        console.print(f"cuda:{index}: {torch.cuda.max_memory_reserved(index) / GIB:.1f} GiB at most")
    problem = f"{entry.key}: {numbers}expected finite numbers. Check the checkpoints, or set runtime.precision=fp32."
    return problems if is_finite else [problem, *problems]


def check_disk(root: str, state_bytes: int) -> tuple[str, list[str]]:
    """What the checkpoints of a run need of the disk and what is free there; and that as a problem if it is too little.

    Args:
        root: logging.root, which need not exist.
        state_bytes: of one checkpoint.
    """
    path = Path(root).expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    needed, free = (KEPT + 1) * state_bytes / GIB, shutil.disk_usage(there).free / GIB
    line = f"checkpoints: {KEPT} are kept while one is written, {needed:.2f} GiB; free: {free:.2f} GiB"
    cure = f"logging.root={root}: {line}. Make room, or choose another logging.root."
    return line, [] if needed <= free else [cure]


def describe(models: Models) -> list[str]:
    """Sizes, embeddings, autoencoder, placement and host memory of the loaded models."""
    method = models.method
    lines = [f"segmenter: {_millions(method.segmenter.net)}"]
    if not isinstance(method, Combined):
        return [*lines, "teacher: none, this method needs none"]
    teacher = method.generative
    assert isinstance(teacher, Sd3), "settings alone name no other"
    vae, text = teacher.autoencoder, teacher.embeddings
    latents = "already shifted and scaled"
    if isinstance(vae, AutoencoderKL):
        latents = "shift {shift_factor:g}, scale {scaling_factor:g}".format(**vae.config)
    snapshot = sum(parameter.numel() * parameter.element_size() for parameter in method.parameters().values())
    return [
        *lines,
        f"teacher: transformer {_millions(teacher.transformer)}, autoencoder {_millions(vae)}",
        f"latents: {latents}",
        f"embeddings: {text.source}, sequence {tuple(text.sequence_CLE.shape)}, pooled {tuple(text.pooled_CD.shape)}",
        *(f"placement: {line}" for line in models.map_lines),
        f"host memory of the source state: {snapshot / GIB:.2f} GiB",
    ]


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M parameters"
