"""Shipped data files of published sets: one pair laid out as the set unpacks, its ids by the set's own table."""

from pathlib import Path

import numpy as np
import pytest
from image_files import save
from PIL import Image

from segadapt.config import AdaptConfig, EvaluateConfig
from segadapt.datasets import Sample, Task
from segadapt.datasets.build import build_dataset
from segadapt.parse import from_overrides

# id -> trainId of cityscapesscripts/helpers/labels.py
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
PHOTO = np.zeros((2, 17, 3), np.uint8)


def only_sample(root: Path, data: str) -> Sample:
    """The one pair of a shipped data file."""
    overrides = [f"data={data}", f"data.data_root={root}", "model.discriminative.checkpoint=none"]
    dataset = build_dataset(from_overrides("evaluate", overrides, EvaluateConfig).data)
    (key,) = dataset.keys(Task(0))
    return dataset.load(Task(0), key)


def test_cityscapes_is_the_same_by_label_ids_and_by_train_ids(tmp_path):
    ids_HW = np.arange(34, dtype=np.uint8).reshape(2, 17)
    expected_HW = np.vectorize(lambda number: TRAIN_IDS.get(number, 255))(ids_HW).astype(np.uint8)
    city = "val/ulm/ulm_000000_000019"
    save(tmp_path / f"leftImg8bit/{city}_leftImg8bit.png", PHOTO)
    save(tmp_path / f"gtFine/{city}_gtFine_labelIds.png", ids_HW)
    save(tmp_path / f"gtFine/{city}_gtFine_labelTrainIds.png", expected_HW)
    for data in ("cityscapes", "cityscapes_train_ids"):
        sample = only_sample(tmp_path, data)
        assert sample.key == "ulm/ulm_000000_000019"
        assert np.array_equal(sample.label_HW, expected_HW)  # pyright: ignore[reportArgumentType]


def test_coco_stuff_ids_become_171_classes_in_order(tmp_path):
    """Its PNGs hold 0..181 less 11 ids, and 255; in mmsegmentation's table 10: 10, 12: 11, 181: 170."""
    save(tmp_path / "images/val2017/000000000139.jpg", PHOTO[:1, :5])
    save(tmp_path / "annotations/val2017/000000000139.png", np.array([[0, 10, 12, 181, 255]], np.uint8))
    assert only_sample(tmp_path, "coco_stuff").label_HW.tolist() == [[0, 10, 11, 170, 255]]  # pyright: ignore


def test_pascal_voc_takes_the_images_of_its_list(tmp_path):
    """Most of its images have no label; border is 255, and the palette is for the eye."""
    for key in ("2007_000032", "2007_000033"):
        save(tmp_path / f"JPEGImages/{key}.jpg", PHOTO[:1, :3])
    label = Image.fromarray(np.array([[0, 20, 255]], np.uint8))
    label.putpalette(bytes(range(256)) * 3)
    save(tmp_path / "SegmentationClass/2007_000033.png", label)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000033\n")
    sample = only_sample(tmp_path, "pascal_voc")
    assert sample.key == "2007_000033"
    assert sample.label_HW.tolist() == [[0, 20, 255]]  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("data", ["cityscapes_train_ids", "coco_stuff", "pascal_voc"])
def test_names_of_a_set_make_prompts_that_differ(data):
    settings = from_overrides("adapt", [f"data={data}", "data.data_root=none", "data.short_side_px=512"], AdaptConfig)
    names = build_dataset(settings.data).classes
    prompts = {settings.model.generative.prompts.template.format(name) for name in names}
    assert len(prompts) == len(names)
