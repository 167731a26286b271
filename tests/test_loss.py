"""The objective against a plain loop, its closed-form gradients, finite differences through both models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segadapt.models.generative.candidates import Candidates, select
from segadapt.models.generative.loss import class_weights, normalise, window_losses
from segadapt.seeds import torch_generator

CHANNELS, GRID = 2, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pick(q_KCyx, budget) -> Candidates:
    """All classes of a window compete; at most `budget` of them are asked."""
    generators = [torch_generator(0, window) for window in range(len(q_KCyx))]
    return select(q_KCyx, topk=q_KCyx.shape[1], classes_threshold=budget, generators=generators)


def losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, *, keep_Kyx=None, temperature=1.0, reduction="valid"):
    return window_losses(
        class_weights(q_KCyx, candidates.chosen_KC, temperature=temperature),
        velocity_Pzyx,
        target_Kzyx,
        candidates.keep_Kyx if keep_Kyx is None else keep_Kyx,
        pair_window_P=candidates.pair_window_P,
        pair_class_P=candidates.pair_class_P,
        reduction=reduction,
    )


def loop(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx, *, temperature, reduction):
    """The oracle: section 1.4 of the method, one number at a time in Python's float64."""
    pairs = list(zip(candidates.pair_window_P.tolist(), candidates.pair_class_P.tolist(), strict=True))
    q, v, target = q_KCyx.tolist(), velocity_Pzyx.tolist(), target_Kzyx.tolist()
    losses = []
    for window in range(len(q)):
        rows = [(row, index) for row, (of_window, index) in enumerate(pairs) if of_window == window]
        kept, total = 0, 0.0
        for y in range(GRID):
            for x in range(GRID):
                if not keep_Kyx[window, y, x]:
                    continue
                kept += 1
                powers = [math.exp(q[window][index][y][x] / temperature) for _, index in rows]
                for z in range(CHANNELS):
                    mixture = sum(power * v[row][z][y][x] for power, (row, _) in zip(powers, rows, strict=True))
                    total += (mixture / sum(powers) - target[window][z][y][x]) ** 2
        pixels = kept if reduction == "valid" else GRID * GRID
        losses.append(total / (CHANNELS * pixels) if kept else 0.0)
    return torch.tensor(losses, dtype=torch.float64)


def problem(windows, classes, budget, *, seed=0):
    """Random logits with their candidates, velocities, targets and a random keep mask."""
    q_KCyx = random(windows, classes, GRID, GRID, seed=seed)
    candidates = pick(q_KCyx, budget)
    velocity_Pzyx = random(len(candidates.pair_class_P), CHANNELS, GRID, GRID, seed=seed + 1)
    target_Kzyx = random(windows, CHANNELS, GRID, GRID, seed=seed + 2)
    keep_Kyx = random(windows, GRID, GRID, seed=seed + 3) > -0.5
    return q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx


@settings(max_examples=60)
@given(
    windows=st.integers(1, 4),
    budget=st.sampled_from([1, 2, 20]),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
    reduction=st.sampled_from(["valid", "all"]),
    seed=st.integers(0, 50),
)
def test_loss_equals_the_loop_over_windows_pixels_classes(windows, budget, temperature, reduction, seed):
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(windows, 23, budget, seed=seed)
    assert candidates.counts == (budget,) * windows
    options = {"temperature": temperature, "reduction": reduction}
    got_K = losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx=keep_Kyx, **options)
    expected_K = loop(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx, **options)
    torch.testing.assert_close(got_K, expected_K, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 2, 20])
def test_gradients_equal_finite_differences(budget):
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(2, 21, budget)

    def total(q_KCyx, velocity_Pzyx):
        return losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx=keep_Kyx).sum()

    assert torch.autograd.gradcheck(total, (q_KCyx.requires_grad_(), velocity_Pzyx.requires_grad_()), fast_mode=True)


