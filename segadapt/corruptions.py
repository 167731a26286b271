"""The 15 corruptions of ImageNet-C and its 4 extra ones, five severities each: (image, severity, generator) -> image.

Parameters are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (2019), with the changes for images of any size made by Michaelis et al. (2019). Every function takes
uint8 RGB of at least 32 x 32 px, leaves it unmodified and returns a new array of the same shape; fractions of a grey
value are cut off, not rounded. Only frost differs on purpose: its ice is drawn, not photographed.

# 3 RGB  H W image px, y down
"""

import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from segadapt.corruption_fields import disk_kernel, frosted_glass, gaussian, plasma, scatter, smear, zoom_in
from segadapt.errors import UserError, did_you_mean
from segadapt.seeds import numpy_generator

SMALLEST_PX = 32
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image_HW3: np.ndarray, name: str, *, severity: int, seed: int, key: str) -> np.ndarray:
    """Corrupt one image; the result depends on the arguments alone.

    Args:
        image_HW3: uint8 RGB, at least 32 px on both sides; not modified.
        name: a key of CORRUPTIONS. severity: 1..5.
        key: the sample's key; another key gets other noise.
    Returns:
        uint8 (H, W, 3), a new array.
    Raises:
        UserError: unknown name, severity outside 1..5, or an image of another dtype, layout or size.
    """
    check_corruption(name, severity)
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise UserError(
            f"image {key}: got {image_HW3.dtype} of shape {image_HW3.shape}; expected uint8 (height, width, 3). "
            "Convert it to 8-bit RGB."
        )
    if min(image_HW3.shape[:2]) < SMALLEST_PX:
        raise UserError(
            f"image {key}: got {image_HW3.shape[1]} x {image_HW3.shape[0]} px; corruptions need {SMALLEST_PX} px "
            "or more on both sides. Leave the image out, or enlarge it."
        )
    rng = numpy_generator(seed, name, int(severity), key)
    return CORRUPTIONS[name](np.ascontiguousarray(image_HW3), int(severity), rng)


def check_corruption(name: str, severity: int) -> None:
    """UserError for a name that is not in CORRUPTIONS or a severity outside 1..5."""
    if name not in CORRUPTIONS:
        raise UserError(f"corruption {name!r} is not known.{did_you_mean(name, CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"corruption {name}: severity {severity!r}; expected 1..5. Choose a severity from 1 to 5.")


# Noise


def gaussian_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise; standard deviation 20 to 97 grey values."""
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return _uint8(image_HW3 + 255 * scale * rng.standard_normal(image_HW3.shape, np.float32))


def shot_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Count photons: Poisson noise, where white is 60 to 3 photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return _uint8(rng.poisson(image_HW3 * (photons / 255)) / photons * 255)


def impulse_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper: 3 to 27 % of all channel values become 0 or 255, evenly."""
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw_HW3 = rng.random(image_HW3.shape, np.float32)
    salted_HW3 = np.where(draw_HW3 < amount / 2, np.uint8(255), image_HW3)
    return np.where(draw_HW3 >= 1 - amount / 2, np.uint8(0), salted_HW3)


def speckle_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Multiply by 1 + normal noise of standard deviation 0.15 to 0.6."""
    scale = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    return _uint8(image_HW3 * (1 + scale * rng.standard_normal(image_HW3.shape, np.float32)))


# Blur


def defocus_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Average over a disk of 3 to 10 px radius."""
    radius_px, sigma_px = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return _uint8(cv2.filter2D(image_HW3.astype(np.float32), -1, disk_kernel(radius_px, sigma_px=sigma_px)))


def glass_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blur, let pixels change places within 1 to 4 px, blur again. Not monotone: severity 3 scatters most often."""
    sigma, reach, passes = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    soft_HW3 = _uint8(gaussian(image_HW3.astype(np.float64), (sigma, sigma)))
    scattered_HW3 = scatter(soft_HW3, rng, reach=reach, passes=passes)
    return _uint8(gaussian(scattered_HW3.astype(np.float64), (sigma, sigma)))


def motion_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Smear along a random direction within 45 degrees of horizontal."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return _uint8(smear(image_HW3.astype(np.float32), rng.uniform(-45, 45), radius=radius, sigma=sigma))


def zoom_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Average the image and its enlargements up to 1.11 to 1.3; factor 1 is among them, so the image counts twice."""
    count, step = ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))[severity - 1]
    sharp_HW3 = image_HW3.astype(np.float32)
    total_HW3 = sharp_HW3.copy()
    for index in range(count):
        total_HW3 += zoom_in(sharp_HW3, 1 + index * step)
    return _uint8(total_HW3 / (count + 1))


def gaussian_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of 1 to 6 px standard deviation."""
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    return _uint8(gaussian(image_HW3.astype(np.float64), (sigma, sigma)))


# Weather


def snow(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Whiten the scene; over it, enlarged specks of noise smeared as they fall, and once more upside down."""
    mean, spread, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes_HW = zoom_in(rng.normal(mean, spread, image_HW3.shape[:2]), zoom)
    flakes_HW = np.where(flakes_HW < threshold, 0, np.clip(flakes_HW, 0, 1)).astype(np.float32)
    flakes_HW = np.round(255 * smear(flakes_HW, rng.uniform(-135, -45), radius=radius, sigma=sigma))
    scene_HW3 = image_HW3.astype(np.float32)
    pale_HW = 1.5 * cv2.cvtColor(scene_HW3, cv2.COLOR_RGB2GRAY) + 127.5
    scene_HW3 = keep * scene_HW3 + (1 - keep) * np.maximum(scene_HW3, pale_HW[..., None])
    return _uint8(scene_HW3 + (flakes_HW + flakes_HW[::-1, ::-1])[..., None])


