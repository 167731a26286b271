"""What `check` finds in the images and labels of a task: sizes, ids, classes, repeats, orientation.

N images   C classes   H W image px
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segadapt import stream
from segadapt.config_verbs import CheckConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.decode import is_turned
from segadapt.datasets.labels import IGNORE
from segadapt.datasets.resize import resize_short_side, size_at
from segadapt.errors import UserError
from segadapt.models.generative import windows
from segadapt.models.generative.guided import LEAST_BOXES, MOST_BOXES
from segadapt.parse import wants_teacher

NAMED = 3  # keys of a note


@dataclass(frozen=True)
class ImageFacts:
    """What is kept of one image that could be read."""

    entry: stream.Entry
    size_px: tuple[int, int]  # H, W as read
    resized_px: tuple[int, int]  # H, W after the short side was set
    digest: str  # of the pixels as read, corrupted
    pixels_C: np.ndarray | None  # int64, labelled pixels of each class; None: unlabelled
    ignored: int  # pixels of the label
    is_turned: bool  # the file's EXIF turns or mirrors it


def scan(
    dataset: Dataset, entries: Sequence[stream.Entry], *, short_side_px: int, workers: int
) -> Iterator[ImageFacts | str]:
    """Read every entry in order, `workers` processes ahead; a problem is yielded as its one line, not raised."""
    return stream.ahead(partial(_facts, dataset, short_side_px), entries, workers=workers)


def _facts(dataset: Dataset, short_side_px: int, entry: stream.Entry) -> ImageFacts | str:
    try:
        sample, source = dataset.load(entry.task, entry.key), dataset.source(entry.task, entry.key)
    except UserError as error:
        return str(error)
    height, width = resize_short_side(sample.image_HW3, short_side_px).shape[1:]
    pixels_C, ignored = None, 0
    if sample.label_HW is not None:
        counts_256 = np.bincount(sample.label_HW.ravel(), minlength=IGNORE + 1)
        pixels_C, ignored = counts_256[: len(dataset.classes)], int(counts_256[IGNORE])
    return ImageFacts(
        entry,
        sample.image_HW3.shape[:2],
        (height, width),
        hashlib.blake2b(np.ascontiguousarray(sample.image_HW3).data, digest_size=16).hexdigest(),
        pixels_C,
        ignored,
        source.is_file and is_turned(Path(source.image)),
    )


def origin(settings: CheckConfig, task: Task) -> str:
    """Where a task's pixels come from."""
    if settings.data.kind == "toytown":
        return "drawn on the fly"
    on_disk = task.corruption is None or "{corruption}" in str(settings.data.image_path)
    return "as they are on disk" if on_disk else "corrupted on the fly"


def repeats(
    facts: Sequence[ImageFacts], part: str, seen: dict[str, tuple[str, str]]
) -> list[tuple[str, tuple[str, str]]]:
    """Keys of a part whose pixels an earlier image has, and that one's part and key; `seen` is what there was, and
    grows."""
    pairs = [(item.entry.key, seen.setdefault(item.digest, (part, item.entry.key))) for item in facts]
    return [(key, first) for key, first in pairs if first != (part, key)]


def notes(
    facts: Sequence[ImageFacts],
    classes: Sequence[str],
    *,
    part: str,
    missing_images: Sequence[str],
    repeated: Sequence[tuple[str, tuple[str, str]]],
) -> list[str]:
    """What would not stop a run, but is worth a look.

    Args:
        part: name of the task, or of the split.
        repeated: see `repeats`.
    """
    lines, pixels_NC = [], pixels_of(facts)
    labelled = [item.entry.key for item in facts if item.pixels_C is not None]
    if missing_images:
        lines.append(f"{len(missing_images)} labels have no image (first: {missing_images[0]})")
    if len(labelled) < len(facts):
        lines.append("no labels: predictions only")
    if pixels_NC is not None:
        if empty := [key for key, pixels_C in zip(labelled, pixels_NC, strict=True) if not pixels_C.any()]:
            lines.append(f"{len(empty)} labels are ignored throughout (first: {empty[0]})")
        pixels_C = pixels_NC.sum(axis=0)
        if ignored := sum(item.ignored for item in facts):
            lines.append(f"{100 * ignored / (ignored + pixels_C.sum()):.1f} % of the label pixels are ignored")
        if unseen := [name for name, pixels in zip(classes, pixels_C, strict=True) if not pixels]:
            named = ", ".join(unseen[:NAMED]) + (", ..." if len(unseen) > NAMED else "")
            lines.append(f"{len(unseen)} of {len(classes)} classes are in no label: {named}; they have no score")
    if turned := [item.entry.key for item in facts if item.is_turned]:
        lines.append(f"{len(turned)} images are turned as their EXIF says (first: {turned[0]}); labels are not: they "
                     "must show the turned image")  # fmt: skip
    if repeated:
        named = [f"{key} = {other}" if of == part else f"{key} of {part} = {other} of {of}"
                 for key, (of, other) in repeated[:NAMED]]  # fmt: skip
        lines.append(f"{len(repeated)} images repeat the pixels of another: {', '.join(named)}")
    return lines


def split_notes(pixels: dict[str, np.ndarray], classes: Sequence[str]) -> list[str]:
    """Classes that one split shows and another does not.

    Args:
        pixels: by split, int64 [C], labelled pixels; the first is the one to train on.
    """
    (trained, trained_C), *others = pixels.items()
    lines = []
    for split, other_C in others:
        for shown, hidden, shown_C, hidden_C, means in (
            (trained, split, trained_C, other_C, "they have no score there"),
            (split, trained, other_C, trained_C, "nothing can learn them"),
        ):
            if names := [name for c, name in enumerate(classes) if shown_C[c] and not hidden_C[c]]:
                listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
                lines.append(
                    f"{len(names)} classes are in labels of {shown}, but in none of {hidden}: {listed}; {means}"
                )
    return lines


def sizes(facts: Sequence[ImageFacts], settings: CheckConfig) -> list[dict[str, Any]]:
    """Each size on disk, the commonest first: what it becomes for each model, the teacher's windows, its images."""
    own_px = {
        "segmenter": settings.model.discriminative.short_side_px,
        "teacher": settings.model.generative.short_side_px,
    }
    g, count = settings.model.generative, Counter((item.size_px, item.resized_px) for item in facts)
    rows = []
    for (size_px, resized_px), images in count.most_common():
        row: dict[str, Any] = {"size_px": size_px, "resized_px": resized_px}
        row |= {f"{of}_px": size_at(*resized_px, px) for of, px in own_px.items() if px is not None}
        row["windows"] = 0
        if wants_teacher(settings.tta):
            grid_K3 = windows.plan(*size_at(*resized_px, g.short_side_px), window_px=g.window_px, stride_px=g.stride_px)
            row["windows"] = f"{LEAST_BOXES}-{MOST_BOXES} or {len(grid_K3)}" if g.windows == "entropy" else len(grid_K3)
        rows.append(row | {"images": images})
    return rows


def pixels_of(facts: Sequence[ImageFacts]) -> np.ndarray | None:
    """Labelled pixels of each image and class: int64 [N, C] of the images with labels; None: there is none."""
    labelled = [item.pixels_C for item in facts if item.pixels_C is not None]
    return np.stack(labelled) if labelled else None
