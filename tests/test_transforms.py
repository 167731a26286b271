"""Random transforms of training: mmsegmentation's numbers for given draws, and what is drawn how often."""

import dataclasses
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_settings import quick_settings
from torch.nn.functional import interpolate

from segadapt.config_training import TrainConfig, TransformSettings
from segadapt.training.broad import broad
from segadapt.training.transforms import Crop, Flip, Photometric, Resize, transform

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(16, 90)  # px


def preset(name: str, **changed) -> TransformSettings:
    settings = quick_settings("train", [f"train/transforms={name}"], TrainConfig)
    return dataclasses.replace(settings.train.transforms, **changed)


MMSEG, OPENSEG, DEFAULT = preset("mmseg"), preset("openseg"), preset("default")
WIDE = quick_settings("train", ["train/transforms/broad=wide"], TrainConfig).train.transforms.broad


class Scripted:
    """A generator whose next values are known."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high):
        return self.values.pop(0)

    def integers(self, *bounds):
        return self.values.pop(0)


def picture(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Resize


def resized(width: int, height: int, t: TransformSettings, *, ratio: float, aspect: float = 1.0) -> tuple[int, int]:
    """Width and height, as the tables of mmsegmentation say sizes."""
    drawn = Resize.draw(Scripted(ratio, aspect), (height, width), t, short_side_px=512)  # pyright: ignore
    return drawn.width, drawn.height


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((500, 375), 1.0, (683, 512)),
        ((3000, 500), 1.0, (2048, 341)),
        ((512, 683), 1.0, (512, 683)),
        ((500, 375), 0.7, (477, 358)),  # the box of 1433.6 x 358.4 is cut to 1433 x 358; with the fraction 478 x 358
        ((500, 375), 2.0, (1365, 1024)),
    ],
)
def test_the_factor_is_of_the_box_into_which_the_image_fits_in_either_orientation(size, ratio, expected):
    assert resized(*size, MMSEG, ratio=ratio) == expected
    assert resized(*size[::-1], MMSEG, ratio=ratio) == expected[::-1]


@pytest.mark.parametrize(
    ("mode", "expected"), [("box", (1024, 171)), ("short_side", (1536, 256)), ("own", (1500, 250))]
)
def test_each_mode_has_a_size_of_its_own_at_factor_one_half(mode, expected):
    """Of a panorama the box limits the long side; data.short_side_px=512 does not."""
    assert resized(3000, 500, preset("default", resize=mode), ratio=0.5) == expected


@given(width=st.integers(20, 4000), height=st.integers(20, 4000), ratio=st.floats(0.5, 2))
def test_an_image_fills_its_box_and_keeps_its_aspect(width, height, ratio):
    new = resized(width, height, MMSEG, ratio=ratio)
    long, short = int(2048 * ratio), int(512 * ratio)
    assert max(new) <= long
    assert min(new) <= short
    assert max(new) == long or min(new) == short
    factor = max(new) / max(width, height) if max(new) == long else min(new) / min(width, height)
    assert new == pytest.approx((width * factor, height * factor), abs=0.5 + 1e-6)


@given(ratio=st.floats(0.5, 2), aspect=st.floats(0.9, 1.1))
def test_an_aspect_stretches_width_against_height_and_keeps_the_area(ratio, aspect):
    width, height = resized(4000, 3000, OPENSEG, ratio=ratio, aspect=aspect)
    assert width * height == pytest.approx(12e6 * ratio**2, rel=1e-3)
    assert width / height == pytest.approx(4 / 3 * aspect, rel=1e-3)


def test_steps_of_the_factor_give_mask2formers_sixteen_short_sides():
    """[int(512 * x * 0.1) for x in range(5, 21)] of mmsegmentation, each as often."""
    t, rng = preset("mmseg", resize="short_side", scale_step=0.1, longest_px=2048), np.random.default_rng(0)
    found = Counter(Resize.draw(rng, (512, 683), t, short_side_px=512).height for _ in range(3200))
    assert sorted(found) == [int(512 * x * 0.1) for x in range(5, 21)]
    assert min(found.values()) > 140


@pytest.mark.parametrize(("width", "expected"), [(1000, (2000, 1024)), (2000, (2048, 524)), (3000, (2048, 350))])
def test_a_longest_side_lowers_the_factor(width, expected):
    """As ResizeShortestEdge of mmcv with max_size."""
    t = preset("mmseg", resize="short_side", longest_px=2048)
    drawn = Resize.draw(Scripted(2.0, 1.0), (512, width), t, short_side_px=512)  # pyright: ignore
    assert (drawn.width, drawn.height) == expected


def test_factors_and_aspects_are_uniform_in_their_ranges():
    t, rng = preset("openseg", scale_low=0.5, scale_high=2.0), np.random.default_rng(0)
    drawn = [Resize.draw(rng, (10000, 10000), t, short_side_px=1) for _ in range(2000)]
    factors = np.array([(each.width * each.height) ** 0.5 for each in drawn]) / 10000
    aspects = np.array([each.width / each.height for each in drawn])
    for found, low, high in ((factors, 0.5, 2.0), (aspects, 0.9, 1.1)):
        assert np.quantile(found, (0, 0.25, 0.5, 0.75, 1)) == pytest.approx(np.linspace(low, high, 5), rel=0.05)


@given(height=SIDES, width=SIDES, new_height=SIDES, new_width=SIDES)
def test_a_label_is_resized_to_the_pixel_at_the_same_share_of_the_side(height, width, new_height, new_width):
    """floor(x * old / new), in exact arithmetic; where that is whole, OpenCV may round to the pixel before."""
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.uint8)
    for label_HW, old, new, axis in ((y_HW, height, new_height, 0), (x_HW, width, new_width, 1)):
        _, found_HW = Resize(new_height, new_width).apply(np.zeros((height, width, 3), np.uint8), label_HW)
        assert (np.diff(found_HW.astype(int), axis=1 - axis) == 0).all()
        for place, source in enumerate(found_HW[:, 0] if axis == 0 else found_HW[0]):
            assert source in {place * old // new, (place * old - 1) // new}


@given(seed=SEEDS, height=SIDES, width=SIDES, new_height=SIDES, new_width=SIDES)
def test_an_image_is_resized_as_by_torchs_bilinear(seed, height, width, new_height, new_width):
    image_HW3 = picture(height, width, seed=seed)
    resized_HW3, _ = Resize(new_height, new_width).apply(image_HW3, image_HW3[..., 0])
    image_13HW = torch.from_numpy(image_HW3).permute(2, 0, 1)[None].float()
    torchs_13HW = interpolate(image_13HW, (new_height, new_width), mode="bilinear", align_corners=False)
    away = resized_HW3 - torchs_13HW[0].permute(1, 2, 0).numpy()
    assert np.abs(away).max() < 1.5  # OpenCV's weights have 11 bits; antialiasing would be tens away


# Crop


def quartered() -> np.ndarray:
    """64 x 64 px, quarters of one class, of 3 : 1 exactly, of 2 : 1 among many ignored ones, of ignored ones alone."""
    label_HW = np.full((64, 64), 255, np.uint8)
    label_HW[:32, :32] = 7
    label_HW[:32, 32:] = 1
    label_HW[:8, 32:] = 2
    label_HW[32:36, :16] = 3
    label_HW[36:38, :16] = 4
    return label_HW


ONE_CLASS, EXACTLY, VARIED, IGNORED = (0, 0), (0, 32), (32, 0), (32, 32)  # top and left
CROP = preset("mmseg", crop_px=32)


def cropped(*corners: tuple[int, int], t: TransformSettings = CROP) -> tuple[Crop, int]:
    """The crop where boxes of these corners are drawn in turn, and how many were."""
    rng = Scripted(*(value for corner in corners for value in corner))
    drawn = Crop.draw(rng, quartered(), t)  # pyright: ignore
    return drawn, len(corners) - len(rng.values) // 2


def test_the_box_after_ten_failures_is_used_as_it_comes():
    assert cropped(*[ONE_CLASS] * 10, IGNORED, VARIED) == (Crop(*IGNORED, 32, 32), 11)


@pytest.mark.parametrize("refused", [ONE_CLASS, EXACTLY, IGNORED])
def test_a_box_is_refused_for_one_class_three_quarters_of_one_or_nothing_labelled(refused):
    assert cropped(refused, refused, VARIED, refused) == (Crop(*VARIED, 32, 32), 3)


def test_a_little_less_than_three_quarters_is_accepted():
    label_HW = quartered()
    label_HW[8, 32] = 2
    assert Crop(*EXACTLY, 32, 32).is_varied(label_HW, 0.75)


def test_the_first_varied_box_ends_the_draws_and_with_ratio_one_any_box_does():
    assert cropped(VARIED, ONE_CLASS)[1] == 1
    assert cropped(ONE_CLASS, VARIED, t=preset("mmseg", crop_px=32, cat_max_ratio=1.0)) == (Crop(*ONE_CLASS, 32, 32), 1)


def test_boxes_are_uniform_over_all_places():
    rng, label_HW = np.random.default_rng(0), np.zeros((19, 40), np.uint8)
    found = Counter(Crop.draw(rng, label_HW, preset("default", crop_px=16)).top for _ in range(2000))
    assert sorted(found) == [0, 1, 2, 3]
    assert min(found.values()) > 430  # 500 expected, standard deviation 19


@given(seed=SEEDS, height=SIDES, width=SIDES, crop=st.tuples(SIDES, SIDES))
def test_a_crop_has_the_size_asked_for_or_the_images(seed, height, width, crop):
    t = preset("mmseg", crop_px=crop[0], crop_width_px=crop[1])
    label_HW = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    drawn = Crop.draw(np.random.default_rng(seed), label_HW, t)
    image_hw3, label_hw = drawn.apply(np.repeat(label_HW[..., None], 3, axis=2), label_HW)
    assert label_hw.shape == (min(height, crop[0]), min(width, crop[1]))
    assert np.array_equal(image_hw3[..., 1], label_hw)


@given(seed=SEEDS, height=SIDES, width=SIDES, crop_px=st.sampled_from((16, 40, 100)), ratio=st.sampled_from((0.75, 1)))
def test_a_crop_shows_the_class_asked_for(seed, height, width, crop_px, ratio):
    """One pixel in a corner, where a crop of any place seldom is; with cat_max_ratio all 11 boxes hold it."""
    label_HW = np.zeros((height, width), np.uint8)
    label_HW[-1, -1] = 3
    t = preset("default", crop_px=crop_px, cat_max_ratio=ratio)
    drawn = Crop.draw(np.random.default_rng(seed), label_HW, t, shows=3)
    assert (drawn.apply(picture(height, width), label_HW)[1] == 3).any()
    absent, anywhere = (Crop.draw(np.random.default_rng(seed), label_HW, t, shows=shows) for shows in (9, None))
    assert absent == anywhere


# Flip


@given(seed=SEEDS, width=SIDES)
def test_a_flip_mirrors_image_and_label(seed, width):
    image_HW3 = picture(5, width, seed=seed)
    for is_flipped in (True, False):
        flipped_HW3, label_HW = Flip(is_flipped).apply(image_HW3, image_HW3[..., 2])
        for x in range(width):
            source = width - 1 - x if is_flipped else x
            assert np.array_equal(flipped_HW3[:, x], image_HW3[:, source])
            assert np.array_equal(label_HW[:, x], image_HW3[:, source, 2])


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 430, 570), (1.0, 1000, 1000)])
def test_flips_come_as_often_as_asked(share, low, high):
    rng, t = np.random.default_rng(0), preset("default", flip=share)
    assert low <= sum(Flip.draw(rng, t).is_flipped for _ in range(1000)) <= high


# Light

NOTHING = Photometric(None, None, None, None, is_contrast_first=True)


def light(**drawn) -> Photometric:
    return dataclasses.replace(NOTHING, **drawn)


def slowly(image_HW3: np.ndarray, drawn: Photometric) -> np.ndarray:
    """Pixel by pixel on BGR, as mmsegmentation orders it; only the conversions of colour are OpenCV's."""

    def each(values: np.ndarray, times: float, plus: float) -> np.ndarray:
        out = np.empty_like(values)
        for place in np.ndindex(values.shape):
            value = np.float32(values[place]) * np.float32(times) + np.float32(plus)
            out[place] = int(min(max(value, 0), 255))
        return out

    bgr_HW3 = np.ascontiguousarray(image_HW3[..., ::-1])
    if drawn.brightness is not None:
        bgr_HW3 = each(bgr_HW3, 1, drawn.brightness)
    if drawn.contrast is not None and drawn.is_contrast_first:
        bgr_HW3 = each(bgr_HW3, drawn.contrast, 0)
    if drawn.saturation is not None:
        hsv_HW3 = cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2HSV)
        hsv_HW3[..., 1] = each(hsv_HW3[..., 1], drawn.saturation, 0)
        bgr_HW3 = cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2BGR)
    if drawn.hue is not None:
        hsv_HW3 = cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2HSV)
        hsv_HW3[..., 0] = (hsv_HW3[..., 0].astype(int) + drawn.hue) % 180
        bgr_HW3 = cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2BGR)
    if drawn.contrast is not None and not drawn.is_contrast_first:
        bgr_HW3 = each(bgr_HW3, drawn.contrast, 0)
    return bgr_HW3[..., ::-1]


