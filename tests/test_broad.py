"""Broad source training, operation by operation: off at strength 0, in range, repeatable, and not the corruptions."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segadapt import config_training
from segadapt.datasets import Task
from segadapt.datasets.toytown import ToyTown
from segadapt.parse import from_overrides
from segadapt.training import broad

SEEDS = st.integers(0, 2**32 - 1)
OPERATIONS = [broad.light, broad.colour, broad.haze, broad.sharpness, broad.grain]
named = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


@pytest.fixture(scope="module")
def wide() -> config_training.BroadSettings:
    """As shipped."""
    return from_overrides("train_generative", ["runtime=cpu"], config_training.TrainGenerativeConfig).train.broad


@pytest.fixture(scope="module")
def off(wide) -> config_training.BroadSettings:
    """Every operation at strength 0."""
    strengths = ("gamma", "shade", "mix", "grey", "blur_px", "sharpen", "haze", "grain")
    return dataclasses.replace(wide, **dict.fromkeys(strengths, 0.0), probability=1.0)


@pytest.fixture(scope="module")
def street() -> np.ndarray:
    return ToyTown(split="training", count=1).load(Task(0), "00000").image_HW3


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


@named
@given(seed=SEEDS)
def test_an_operation_of_strength_0_is_the_identity(off, operation, seed):
    """To rounding; the narrowest oriented blur has 0.4 % beside its centre where it lies along an axis."""
    before = picture(40, 56, seed)
    after = operation(before.copy(), np.random.default_rng(seed), off)
    assert np.abs(after - before).max() < (0.01 if operation is broad.sharpness else 1e-5)


@given(seed=SEEDS)
def test_all_of_strength_0_or_none_drawn_give_the_image_back(wide, off, seed):
    image_HW3 = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    rare = dataclasses.replace(wide, probability=0.0)
    assert np.array_equal(broad.broad(image_HW3, np.random.default_rng(seed), rare), image_HW3)
    same = broad.broad(image_HW3, np.random.default_rng(seed), off)
    assert np.abs(same.astype(int) - image_HW3).max() <= 3


@named
@given(seed=SEEDS, height=st.integers(16, 60), width=st.integers(16, 60))
def test_an_operation_is_pure_finite_and_keeps_shape_and_type(wide, operation, seed, height, width):
    pixels_HW3 = 1.5 * picture(height, width, seed)  # earlier operations leave 0..1
    before = pixels_HW3.copy()
    after = operation(pixels_HW3, np.random.default_rng(seed), wide)
    assert np.array_equal(pixels_HW3, before)
    assert (after.shape, after.dtype) == (before.shape, np.float32)
    assert np.isfinite(after).all()
    assert np.array_equal(after, operation(pixels_HW3, np.random.default_rng(seed), wide))


@named
def test_an_operation_of_full_strength_changes_the_image_differently_for_each_draw(wide, street, operation):
    pixels_HW3 = street.astype(np.float32) / 255
    changes = [np.abs(operation(pixels_HW3, np.random.default_rng(s), wide) - pixels_HW3).mean() for s in range(20)]
    assert len(set(changes)) == 20
    assert np.mean(changes) > 0.005


@given(seed=SEEDS)
def test_light_keeps_black_and_white_and_the_order_of_greys(wide, seed):
    """A gamma curve is monotone and 0 stays 0; the field of brightness is never negative."""
    no_field = dataclasses.replace(wide, shade=0.0)
    ramp_HW3 = np.linspace(0, 1, 64, dtype=np.float32)[None, :, None].repeat(4, 0).repeat(3, 2)
    lit_HW3 = broad.light(ramp_HW3, np.random.default_rng(seed), no_field)
    assert (np.diff(lit_HW3, axis=1) > 0).all()
    assert lit_HW3[0, 0, 0] == 0
    assert lit_HW3[0, -1, 0] == 1
    deepest = dataclasses.replace(wide, shade=2.0)
    assert broad.light(ramp_HW3, np.random.default_rng(seed), deepest).min() >= 0


@given(seed=SEEDS)
def test_colour_of_full_grey_leaves_one_channel_and_mixes_no_places(wide, seed):
    grey = dataclasses.replace(wide, mix=0.0, grey=1.0)
    before = picture(8, 8, seed)
    rng = np.random.default_rng(seed)
    share = (rng.uniform(size=9), rng.uniform(0, 1))[1]  # nine entries of the mix, then the share of grey
    after = broad.colour(before, np.random.default_rng(seed), grey)
    expected = (1 - share) * before + share * before.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(after, expected, atol=1e-5)


@given(seed=SEEDS)
def test_haze_moves_every_pixel_towards_one_airlight(wide, seed):
    """The same density and airlight whatever the image: the difference of two hazed images only shrinks."""
    one, other = 0.2 + picture(30, 40, seed), np.zeros((30, 40, 3), np.float32)
    hazed, veil = (broad.haze(pixels, np.random.default_rng(seed), wide) for pixels in (one, other))
    left_HW3 = (hazed - veil) / one
    assert left_HW3.min() >= 1 - wide.haze - 0.01
    assert left_HW3.max() <= 1.01
    density_HW = 1 - np.median(left_HW3, axis=2)
    airlight_n3 = veil[density_HW > 0.05] / density_HW[density_HW > 0.05][:, None]
    if len(airlight_n3):
        assert np.ptp(airlight_n3, axis=0).max() < 0.05
        assert airlight_n3.min() >= 0.2
        assert airlight_n3.max() <= 1.1


def test_sharpness_blurs_and_sharpens_about_as_often_and_keeps_the_mean(wide, street):
    pixels_HW3 = street.astype(np.float32) / 255

    def edges(image_HW3: np.ndarray) -> float:
        return float(np.abs(np.diff(image_HW3, axis=1)).mean())

    drawn = [broad.sharpness(pixels_HW3, np.random.default_rng(seed), wide) for seed in range(60)]
    softer = np.mean([edges(image_HW3) < edges(pixels_HW3) for image_HW3 in drawn])
    assert 0.3 < softer < 0.7
    assert max(abs(image_HW3.mean() - pixels_HW3.mean()) for image_HW3 in drawn) < 0.01


@pytest.mark.parametrize("cell", [2, 3, 4])
def test_grain_is_correlated_between_neighbours(wide, cell):
    """White noise, as in four of the corruptions, has a correlation of 0 +- 0.02 here."""
    fixed = dataclasses.replace(wide, grain_min_px=cell, grain_max_px=cell)
    flat_HW3 = np.full((200, 200, 3), 0.5, np.float32)
    for seed in range(10):
        noise_HW = (broad.grain(flat_HW3, np.random.default_rng(seed), fixed) - flat_HW3)[..., 0]
        for one, other in ((noise_HW[1:], noise_HW[:-1]), (noise_HW[:, 1:], noise_HW[:, :-1])):
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.4


def test_the_shipped_grain_has_no_white_noise(wide):
    assert wide.grain_min_px >= 2


def test_grain_is_stronger_in_the_light_and_never_above_its_setting(wide):
    strongest = []
    for seed in range(30):
        dark, bright = (
            (broad.grain(flat_HW3, np.random.default_rng(seed), wide) - flat_HW3).std()
            for flat_HW3 in (np.full((96, 96, 3), level, np.float32) for level in (0.1, 0.9))
        )
        assert bright > 2 * dark
        strongest.append(bright)
    assert 0.05 < max(strongest) <= wide.grain


def test_broad_training_loads_no_corruption():
    code = "import sys, segadapt.training.broad; sys.exit(any('segadapt.corruption' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(seed=SEEDS, value=st.sampled_from((0, 255)))
def test_all_together_stay_in_range_at_black_and_white(wide, seed, value):
    """An overflow of uint8 would turn the whole image over: white to black."""
    always = dataclasses.replace(wide, probability=1.0, mix=0.0, haze=0.0, gamma=0.0, shade=0.0, grain=0.05)
    lit = broad.broad(np.full((24, 24, 3), value, np.uint8), np.random.default_rng(seed), always)
    assert lit.dtype == np.uint8
    assert np.abs(lit.astype(int) - value).max() < 80