def test_gradients_equal_their_closed_forms():
    """dloss/dp_k = 2/(z |M|) sum_z r v_k  and  dloss/dv_k = 2/(z |M|) p_k r, both 0 outside M."""
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(1, 5, 4)
    weights_KCyx = class_weights(q_KCyx, candidates.chosen_KC, temperature=1.0).requires_grad_()
    velocity_Pzyx.requires_grad_()
    window_losses(
        weights_KCyx,
        velocity_Pzyx,
        target_Kzyx,
        keep_Kyx,
        pair_window_P=candidates.pair_window_P,
        pair_class_P=candidates.pair_class_P,
    ).sum().backward()
    assert weights_KCyx.grad is not None
    assert velocity_Pzyx.grad is not None
    with torch.no_grad():
        p_Nyx = weights_KCyx[0, candidates.pair_class_P]
        factor_yx = 2 * keep_Kyx[0].double() / (CHANNELS * keep_Kyx.sum())
        r_zyx = torch.einsum("nyx,nzyx->zyx", p_Nyx, velocity_Pzyx) - target_Kzyx[0]
        by_weight_Nyx = factor_yx * torch.einsum("zyx,nzyx->nyx", r_zyx, velocity_Pzyx)
        by_velocity_Nzyx = factor_yx * torch.einsum("nyx,zyx->nzyx", p_Nyx, r_zyx)
    torch.testing.assert_close(weights_KCyx.grad[0, candidates.pair_class_P], by_weight_Nyx, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(velocity_Pzyx.grad, by_velocity_Nzyx, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_nothing_outside_the_keep_mask_gets_a_gradient(reduction):
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(3, 9, 5)
    q_KCyx.requires_grad_()
    velocity_Pzyx.requires_grad_()
    losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx=keep_Kyx, reduction=reduction).sum().backward()
    assert q_KCyx.grad is not None
    assert velocity_Pzyx.grad is not None
    assert torch.equal(q_KCyx.grad.any(dim=1), keep_Kyx)
    assert torch.equal(velocity_Pzyx.grad.any(dim=1), keep_Kyx[candidates.pair_window_P])


def test_classes_that_are_not_asked_have_no_weight_and_no_gradient():
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, _ = problem(2, 9, 4)
    q_KCyx.requires_grad_()
    weights_KCyx = class_weights(q_KCyx, candidates.chosen_KC, temperature=1.0)
    torch.testing.assert_close(weights_KCyx.sum(dim=1), torch.ones(2, GRID, GRID, dtype=torch.float64))
    assert torch.equal(weights_KCyx.detach().amax(dim=(2, 3)) > 0, candidates.chosen_KC)
    losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx).sum().backward()
    assert q_KCyx.grad is not None
    assert not q_KCyx.grad[~candidates.chosen_KC].any()


def test_single_candidate_gives_the_segmenter_exactly_no_gradient_but_teaches_the_teacher():
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(2, 9, 1)
    q_KCyx.requires_grad_()
    velocity_Pzyx.requires_grad_()
    losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx=keep_Kyx).sum().backward()
    assert q_KCyx.grad is not None
    assert velocity_Pzyx.grad is not None
    assert not q_KCyx.grad.any()
    assert velocity_Pzyx.grad.any()


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_empty_mask_gives_zero_loss_and_gradient_never_nan(reduction):
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(2, 9, 4)
    keep_Kyx[0] = False
    q_KCyx.requires_grad_()
    losses_K = losses_of(q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx=keep_Kyx, reduction=reduction)
    losses_K.sum().backward()
    assert q_KCyx.grad is not None
    assert losses_K[0] == 0
    assert losses_K[1] > 0
    assert not q_KCyx.grad[0].any()
    assert q_KCyx.grad[1].isfinite().all()
    assert q_KCyx.grad[1].any()


def test_valid_and_all_differ_by_the_share_of_kept_pixels():
    *parts, keep_Kyx = problem(3, 9, 4)
    valid_K, all_K = (losses_of(*parts, keep_Kyx=keep_Kyx, reduction=name) for name in ("valid", "all"))
    torch.testing.assert_close(all_K, valid_K * keep_Kyx.double().mean(dim=(1, 2)))
    assert (all_K < valid_K).all()


