"""Of adaptation: what an image needed memory for, and which settings to lower."""

from contextlib import AbstractContextManager

from torch import Tensor

from segadapt.inference import Inference
from segadapt.models.combined import Combined
from segadapt.models.generative.guided import MOST_BOXES
from segadapt.models.generative.lora import lora_parameters
from segadapt.models.generative.sd3 import Sd3
from segadapt.models.source import Source
from segadapt.out_of_memory import explain_shortage


def explain_out_of_memory(method: Source, what: str, image_3HW: Tensor | None = None) -> AbstractContextManager[None]:
    """UserError in place of torch's: which image, its size and windows, what the device was asked for, what to lower.

    Args:
        image_3HW: as loaded; None: no image is at work.
    """
    return explain_shortage(
        lambda: what if image_3HW is None else f"{what} ({at_work(method, image_3HW)})", lambda: cures(method)
    )


def at_work(method: Source, image_3HW: Tensor) -> str:
    """'512 x 683 px on cuda:0, 2 windows with up to 20 candidate classes each'."""
    height, width = image_3HW.shape[1:]
    size = f"{height} x {width} px on {method.device}"
    if not isinstance(method, Combined):
        return size
    count = f"up to {MOST_BOXES}" if method.sight.is_guided else len(method.sight.grid(image_3HW))
    return f"{size}, {count} windows with up to {method.loss.classes_threshold} candidate classes each"


def cures(method: Source) -> list[str]:
    """What would take less memory than the settings do, the cheapest first."""
    if isinstance(method.segmenter, Inference):
        return ["lower data.short_side_px or evaluate.scales, or set smaller windows (evaluate.window_px)"]
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
