"""`segadapt convert`: every pixel by a slow loop over the table; damage, restarts, and tables that cannot be right."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import save
from PIL import Image

from segadapt import convert
from segadapt.config_data import ConvertConfig
from segadapt.convert import read_palette, run, table_of
from segadapt.datasets.labels import CLASS_SETS, PALETTES
from segadapt.errors import UserError
from segadapt.parse import from_overrides

STREET = {"road": [128, 64, 128], "sky": [70, 130, 180], "void": [0, 0, 0]}
RNG = np.random.default_rng(5)


def settings(root: Path, *overrides: str, street: bool = True) -> ConvertConfig:
    table = ["convert.colours={road: [128,64,128], sky: [70,130,180], void: [0,0,0]}", "convert.ignored=[void]"]
    where = [f"convert.source={root / 'masks'}", f"convert.output={root / 'labels'}", "convert.workers=0"]
    return from_overrides("convert", [*where, *(table if street else []), *overrides], ConvertConfig)


def painted(names: list[list[str]]) -> np.ndarray:
    return np.array([[STREET[name] for name in row] for row in names], np.uint8)


GREY = settings(Path(), street=False).convert


@pytest.fixture
def root(tmp_path) -> Path:
    """Two masks, one in a subfolder."""
    names = RNG.choice(list(STREET), (2, 6, 8)).tolist()
    for key, grid in zip(("a", "city/b"), names, strict=True):
        save(tmp_path / "masks" / f"{key}.png", painted(grid))
    return tmp_path


def ids_in(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def test_every_pixel_becomes_its_class_in_the_order_of_the_table(root):
    run(settings(root))
    for key in ("a", "city/b"):
        mask_HW3, label_HW = np.array(Image.open(root / f"masks/{key}.png")), ids_in(root / f"labels/{key}.png")
        for row, column in np.ndindex(label_HW.shape):
            name = next(name for name, colour in STREET.items() if colour == mask_HW3[row, column].tolist())
            assert label_HW[row, column] == {"road": 0, "sky": 1, "void": 255}[name]
    assert (root / "labels/classes.txt").read_text() == "road\nsky\n"


def test_the_manifest_counts_what_the_files_hold(root, capsys):
    run(settings(root))
    manifest = json.loads((root / "labels/manifest.json").read_text())
    labels = {name: ids_in(root / "labels" / name) for name in ("a.png", "city/b.png")}
    assert [(line["class"], line["id"], line["pixels"], line["images"]) for line in manifest["classes"]] == [
        (name, c, sum(int((ids == c).sum()) for ids in labels.values()), 2) for c, name in enumerate(("road", "sky"))
    ]
    assert manifest["ignored_pixels"] == sum(int((ids == 255).sum()) for ids in labels.values())
    assert manifest["unknown_pixels"] == 0
    assert manifest["sha256"] == {
        name: hashlib.sha256((root / "labels" / name).read_bytes()).hexdigest() for name in labels
    }
    assert f"data.classes={root / 'labels/classes.txt'}" in capsys.readouterr().out


@given(st.lists(st.integers(0, 255), min_size=1, max_size=254, unique=True))
def test_grey_values_become_classes_in_order_and_255_is_ignored_unless_it_is_one(tmp_path_factory, values):
    root = tmp_path_factory.getbasetemp() / "grey"
    chosen = dataclasses.replace(GREY, grey=values)
    if not root.exists():
        save(root / "every.png", np.arange(256, dtype=np.uint8)[None])
    ids_HW, is_unknown_HW = table_of(chosen).ids(root / "every.png", max_pixels=256)
    for value in range(256):
        known = value in values or value == 255
        assert bool(is_unknown_HW[0, value]) != known
        assert ids_HW[0, value] == (values.index(value) if value in values else 255)


def test_a_binary_mask_of_0_and_255_has_two_classes(root):
    save(root / "masks/a.png", np.array([[0, 255], [255, 0]], np.uint8))
    (root / "masks/city/b.png").unlink()
    run(settings(root, "convert.grey=[0,255]", street=False))
    assert ids_in(root / "labels/a.png").tolist() == [[0, 1], [1, 0]]
    assert not (root / "labels/classes.txt").exists()


def test_a_palette_png_is_converted_by_its_colours_and_exif_is_not_applied(root):
    indexed = Image.fromarray(np.array([[7, 3, 3]], np.uint8))
    palette = np.zeros((256, 3), np.uint8)
    palette[7], palette[3] = STREET["sky"], STREET["road"]
    indexed.putpalette(palette.tobytes())
    save(root / "masks/a.png", indexed)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    save(root / "masks/city/b.png", Image.fromarray(painted([["road", "sky", "void"]])), exif=exif)
    run(settings(root))
    assert ids_in(root / "labels/a.png").tolist() == [[1, 0, 0]]
    assert ids_in(root / "labels/city/b.png").tolist() == [[0, 1, 255]]


def test_an_unknown_colour_is_named_with_file_place_and_count(root):
    mask = painted([["road"] * 4] * 3)
    mask[1, 2:] = mask[2, 0] = [128, 64, 129]
    mask[2, 3] = [9, 9, 9]
    save(root / "masks/a.png", mask)
    message = (r"masks/a\.png: \[128, 64, 129\] at row 1, column 2 is not in the table, nor are the values of 4 of 12 "
               r"pixels, 2 different ones \(most often \[128, 64, 129\]\)\. Add it")  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(settings(root))
    assert not (root / "labels/manifest.json").exists()
    run(settings(root, f"convert.output={root / 'lenient'}", "convert.unknown=ignore"))
    assert json.loads((root / "lenient/manifest.json").read_text())["unknown_pixels"] == 4
    assert ids_in(root / "lenient/a.png").tolist() == [[0] * 4, [0, 0, 255, 255], [255, 0, 0, 255]]


def test_a_jpeg_mask_is_refused_with_the_reason(root):
    (root / "masks/a.png").unlink()
    save(root / "masks/a.jpg", painted([["road", "sky"] * 8] * 16), quality=60)
    with pytest.raises(UserError, match=r"a\.jpg: .* JPEG changes colours: take the lossless original\. Add"):
        run(settings(root))


def test_an_unknown_grey_value_is_named(root):
    save(root / "masks/a.png", np.array([[0, 50, 51]], np.uint8))
    with pytest.raises(UserError, match=r"a\.png: 51 at row 0, column 2 is not in the table"):
        run(settings(root, "convert.grey=[0,50]", street=False))


def as_stored(grey_HW: np.ndarray, mode: str) -> Image.Image:
    image = Image.fromarray(grey_HW)
    return image.point(lambda value: 255 * value, "1") if mode == "1" else image.convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
def test_grey_values_are_read_from_every_kind_of_file(root, mode):
    """1-bit pixels are 0 and 1, as they are stored."""
    values_HW = RNG.integers(0, 2, (5, 7)).astype(np.uint8)
    save(root / "masks/a.png", as_stored(values_HW, mode))
    save(root / "masks/city/b.png", as_stored(1 - values_HW, mode))
    run(settings(root, "convert.grey=[1,0]", street=False))
    assert np.array_equal(ids_in(root / "labels/a.png"), 1 - values_HW)
    assert np.array_equal(ids_in(root / "labels/city/b.png"), values_HW)


def test_a_colour_among_grey_values_is_named(root):
    save(root / "masks/a.png", np.array([[[7, 7, 7], [7, 7, 8]]], np.uint8))
    with pytest.raises(UserError, match=r"a\.png: \[7, 7, 8\] at row 0, column 1 is no grey value; expected R = G = B"):
        run(settings(root, "convert.grey=[7]", street=False))


@pytest.mark.parametrize("table", [True, False])
def test_a_label_that_is_too_large_names_the_setting_of_this_verb(root, table):
    with pytest.raises(UserError, match=r"8 x 6 px; expected at most convert\.max_pixels=47\. .* raise convert\."):
        run(settings(root, "convert.max_pixels=47", *([] if table else ["convert.grey=[0]"]), street=table))


def test_two_workers_write_what_one_does(root):
    run(settings(root))
    run(settings(root, "convert.workers=2", f"convert.output={root / 'two'}"))
    files = [path.relative_to(root / "labels") for path in sorted((root / "labels").rglob("*.*"))]
    assert len(files) == 5
    assert [(root / "two" / path).read_bytes() for path in files] == [(root / "labels" / f).read_bytes() for f in files]


def test_a_second_start_writes_what_is_missing_or_has_changed_and_nothing_else(root, monkeypatch):
    run(settings(root))
    before = {path: path.read_bytes() for path in (root / "labels").rglob("*.*")}
    (root / "labels/a.png").unlink()
    (root / "labels/manifest.json").unlink()
    written, real = [], convert.write_whole
    monkeypatch.setattr(convert, "write_whole", lambda path, content: (written.append(path.name), real(path, content)))
    run(settings(root))
    assert written == ["classes.txt", "a.png", "manifest.json"]
    assert {path: path.read_bytes() for path in (root / "labels").rglob("*.*")} == before
    save(root / "masks/city/b.png", painted([["sky"]]))
    run(settings(root))
    assert ids_in(root / "labels/city/b.png").tolist() == [[1]]


def test_another_table_in_the_same_folder_is_refused(root):
    run(settings(root))
    with pytest.raises(UserError, match=r"labels was started with classes=\['road', 'sky'\]; now \['grey 0'\]"):
        run(settings(root, "convert.grey=[0]", street=False))


def test_labels_that_the_source_has_not_are_refused(root):
    run(settings(root))
    (root / "masks/a.png").unlink()
    with pytest.raises(UserError, match=r"labels holds 1 labels that .*masks has not \(first: a\.png\)"):
        run(settings(root))


def test_a_suffix_leaves_the_key_of_the_image(root):
    (root / "masks/a.png").rename(root / "masks/a_L.png")
    run(settings(root, "convert.suffix=_L.png"))
    assert sorted(path.name for path in (root / "labels").rglob("*.png")) == ["a.png"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["convert.grey=[0]"], r"convert: colours and grey given; expected one of"),
        (["convert.colours={road: [1,2]}", "convert.ignored=[]"], r"convert\.colours: road has \[1, 2\]; expected"),
        (["convert.colours={road: [0,0,256]}"], r"road has \[0, 0, 256\]; expected \[r, g, b\], each 0\.\.255"),
        (["convert.colours.sky=[0,0,0]"], r"sky and void both have \[0, 0, 0\]"),
        (["convert.ignored=[viod]"], r"convert\.ignored: 'viod' is not a name of convert\.colours"),
        (["convert.ignored=[road,sky,void]"], r"convert\.colours: 0 names"),
    ],
)
def test_tables_that_cannot_be_right_are_refused_before_anything_is_written(root, overrides, message):
    with pytest.raises(UserError, match=message):
        run(settings(root, *overrides))
    assert not (root / "labels").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "convert: no table given"),
        (["convert.grey=[0,0]"], "expected different values"),
        (["convert.grey=[256]"], r"convert\.grey=\[256\]"),
        (["convert.grey=[1]", "convert.ignored=[x]"], "convert.grey has no names"),
        (["convert.palette=ade20k"], "ade20k: it paints two classes alike, and is neither one of cityscapes, camvid, "),
        (["convert.palette=nowhere.txt"], "neither one of cityscapes, camvid, pascal_voc nor a file"),
    ],
)
def test_tables_without_colours_of_ones_own(root, overrides, message):
    with pytest.raises(UserError, match=message):
        run(settings(root, *overrides, street=False))


def test_an_output_inside_of_the_source_is_refused(root):
    with pytest.raises(UserError, match=r"masks/out lies in convert\.source="):
        run(settings(root, f"convert.output={root / 'masks/out'}"))


@pytest.mark.parametrize(("palette", "void"), [("camvid", [0, 0, 0]), ("cityscapes", [0, 0, 0]),
                                               ("pascal_voc", [224, 224, 192])])  # fmt: skip
def test_what_a_known_palette_paints_as_void_is_ignored(tmp_path, palette, void):
    colours = PALETTES[palette].tolist()
    save(tmp_path / "masks/a.png", np.array([[*colours, void]], np.uint8))
    run(settings(tmp_path, f"convert.palette={palette}", street=False))
    assert ids_in(tmp_path / "labels/a.png").tolist() == [[*range(len(colours)), 255]]
    assert (tmp_path / "labels/classes.txt").read_text().split("\n")[:-1] == list(CLASS_SETS[palette])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("name first.txt", "# ours\nroad 128 64 128\n\nlane 2\t7 8 9\n"),
        ("camvid.txt", "128 64 128\troad\n7 8 9 \tlane 2\n"),
        ("cvat.txt", "# label:color_rgb:parts:actions\nroad:128,64,128::\nlane 2:7,8,9::\n"),
        ("commas.txt", "road, 128, 64, 128\nlane 2, 7, 8, 9\n"),
        ("a.json", '{"road": [128, 64, 128], "lane 2": [7, 8, 9]}'),
        ("a.yaml", "road: [128, 64, 128]\nlane 2: [7, 8, 9]\n"),
    ],
)
def test_a_palette_file_is_read_in_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_palette(str(tmp_path / name)) == [("road", [128, 64, 128]), ("lane 2", [7, 8, 9])]


def test_a_name_that_comes_twice_is_one_class_of_two_colours(root):
    (root / "table.txt").write_text("road 128 64 128\nvoid 0 0 0\nroad 70 130 180\n")
    table = table_of(settings(root, f"convert.palette={root / 'table.txt'}", "convert.ignored=[void]",
                              street=False).convert)  # fmt: skip
    assert table.classes == ("road",)
    assert table.ids_N.tolist() == [255, 0, 0]  # by rising colour: void, (70, 130, 180), (128, 64, 128)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"road 1 2\n", r"t\.txt, line 1: 'road 1 2'; expected a name and r g b"),
        ("t.json", b"[1]", r"expected an object of name: \[r, g, b\]"),
        ("t.yaml", b"road: red\n", r"expected an object of name"),
        ("t.yaml", b"road: [1,\n", r"cannot be read"),
        ("t.txt", b"\xff", r"cannot be read"),
    ],
)
def test_a_palette_file_that_is_none_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_palette(str(tmp_path / name))
