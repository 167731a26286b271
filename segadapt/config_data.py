"""Settings of convert, split and corrupt, which prepare data. As in config.py, values live in conf/*.yaml alone."""

from dataclasses import dataclass

from segadapt.config import DataSettings, setting


@dataclass
class ConvertSettings:
    source: str = setting("folder of the labels, with all its subfolders")
    suffix: str = setting("end of their names, as _L.png; the key is what stands before it; .*: of any image")
    output: str = setting("folder of the converted labels: {key}.png, classes.txt, manifest.json")
    colours: dict[str, list[int]] | None = setting("name of a class: its colour [r, g, b], in label order; null: none")
    palette: str | None = setting(
        "instead: camvid, cityscapes, pascal_voc, or a file: text with 'name r g b' a line, .json or .yaml"
    )
    grey: list[int] = setting("instead: the grey value of each class, in label order, as [0, 50, 100]; []: none")
    ignored: list[str] = setting("names of colours or palette that are no class: 255 in the converted label")
    unknown: str = setting("pixels of no colour of the table: refused, or ignored and counted",
                           choices=("error", "ignore"))  # fmt: skip
    workers: int = setting("processes; 0: this one", low=0)
    max_pixels: int = setting("larger files are refused before decoding, px", low=1)


@dataclass
class ConvertConfig:
    convert: ConvertSettings = setting("which labels, by which table")


@dataclass
class SplitSettings:
    output: str = setting("folder of the lists, {part}.txt each, and split.json")
    parts: list[str] = setting("names of the parts, which are values of data.split later")
    shares: list[float] = setting("share of the images for each part; their sum is 1")
    group: str | None = setting(
        "regular expression on the key; keys with equal text in its (...) stay together; null: each alone"
    )
    kind: str | None = setting(
        "regular expression on the key; its (...) is a sub-category, of which each part gets its share; null: none"
    )
    seed: int = setting("of the choice among groups that are alike", low=0)


@dataclass
class SplitConfig:
    data: DataSettings = setting("the labelled images to split")
    split: SplitSettings = setting("into which parts")


@dataclass
class CorruptSettings:
    output: str = setting("folder of the corrupted set")
    image_format: str = setting("png is lossless; jpg imitates published sets", choices=("png", "jpg"))
    quality: int = setting("of jpg, 1..95", low=1, high=95)


@dataclass
class CorruptConfig:
    data: DataSettings = setting(
        "the clean set; corruptions and severity say what is made, limit takes the first sorted keys"
    )
    corrupt: CorruptSettings = setting("what is written")
