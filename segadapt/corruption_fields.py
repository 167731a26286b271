"""What the corruptions are made of: filters, geometry and random patterns, each a pure function of array and generator.

# 3 RGB  H W image px
"""

import math

import cv2
import numpy as np

# Six kinds of frosted glass as (R, G, B mean, spread), all in 0..255: tinted ice, white crystals (twice as likely),
# thin rime, feathers, dark ferns. Means and spreads are those of the textures used by ImageNet-C.
FROSTS = (
    ((78.0, 149.0, 166.0), 18.0),
    ((201.0, 205.0, 214.0), 22.0),
    ((201.0, 205.0, 214.0), 22.0),
    ((138.0, 153.0, 165.0), 29.0),
    ((112.0, 123.0, 135.0), 43.0),
    ((71.0, 95.0, 105.0), 41.0),
)
FROST_PX = (350, 530)  # height, width that one texture covers; a larger image stretches it


def gaussian(
    image: np.ndarray, sigma_yx: tuple[float, float], *, truncate: float = 4.0, border: int = cv2.BORDER_REPLICATE
) -> np.ndarray:
    """Gaussian blur, floating (H, W) or (H, W, 3), same dtype; the kernel ends at truncate standard deviations (px)."""
    radius_y, radius_x = (int(truncate * sigma + 0.5) for sigma in sigma_yx)
    size = (2 * radius_x + 1, 2 * radius_y + 1)
    return cv2.GaussianBlur(image, size, sigmaX=sigma_yx[1], sigmaY=sigma_yx[0], borderType=border)


def disk_kernel(radius_px: int, *, sigma_px: float) -> np.ndarray:
    """Out-of-focus point: a disk that sums to 1, edge softened by a Gaussian. float32, square, odd."""
    reach = max(8, radius_px)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius_px**2).astype(np.float32)
    softened = 3 if radius_px <= 8 else 5
    return cv2.GaussianBlur(disk / disk.sum(), (softened, softened), sigmaX=sigma_px)


def smear(image: np.ndarray, degrees: float, *, radius: int, sigma: float) -> np.ndarray:
    """Motion blur: the image and its 2 radius copies, each 1 px further along the angle, weighted by half a Gaussian.

    Borders repeat the edge pixel. A copy moved by the whole image side ends the sum, as in ImageNet-C, so that images
    smaller than 2 radius + 1 px get darker.

    Args:
        image: float32 (H, W) or (H, W, 3).
        degrees: 0 moves left, 90 up.
        radius: px. sigma: px.
    """
    height, width = image.shape[:2]
    step = np.arange(2 * radius + 1)
    weights = np.exp(-(step**2) / (2 * sigma**2))
    weights /= weights.sum()
    angle = math.radians(degrees)
    moves_y = np.ceil(step * math.sin(angle) - 0.5).astype(int)
    moves_x = np.ceil(step * math.cos(angle) - 0.5).astype(int)

    pad = 2 * radius + 1
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    total = np.zeros_like(image)
    for weight, move_y, move_x in zip(weights.astype(np.float32), moves_y, moves_x, strict=True):
        if abs(move_y) >= height or abs(move_x) >= width:
            break
        top, left = pad + move_y, pad + move_x
        total += weight * padded[top : top + height, left : left + width]
    return total


