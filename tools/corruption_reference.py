"""Measure how strong the corruptions of the imagecorruptions package are: mean PSNR per name and severity.

Run by hand, in an environment of its own, and only when the fixed images change:

    pip install imagecorruptions-imaug==1.1.5
    python tools/corruption_reference.py tests/golden/corruption_reference.json

The tests draw the same images and hold segadapt.corruptions to the stored numbers.
"""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

NUM_IMAGES = 20
NUM_DRAWS = 16  # of the package's own randomness, per image
HEIGHT, WIDTH = 120, 160  # px


def fixed_images() -> list[np.ndarray]:
    """NUM_IMAGES scenes, uint8 (120, 160, 3): sky over ground, boxes and ellipses in front, all shaded and textured.

    Only integer draws and + - * /, which round alike everywhere: the same bytes on every machine.
    """
    return [_scene(np.random.default_rng(index)) for index in range(NUM_IMAGES)]


def _scene(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)
    horizon = int(rng.integers(HEIGHT // 4, HEIGHT // 2))
    scene = np.where((y < horizon)[..., None], *(_paint(rng, y, x) for _ in range(2)))
    for index in range(int(rng.integers(4, 9))):
        centre_y, centre_x = int(rng.integers(0, HEIGHT)), int(rng.integers(0, WIDTH))
        away_y, away_x = (y - centre_y) / int(rng.integers(8, 40)), (x - centre_x) / int(rng.integers(8, 40))
        inside = away_y * away_y + away_x * away_x < 1 if index % 2 else (abs(away_y) < 1) & (abs(away_x) < 1)
        scene = np.where(inside[..., None], _paint(rng, y, x), scene)
    return np.clip(scene, 0, 255).astype(np.uint8)


def _paint(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One colour with a gradient and a grain of 1 to 4 px."""
    colour = rng.integers(20, 236, size=3)
    slope_y, slope_x = rng.integers(-40, 41, size=2)
    grain_px = int(rng.integers(1, 5))
    grain = rng.integers(-24, 25, size=(HEIGHT // grain_px + 1, WIDTH // grain_px + 1))
    grain = grain.repeat(grain_px, axis=0).repeat(grain_px, axis=1)[:HEIGHT, :WIDTH]
    return colour + (slope_y * y / HEIGHT + slope_x * x / WIDTH + grain)[..., None]


def psnr_db(image: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two different uint8 images, dB."""
    error = np.mean((image.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(255**2 / error))


def images_sha256(images: list[np.ndarray]) -> str:
    """Hash of all pixels, to notice when the fixed images change."""
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


def reference_table(images: list[np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """Name -> mean PSNR (dB) at severities 1..5, and its deviation between draws of the whole image set."""
    import imagecorruptions  # pyright: ignore[reportMissingImports]

    seeded_by_argument = ("impulse_noise", "glass_blur")  # np.random.seed does not reach them
    table = {}
    for name in imagecorruptions.get_corruption_names("all"):
        means, deviations = [], []
        for severity in range(1, 6):
            psnr = np.empty((NUM_DRAWS, len(images)))
            for draw, index in np.ndindex(psnr.shape):
                seed = draw * len(images) + index
                np.random.seed(seed)
                options = {"seed": seed} if name in seeded_by_argument else {}
                corrupted = imagecorruptions.corrupt(images[index], severity, name, **options)
                psnr[draw, index] = psnr_db(images[index], corrupted)
            assert np.isfinite(psnr).all(), (name, severity)
            means.append(round(float(psnr.mean()), 3))
            deviations.append(round(float(psnr.mean(axis=1).std()), 3))
        table[name] = {"psnr_db": means, "deviation_db": deviations}
    return table


def main(output: str) -> None:
    """Write the table as JSON."""
    images = fixed_images()
    document = {
        "command": f"python tools/corruption_reference.py {output}",
        "package": f"imagecorruptions-imaug {version('imagecorruptions-imaug')}",
        "numpy": version("numpy"),
        "num_draws": NUM_DRAWS,
        "images_sha256": images_sha256(images),
        "table": reference_table(images),
    }
    Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(*sys.argv[1:])
