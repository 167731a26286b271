"""Training crops: geometry shared by image and label, light that stays in range, no test corruption among it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from segadapt.augment import Crops, broad, crop, keep_light, photometric
from segadapt.datasets import Sample, Task
from segadapt.datasets.toytown import ToyTown

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(33, 90)  # px


def picture(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("light", [keep_light, photometric, broad])
@given(seed=SEEDS, height=SIDES, width=SIDES)
def test_light_is_pure_and_keeps_shape_and_type(light, seed, height, width):
    image_HW3 = picture(height, width, seed=seed)
    before = image_HW3.copy()
    lit = light(image_HW3, np.random.default_rng(seed))
    assert np.array_equal(image_HW3, before)
    assert (lit.shape, lit.dtype) == (before.shape, np.uint8)
    assert np.array_equal(lit, light(image_HW3, np.random.default_rng(seed)))


@pytest.mark.parametrize("light", [photometric, broad])
@pytest.mark.parametrize("value", [0, 255])
@given(seed=SEEDS)
def test_light_stays_in_range_at_black_and_white(light, value, seed):
    """An overflow of uint8 would turn the whole image over: white to black."""
    lit = light(np.full((40, 40, 3), value, np.uint8), np.random.default_rng(seed))
    assert abs(np.median(lit).item() - value) < 250


def test_broad_light_varies_more_than_the_photometric_one():
    image_HW3 = ToyTown(split="training", count=1).load(Task(0), "00000").image_HW3
    spread = [
        np.mean([np.abs(light(image_HW3, np.random.default_rng(seed)) - image_HW3.astype(float)) for seed in range(20)])
        for light in (photometric, broad)
    ]
    assert spread[1] > spread[0] > 1


def test_crops_never_load_the_test_corruptions():
    code = "import sys, segadapt.augment; sys.exit(any('segadapt.corruption' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(seed=SEEDS, height=SIDES, width=SIDES, crop_px=st.sampled_from((16, 32, 64)), scale=st.floats(0.3, 2))
def test_a_crop_moves_image_and_label_together(seed, height, width, crop_px, scale):
    """The label is coded in the image, so that after resize, crop, pad and flip they still agree."""
    label_HW = np.zeros((height, width), np.uint8)
    label_HW[height // 2 :, width // 3 :] = 1
    image_HW3 = np.repeat(label_HW[..., None] * 200, 3, axis=2)
    image_ss3, label_ss = crop(
        image_HW3, label_HW, np.random.default_rng(seed), short_side_px=48, crop_px=crop_px, scale=(scale, scale)
    )
    assert image_ss3.shape == (crop_px, crop_px, 3)
    assert label_ss.shape == (crop_px, crop_px)
    assert set(np.unique(label_ss)) <= {0, 1, 255}
    assert (image_ss3[label_ss == 255] == 124).all()
    away = np.abs(image_ss3[..., 0].astype(int) - 200 * label_ss.astype(int))[label_ss != 255]
    # bilinear pixels at the edge of two classes lie between: a line of them across, and no more
    assert (away > 100).mean() < 0.15 if away.size else True


def test_what_lies_outside_the_image_is_ignored():
    image_ss3, label_ss = crop(
        picture(20, 40), np.zeros((20, 40), np.uint8), np.random.default_rng(0), short_side_px=20, crop_px=32,
        scale=(1.0, 1.0),
    )  # fmt: skip
    assert (label_ss[20:] == 255).all()
    assert (label_ss[:20] == 0).all()
    assert (image_ss3[20:] == 124).all()


def crops(*, seed: int = 0, count: int = 7) -> Crops:
    return Crops(
        ToyTown(split="training", count=3), count=count, seed=seed, short_side_px=64, crop_px=48, scale=(0.5, 1.5),
        light=broad,
    )  # fmt: skip


def test_a_crop_depends_on_seed_and_place_alone():
    forwards = [crops()[index] for index in range(7)]
    stream = crops()
    for index in reversed(range(7)):
        for one, other in zip(stream[index], forwards[index], strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(crops(seed=1)[0][0], forwards[0][0])
    assert len({image_3ss.numpy().tobytes() for image_3ss, _ in forwards}) == 7


def test_the_number_of_workers_changes_no_batch():
    batches = [list(DataLoader(crops(), 2, num_workers=workers)) for workers in (0, 2)]
    for (image_B3ss, label_Bss), (other_B3ss, other_Bss) in zip(*batches, strict=True):
        assert torch.equal(image_B3ss, other_B3ss)
        assert torch.equal(label_Bss, other_Bss)


def test_every_image_comes_once_an_epoch_in_an_order_that_changes():
    drawn: list[str] = []

    class Noted(ToyTown):
        def load(self, task: Task, key: str) -> Sample:
            drawn.append(key)
            return super().load(task, key)

    stream = Crops(
        Noted(split="training", count=5), count=20, seed=0, short_side_px=32, crop_px=32, scale=(1.0, 1.0),
        light=keep_light,
    )  # fmt: skip
    for index in range(20):
        stream[index]
    epochs = [drawn[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
