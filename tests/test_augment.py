"""Windows of a teacher's training: geometry shared by image and label, classes in turn, light that stays in range."""

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from segadapt import config_training
from segadapt.datasets import Sample, Task
from segadapt.datasets.toytown import ToyTown
from segadapt.parse import from_overrides
from segadapt.training.augment import Crops, crop, keep_light, light_of
from segadapt.training.order import places_of_classes

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(33, 90)  # px
WIDE = from_overrides("train_generative", ["runtime=cpu"], config_training.TrainGenerativeConfig).train.broad
WIDELY = light_of(WIDE)


def picture(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("light", [keep_light, WIDELY], ids=["keep", "broad"])
@given(seed=SEEDS, height=SIDES, width=SIDES)
def test_light_is_pure_and_keeps_shape_and_type(light, seed, height, width):
    image_HW3 = picture(height, width, seed=seed)
    before = image_HW3.copy()
    lit = light(image_HW3, np.random.default_rng(seed))
    assert np.array_equal(image_HW3, before)
    assert (lit.shape, lit.dtype) == (before.shape, np.uint8)
    assert np.array_equal(lit, light(image_HW3, np.random.default_rng(seed)))


@pytest.mark.parametrize("value", [0, 255])
@given(seed=SEEDS)
def test_light_stays_in_range_at_black_and_white(value, seed):
    """An overflow of uint8 would turn the whole image over: white to black."""
    lit = WIDELY(np.full((40, 40, 3), value, np.uint8), np.random.default_rng(seed))
    assert abs(np.median(lit).item() - value) < 250


def test_without_broad_the_light_is_kept():
    assert light_of(dataclasses.replace(WIDE, probability=0)) is keep_light


def test_crops_never_load_the_test_corruptions():
    code = "import sys, segadapt.training.augment; sys.exit(any('segadapt.corruption' in name for name in sys.modules))"
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


def crops(*, seed: int = 0, count: int = 7, first: int = 0) -> Crops:
    return Crops(
        ToyTown(split="training", count=3), count=count, seed=seed, short_side_px=64, crop_px=48, scale=(0.5, 1.5),
        light=WIDELY, first=first,
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


@pytest.mark.parametrize("first", [0, 1, 5, 7])
def test_items_passed_over_leave_those_after_them_as_they_are(first):
    whole, rest = list(DataLoader(crops(), 1)), list(DataLoader(crops(first=first), 1))
    assert len(crops(first=first)) == len(rest) == 7 - first
    for one, other in zip(whole[first:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Signs(ToyTown):
    """Four images of class 0; class 1 covers half of two of them, class 2 one pixel of one, class 3 none; some 255."""

    def __init__(self) -> None:
        super().__init__(split="training", count=4)

    def load(self, task: Task, key: str) -> Sample:
        label_HW = np.zeros((60, 80), np.uint8)
        label_HW[:2] = 255
        place = self.keys(task).index(key)
        if place >= 2:
            label_HW[30:] = 1
        if place == 3:
            label_HW[13, 17] = 2
        return Sample(key, np.repeat(label_HW[..., None], 3, axis=2), label_HW)


@pytest.mark.parametrize("workers", [0, 2])
def test_places_are_the_images_that_show_a_class(workers):
    places = places_of_classes(Signs(), workers=workers)
    assert {index: found.tolist() for index, found in places.items()} == {0: [0, 1, 2, 3], 1: [2, 3], 2: [3]}


def balanced(**changed) -> Crops:
    places = places_of_classes(Signs(), workers=0)
    given = {"count": 600, "seed": 0, "short_side_px": 60, "crop_px": 16, "scale": (1.0, 1.5), "light": keep_light}
    return Crops(Signs(), places=places, **given | changed)


def labels_of(stream: Crops) -> list[torch.Tensor]:
    return [stream[index][1] for index in range(len(stream))]


def test_every_class_is_drawn_and_shown_as_often():
    """600 draws of 3 classes: 200 each, standard deviation 11.5. Without balance class 2 would be in some 20."""
    shown = Counter(int(index) for label_ss in labels_of(balanced()) for index in label_ss.unique())
    assert shown[2] == pytest.approx(200, abs=45)  # nothing but its own draw shows it, and then always
    assert shown[1] >= 155
    alone = Crops(
        Signs(), count=600, seed=0, short_side_px=60, crop_px=16, scale=(1.0, 1.5), light=keep_light, places=None
    )
    assert sum(bool((label_ss == 2).any()) for label_ss in labels_of(alone)) < 60


def test_balanced_crops_depend_on_seed_and_place_alone():
    stream = balanced()
    for index in (7, 3, 599):
        one, other = balanced(first=index)[0], stream[index]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(seed=SEEDS, height=SIDES, width=SIDES, crop_px=st.sampled_from((16, 64, 100)), scale=st.floats(0.3, 2))
def test_a_crop_shows_the_class_asked_for_unless_it_vanished(seed, height, width, crop_px, scale):
    """One pixel of class 3 in a corner, where a crop of any place seldom is; small scales drop it."""
    label_HW = np.zeros((height, width), np.uint8)
    label_HW[-1, -1] = 3
    given = {"short_side_px": 48, "crop_px": crop_px, "scale": (scale, scale)}
    arguments = (picture(height, width), label_HW)
    _, label_ss = crop(*arguments, np.random.default_rng(seed), shows=3, **given)
    factor = 48 * scale / min(height, width)
    if factor >= 1:
        assert (label_ss == 3).any()
    assert label_ss.shape == (crop_px, crop_px)
    _, absent_ss = crop(*arguments, np.random.default_rng(seed), shows=9, **given)
    _, any_ss = crop(*arguments, np.random.default_rng(seed), **given)
    assert np.array_equal(absent_ss, any_ss)


def test_balanced_crops_of_a_class_that_vanishes_are_those_of_any_place():
    """At a quarter of the size class 2's pixel is gone; its image is drawn all the same."""
    labels = labels_of(balanced(scale=(0.25, 0.25), count=60, crop_px=15))
    assert all(label_ss.shape == (15, 15) for label_ss in labels)
    assert not any((label_ss == 2).any() for label_ss in labels)
