"""Crops of different sizes to one batch: which size, what is scaled, where the padding goes, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_settings import quick_settings

from segadapt.config_training import TrainConfig, TransformSettings
from segadapt.errors import UserError
from segadapt.models.discriminative.make import make_segmenter
from segadapt.training.sizes import TrainingCrop, aligned, check_sizes, collate, corner, target_size
from segadapt.training.transforms import transform

SIDES = st.integers(16, 80)  # px
DEFAULT = quick_settings("train", [], TrainConfig).train.transforms


def settings(**changed) -> TransformSettings:
    return dataclasses.replace(DEFAULT, **changed)


def crops(*sizes: tuple[int, int], seed: int = 0) -> list[TrainingCrop]:
    rng = np.random.default_rng(seed)
    return [
        TrainingCrop(item, rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 11, size, dtype=np.uint8))
        for item, size in enumerate(sizes)
    ]


def batch_of(given: list[TrainingCrop], *, batch: int = 0, **changed) -> tuple[np.ndarray, ...]:
    """Images as they look [B, H, W, 3] 0..255, and labels."""
    image_B3HW, label_BHW = collate(given, settings(**changed), seed=0, batch=batch).to("cpu")
    assert (image_B3HW.dtype, label_BHW.dtype) == (torch.float32, torch.int64)
    return (image_B3HW.permute(0, 2, 3, 1) * 255).numpy(), label_BHW.numpy()


# The size of a batch

MODES = [
    ("fixed", [], (48, 48)),
    ("fixed", [[64, 96]], (64, 96)),
    ("max", [], (40, 33)),  # the largest height is one crop's, the largest width another's
]


@pytest.mark.parametrize(("size_mode", "sizes_px", "expected"), MODES)
def test_each_mode_has_its_size(size_mode, sizes_px, expected):
    t = settings(crop_px=48, size_mode=size_mode, sizes_px=sizes_px)
    assert target_size([(40, 20), (17, 33)], t, seed=0, batch=0) == expected


def test_a_diverse_batch_has_the_size_of_its_image():
    assert target_size([(40, 20)], settings(size_mode="diverse"), seed=0, batch=0) == (40, 20)


def test_several_sizes_are_drawn_as_often_from_seed_and_batch_alone():
    choices = [(64, 64), (64, 96), (128, 128)]
    t = settings(size_mode="multi", sizes_px=[list(size) for size in choices])
    drawn = [target_size([(16, 16)], t, seed=3, batch=batch) for batch in range(300)]
    assert drawn == [target_size([(50, 60), (64, 9)], t, seed=3, batch=batch) for batch in range(300)]
    assert drawn != [target_size([(16, 16)], t, seed=4, batch=batch) for batch in range(300)]
    assert min(drawn.count(size) for size in choices) > 70  # 100 expected, standard deviation 8


@given(height=SIDES, width=SIDES, stride_px=st.integers(1, 40))
def test_sizes_are_rounded_up_to_the_stride(height, width, stride_px):
    found = target_size([(height, width)], settings(size_mode="max", stride_px=stride_px), seed=0, batch=0)
    for side, given_px in zip(found, (height, width), strict=True):
        assert side % stride_px == 0
        assert given_px <= side < given_px + stride_px


# Scaling


@given(size=st.tuples(SIDES, SIDES), target=st.tuples(SIDES, SIDES))
def test_scaling_fills_the_target_or_the_largest_part_of_it_that_keeps_the_aspect(size, target):
    (_, image_hw3, label_hw), *_ = crops(size)
    assert aligned(image_hw3, label_hw, target, "only_scale")[1].shape == target
    image, label = aligned(image_hw3, label_hw, target, "scale_and_pad")
    assert image.shape[:2] == label.shape
    factor = min(target[0] / size[0], target[1] / size[1])
    assert label.shape == pytest.approx((size[0] * factor, size[1] * factor), abs=0.5 + 1e-9)
    assert any(side == wanted for side, wanted in zip(label.shape, target, strict=True))
    assert aligned(image_hw3, label_hw, target, "only_pad") == (image_hw3, label_hw)


def test_scaling_moves_image_and_label_together():
    label_hw = np.zeros((20, 40), np.uint8)
    label_hw[10:, 20:] = 1
    given = [TrainingCrop(0, np.repeat(label_hw[..., None] * np.uint8(200), 3, axis=2), label_hw)]
    images, labels = batch_of(given, sizes_px=[[64, 64]], align="scale_and_pad", pad="left_up")
    assert (labels[0, :32] == 255).all()
    assert (labels[0, 32:48] == 0).all()
    assert (labels[0, 48:, 32:] == 1).all()
    assert (np.abs(images[0, 32:, :, 0] - 200 * labels[0, 32:]) > 100).mean() < 0.05


# Padding


@pytest.mark.parametrize(
    ("pad", "corners"),
    [
        ("right_down", {(0, 0)}),
        ("left_up", {(5, 8)}),
        ("centre", {(2, 4)}),
        ("border", {(0, 0), (5, 8)}),
        ("random", {(top, left) for top in range(6) for left in range(9)}),
    ],
)
def test_padding_is_where_its_name_says(pad, corners):
    assert {corner((5, 8), pad, np.random.default_rng(seed)) for seed in range(600)} == corners


@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3),
    pad=st.sampled_from(("right_down", "left_up", "centre", "border", "random")),
    stride_px=st.sampled_from((1, 8, 32)),
)
def test_every_pixel_of_a_crop_is_in_the_batch_and_the_rest_is_ignored_mean_colour(sizes, pad, stride_px):
    given = crops(*sizes)
    images, labels = batch_of(given, size_mode="max", pad=pad, stride_px=stride_px)
    mean = np.array([123.675, 116.28, 103.53])
    for image, label, (_, image_hw3, label_hw) in zip(images, labels, given, strict=True):
        rows, columns = (np.flatnonzero((label != 255).any(axis=axis)) for axis in (1, 0))
        inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert np.array_equal(label[inside], label_hw)
        assert np.allclose(image[inside], image_hw3, atol=1e-4)
        assert np.allclose(image[label == 255], mean, atol=1e-4)
        assert (label == 255).sum() == label.size - label_hw.size


def test_padding_is_exactly_zero_for_the_net():
    """As mmsegmentation pads after it has normalised."""
    net = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1]}
    segmenter = make_segmenter("segformer", net, 3, seed=0)
    image_B3HW, label_BHW = collate(crops((20, 40)), settings(crop_px=48), seed=0, batch=0).to("cpu")
    outside_B3HW = (label_BHW == 255)[:, None].expand(-1, 3, -1, -1)
    assert (segmenter.normalised(image_B3HW)[outside_B3HW] == 0).all()


def test_values_are_the_255th_parts():
    image_B3HW, _ = collate(crops((48, 48)), settings(crop_px=48), seed=0, batch=0).to("cpu")
    expected_3hw = torch.from_numpy(crops((48, 48))[0][1]).permute(2, 0, 1).float() / 255
    assert torch.equal(image_B3HW[0], expected_3hw)


def test_a_random_place_belongs_to_the_item_not_to_the_batch():
    one, two = crops((20, 20), (30, 30))
    together, alone = (batch_of(given, pad="random", crop_px=96)[1] for given in ([one, two], [two]))
    assert np.array_equal(together[1], alone[0])


@pytest.mark.parametrize("side", [64, 65, 256])
def test_small_sizes_work_in_every_alignment(side):
    image_HW3 = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for align in ("only_pad", "only_scale", "scale_and_pad"):
        t = settings(crop_px=side, align=align, pad="random")
        crop = transform(image_HW3, image_HW3[..., 0] % 5, np.random.default_rng(0), t, short_side_px=90)
        assert collate([TrainingCrop(0, *crop)], t, seed=0, batch=0)[1].shape == (1, side, side)


# Refusals


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes_px": [[100, 200]]}, r"sizes_px: 100 x 200 px is smaller than the crop of 240 x 240 px.*only_pad.*"
         r"Lower crop_px.*scale_and_pad"),
        ({"size_mode": "multi", "sizes_px": [[300, 300], [256, 230]]}, r"256 x 230 px is smaller"),
        ({"crop_width_px": 480, "sizes_px": [[240, 240]]}, r"240 x 240 px is smaller than the crop of 240 x 480 px"),
        ({"size_mode": "multi"}, r"sizes_px=\[\] with size_mode=multi: expected two sizes or more"),
        ({"size_mode": "multi", "sizes_px": [[300, 300]]}, r"expected two sizes or more"),
        ({"sizes_px": [[300, 300], [400, 400]]}, r"size_mode=fixed: expected one size, or none"),
        ({"size_mode": "max", "sizes_px": [[300, 300]]}, r"size_mode=max: expected none"),
        ({"sizes_px": [[300]]}, r"sizes_px holds \[300\]; expected \[height, width\]"),
        ({"sizes_px": [[300, 8]]}, r"sizes_px holds \[300, 8\].*at least 16 px"),
        ({"size_mode": "diverse"}, r"size_mode=diverse with train\.batch_size=4.*batch_size=1, or size_mode=max"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together_are_refused_in_one_line(changed, said):
    with pytest.raises(UserError, match=rf"^train\.transforms\.[^\n]*{said}[^\n]*$"):
        check_sizes(settings(**changed), batch_size=4)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, {(240, 240)}),
        ({"sizes_px": [[240, 300]]}, {(240, 300)}),
        ({"sizes_px": [[225, 230]], "stride_px": 16}, {(240, 240)}),  # large enough once rounded up
        ({"sizes_px": [[64, 64]], "align": "scale_and_pad"}, {(64, 64)}),
        ({"size_mode": "multi", "sizes_px": [[64, 64], [512, 512]], "align": "only_scale"}, {(64, 64), (512, 512)}),
        ({"size_mode": "max"}, {(240, 240)}),
    ],
)
def test_sizes_that_go_together_are_taken(changed, found):
    t = settings(**changed)
    check_sizes(t, batch_size=4)
    given = crops((240, 240), (30, 240))
    assert {tuple(collate(given, t, seed=0, batch=batch)[0].shape[2:]) for batch in range(8)} == found


def test_a_batch_of_one_image_may_be_diverse():
    check_sizes(settings(size_mode="diverse"), batch_size=1)
    assert collate(crops((30, 240)), settings(size_mode="diverse"), seed=0, batch=0)[1].shape == (1, 30, 240)
