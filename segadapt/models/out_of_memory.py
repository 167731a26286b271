"""A device without memory: one line that says which settings to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from segadapt.errors import UserError
from segadapt.models.combined import Combined
from segadapt.models.generative.lora import lora_parameters
from segadapt.models.generative.sd3 import Sd3
from segadapt.models.source import Source


@contextmanager
def explain_out_of_memory(method: Source, what: str) -> Iterator[None]:
    """UserError in place of torch's: which image, what the device was asked for, what takes memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:3])  # what was asked of which GPU, and its size
        options = cures(method)
        raise UserError(f"{what}: {said}. To need less: {', or '.join(options)}.") from error


def cures(method: Source) -> list[str]:
    """What would take less memory than the settings do, the cheapest first."""
    if not isinstance(method, Combined):
        return [f"lower {'data' if method.segmenter.short_side_px is None else 'model.discriminative'}.short_side_px"]
    g, out = method.window, list[str]()
    if g.max_pairs and g.max_pairs > 1:
        out.append(f"lower model.generative.max_pairs={g.max_pairs}")
    is_sd3 = isinstance(method.generative, Sd3)
    if is_sd3 and method.trains_generative and not g.gradient_checkpointing:
        out.append("set model.generative.gradient_checkpointing=true")
    if is_sd3 and method.trains_generative and not lora_parameters(method.parallel.transformers[0]):
        out.append("train adapters alone (model.update.lora_rank=8)")
    if len(method.parallel.transformers) > 1:
        out.append("split the transformer (model.generative.placement=dispatch)")
    else:
        out.append("make another GPU visible (CUDA_VISIBLE_DEVICES)")
    if method.trains_discriminative:
        out.append("set model.discriminative.gradient_checkpointing=true")
    return out
