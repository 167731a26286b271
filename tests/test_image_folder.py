"""Image folders: classes, keys, and every folder or file that is not as it should be."""

from pathlib import Path

import numpy as np
import pytest
from pretraining_runs import THREE, three_classes

from segadapt.datasets.image_folder import ImageFolder, list_images
from segadapt.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    return three_classes(tmp_path)


def listed(root: Path, split: str = "train", **more) -> ImageFolder:
    return list_images(str(root), split, "data.split", **more)


def test_classes_are_the_folders_and_keys_their_files_in_order(root):
    (root / "train" / ".DS_Store").touch()
    (root / "train" / "sky" / ".hidden").touch()
    found = listed(root)
    assert found.classes == THREE
    assert found.keys[:5] == (*(f"leaves/0000{index}.png" for index in range(4)), "sky/00000.png")
    assert np.bincount([found.label_of(key) for key in found.keys]).tolist() == [4, 4, 4]
    found.verify(workers=0, max_pixels=2**20)


def test_a_split_may_lack_a_class_but_keeps_the_ids(root):
    for file in (root / "val" / "leaves").iterdir():
        file.unlink()
    (root / "val" / "leaves").rmdir()
    found = listed(root, "val", classes=THREE)
    assert sorted({found.label_of(key) for key in found.keys}) == [1, 2]


def test_hashes_tell_other_images_from_the_same(root):
    keys, manifest = listed(root).keys_hash(), listed(root).manifest_hash()
    file = root / "train" / listed(root).keys[0]
    file.write_bytes(file.read_bytes() + b"more")
    assert listed(root).manifest_hash() != manifest
    assert listed(root).keys_hash() == keys
    file.rename(file.with_name("other.png"))
    assert listed(root).keys_hash() != keys


def one_class(root: Path) -> None:
    for name in THREE[1:]:
        (root / "train" / name).rename(root / name)


def no_class(root: Path) -> None:
    (root / "train").rename(root / "other")
    (root / "train").mkdir()


FAULTS = {
    r"data.split=train: \S+train is not a folder; [^\n]* Did you mean training\?": lambda root: (root / "train").rename(
        root / "training"
    ),
    r"data.split=train: \S+train holds the folders of 1 classes \(leaves\); expected 2 or more,": one_class,
    r"data.split=train: \S+train holds the folders of 0 classes": no_class,
    r"\S+train/00000.png lies in the folder of no class, so it has no label; expected \S+train/CLASS/00000.png\.": (
        lambda root: (root / "train/leaves/00000.png").rename(root / "train/00000.png")
    ),
    r"\S+sky/notes.txt is no image file; expected only \.jpg, ": lambda root: (root / "train/sky/notes.txt").touch(),
    r"\S+train/empty holds no image; expected at least one": lambda root: (root / "train/empty").mkdir(),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_folder_that_is_not_of_classes_is_refused_in_one_line(root, said):
    FAULTS[said](root)
    with pytest.raises(UserError, match=f"^{said}"):
        listed(root)


def test_a_class_of_validation_alone_is_refused(root):
    (root / "val" / "sky").rename(root / "val" / "skys")
    said = r"^\S+/skys is of a class that the training images do not have\. Did you mean sky\? Rename or "
    with pytest.raises(UserError, match=said):
        listed(root, "val", classes=THREE)


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_a_damaged_image_is_named(root, damage):
    file = root / "train" / "sky" / "00002.png"
    file.write_bytes(file.read_bytes()[:300] if damage is None else damage)
    with pytest.raises(UserError, match=rf"^{file}: cannot be decoded"):
        listed(root).verify(workers=0, max_pixels=2**20)
