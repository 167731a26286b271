"""The segmenter as it came: every image predicted, nothing learned. Methods that learn build on it.

B images (1)   C classes   3 RGB   H W image px   h w logits, ceil(px / 4)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from segadapt.config import DataSettings
from segadapt.datasets.resize import scale
from segadapt.models.discriminative import Segmenter
from segadapt.models.precision import autocast
from segadapt.models.recording import Memory, recorder_of

NO_NORMS = (
    "tta.method moves normalisation layers, but the segmenter has none that it may move. Choose one that moves all its "
    "weights (generative, cotta, memo), with model.update.update_norm_only=false."
)


@dataclass
class NoOptions:
    """Of a method that has none. Another lists every `tta.options`; their values are in conf/tta/NAME.yaml."""


@dataclass(frozen=True)
class Prediction:
    """What one step returns; the logits are the only ones that are scored, see `Source.scored`."""

    logits_Chw: Tensor  # float32, detached, raw
    is_finite: bool  # all of them
    loss: float | None = None  # None: no generative loss was asked for
    grad_norm: float | None = None  # of all moving parameters together
    is_updated: bool = False  # its gradient is used, now or in a later step; False: none or zero, not finite, refused
    is_refused: bool = False  # finite, but teacher and segmenter agree on more pixels than trust.max_agreement
    candidates: tuple[int, ...] = ()  # classes asked about, each window
    kept: float | None = None  # share of latent pixels that count
    agreement: float | None = None  # mean share of draws that decide for the same class; None with one draw
    teacher_agrees: float | None = None  # share of the asked pixels where teacher and segmenter decide alike
    is_guided: bool | None = None  # windows where the segmenter is unsure; False: the grid's; None: not asked for

    @property
    def is_step_finite(self) -> bool:
        """Loss and gradient, where there are any."""
        return all(math.isfinite(value) for value in (self.loss, self.grad_norm) if value is not None)


def segmenting(
    segmenter: Segmenter, precision: str, memory: Memory | None, moving: Sequence[nn.Parameter]
) -> Callable[[Tensor], Sequence[Tensor | None]]:
    """Images [B, 3, H, W] to logits [B, C, h, w], float32; recorded where there is a memory."""

    def forward(image_B3HW: Tensor) -> tuple[Tensor]:
        with autocast(image_B3HW.device, precision):
            return (segmenter.logits(image_B3HW),)

    return recorder_of(forward, memory, moving)


class Source:
    """A method that moves nothing.

    Attributes:
        has_teacher: it needs a generative model.
        learns: what it found in one image changes how it predicts the next, unless it is reset.
        scored: which prediction `step` returns, for the protocol line.

    Args:
        segmenter: on the main device.
        seed: all draws come from (seed, task, image key, purpose).
        precision: 'bf16' (autocast over float32 weights) or 'fp32'.
        memory: where the segmenter's work is recorded, to be replayed for images of the same size; None: it is not.
        moving: parameters of the segmenter that a method built on this one moves, by name; all others are frozen.
    """

    has_teacher: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    scored: ClassVar[str] = "before the update"
    Options: ClassVar[type] = NoOptions

    def __init__(
        self,
        segmenter: Segmenter,
        *,
        seed: int,
        precision: str,
        memory: Memory | None = None,
        moving: Mapping[str, nn.Parameter] | None = None,
    ):
        self.segmenter, self.seed, self.precision = segmenter, seed, precision
        self.device = next(segmenter.net.parameters()).device
        self.moving = dict(moving or {})
        segmenter.net.requires_grad_(False)
        for module in segmenter.net.modules():  # a method of the same process may have set it, see methods/bn.py
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                vars(module).pop("forward", None)
        for parameter in self.moving.values():
            parameter.requires_grad_(True)
        # no method of this class: a cycle would keep the weights of one run into the next
        self._segment = segmenting(segmenter, precision, memory, list(self.moving.values()))

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What may move, by name with the model's prefix; all else stays bit-equal."""
        return {f"discriminative.{name}": parameter for name, parameter in self.moving.items()}

    def source_data(self, data: DataSettings) -> DataSettings | None:
        """Which unlabelled source images `see_source` shall be given, from the test data's settings; None: none."""
        return None

    def see_source(self, images_3HW: Iterable[Tensor]) -> None:
        """What a method takes from them; at the source weights, once, and no reset undoes it."""

    def reset(self) -> None:
        """Back to the state before the first image."""

    def flush(self) -> None:
        """What still waits for an update; for the end of a task."""

    def forget(self) -> None:
        """Drop the gradients of an image that an error broke off: the next one's would be added to them."""
        for parameter in self.parameters().values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """All that the next image depends on beside the source weights: what `checkpoint.encode` takes, not copied."""
        return {}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """As it was when `state_dict` gave these values, whose tensors are copied and may be on any device."""

    def save(self, folder: str | Path) -> None:
        """The segmenter as it predicts now, as a folder that its loader reads."""
        self.segmenter.save(folder)

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        """Predict one image.

        Args:
            image_3HW: float32 RGB in 0..1, already at the short side of the configuration; any device.
            task, key: name the image.
        """
        scored_Chw = self.logits(self.fit(image_3HW))[0].detach()
        return Prediction(scored_Chw, bool(scored_Chw.isfinite().all()))

    def fit(self, image_3HW: Tensor) -> Tensor:
        """The loaded image on the main device, at the segmenter's own short side."""
        return scale(image_3HW.to(self.device, non_blocking=True), self.segmenter.short_side_px)

    def logits(self, image_3HW: Tensor) -> Tensor:
        """The segmenter's [1, C, h, w], float32; with a graph if it learns."""
        with torch.set_grad_enabled(bool(self.moving)):
            (logits_BChw,) = self._segment(image_3HW[None])
        assert logits_BChw is not None
        return logits_BChw

    def autocast(self) -> torch.autocast | nullcontext:
        """As the settings say; see models/precision.py."""
        return autocast(self.device, self.precision)
