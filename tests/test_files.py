"""Reading images and labels from disk: layouts, kinds of files, and one file of each kind of fault."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import IDS_HW, PIXELS_HW3, RNG, files, save
from PIL import Image

from segadapt.corruptions import corrupt
from segadapt.datasets import Task
from segadapt.datasets.labels import CLASS_SETS, PALETTES
from segadapt.errors import UserError

CLEAN = Task(index=0)
FOG = Task(index=1, corruption="fog", severity=5)


@pytest.fixture
def root(tmp_path) -> Path:
    """One good pair named a."""
    save(tmp_path / "images/val/a.png", PIXELS_HW3)
    save(tmp_path / "labels/val/a.png", IDS_HW)
    return tmp_path


def image_of(root: Path, pixels: np.ndarray | Image.Image, *, name: str = "b.png", **options) -> np.ndarray:
    """Save as an unlabelled image and load it."""
    path = save(root / "only" / name, pixels, **options)
    data = files(root, image_path="{data_root}/only/{key}.*", label_path=None)
    return data.load(CLEAN, path.stem).image_HW3


def label_of(root: Path, pixels: np.ndarray | Image.Image, **options) -> np.ndarray:
    """Save as the label of the good image and load it."""
    save(root / "labels/val/a.png", pixels, **options)
    label_HW = files(root).load(CLEAN, "a").label_HW
    assert label_HW is not None
    return label_HW


# Layouts


def test_pair_is_loaded_with_its_key_and_mapped_label(root):
    sample = files(root).load(CLEAN, "a")
    assert sample.key == "a"
    assert np.array_equal(sample.image_HW3, PIXELS_HW3)
    assert sample.label_HW is not None
    assert np.array_equal(sample.label_HW, np.where(IDS_HW == 0, 255, IDS_HW.astype(int) - 1))


def test_keys_are_sorted_nested_and_without_hidden_files(root):
    for key in ("z", "city/b", "city/a"):
        save(root / f"images/val/{key}.JPG", PIXELS_HW3, format="jpeg")
        save(root / f"labels/val/{key}.png", IDS_HW)
    save(root / "images/val/.hidden.png", PIXELS_HW3)
    save(root / "images/val/.cache/x.png", PIXELS_HW3)
    (root / "images/val/notes.txt").write_text("not an image")
    assert files(root).keys(CLEAN) == ["a", "city/a", "city/b", "z"]


def test_suffix_behind_the_key_pairs_files_of_different_endings(root):
    save(root / "cs/bonn/b_leftImg8bit.png", PIXELS_HW3)
    save(root / "cs/gt/bonn/b_labelIds.png", IDS_HW)
    save(root / "cs/gt/bonn/b_color.png", PIXELS_HW3)
    data = files(
        root / "cs",
        image_path="{data_root}/{split}/{key}_leftImg8bit.png",
        label_path="{data_root}/gt/{split}/{key}_labelIds.png",
        split="bonn",
    )
    assert data.keys(CLEAN) == ["b"]
    assert data.load(CLEAN, "b").label_HW is not None


@pytest.mark.parametrize(
    "image_path",
    ["{data_root}/set-c/{corruption}/{severity}/{split}/{key}.*", "{data_root}/{corruption}_{severity}/{key}.png"],
)
def test_corrupted_images_are_read_from_disk_if_the_path_names_the_corruption(root, image_path):
    save(root / "set-c/fog/5/val/a.png", 255 - PIXELS_HW3)
    save(root / "fog_5/a.png", 255 - PIXELS_HW3)
    data = files(root, image_path=image_path)
    assert data.keys(FOG) == ["a"]
    assert np.array_equal(data.load(FOG, "a").image_HW3, 255 - PIXELS_HW3)
    with pytest.raises(UserError, match=r"data\.image_path=.*the clean task has no \{corruption\}"):
        data.keys(CLEAN)


def test_corrupted_images_are_made_from_the_clean_one_otherwise(root):
    made = files(root).load(FOG, "a").image_HW3
    assert np.array_equal(made, corrupt(PIXELS_HW3, "fog", severity=5, seed=7, key="a"))
    assert not np.array_equal(made, PIXELS_HW3)


def test_unlabelled_images_have_no_label(root):
    data = files(root, label_path=None)
    assert data.keys(CLEAN) == ["a"]
    assert data.load(CLEAN, "a").label_HW is None
    assert data.missing_images(CLEAN) == []


def test_label_without_image_is_reported_not_refused(root):
    for key in ("c", "b"):
        save(root / f"labels/val/{key}.png", IDS_HW)
    data = files(root)
    assert data.keys(CLEAN) == ["a"]
    assert data.missing_images(CLEAN) == ["b", "c"]


# Faults of the layout


def test_images_without_label_are_counted_and_three_are_named(root):
    for key in "bcde":
        save(root / f"images/val/{key}.png", PIXELS_HW3)
    save(root / "labels/val/y.png", IDS_HW)
    with pytest.raises(
        UserError, match=r"no label for 4 of 5 images \(b, c, d, \.\.\.\); 1 of 2 labels have no image\. Add"
    ):
        files(root).keys(CLEAN)


def test_two_files_of_one_key_are_refused(root):
    save(root / "images/val/a.jpg", PIXELS_HW3)
    with pytest.raises(UserError, match=r"same key a; expected one file a key. Remove one"):
        files(root).keys(CLEAN)


def test_missing_and_empty_folders_are_named(root):
    with pytest.raises(
        UserError,
        match=r"data\.image_path: .*images/test is not a folder; .*images holds val\. Set the split, data\.split",
    ):
        files(root, split="test").keys(CLEAN)
    (root / "images/test").mkdir()
    with pytest.raises(
        UserError, match=r"no file in .*images/test ends in \.\*; expected at least one, it holds nothing"
    ):
        files(root, split="test").keys(CLEAN)


def test_another_name_or_another_suffix_shows_in_what_the_folder_holds(root):
    with pytest.raises(
        UserError,
        match=r"data\.image_path: .*/image/val is not a folder; .* holds images, labels\. Set data\.data_root",
    ):
        files(root, image_path="{data_root}/image/{split}/{key}.*").keys(CLEAN)
    with pytest.raises(
        UserError, match=r"no file in .*labels/val ends in \.tif; expected at least one, it holds 1 \.png"
    ):
        files(root, label_path="{data_root}/labels/{split}/{key}.tif").keys(CLEAN)


# Parts of a set


@pytest.fixture
def ten(root) -> Path:
    """Pairs 00 to 09 in place of a."""
    for key in ("a", *(f"{number:02d}" for number in range(10))):
        for kind in ("images", "labels"):
            (root / kind / "val" / f"{key}.png").write_bytes((root / kind / "val/a.png").read_bytes())
    for kind in ("images", "labels"):
        (root / kind / "val/a.png").unlink()
    return root


def test_keys_file_chooses_in_sorted_order_and_nothing_else_needs_a_label(ten):
    (ten / "lists").mkdir()
    (ten / "lists/val.txt").write_text("07\n\n 03 \n05\n")
    (ten / "labels/val/04.png").unlink()
    data = files(ten, keys_file="{data_root}/lists/{split}.txt")
    assert data.keys(CLEAN) == ["03", "05", "07"]
    assert data.load(CLEAN, "05").key == "05"
    assert files(ten, keys_file=str(ten / "lists/val.txt"), subset=2).keys(CLEAN) == ["05"]
    (ten / "labels/val/05.png").unlink()
    with pytest.raises(UserError, match=r"labels/val: no label for 1 of 3 images \(05\)"):
        data.keys(CLEAN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"03\n11\n", r"no image for 1 of 2 keys of .*val\.txt \(11\); keys of images look like 00, 01, 02, \.\.\."),
        (b"03\n03\n", r"val\.txt has 2 keys, 1 different; expected each once"),
        (b"\n", r"val\.txt has 0 keys, 0 different"),
        (b"03\n\xff\n", r"byte 3 of .*val\.txt is not UTF-8"),
        (None, r"val\.txt is not a file; .* holds images, labels\."),
    ],
)
def test_a_keys_file_that_does_not_fit_is_named(ten, content, message):
    if content is not None:
        (ten / "val.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.keys_file: .*{message}"):
        files(ten, keys_file="{data_root}/{split}.txt").keys(CLEAN)


def test_a_missing_label_is_an_error_whatever_the_subset(ten):
    assert files(ten, subset=4).keys(CLEAN) == ["03", "07"]
    assert files(ten, subset=10).keys(CLEAN) == ["09"]
    (ten / "labels/val/00.png").unlink()  # the script of the notes would now pair 04 with the label of 05
    with pytest.raises(UserError, match=r"no label for 1 of 10 images \(00\)"):
        files(ten, subset=4).keys(CLEAN)


def test_a_subset_larger_than_the_set_is_refused(ten):
    with pytest.raises(UserError, match=r"data\.subset=11: there are only 10 images"):
        files(ten, subset=11).keys(CLEAN)


def test_subsets_of_ade20k_are_those_of_thinning_again_and_again(tmp_path, monkeypatch):
    """The sizes of cheapseg's ds_1, ds_2, ds_4 ... ds_2048; its script keeps every second file of a sorted list."""
    kept = [f"ADE_train_{number:08d}" for number in range(1, 20211)]
    paths = {key: tmp_path / f"{key}.jpg" for key in kept}
    monkeypatch.setattr("segadapt.datasets.files.Template.list", lambda *_: paths)
    sizes = []
    for power in range(12):
        keys = files(tmp_path, label_path=None, subset=2**power).keys(CLEAN)
        assert keys == kept
        sizes.append(len(keys))
        kept = [key for number, key in enumerate(kept, start=1) if number % 2 == 0]
    assert sizes == [20210, 10105, 5052, 2526, 1263, 631, 315, 157, 78, 39, 19, 9]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{data_root}/{splt}/{key}.png", r"\{splt\} is not a placeholder. Did you mean split\?"),
        ("{data_root.__class__}/{key}.png", "is not a placeholder"),
        ("{data_root}/images", r"expected one \{key\}"),
        ("{data_root}/x_{key}.png", "directly behind a '/'"),
        ("{data_root}/{key}", "only a suffix behind it"),
        ("{data_root}/{key}/image.png", "only a suffix behind it"),
        ("{data_root}/{key}.{split}", "only a suffix behind it"),
        ("{data_root}/../{key}.png", "'..' leaves the folder"),
        ("{data_root}/{severity}/{key}.png", r"Add \{corruption\}"),
    ],
)
def test_bad_template_is_refused_with_its_text_and_cure(root, template, message):
    with pytest.raises(UserError, match=r"^data\.image_path=\{data_root.*" + message):
        files(root, image_path=template)


