"""Class names, palettes and id maps."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segadapt.datasets.labels import CLASS_SETS, ID_MAPS, PALETTES, id_table, map_ids, palette
from segadapt.errors import UserError


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [("ade20k", 150), ("camvid", 11), ("cityscapes", 19), ("coco_stuff", 171), ("pascal_voc", 21)],
)
def test_class_names_are_distinct_written_words(name, num_classes):
    names = CLASS_SETS[name]
    assert len(set(names)) == len(names) == num_classes
    for word in names:
        assert word == word.strip().lower()
        assert word.isascii()
        assert "_" not in word
        assert "  " not in word


def test_ade20k_names_are_the_first_words_of_its_own_list():
    if "ADE20K_SAMPLE" not in os.environ:
        pytest.skip("ADE20K_SAMPLE is not set: no objectInfo150.csv")
    with Path(os.environ["ADE20K_SAMPLE"], "objectInfo150.csv").open(newline="") as file:
        lines = [row["Name"].replace(";", " ") for row in csv.DictReader(file)]
    differing = [
        name for name, line in zip(CLASS_SETS["ade20k"], lines, strict=True) if not f"{line} ".startswith(f"{name} ")
    ]
    assert differing == ["television receiver"]


def test_published_palettes_have_one_colour_a_class():
    for name, colours in PALETTES.items():
        assert colours.shape == (len(CLASS_SETS[name]), 3)
        assert colours.dtype == np.uint8
    assert PALETTES["pascal_voc"][[0, 1, 15, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128]]
    assert len(np.unique(PALETTES["camvid"], axis=0)) == 11
    assert PALETTES["camvid"][4].tolist() == [60, 40, 222]
    assert PALETTES["ade20k"][[0, 2, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [92, 0, 255]]


@given(st.integers(1, 254))
def test_generic_palette_is_distinct_without_black_and_grows_at_its_end(num_classes):
    colours = palette(num_classes)
    assert colours.shape == (num_classes, 3)
    assert colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours.tolist()} | {(0, 0, 0)}) == num_classes + 1
    assert np.array_equal(palette(num_classes + 1)[:-1], colours)


@given(st.integers(1, 254), st.integers(0, 255))
def test_id_maps_follow_their_definition_for_every_id(num_classes, file_id):
    zero_is_ignore = {0: 255, 255: 255, **{number: number - 1 for number in range(1, num_classes + 1)}}
    as_is = {255: 255, **{number: number for number in range(num_classes)}}
    assert ID_MAPS["zero_is_ignore"](num_classes)[file_id] == zero_is_ignore.get(file_id, -1)
    assert ID_MAPS["as_is"](num_classes)[file_id] == as_is.get(file_id, -1)


def test_ignore_stays_ignore_and_the_file_array_is_not_changed():
    ids = np.array([[0, 1, 150, 255]], np.uint8)
    label = map_ids(ids, id_table("zero_is_ignore", 150), path=Path("a.png"))
    assert label.tolist() == [[255, 0, 149, 255]]
    assert label.dtype == np.uint8
    assert ids.tolist() == [[0, 1, 150, 255]]


def test_unknown_id_is_named_with_file_place_range_and_cure():
    ids = np.zeros((60, 700), np.uint8)
    ids[40, 512] = ids[41, 0] = 31
    with pytest.raises(
        UserError, match=r"^val/a\.png: label id 31 at row 40, column 512; expected 0\.\.10 or 255.*Set data\.id_map"
    ):
        map_ids(ids, id_table("as_is", 11), path=Path("val/a.png"))


def test_unknown_id_map_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"data\.id_map=as-is .*Did you mean as_is\?"):
        id_table("as-is", 11)


def test_more_classes_than_a_byte_holds_are_refused():
    with pytest.raises(UserError, match=r"data\.classes has 255 names; expected 1\.\.254"):
        id_table("as_is", 255)


# A table of one's own


@given(st.lists(st.integers(0, 254), min_size=1, max_size=254, unique=True), st.sampled_from(["error", "ignore"]))
def test_a_table_maps_its_ids_in_order_and_nothing_else(class_ids, unknown_ids):
    """openseg's label_list; with reduce_zero_label there, an unlisted id became 255 - 1 = 254."""
    table_256 = id_table("as_is", len(class_ids), class_ids=class_ids, unknown_ids=unknown_ids)
    other = {"error": -1, "ignore": 255}[unknown_ids]
    for file_id in range(255):
        assert table_256[file_id] == (class_ids.index(file_id) if file_id in class_ids else other)
    assert table_256[255] == 255


def test_an_id_outside_of_the_table_shows_the_table():
    ids = np.array([[0, 50], [100, 49]], np.uint8)
    with pytest.raises(
        UserError, match=r"label id 49 at row 1, column 1; expected 0, 50, 100\.\.101 or 255 \(ignore\)"
    ):
        map_ids(ids, id_table("as_is", 4, class_ids=[50, 0, 101, 100]), path=Path("a.png"))
    label = map_ids(ids, id_table("as_is", 2, class_ids=[50, 0], unknown_ids="ignore"), path=Path("a.png"))
    assert label.tolist() == [[1, 0], [255, 255]]


def test_unknown_ids_can_be_ignored_with_every_map():
    for id_map, num_classes in (
        ("zero_is_ignore", 3),
        ("as_is", 3),
        ("cityscapes_label_ids", 19),
        ("coco_stuff_ids", 171),
    ):
        strict, lenient = (id_table(id_map, num_classes, unknown_ids=how) for how in ("error", "ignore"))
        assert strict.min() == -1
        assert np.array_equal(lenient, np.where(strict == -1, 255, strict))


@pytest.mark.parametrize(
    ("class_ids", "id_map", "message"),
    [
        ([1, 2], "zero_is_ignore", r"label_class_ids=\[1, 2\] and data\.id_map=zero_is_ignore: two rules"),
        ([1, 2, 3], "as_is", r"3 different ids; expected 2, one for each name"),
        ([1, 1], "as_is", r"1 different ids; expected 2"),
        ([0, 255], "as_is", r"expected ids of 0\.\.254.*convert\.grey=\[0, 255\]"),
        ([-1, 3], "as_is", r"expected ids of 0\.\.254"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(class_ids, id_map, message):
    with pytest.raises(UserError, match=message):
        id_table(id_map, 2, class_ids=class_ids)


def test_coco_stuff_ids_are_those_of_its_labels_txt_less_one():
    """By lines of labels.txt: `1: person`, `13: stop sign`, `90: toothbrush`, `92: banner`, `182: wood`."""
    table_256, names = id_table("coco_stuff_ids", 171), CLASS_SETS["coco_stuff"]
    for line, name in {
        1: "person",
        13: "stop sign",
        27: "backpack",
        90: "toothbrush",
        92: "banner",
        182: "wood",
    }.items():
        assert names[table_256[line - 1]] == name
    in_no_label = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
    assert (np.flatnonzero(table_256 == -1) + 1).tolist() == [*in_no_label, *range(183, 256)]
    assert sorted(table_256[table_256 >= 0].tolist()) == [*range(171), 255]


def test_coco_stuff_ids_are_for_its_own_classes():
    with pytest.raises(UserError, match=r"for the 171 classes of COCO-Stuff; data\.classes has 3"):
        id_table("coco_stuff_ids", 3)
