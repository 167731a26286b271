"""Can the teacher teach the segmenter? What labelled images say of both models at one noise level; nothing is changed.

K windows of one image   D noise draws   R rows, window by window its draws   C classes   N candidates of a window
3 RGB   H W image px   h w logits, ceil(px / 4)   s window px   z y x latent channels and grid, px / 8
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segadapt import metrics
from segadapt.models.combined import Combined
from segadapt.models.generative import loss as objective
from segadapt.models.generative import trust, windows
from segadapt.models.generative.sd3 import NoisyLatent, add_noise
from segadapt.models.generative.teacher import class_errors, true_classes
from segadapt.seeds import torch_generator


@dataclass(frozen=True)
class Tally:
    """Sums over images at one noise level, so that tallies add up field by field. Pixels are labelled latent pixels."""

    images: int
    windows: int
    pixels: int
    segmenter_CC: np.ndarray  # int64 [label, prediction], all three
    teacher_CC: np.ndarray  # smallest velocity error of all classes
    candidates_CC: np.ndarray  # smallest velocity error of the candidates
    teacher_agrees: int  # pixels where it decides as the segmenter does
    candidates_agree: int
    reachable: int  # pixels whose true class is a candidate
    teacher_steady: float  # over pixels: share of draws that decide for the commonest class; NaN: one draw
    candidates_steady: float
    cosine: float  # over the images that have one
    cosines: int  # such images: neither gradient is zero or not finite
    entropy: float  # over windows: mean over pixels of the class weights' entropy, nats
    entropy_share: float  # the same divided by log N, over the windows with N > 1
    windows_compared: int  # with N > 1
    windows_single: int  # with N = 1
    asked: int  # candidates, over windows
    masked: float  # over windows: share of pixels that do not count

    def __add__(self, other: "Tally") -> "Tally":
        names = [field.name for field in dataclasses.fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def summary(self) -> dict[str, Any]:
        """Means, as the files hold them: fractions in 0..1, entropy in nats and as a share of its maximum.

        accuracy and mIoU are on the latent grid; agreement: with the segmenter; self_agreement: between draws;
        reachable: pixels whose true class is a candidate, the most that candidates can have right. NaN where nothing
        was counted.
        """
        teacher = (self.teacher_CC, self.teacher_agrees, self.teacher_steady)
        candidates = (self.candidates_CC, self.candidates_agree, self.candidates_steady)
        return {
            "images": self.images,
            "pixels": self.pixels,
            "segmenter": _scores(self.segmenter_CC),
            "teacher": self._judge(*teacher),
            "candidates": self._judge(*candidates),
            "cosine": _ratio(self.cosine, self.cosines),
            "images_without_cosine": self.images - self.cosines,
            "entropy": _ratio(self.entropy, self.windows),
            "entropy_share": _ratio(self.entropy_share, self.windows_compared),
            "reachable": _ratio(self.reachable, self.pixels),
            "masked": _ratio(self.masked, self.windows),
            "candidates_per_window": _ratio(self.asked, self.windows),
            "single_class_windows": _ratio(self.windows_single, self.windows),
        }

    def _judge(self, counts_CC: np.ndarray, agrees: int, steady: float) -> dict[str, float]:
        agreement, self_agreement = _ratio(agrees, self.pixels), _ratio(steady, self.pixels)
        return _scores(counts_CC) | {"agreement": agreement, "self_agreement": self_agreement}


def _scores(counts_CC: np.ndarray) -> dict[str, float]:
    scores = metrics.scores(counts_CC)
    return {"accuracy": scores.aacc, "miou": scores.miou}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def examine(
    combined: Combined,
    image_3HW: Tensor,
    label_HW: Tensor,
    *,
    task: str,
    key: str,
    sigmas: Sequence[float | None],
    draws: int = 1,
) -> list[Tally]:
    """One image, a tally for each noise level. Needs labels: never choose settings by it on a test split.

    No weight, gradient, optimizer or generator of a run is touched; draws come from (seed, task, key) alone, and the
    noise is the same at all levels.

    Args:
        combined: with a teacher, split over devices or not.
        image_3HW: float32 RGB in 0..1, at the short side of the configuration; any device.
        label_HW: integers 0..C-1 or 255, at any size.
        sigmas: noise levels in (0, 1]; None: those of the run's own step, with its own noise and number of draws.
        draws: noise draws of the classifier at a given level; the gradient takes those of the run.
    """
    image_3HW, label_HW = image_3HW.to(combined.device), label_HW.to(combined.device).long()
    combined.parallel.arrive()
    with torch.no_grad(), combined.autocast():
        logits_BChw = combined.segmenter.logits(combined.fit(image_3HW)[None])
    boxes_K3 = combined.sight.boxes(image_3HW, logits_BChw)
    latent_Kzyx = combined.generative.encode(combined.sight.crops(image_3HW, boxes_K3))
    grid = latent_Kzyx.shape[-1]
    truth_Kyx = _truth(
        label_HW, boxes_K3, image_px=combined.sight.size(image_3HW), window_px=combined.window.window_px, grid=grid
    )

    raw_BChw = nn.Parameter(logits_BChw.detach().clone())
    segmenter_KCyx = combined.sight.on_grid(logits_BChw[0], image_3HW, boxes_K3, grid=grid)
    q_KCyx = combined.in_windows(logits_BChw, image_3HW, boxes_K3, grid=grid)
    if combined.ignored_C is not None:  # pixels that no step asks about
        truth_Kyx = truth_Kyx.masked_fill(combined.ignored_C[q_KCyx.argmax(dim=1)], 255)
        top_HW = metrics.predict_at_label_size(logits_BChw[0], (label_HW.shape[0], label_HW.shape[1]))
        label_HW = label_HW.masked_fill(combined.ignored_C[top_HW.long()], 255)
    right = cross_entropy_gradient(raw_BChw, label_HW)
    tallies = []
    for sigma in sigmas:
        view = _onlooker(combined, raw_BChw, latent_Kzyx, sigma=sigma)
        raw_BChw.grad = None
        own = view.sight.noise(image_3HW, boxes_K3, task=task, key=key)
        taught, candidates = view.backward(image_3HW, raw_BChw, own, boxes_K3, task=task, key=key)
        chosen_KC = candidates.chosen_KC[:: candidates.draws]
        weights_KCyx = objective.class_weights(q_KCyx, chosen_KC, temperature=combined.loss.temperature)
        generator = torch_generator(combined.seed, task, key, "diagnose")
        noisy = own if sigma is None else _noised(latent_Kzyx, sigma, draws, generator)
        errors_RCyx = class_errors(
            combined.generative, noisy, num_classes=q_KCyx.shape[1], max_pairs=combined.pairs_at_once
        )
        tallies.append(
            _tally(
                truth_Kyx,
                segmenter_KCyx.argmax(dim=1),
                errors_RCyx.nan_to_num(nan=torch.inf, posinf=torch.inf),  # argmin would take NaN
                weights_KCyx,
                chosen_KC,
                masked=1 - float(taught.kept),
                cosine=None if raw_BChw.grad is None else cosine(raw_BChw.grad, right),
            )
        )
    return tallies


def _onlooker(combined: Combined, logits_BChw: nn.Parameter, latent_Kzyx: Tensor, *, sigma: float | None) -> Combined:
    """The two models behind another handle, in which nothing but these logits moves: `backward` ends in their gradient.

    It shares the objective and every draw with the run, and encodes nothing anew.
    """
    view, teacher = copy.copy(combined), copy.copy(combined.generative)
    view.sight = copy.copy(combined.sight)
    view.groups = {"discriminative": {"logits": logits_BChw}, "prompt_offset": {}, "generative": {}}
    teacher.encode = lambda windows_K3ss: latent_Kzyx  # type: ignore[union-attr, method-assign]
    view.generative = view.sight.teacher = teacher
    if sigma is not None:
        view.sight.settings = dataclasses.replace(combined.window, sigma=sigma, sigma_high=None)
    return view


def _noised(latent_Kzyx: Tensor, sigma: float, draws: int, generator: torch.Generator) -> NoisyLatent:
    """D draws of each window, row w * D + d; the first draws do not depend on their number."""
    noise_DKzyx = torch.randn((draws, *latent_Kzyx.shape), generator=generator, dtype=latent_Kzyx.dtype)
    noise_Rzyx = noise_DKzyx.transpose(0, 1).flatten(0, 1).to(latent_Kzyx.device)
    latent_Rzyx = latent_Kzyx.repeat_interleave(draws, dim=0)
    return add_noise(latent_Rzyx, noise_Rzyx, latent_Rzyx.new_full((len(latent_Rzyx),), sigma))


def _truth(label_HW: Tensor, boxes_K3: Tensor, *, image_px: tuple[int, int], window_px: int, grid: int) -> Tensor:
    """Labels of each window on the latent grid, those nearest to the cell centres: int64 [K, y, x]."""
    label_1HW = F.interpolate(label_HW[None, None].float(), size=list(image_px), mode="nearest-exact")[0]
    return true_classes(windows.cut(label_1HW, boxes_K3, window_px=window_px, mode="nearest-exact")[:, 0].long(), grid)


def cross_entropy_gradient(logits_BChw: nn.Parameter, label_HW: Tensor) -> Tensor:
    """Gradient of the supervised loss in the logits: resized to the label, mean over the pixels that are not 255."""
    is_counted_HW = label_HW != 255
    if not is_counted_HW.any():
        return torch.zeros_like(logits_BChw)
    logits_CHW = F.interpolate(logits_BChw, size=label_HW.shape, mode="bilinear", align_corners=False)[0]
    loss = F.cross_entropy(logits_CHW[:, is_counted_HW].T, label_HW[is_counted_HW])
    return torch.autograd.grad(loss, logits_BChw)[0]


def cosine(one: Tensor, other: Tensor) -> float | None:
    """Between two gradients of one shape, in float64; None where either is zero or not finite."""
    one, other = one.double().flatten(), other.double().flatten()
    norms = float(one.norm() * other.norm())
    return float(one @ other) / norms if math.isfinite(norms) and norms > 0 else None


def _tally(
    truth_Kyx: Tensor,
    segmenter_Kyx: Tensor,
    errors_RCyx: Tensor,
    weights_KCyx: Tensor,
    chosen_KC: Tensor,
    *,
    masked: float,
    cosine: float | None,
) -> Tally:
    """What one image adds."""
    K, C = chosen_KC.shape
    draws, is_counted_Kyx = len(errors_RCyx) // K, truth_Kyx != 255
    is_other_RC11 = ~chosen_KC.repeat_interleave(draws, dim=0)[:, :, None, None]
    asked = (errors_RCyx, errors_RCyx.masked_fill(is_other_RC11, torch.inf))
    teacher_Kyx, candidate_Kyx = (trust.decision(errors, draws) for errors in asked)
    steady = [
        float(trust.agreement(errors, draws)[is_counted_Kyx].sum()) if draws > 1 else math.nan for errors in asked
    ]
    index_Kyx = truth_Kyx.masked_fill(~is_counted_Kyx, 0)
    asked_K = chosen_KC.sum(dim=1)
    entropy_K = torch.special.entr(weights_KCyx.double()).sum(dim=1).mean(dim=(1, 2)) * (asked_K > 0)
    share_K = torch.where(asked_K > 1, entropy_K / asked_K.double().log().clamp(min=math.log(2)), 0)
    return Tally(
        images=1,
        windows=K,
        pixels=int(is_counted_Kyx.sum()),
        segmenter_CC=_counts(segmenter_Kyx, truth_Kyx, C),
        teacher_CC=_counts(teacher_Kyx, truth_Kyx, C),
        candidates_CC=_counts(candidate_Kyx, truth_Kyx, C),
        teacher_agrees=int((teacher_Kyx == segmenter_Kyx)[is_counted_Kyx].sum()),
        candidates_agree=int((candidate_Kyx == segmenter_Kyx)[is_counted_Kyx].sum()),
        reachable=int((chosen_KC.gather(1, index_Kyx.flatten(1)).view_as(index_Kyx) & is_counted_Kyx).sum()),
        teacher_steady=steady[0],
        candidates_steady=steady[1],
        cosine=cosine or 0.0,
        cosines=int(cosine is not None),
        entropy=float(entropy_K.sum()),
        entropy_share=float(share_K.sum()),
        windows_compared=int((asked_K > 1).sum()),
        windows_single=int((asked_K == 1).sum()),
        asked=int(asked_K.sum()),
        masked=K * masked,
    )


def _counts(predicted_Kyx: Tensor, truth_Kyx: Tensor, num_classes: int) -> np.ndarray:
    matrix = metrics.ConfusionMatrix(num_classes, truth_Kyx.device)
    matrix.update(predicted_Kyx, truth_Kyx)
    return matrix.counts()