def test_split_and_corruption_cannot_leave_the_data_folder(root):
    with pytest.raises(UserError, match=r"data\.split=\.\./val: '\.\.' leaves"):
        files(root, split="../val")
    escaping = Task(index=0, corruption="../fog", severity=1)
    with pytest.raises(UserError, match=r"=\.\./fog: '\.\.' leaves"):
        files(root, image_path="{data_root}/{corruption}/{key}.png").keys(escaping)


def test_key_that_is_not_listed_is_never_opened(root):
    save(root / "images/secret.png", PIXELS_HW3)
    with pytest.raises(UserError, match=r"no file for key \.\./secret"):
        files(root, label_path=None).load(CLEAN, "../secret")


# Kinds of images


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_every_8_bit_kind_becomes_what_a_viewer_shows(root, mode):
    source = Image.fromarray(PIXELS_HW3).convert(mode)
    expected = np.array(source.convert("RGB"))
    assert np.array_equal(image_of(root, source), expected)


def test_alpha_is_dropped_not_blended(root):
    transparent = np.dstack([PIXELS_HW3, np.zeros((40, 48), np.uint8)])
    assert np.array_equal(image_of(root, transparent), PIXELS_HW3)


def test_palette_with_transparency_keeps_its_colours_without_a_warning(root, recwarn):
    source = Image.fromarray(PIXELS_HW3).convert("P")
    assert np.array_equal(image_of(root, source, transparency=bytes(range(256))), np.array(source.convert("RGB")))
    assert not recwarn.list


