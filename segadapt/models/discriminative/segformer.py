"""SegFormer, with NVIDIA's head or mmsegmentation's, loaded strictly; image -> logits.

# B images  3 RGB  H W image px  C dataset classes  h w logits, ceil(px / 4)
"""

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from segadapt.errors import UserError, did_you_mean
from segadapt.models.checkpoint_errors import explain_checkpoint_errors, local_folder
from segadapt.models.discriminative import keymaps, norm_parameters
from segadapt.models.discriminative.mmseg import MmsegSegformer, MmsegSegformerConfig
from segadapt.models.discriminative.state_file import is_file, read_state

SETTING = "model.discriminative.checkpoint"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1, as in torchvision and in SegFormer's training
IMAGENET_STD = (0.229, 0.224, 0.225)
FAMILIES: dict[str, tuple[type[SegformerConfig], Any]] = {  # by the model_type of config.json
    "segformer": (SegformerConfig, SegformerForSemanticSegmentation),
    "segadapt_segformer_mmseg": (MmsegSegformerConfig, MmsegSegformer),
}


class Segformer:
    """A SegFormer in eval mode with its own preprocessing; gradients on, BatchNorm keeps its source statistics."""

    def __init__(
        self, net: SegformerForSemanticSegmentation | MmsegSegformer, *, gradient_checkpointing: bool = False
    ) -> None:
        self.net = net
        self.short_side_px: int | None = None  # of its own input; None: as loaded
        # on the device from the start: a copy from the host would wait for all that the device was given before
        self._mean_std_2311 = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=net.device)[:, :, None, None]
        if gradient_checkpointing:
            # renamed within transformers 5: 5.17 knows the second name only, 6 will know the first only
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.eval()

    def eval(self) -> "Segformer":
        """Eval mode for every module; call this and not `net.eval()`, which would silently end recompute."""
        self.net.eval()
        for module in self.net.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                # transformers recomputes only if .training: set it on the layer wrappers alone, so that the dropout
                # and drop path inside stay off
                module.training = True
        return self

    def logits(self, image_B3HW: Tensor) -> Tensor:
        """Class scores on the quarter grid; no padding, no resize, whatever the aspect ratio.

        Args:
            image_B3HW: RGB in 0..1 on the device and in the dtype of the net (float32; float64 in tests).
        Returns:
            logits_BChw: float32, cast before anything is computed from them; float64 if the net is.
        """
        mean_311, std_311 = self._mean_std_2311.to(image_B3HW)
        logits_BChw = self.net(pixel_values=(image_B3HW - mean_311) / std_311).logits
        return logits_BChw if logits_BChw.dtype == torch.float64 else logits_BChw.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name."""
        return dict(self.net.named_parameters())

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """Affine weights and biases of the normalisation layers."""
        return norm_parameters(self.net)

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the last encoder stage and of the head: `stages.3`, in older versions of transformers `block.3`."""
        last = len(self.net.config.depths) - 1
        is_top = re.compile(rf"decode_head\.|(.*\.)?(stages|patch_embeddings|block|layer_norm)\.{last}\.")
        return {name: parameter for name, parameter in self.norm_parameters().items() if is_top.match(name)}

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole, the latter last: without it no folder is read.

        Names are not those of `state_dict`, but the ones that were read: of the files that circulate.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
            self.net.save_pretrained(draft)
            (folder / "config.json").unlink(missing_ok=True)
            for path in sorted(Path(draft).iterdir(), key=lambda path: path.name == "config.json"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                path.replace(folder / path.name)


def load_segformer(
    checkpoint: str,
    *,
    revision: str | None = None,
    num_classes: int,
    device: str | torch.device,
    gradient_checkpointing: bool = False,
    allow_pickle: bool = False,
) -> Segformer:
    """Read a SegFormer with its head: float32, eval mode, on `device`.

    Args:
        checkpoint: folder (no network) or hub id, such as nvidia/segformer-b5-finetuned-ade-640-640; or a file of
            NVIDIA's own code or of mmsegmentation, recognised by its keys.
        revision: branch, tag or commit of the hub id.
        num_classes: classes of the data set; the head is never made anew.
        allow_pickle: also read pytorch_model.bin, *.pth and *.pt, with torch's weights-only reader.
    Raises:
        UserError: missing, gated or damaged checkpoint; another architecture; a head with other classes; a key that is
            missing, unexpected or of another shape.
    """
    if allow_pickle:
        _check_torch_reads_pickles_safely(torch.__version__)
    read = _read_file if is_file(checkpoint) else _read_folder
    net, faults = read(checkpoint, revision=revision, num_classes=num_classes, allow_pickle=allow_pickle)
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        to_fit, cure = (
            ("the SegFormer that their shapes describe", "Fetch the file again, complete, from where it was published.")
            if is_file(checkpoint)
            else (
                "their config.json",
                "Use the config that belongs to these weights, or save them anew with save_pretrained.",
            )
        )
        raise UserError(
            f"{SETTING}={checkpoint}: the weights do not fit {to_fit}: {shown}. Expected every key once, in its shape. "
            f"{cure}"
        )
    return Segformer(net.to(device), gradient_checkpointing=gradient_checkpointing)


def _read_folder(
    checkpoint: str, *, revision: str | None, num_classes: int, allow_pickle: bool
) -> tuple[Any, list[str]]:
    """The net of a folder or hub id, and every key at fault, see `_read_weights`."""
    folder = local_folder(checkpoint, SETTING)
    source = str(folder or checkpoint)
    where = {"revision": revision, "local_files_only": folder is not None}
    if not allow_pickle and folder and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"{SETTING}={checkpoint} holds only pickled weights (*.bin), which can carry code; expected "
            f"model.safetensors. Convert it, or set model.discriminative.allow_pickle=true if you trust its author."
        )
    with explain_checkpoint_errors("discriminative model", checkpoint, SETTING):
        found, _ = SegformerConfig.get_config_dict(source, **where)
        # transformers takes a missing config.json for an empty one and would build its default architecture
        if found.get("model_type") not in FAMILIES:
            raise UserError(
                f"{SETTING}={checkpoint}: config.json has model_type {found.get('model_type')!r}; expected "
                f"{' or '.join(map(repr, FAMILIES))}. Give the folder or id of a SegFormer with a segmentation head."
            )
        kind, net_kind = FAMILIES[found["model_type"]]
        config = kind.from_dict(found)
        _check_classes(checkpoint, config.num_labels or 0, num_classes)
        safe = None if allow_pickle else True
        return _read_weights(net_kind, source, config=config, use_safetensors=safe, **where)


