"""The segmenter's training data: items that depend on (seed, place) alone, batches, broken files, a look at them."""

import dataclasses
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick_settings import quick_settings
from training_runs import training

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.datasets import Dataset, Sample, Task
from segadapt.datasets.toytown import ToyTown
from segadapt.errors import UserError
from segadapt.stream import batches
from segadapt.training.preparation import labelled_split
from segadapt.training.samples import TrainingSamples, build_samples

SMALL = ("data.short_side_px=64", "train.transforms.crop_px=48", "train.batch_size=2", "data.workers=0")
MIXED = (*SMALL, "train/transforms/broad=wide", "train.transforms.photometric=true",
         "train.transforms.cat_max_ratio=0.8", "train.transforms.scale_low=0.5", "train.transforms.aspect_low=0.9",
         "train.transforms.pad=random",
         "train.transforms.size_mode=multi", "train.transforms.sizes_px=[[48,48],[64,80],[80,64]]")  # fmt: skip


def settings_of(*overrides: str) -> TrainConfig:
    return quick_settings("train", overrides, TrainConfig)


def samples_of(*overrides: str, dataset: Dataset | None = None, count: int = 7) -> TrainingSamples:
    return build_samples(
        settings_of(*(overrides or MIXED)),
        dataset or ToyTown(split="training", count=3),
        count=count,
    )


def read_all(samples: TrainingSamples, size: int, *, workers: int = 0, first: int = 0) -> list:
    stretches = [range(item, min(item + size, len(samples))) for item in range(first, len(samples), size)]
    return [batch.to("cpu") for batch in batches(samples, stretches, workers=workers)]


def assert_equal_batches(one, other) -> None:
    one, other = list(one), list(other)
    assert len(one) == len(other) > 0
    for (image_B3HW, label_BHW), (other_B3HW, other_BHW) in zip(one, other, strict=True):
        assert torch.equal(image_B3HW, other_B3HW)
        assert torch.equal(label_BHW, other_BHW)


def test_an_item_depends_on_seed_and_place_alone():
    forwards = [samples_of()[index] for index in range(7)]
    stream = samples_of()
    for index in reversed(range(7)):
        assert np.array_equal(stream[index].image_hw3, forwards[index].image_hw3)
        assert np.array_equal(stream[index].label_hw, forwards[index].label_hw)
    other = samples_of(*MIXED, "experiment.seed=1")[0]
    assert not np.array_equal(other.image_hw3, forwards[0].image_hw3)
    assert len({crop.image_hw3.tobytes() for crop in forwards}) == 7


def test_the_number_of_workers_changes_no_batch():
    read = [read_all(samples_of(), 2, workers=workers) for workers in (0, 2)]
    assert_equal_batches(*read)
    assert len({image_B3HW.shape for image_B3HW, _ in read[0]}) > 1  # size_mode=multi


