"""A folder of drawn images, one folder a class: shape and stripes tell the class; place, size and colours do not.

python benchmarks/image_folder.py ROOT --train 400 --val 50 --side-px 72
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from segadapt.seeds import numpy_generator

CLASSES = tuple(
    f"{shape}_{fill}" for shape in ("disc", "box", "triangle", "cross", "ring") for fill in ("plain", "striped")
)


def draw(name: str, rng: np.random.Generator, side_px: int) -> np.ndarray:
    """uint8 [side, side, 3]."""
    shape, _, fill = name.partition("_")
    mask = np.zeros((side_px, side_px), np.uint8)
    radius = int(side_px * rng.uniform(0.2, 0.35))
    x, y = (int(rng.integers(radius, side_px - radius)) for _ in range(2))
    if shape in ("disc", "ring"):
        cv2.circle(mask, (x, y), radius, 1, -1 if shape == "disc" else max(2, radius // 3))
    elif shape == "box":
        cv2.rectangle(mask, (x - radius, y - radius), (x + radius, y + radius), 1, -1)
    elif shape == "triangle":
        corners = [(x - radius, y + radius), (x + radius, y + radius), (x, y - radius)]
        cv2.fillPoly(mask, [np.array(corners, np.int32)], 1)
    else:
        third = max(1, radius // 3)
        cv2.rectangle(mask, (x - radius, y - third), (x + radius, y + third), 1, -1)
        cv2.rectangle(mask, (x - third, y - radius), (x + third, y + radius), 1, -1)
    dark, bright = rng.integers(0, 100, 3), rng.integers(156, 256, 3)
    around, inside = (dark, bright) if rng.random() < 0.5 else (bright, dark)
    image = np.where(mask[:, :, None] == 1, inside, around).astype(np.float64)
    if fill == "striped":
        is_stripe = (np.arange(side_px) // max(1, side_px // 16) % 2 == 0)[:, None, None] & (mask[:, :, None] == 1)
        image = np.where(is_stripe, around, image)
    return (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)


def write(root: Path, *, train: int, val: int, side_px: int = 48, classes: tuple[str, ...] = CLASSES) -> Path:
    """{root}/{train,val}/{class}/000.png ...; the same bytes at each call."""
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image = draw(name, numpy_generator(0, split, name, index), side_px)
                cv2.imwrite(str(root / split / name / f"{index:05d}.png"), image)
    return root


def main() -> None:
    """So many images of each class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--val", type=int, default=50)
    parser.add_argument("--side-px", type=int, default=72)
    a = parser.parse_args()
    write(a.root, train=a.train, val=a.val, side_px=a.side_px)


if __name__ == "__main__":
    main()