def maybe(strategy):
    return st.none() | strategy


@given(
    seed=SEEDS,
    drawn=st.builds(
        Photometric,
        maybe(st.floats(-32, 32)), maybe(st.floats(0.5, 1.5)), maybe(st.floats(0.5, 1.5)), maybe(st.integers(-18, 17)),
        st.booleans(),
    ),
)  # fmt: skip
def test_light_is_that_of_a_slow_loop_over_bgr(seed, drawn):
    image_HW3 = picture(6, 5, seed=seed)
    before = image_HW3.copy()
    assert np.array_equal(drawn.apply(image_HW3), slowly(image_HW3, drawn))
    assert np.array_equal(image_HW3, before)


@pytest.mark.parametrize("is_contrast_first", [True, False])
def test_light_is_that_of_the_slow_loop_on_images_that_fill_vector_registers(is_contrast_first):
    image_HW3, drawn = picture(40, 70), Photometric(-17.3, 1.31, 0.62, -11, is_contrast_first)
    assert np.array_equal(drawn.apply(image_HW3), slowly(image_HW3, drawn))


@pytest.mark.parametrize(
    ("drawn", "value", "expected"),
    [
        (light(brightness=10.9), 100, 110),  # 110.9 is cut, not rounded
        (light(brightness=-0.5), 100, 99),
        (light(brightness=-32.0), 10, 0),
        (light(contrast=1.5), 101, 151),  # 151.5
        (light(contrast=1.5), 250, 255),
        (light(contrast=0.5), 1, 0),
        (light(brightness=10.9, contrast=1.5), 100, 165),  # 110 * 1.5, each cut by itself; together 166.35
    ],
)
def test_light_is_cut_to_whole_values_after_each_operation(drawn, value, expected):
    assert drawn.apply(np.full((2, 2, 3), value, np.uint8)).tolist() == [[[expected] * 3] * 2] * 2


