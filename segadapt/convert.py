"""Write the labels of a folder anew, from colours or grey values to one class id a pixel: once, before training.

{output}/settings.json   the table; it must not change between restarts
{output}/{key}.png       8-bit gray: class 0..C-1, 255 = ignore; written whole or not at all
{output}/classes.txt     names in label order, for data.classes; not of convert.grey, which has none
{output}/manifest.json   pixels and images of each class, SHA-256 of every label; written last, the same for any workers

H W label px   N colours of the table   C classes
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rich.console import Console

from segadapt import __version__, stream
from segadapt.config_data import ConvertConfig, ConvertSettings
from segadapt.datasets.build import check_class_names
from segadapt.datasets.decode import read_colours, read_greys
from segadapt.datasets.files import Template
from segadapt.datasets.labels import CLASS_SETS, IGNORE, PALETTES
from segadapt.errors import UserError
from segadapt.terminal import results_table
from segadapt.written_set import as_json, check_key, claim, progress_bar, write_whole

TABLES = ("colours", "palette", "grey")
# a palette that paints two classes alike is for pictures alone
KNOWN = [name for name, colour_C3 in PALETTES.items() if len(np.unique(colour_C3, axis=0)) == len(colour_C3)]
VOID = "void"  # of a known palette: what its data set paints that is no class
VOIDS = {"camvid": [0, 0, 0], "cityscapes": [0, 0, 0], "pascal_voc": [224, 224, 192]}
Colours = list[tuple[str, list[int]]]  # name and [r, g, b]; of a name that comes again, all its colours are one class


@dataclass(frozen=True)
class Table:
    """Colours (or grey values) to class ids."""

    classes: tuple[str, ...]  # in label order
    codes_N: np.ndarray  # int32, sorted: 65536 r + 256 g + b, or the grey value
    ids_N: np.ndarray  # uint8: 0..C-1, or 255 = ignore
    is_grey: bool

    def ids(self, path: Path, *, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
        """Label of a file, uint8 [H, W], unknown values as 255; and whether each is unknown, bool [H, W]."""
        code_HW = self._codes(path, max_pixels=max_pixels)
        place_HW = np.searchsorted(self.codes_N, code_HW).clip(max=len(self.codes_N) - 1)
        is_unknown_HW = self.codes_N[place_HW] != code_HW
        return np.where(is_unknown_HW, np.uint8(IGNORE), self.ids_N[place_HW]), is_unknown_HW

    def _codes(self, path: Path, *, max_pixels: int) -> np.ndarray:
        read = read_greys if self.is_grey else read_colours
        values = read(path, max_pixels=max_pixels, limit="convert.max_pixels").astype(np.int32)
        return values if self.is_grey else values @ np.array([65536, 256, 1], np.int32)

    def values(self, path: Path, is_wanted_HW: np.ndarray, *, max_pixels: int) -> list[str]:
        """The values of some pixels of a file in reading order, as a user would write them."""
        codes = self._codes(path, max_pixels=max_pixels)[is_wanted_HW].tolist()
        return [str(code if self.is_grey else [code >> 16, code >> 8 & 255, code & 255]) for code in codes]


@dataclass(frozen=True)
class Converted:
    """What is kept of one label."""

    name: str  # of the file, inside of the output
    sha256: str
    pixels_256: np.ndarray  # int64, by id
    unknown: int  # pixels of these 255


def table_of(settings: ConvertSettings) -> Table:
    """The table that the settings name.

    Raises:
        UserError: none or two of TABLES; a bad colour, one of two classes, or a name to ignore that is not there.
    """
    given = [name for name in TABLES if getattr(settings, name)]
    if len(given) != 1:
        raise UserError(f"convert: {' and '.join(given) or 'no table'} given; expected one of convert.colours, "
                        "convert.palette and convert.grey. Set one.")  # fmt: skip
    where = f"convert.{given[0]}"
    if settings.grey:
        return _grey_table(settings.grey, ignored=settings.ignored)
    colours = list(settings.colours.items()) if settings.colours else read_palette(str(settings.palette))
    names = dict.fromkeys(name for name, _ in colours)
    for name in settings.ignored:
        if name not in names:
            raise UserError(f"convert.ignored: {name!r} is not a name of {where}. Correct it, or leave it out.")
    ignored = {*settings.ignored, *([VOID] if settings.palette in VOIDS else [])}
    classes = tuple(name for name in names if name not in ignored)
    check_class_names(classes, where)
    owner: dict[int, str] = {}
    for name, colour in colours:
        if len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour):
            raise UserError(f"{where}: {name} has {colour}; expected [r, g, b], each 0..255. Correct it.")
        code = colour[0] << 16 | colour[1] << 8 | colour[2]
        if owner.setdefault(code, name) != name:
            raise UserError(f"{where}: {owner[code]} and {name} both have {colour}, so a pixel of it has no one class. "
                            "Give each its own colour, or both one name.")  # fmt: skip
    number = {name: index for index, name in enumerate(classes)}
    codes = sorted(owner)
    ids = [number.get(owner[code], IGNORE) for code in codes]
    return Table(classes, np.array(codes, np.int32), np.array(ids, np.uint8), is_grey=False)


def _grey_table(values: Sequence[int], *, ignored: Sequence[str]) -> Table:
    """Value values[c] is class c; 255 is ignore, unless it is one of them."""
    if len(set(values)) != len(values) or not all(0 <= value <= 255 for value in values):
        raise UserError(f"convert.grey={list(values)}: expected different values of 0..255. Correct the list.")
    if ignored:
        raise UserError(f"convert.ignored={list(ignored)}: convert.grey has no names. Leave their values out, and set "
                        "convert.unknown=ignore.")  # fmt: skip
    classes = tuple(f"grey {value}" for value in values)
    check_class_names(classes, "convert.grey")
    number = {IGNORE: IGNORE} | {value: index for index, value in enumerate(values)}
    codes = sorted(number)
    return Table(classes, np.array(codes, np.int32), np.array([number[code] for code in codes], np.uint8), is_grey=True)


def read_palette(palette: str) -> Colours:
    """Names and colours of a known palette or of a file. UserError: neither, or a line that is no name with a colour.

    Text holds a class a line: the name and three numbers, in either order, with spaces, tabs, commas or colons between
    ('road 128 64 128', CamVid's '128 64 128 Road', CVAT's 'road:128,64,128::'); '#' begins a comment.
    """
    if palette in KNOWN:
        void = [(VOID, VOIDS[palette])] if palette in VOIDS else []
        return [*zip(CLASS_SETS[palette], PALETTES[palette].tolist(), strict=True), *void]
    path = Path(palette).expanduser()
    if not path.is_file():
        alike = ": it paints two classes alike, and" if palette in PALETTES else ""
        raise UserError(f"convert.palette={palette}{alike} is neither one of {', '.join(KNOWN)} nor a file. Correct "
                        "it, or name the classes in convert.colours; labels that hold ids need no table.")  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".json", ".yaml", ".yml"):
            mapping = yaml.safe_load(text)
            if not isinstance(mapping, Mapping) or not all(isinstance(colour, list) for colour in mapping.values()):
                raise UserError(f"convert.palette={palette}: expected an object of name: [r, g, b]. Correct the file.")
            return [(str(name), colour) for name, colour in mapping.items()]
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"convert.palette={palette} cannot be read ({said}); expected UTF-8 text, JSON or YAML. "
                        "Correct the file.") from error  # fmt: skip
    return [_colour_of(line, f"{palette}, line {number}") for number, line in enumerate(text.splitlines(), start=1)
            if line.strip() and not line.lstrip().startswith("#")]  # fmt: skip


def _colour_of(line: str, where: str) -> tuple[str, list[int]]:
    numbers = r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})"
    if found := re.fullmatch(rf"\s*{numbers}[\s,:]+(\S.*?)\s*", line):
        *colour, name = found.groups()
    elif found := re.fullmatch(rf"\s*(\S.*?)[\s,:]+{numbers}[\s:]*", line):
        name, *colour = found.groups()
    else:
        raise UserError(f"convert.palette={where}: {line.strip()!r}; expected a name and r g b. Correct the line.")
    return name, [int(value) for value in colour]


def convert_file(settings: ConvertSettings, table: Table, item: tuple[str, Path]) -> Converted:
    """Convert the label of (key, path); a file that is there and right is left as it is.

    UserError: it cannot be read or written, or has pixels that the table does not know and convert.unknown=error.
    """
    key, path = item
    label_HW, is_unknown_HW = table.ids(path, max_pixels=settings.max_pixels)
    unknown = int(is_unknown_HW.sum())
    if unknown and settings.unknown == "error":
        row, column = np.argwhere(is_unknown_HW)[0]
        values = table.values(path, is_unknown_HW, max_pixels=settings.max_pixels)
        hint = " JPEG changes colours: take the lossless original." if path.suffix.lower() in (".jpg", ".jpeg") else ""
        raise UserError(
            f"{path}: {values[0]} at row {row}, column {column} is not in the table, nor are the values of "
            f"{unknown} of {label_HW.size} pixels, {len(set(values))} different ones (most often "
            f"{Counter(values).most_common(1)[0][0]}).{hint} Add it to the table, or set convert.unknown=ignore."
        )
    buffer = io.BytesIO()
    Image.fromarray(label_HW).save(buffer, format="PNG")
    content, name = buffer.getvalue(), f"{key}.png"
    target = Path(settings.output).expanduser() / name
    if not target.is_file() or target.read_bytes() != content:
        write_whole(target, content)
    pixels_256 = np.bincount(label_HW.ravel(), minlength=256)
    return Converted(name, hashlib.sha256(content).hexdigest(), pixels_256, unknown)


def labels_of(settings: ConvertSettings) -> dict[str, Path]:
    """Key to path of every label of the source. UserError: none, or an output that is inside of it or holds others."""
    source, output = Path(settings.source).expanduser(), Path(settings.output).expanduser()
    if not source.is_dir():
        raise UserError(f"convert.source={source} is not a folder; expected that of the labels. Correct it.")
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"convert.output={output} lies in convert.source={source}: the next start would convert what "
                        "this one wrote. Choose another folder.")  # fmt: skip
    paths = Template("convert.source", f"{{data_root}}/{{key}}{settings.suffix}").list(source, source)
    for key in paths:
        check_key(key)
    there = (path.relative_to(output).with_suffix("").as_posix() for path in sorted(output.rglob("*.png")))
    if stray := [key for key in there if key not in paths]:
        raise UserError(f"convert.output={output} holds {len(stray)} labels that convert.source={source} has not "
                        f"(first: {stray[0]}.png). Remove them, or choose another folder.")  # fmt: skip
    return paths


def run(settings: ConvertConfig) -> None:
    """The verb. The same command goes on after an interruption, and brings changed sources up to date.

    Raises:
        UserError: as `table_of`, `labels_of`, `convert_file`; an output of other settings.
    """
    chosen, output = settings.convert, Path(settings.convert.output).expanduser()
    table, paths = table_of(chosen), labels_of(chosen)
    codes = zip(table.codes_N.tolist(), table.ids_N.tolist(), strict=True)
    claim(output, {"classes": list(table.classes), "table": [list(pair) for pair in codes], "unknown": chosen.unknown,
                   "suffix": chosen.suffix, "version": __version__})  # fmt: skip
    if not table.is_grey:
        write_whole(output / "classes.txt", "".join(f"{name}\n" for name in table.classes).encode())
    work = partial(convert_file, chosen, table)
    with progress_bar(shown=True) as bar:
        every = stream.ahead(work, list(paths.items()), workers=chosen.workers)
        done = list(bar.track(every, total=len(paths), description="converting labels"))
    pixels_N256 = np.stack([one.pixels_256 for one in done])
    manifest = {
        "labels": len(done),
        "classes": [
            {"class": name, "id": index, "pixels": int(pixels_N256[:, index].sum()),
             "images": int((pixels_N256[:, index] > 0).sum())}
            for index, name in enumerate(table.classes)
        ],
        "ignored_pixels": int(pixels_N256[:, IGNORE].sum()),
        "unknown_pixels": sum(one.unknown for one in done),
        "sha256": {one.name: one.sha256 for one in done},
    }  # fmt: skip
    write_whole(output / "manifest.json", as_json(manifest))
    report(manifest, output, has_names=not table.is_grey)


def report(manifest: Mapping, output: Path, *, has_names: bool) -> None:
    """Print what was found, and how to read it."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    total = max(1, sum(line["pixels"] for line in manifest["classes"]))
    lines = [[line["class"], line["id"], line["pixels"] / total, line["images"]] for line in manifest["classes"]]
    console.print(results_table(lines, ["class", "id", "pixels %", "labels"]))
    console.print(f"{manifest['labels']} labels, {manifest['ignored_pixels']} pixels ignored, of these "
                  f"{manifest['unknown_pixels']} of no value of the table")  # fmt: skip
    classes = f" data.classes={output / 'classes.txt'}" if has_names else ""
    console.print(f"wrote {output / 'manifest.json'}; read the labels with data.id_map=as_is{classes}")
