"""A few images of each task, kept to be looked at: image, label, prediction, and what the teacher said of them.

C classes   3 RGB   H W px of the image as loaded   h w px of what is kept, at most LONGEST_PX
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from segadapt.models.generative.witness import Maps
from segadapt.record import write_bytes, write_png_palette
from segadapt.seeds import derive
from segadapt.stream import Entry, Prepared

FOLDER = "samples"  # in the run folder; below it a folder a task
LONGEST_PX = 512
QUALITY = 85  # of the JPEG


def choose(entries: Iterable[Entry], *, seed: int, count: int) -> frozenset[Entry]:
    """`count` entries of each task, by (seed, task, key) alone: the same in every run of these images."""
    of_task: dict[str, list[Entry]] = {}
    for entry in entries:
        of_task.setdefault(entry.task.name, []).append(entry)
    drawn = {name: sorted(own, key=lambda entry: derive(seed, entry.task.name, entry.key, "sample"))
             for name, own in of_task.items()}  # fmt: skip
    return frozenset(entry for own in drawn.values() for entry in own[:count])


def write(
    folder: Path, sample: Prepared, prediction_HW: Tensor, palette_C3: np.ndarray, maps: Maps | None = None
) -> None:
    """KEY.image.jpg, KEY.label.png, KEY.prediction.png and KEY.teacher.safetensors; equal arguments give equal bytes.

    Args:
        folder: of the task.
        prediction_HW: uint8, at the label's size.
        maps: None: no teacher was asked.
    """
    _, H, W = sample.image_3HW.shape
    scale = min(1, LONGEST_PX / max(H, W))
    size = max(1, round(scale * W)), max(1, round(scale * H))
    image_HW3 = (255 * sample.image_3HW).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).resize(size, Image.Resampling.BOX).save(buffer, format="JPEG", quality=QUALITY)
    write_bytes(folder / f"{sample.entry.key}.image.jpg", buffer.getvalue())
    for name, ids_HW in {"label": sample.label_HW, "prediction": prediction_HW}.items():
        if ids_HW is not None:
            ids_hw = Image.fromarray(ids_HW.cpu().numpy()).resize(size, Image.Resampling.NEAREST)
            write_png_palette(folder / f"{sample.entry.key}.{name}.png", np.asarray(ids_hw), palette_C3)
    if maps is not None:
        named = {item.name: getattr(maps, item.name).contiguous() for item in fields(maps)}
        write_bytes(folder / f"{sample.entry.key}.teacher.safetensors", save(named))


@dataclass(frozen=True)
class Kept:
    """One sample as a run left it."""

    folder: Path  # of the task
    key: str

    @property
    def image(self) -> Image.Image:
        """RGB."""
        return Image.open(self.folder / f"{self.key}.image.jpg").convert("RGB")

    def ids(self, name: str) -> Image.Image:
        """The palette image of 'label' or 'prediction'; pixels are class ids."""
        return Image.open(self.folder / f"{self.key}.{name}.png")

    def maps(self) -> Maps | None:
        """None: no teacher was asked."""
        path = self.folder / f"{self.key}.teacher.safetensors"
        return Maps(**load_file(path)) if path.is_file() else None


def kept(run_folder: Path, slug: str) -> dict[str, Kept]:
    """The labelled samples of a task, by key."""
    folder = run_folder / FOLDER / slug
    ends = ".label.png"
    paths = sorted(folder.rglob(f"*{ends}")) if folder.is_dir() else []
    keys = [path.relative_to(folder).as_posix().removesuffix(ends) for path in paths]
    return {key: Kept(folder, key) for key in keys}
