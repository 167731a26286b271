"""What the documents show: commands, files, links; and a world of tiny substitutes in which the commands run."""

import re
import shlex
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import numpy as np
import torch
from foreign_segformer import DEPTHS, HEAD_WIDTH, HEADS, REDUCTIONS, WIDTHS, MmsegNet, nvidia_state, scramble
from PIL import Image
from safetensors.torch import load_file
from sd3_folder import build_sd3_folder

from segadapt.__main__ import VERBS
from segadapt.corruptions import COMMON
from segadapt.models.discriminative.make import make_segmenter

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
SIZES = {"ADE_val_00000001": (64, 96), "ADE_val_00000002": (96, 64)}  # H, W


@dataclass(frozen=True)
class Command:
    """One command of a ```bash block, without its comment; what a backslash continues is one line."""

    page: str
    text: str

    @property
    def variables(self) -> dict[str, str]:
        """NAME=value in front."""
        return dict(word.split("=", 1) for word in self._all[: len(self._all) - len(self.words)])

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return list(dropwhile(lambda word: re.match(r"[A-Z_0-9]+=", word), self._all))

    @property
    def verb(self) -> str | None:
        """Of segadapt; None: another program."""
        return self.words[1] if self.words[0] == "segadapt" else None

    @property
    def _all(self) -> list[str]:
        return shlex.split(self.text)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[Command]:
    """All commands of a page's bash blocks, in order."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [re.sub(r"(^|\s)#\s.*$", "", line) for line in lines]
    return [Command(name_of(page), " ".join(line.split())) for line in found if line.strip()]


def inline_commands(page: Path) -> list[Command]:
    """`segadapt VERB key=value ...` inside of sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`(segadapt [^`]+)`", text)]
    is_whole = [span.split()[1] in VERBS and "=" in span and "..." not in span for span in spans]
    return [Command(name_of(page), span) for span, whole in zip(spans, is_whole, strict=True) if whole]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link to a file of this repository."""
    found = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    return [((page.parent / file).resolve() if file else page, anchor) for file, anchor in found]


def write_configs(world: Path) -> None:
    """The YAML files of the pages, as they are there but for /data, which is world/data."""
    of_pages = {
        "configs/experiment/mine.yaml": ("README.md", "name: ade20k-c-sd3"),
        "configs/experiment/dusa.yaml": ("docs/reproduce.md", "name: dusa"),
        "configs/data/streets.yaml": ("docs/data.md", "name: streets"),
        "configs/data/own.yaml": ("docs/data.md", "name: own"),
        "configs/grid/mine.yaml": ("docs/grid.md", "# configs/grid/mine.yaml"),
    }
    for file, (page, mark) in of_pages.items():
        (text,) = [block for block in blocks(ROOT / page, "yaml") if mark in block]
        path = world / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("/data/", f"{world}/data/"))
    (world / "configs/streets.txt").write_text("".join(f"class {c}\n" for c in range(150)))


def write_world(world: Path) -> None:
    """Data of two small images, and random models of a few thousand weights, under the names of the documents."""
    for split in ("validation", "training"):
        _draw(world / "data/ade20k/images" / split, world / "data/ade20k/annotations" / split)
    for corruption in COMMON:
        for severity in range(1, 6):
            _draw(world / f"data/ade20k_c/ADE20K_val-c/{corruption}/{severity}/validation", None)
    _draw(None, world / "data/ade20k_c/annotations/validation")
    _draw(world / "data/release_test/testing", None)
    for split in ("val", "test"):
        _draw_cityscapes(world / "data/cityscapes", split)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            _draw(world / f"data/imagenet/{split}" / name, None)
    _draw(world / "photos/images", None)
    _paint(world / "own")
    _draw(world / "streets/photos/test", world / "streets/labels/test", zero_is_ignore=False)
    build_sd3_folder(world / "weights/stable-diffusion-3-medium-diffusers")
    config = {"depths": list(DEPTHS), "hidden_sizes": list(WIDTHS), "num_attention_heads": list(HEADS),
              "sr_ratios": list(REDUCTIONS), "decoder_hidden_size": HEAD_WIDTH}  # fmt: skip
    folder = world / "weights/segformer-b5-finetuned-ade-640-640"
    make_segmenter("segformer", config, 150, seed=0).save(folder)
    make_segmenter("segformer", config, 19).save(world / "weights/segformer-b5-finetuned-cityscapes-1024-1024")
    torch.save(
        nvidia_state(load_file(folder / "model.safetensors")), world / "weights/segformer.b5.640x640.ade.160k.pth"
    )
    mmseg = scramble(MmsegNet(150)).state_dict()
    torch.save({"state_dict": mmseg}, world / "weights/segformer_mit-b5_512x512_160k_ade20k.pth")
    (world / "FOLDER").symlink_to(folder)


def _draw_cityscapes(root: Path, split: str) -> None:
    """One image of a city, with label ids 0 to 33."""
    rng = np.random.default_rng(0)
    for array, path in (
        (
            rng.integers(0, 256, (64, 128, 3), dtype=np.uint8),
            f"leftImg8bit/{split}/ulm/ulm_000000_000019_leftImg8bit.png",
        ),
        (rng.integers(0, 34, (64, 128), dtype=np.uint8), f"gtFine/{split}/ulm/ulm_000000_000019_gtFine_labelIds.png"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / path)


def _paint(own: Path) -> None:
    """Photos and colour masks of two scenes of two frames."""
    colours = np.array([[128, 64, 128], [70, 130, 180], [0, 0, 142], [0, 0, 0]], np.uint8)
    mask_HW3 = colours[np.random.default_rng(0).integers(0, 4, (4, 6))].repeat(16, 0).repeat(16, 1)
    for key in ("town_1", "town_2", "shore_1", "shore_2"):
        for folder in ("photos", "masks"):
            (own / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask_HW3).save(own / folder / f"{key}.png")


def _draw(images: Path | None, labels: Path | None, *, zero_is_ignore: bool = True) -> None:
    """The same two random images and labels wherever they are asked for."""
    rng = np.random.default_rng(0)
    for key, (height, width) in SIZES.items():
        image_HW3 = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        label_HW = rng.integers(0, 4, (height // 16, width // 16)).repeat(16, 0).repeat(16, 1) + zero_is_ignore
        for folder, suffix, array in ((images, "jpg", image_HW3), (labels, "png", label_HW.astype(np.uint8))):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{key}.{suffix}")