def test_cmyk_jpeg_is_close_to_its_rgb_colours(root):
    flat = np.full((40, 48, 3), (200, 100, 50), np.uint8)
    read = image_of(root, Image.fromarray(flat).convert("CMYK"), name="b.jpg", quality=95)
    assert np.abs(read.astype(int) - flat).max() <= 4


def test_16_bit_gray_keeps_its_high_byte(root):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert image_of(root, values).tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255)]]


def test_exif_rotation_turns_the_image_but_not_the_label(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    (root / "images/val/a.png").unlink()
    save(root / "images/val/a.jpg", PIXELS_HW3, exif=exif)
    save(root / "labels/val/a.png", np.rot90(IDS_HW, -1).copy(), exif=exif)
    sample = files(root).load(CLEAN, "a")
    stored = np.array(Image.open(root / "images/val/a.jpg"))
    assert sample.label_HW is not None
    assert np.array_equal(sample.image_HW3, np.rot90(stored, -1))
    assert sample.label_HW.shape == sample.image_HW3.shape[:2] == (48, 40)


# Faults of images


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's own line, before its error
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_cut_file_is_named_with_a_remedy(root, suffix, share):
    path = save(root / f"cut/b.{suffix}", PIXELS_HW3)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    data = files(root, image_path="{data_root}/cut/{key}.*", label_path=None)
    with pytest.raises(UserError, match=rf"cut/b\.{suffix}: cannot be decoded: .*expected a whole image file\. Fetch"):
        data.load(CLEAN, "b")


@given(st.data())
def test_damaged_png_is_read_or_a_user_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(save(folder / "b.png", PIXELS_HW3[:4, :4]).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "b.png").write_bytes(content)
    reader = files(folder, image_path="{data_root}/{key}.png", label_path=None, max_pixels=2**20)
    with contextlib.suppress(UserError):
        assert reader.load(CLEAN, "b").image_HW3.dtype == np.uint8


def test_text_file_with_an_image_suffix_is_named(root):
    (root / "images/val/a.png").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded"):
        files(root).load(CLEAN, "a")


def png(width: int, height: int, *, depth: int, rows: bytes) -> bytes:
    """A gray PNG from its packed rows, each behind its filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 50000])
def test_huge_header_is_refused_before_decoding(root, side, recwarn):
    (root / "images/val/a.png").write_bytes(png(side, side, depth=8, rows=b""))
    with pytest.raises(UserError, match=r"a\.png: .*expected at most data\.max_pixels=67108864\. Replace .* or raise"):
        files(root).load(CLEAN, "a")
    assert not recwarn.list


def test_max_pixels_counts_exactly(root):
    assert files(root, max_pixels=40 * 48).load(CLEAN, "a").image_HW3.shape == (40, 48, 3)
    with pytest.raises(UserError, match=r"48 x 40 px; expected at most data\.max_pixels=1919"):
        files(root, max_pixels=40 * 48 - 1).load(CLEAN, "a")


# Labels


def test_palette_label_keeps_its_indices(root):
    label = Image.fromarray(IDS_HW)
    label.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
    assert np.array_equal(label_of(root, label), np.where(IDS_HW == 0, 255, IDS_HW.astype(int) - 1))


def test_16_bit_label_holds_ids(root):
    assert np.array_equal(label_of(root, IDS_HW.astype(np.uint16)), np.where(IDS_HW == 0, 255, IDS_HW.astype(int) - 1))


@pytest.mark.parametrize(("depth", "row"), [(4, b"\x01\x23"), (2, b"\x1b")])
def test_gray_label_of_few_bits_is_not_stretched(root, depth, row):
    save(root / "images/val/a.png", PIXELS_HW3[:1, :4])
    (root / "labels/val/a.png").write_bytes(png(4, 1, depth=depth, rows=b"\x00" + row))
    label = files(root).load(CLEAN, "a").label_HW
    assert label is not None
    assert label.tolist() == [[255, 0, 1, 2]]


def test_16_bit_instance_ids_are_refused_with_their_place(root):
    ids = IDS_HW.astype(np.uint16)
    ids[3, 5] = 26001
    with pytest.raises(UserError, match=r"a\.png: label id 26001 at row 3, column 5; expected 0\.\.255"):
        label_of(root, ids)


def test_unknown_label_id_is_refused_with_its_place(root):
    ids = IDS_HW.copy()
    ids[2, 7] = 9
    with pytest.raises(UserError, match=r"labels/val/a\.png: label id 9 at row 2, column 7; expected 0\.\.3 or 255"):
        label_of(root, ids)


def test_colour_label_is_refused(root):
    with pytest.raises(
        UserError, match=r"labels/val/a\.png: label of pixel format RGB; expected one id a pixel .*Convert"
    ):
        label_of(root, PIXELS_HW3)


def test_label_of_another_size_is_refused_with_both_sizes(root):
    with pytest.raises(UserError, match=r"label of 47 x 40 px, but its image .* has 48 x 40 px; expected equal"):
        label_of(root, IDS_HW[:, 1:].copy())


def test_label_that_is_all_ignore_is_fine(root):
    assert (label_of(root, np.full((40, 48), 255, np.uint8)) == 255).all()


# The real thing


def test_true_ade20k_pairs_are_read_with_their_classes():
    if "ADE20K_SAMPLE" not in os.environ:
        pytest.skip("ADE20K_SAMPLE is not set: no true pairs to read")
    data = files(
        Path(os.environ["ADE20K_SAMPLE"]),
        label_path="{data_root}/annotations/{split}/{key}.png",
        classes=CLASS_SETS["ade20k"],
        palette_C3=PALETTES["ade20k"],
        split="validation",
    )
    keys = data.keys(CLEAN)
    assert keys == [f"ADE_val_0000000{number}" for number in (1, 2, 3)]
    sizes, seen = [], []
    for key in keys:
        sample = data.load(CLEAN, key)
        assert sample.label_HW is not None
        sizes.append(sample.image_HW3.shape)
        seen.append({data.classes[index] for index in np.unique(sample.label_HW) if index != 255})
    assert sizes == [(512, 683, 3), (364, 500, 3), (300, 400, 3)]
    assert seen[0] == {"wall", "building", "sky", "tree", "road", "grass", "plant"}
    assert {"car", "signboard", "streetlight", "van"} <= seen[2]
