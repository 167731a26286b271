"""A small data set on disk, three classes, for the tests of reading and of verifying files."""

from pathlib import Path

import numpy as np
from PIL import Image

from segadapt.datasets.files import Files
from segadapt.datasets.labels import palette

RNG = np.random.default_rng(0)
PIXELS_HW3 = RNG.integers(0, 256, (40, 48, 3), np.uint8)
IDS_HW = RNG.integers(0, 4, (40, 48)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(path, **options)
    return path


def files(root: Path, **changes) -> Files:
    """images/val/KEY.* with labels/val/KEY.png, ids 0 = ignore, unless changed."""
    settings = {
        "data_root": root,
        "image_path": "{data_root}/images/{split}/{key}.*",
        "label_path": "{data_root}/labels/{split}/{key}.png",
        "classes": ("sky", "tree", "road"),
        "palette_C3": palette(3),
        "id_map": "zero_is_ignore",
        "split": "val",
        "corruption_seed": 7,
    }
    return Files(**{**settings, **changes})