@pytest.mark.parametrize("first", [2, 6])
def test_items_passed_over_leave_those_after_them_as_they_are(first):
    """Also the sizes that whole batches draw."""
    whole, rest = (read_all(samples_of(), 2, first=passed) for passed in (0, first))
    assert_equal_batches(whole[first // 2 :], rest)


def test_parts_of_one_step_have_the_size_of_the_whole():
    """What several processes, or the parts of an accumulated gradient, read of one optimizer step."""
    whole = [image_B3HW for image_B3HW, _ in read_all(samples_of(), 2)]
    parts = [image_B3HW for image_B3HW, _ in read_all(samples_of(), 1)]
    assert torch.equal(torch.cat(parts[:2]), whole[0])
    assert torch.equal(torch.cat(parts[2:4]), whole[1])


def test_every_image_comes_once_an_epoch_in_an_order_that_changes():
    drawn: list[str] = []

    class Noted(ToyTown):
        def load(self, task: Task, key: str) -> Sample:
            drawn.append(key)
            return super().load(task, key)

    samples = samples_of(*SMALL, dataset=Noted(split="training", count=5), count=20)
    for index in range(20):
        samples[index]
    epochs = [drawn[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


class Signs(ToyTown):
    """Four images of class 0; class 1 covers half of two of them, class 2 one pixel of one."""

    def __init__(self) -> None:
        super().__init__(split="training", count=4)

    def load(self, task: Task, key: str) -> Sample:
        label_HW = np.zeros((60, 80), np.uint8)
        place = self.keys(task).index(key)
        if place >= 2:
            label_HW[30:] = 1
        if place == 3:
            label_HW[13, 17] = 2
        return Sample(key, np.repeat(label_HW[..., None], 3, axis=2), label_HW)


@pytest.mark.parametrize("ratio", [1.0, 0.75])
def test_balanced_samples_show_every_class_as_often(ratio):
    """300 draws of 3 classes: 100 each, standard deviation 8. Of any place class 2 would be in some 10."""
    overrides = (*SMALL, "data.short_side_px=60", "train.transforms.crop_px=16", "train.transforms.scale_low=1",
                 f"train.transforms.cat_max_ratio={ratio}")  # fmt: skip
    shown = {}
    for balanced in ("true", "false"):
        samples = samples_of(*overrides, f"train.transforms.balanced={balanced}", dataset=Signs(), count=300)
        labels = [samples[index].label_hw for index in range(300)]
        shown[balanced] = Counter(int(index) for label_hw in labels for index in np.unique(label_hw))
    assert shown["true"][2] == pytest.approx(100, abs=32)  # nothing but its own draw shows it, and then always
    assert shown["true"][1] >= 70
    assert shown["false"][2] < 30


# Files


@pytest.fixture
def photos(tmp_path) -> tuple[str, ...]:
    """Overrides for a folder of three images with labels."""
    for key in ("a", "b", "c"):
        for part, pixels in (("images", np.zeros((40, 50, 3), np.uint8)), ("labels", np.ones((40, 50), np.uint8))):
            (tmp_path / part / "training").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / "training" / f"{key}.png")
    return (
        "data=folder", "data.classes=toytown", f"data.data_root={tmp_path}", "data.count=null", "data.id_map=as_is",
        "data.split=training", "data.image_path='{data_root}/images/{split}/{key}.png'",
        "data.label_path='{data_root}/labels/{split}/{key}.png'", *SMALL,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line_whoever_reads_it(photos, tmp_path, workers):
    broken = tmp_path / "images/training/b.png"
    broken.write_bytes(broken.read_bytes()[:60])
    settings = settings_of(*photos)
    samples = build_samples(settings, labelled_split(settings, "training"), count=6)
    with pytest.raises(UserError, match=rf"^{re.escape(str(broken))}: cannot be decoded[^\n]*$"):
        read_all(samples, 2, workers=workers)


def test_an_unknown_label_is_named_and_not_trained_on(photos, tmp_path):
    wrong = tmp_path / "labels/training/c.png"
    Image.fromarray(np.full((40, 50), 100, np.uint8)).save(wrong)
    settings = settings_of(*photos)
    samples = build_samples(settings, labelled_split(settings, "training"), count=3)
    with pytest.raises(UserError, match=rf"^{re.escape(str(wrong))}.*100[^\n]*$"):
        read_all(samples, 1)


# A look at them


def test_a_preview_draws_what_the_net_gets_beside_its_label(tmp_path):
    overrides = ("train.preview=3", "train.transforms.sizes_px=[[64,80]]", "train.transforms.pad=left_up")
    settings = training(tmp_path, "train.iters=2", *overrides)
    done = train.run(settings)
    folder = Path(done["folder"], "preview")
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    samples = build_samples(settings, labelled_split(settings, "training"), count=4)
    read = [crop for batch in read_all(samples, 2) for crop in zip(*batch, strict=True)]
    colours = ToyTown(split="training", count=4).palette_C3
    for path, (image_3HW, label_HW) in zip(sorted(folder.iterdir()), islice(read, 3), strict=True):
        drawn = np.asarray(Image.open(path)).astype(float)
        image_HW3 = 255 * image_3HW.permute(1, 2, 0).numpy()
        assert drawn.shape[0] > 64  # a legend below
        assert np.abs(drawn[:64, :80] - image_HW3).max() <= 0.501
        label = label_HW.numpy()
        half_HW3 = (image_HW3 + colours[np.where(label == 255, 0, label)]) / 2
        expected = np.where((label == 255)[..., None], image_HW3, half_HW3)
        assert np.abs(drawn[:64, 80:] - expected).max() <= 1.001


def test_a_preview_of_more_than_is_trained_on_is_all_of_it(tmp_path):
    done = train.run(training(tmp_path, "train.iters=2", "train.preview=20"))
    assert len(list(Path(done["folder"], "preview").iterdir())) == 4


def test_a_preview_is_no_other_run_and_none_is_drawn_by_default(tmp_path):
    plain = train.run(training(tmp_path, "train.iters=1", "experiment.id=one"))
    assert not Path(plain["folder"], "preview").exists()
    anew = ("train.iters=1", "experiment.id=one", "experiment.restart=true")
    looked = train.run(training(tmp_path, *anew, "train.preview=1"))
    assert Path(looked["folder"], "preview/00000.png").is_file()
    again = train.run(training(tmp_path, *anew))
    assert not Path(again["folder"], "preview").exists()


@pytest.mark.parametrize("preset", ["default", "mmseg", "openseg"])
def test_a_segmenter_trains_with_each_preset(tmp_path, preset):
    small = ("train.transforms.crop_px=32", "train.transforms.crop_width_px=48", "train.transforms.box_short_px=48")
    done = train.run(training(tmp_path, f"train/transforms={preset}", "train.iters=2", *small))
    assert np.isfinite(done["validation"]["miou"])


def test_the_experiment_on_camvid_means_what_it_meant():
    """Its published scores belong to these values."""
    t = settings_of("experiment=camvid_segmenter", "data.data_root=x").train.transforms
    broad = t.broad.probability
    assert (t.resize, t.crop_px, t.crop_width_px, t.scale_low, t.scale_high, broad) == (
        "short_side", 352, None, 0.75, 1.75, 0
    )  # fmt: skip
    assert (t.cat_max_ratio, t.flip, t.photometric, t.balanced, t.sizes_px, t.align) == (
        1, 0.5, True, False, [], "only_pad"
    )  # fmt: skip
    assert dataclasses.asdict(t) | {"crop_px": 240, "scale_high": 1.5, "photometric": False} == dataclasses.asdict(
        settings_of().train.transforms
    )
