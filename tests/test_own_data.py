"""Data of one's own, from colour masks to a trained net: what a user types, each step on what the one before left."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from image_files import save
from training_runs import TINY_SEGFORMER

from segadapt.__main__ import main

COLOURS = {"road": (128, 64, 128), "sky": (70, 130, 180), "car": (0, 0, 142)}
SMALL = ["runtime=cpu", "data.short_side_px=32", "data.workers=0", "train.iters=2", "train.batch_size=2",
         "train.transforms.crop_px=32", "train.schedule.warmup_iters=0",
         "train.validation_images=null", TINY_SEGFORMER]  # fmt: skip


@pytest.fixture
def segadapt(tmp_path, monkeypatch):
    """segadapt(words): the command, in a folder with photos and masks of 8 scenes of 2 frames; its exit status."""
    rng = np.random.default_rng(0)
    for scene in range(8):
        for frame in range(2):
            names = rng.choice(list(COLOURS), (4, 4))
            mask_HW3 = (
                np.array([[COLOURS[name] for name in row] for row in names], np.uint8).repeat(10, 0).repeat(10, 1)
            )
            save(tmp_path / f"masks/s{scene}_{frame}.png", mask_HW3)
            save(tmp_path / f"photos/s{scene}_{frame}.png", mask_HW3 // 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def call(*words: str) -> object:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["segadapt", *words])
        try:
            main()
        except SystemExit as error:
            return error.code or 0
        return 0

    return call


def test_masks_become_ids_lists_and_a_net_that_says_what_it_was_trained_on(segadapt, capsys):
    """convert, split, check and train; the training split is thinned, the validation split is not."""
    own = ["data=folder", "data.data_root=.", "data.image_path='{data_root}/photos/{key}.*'",
           "data.label_path='{data_root}/labels/{key}.png'", "data.classes=labels/classes.txt"]  # fmt: skip
    lists = ["data.keys_file='lists/{split}.txt'", "data.split=training", "data.subset=4"]
    colours = "{road: [128, 64, 128], sky: [70, 130, 180], car: [0, 0, 142]}"
    steps = [
        ["convert", "convert.source=masks", "convert.output=labels", f"convert.colours={colours}", "convert.workers=0"],
        ["split", *own, "split.output=lists", "split.group='(s[0-9]+)_'", "split.shares=[0.75,0.25]", "data.workers=0"],
        ["check", *own, *lists, "check.splits=[validation]", "data.workers=0", "tta.method=source"],
        ["train", *own, *lists, *SMALL],
    ]
    for words in steps:
        assert segadapt(*words) == 0, capsys.readouterr().err
    training, validation = (Path(f"lists/{part}.txt").read_text().split() for part in ("training", "validation"))
    assert (len(training), len(validation)) == (12, 4)
    checked = json.loads(Path("outputs/check/check/check.json").read_text())
    assert [(row["task"], row["read"]) for row in checked["tasks"]] == [("training", 3), ("validation", 4)]
    (results,) = [json.loads(path.read_text()) for path in Path("outputs/train").rglob("results.json")]
    assert results["training"]["images"] == 3
    pairs = "\n".join(f"clean\t{key}" for key in (training[3], training[7], training[11]))
    assert results["training"]["keys_sha256"] == hashlib.sha256(pairs.encode()).hexdigest()


def test_the_layout_of_the_notes_with_spaced_grey_values(segadapt, capsys):
    """train/{image,label} and val/{image,label}, ids 0, 50, 100, background 255; an id outside of the list is named."""
    for split in ("train", "val"):
        for number in range(3):
            label_HW = np.full((40, 40), 255, np.uint8)
            label_HW[:30] = np.array([0, 50, 100], np.uint8).repeat(10)[:, None]
            save(Path(f"own/{split}/label/{number}.png"), label_HW)
            save(Path(f"own/{split}/image/{number}.png"), np.full((40, 40, 3), 60 * number, np.uint8))
    Path("names.txt").write_text("road\nsky\ncar\n")
    own = ["data=own_folder", "data.data_root=own", "data.classes=names.txt", "data.label_class_ids=[0,50,100]"]
    words = ["train", *own, *SMALL, "data.split=train", "train.validation_split=val"]
    assert segadapt(*words) == 0, capsys.readouterr().err
    checking = ["check", *own, "data.split=train", "check.splits=[val]", "data.workers=0", "tta.method=source"]
    assert segadapt(*checking) == 0, capsys.readouterr().err
    row, other = json.loads(Path("outputs/check/check/check.json").read_text())["tasks"]
    assert [line["pixels"] for line in row["classes"]] == [line["pixels"] for line in other["classes"]] == [1200] * 3
    assert row["ignored_pixels"] == 1200
    save(Path("own/val/label/1.png"), np.full((40, 40), 74, np.uint8))
    assert segadapt(*checking) == 2
    assert "val/label/1.png: label id 74 at row 0, column 0; expected 0, 50, 100 or 255" in capsys.readouterr().out
    assert segadapt(*checking, "data.unknown_ids=ignore") == 0, capsys.readouterr().err
