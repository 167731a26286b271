"""BN and BN-alpha: test-time statistics in BatchNorm, where nothing is learned; and under the generative method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config import setting
from segadapt.errors import UserError
from segadapt.models.combined import Combined
from segadapt.models.discriminative import Segmenter
from segadapt.models.recording import Memory
from segadapt.models.source import Source


def batch_norms(segmenter: Segmenter) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those with statistics of their own. UserError: there is none."""
    norms = [m for m in segmenter.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        raise UserError("tta.method changes the statistics of BatchNorm, but the segmenter has no BatchNorm that keeps "
                        "any. Choose another method.")  # fmt: skip
    return norms


def own_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance, as in BatchNorm's own training mode, and mean of each channel: [C], float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.var_mean(x, dim=[axis for axis in range(x.dim()) if axis != 1], correction=0)


def mixed(norm: nn.modules.batchnorm._BatchNorm, alpha: float) -> Callable[[Tensor], Tensor]:
    """Forward of a BatchNorm with (1 - alpha) of its source statistics and alpha of the batch's own.

    The source's are never changed. A gradient also flows through the batch's own, as in BatchNorm's training mode.
    """

    def forward(x: Tensor) -> Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        var_C, mean_C = own_statistics(x)
        mean_C, var_C = (own.to(source).lerp(source, 1 - alpha) for own, source in
                         ((mean_C, norm.running_mean), (var_C, norm.running_var)))  # fmt: skip
        scale_C = (var_C + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift_C = (0 if norm.bias is None else norm.bias) - mean_C * scale_C
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return torch.addcmul(shift_C.view(shape), x.to(scale_C), scale_C.view(shape)).to(x)

    return forward


class Bn(Source):
    """BN: statistics of the image itself (alpha 1; Schneider et al. 2020, Nado et al. 2020); BN-alpha: a mixture.

    mean = (1 - alpha) mean_source + alpha mean_test, variance likewise (Schneider et al. 2020, eq. 1, with its weight
    of the source N / (N + n) written as 1 - alpha). Per image: statistics over all its pixels. SegFormer has a single
    BatchNorm, in its head, and one image is a batch of pixels that look alike: published results fall below the source.

    Published: alpha 1 (bn), 0.1 (bn-alpha).
    """

    @dataclass
    class Options:
        alpha: float = setting("share of the image's own statistics in BatchNorm; 0: the source's", low=0, high=1)

    def __init__(
        self, segmenter: Segmenter, options: Any, optimizer: Any, *, seed: int, precision: str,
        memory: Memory | None = None,
    ):  # fmt: skip
        super().__init__(segmenter, seed=seed, precision=precision, memory=memory)
        for norm in batch_norms(segmenter):
            norm.forward = mixed(norm, options.alpha)  # pyright: ignore[reportAttributeAccessIssue]


class GenerativeBn(Combined):
    """The generative method on a segmenter whose BatchNorm takes the image's own statistics, as in `bn`.

    Not published; the two correct different things: statistics where the image's brightness, contrast and noise moved
    what BatchNorm sees, the teacher where the segmenter decides wrongly. Per image, as both are.
    """

    Options = Bn.Options

    def __init__(self, segmenter: Segmenter, *given: Any, options: Any, **settings: Any):
        super().__init__(segmenter, *given, options=options, **settings)
        for norm in batch_norms(segmenter):
            norm.forward = mixed(norm, options.alpha)  # pyright: ignore[reportAttributeAccessIssue]
