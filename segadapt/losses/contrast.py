"""Pixel contrast: embeddings of one class come together, those of different classes part.

Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV 2021, equation 3.

B images  C classes  D embedding width  y x grid of the features  E (image, class) pairs  S slots for anchors
R rows of the memory  K the most similar of them  A both, S + R
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segadapt.losses.memory import Rows, entry_of_pixels, in_groups

NOTHING = -1e30  # exp gives 0 as for -inf, and inf - inf arises nowhere
SLACK = 1e-9  # of a share of rows before it is rounded up: even in float64 0.07 x 100 is above 7


class Projection(nn.Sequential):
    """Features to embeddings of unit length, [B, D, y, x], float32 in any autocast; training alone has it."""

    def __init__(self, channels: int, width: int, *, kind: str) -> None:
        hidden: list[nn.Module] = []
        if kind == "mlp":
            hidden = [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        super().__init__(*hidden, nn.Conv2d(channels, width, 1))

    def forward(self, input: Tensor) -> Tensor:
        weight = next(self.parameters())
        embedding_BDyx = super().forward(input.to(weight.dtype))
        # before the norm: in bf16 a length would be off by 0.4 %
        return F.normalize(embedding_BDyx.to(torch.promote_types(embedding_BDyx.dtype, torch.float32)), dim=1)


@dataclass(frozen=True)
class Anchors:
    """Chosen pixels; without a wait for the device their number is not known, so there are slots that hold none."""

    pixel_S: Tensor  # int64, place in the flat B y x grid
    class_S: Tensor  # int64
    is_there_S: Tensor  # bool


def label_on_grid(label_BHW: Tensor, size: torch.Size) -> Tensor:
    """The label at exactly the size of the features, by nearest (never by a stride): int64 [B, y, x]."""
    return F.interpolate(label_BHW[:, None].float(), size=size, mode="nearest")[:, 0].long()


def choose_anchors(
    label_Byx: Tensor,
    predicted_Byx: Tensor,
    *,
    num_classes: int,
    max_samples: int,
    max_views: int,
    min_views: int | None,
    fill: str,
    generator: torch.Generator,
) -> Anchors:
    """Of each (image, class) with enough pixels n random ones, hard (predicted as another class) and easy in halves.

    n = min(max_samples // number of such pairs, max_views). Where one kind has less than its half, all of it is taken
    and the other fills up. More pairs than max_samples: none is taken.

    Args:
        min_views: pixels that are enough; None: more than max_views.
        fill: of pairs with less than n pixels: repeat them up to n, or shrink to what there is.
    """
    # groups: of each pair first its hard pixels, then its easy ones
    group_P = 2 * entry_of_pixels(label_Byx, num_classes) + (predicted_Byx == label_Byx).flatten()
    order_P, start_G = in_groups(group_P, 2 * num_classes * len(label_Byx), generator)
    hard_E, easy_E = start_G.diff().unflatten(0, (-1, 2)).unbind(1)
    total_E = hard_E + easy_E
    is_chosen_E = total_E > max_views if min_views is None else total_E >= min_views
    chosen_E = (~is_chosen_E).int().argsort(stable=True)  # the chosen ones first
    pairs = is_chosen_E.sum()
    views = (max_samples // pairs.clamp(min=1)).clamp(max=max_views)
    slot_S = torch.arange(max_samples, device=label_Byx.device)
    entry_S = chosen_E[(slot_S // views.clamp(min=1)).clamp(max=len(chosen_E) - 1)]
    number_S = slot_S % views.clamp(min=1)
    is_there_S = slot_S < pairs * views
    if fill == "repeat":
        number_S = number_S % total_E[entry_S].clamp(min=1)
    else:
        is_there_S &= number_S < total_E[entry_S]
    hard_views_E = torch.minimum(torch.maximum(views // 2, views - easy_E), hard_E)
    past_hard_S = number_S - hard_views_E[entry_S]
    place_S = torch.where(past_hard_S < 0, start_G[2 * entry_S] + number_S, start_G[2 * entry_S + 1] + past_hard_S)
    return Anchors(order_P[place_S.clamp(max=len(order_P) - 1)], entry_S % num_classes, is_there_S)


def pixel_contrast(
    anchor_SD: Tensor,
    anchors: Anchors,
    *,
    temperature: float,
    base_temperature: float,
    memory: Rows | None = None,
    negatives: int = 0,
    hardest_share: float = 1,
) -> tuple[Tensor, Tensor]:
    """The loss, and how many anchors have a positive: with none it is 0 with a graph.

    s = cosine / temperature. Positives P of an anchor a: the others of its class; negatives N: all of other classes.

        l_a = mean over p in P of -log(e^s_ap / (e^s_ap + sum over n in N of e^s_an))

    and the loss is temperature / base_temperature times the mean of l_a over the anchors with a positive. A positive
    competes with the negatives alone, unlike in SupCon. Of the memory every row of the class is a positive, and of the
    other rows `negatives` are drawn from the hardest_share that is most similar to the anchor.

    Args:
        anchor_SD: unit length.
        memory: in random order.
    """
    pairs = [_in_batch(anchor_SD, anchors, temperature)]
    if memory is not None:
        pairs.append(_with_memory(anchor_SD, anchors, memory, temperature, negatives, hardest_share))
    logits_SA, positive_SA, negative_SA = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
    negatives_S1 = logits_SA.masked_fill(~negative_SA, NOTHING).logsumexp(dim=1, keepdim=True)
    each_SA = -F.logsigmoid(logits_SA - negatives_S1)
    count_S = positive_SA.sum(dim=1)
    loss_S = each_SA.masked_fill(~positive_SA, 0).sum(dim=1) / count_S.clamp(min=1)
    counted = (count_S > 0).sum()
    return temperature / base_temperature * loss_S.sum() / counted.clamp(min=1), counted


def _in_batch(anchor_SD: Tensor, anchors: Anchors, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each anchor with the others: s, which are its positives, which its negatives: [S, S]."""
    is_same_SS = anchors.class_S[:, None] == anchors.class_S
    are_there_SS = anchors.is_there_S[:, None] & anchors.is_there_S
    is_self_SS = torch.eye(len(anchor_SD), dtype=torch.bool, device=anchor_SD.device)
    return anchor_SD @ anchor_SD.T / temperature, are_there_SS & is_same_SS & ~is_self_SS, are_there_SS & ~is_same_SS


def _with_memory(
    anchor_SD: Tensor, anchors: Anchors, memory: Rows, temperature: float, negatives: int, hardest_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each anchor with the rows of the memory, as `_in_batch`: [S, R]; no row is the anchor itself."""
    logits_SR = anchor_SD @ memory.embedding_RD.to(anchor_SD).T / temperature
    is_same_SR = anchors.class_S[:, None] == memory.class_R
    are_there_SR = anchors.is_there_S[:, None] & memory.is_there_R
    drawn_SR = _drawn(logits_SR.detach(), are_there_SR & ~is_same_SR, negatives, hardest_share)
    return logits_SR, are_there_SR & is_same_SR, drawn_SR


def _drawn(logits_SR: Tensor, may_be_SR: Tensor, count: int, share: float) -> Tensor:
    """For each anchor `count` of the `share` most similar rows that may be: the first in the rows' random order."""
    if share < 1:
        most = math.ceil(share * logits_SR.shape[1] - SLACK)
        nearest_SK = logits_SR.masked_fill(~may_be_SR, NOTHING).topk(most, dim=1).values
        last_S1 = (share * may_be_SR.sum(dim=1, keepdim=True).double() - SLACK).ceil().long() - 1
        may_be_SR = may_be_SR & (logits_SR >= nearest_SK.gather(1, last_S1.clamp(min=0)))
    return may_be_SR & (may_be_SR.cumsum(dim=1) <= count)