@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_trust_scales_each_pixel_and_leaves_the_divisor(reduction):
    """A weight of 0 or 1 cuts pixels out of the sum; the same weight everywhere scales the loss."""
    q_KCyx, candidates, velocity_Pzyx, target_Kzyx, keep_Kyx = problem(3, 9, 4)
    pairs = {"pair_window_P": candidates.pair_window_P, "pair_class_P": candidates.pair_class_P}
    weights_KCyx = class_weights(q_KCyx, candidates.chosen_KC, temperature=1.0)

    def losses(keep_Kyx, trust_Kyx):
        given = (weights_KCyx, velocity_Pzyx, target_Kzyx, keep_Kyx)
        return window_losses(*given, **pairs, reduction=reduction, trust_Kyx=trust_Kyx)

    plain_K = losses(keep_Kyx, None)
    torch.testing.assert_close(losses(keep_Kyx, torch.full_like(target_Kzyx[:, 0], 0.25)), plain_K / 4)
    trusted_Kyx = random(3, GRID, GRID, seed=9) > 0
    cut_K = losses(keep_Kyx, trusted_Kyx.double())
    pixels_K = keep_Kyx.sum(dim=(1, 2)).double() if reduction == "valid" else GRID * GRID
    summed_K = (
        GRID
        * GRID
        * window_losses(weights_KCyx, velocity_Pzyx, target_Kzyx, keep_Kyx & trusted_Kyx, **pairs, reduction="all")
    )
    torch.testing.assert_close(cut_K, summed_K / pixels_K)
    assert (cut_K < plain_K).all()


def test_perfect_teacher_with_one_candidate_has_no_loss():
    q_KCyx, candidates, _, target_Kzyx, _ = problem(2, 9, 1)
    assert not losses_of(q_KCyx, candidates, target_Kzyx, target_Kzyx).any()


def test_normalised_logits_have_unit_length_keep_their_order_and_survive_zero():
    logits_BChw = random(1, 7, 4, 5)
    q_BChw = normalise(logits_BChw)
    torch.testing.assert_close(q_BChw.square().sum(dim=1), torch.ones(1, 4, 5, dtype=torch.float64))
    assert torch.equal(q_BChw.argsort(dim=1), logits_BChw.argsort(dim=1))
    assert not normalise(torch.zeros(1, 7, 1, 1)).any()


def test_gradient_of_logit_norm_is_orthogonal_to_the_logits():
    logits_BChw = random(1, 7, 4, 5).requires_grad_()
    (normalise(logits_BChw) * random(1, 7, 4, 5, seed=1)).sum().backward()
    assert logits_BChw.grad is not None
    torch.testing.assert_close((logits_BChw * logits_BChw.grad).sum(dim=1), torch.zeros(1, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize(("candidates", "largest"), [(2, 0.80), (3, 0.63), (6, 0.37), (10, 0.24), (20, 0.128)])
def test_logit_norm_bounds_the_largest_weight(candidates, largest):
    """The most certain pixel there can be: 1 / (1 + (N - 1) exp(-sqrt(N / (N - 1))))."""
    logits_BChw = torch.full((1, candidates, 1, 1), -1.0 / (candidates - 1))
    logits_BChw[0, 0] = 1
    weights_KCyx = class_weights(normalise(logits_BChw), torch.ones(1, candidates, dtype=torch.bool), temperature=1.0)
    assert weights_KCyx[0, 0, 0, 0].item() == pytest.approx(largest, abs=0.006)


@pytest.mark.parametrize("model", ["discriminative", "generative"])
@pytest.mark.parametrize("logit_norm", [True, False])
def test_step_gradient_of_each_model_equals_finite_differences(build_combined, random_image, model, logit_norm):
    """SGD of rate 1 moves the weights by minus the gradient, so a step along a direction shows its derivative."""
    options = ("tta.optimizer.name=sgd", "model.loss.topk=6", f"model.loss.logit_norm={logit_norm}")
    image_3HW = random_image(dtype=torch.float64)

    def loss_at(shift):
        combined = build_combined(*options, "tta.optimizer.lr=0", dtype=torch.float64)
        seen = []
        backward_chunks = combined._backward_chunks
        combined._backward_chunks = lambda *given, **more: seen.append(backward_chunks(*given, **more)) or seen[-1]
        with torch.no_grad():
            for name, parameter in combined.parameters().items():
                if name.startswith(model):
                    parameter += shift * direction[name]
        combined.step(image_3HW, task="t", key="k")
        return seen[0].loss

    combined = build_combined(*options, "tta.optimizer.lr=1", dtype=torch.float64)
    before = {name: value.detach().clone() for name, value in combined.parameters().items()}
    direction = {name: random(*value.shape, seed=index) for index, (name, value) in enumerate(before.items())}
    combined.step(image_3HW, task="t", key="k")
    slope = sum(
        ((before[name] - value.detach()) * direction[name]).sum()
        for name, value in combined.parameters().items()
        if name.startswith(model)
    )
    step = 1e-6
    torch.testing.assert_close((loss_at(step) - loss_at(-step)) / (2 * step), slope, rtol=1e-5, atol=0)
