"""`segadapt split`: what holds of any split, what must hold where the groups allow it, and the lists that are read."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import save

from segadapt.config import EvaluateConfig
from segadapt.config_data import SplitConfig
from segadapt.datasets import Task
from segadapt.datasets.build import build_dataset
from segadapt.errors import UserError
from segadapt.parse import from_overrides
from segadapt.split import assign, run, texts_of

CLASSES = ("sky", "road", "car")


def parts_of(shows, images, shares, seed=0) -> np.ndarray:
    return assign(np.array(shows), np.array(images), np.array(shares), np.random.default_rng(seed))


@given(st.data())
def test_every_group_gets_one_part_and_no_part_is_empty(data):
    num_parts = data.draw(st.integers(2, 4))
    images = data.draw(st.lists(st.integers(1, 9), min_size=num_parts, max_size=30))
    shows = [[data.draw(st.integers(0, count)) for _ in range(3)] for count in images]
    part_G = parts_of(shows, images, [1 / num_parts] * num_parts)
    assert len(part_G) == len(images)
    assert set(part_G.tolist()) == set(range(num_parts))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=40), st.sampled_from([0.5, 0.7, 0.9]), st.integers(0, 5))
def test_without_classes_a_part_misses_its_share_by_less_than_the_largest_group(images, share, seed):
    """Known of greedy filling, largest first: the part that still wants most is never overfilled by more."""
    part_G = parts_of(np.zeros((len(images), 0), int), images, [share, 1 - share], seed)
    first = sum(count for count, part in zip(images, part_G, strict=True) if part == 0)
    assert abs(first - share * sum(images)) <= max(images)


def test_a_class_is_in_every_part_if_its_groups_suffice():
    """Class 2 is in 2 of 12 groups: by shares alone (1.8 and 0.2 groups), both would be in the larger part."""
    shows = [[1, 1, int(group in (3, 8))] for group in range(12)]
    for seed in range(10):
        part_G = parts_of(shows, [1] * 12, [0.9, 0.1], seed)
        assert sorted({int(part_G[3]), int(part_G[8])}) == [0, 1]
        assert np.bincount(part_G).tolist() == [11, 1]


def test_each_class_comes_in_the_shares_where_that_is_possible():
    """60 images of one class each, 30, 20 and 10 of them."""
    shows = np.eye(3, dtype=int)[[0] * 30 + [1] * 20 + [2] * 10]
    part_G = parts_of(shows, [1] * 60, [0.7, 0.2, 0.1])
    assert [shows[part_G == part].sum(axis=0).tolist() for part in range(3)] == [[21, 14, 7], [6, 4, 2], [3, 2, 1]]


def test_the_seed_alone_decides_among_groups_that_are_alike():
    first, again, other = (parts_of(np.ones((20, 1), int), [1] * 20, [0.5, 0.5], seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.fixture
def root(tmp_path) -> Path:
    """6 scenes of 3 frames by day or night; scenes 2 and 5 show the car."""
    for scene in range(6):
        light = "night" if scene in (1, 4) else "day"
        for frame in range(3):
            label_HW = np.zeros((4, 4), np.uint8)
            label_HW[2:] = 1
            label_HW[0, 0] = 255
            label_HW[3, 3] = 2 if scene in (2, 5) and frame == 1 else 1
            save(tmp_path / f"images/{light}/s{scene}_{frame}.png", np.full((4, 4, 3), 40 * scene + frame, np.uint8))
            save(tmp_path / f"labels/{light}/s{scene}_{frame}.png", label_HW)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path


def data_of(root: Path) -> list[str]:
    return ["data=folder", f"data.data_root={root}", f"data.classes={root / 'classes.txt'}", "data.workers=0",
            "data.label_path='{data_root}/labels/{key}.png'"]  # fmt: skip


def settings(root: Path, *overrides: str) -> SplitConfig:
    given = [r"split.group='(s\d+)_'", "split.kind='(day|night)'", "split.shares=[0.5,0.5]", *overrides]
    return from_overrides("split", [*data_of(root), f"split.output={root / 'lists'}", *given], SplitConfig)


def test_scenes_stay_together_and_classes_and_lights_are_on_both_sides(root, capsys):
    run(settings(root))
    lists = {part: (root / f"lists/{part}.txt").read_text().split() for part in ("training", "validation")}
    assert sorted(lists["training"] + lists["validation"]) == build_dataset(settings(root).data).keys(Task(0))
    scenes = [{key.split("/")[1][:2] for key in keys} for keys in lists.values()]
    assert scenes[0] & scenes[1] == set()
    assert [len(keys) for keys in lists.values()] == [9, 9]
    for scene_set in scenes:
        assert len(scene_set & {"s1", "s4"}) == len(scene_set & {"s2", "s5"}) == 1
    (first, second) = json.loads((root / "lists/split.json").read_text())["parts"]
    shown = {"sky": 9, "road": 9, "car": 1, "day": 6, "night": 3}
    assert first["images_that_show"] == second["images_that_show"] == shown
    assert "shows none of" not in capsys.readouterr().out


def test_a_part_is_read_by_its_name(root):
    run(settings(root))
    reads = [*data_of(root), f"data.keys_file='{root}/lists/{{split}}.txt'", "data.split=validation"]
    data = from_overrides("evaluate", [*reads, "model.discriminative.checkpoint=none"], EvaluateConfig).data
    assert build_dataset(data).keys(Task(0)) == (root / "lists/validation.txt").read_text().split()


def test_what_a_part_cannot_show_is_said(root, capsys):
    for frame in range(3):
        for kind in ("images", "labels"):
            (root / f"{kind}/day/s5_{frame}.png").unlink()
    run(settings(root))
    out = capsys.readouterr().out
    assert out.count("shows none of: car; too few groups have them") == 1


def test_the_same_command_writes_the_same_lists_and_another_is_refused(root):
    run(settings(root))
    before = {path: path.read_bytes() for path in (root / "lists").iterdir()}
    run(settings(root))
    assert {path: path.read_bytes() for path in (root / "lists").iterdir()} == before
    with pytest.raises(UserError, match=r"lists was started with seed=0; now 1"):
        run(settings(root, "split.seed=1"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split.shares=[0.5,0.6]"], r"their sum is 1\.1; expected"),
        (["split.shares=[1.0,0.0]"], r"expected shares above 0"),
        (["split.shares=[1.0]"], r"a share for each"),
        (["split.parts=[a,a]"], r"expected two different names"),
        (["split.parts=[a,b/c]"], r"'b/c' names a file"),
        (["split.group='(s'"], r"split\.group=\(s: .*expected a regular expression"),
        (["split.group=s"], r"split\.group=s: 0 \(\.\.\.\); expected one"),
        (["split.group='s(0)'"], r"15 of 18 keys do not match \(first: day/s2_0\)"),
        (["split.group='(s)'"], r"split\.group=\(s\): 1 groups of 18 images; expected one for each of 2 parts"),
        (["data.limit=3"], r"data\.limit=3"),
        (["data.label_path=null"], r"data\.label_path=null: a split spreads"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused_before_anything_is_written(root, overrides, message):
    with pytest.raises(UserError, match=message):
        run(settings(root, *overrides))
    assert not (root / "lists").exists()


def test_texts_are_those_of_the_bracket():
    assert texts_of(r"^(.+?)/", ["berlin/1", "bonn/2"], "split.group") == ["berlin", "bonn"]
