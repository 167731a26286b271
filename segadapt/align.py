"""Compare a converted checkpoint's logits with stored ones, those of the code base that it comes from.

{align.output}/align.json   what the folder was made of; without it a folder is not align's own, and stays as it is

# 3 RGB  H W image px  C classes  h w logits
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils import logging as transformers_logging

from segadapt.config_verbs import AlignConfig
from segadapt.datasets.decode import read_image
from segadapt.errors import UserError
from segadapt.models.build import build_segmenter, refuse_unexpected_weights
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.set_up import count, fingerprint
from segadapt.record import write_bytes, write_json

MAX_PIXELS = 1 << 26  # of an image, as the default of data.max_pixels
RECORD = "align.json"
WRITTEN = {"written_by": "segadapt align"}  # metadata of a reference that this verb wrote


@dataclass(frozen=True)
class Reference:
    """An image, and what the original net says of it."""

    image_3HW: Tensor  # uint8 RGB
    logits_Chw: Tensor  # float32, on the net's own grid


@dataclass(frozen=True)
class Difference:
    """Of two nets' logits on one image."""

    largest: float  # |a - b|
    relative: float  # the same in units of the largest |reference|
    same_class: float  # share of the grid's pixels with the same argmax


def difference(logits_Chw: Tensor, reference_Chw: Tensor) -> Difference:
    """Of logits from those of the reference, in float64."""
    got, wanted = logits_Chw.double(), reference_Chw.double()
    largest = (got - wanted).abs().max().item()
    scale = wanted.abs().max().item()
    return Difference(
        largest,
        largest / scale if scale else float(largest > 0),
        (got.argmax(dim=0) == wanted.argmax(dim=0)).double().mean().item(),
    )


def read_reference(path: str) -> Reference:
    """A safetensors file with `image` and `logits`. UserError: none, a damaged one, or other content."""
    try:
        found = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise UserError(f"align.reference={path} cannot be read ({error}); expected a safetensors file with `image` "
                        "and `logits`. Correct the path, or write it anew.") from error  # fmt: skip
    image, logits = (found.get(name, torch.tensor(0)) for name in ("image", "logits"))
    is_image = image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
    if not is_image or logits.dtype != torch.float32 or logits.ndim != 3:
        held = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in sorted(found.items()))
        raise UserError(f"align.reference={path} holds {held}; expected `image`, uint8 RGB [3, H, W], and `logits`, "
                        "float32 [classes, h, w]. Write it anew.")  # fmt: skip
    return Reference(image, logits)


@torch.no_grad()
def logits_of(segmenter: NetSegmenter, image_3HW: Tensor) -> Tensor:
    """Logits [C, h, w] of a uint8 image, on the CPU in float32."""
    return segmenter.logits(image_3HW[None].float() / 255)[0]


def check_settings(settings: AlignConfig) -> None:
    """UserError: nothing to do, a setting without effect, no such image, or a path where others' files would go."""
    a, short_side_px = settings.align, settings.model.discriminative.short_side_px
    if short_side_px is not None:
        raise UserError(f"model.discriminative.short_side_px={short_side_px}: the image is taken as it is stored. Set "
                        "it to null.")  # fmt: skip
    if (a.reference is None) == (a.write is None):
        raise UserError("align.reference and align.write: expected one of them, the file to compare with or the file "
                        "to write. Set the one, and leave the other null.")  # fmt: skip
    if (a.write is None) != (a.image is None):
        raise UserError("align.write and align.image belong together: the image is what the written reference is of. "
                        "Set both or neither.")  # fmt: skip
    if a.image is not None and not Path(a.image).expanduser().is_file():
        raise UserError(f"align.image={a.image} is not a file; expected an image. Correct the path.")
    if a.write is not None:
        _check_own_reference(a.write)
    output = None if a.output is None else Path(a.output).expanduser()
    if output is not None and (output.is_file() or (_holds_files(output) and not (output / RECORD).is_file())):
        raise UserError(f"align.output={a.output} holds files that align did not write (no {RECORD}); expected a new "
                        "or empty folder, or an earlier output. Choose another folder.")  # fmt: skip


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_own_reference(write: str) -> None:
    """UserError: there is a file that this verb did not write."""
    path = Path(write).expanduser()
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            is_own = file.metadata() == WRITTEN
    except (OSError, SafetensorError):
        is_own = False
    if not is_own:
        raise UserError(f"align.write={write} is there, and align did not write it; expected a new file, as it may be "
                        "another code base's reference. Choose another name.")  # fmt: skip


