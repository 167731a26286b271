"""The objective of training: a weighted sum of the losses that are on.

B images  C classes  H W label px  h w logits  D feature channels, then embedding width  y x features
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from segadapt.config_training import ContrastSettings, LossesSettings
from segadapt.datasets.labels import IGNORE
from segadapt.errors import UserError
from segadapt.losses import contrast, region
from segadapt.losses.cross_entropy import cross_entropy, focal, ohem
from segadapt.losses.masks import MaskLoss
from segadapt.losses.memory import Memory, pixels_at
from segadapt.models.discriminative import Outputs
from segadapt.models.precision import at_least_float32
from segadapt.seeds import derive, torch_generator

IDLE_STEPS = 50  # in which no anchor was found: a term that is on and does nothing

# Name under train.losses -> (logits_BCHW, label_BHW, its settings, class_weights_C, reduction) to a scalar.
LOSSES: dict[str, Callable[[Tensor, Tensor, Any, Tensor | None, str], Tensor]] = {
    "cross_entropy": lambda logits, label, _, weights, reduction: cross_entropy(
        logits, label, class_weights_C=weights, reduction=reduction
    ),
    "ohem": lambda logits, label, own, weights, _: ohem(
        logits, label, threshold=own.threshold, min_kept=own.min_kept, class_weights_C=weights
    ),
    "focal": lambda logits, label, own, weights, reduction: focal(
        logits, label, gamma=own.gamma, class_weights_C=weights, reduction=reduction
    ),
    "lovasz": lambda logits, label, *_: region.lovasz_softmax(logits, label),
    "dice": lambda logits, label, own, *_: region.dice(logits, label, smooth=own.smooth),
    "rmi": lambda logits, label, own, *_: region.rmi(logits, label, share=own.share),
}


@dataclass(frozen=True)
class Terms:
    """Of one call: what is minimised, and what it is made of. A loss that is off is in neither dict."""

    total: Tensor  # scalar with a graph: of weights x values x the shares that were given
    values: dict[str, Tensor]  # scalars without, before their weight
    weights: dict[str, float]  # of this step: that of contrast is 0 before its warm-up ends


class Objective(nn.Module):
    """The losses of the settings, with the parameters and buffers that some of them have.

    Parameters: the projection of the contrast loss, which learns at the head's rate. Buffers, part of the state dict:
    the memory, equal on all ranks, and the count of idle steps, see `refuse_idle`. Random draws depend on (seed, step,
    rank, call of the step) alone.

    Args:
        class_weights_C: see class_weights_of.
        feature_channels: of Outputs.features_BDyx.
        num_queries: of Outputs.queries; None: the net has none.
    """

    idle_steps: Tensor
    class_weights_C: Tensor | None

    def __init__(
        self,
        settings: LossesSettings,
        *,
        num_classes: int,
        feature_channels: int,
        class_weights_C: Tensor | None,
        seed: int,
        num_queries: int | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.num_classes, self.seed = settings, num_classes, seed
        self.register_buffer("class_weights_C", class_weights_C, persistent=False)
        self.masks = None
        if settings.masks.weight:
            assert num_queries is not None, "the caller refuses such nets"
            self.masks = MaskLoss(settings.masks, num_classes=num_classes, num_queries=num_queries)
        self.projection, self.memory, own = None, None, settings.contrast
        if own.weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, "projection"))
                self.projection = contrast.Projection(feature_channels, own.width, kind=own.projection)
            self.register_buffer("idle_steps", torch.zeros((), dtype=torch.int64))
        if own.weight and own.memory.enabled:
            self.memory = Memory(
                num_classes,
                own.width,
                region_rows=own.memory.region_rows,
                pixel_rows=own.memory.pixel_rows,
                pixels_per_image=own.memory.pixels_per_image,
            )
        self._step, self._calls = 0, 0

    def forward(self, outputs: Outputs, label_BHW: Tensor, *, step: int, shares_T: Tensor | None = None) -> Terms:
        """Losses in float32 (float64 stays), whatever autocast the caller is in; logits are resized to the label.

        Args:
            label_BHW: int64, 0..C-1 or 255, on the device of the outputs.
            step: number of the optimizer step that these outputs are for, from 1.
            shares_T: of each term in that of the whole step, see `amounts`; None: these labels are all.
        Raises:
            UserError: the auxiliary loss is on, and the net has no auxiliary head.
        """
        s, values, weights = self.settings, {}, {}
        with torch.autocast(label_BHW.device.type, enabled=False):
            on = [name for name in LOSSES if getattr(s, name).weight]
            logits_BCHW = at_label_size(outputs.logits_BChw, label_BHW) if on else outputs.logits_BChw
            for name in on:
                own = getattr(s, name)
                weights[name] = own.weight
                values[name] = LOSSES[name](logits_BCHW, label_BHW, own, self.class_weights_C, s.reduction)
            if s.auxiliary.weight:
                if outputs.auxiliary_BChw is None:
                    raise UserError(f"train.losses.auxiliary.weight={s.auxiliary.weight}, but the network has no "
                                    "auxiliary head. Set it to 0.")  # fmt: skip
                weights["auxiliary"] = s.auxiliary.weight
                values["auxiliary"] = self._cross_entropy(outputs.auxiliary_BChw, label_BHW)
            if s.stages.weight:
                assert outputs.stages_BChw, "train.build_objective refuses a net without stages"
                weights["stages"] = s.stages.weight
                of_stages = [self._cross_entropy(logits_BChw, label_BHW) for logits_BChw in outputs.stages_BChw]
                values["stages"] = torch.stack(of_stages).sum()
            if self.masks is not None:
                assert outputs.queries is not None
                values |= self.masks(outputs.queries, label_BHW)
                weights |= self.masks.weights
        if s.contrast.weight:
            # computed before its time too, times 0: every rank sees every parameter used, and the memory fills
            weights["contrast"] = s.contrast.weight if step > s.contrast.warmup_iters else 0.0
            values["contrast"] = self._contrast(outputs, label_BHW, s.contrast, step)
        each_T = torch.stack([weights[name] * value for name, value in values.items()])
        total = (each_T if shares_T is None else each_T * shares_T).sum()
        return Terms(total, {name: value.detach() for name, value in values.items()}, weights)

    def _cross_entropy(self, logits_BChw: Tensor, label_BHW: Tensor) -> Tensor:
        """Of outputs beside the last."""
        logits_BCHW = at_label_size(logits_BChw, label_BHW)
        reduction = self.settings.reduction
        return cross_entropy(logits_BCHW, label_BHW, class_weights_C=self.class_weights_C, reduction=reduction)

    def _contrast(self, outputs: Outputs, label_BHW: Tensor, own: ContrastSettings, step: int) -> Tensor:
        assert self.projection is not None
        embedding_BDyx = self.projection(outputs.features_BDyx)
        with torch.autocast(label_BHW.device.type, enabled=False):
            generator = self._generator(step)
            label_Byx = contrast.label_on_grid(label_BHW, embedding_BDyx.shape[2:])
            anchors = contrast.choose_anchors(
                label_Byx,
                resized(at_least_float32(outputs.logits_BChw.detach()), embedding_BDyx.shape[2:]).argmax(dim=1),
                num_classes=self.num_classes,
                max_samples=own.max_samples,
                max_views=own.max_views,
                min_views=own.min_views,
                fill=own.fill,
                generator=generator,
            )
            rows = None
            if self.memory is not None:
                m = own.memory
                rows = self.memory.read(m.read_rows, min_filled=m.min_filled, generator=generator)
                self.memory.keep(embedding_BDyx, label_Byx, generator)
            loss, counted = contrast.pixel_contrast(
                pixels_at(embedding_BDyx, anchors.pixel_S),
                anchors,
                temperature=own.temperature,
                base_temperature=own.base_temperature,
                memory=rows,
                negatives=own.memory.negatives,
                hardest_share=own.memory.hardest_share,
            )
        is_new_step = self._calls == 0
        self.idle_steps.copy_(torch.where(counted > 0, 0, self.idle_steps + is_new_step))
        return loss

    def refuse_idle(self, iters: int) -> None:
        """Ask all ranks together, once in a while: it waits for the device. Then each has the fewest idle steps of all.

        So a checkpoint tells what holds for all ranks, whichever of them writes it.

        Args:
            iters: optimizer steps of the training, which may be less than IDLE_STEPS.
        Raises:
            UserError: the contrast loss is on, and in so many steps no rank has found an anchor with a positive.
        """
        own, most = self.settings.contrast, min(IDLE_STEPS, iters)
        if not own.weight:
            return
        if dist.is_initialized():
            dist.all_reduce(self.idle_steps, dist.ReduceOp.MIN)
        if self.idle_steps < most:
            return
        wanted = f"more than max_views={own.max_views}" if own.min_views is None else f"min_views={own.min_views}"
        raise UserError(
            f"train.losses.contrast.weight={own.weight}: in the last {most} steps no anchor had another of its class, "
            f"so it does nothing. A class of an image takes part with {wanted} pixels on the grid of the features, and "
            f"none does where more than max_samples={own.max_samples} of them would. Set "
            "train.losses.contrast.min_views lower, max_samples higher, or weight=0."
        )

    def _generator(self, step: int) -> torch.Generator:
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step
        rank = dist.get_rank() if dist.is_initialized() else 0
        return torch_generator(self.seed, "contrast", step, rank, self._calls)

    def amounts(self, label_BHW: Tensor) -> Tensor:
        """What the mean of each term over these labels divides by: parts of a step count by their share of it.

        Of terms that are no mean over pixels or masks, what cross-entropy divides by.

        Returns:
            float64 [T], T the terms in the order of Terms.values, on the device of the label.
        """
        s, pixels = self.settings, self._pixels(label_BHW)
        before = sum(bool(getattr(s, name).weight) for name in (*LOSSES, "auxiliary", "stages"))
        masks = [] if self.masks is None else [*self.masks.amounts(label_BHW)]
        return torch.stack([*[pixels] * before, *masks, *[pixels] * bool(s.contrast.weight)])

    def _pixels(self, label_BHW: Tensor) -> Tensor:
        """What cross-entropy divides by: a scalar, float64."""
        is_labelled_BHW = label_BHW != IGNORE
        if self.settings.reduction == "all":
            is_labelled_BHW = torch.ones_like(is_labelled_BHW)
        elif self.class_weights_C is not None:
            weight_BHW = self.class_weights_C.double()[label_BHW.masked_fill(~is_labelled_BHW, 0)]
            return weight_BHW.masked_fill(~is_labelled_BHW, 0).sum()
        return is_labelled_BHW.sum().double()

    def remember(self) -> None:
        """After the optimizer's step, on every rank: write the rows of the calls since the last time."""
        if self.memory is not None:
            self.memory.write()


def resized(logits_BChw: Tensor, size: torch.Size) -> Tensor:
    """Bilinear."""
    return F.interpolate(logits_BChw, size=size, mode="bilinear", align_corners=False)


def at_label_size(logits_BChw: Tensor, label_BHW: Tensor) -> Tensor:
    """Logits for each pixel of the label: [B, C, H, W], float32. Never the label at the size of the logits."""
    return resized(at_least_float32(logits_BChw), label_BHW.shape[1:])
