"""Pictures of a step: what it saw and predicted, small enough to be kept.

C classes   3 RGB   H W image px   h w logits, of any stride
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from segadapt.metrics import predict_at_label_size
from segadapt.wandb_mirror import Picture

PICTURE_PX = 512  # long side of a picture


def picture_of(
    image_3HW: Tensor, logits_Chw: Tensor, label_HW: Tensor | None, *, classes: Sequence[str], caption: str
) -> Picture:
    """Image, prediction and label (None: unlabelled) with a long side of PICTURE_PX at most.

    The prediction is the argmax at that size, so it is close to the one that is scored, and cheap.
    """
    height, width = image_3HW.shape[1:]
    factor = min(1, PICTURE_PX / max(height, width))
    size = max(1, round(factor * height)), max(1, round(factor * width))
    image = interpolate(image_3HW[None], size=size, mode="bilinear", antialias=True)[0]
    masks = {"prediction": predict_at_label_size(logits_Chw, size).cpu().numpy()}
    if label_HW is not None:
        masks["label"] = interpolate(label_HW[None, None], size=size, mode="nearest-exact")[0, 0].cpu().numpy()
    pixels_HW3 = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
    return Picture(pixels_HW3, masks, classes, caption)
