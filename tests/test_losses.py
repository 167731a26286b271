"""Losses of the logits, each against a slow oracle: loops over pixels, numpy in float64, closed forms, torch's own."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from segadapt.losses.cross_entropy import cross_entropy, focal, ohem
from segadapt.losses.region import dice, lovasz_softmax, rmi

WEIGHTS_C = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
REGION = {
    "lovasz": lovasz_softmax,
    "dice": lambda logits, label: dice(logits, label, smooth=1.0),
    "rmi": lambda logits, label: rmi(logits, label, share=0.5),
}
PIXEL = {
    "cross_entropy": cross_entropy,
    "all": lambda logits, label: cross_entropy(logits, label, reduction="all"),
    "weighted": lambda logits, label: cross_entropy(logits, label, class_weights_C=WEIGHTS_C),
    "ohem": lambda logits, label: ohem(logits, label, threshold=0.7, min_kept=20),
    "focal": lambda logits, label: focal(logits, label, gamma=2.0),
}


def batch(seed=0, *, shape=(2, 12, 14), ignored=0.2, scale=2.0):
    """Logits [B, 3, H, W] with a graph, and labels with some 255."""
    generator = torch.Generator().manual_seed(seed)
    label_BHW = torch.randint(0, 3, shape, generator=generator)
    label_BHW[torch.rand(shape, generator=generator) < ignored] = 255
    logits_BCHW = torch.randn(shape[0], 3, *shape[1:], generator=generator, dtype=torch.float64) * scale
    return logits_BCHW.requires_grad_(), label_BHW


def pixels(logits_BCHW, label_BHW):
    """(softmax probabilities, label) of each pixel that is not ignored, by a loop."""
    for b, y, x in np.ndindex(*label_BHW.shape):
        if label_BHW[b, y, x] != 255:
            raised_C = np.exp(logits_BCHW[b, :, y, x].detach().numpy())
            yield raised_C / raised_C.sum(), int(label_BHW[b, y, x])


# Pixels


@pytest.mark.parametrize("weights_C", [None, WEIGHTS_C], ids=["plain", "weighted"])
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 0.9))
def test_cross_entropy_and_its_gradient_are_torchs(weights_C, seed, share):
    logits_BCHW, label_BHW = batch(seed, shape=(2, 5, 5), ignored=share, scale=9)
    label_BHW[0, 0, 0] = 0  # the mean of nothing is NaN in torch
    torchs = logits_BCHW.detach().clone().requires_grad_()
    loss = cross_entropy(logits_BCHW, label_BHW, class_weights_C=weights_C)
    expected = F.cross_entropy(torchs, label_BHW, weight=weights_C, ignore_index=255)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits_BCHW.grad, torchs.grad)


def test_the_reductions_by_hand():
    """Two pixels of ln 2 and ln 4, one ignored, one more: mmseg divides by all four."""
    logits_BCHW = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), 9.0, math.log(3)]]).view(1, 2, 1, 4)
    label_BHW = torch.tensor([[[0, 0, 255, 1]]])
    total = math.log(2) + math.log(4) + math.log(4 / 3)
    assert cross_entropy(logits_BCHW, label_BHW).item() == pytest.approx(total / 3)
    assert cross_entropy(logits_BCHW, label_BHW, reduction="all").item() == pytest.approx(total / 4)
    weighted = (math.log(2) + math.log(4) + 5 * math.log(4 / 3)) / 7
    loss = cross_entropy(logits_BCHW, label_BHW, class_weights_C=torch.tensor([1.0, 5.0]))
    assert loss.item() == pytest.approx(weighted)


def test_a_pixel_that_does_not_count_may_hold_anything():
    logits_BCHW = torch.tensor([[1.0, math.inf], [2.0, math.nan]]).view(1, 2, 1, 2)
    assert cross_entropy(logits_BCHW, torch.tensor([[[0, 255]]])).item() == pytest.approx(math.log1p(math.e))


@pytest.mark.parametrize("name", ["cross_entropy", "all", "weighted", "ohem", "focal", "lovasz", "dice"])
def test_a_batch_of_ignored_pixels_alone_is_zero_with_a_zero_gradient(name):
    logits_BCHW, label_BHW = batch()
    loss = (PIXEL | REGION)[name](logits_BCHW, torch.full_like(label_BHW, 255))
    loss.backward()
    assert loss.item() == 0
    assert logits_BCHW.grad is not None
    assert not logits_BCHW.grad.any()


def test_rmi_of_a_batch_of_ignored_pixels_is_a_constant():
    logits_BCHW, label_BHW = batch()
    loss = rmi(logits_BCHW, torch.full_like(label_BHW, 255), share=0.5)
    loss.backward()
    assert loss.isfinite()
    assert logits_BCHW.grad is not None
    assert not logits_BCHW.grad.any()


@pytest.mark.parametrize("loss_of", [cross_entropy, partial(ohem, threshold=0.7, min_kept=20), partial(focal, gamma=2)])
def test_a_batch_whose_classes_weigh_nothing_is_zero_with_a_zero_gradient(loss_of):
    logits_BCHW, label_BHW = batch()
    loss = loss_of(logits_BCHW, label_BHW.clamp(max=1), class_weights_C=torch.tensor([0.0, 0.0, 1.0]))
    loss.backward()
    assert loss.item() == 0
    assert logits_BCHW.grad is not None
    assert not logits_BCHW.grad.any()


@pytest.mark.parametrize("name", PIXEL | REGION)
def test_no_loss_learns_from_ignored_pixels(name):
    logits_BCHW, label_BHW = batch()
    (PIXEL | REGION)[name](logits_BCHW, label_BHW).backward()
    grad_PC = logits_BCHW.grad.permute(0, 2, 3, 1)  # pyright: ignore
    assert not grad_PC[label_BHW == 255].any()
    assert torch.isfinite(grad_PC).all()
    if name != "ohem":
        assert grad_PC[label_BHW != 255].any(dim=1).float().mean() > 0.9  # RMI: one row of pixels is in no cell


@pytest.mark.parametrize("name", PIXEL | REGION)
def test_the_true_labelling_costs_least(name):
    """A step along the gradient towards it lowers every loss."""
    logits_BCHW, label_BHW = batch(ignored=0)
    loss = (PIXEL | REGION)[name]
    truth_BCHW = 20.0 * F.one_hot(label_BHW, 3).permute(0, 3, 1, 2).double() - 10
    first = loss(logits_BCHW, label_BHW)
    (grad,) = torch.autograd.grad(first, logits_BCHW)
    assert loss(logits_BCHW - 1e-3 * grad / grad.norm(), label_BHW) < first
    assert loss(truth_BCHW, label_BHW) < loss(logits_BCHW, label_BHW)


def kept_by_loop(logits_BCHW, label_BHW, *, threshold, min_kept, weights_C):
    found = sorted((p_C[c], weights_C[c]) for p_C, c in pixels(logits_BCHW, label_BHW))
    bound = max(threshold, found[min_kept][0]) if min_kept < len(found) else 2
    kept = [(p, w) for p, w in found if p < bound]
    return sum(-w * math.log(p) for p, w in kept) / sum(w for _, w in kept), len(kept)


@pytest.mark.parametrize("threshold", [0.05, 0.7])
@pytest.mark.parametrize("min_kept", [1, 20, 200, 10**6])
@pytest.mark.parametrize("weighted", [False, True])
def test_ohem_keeps_the_pixels_that_a_sorted_list_keeps(threshold, min_kept, weighted):
    logits_BCHW, label_BHW = batch(1)
    weights_C = WEIGHTS_C if weighted else torch.ones(3, dtype=torch.float64)
    expected, kept = kept_by_loop(
        logits_BCHW, label_BHW, threshold=threshold, min_kept=min_kept, weights_C=weights_C.tolist()
    )
    loss = ohem(logits_BCHW, label_BHW, threshold=threshold, min_kept=min_kept,
                class_weights_C=WEIGHTS_C if weighted else None)  # fmt: skip
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert kept >= min(min_kept, (label_BHW != 255).sum())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_its_formula_at_each_pixel(gamma):
    logits_BCHW, label_BHW = batch(2)
    terms = [-((1 - p_C[c]) ** gamma) * math.log(p_C[c]) for p_C, c in pixels(logits_BCHW, label_BHW)]
    assert focal(logits_BCHW, label_BHW, gamma=gamma).item() == pytest.approx(np.mean(terms), rel=1e-12)
    whole = focal(logits_BCHW, label_BHW, gamma=gamma, reduction="all").item()
    assert whole == pytest.approx(np.sum(terms) / label_BHW.numel(), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_a_sure_pixel_has_a_finite_gradient(gamma):
    logits_BCHW = torch.tensor([200.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    focal(logits_BCHW, torch.zeros(1, 1, 1, dtype=torch.int64), gamma=gamma).backward()
    assert torch.isfinite(logits_BCHW.grad).all()  # pyright: ignore


# Regions


def jaccard_loss(errors, truth):
    """Of a set of mispredicted pixels (Berman et al. 2018, equation 6)."""
    return 1 - (truth & ~errors).sum() / (truth | errors).sum()


def test_lovasz_is_the_extension_of_the_jaccard_loss():
    """By its definition, the integral over thresholds of the loss of the pixels whose error is above."""
    logits_BCHW, label_BHW = batch(3, shape=(1, 6, 5))
    found = list(pixels(logits_BCHW, label_BHW))
    p_NC, label_N = np.stack([p_C for p_C, _ in found]), np.array([c for _, c in found])
    expected = []
    for c in range(3):
        truth_N = label_N == c
        error_N = np.where(truth_N, 1 - p_NC[:, c], p_NC[:, c])
        steps = np.concatenate([[0], np.sort(error_N)])
        expected.append(
            sum((high - low) * jaccard_loss(error_N > low, truth_N) for low, high in itertools.pairwise(steps))
        )
    assert lovasz_softmax(logits_BCHW, label_BHW).item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_lovasz_in_float32_is_that_in_float64():
    """Errors are sorted as bits, of either width; and differences of losses once had few digits of many pixels."""
    logits_BCHW, label_BHW = batch(5, shape=(1, 300, 300))
    single_BCHW = logits_BCHW.detach().float().requires_grad_()
    loss, single = lovasz_softmax(logits_BCHW, label_BHW), lovasz_softmax(single_BCHW, label_BHW)
    loss.backward()
    single.backward()
    assert single.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(single_BCHW.grad, logits_BCHW.grad, check_dtype=False, rtol=1e-3, atol=1e-9)


def test_lovasz_of_a_decided_prediction_is_one_minus_the_mean_iou():
    predicted = torch.tensor([[[0, 0, 1, 1, 1, 2]]])
    label_BHW = torch.tensor([[[0, 1, 1, 1, 0, 255]]])  # IoU of 0: 1/3, of 1: 2/4; class 2 is in no label
    logits_BCHW = 99.0 * F.one_hot(predicted, 3).permute(0, 3, 1, 2).double()
    assert lovasz_softmax(logits_BCHW, label_BHW).item() == pytest.approx(1 - (1 / 3 + 1 / 2) / 2)


def test_dice_by_hand():
    """Two pixels of class 0, one of class 1, an ignored one; all probabilities 1/2; class 2 is in no label."""
    logits_BCHW = torch.tensor([0.0, 0.0, -1e9]).view(1, 3, 1, 1).expand(1, 3, 1, 4).double()
    label_BHW = torch.tensor([[[0, 0, 1, 255]]])
    first, second = 1 - (2 * 1 + 1) / (3 / 4 + 2 + 1), 1 - (2 * 0.5 + 1) / (3 / 4 + 1 + 1)
    assert dice(logits_BCHW, label_BHW, smooth=1.0).item() == pytest.approx((first + second) / 2)


def vectors_by_loop(map_HW):
    """Max-pooled by 3 as torch does, then every 3x3 neighbourhood, row by row; centred: [9, N]."""
    pooled_yx = F.max_pool2d(map_HW[None, None], 3, stride=3, padding=1)[0, 0].numpy()
    height, width = pooled_yx.shape
    vectors = [pooled_yx[y : y + 3, x : x + 3].ravel() for y in range(height - 2) for x in range(width - 2)]
    return np.stack(vectors, axis=1) - np.mean(vectors, axis=0)[:, None]


@pytest.mark.parametrize("size", [(15, 16), (17, 15)])
def test_rmi_is_the_entropy_of_the_label_given_the_prediction(size):
    """The determinant of the rest is that of the joint matrix over that of the prediction's."""
    logits_BCHW, label_BHW = batch(4, shape=(2, *size), ignored=0.1)
    is_counted_BHW = label_BHW != 255
    binary, mutual = 0.0, 0.0
    for b, c in np.ndindex(2, 3):
        y_HW = (label_BHW[b] == c).double()
        p_HW = logits_BCHW[b, c].detach().sigmoid()
        each_HW = -(y_HW * p_HW.log() + (1 - y_HW) * (1 - p_HW).log())
        binary += each_HW[is_counted_BHW[b]].sum().item() / is_counted_BHW.sum().item()
        y_9N, p_9N = vectors_by_loop(y_HW), vectors_by_loop(p_HW * is_counted_BHW[b] + 1e-6)
        both = np.concatenate([y_9N, p_9N])
        joint = both @ both.T + 1e-3 * np.eye(18)
        mutual += (np.linalg.slogdet(joint)[1] - np.linalg.slogdet(joint[9:, 9:])[1]) / 18 / 2
    assert rmi(logits_BCHW, label_BHW, share=0.0).item() == pytest.approx(binary, rel=1e-12)
    assert rmi(logits_BCHW, label_BHW, share=1.0).item() == pytest.approx(mutual, rel=1e-9)
    assert rmi(logits_BCHW, label_BHW, share=0.25).item() == pytest.approx(0.75 * binary + 0.25 * mutual, rel=1e-9)


def test_rmi_of_a_broken_network_is_nan_and_raises_nothing():
    """The training loop says which loss and step it was."""
    logits_BCHW, label_BHW = batch()
    assert rmi(logits_BCHW * math.nan, label_BHW, share=0.5).isnan()
