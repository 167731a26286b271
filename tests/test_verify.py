"""The look at all files before a run: it finds what `load` would trip over, and opens each file once."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import IDS_HW, PIXELS_HW3, save
from image_files import files as files_on_disk
from PIL import Image, PngImagePlugin

from segadapt.corruptions import CORRUPTIONS
from segadapt.datasets import Task, decode
from segadapt.datasets import files as files_module
from segadapt.datasets.decode import image_size, read_image
from segadapt.datasets.toytown import ToyTown
from segadapt.errors import UserError
from segadapt.stream import Entry, order, read, verify

TASKS = [Task(index, name, 5) for index, name in enumerate(list(CORRUPTIONS)[:15])]
KEYS = ("a", "b", "c")
FROM_DISK = "{data_root}/images-c/{corruption}/{severity}/{key}.*"
files = partial(files_on_disk, image_path="{data_root}/images/{key}.*", label_path="{data_root}/labels/{key}.png")
LIMIT = 2**20  # px


def entries_of(dataset, tasks=TASKS) -> list[Entry]:
    return [entry for task in tasks for entry in order(dataset, task, seed=0, shuffle=True, limit=None)]


@pytest.fixture
def root(tmp_path) -> Path:
    """Three good pairs: clean, and as the last of 15 tasks on disk, its images JPEG."""
    for key in KEYS:
        save(tmp_path / f"images/{key}.png", PIXELS_HW3)
        save(tmp_path / f"labels/{key}.png", IDS_HW)
        for task in TASKS:
            suffix = "jpg" if task == TASKS[-1] else "png"
            save(tmp_path / f"images-c/{task.name}/{key}.{suffix}", PIXELS_HW3)
    return tmp_path


def cut(path: Path) -> Path:
    """Leave the first 90 percent."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    return path


# One line before the first step


