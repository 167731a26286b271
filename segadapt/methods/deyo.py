"""DeYO: entropy minimisation on samples whose prediction rests on shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from segadapt.config import setting
from segadapt.methods.learner import Learner, below_top
from segadapt.methods.pixels import entropy, mean_where, most_entropy
from segadapt.models.discriminative import Segmenter
from segadapt.seeds import torch_generator

CELL_PX = 4  # of SegFormer's logits


class Deyo(Learner):
    """Destroy your object (Lee et al. 2024): Tent on samples whose decision suffers when the patches are shuffled.

    PLPD = p(y | x) - p(y | shuffled x) for y = argmax p(x)                                             (eq. 6)
    kept: H < margin ln C and PLPD > `plpd`                                                             (eq. 7)
    L = mean over kept of (1 / exp(H - weight_margin ln C) + 1 / exp(-PLPD)) H                          (eq. 8-9)

    Per pixel: H, PLPD, both filters and the weight; the shuffled image's predictions are put back to where the patches
    come from, so that a pixel is compared with itself among other neighbours.

    The top layers stay as they are, see `below_top`.

    Published: margin 0.5, weight_margin 0.4, PLPD 0.2, 4 x 4 patches; SGD momentum 0.9, rate 1e-3 / 64 for batches of
    one (ViT).
    """

    @dataclass
    class Options:
        margin: float = setting("kept: entropy below this times ln C", low=0, high=1)
        weight_margin: float = setting("an entropy of this times ln C has weight 1", low=0, high=1)
        plpd: float = setting("kept: the decision's probability falls by more than this", low=-1, high=1)
        patches: int = setting("of each side", low=1)

    @staticmethod
    def choose(segmenter: Segmenter, options: Any) -> Mapping[str, nn.Parameter]:
        return below_top(segmenter)

    @torch.no_grad()
    def shuffled(self, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        """Probabilities [1, C, y, x] of the image with shuffled patches, each where its patch comes from.

        The image is resized so that patches are whole logits of SegFormer; those of another stride are resized too.
        """
        n = self.options.patches
        step = n * CELL_PX
        size = [-(-side // step) * step for side in image_3HW.shape[1:]]
        order_N = torch.randperm(n * n, generator=torch_generator(self.seed, task, key, "patches"))
        image_13YX = interpolate(image_3HW[None], size=size, mode="bilinear", align_corners=False)
        (logits_1Cyx,) = self.again(move_patches(image_13YX, order_N, n))
        assert logits_1Cyx is not None
        whole = [-(-side // n) * n for side in logits_1Cyx.shape[2:]]
        p_1Cyx = interpolate(logits_1Cyx.softmax(dim=1), size=whole, mode="bilinear", align_corners=False)
        return move_patches(p_1Cyx, order_N.argsort(), n)

    def loss(self, logits_BChw: Tensor, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        o, most = self.options, most_entropy(logits_BChw.shape[1])
        other_BChw = self.shuffled(image_3HW, task=task, key=key)
        other_BChw = interpolate(other_BChw, size=logits_BChw.shape[2:], mode="bilinear", align_corners=False)
        p_B1hw, label_B1hw = logits_BChw.detach().softmax(dim=1).max(dim=1, keepdim=True)
        plpd_Bhw = (p_B1hw - other_BChw.gather(1, label_B1hw))[:, 0]
        H_Bhw = entropy(logits_BChw)
        weight_Bhw = (o.weight_margin * most - H_Bhw.detach()).exp() + plpd_Bhw.exp()
        is_kept_Bhw = (H_Bhw.detach() < o.margin * most) & (plpd_Bhw > o.plpd)
        return mean_where(weight_Bhw * H_Bhw, is_kept_Bhw)


def move_patches(x_BChw: Tensor, order_N: Tensor, n: int) -> Tensor:
    """Patch i of the result is patch order[i] of x: n x n of them, by rows."""
    B, C, h, w = x_BChw.shape
    patches_BCNyx = x_BChw.view(B, C, n, h // n, n, w // n).transpose(3, 4).reshape(B, C, n * n, h // n, w // n)
    moved = patches_BCNyx[:, :, order_N.to(x_BChw.device)].view(B, C, n, n, h // n, w // n)
    return moved.transpose(3, 4).reshape(B, C, h, w)