@pytest.mark.parametrize(
    ("drawn", "colour", "expected"),
    [
        (light(hue=60), (255, 0, 0), (0, 255, 0)),
        (light(hue=-60), (255, 0, 0), (0, 0, 255)),  # modulo 180
        (light(hue=17), (90, 90, 90), (90, 90, 90)),
        (light(saturation=0.0), (200, 100, 50), (200, 200, 200)),
        (light(contrast=1.5, saturation=0.0), (200, 100, 50), (255, 255, 255)),
        (light(contrast=0.5, saturation=2.0), (200, 100, 100), (100, 0, 0)),
        # saturation 127 * 1.5 = 190: last, the contrast sees 200 and 51
        (light(contrast=0.5, saturation=1.5, is_contrast_first=False), (200, 100, 100), (100, 25, 25)),
    ],
)
def test_hue_and_saturation_by_hand(drawn, colour, expected):
    assert drawn.apply(np.full((1, 1, 3), colour, np.uint8))[0, 0].tolist() == list(expected)


def test_contrast_first_and_last_differ_where_values_are_clipped():
    image_HW3 = picture(30, 30)
    first, last = (
        light(contrast=1.4, saturation=1.4, is_contrast_first=where).apply(image_HW3) for where in (True, False)
    )
    assert (first != last).mean() > 0.3


