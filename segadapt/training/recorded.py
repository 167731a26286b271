"""A segmenter's forward and backward as CUDA graphs: for nets whose kernels take the CPU longer to launch than the GPU.

B images of a micro-batch   3 RGB   H W crop px
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.models.discriminative import Outputs
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.precision import autocast
from segadapt.models.recording import Graphs, Memory, Piece, Recorder


def is_recorded(settings: TrainConfig, segmenter: NetSegmenter) -> bool:
    """As train.recorded says; where it is null, wherever it can be, of families that are tested so."""
    if settings.train.recorded is None:
        return segmenter.family.can_record and _obstacle(settings, segmenter.net.device) is None
    return settings.train.recorded


def refuse_recorded(settings: TrainConfig, device: torch.device) -> None:
    """UserError: train.recorded=true with settings, or on a device, that CUDA graphs are not made for."""
    if settings.train.recorded and (said := _obstacle(settings, device)):
        raise UserError(f"train.recorded=true {said}")


def _obstacle(settings: TrainConfig, device: torch.device) -> str | None:
    """What cannot be recorded, and the remedy; None: all can."""
    t = settings.train
    if settings.runtime.compile:
        return "with runtime.compile=true: expected one of them. Set runtime.compile=null, or train.recorded=false."
    if t.parallel not in ("none", "ddp"):
        return (f"with train.parallel={t.parallel}: a net in parts is not recorded. Set train.recorded=false, or "
                "train.parallel=ddp.")  # fmt: skip
    if t.transforms.size_mode != "fixed":
        return (f"with train.transforms.size_mode={t.transforms.size_mode}: each size of a batch would be recorded. "
                "Set train.recorded=false, or size_mode=fixed.")  # fmt: skip
    if t.losses.masks.weight:
        return (f"with train.losses.masks.weight={t.losses.masks.weight}: queries are not recorded. Set "
                "train.recorded=false.")  # fmt: skip
    if settings.model.discriminative.gradient_checkpointing:
        return "with model.discriminative.gradient_checkpointing=true: expected one of them. Set one to false."
    if device.type != "cuda":
        return f"on {device.type}: CUDA graphs need a GPU. Set train.recorded=false."
    return None


def memory_of(net: nn.Module) -> Memory:
    """Where the work of a net on a GPU is recorded."""
    return Graphs(next(net.parameters()).device).memory()


class Undone:
    """A memory whose warm-up leaves no trace in BatchNorm's statistics, nor in what dropout draws.

    A capture runs nothing that could.
    """

    def __init__(self, memory: Memory, net: nn.Module):
        self._net, self._warm_up, self.record = net, memory.warm_up, memory.record

    def warm_up(self, work: Callable[[], Any]) -> None:
        """See Memory."""
        buffers = list(self._net.buffers())
        kept = [buffer.clone() for buffer in buffers]
        device = next(self._net.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._warm_up(work)
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)


class RecordedOutputs:
    """`segmenter.outputs`, in the precision, recorded with the first batch of a size.

    Hooks that wait for gradients of the parameters, as DDP's, are not called.

    Args:
        asked: train.recorded.
        reads_logits, reads_features: a loss has a gradient for them; else features of no image are given.

    Attributes:
        gradient: that of all parameters that move, float32 [all their elements], of which each .grad is a part. So
            processes average it in one message.
    """

    def __init__(
        self,
        segmenter: NetSegmenter,
        memory: Memory,
        *,
        precision: str,
        asked: bool | None,
        reads_logits: bool,
        reads_features: bool,
    ):
        def forward(image_B3HW: Tensor) -> tuple[Tensor | None, ...]:
            # a cast that the warm-up left in a cache would not be recorded, and weights would stay as they were
            with autocast(image_B3HW.device, precision, caches=False):
                found = segmenter.outputs(image_B3HW)
            # a backward is recorded of what is read alone; other weights would have gradients of 0 in place of none
            logits_BChw = found.logits_BChw if reads_logits else found.logits_BChw.detach()
            features_BDyx = found.features_BDyx if reads_features else found.features_BDyx[:0].detach()  # no copy
            return logits_BChw, found.auxiliary_BChw, features_BDyx, *found.stages_BChw

        moving = [parameter for parameter in segmenter.parameters().values() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in moving]
        self.gradient = torch.zeros(sum(sizes), device=segmenter.net.device)
        parts = zip(self.gradient.split(sizes), moving, strict=True)
        grads = [part.as_strided(parameter.shape, parameter.stride()) for part, parameter in parts]
        self._name, self._asked = type(segmenter.net).__name__, "null" if asked is None else "true"
        self._run = Recorder([Piece(forward, moving, moving, grads)], Undone(memory, segmenter.net))

    def __call__(self, image_B3HW: Tensor) -> Outputs:
        """Images, float [B, 3, H, W] in 0..1, to what `NetSegmenter.outputs` gives.

        UserError: the net waits for the GPU, which it cannot do while it is recorded.
        """
        try:
            logits_BChw, auxiliary_BChw, features_BDyx, *stages_BChw = self._run(image_B3HW)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            said = str(error).strip().splitlines()[0]
            raise UserError(f"train.recorded={self._asked}: {self._name} cannot be a CUDA graph ({said}). Set "
                            "train.recorded=false.") from error  # fmt: skip
        assert logits_BChw is not None
        assert features_BDyx is not None
        given = tuple(stage_BChw for stage_BChw in stages_BChw if stage_BChw is not None)
        return Outputs(logits_BChw, auxiliary_BChw, features_BDyx, given)

    def close(self) -> None:
        """Let go of the graphs. NCCL waits for those with messages in them before it ends."""
        self._run.close()
