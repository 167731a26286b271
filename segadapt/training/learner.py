"""Forward and backward of a step, where each process has all layers: alone, as a copy, or with shards and slices.

B images of a micro-batch   3 RGB   H W crop px   M micro-batches   T terms of the objective
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig
from segadapt.losses import LOSSES, losses_on
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.precision import autocast
from segadapt.seeds import derive
from segadapt.training.gradients import average, synchronised
from segadapt.training.parallel import World, spread
from segadapt.training.recorded import RecordedOutputs, is_recorded, memory_of
from segadapt.training.sharded import whole

Losses = list[dict[str, Tensor]]  # of each micro-batch: the sum, under "loss", and its terms


class Learner(nn.Module):
    """Images and labels to the loss: one module, as DDP and FSDP see what goes in, comes out, and moves.

    Args:
        outputs: those of the segmenter, compiled or recorded; None: as they are.
    """

    def __init__(
        self,
        segmenter: NetSegmenter,
        objective: nn.Module,
        *,
        precision: str,
        outputs: Callable[[Tensor], Any] | None = None,
    ):
        super().__init__()
        self.net, self.objective, self._precision = segmenter.net, objective, precision
        self._outputs = outputs or segmenter.outputs

    def forward(
        self, image_B3HW: Tensor, label_BHW: Tensor, step: int, shares_T: Tensor | None = None
    ) -> tuple[Tensor, dict, dict]:
        """The objective's total, values and weights at a step, counted from 1; see `Objective.forward`."""
        with autocast(image_B3HW.device, self._precision):
            outputs = self._outputs(image_B3HW)
        terms = self.objective(outputs, label_BHW, step=step, shares_T=shares_T)
        return terms.total, terms.values, terms.weights


class AllLayers:
    """What `Pipeline` does with some of the layers, with all of them. Make it before the optimizer: see `spread`."""

    def __init__(self, settings: TrainConfig | PretrainConfig, segmenter: NetSegmenter, objective: Any, world: World):
        self._seed, self._net, self._world = settings.experiment.seed, segmenter.net, world
        precision, outputs = settings.runtime.precision, None
        self._recorded: RecordedOutputs | None = None
        if isinstance(settings, TrainConfig) and is_recorded(settings, segmenter):
            on = losses_on(settings.train.losses)
            outputs = self._recorded = RecordedOutputs(
                segmenter, memory_of(segmenter.net), precision=precision, asked=settings.train.recorded,
                reads_logits=any(name in LOSSES for name in on), reads_features="contrast" in on,
            )  # fmt: skip
        elif settings.runtime.compile:
            outputs = torch.compile(segmenter.outputs)
        self._objective = objective
        learner = Learner(segmenter, objective, precision=precision, outputs=outputs)
        self._learner = spread(learner, segmenter.net, world, is_recorded=self._recorded is not None)

    def backward(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], shares_MT: Tensor | None, step: int
    ) -> tuple[Losses, dict[str, float]]:
        """Gradients of a step; its losses, and the weights of their terms.

        Args:
            micro_batches: images, float [B, 3, H, W] in 0..1, and labels, int64 [B, H, W].
            shares_MT: of the micro-batches' terms in the means of the step, see `Objective.amounts`; None: of one
                that is all of it.
            step: from 1.
        """
        found: Losses = []
        weights: dict[str, float] = {}
        for number, (image_B3HW, label_BHW) in enumerate(micro_batches):
            # dropout and drop path draw from the global generator
            torch.manual_seed(derive(self._seed, "training", step - 1, number, self._world.part))
            with synchronised(self._learner, last=number == len(micro_batches) - 1):
                shares_T = None if shares_MT is None else shares_MT[number]
                total, values, weights = self._learner(image_B3HW, label_BHW, step, shares_T)
                (total * self._world.parts).backward()  # the processes' gradients are averaged
            found.append({"loss": total.detach(), **values})
        if self._recorded is not None and self._world.parts > 1:
            own = [parameter.grad for parameter in self._objective.parameters() if parameter.grad is not None]
            for gradient in (self._recorded.gradient, *own):
                average(gradient, self._world)
        return found, weights

    def close(self) -> None:
        """Let go of what is recorded."""
        if self._recorded is not None:
            self._recorded.close()

    def told(self, rates: Mapping[str, float], found: Losses, weights: dict[str, float]) -> Any:
        """Rates by group, losses and weights, in every process."""
        return rates, found, weights

    def buffers(self) -> dict[str, Tensor]:
        """Of the net, made the same in all processes, which ask for it together."""
        self._world.share_buffers(self._net)
        return dict(self._net.named_buffers())

    def gather(self, state: Mapping[str, Tensor]) -> None:
        """Fill the state of a net that no process has parts of; all ask for it together."""
        self.buffers()
        for name, value in self._net.state_dict().items():
            state[name].copy_(whole(value))
