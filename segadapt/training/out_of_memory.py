"""Of training: what a step needed memory for, and which settings to lower."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig
from segadapt.errors import counted
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.out_of_memory import explain_shortage
from segadapt.training.parallel import World
from segadapt.training.recorded import is_recorded


def explain_step(
    settings: TrainConfig | PretrainConfig,
    segmenter: NetSegmenter,
    world: World,
    step: int,
    micro_batches: Sequence[tuple[Any, Any]],
) -> AbstractContextManager[None]:
    """UserError in place of torch's: the step, its images, what the device was asked for, what to lower.

    Args:
        step: from 1.
        micro_batches: images [B, 3, H, W] and their labels, of this process.
    """

    def what() -> str:
        (count, _, height, width), device = micro_batches[0][0].shape, next(segmenter.net.parameters()).device
        return f"step {step} ({counted(count, 'image')} of {height} x {width} px on {device})"

    return explain_shortage(what, lambda: cures(settings, segmenter, world))


def cures(settings: TrainConfig | PretrainConfig, segmenter: NetSegmenter, world: World) -> list[str]:
    """What would take less memory than the settings do, the cheapest first."""
    t, out = settings.train, list[str]()
    if t.batch_size > world.parts * t.accumulate:
        out.append(f"raise train.accumulate={t.accumulate}, or lower train.batch_size={t.batch_size}")
    if settings.runtime.precision == "fp32":
        out.append("set runtime.precision=bf16")
    if isinstance(settings, PretrainConfig):
        return [*out, f"lower train.transforms.image_px={settings.train.transforms.image_px}"]
    if is_recorded(settings, segmenter):
        out.append("set train.recorded=false")
    d = settings.model.discriminative
    if segmenter.net.supports_gradient_checkpointing and not d.gradient_checkpointing:
        out.append("set model.discriminative.gradient_checkpointing=true")
    if t.parallel in ("none", "ddp") and torch.cuda.device_count() > 1:
        out.append("share the net among GPUs (train.parallel=fsdp)")
    return [*out, f"lower train.transforms.crop_px={settings.train.transforms.crop_px}"]
