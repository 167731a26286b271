"""A corrupted set on disk: equal to images made on the fly, restartable, the same for any number of workers."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segadapt import config_data
from segadapt.corrupt import run, write_set
from segadapt.corruptions import corrupt
from segadapt.datasets import Sample, Source, Task
from segadapt.errors import UserError
from segadapt.parse import from_overrides

TASKS = [Task(0, "shot_noise", 2), Task(1, "glass_blur", 5), Task(2, "contrast", 3)]


class Drawn:
    """Clean set of drawn images, one for each name."""

    def __init__(self, names: tuple[str, ...] = ("city/a", "city/b", "c", "d"), *, side_px: int = 40) -> None:
        self.names = names
        self.side_px = side_px
        self.classes: tuple[str, ...] = ("all",)
        self.palette_C3 = np.zeros((1, 3), np.uint8)

    def keys(self, task: Task) -> list[str]:
        """All names, for the clean task only."""
        assert task.corruption is None
        return sorted(self.names)

    def load(self, task: Task, key: str) -> Sample:
        """Noise of its own for every key."""
        assert task.corruption is None
        rng = np.random.default_rng(sum(key.encode()))
        return Sample(key, rng.integers(0, 256, (self.side_px, self.side_px + 8, 3), np.uint8), None)

    def source(self, task: Task, key: str) -> Source:
        """The key: nothing is on disk."""
        return Source(key, None)

    def verify(self, task: Task, key: str, *, label: bool) -> None:
        """Nothing can be broken."""


def _write(dataset: Drawn, output: Path, **changed) -> Path:
    return write_set(dataset, TASKS, output, **{"seed": 1, "workers": 1, "progress": False, **changed})


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_png_files_hold_what_is_made_on_the_fly(tmp_path):
    dataset = Drawn()
    _write(dataset, tmp_path)
    for task in TASKS:
        for key in dataset.keys(Task(0)):
            image = dataset.load(Task(0), key).image_HW3
            expected = corrupt(image, str(task.corruption), severity=task.severity, seed=1, key=key)
            on_disk = np.array(Image.open(tmp_path / str(task.corruption) / str(task.severity) / f"{key}.png"))
            assert np.array_equal(on_disk, expected)


def test_two_workers_write_the_same_bytes_as_one(tmp_path):
    _write(Drawn(), tmp_path / "one")
    _write(Drawn(), tmp_path / "two", workers=2)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")


def test_manifest_lists_every_image_sorted_with_its_hash(tmp_path):
    manifest = json.loads(_write(Drawn(), tmp_path).read_bytes())
    images = {name: content for name, content in _contents(tmp_path).items() if name.endswith(".png")}
    assert manifest["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in images.items()}
    assert list(manifest["sha256"]) == sorted(images)
    assert manifest["count"] == len(images) == 12
    assert manifest["settings"] == json.loads((tmp_path / "settings.json").read_bytes())


def test_restart_keeps_finished_files_and_makes_the_missing(tmp_path):
    manifest = _write(Drawn(), tmp_path)
    finished = _contents(tmp_path)
    kept = tmp_path / "contrast/3/c.png"
    modified = kept.stat().st_mtime_ns
    (tmp_path / "contrast/3/d.png").unlink()
    manifest.unlink()
    _write(Drawn(), tmp_path)
    assert kept.stat().st_mtime_ns == modified
    assert _contents(tmp_path) == finished


def test_finished_images_are_not_loaded_again(tmp_path):
    _write(Drawn(), tmp_path)
    too_small_to_corrupt = Drawn(side_px=8)
    _write(too_small_to_corrupt, tmp_path)


def test_set_grows_with_more_tasks_and_images(tmp_path):
    write_set(Drawn(), TASKS[:1], tmp_path, seed=1, workers=1, limit=2, progress=False)
    _write(Drawn(), tmp_path)
    write_set(Drawn(), TASKS[1:2], tmp_path, seed=1, workers=1, limit=1, progress=False)
    _write(Drawn(), tmp_path.parent / "at_once")
    assert _contents(tmp_path) == _contents(tmp_path.parent / "at_once")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2}, "was started with seed=1; now 2"),
        ({"image_format": "jpg"}, "was started with image_format='png'; now 'jpg'"),
        ({"dataset": Drawn(("a", "b"))}, "was started with dataset='Drawn, 4 images"),
    ],
)
def test_other_settings_are_refused_with_old_and_new_value(tmp_path, changed, message):
    _write(Drawn(), tmp_path)
    before = _contents(tmp_path)
    dataset = changed.pop("dataset", Drawn())
    with pytest.raises(UserError, match=message):
        _write(dataset, tmp_path, **changed)
    assert _contents(tmp_path) == before


def _run_verb(output: Path, *overrides: str) -> None:
    run(from_overrides("corrupt", [*overrides, "data.corruptions=[fog]", f"corrupt.output={output}",
                                   "data.workers=0", "data.limit=1"], config_data.CorruptConfig))  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.split=validation", "split='test'; now 'validation'"),
        ("data.world_seed=1", "world_seed=0; now 1"),
        ("data.weather=all", "weather='clear'; now 'all'"),
        ("data.name=mine", "name='toytown'; now 'mine'"),
        ("data.count=4", "dataset='ToyTown, 3 images"),
    ],
)
def test_another_world_into_the_same_set_is_refused(tmp_path, override, said):
    """The keys of two splits or worlds can be equal, so that a set was once continued with other pictures."""
    _run_verb(tmp_path, "data=toytown", "data.count=3")
    before = _contents(tmp_path)
    with pytest.raises(UserError, match=said):
        _run_verb(tmp_path, "data=toytown", "data.count=3", override)
    assert _contents(tmp_path) == before


@pytest.fixture
def folder_of_two(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "data" / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Drawn().load(Task(0), name).image_HW3).save(path)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.image_path='{data_root}/images/{key}.png'", r"image_path='\{data_root\}/images/\{key\}\.\*'; now"),
        ("data.classes=camvid", "classes='12 names, [0-9a-f]{16}'; now '11 names,"),
        ("data.split=training", "split='validation'; now 'training'"),
    ],
)
def test_another_template_or_class_list_is_refused(tmp_path, folder_of_two, override, said):
    common = ("data=folder", "data.classes=toytown", f"data.data_root={folder_of_two}")
    _run_verb(tmp_path / "set", *common)
    with pytest.raises(UserError, match=said):
        _run_verb(tmp_path / "set", *common, override)


def test_a_set_is_continued_from_a_copy_of_its_data_and_takes_sorted_keys_first(tmp_path, folder_of_two):
    common = ("data=folder", "data.classes=toytown")
    _run_verb(tmp_path / "set", *common, f"data.data_root={folder_of_two}")
    before = _contents(tmp_path / "set")
    moved = folder_of_two.rename(tmp_path / "elsewhere")
    _run_verb(tmp_path / "set", *common, f"data.data_root={moved}", "data.world_seed=7")  # no setting of files
    assert _contents(tmp_path / "set") == before
    assert [name for name in before if name.endswith(".png")] == ["fog/5/a.png"]


def test_a_set_with_an_origin_is_not_continued_without(tmp_path):
    _write(Drawn(), tmp_path, origin={"split": "test"})
    with pytest.raises(UserError, match="split='test'; now None"):
        _write(Drawn(), tmp_path)


@pytest.mark.parametrize("key", ["../outside", "/outside", "a/../../b", "a//b", "", "a\\b", "."])
def test_key_that_leaves_the_folder_is_refused_before_anything_is_written(tmp_path, key):
    with pytest.raises(UserError, match="would not stay inside the output folder"):
        _write(Drawn(("fine", key)), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"holds 'holiday.jpg' but no settings.json"):
        _write(Drawn(), tmp_path)


def test_left_over_temporary_file_does_not_hinder_the_start(tmp_path):
    (tmp_path / ".settings.json.1.tmp").touch()
    assert _write(Drawn(), tmp_path).is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_format": "jpeg"}, "image_format='jpeg'; expected png or jpg. Did you mean jpg?"),
        ({"quality": 0}, r"quality=0; expected 1\.\.95"),
        ({"workers": 0}, "workers=0; expected 1 or more"),
        ({"limit": 0}, "limit=0; expected 1 or more"),
    ],
)
def test_bad_argument_is_refused(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        _write(Drawn(), tmp_path, **changed)


@pytest.mark.parametrize(
    ("task", "message"),
    [(Task(0), "is clean"), (Task(0, "fogg", 1), "Did you mean fog?"), (Task(0, "fog", 6), "severity 6")],
)
def test_task_that_cannot_be_written_is_refused(tmp_path, task, message):
    with pytest.raises(UserError, match=message):
        write_set(Drawn(), [task], tmp_path, seed=0, workers=1, progress=False)


def test_mistake_found_in_a_worker_reaches_the_caller(tmp_path):
    with pytest.raises(UserError, match="corruptions need 32 px"):
        _write(Drawn(("a",), side_px=8), tmp_path, workers=2)  # one image: only one of the two is started


def test_jpeg_is_written_at_the_asked_quality(tmp_path):
    _write(Drawn(), tmp_path, image_format="jpg", quality=75, limit=1)
    path = tmp_path / "contrast/3/c.jpg"
    image = Drawn().load(Task(0), "c").image_HW3
    Image.fromarray(corrupt(image, "contrast", severity=3, seed=1, key="c")).save(tmp_path / "expected.jpg", quality=75)
    assert path.read_bytes() == (tmp_path / "expected.jpg").read_bytes()


def test_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "set").touch()
    with pytest.raises(UserError, match="set is a file; expected a folder"):
        _write(Drawn(), tmp_path / "set")