FAULTS = {
    "a cut jpg": (lambda root: cut(root / f"images-c/{TASKS[-1].name}/b.jpg"), r"b\.jpg: cannot be decoded"),
    "a cut png": (lambda root: cut(root / f"images-c/{TASKS[-2].name}/b.png"), r"b\.png: cannot be decoded"),
    "an empty file": (
        lambda root: (root / f"images-c/{TASKS[-1].name}/b.jpg").write_bytes(b""),
        r"b\.jpg: cannot be decoded: the file is empty",
    ),
    "another size": (
        lambda root: save(root / f"images-c/{TASKS[-1].name}/b.jpg", PIXELS_HW3[:, 1:]),
        r"labels/b\.png: label of 48 x 40 px, but its image .*b\.jpg has 47 x 40 px",
    ),
    "an unknown id": (
        lambda root: save(root / "labels/b.png", np.full((40, 48), 9, np.uint8)),
        r"labels/b\.png: label id 9 at row 0, column 0",
    ),
    "a cut label": (lambda root: cut(root / "labels/b.png"), r"labels/b\.png: cannot be decoded"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_one_of_15_tasks_on_disk_is_raised_in_one_line(root, fault, workers):
    dataset, (break_it, message) = files(root, image_path=FROM_DISK), FAULTS[fault]
    entries = entries_of(dataset)
    verify(dataset, entries, workers=workers)
    break_it(root)
    with pytest.raises(UserError, match=message) as caught:
        verify(dataset, entries, workers=workers)
    assert type(caught.value) is UserError
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as later:
        list(read(dataset, entries, short_side_px=20, workers=0))
    assert str(later.value) == str(caught.value)


def test_first_fault_in_stream_order_is_the_one_raised(root):
    dataset = files(root)
    entries = entries_of(dataset, TASKS[:1])
    for entry in entries[1:]:
        cut(root / f"images/{entry.key}.png")
    with pytest.raises(UserError, match=rf"images/{entries[1].key}\.png"):
        verify(dataset, entries, workers=2)


def test_entries_left_out_of_the_stream_are_not_looked_at(root):
    dataset = files(root)
    entries = entries_of(dataset, TASKS[:1])
    cut(root / f"images/{entries[-1].key}.png")
    verify(dataset, entries[:-1], workers=0)


def test_file_removed_after_the_listing_is_named(root):
    dataset = files(root)
    entries = entries_of(dataset, TASKS[:1])
    (root / "images/b.png").unlink()
    with pytest.raises(UserError, match=r"images/b\.png: cannot be decoded: .*No such file"):
        verify(dataset, entries, workers=0)


def test_image_too_small_to_be_corrupted_is_refused_only_where_it_would_be(root):
    for folder, pixels in (("images", PIXELS_HW3), ("labels", IDS_HW)):
        save(root / folder / "b.png", pixels[:20])
    dataset = files(root)
    verify(dataset, entries_of(dataset, [Task(0)]), workers=0)
    with pytest.raises(UserError, match="image b: got 48 x 20 px; corruptions need 32 px"):
        verify(dataset, entries_of(dataset), workers=0)


# Each file once


@pytest.fixture
def opened(monkeypatch) -> dict[str, list[Path]]:
    """Paths in the order they were asked for, by reading function."""
    calls = {name: [] for name in ("image_size", "read_ids", "ids_size", "read_image")}
    for name, paths in calls.items():
        function = getattr(decode, name)

        def counted(path, *, max_pixels, function=function, paths=paths):
            paths.append(path)
            return function(path, max_pixels=max_pixels)

        monkeypatch.setattr(files_module, name, counted)
    return calls


def test_tasks_made_on_the_fly_open_their_shared_files_once(root, opened):
    dataset = files(root)
    entries = entries_of(dataset)
    assert len(entries) == 45
    verify(dataset, entries, workers=0)
    assert sorted(opened["image_size"]) == [root / f"images/{key}.png" for key in KEYS]
    assert sorted(opened["read_ids"]) == [root / f"labels/{key}.png" for key in KEYS]
    assert opened["ids_size"] == opened["read_image"] == []


def test_tasks_on_disk_open_every_image_and_decode_each_label_once(root, opened):
    dataset = files(root, image_path=FROM_DISK)
    verify(dataset, entries_of(dataset), workers=0)
    assert len(opened["image_size"]) == len(set(opened["image_size"])) == 45
    assert sorted(opened["read_ids"]) == [root / f"labels/{key}.png" for key in KEYS]
    assert opened["read_image"] == []


def test_unlabelled_images_are_verified_without_labels(root, opened):
    dataset = files(root, label_path=None)
    verify(dataset, entries_of(dataset), workers=0)
    assert len(opened["image_size"]) == 3
    assert opened["read_ids"] == []


def test_toytown_passes_without_being_drawn(monkeypatch):
    monkeypatch.delattr("segadapt.datasets.toytown.render")
    dataset = ToyTown(split="test", count=3)
    verify(dataset, entries_of(dataset), workers=0)


# The size without the pixels


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_is_that_of_the_decoded_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", PIXELS_HW3, **({} if suffix == "bmp" else {"exif": exif}))
    assert image_size(path, max_pixels=LIMIT) == read_image(path, max_pixels=LIMIT).shape[:2]


def test_png_with_its_orientation_behind_the_pixels_is_turned(tmp_path):
    content = save(tmp_path / "a.png", PIXELS_HW3).read_bytes()
    exif, chunk = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    PngImagePlugin.putchunk(chunk, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk.getvalue() + content[-12:])
    assert image_size(tmp_path / "a.png", max_pixels=LIMIT) == (48, 40)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_whole_file_is_not_decoded_even_with_a_tail(tmp_path, suffix, monkeypatch):
    path = save(tmp_path / f"a.{suffix}", PIXELS_HW3)
    path.write_bytes(path.read_bytes() + b"\0" * 1000)
    monkeypatch.delattr(decode, "read_image")
    assert image_size(path, max_pixels=LIMIT) == (40, 48)


def test_whole_jpeg_with_a_long_tail_is_decoded_and_accepted(tmp_path):
    path = save(tmp_path / "a.jpg", PIXELS_HW3)
    path.write_bytes(path.read_bytes() + b"\0" * 2**17)
    assert image_size(path, max_pixels=LIMIT) == (40, 48)


def test_end_of_a_thumbnail_is_not_taken_for_the_end_of_a_cut_jpeg(tmp_path):
    thumbnail = io.BytesIO()
    Image.fromarray(PIXELS_HW3[:8, :8]).save(thumbnail, "jpeg")
    assert thumbnail.getvalue().endswith(b"\xff\xd9")
    path = cut(save(tmp_path / "a.jpg", PIXELS_HW3, exif=b"Exif\0\0" + thumbnail.getvalue()))
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded"):
        image_size(path, max_pixels=LIMIT)


def test_pixel_limit_and_pixel_format_are_checked_by_the_header(tmp_path):
    path = save(tmp_path / "a.png", PIXELS_HW3)
    with pytest.raises(UserError, match=r"48 x 40 px; expected at most data\.max_pixels=1919"):
        image_size(path, max_pixels=40 * 48 - 1)
    floats = save(tmp_path / "b.tif", np.zeros((40, 48), np.float32))
    with pytest.raises(UserError, match="pixel format F; expected 8-bit gray"):
        image_size(floats, max_pixels=LIMIT)


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's own line, before its error
@given(st.sampled_from(["png", "jpg", "webp"]), st.floats(0, 1))
def test_cut_file_has_a_size_exactly_if_it_can_be_read(tmp_path_factory, suffix, share):
    path = save(tmp_path_factory.mktemp("cut") / f"a.{suffix}", PIXELS_HW3)
    path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])
    outcomes = []
    for shape in (lambda: image_size(path, max_pixels=LIMIT), lambda: read_image(path, max_pixels=LIMIT).shape[:2]):
        try:
            outcomes.append(shape())
        except UserError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
