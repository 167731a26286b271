"""Broad source training: wide generic changes of light, colour, sharpness, haze and grain, set in conf/train/broad.

A stand-in for a teacher that has seen the world. Nothing here calls or shares code with `corruptions.py`; what looks
alike is said where it stands. Pure functions of (pixels, numpy generator, settings).

H W image px   3 RGB   pixels: float32, 0..1 before and after the whole
"""

import cv2
import numpy as np

from segadapt.config_training import BroadSettings


def broad(image_HW3: np.ndarray, rng: np.random.Generator, settings: BroadSettings) -> np.ndarray:
    """Apply each operation with settings.probability, in the order of light: scene, haze, lens, sensor.

    Args:
        image_HW3: uint8 RGB.
    Returns:
        uint8 RGB of the same shape.
    """
    pixels_HW3 = image_HW3.astype(np.float32) / 255
    for operation in (light, colour, haze, sharpness, grain):
        if rng.random() < settings.probability:
            pixels_HW3 = operation(pixels_HW3, rng, settings)
    return (pixels_HW3 * 255 + 0.5).clip(0, 255).astype(np.uint8)


def light(pixels_HW3: np.ndarray, rng: np.random.Generator, s: BroadSettings) -> np.ndarray:
    """A gamma curve, then a smooth field of brightness around 1."""
    curved_HW3 = pixels_HW3 ** np.float32(2 ** rng.uniform(-s.gamma, s.gamma))
    field_HW1 = _smooth_field(pixels_HW3.shape[:2], rng) - 0.5
    return curved_HW3 * (1 + np.float32(rng.uniform(0, s.shade)) * field_HW1)


def colour(pixels_HW3: np.ndarray, rng: np.random.Generator, s: BroadSettings) -> np.ndarray:
    """A random mix of the channels, blended with their mean."""
    mix_33 = np.eye(3) + rng.uniform(-s.mix, s.mix, (3, 3))
    grey = rng.uniform(0, s.grey)
    mix_33 = (1 - grey) * mix_33 + grey / 3
    return pixels_HW3 @ mix_33.T.astype(np.float32)


def haze(pixels_HW3: np.ndarray, rng: np.random.Generator, s: BroadSettings) -> np.ndarray:
    """A blend towards one airlight along a smooth field. No fractal noise as in fog."""
    density_HW1 = np.float32(rng.uniform(0.2 * s.haze, s.haze)) * _smooth_field(pixels_HW3.shape[:2], rng)
    airlight_3 = rng.uniform(0.3, 1.0) + rng.uniform(-0.08, 0.08, 3)
    return (1 - density_HW1) * pixels_HW3 + density_HW1 * airlight_3.astype(np.float32)


def sharpness(pixels_HW3: np.ndarray, rng: np.random.Generator, s: BroadSettings) -> np.ndarray:
    """An oriented Gaussian blur, at its narrowest almost a line, or as often an unsharp mask."""
    if rng.random() < 0.5:
        soft_HW3 = cv2.GaussianBlur(pixels_HW3, (0, 0), rng.uniform(0.5, 2), borderType=cv2.BORDER_REFLECT_101)
        return pixels_HW3 + np.float32(rng.uniform(0, s.sharpen)) * (pixels_HW3 - soft_HW3)
    long, angle = rng.uniform(min(0.5, s.blur_px), s.blur_px), rng.uniform(0, np.pi)
    short, reach = rng.uniform(0.3, max(0.3, 0.6 * long)), max(1, round(2.5 * long))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kernel = np.exp(-((u / max(long, 1e-3)) ** 2 + (v / short) ** 2) / 2)
    return cv2.filter2D(pixels_HW3, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def grain(pixels_HW3: np.ndarray, rng: np.random.Generator, s: BroadSettings) -> np.ndarray:
    """Film grain: a Gaussian field of cells of some px, interpolated, stronger in the light; grey or coloured.

    Cells of 1 px would be white noise, as in gaussian, shot and speckle noise; conf/train/broad/wide.yaml has 2 to 4.
    """
    height, width = pixels_HW3.shape[:2]
    cell, channels = int(rng.integers(s.grain_min_px, s.grain_max_px + 1)), int(rng.choice([1, 3]))
    cells_hwc = rng.standard_normal((-(-height // cell), -(-width // cell), channels), dtype=np.float32)
    field_HWc = cv2.resize(cells_hwc, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)
    strength = np.float32(rng.uniform(0, s.grain))
    return pixels_HW3 + strength * field_HWc * (0.3 + 0.7 * pixels_HW3.mean(axis=2, keepdims=True))


def _smooth_field(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random field in 0..1 of a few cells, float32 [H, W, 1]."""
    cells = rng.random((rng.integers(2, 7), rng.integers(2, 7))).astype(np.float32)
    return cv2.resize(cells, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
