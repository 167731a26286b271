"""Random changes of images to classify, against Pillow, numpy and hand values, given what was drawn."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pretraining_runs import pretraining

from segadapt.config_pretraining import PretrainTransformsSettings, RandAugmentSettings
from segadapt.training.classified_images import MixedBatch
from segadapt.training.pretrain_transforms import Crop, Erase, centred, draw_shares, soft_targets, transform
from segadapt.training.rand_augment import OPERATIONS, Operation, apply, draw

RNG = np.random.default_rng
NOISE_HW3 = RNG(0).integers(20, 200, (37, 50, 3), dtype=np.uint8)
RAMP_HW3 = (np.arange(60)[:, None] * 2 + np.arange(50) * 2 + 10)[:, :, None].repeat(3, 2).astype(np.uint8)


def settings(*overrides: str) -> PretrainTransformsSettings:
    return pretraining("unused", *overrides).train.transforms


def changed(name: str, strength: float, image_HW3: np.ndarray) -> np.ndarray:
    before = image_HW3.copy()
    out = Operation(name, strength).apply(image_HW3)
    assert np.array_equal(image_HW3, before)
    return out


# RandAugment


@pytest.mark.parametrize(
    "image_HW3", [NOISE_HW3, np.full((8, 9, 3), 77, np.uint8), RAMP_HW3], ids=["noise", "flat", "ramp"]
)
@pytest.mark.parametrize(
    ("name", "strength", "pillow"),
    [
        ("auto_contrast", 0, ImageOps.autocontrast),
        ("equalize", 0, ImageOps.equalize),
        ("invert", 0, ImageOps.invert),
        ("posterize", 1, lambda image: ImageOps.posterize(image, 1)),
        ("posterize", 3, lambda image: ImageOps.posterize(image, 3)),
        ("solarize", 26, lambda image: ImageOps.solarize(image, 26)),
        ("solarize", 256, lambda image: ImageOps.solarize(image, 256)),
        *((name, factor, lambda image, of=of, factor=factor: of(image).enhance(factor))
          for factor in (0.19, 1.0, 1.81)
          for name, of in (("color", ImageEnhance.Color), ("contrast", ImageEnhance.Contrast),
                           ("brightness", ImageEnhance.Brightness), ("sharpness", ImageEnhance.Sharpness))),
    ],
)  # fmt: skip
def test_light_is_pillows(name, strength, pillow, image_HW3):
    expected = np.asarray(pillow(Image.fromarray(image_HW3)))
    np.testing.assert_array_equal(changed(name, strength, image_HW3), expected)


def test_dark_values_grow_by_what_is_added():
    image_HW3 = np.array([[[0, 100, 127]], [[128, 129, 255]]], np.uint8)
    assert changed("solarize_add", 99, image_HW3).tolist() == [[[99, 199, 226]], [[128, 129, 255]]]
    assert changed("solarize_add", 200, image_HW3)[0].max() == 255


@pytest.mark.parametrize(
    ("name", "strength", "pillow"),
    [
        ("rotate", 12.0, lambda image: image.rotate(12, Image.Resampling.BICUBIC)),
        ("shear_x", 0.2, lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0.2, 0, 0, 1, 0),
                                                       Image.Resampling.BICUBIC)),
        ("shear_y", -0.1, lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, -0.1, 1, 0),
                                                        Image.Resampling.BICUBIC)),
        ("translate_x", 0.33, lambda image: image.transform(image.size, Image.Transform.AFFINE,
                                                            (1, 0, 0.33 * 50, 0, 1, 0), Image.Resampling.BICUBIC)),
        ("translate_y", -0.2, lambda image: image.transform(image.size, Image.Transform.AFFINE,
                                                            (1, 0, 0, 0, 1, -0.2 * 60), Image.Resampling.BICUBIC)),
    ],
)  # fmt: skip
def test_geometry_is_pillows_on_a_ramp_which_no_bicubic_kernel_changes(name, strength, pillow):
    image = Image.fromarray(RAMP_HW3)
    inside = np.asarray(pillow(Image.new("L", image.size, 255).filter(ImageFilter.MinFilter(5)))) == 255
    inside = cv2.erode(inside.astype(np.uint8), np.ones((7, 7)), borderValue=0) == 1
    assert inside.sum() > 300
    difference = changed(name, strength, RAMP_HW3).astype(int) - np.asarray(pillow(image)).astype(int)
    assert np.abs(difference[inside]).max() <= 1


def test_what_comes_from_outside_is_grey():
    assert changed("translate_x", 0.5, NOISE_HW3)[5, -5].tolist() == [124, 116, 104]


def test_strengths_at_magnitude_nine():
    found = {name: abs(strength(9.0, RNG(0))) for name, (strength, _) in OPERATIONS.items()}
    light = {"auto_contrast": 0, "equalize": 0, "invert": 0, "posterize": 1, "solarize": 26, "solarize_add": 99}
    geometry = {"rotate": 27, "shear_x": 0.27, "shear_y": 0.27, "translate_x": 0.405, "translate_y": 0.405}
    factors = {name: found[name] for name in ("color", "contrast", "brightness", "sharpness")}
    assert found == pytest.approx(light | geometry | factors)
    assert {round(OPERATIONS["color"][0](9.0, RNG(seed)), 6) for seed in range(20)} == {0.19, 1.81}
    assert {round(OPERATIONS["rotate"][0](9.0, RNG(seed)), 6) for seed in range(20)} == {-27.0, 27.0}


def test_operations_are_drawn_and_left_out_as_often_as_asked():
    drawn = [draw(RNG(seed), RandAugmentSettings(2, 0.5, 9.0, 0.5)) for seed in range(2000)]
    counts = np.bincount([len(one) for one in drawn]) / 2000
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    assert {operation.name for one in drawn for operation in one} == set(OPERATIONS)
    strengths = [abs(operation.strength) for one in drawn for operation in one if operation.name == "rotate"]
    assert np.mean(strengths) == pytest.approx(27, abs=0.4)
    assert np.std(strengths) == pytest.approx(1.5, abs=0.3)
    assert max(strengths) <= 30
    assert draw(RNG(0), RandAugmentSettings(0, 1.0, 9.0, 0.5)) == []
    assert np.array_equal(apply(NOISE_HW3, []), NOISE_HW3)


# Crop, erasing, validation


def test_crops_lie_in_the_image_with_the_areas_and_aspects_asked():
    t = settings()
    crops = [Crop.draw(RNG(seed), (300, 400), t) for seed in range(500)]
    areas = np.array([crop.height * crop.width / 120000 for crop in crops])
    aspects = np.array([crop.width / crop.height for crop in crops])
    assert all(crop.top + crop.height <= 300 and crop.left + crop.width <= 400 for crop in crops)
    assert (areas.min(), areas.max()) == (pytest.approx(0.08, abs=0.03), pytest.approx(0.95, abs=0.06))
    assert (aspects.min(), aspects.max()) == (pytest.approx(0.75, abs=0.02), pytest.approx(4 / 3, abs=0.02))
    assert np.mean([crop.is_flipped for crop in crops]) == pytest.approx(0.5, abs=0.06)


def test_where_no_crop_fits_the_centre_is_taken():
    crop = Crop.draw(RNG(0), (10, 1000), settings("train.transforms.area_low=0.9"))
    assert (crop.top, crop.left, crop.height, crop.width) == (0, 493, 10, 13)


def test_a_crop_of_the_nets_size_is_cut_out_and_mirrored():
    assert np.array_equal(Crop(3, 5, 32, 32, False).apply(NOISE_HW3, 32), NOISE_HW3[3:35, 5:37])
    assert np.array_equal(Crop(3, 5, 32, 32, True).apply(NOISE_HW3, 32), NOISE_HW3[3:35, 5:37][:, ::-1])
    larger = Crop(0, 0, 37, 50, False).apply(NOISE_HW3, 64)
    assert np.array_equal(larger, cv2.resize(NOISE_HW3, (64, 64), interpolation=cv2.INTER_CUBIC))


def test_erasing_writes_noise_into_its_box_alone():
    noise_hw3 = RNG(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    out = Erase(2, 3, noise_hw3).apply(NOISE_HW3)
    assert np.array_equal(out[2:7, 3:10], noise_hw3)
    out[2:7, 3:10] = NOISE_HW3[2:7, 3:10]
    assert np.array_equal(out, NOISE_HW3)


def test_boxes_of_erasing_are_as_frequent_and_as_large_as_asked():
    t = settings()
    drawn = [Erase.draw(RNG(seed), 96, t) for seed in range(800)]
    boxes = [one for one in drawn if one is not None]
    assert len(boxes) / 800 == pytest.approx(0.25, abs=0.05)
    areas = [one.noise_hw3.shape[0] * one.noise_hw3.shape[1] / 96**2 for one in boxes]
    assert 0.015 < min(areas) < 0.1 < 0.25 < max(areas) < 0.35
    assert all(one.top + one.noise_hw3.shape[0] <= 96 and one.left + one.noise_hw3.shape[1] <= 96 for one in boxes)
    noise = np.concatenate([one.noise_hw3.reshape(-1, 3) for one in boxes]).mean(0)
    assert noise == pytest.approx([124, 116, 104], abs=2)


def test_the_validated_image_is_the_centre_at_its_short_side():
    t = settings("train.transforms.image_px=32", "train.transforms.validation_short_side_px=37")
    assert np.array_equal(centred(NOISE_HW3, t), NOISE_HW3[2:34, 9:41])
    assert centred(NOISE_HW3[:, :20], settings("train.transforms.image_px=32")).shape == (32, 32, 3)


def test_an_image_depends_on_its_generator_alone():
    t = settings()
    one, other = (transform(NOISE_HW3, RNG(5), t) for _ in range(2))
    assert one.shape == (t.image_px, t.image_px, 3)
    assert np.array_equal(one, other)
    assert not np.array_equal(one, transform(NOISE_HW3, RNG(6), t))


# Mixing


def test_mixup_has_one_share_and_cutmix_a_box():
    mixup = settings("train.transforms.cutmix_share=0")
    shares = [draw_shares(RNG(seed), 24, mixup) for seed in range(400)]
    assert all(np.ptp(own_ss) == 0 and 0 <= own_ss[0, 0] <= 1 for own_ss in shares)
    values = np.array([own_ss[0, 0] for own_ss in shares])
    assert (values.mean(), values.var()) == (pytest.approx(0.5, abs=0.04), pytest.approx(0.25 / 2.6, abs=0.012))
    cutmix = settings("train.transforms.cutmix_share=1")
    for seed in range(100):
        own_ss = draw_shares(RNG(seed), 24, cutmix)
        rows, columns = np.flatnonzero((own_ss == 0).any(1)), np.flatnonzero((own_ss == 0).any(0))
        assert set(np.unique(own_ss)) <= {0, 1}
        assert (own_ss == 0).sum() == len(rows) * len(columns)  # one box
    assert (draw_shares(RNG(0), 24, settings("train.transforms.mixing=0")) == 1).all()


def test_how_often_each_is_chosen():
    t = settings("train.transforms.mixing=0.8", "train.transforms.cutmix_share=0.25")
    shares = [draw_shares(RNG(seed), 64, t) for seed in range(1000)]
    is_mixup = [0 < own_ss.min() < 1 and np.ptp(own_ss) == 0 for own_ss in shares]
    assert np.mean(is_mixup) == pytest.approx(0.6, abs=0.05)


def test_targets_equal_hand_values_and_sum_to_one():
    own_ss = np.ones((4, 4), np.float32)
    own_ss[:2, :2] = 0  # a quarter is the partner's
    found = soft_targets(np.array([0, 2, 1]), own_ss, num_classes=4, smoothing=0.1)
    s = 0.025
    expected = [[s + 0.675, s, s + 0.225, s], [s, s + 0.225, s + 0.675, s], [s + 0.225, s + 0.675, s, s]]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert found.sum(1) == pytest.approx(1)
    plain = soft_targets(np.array([1, 1]), own_ss, num_classes=2, smoothing=0.0)
    assert plain.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("share", ["train.transforms.cutmix_share=0", "train.transforms.cutmix_share=1"])
def test_images_are_mixed_with_the_next_one_by_these_shares(share):
    own_ss = draw_shares(RNG(4), 8, settings(share))
    pixels = RNG(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    batch = MixedBatch(torch.from_numpy(pixels), torch.zeros(3, 2), torch.from_numpy(own_ss))
    image_B3ss, _ = batch.to("cpu")
    for index in range(3):
        other = pixels[(index + 1) % 3]
        expected = (own_ss * pixels[index] + (1 - own_ss) * other) / 255
        np.testing.assert_allclose(image_B3ss[index], expected, atol=1e-6)
    assert image_B3ss.dtype == torch.float32
