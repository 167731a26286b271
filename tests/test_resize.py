"""The shared resize against a slow bilinear in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segadapt.datasets.resize import resize_short_side

RNG = np.random.default_rng(0)
PIXELS_HW3 = RNG.integers(0, 256, (40, 48, 3), np.uint8)


def bilinear(image_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, float64."""

    def axis(size: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, None)
        low = np.minimum(np.floor(centre).astype(int), size - 1)
        return low, np.minimum(low + 1, size - 1), centre - low

    top, bottom, down = axis(image_HW3.shape[0], height)
    left, right, across = axis(image_HW3.shape[1], width)
    pixels = image_HW3.astype(np.float64) / 255
    rows = pixels[top] * (1 - down[:, None, None]) + pixels[bottom] * down[:, None, None]
    return rows[:, left] * (1 - across[None, :, None]) + rows[:, right] * across[None, :, None]


@pytest.mark.parametrize(
    ("size", "expected"), [((40, 48), (20, 24)), ((48, 40), (24, 20)), ((30, 40), (20, 27)), ((9, 13), (20, 29))]
)
def test_resize_is_plain_bilinear_with_the_long_side_rounded(size, expected):
    image = RNG.integers(0, 256, (*size, 3), np.uint8)
    resized = resize_short_side(image, 20)
    assert tuple(resized.shape) == (3, *expected)
    assert np.abs(resized.permute(1, 2, 0).numpy() - bilinear(image, *expected)).max() < 1e-5


def test_resize_to_the_same_size_keeps_the_values():
    resized = resize_short_side(PIXELS_HW3, 40)
    assert np.array_equal((resized.permute(1, 2, 0).numpy() * 255).round(), PIXELS_HW3)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_resize_of_a_turned_image_is_the_turned_size(height, width, short_side_px):
    image = np.zeros((height, width, 3), np.uint8)
    shape = resize_short_side(image, short_side_px).shape
    assert min(shape[1:]) == short_side_px
    assert resize_short_side(image.transpose(1, 0, 2), short_side_px).shape == (3, shape[2], shape[1])