def _read_file(checkpoint: str, *, revision: str | None, num_classes: int, allow_pickle: bool) -> tuple[Any, list[str]]:
    """The net of a file of NVIDIA or mmsegmentation, and every key at fault, under the names of transformers' modules.

    NVIDIA's weights get the class of transformers, and its LayerNorm eps of 1e-5 throughout, as NVIDIA's own files on
    the hub do; NVIDIA's code has 1e-6 in blocks and behind stages, which is less than 1e-4 of the logits.
    """
    state = read_state(checkpoint, SETTING, allow_pickle=allow_pickle)
    layout = keymaps.recognise(state)
    if layout is None:
        hint = (
            "These are names of transformers: give the folder, which holds config.json beside this file."
            if keymaps.is_of_transformers(state)
            else "Give a SegFormer of one of these, or a folder or hub id."
        )
        raise UserError(
            f"{SETTING}={checkpoint}: its {len(state)} keys, {min(state)} and others, are not those of "
            f"{' or '.join(one.name for one in keymaps.LAYOUTS)}. {hint}"
        )
    if not any(key.startswith("decode_head.") for key in state):
        raise UserError(
            f"{SETTING}={checkpoint}: an encoder of {layout.name} alone; expected also the keys decode_head.* of a "
            f"trained head. Give the file of a segmenter."
        )
    state = keymaps.renamed(state, layout)
    sizes, missing = keymaps.sizes(state, layout)
    if missing:
        return None, [f"{key} is missing" for key in missing]
    _check_classes(checkpoint, sizes["num_labels"], num_classes)
    kind, net_kind = FAMILIES[layout.model_type]
    return _read_weights(net_kind, None, config=kind(**sizes), state_dict=state)


def _check_classes(checkpoint: str, found: int, expected: int) -> None:
    """UserError: the head has other classes than the data set."""
    if found != expected:
        raise UserError(
            f"{SETTING}={checkpoint}: its head has {found} classes, but the data set has {expected}. Choose a "
            f"checkpoint trained on this data set; a head is never made anew."
        )


def build_segformer(
    config: Mapping[str, Any],
    num_classes: int,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
) -> Segformer:
    """A SegFormer with random weights, for training; float32.

    Args:
        config: keyword arguments of SegformerConfig (depths, hidden_sizes ...); id2label may name the classes.
        seed: the weights depend on it alone; the global generator is left as it was.
    Raises:
        UserError: a key that SegformerConfig does not have, or id2label of another length.
    """
    known = {field.name for field in fields(SegformerConfig)}
    for key in config:
        if key not in known:
            raise UserError(
                f"model.discriminative.config.{key} is not a setting of SegFormer.{did_you_mean(key, known)}"
            )
    id2label = dict(config.get("id2label") or {index: f"class_{index}" for index in range(num_classes)})
    if len(id2label) != num_classes:
        raise UserError(
            f"model.discriminative.config.id2label names {len(id2label)} classes, but the data set has {num_classes}. "
            f"Name every class once, or leave it out."
        )
    label2id = {label: index for index, label in id2label.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SegformerForSemanticSegmentation(
            SegformerConfig(**{**config, "id2label": id2label, "label2id": label2id})
        )
    net.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    return Segformer(net, gradient_checkpointing=gradient_checkpointing)


def _check_torch_reads_pickles_safely(version: str) -> None:
    """UserError: torch before 2.10, whose weights-only reader can run code (CVE-2025-32434, CVE-2026-24747)."""
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise UserError(
            f"model.discriminative.allow_pickle=true with torch {version}: its weights-only reader can run code from "
            f"the file; expected torch 2.10 or later. Upgrade torch, or use a checkpoint with safetensors."
        )


def _read_weights(kind: Any, source: str | None, **options: Any) -> tuple[Any, list[str]]:
    """The net, and every key at fault in words; a net with faults is for the message only, never for use.

    Args:
        source: folder or hub id; None: the weights are in options["state_dict"].
    """
    options = options | {"dtype": torch.float32, "output_loading_info": True}
    with without_load_report():
        try:
            net, info = kind.from_pretrained(source, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # the library's error names no key: read once more to name them, and drop what was read
            _, info = kind.from_pretrained(source, ignore_mismatched_sizes=True, **options)
            net = None
    shapes = sorted((key, tuple(got), tuple(wanted)) for key, got, wanted in info["mismatched_keys"])
    return net, [
        *(f"{key} has shape {got}, expected {wanted}" for key, got, wanted in shapes),
        *(f"{key} is missing" for key in sorted(info["missing_keys"])),
        *(f"{key} is unexpected" for key in sorted(info["unexpected_keys"])),
    ]


@contextmanager
def without_load_report():
    """Keep the library's own table of bad keys off the terminal: our one line says it."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