def zoom_in(image: np.ndarray, factor: float) -> np.ndarray:
    """Cut the middle 1/factor of a floating (H, W) or (H, W, 3) image and enlarge it, corners on corners, bilinear."""
    height, width = image.shape[:2]
    affine_23 = np.zeros((2, 3))
    for row, column, side in ((0, 0, width), (1, 1, height)):
        cut = math.ceil(side / factor)
        affine_23[row, column] = (cut - 1) / (round(cut * factor) - 1)
        affine_23[row, 2] = (side - cut) // 2
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, affine_23, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def scatter(image_HW3: np.ndarray, rng: np.random.Generator, *, reach: int, passes: int) -> np.ndarray:
    """Frosted glass: each pixel takes the colour of a random neighbour, from the bottom right corner to the top left.

    ImageNet-C means to swap the two, but its swap of array views only copies, and a copy it is here too. A neighbour
    that was visited earlier in the pass hands on its new colour. So a pass is a forest: every pixel points at a new
    colour (node p) or an old one (node p + pixels), and doubling the pointers finds all roots in log(depth) steps
    instead of a loop over pixels.

    Args:
        reach: neighbours lie in [-reach, reach) px on both axes. Pixels closer to the border stay.
    """
    height, width = image_HW3.shape[:2]
    pixels = height * width
    index_HW = np.arange(pixels).reshape(height, width)
    visited_HW = np.zeros((height, width), bool)
    visited_HW[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    here = index_HW[visited_HW]
    for _ in range(passes):
        dx, dy = rng.integers(-reach, reach, size=(2, here.size))
        there = here + dy * width + dx
        is_new = (there > here) & visited_HW.ravel()[there]
        root = np.arange(pixels) + pixels
        root[here] = np.where(is_new, there, there + pixels)
        while (chained := root < pixels).any():
            root[chained] = root[root[chained]]
        image_HW3 = image_HW3.reshape(pixels, 3)[root - pixels].reshape(image_HW3.shape)
    return image_HW3


def plasma(side_px: int, rng: np.random.Generator, *, decay: float) -> np.ndarray:
    """Cloud by the diamond-square algorithm on a torus: float64 (side, side) in [0, 1], side a power of two.

    The noise of each halving is 1/decay of that before; squared, since ImageNet-C scales it twice.
    """
    cloud = np.zeros((side_px, side_px))
    step, wobble = side_px, 100.0

    def wobbled(sum_of_four: np.ndarray) -> np.ndarray:
        return sum_of_four / 4 + wobble * rng.uniform(-wobble, wobble, sum_of_four.shape)

    while step >= 2:
        half = step // 2
        corner = cloud[::step, ::step]
        beside, below = np.roll(corner, -1, axis=1), np.roll(corner, -1, axis=0)
        centre = wobbled(corner + beside + below + np.roll(below, -1, axis=1))
        cloud[half::step, half::step] = centre
        top = wobbled(centre + np.roll(centre, 1, axis=0) + corner + beside)
        left = wobbled(centre + np.roll(centre, 1, axis=1) + corner + below)
        cloud[::step, half::step] = top
        cloud[half::step, ::step] = left
        step, wobble = half, wobble / decay

    cloud -= cloud.min()
    return cloud / cloud.max()


def frosted_glass(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one of FROSTS: needles of ice in domains of one direction each, under uneven light. float32 (H, W, 3)."""
    mean_3, spread = FROSTS[rng.integers(len(FROSTS))]
    stretch = max(1.0, height / FROST_PX[0], width / FROST_PX[1])
    rows, columns = math.ceil(height / stretch), math.ceil(width / stretch)

    needles = np.zeros((rows, columns), np.float32)
    strongest = np.full((rows, columns), -np.inf, np.float32)
    for degrees in rng.uniform(0, 180, size=5):
        domain = _smooth_noise(rows, columns, rng, period_px=24)
        grown = cv2.filter2D(rng.standard_normal((rows, columns), np.float32), -1, _needle_kernel(degrees))
        np.copyto(needles, grown, where=domain > strongest)
        np.maximum(strongest, domain, out=strongest)

    light = np.zeros((rows, columns), np.float32)
    for period_px in (16, 64, 256):
        light += _smooth_noise(rows, columns, rng, period_px=period_px)

    # 0.5 and 0.6 give unit variance, of which about half survives a blur of 32 px, as in the textures
    pattern = cv2.resize(0.5 * needles + 0.6 * light, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(np.array(mean_3, np.float32) + spread * pattern[..., None], 0, 255)


def _smooth_noise(height: int, width: int, rng: np.random.Generator, *, period_px: int) -> np.ndarray:
    """Standard normal lattice points period_px apart at a random phase, cubic in between: float32 (H, W)."""
    lattice = rng.standard_normal((height // period_px + 5, width // period_px + 5), np.float32)
    phase_y, phase_x = rng.uniform(1, 2, size=2)
    affine_23 = np.array([[1 / period_px, 0, phase_x], [0, 1 / period_px, phase_y]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(lattice, affine_23, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT)


def _needle_kernel(degrees: float, *, length_px: float = 6.0, width_px: float = 0.7) -> np.ndarray:
    """Long thin Gaussian of unit L2 norm, so that filtering white noise keeps its variance. float32 (25, 25)."""
    y, x = np.mgrid[-12:13, -12:13]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    along, across = x * cos + y * sin, y * cos - x * sin
    kernel = np.exp(-((along / length_px) ** 2 + (across / width_px) ** 2) / 2)
    return (kernel / np.linalg.norm(kernel)).astype(np.float32)
