"""What a segmenter is: image to logits. Ours are in segmenter.py and families.py; yours needs the same members.

B images   3 RGB   H W image px   C dataset classes   h w logits, of any stride   D feature channels   y x features
L layers   Q queries   n C classes and no object
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)  # Batch- and InstanceNorm


@dataclass(frozen=True)
class Queries:
    """Raw class and mask logits of a net that answers with masks, layer by layer, the last one last."""

    class_LBQn: tuple[Tensor, ...]
    mask_LBQhw: tuple[Tensor, ...]


@dataclass(frozen=True)
class Outputs:
    """What training asks a net for; adaptation and scores take `Segmenter.logits` alone."""

    logits_BChw: Tensor  # raw
    auxiliary_BChw: Tensor | None  # of an auxiliary head in train mode, on a grid of its own
    features_BDyx: Tensor  # for the contrast loss; of a convolutional encoder its map, else what the classifier sees
    stages_BChw: tuple[Tensor, ...] = ()  # raw, in train mode, of the stages before the last of a net that refines them
    queries: Queries | None = None  # for the loss `masks`


class Segmenter(Protocol):
    """The discriminative model, in eval mode on its device, with its own preprocessing.

    Attributes:
        short_side_px: images reach `logits` resized to this short side, px; None: as they were loaded. A run sets it to
            model.discriminative.short_side_px.
    """

    short_side_px: int | None

    @property
    def net(self) -> nn.Module:
        """All weights: their device is the segmenter's, their hash is in the results; methods freeze what must not
        move, and those that change BatchNorm find it here."""
        ...

    def logits(self, image_B3HW: Tensor) -> Tensor:
        """Raw class scores, [B, C, h, w], float32 also under autocast, with a graph where a parameter moves.

        Rows and columns cover the image evenly (align_corners=False), in as many as the net has. The same image gives
        the same logits: no dropout. What is recorded on a GPU (runtime.compile) must not wait for it.

        Args:
            image_B3HW: float32 RGB in 0..1 on the net's device, any size; normalise it here.
        """
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that may move, by name."""
        ...

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """Those of normalisation layers, under the same names; `norm_parameters` finds them by type."""
        ...

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        """Of these the ones of the last stage and of the head, which SAR leaves as they are; may be empty."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the weights as they are now into a folder, which may be new (tta.save_adapted)."""
        ...


def norm_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Affine weights and biases of a net's normalisation layers, found by type: names differ between versions."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in net.named_modules()
        if isinstance(module, NORM_TYPES)
        for name, parameter in module.named_parameters(recurse=False)
    }
