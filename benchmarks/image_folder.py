"""A folder of drawn images, one folder a class: six materials and four things of a street.

The class of an image is that of its thing, which stands before any two materials, or where there is none the material
of its larger part. ToyTown shows such classes too, but this is another hand: no scene and no perspective, and neither
code, nor colours, nor textures of ToyTown are used.

python benchmarks/image_folder.py ROOT --train 800 --val 40 --side-px 80
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from segadapt.seeds import numpy_generator

# s side of an image, px   3 RGB, about 0..1 until it is written as 0..255

Hsv = tuple[float, float, float, float, float, float]  # ranges of hue in turns, saturation, value: low, high of each


def colour(rng: np.random.Generator, ranges: Hsv) -> np.ndarray:
    """float64 [3]: RGB of a hue, saturation and value within their ranges."""
    hue, saturation, value = (rng.uniform(low, high) for low, high in zip(ranges[::2], ranges[1::2], strict=True))
    wheel_3 = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - wheel_3))


def clouds(rng: np.random.Generator, side_px: int, *, cells: tuple[int, int]) -> np.ndarray:
    """float64 [s, s] in -1..1: a smooth field with so many cells down and across."""
    coarse = rng.uniform(-1, 1, (cells[0] + 1, cells[1] + 1))
    return cv2.resize(coarse, (side_px, side_px), interpolation=cv2.INTER_CUBIC).clip(-1, 1)


def sky(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """A gradient, and light clouds that are wider than high."""
    top_3, bottom_3 = colour(rng, (0.5, 0.68, 0.05, 0.6, 0.55, 1.0)), colour(rng, (0.0, 1.0, 0.0, 0.2, 0.75, 1.0))
    down_s11 = np.linspace(0, 1, side_px)[:, None, None] ** rng.uniform(0.5, 2)
    rows = int(rng.integers(3, 9))
    cover_ss1 = (clouds(rng, side_px, cells=(rows, max(2, rows // 2))) + rng.uniform(-0.6, 0.4)).clip(0, 1)[:, :, None]
    return (top_3 * (1 - down_s11) + bottom_3 * down_s11) * (1 - cover_ss1) + rng.uniform(0.8, 1.0) * cover_ss1


def leaves(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """Blobs over blobs, the later ones lighter."""
    base_3, image_ss3 = colour(rng, (0.12, 0.4, 0.25, 0.7, 0.3, 0.7)), np.zeros((side_px, side_px, 3))
    image_ss3 += 0.45 * base_3
    blob_px = side_px * rng.uniform(0.02, 0.06)
    for light in np.linspace(0.5, 1.3, 160):
        centre = tuple(int(value) for value in rng.integers(0, side_px, 2))
        axes = tuple(int(value) for value in np.maximum(1, blob_px * rng.uniform(0.6, 1.6, 2)))
        shade_3 = base_3 * light * rng.uniform(0.85, 1.15)
        cv2.ellipse(image_ss3, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade_3.tolist(), -1)
    return image_ss3


def lawn(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """Fine upright grain on soft patches."""
    base_3 = colour(rng, (0.16, 0.36, 0.3, 0.7, 0.4, 0.75))
    blades_ss = cv2.blur(rng.normal(0, 1, (side_px, side_px)), (1, int(rng.integers(2, 6)))) * rng.uniform(0.1, 0.25)
    patches_ss = clouds(rng, side_px, cells=(4, 4)) * rng.uniform(0.05, 0.2)
    return base_3 * (1 + blades_ss + patches_ss)[:, :, None]


def water(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """Flat ripples, and a glow."""
    base_3 = colour(rng, (0.42, 0.62, 0.15, 0.6, 0.3, 0.75))
    rows = int(rng.integers(12, 30))
    ripples_ss = clouds(rng, side_px, cells=(rows, max(2, rows // 5))) * rng.uniform(0.12, 0.3)
    glow_ss = clouds(rng, side_px, cells=(2, 2)) * rng.uniform(0.0, 0.25)
    return base_3 * (1 + ripples_ss + glow_ss)[:, :, None]


def courses(rng: np.random.Generator, side_px: int, *, step_px: tuple[float, float], shift: float) -> np.ndarray:
    """int64 [s, s]: the number of the stone in a bond of rows; -1 in its joints."""
    down_s1, across_1s = np.arange(side_px)[:, None], np.arange(side_px)[None]
    high, wide = step_px
    row_s1 = ((down_s1 + rng.uniform(0, high)) / high).astype(np.int64)
    place_ss = across_1s + wide * shift * (row_s1 % 2) + rng.uniform(0, wide)
    is_joint_ss = ((down_s1 % high) < max(1.0, high / 7)) | ((place_ss % wide) < max(1.0, high / 7))
    stone_ss = row_s1 * 64 + (place_ss / wide).astype(np.int64)
    return np.where(is_joint_ss, -1, stone_ss % 997)


def wall(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """Bricks in a bond, or plaster with rows of windows."""
    base_3 = colour(rng, (-0.02, 0.14, 0.1, 0.65, 0.4, 0.95))
    if rng.random() < 0.5:
        high = side_px * rng.uniform(0.04, 0.1)
        stone_ss = courses(rng, side_px, step_px=(high, high * rng.uniform(2, 3)), shift=0.5)
        tone_ss = rng.uniform(0.85, 1.15, 998)[stone_ss]
        joint_3 = colour(rng, (0.0, 1.0, 0.0, 0.1, 0.5, 0.9))
        return np.where(stone_ss[:, :, None] < 0, joint_3, base_3 * tone_ss[:, :, None])
    image_ss3 = base_3 * (1 + rng.normal(0, 0.03, (side_px, side_px, 1)))
    pitch, glass_3 = side_px * rng.uniform(0.18, 0.4), colour(rng, (0.5, 0.7, 0.0, 0.4, 0.15, 0.6))
    frame_3, wide, tall = base_3 * rng.uniform(0.5, 1.3), *(pitch * rng.uniform(0.4, 0.65, 2))
    for y in np.arange(rng.uniform(-pitch, 0), side_px, pitch * rng.uniform(1.0, 1.4)):
        for x in np.arange(rng.uniform(-pitch, 0), side_px, pitch):
            box(image_ss3, x - 2, y - 2, x + wide + 2, y + tall + 2, frame_3)
            box(image_ss3, x, y, x + wide, y + tall, glass_3)
    return image_ss3


def ground(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """Grey: tar with marks, or slabs."""
    base_3 = colour(rng, (0.0, 1.0, 0.0, 0.08, 0.25, 0.75))
    image_ss3 = base_3 * (1 + rng.normal(0, rng.uniform(0.03, 0.1), (side_px, side_px, 1)))
    if rng.random() < 0.5:
        high = side_px * rng.uniform(0.12, 0.3)
        stone_ss = courses(rng, side_px, step_px=(high, high * rng.uniform(1, 1.6)), shift=float(rng.choice([0, 0.5])))
        tone_ss = rng.uniform(0.92, 1.08, 998)[stone_ss]
        return np.where(stone_ss[:, :, None] < 0, 0.75 * base_3, image_ss3 * tone_ss[:, :, None])
    for _ in range(int(rng.integers(0, 3))):
        ends = rng.integers(-side_px // 2, side_px * 3 // 2, 4)
        mark_3 = np.full(3, rng.uniform(0.8, 1.0))
        cv2.line(image_ss3, ends[:2].tolist(), ends[2:].tolist(), mark_3.tolist(), int(rng.integers(2, 5)))
    return image_ss3


def box(image_ss3: np.ndarray, left: float, top: float, right: float, bottom: float, colour_3: np.ndarray) -> None:
    """A filled rectangle, in place."""
    cv2.rectangle(image_ss3, (int(left), int(top)), (int(right), int(bottom)), colour_3.tolist(), -1)


def vehicle(rng: np.random.Generator, image_ss3: np.ndarray, x: float, foot: float, size: float) -> None:
    """From its side or its end: a cabin with glass over a body on wheels. As all things: in place, `size` px high."""
    paint_3, glass_3 = colour(rng, (0, 1, 0, 0.85, 0.15, 0.95)), colour(rng, (0.5, 0.7, 0, 0.3, 0.15, 0.5))
    half = size * (rng.uniform(1.1, 1.5) if rng.random() < 0.5 else rng.uniform(0.55, 0.75))
    belt, sill, slope = foot - 0.55 * size, foot - 0.15 * size, rng.uniform(0.1, 0.35) * half
    for inset, colour_3 in ((0.0, paint_3), (0.08 * size, glass_3)):
        cabin = [(x - half * 0.8 + inset, belt), (x - half * 0.8 + slope + inset, foot - size + inset),
                 (x + half * 0.7 - slope - inset, foot - size + inset), (x + half * 0.7 - inset, belt)]  # fmt: skip
        cv2.fillPoly(image_ss3, [np.array(cabin, np.int32)], colour_3.tolist())
    box(image_ss3, x - half, belt, x + half, sill, paint_3)
    for side in (-0.65, 0.65):
        hub = (int(x + side * half), int(foot - 0.16 * size))
        cv2.circle(image_ss3, hub, max(1, int(0.17 * size)), (0.1, 0.1, 0.1), -1)


def figure(rng: np.random.Generator, image_ss3: np.ndarray, x: float, foot: float, size: float) -> None:
    """Legs, a coat with arms, a head."""
    coat_3, legs_3 = (colour(rng, (0, 1, 0, 0.8, 0.15, 0.9)) for _ in range(2))
    skin_3, stride = colour(rng, (0.03, 0.1, 0.25, 0.6, 0.4, 0.95)), rng.uniform(0.02, 0.16) * size
    thick = max(1, int(0.1 * size))
    hip, neck = (int(x), int(foot - 0.5 * size)), int(foot - 0.84 * size)
    for side in (-1, 1):
        cv2.line(image_ss3, hip, (int(x + side * stride), int(foot)), legs_3.tolist(), thick)
        hand = (int(x + side * (0.15 * size + stride * 0.5)), hip[1])
        shoulder = (int(x + side * 0.08 * size), neck + thick)
        cv2.line(image_ss3, shoulder, hand, (0.8 * coat_3).tolist(), max(1, thick * 2 // 3))
    box(image_ss3, x - 0.13 * size, neck, x + 0.13 * size, hip[1], coat_3)
    cv2.circle(image_ss3, (int(x), int(foot - 0.92 * size)), max(1, int(0.085 * size)), skin_3.tolist(), -1)


def plate(rng: np.random.Generator, image_ss3: np.ndarray, x: float, foot: float, size: float) -> None:
    """A post, most with a rimmed plate of three to eight corners or a lamp."""
    post_3, thick = colour(rng, (0, 1, 0, 0.15, 0.15, 0.7)), max(2, int(0.05 * size))
    box(image_ss3, x - thick / 2, foot - size, x + thick / 2, foot, post_3)
    if rng.random() < 0.2:
        return
    corners, turn, radius = int(rng.integers(3, 9)), rng.uniform(0, 2 * np.pi), rng.uniform(0.14, 0.26) * size
    angles = turn + np.arange(corners) / corners * 2 * np.pi
    for scale, colour_3 in ((1.0, colour(rng, (0, 1, 0, 1, 0.4, 1))), (0.65, colour(rng, (0, 1, 0, 1, 0.2, 1)))):
        ring = np.stack([x + radius * scale * np.cos(angles), foot - size + radius * scale * np.sin(angles)], 1)
        cv2.fillPoly(image_ss3, [ring.astype(np.int32)], colour_3.tolist())


def fence(rng: np.random.Generator, image_ss3: np.ndarray, x: float, foot: float, size: float) -> None:
    """Pales over all the width, close or apart, on two rails."""
    side_px, paint_3 = len(image_ss3), colour(rng, (0.04, 0.4, 0.0, 0.5, 0.25, 0.9))
    size *= 0.7
    for up in (0.3, 0.75):
        box(image_ss3, 0, foot - up * size - 0.05 * size, side_px, foot - up * size + 0.05 * size, 0.85 * paint_3)
    pitch = max(3.0, rng.uniform(0.1, 0.25) * size)
    wide = pitch * rng.uniform(0.4, 0.9)
    for left in np.arange(x % pitch - pitch, side_px, pitch):
        box(image_ss3, left, foot - size, left + wide, foot, paint_3 * rng.uniform(0.9, 1.1))


MATERIALS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "ground": ground, "lawn": lawn, "leaves": leaves, "sky": sky, "wall": wall, "water": water,
}  # fmt: skip
THINGS: dict[str, Callable[[np.random.Generator, np.ndarray, float, float, float], None]] = {
    "fence": fence, "figure": figure, "plate": plate, "vehicle": vehicle,
}  # fmt: skip
CLASSES = (*MATERIALS, *THINGS)


def draw(name: str, rng: np.random.Generator, side_px: int) -> np.ndarray:
    """uint8 [s, s, 3], RGB: two materials, for a thing any two, and before them the thing."""
    kinds = tuple(MATERIALS)
    first = name if name in MATERIALS else kinds[rng.integers(len(kinds))]
    image_ss3 = MATERIALS[first](rng, side_px)
    other_ss3 = MATERIALS[kinds[rng.integers(len(kinds))]](rng, side_px)
    angle, down_s1, across_1s = rng.uniform(0, 2 * np.pi), np.arange(side_px)[:, None], np.arange(side_px)[None]
    edge_ss = (across_1s - side_px / 2) * np.cos(angle) + (down_s1 - side_px / 2) * np.sin(angle)
    image_ss3 = np.where((edge_ss > side_px * rng.uniform(0.1, 0.6))[:, :, None], other_ss3, image_ss3)
    image_ss3 = np.ascontiguousarray(image_ss3)
    if name in THINGS:
        size = side_px * rng.uniform(0.3, 0.75)
        x, foot = side_px * rng.uniform(0.3, 0.7), rng.uniform(max(size, side_px * 0.5), side_px * 0.98)
        THINGS[name](rng, image_ss3, x, foot, size)
    light_ss1 = 1 + rng.uniform(0, 0.3) * clouds(rng, side_px, cells=(2, 2))[:, :, None]
    image_ss3 = image_ss3 * light_ss1 * rng.uniform(0.7, 1.15) * rng.uniform(0.92, 1.08, 3)
    return (255 * image_ss3 + rng.normal(0, rng.uniform(1, 5), image_ss3.shape)).clip(0, 255).astype(np.uint8)


def write(root: Path, *, train: int, val: int, side_px: int = 48, classes: tuple[str, ...] = CLASSES) -> Path:
    """{root}/{train,val}/{class}/00000.png ...; the same bytes at each call."""
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                image_ss3 = draw(name, numpy_generator(0, split, name, index), side_px)
                cv2.imwrite(str(root / split / name / f"{index:05d}.png"), image_ss3[:, :, ::-1])
    return root


def main() -> None:
    """So many images of each class, each class in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--val", type=int, default=40)
    parser.add_argument("--side-px", type=int, default=80)
    a = parser.parse_args()
    cv2.setNumThreads(1)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        written = [
            pool.submit(write, a.root, train=a.train, val=a.val, side_px=a.side_px, classes=(name,)) for name in CLASSES
        ]
        for one in written:
            one.result()


if __name__ == "__main__":
    main()