def run(settings: AlignConfig) -> dict[str, Any]:
    """Load a checkpoint of any layout, strictly; compare it with a reference and save it as a folder, or write one.

    Raises:
        UserError: see check_settings, read_reference, load_segmenter and model.sha256; logits of another shape, or
            further from the reference than align.tolerance, in which case nothing is saved.
    """
    check_settings(settings)
    a, chosen, console = settings.align, settings.model.discriminative, Console()
    transformers_logging.disable_progress_bar()
    reference = None if a.reference is None else read_reference(a.reference)
    segmenter = build_segmenter(chosen, None, torch.device("cpu"))
    said = {"family": segmenter.net.config.model_type, "parameters": count(segmenter.net),
            "sha256": fingerprint(segmenter.net)}  # fmt: skip
    refuse_unexpected_weights(settings.model.sha256, {"discriminative": said["sha256"]})
    lines = [f"{chosen.checkpoint}: {said['family']}, {said['parameters']:,} parameters, no key missing or unexpected"]
    if reference is None:
        image_HW3 = read_image(Path(str(a.image)).expanduser(), max_pixels=MAX_PIXELS, limit=None)
        image_3HW = torch.from_numpy(image_HW3).permute(2, 0, 1).contiguous()
        tensors = {"image": image_3HW, "logits": logits_of(segmenter, image_3HW).contiguous()}
        write_bytes(Path(str(a.write)).expanduser(), save(tensors, metadata=WRITTEN))
        lines.append(f"wrote {a.write}: image and logits {list(tensors['logits'].shape)}")
    else:
        found = compared(segmenter, reference, settings)
        said |= {"largest": found.largest, "relative": found.relative, "same_class": found.same_class}
        lines.append(
            f"largest difference {found.largest:.3g}, {found.relative:.3g} of the largest logit (allowed "
            f"{a.tolerance:g}); the same class at {100 * found.same_class:.2f} % of the pixels"
        )
    if a.output is not None:
        folder = Path(a.output).expanduser()
        write_json(folder / RECORD, {"checkpoint": chosen.checkpoint, "reference": a.reference, **said})
        segmenter.save(folder)
        lines.append(f"saved {a.output}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return said


def compared(segmenter: NetSegmenter, reference: Reference, settings: AlignConfig) -> Difference:
    """How far the net is from the reference. UserError: further than align.tolerance, or logits of another shape."""
    a = settings.align
    logits_Chw = logits_of(segmenter, reference.image_3HW)
    if logits_Chw.shape != reference.logits_Chw.shape:
        stored, own = list(reference.logits_Chw.shape), list(logits_Chw.shape)
        raise UserError(f"align.reference={a.reference}: the stored logits are {stored}, the checkpoint's {own}; "
                        "expected the same net and its own grid. Store the logits before any resize.")  # fmt: skip
    found = difference(logits_Chw, reference.logits_Chw)
    if not found.relative <= a.tolerance:  # NaN too
        raise UserError(
            f"align.reference={a.reference}: the largest difference is {found.largest:.3g}, {found.relative:.3g} of "
            f"the largest logit, and the class is the same at {100 * found.same_class:.2f} % of the pixels; expected "
            f"at most align.tolerance={a.tolerance:g}. Nothing is saved: look for another eps or normalisation."
        )
    return found
