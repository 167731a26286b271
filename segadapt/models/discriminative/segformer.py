"""The discriminative model: SegFormer of transformers, loaded strictly; image -> logits.

# B images  3 RGB  H W image px  C dataset classes  h w logits, ceil(px / 4)
"""

import re
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

from segadapt.datasets.resize import scale
from segadapt.errors import UserError, did_you_mean
from segadapt.models.checkpoint_errors import explain_checkpoint_errors, local_folder

SETTING = "model.discriminative.checkpoint"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1, as in torchvision and in SegFormer's training
IMAGENET_STD = (0.229, 0.224, 0.225)
NORM_TYPES = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Segmenter:
    """A SegFormer in eval mode with its own preprocessing; gradients on, BatchNorm keeps its source statistics."""

    def __init__(self, net: SegformerForSemanticSegmentation, *, gradient_checkpointing: bool = False) -> None:
        self.net = net
        self.short_side_px: int | None = None  # of its own input; None: as loaded
        self.num_classes = len(net.config.id2label or {})
        # on the device from the start: a copy from the host would wait for all that the device was given before
        self._mean_std_2311 = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=net.device)[:, :, None, None]
        if gradient_checkpointing:
            # renamed within transformers 5: 5.17 knows the second name only, 6 will know the first only
            enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.eval()

    def eval(self) -> "Segmenter":
        """Eval mode for every module; call this and not `net.eval()`, which would silently end recompute."""
        self.net.eval()
        for module in self.net.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                # transformers recomputes only if .training: set it on the layer wrappers alone, so that the dropout
                # and drop path inside stay off
                module.training = True
        return self

    def fit(self, image_3HW: Tensor) -> Tensor:
        """The loaded image at the segmenter's own short side; before `logits`, which takes any size."""
        return scale(image_3HW, self.short_side_px)

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
        """Affine weights and biases of the normalisation layers, found by type: names differ between versions."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.net.named_modules()
            if isinstance(module, NORM_TYPES)
            for name, parameter in module.named_parameters(recurse=False)
        }

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the last encoder stage and of the head: `stages.3`, in older versions of transformers `block.3`."""
        last = len(self.net.config.depths) - 1
        is_top = re.compile(rf"decode_head\.|(.*\.)?(stages|patch_embeddings|block|layer_norm)\.{last}\.")
        return {name: parameter for name, parameter in self.norm_parameters().items() if is_top.match(name)}

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; `state_dict` has other names than the files that circulate."""
        self.net.save_pretrained(folder)


def load_segformer(
    checkpoint: str,
    *,
    revision: str | None = None,
    num_classes: int,
    device: str | torch.device,
    gradient_checkpointing: bool = False,
    allow_pickle: bool = False,
) -> Segmenter:
    """Read a SegFormer with its head from a folder (no network) or the hub: float32, eval mode, on `device`.

    Args:
        checkpoint: folder or hub id, such as nvidia/segformer-b5-finetuned-ade-640-640.
        revision: branch, tag or commit of the hub id.
        num_classes: classes of the data set; the head is never made anew.
        allow_pickle: also read pytorch_model.bin, with torch's weights-only reader.
    Raises:
        UserError: missing, gated or damaged checkpoint; another architecture; a head with other classes; a key that is
            missing, unexpected or of another shape.
    """
    folder = local_folder(checkpoint, SETTING)
    source = str(folder or checkpoint)
    where = {"revision": revision, "local_files_only": folder is not None}
    if allow_pickle:
        _check_torch_reads_pickles_safely(torch.__version__)
    elif folder and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"{SETTING}={checkpoint} holds only pickled weights (*.bin), which can carry code; expected "
            f"model.safetensors. Convert it, or set model.discriminative.allow_pickle=true if you trust its author."
        )
    with explain_checkpoint_errors("discriminative model", checkpoint, SETTING):
        found, _ = SegformerConfig.get_config_dict(source, **where)
        _check_architecture(found, checkpoint)
        config = SegformerConfig.from_dict(found)
        if config.num_labels != num_classes:
            raise UserError(
                f"{SETTING}={checkpoint}: its head has {config.num_labels} classes, but the data set has "
                f"{num_classes}. Choose a checkpoint trained on this data set; a head is never made anew."
            )
        options = where | {"config": config, "dtype": torch.float32, "output_loading_info": True}
        net, faults = _read_weights(source, use_safetensors=None if allow_pickle else True, **options)
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise UserError(
            f"{SETTING}={checkpoint}: the weights do not fit their config.json: {shown}. Expected every key once, "
            f"in its shape. Use the config that belongs to these weights, or save them anew with save_pretrained."
        )
    return Segmenter(net.to(device), gradient_checkpointing=gradient_checkpointing)


def build_segformer(
    config: Mapping[str, Any],
    num_classes: int,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
) -> Segmenter:
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
    return Segmenter(net, gradient_checkpointing=gradient_checkpointing)


def _check_torch_reads_pickles_safely(version: str) -> None:
    """UserError: torch before 2.10, whose weights-only reader can run code (CVE-2025-32434, CVE-2026-24747)."""
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise UserError(
            f"model.discriminative.allow_pickle=true with torch {version}: its weights-only reader can run code from "
            f"the file; expected torch 2.10 or later. Upgrade torch, or use a checkpoint with safetensors."
        )


def _check_architecture(found: Mapping[str, Any], checkpoint: str) -> None:
    # transformers takes a missing config.json for an empty one and would build its default architecture
    if found.get("model_type") != "segformer":
        raise UserError(
            f"{SETTING}={checkpoint}: config.json has model_type {found.get('model_type')!r}; expected 'segformer'. "
            f"Give the folder or id of a SegFormer with a segmentation head."
        )


def _read_weights(source: str, **options: Any) -> tuple[Any, list[str]]:
    """The net, and every key at fault in words; a net with faults is for the message only, never for use."""
    read: Any = SegformerForSemanticSegmentation.from_pretrained
    with without_load_report():
        try:
            net, info = read(source, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # the library's error names no key: read once more to name them, and drop what was read
            _, info = read(source, ignore_mismatched_sizes=True, **options)
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