def frost(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Look through frosted glass, drawn anew for every image."""
    keep, frosting = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    height, width = image_HW3.shape[:2]
    return _uint8(keep * image_HW3.astype(np.float32) + frosting * frosted_glass(height, width, rng))


def fog(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Add a cloud of 1.5 to 3 times white, then scale so that the brightest possible sum is the image's own maximum."""
    density, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width = image_HW3.shape[:2]
    side_px = 1 << (max(height, width) - 1).bit_length()
    cloud_HW = 255 * density * plasma(side_px, rng, decay=decay)[:height, :width]
    brightest = float(image_HW3.max())
    return _uint8((image_HW3 + cloud_HW[..., None]) * (brightest / (brightest + 255 * density)))


def spatter(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Drops on the lens: water up to severity 3, then mud. An image too small to be hit stays as it is."""
    mean, spread, size, threshold, strength = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[severity - 1]
    liquid_HW = gaussian(rng.normal(mean, spread, image_HW3.shape[:2]), (size, size))
    if severity <= 3:
        drops_HW = _shaded_drops(np.where(liquid_HW < threshold, 0, liquid_HW))
        turquoise_3 = np.array((175, 238, 238), np.float32)
        return _uint8(image_HW3 + strength * drops_HW[..., None] * turquoise_3)
    blots_HW = gaussian((liquid_HW > threshold).astype(np.float32), (strength, strength))
    blots_HW1 = np.where(blots_HW < 0.8, 0, blots_HW)[..., None]
    mud_brown_3 = np.array((63, 42, 20), np.float32)
    return _uint8(image_HW3 * (1 - blots_HW1) + blots_HW1 * mud_brown_3)


def _shaded_drops(liquid_HW: np.ndarray) -> np.ndarray:
    """Shade drops of liquid by the distance to their rims, lit from one side: float32 (H, W) in [0, 1]."""
    liquid_HW = _uint8(255 * liquid_HW)
    distance_HW = cv2.distanceTransform(255 - cv2.Canny(liquid_HW, 50, 150), cv2.DIST_L2, 5)
    relief_HW = cv2.equalizeHist(cv2.blur(np.minimum(distance_HW, 20), (3, 3)).astype(np.uint8))
    relief_HW = cv2.filter2D(relief_HW, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    drops_HW = liquid_HW * cv2.blur(relief_HW, (3, 3)).astype(np.float32)
    return drops_HW / max(drops_HW.max(), 1.0)


# Colour and light


def brightness(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Raise V of HSV by 0.1 to 0.5: H and S stay, so all three channels grow by the same factor."""
    rise = 255 * (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value_HW1 = image_HW3.max(axis=2, keepdims=True).astype(np.float32)
    raised_HW1 = np.minimum(value_HW1 + rise, 255)
    return _uint8(np.where(value_HW1 == 0, raised_HW1, image_HW3 * (raised_HW1 / np.maximum(value_HW1, 1))))


def contrast(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Shrink the distance of every value to its channel's mean to 40 to 5 %."""
    factor = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean_3 = image_HW3.mean(axis=(0, 1))
    return _uint8((image_HW3 - mean_3) * factor + mean_3)


def saturate(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Scale S of HSV by 0.3, 0.1, 2, 5 or 20, and at 4 and 5 also raise it; H and V stay. Grey counts as red of S 0."""
    gain, rise = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value_HW1 = image_HW3.max(axis=2, keepdims=True).astype(np.float32)
    range_HW1 = value_HW1 - image_HW3.min(axis=2, keepdims=True)
    saturation_HW1 = np.clip(range_HW1 / np.maximum(value_HW1, 1) * gain + rise, 0, 1)
    # how deep a channel lies below the brightest, 1 for the darkest: the hue
    depth_HW3 = np.where(
        range_HW1 == 0, np.array((0, 1, 1), np.float32), (value_HW1 - image_HW3) / np.maximum(range_HW1, 1)
    )
    return _uint8(value_HW1 * (1 - saturation_HW1 * depth_HW3))


# Digital


def elastic_transform(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Move every pixel by a smooth random field."""
    strength = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[severity - 1]
    height, width = image_HW3.shape[:2]
    sigma_yx = (0.01 * height, 0.01 * width)
    move_2HW = rng.uniform(-0.005 * height, 0.005 * height, size=(2, height, width))
    dx_HW, dy_HW = (strength * gaussian(m, sigma_yx, truncate=3, border=cv2.BORDER_REFLECT) for m in move_2HW)
    x_HW = (np.arange(width) + dx_HW).astype(np.float32)
    y_HW = (np.arange(height)[:, None] + dy_HW).astype(np.float32)
    return _uint8(cv2.remap(image_HW3.astype(np.float32), x_HW, y_HW, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def pixelate(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Average down to 60 to 25 % of each side, then repeat the pixels."""
    fraction = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = image_HW3.shape[:2]
    coarse = Image.fromarray(image_HW3).resize((int(width * fraction), int(height * fraction)), Image.Resampling.BOX)
    return np.array(coarse.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Save and load as JPEG of quality 25 to 7."""
    quality = (25, 18, 15, 10, 7)[severity - 1]
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


def _uint8(image: np.ndarray) -> np.ndarray:
    """Clip to 0..255 and cut off fractions."""
    return np.clip(image, 0, 255).astype(np.uint8)


Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]

CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
    "speckle_noise": speckle_noise,
    "gaussian_blur": gaussian_blur,
    "spatter": spatter,
    "saturate": saturate,
}
COMMON = tuple(CORRUPTIONS)[:15]  # the paper's order, and that of result tables
EXTRA = tuple(CORRUPTIONS)[15:]  # held out in ImageNet-C, for tuning