def test_each_change_of_light_has_a_fair_coin_and_the_contrast_one_for_its_place():
    drawn = [Photometric.draw(np.random.default_rng(seed), MMSEG) for seed in range(2000)]
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 17)}
    for name, (low, high) in ranges.items():
        found = [value for value in (getattr(each, name) for each in drawn) if value is not None]
        assert 900 < len(found) < 1100
        assert low <= min(found) < low + (high - low) / 20
        assert high - (high - low) / 20 < max(found) <= high
    assert 900 < sum(each.is_contrast_first for each in drawn) < 1100
    together = Counter((each.brightness is None, each.hue is None, each.is_contrast_first) for each in drawn)
    assert min(together.values()) > 190  # 250 each: the coins know nothing of each other


def test_a_range_of_zero_is_never_drawn():
    """A factor of 1 in HSV would still round every pixel twice."""
    for seed in range(50):
        drawn = Photometric.draw(np.random.default_rng(seed), OPENSEG)
        assert (drawn.contrast, drawn.saturation, drawn.hue) == (None, None, None)
        assert drawn.brightness is None or abs(drawn.brightness) <= 10


# All together


@given(seed=SEEDS, height=SIDES, width=SIDES, crop_px=st.sampled_from((16, 32, 64)), scale=st.floats(0.3, 2))
def test_image_and_label_move_together(seed, height, width, crop_px, scale):
    """The label is coded in the image, so that after resize, crop and flip they still agree."""
    label_HW = np.zeros((height, width), np.uint8)
    label_HW[height // 2 :, width // 3 :] = 1
    image_HW3 = np.repeat(label_HW[..., None] * 200, 3, axis=2)
    kept = image_HW3.copy()
    t = preset("default", crop_px=crop_px, scale_low=scale, scale_high=scale)
    image_hw3, label_hw = transform(image_HW3, label_HW, np.random.default_rng(seed), t, short_side_px=48)
    assert image_hw3.shape == (*label_hw.shape, 3)
    assert max(label_hw.shape) <= crop_px
    # bilinear pixels at the edge of two classes lie between: a line of them across, and no more
    assert (np.abs(image_hw3[..., 0].astype(int) - 200 * label_hw.astype(int)) > 100).mean() < 0.15
    assert np.array_equal(image_HW3, kept)


@pytest.mark.parametrize("seed", range(8))
def test_light_comes_after_the_geometry_and_broad_last_from_the_same_generator(seed):
    image_HW3, t = picture(60, 60), preset("mmseg", crop_px=20, broad=WIDE)
    label_HW = image_HW3[..., 0] % 3
    rng = np.random.default_rng(seed)
    expected = Resize.draw(rng, (60, 60), t, short_side_px=48).apply(image_HW3, label_HW)
    expected = Crop.draw(rng, expected[1], t).apply(*expected)
    expected = Flip.draw(rng, t).apply(*expected)
    lit_hw3 = broad(Photometric.draw(rng, t).apply(expected[0]), rng, WIDE)
    image_hw3, label_hw = transform(image_HW3, label_HW, np.random.default_rng(seed), t, short_side_px=48)
    assert np.array_equal(image_hw3, lit_hw3)
    assert np.array_equal(label_hw, expected[1])


def test_without_light_the_pixels_are_the_images():
    image_HW3, t = picture(48, 48), preset("default", crop_px=64, scale_low=1, scale_high=1, flip=0)
    image_hw3, _ = transform(image_HW3, image_HW3[..., 0], np.random.default_rng(0), t, short_side_px=48)
    assert image_hw3.base is image_HW3  # not even copied
