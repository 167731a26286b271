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


@pytest.mark.parametrize(("name", "num_classes"), [("ade20k", 150), ("camvid", 11)])
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
    for name, classes in CLASS_SETS.items():
        assert PALETTES[name].shape == (len(classes), 3)
        assert PALETTES[name].dtype == np.uint8
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
