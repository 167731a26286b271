"""Methods against answers worked out by hand or by a plain re-derivation, in float64."""

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES
from hypothesis import given
from hypothesis import strategies as st
from steps import random_noise
from test_combined import watch
from torch import nn
from torch.nn import functional as F

from segadapt.methods import METHODS
from segadapt.methods.augmix import OPERATIONS, augmix, equalize, posterize, solarize
from segadapt.methods.bn import mixed
from segadapt.methods.build import build_method
from segadapt.methods.deyo import move_patches
from segadapt.methods.dusa_u import DusaU
from segadapt.methods.pixels import entropy, mean_where
from segadapt.methods.roid import corrected, likelihood_ratio, symmetric_cross_entropy
from segadapt.methods.rotta import Kept
from segadapt.models.combined import Combined
from segadapt.models.discriminative.load import load_segmenter
from segadapt.seeds import numpy_generator

SGD = ("tta.optimizer.name=sgd", "tta.optimizer.lr=0.1", "tta.optimizer.momentum=0")


@pytest.fixture
def build(compose_settings, build_segmenter):
    """build(name, *overrides): the method on a float64 segmenter."""

    def build(name, *overrides):
        settings = compose_settings(f"tta.method={name}", "data.workers=0", *overrides)
        return build_method(settings, build_segmenter(dtype=torch.float64), memory=None)

    return build


def image(seed):
    return random_noise(seed).double()


def plain_entropy(logits_BChw):
    p_BChw = logits_BChw.softmax(dim=1)
    return -(p_BChw * p_BChw.log()).sum(dim=1)


# -- pixels ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=9))
def test_entropy_lies_between_certainty_and_a_uniform_choice(logits):
    logits_BChw = torch.tensor(logits, dtype=torch.float64)[None, :, None, None]
    found = entropy(logits_BChw).item()
    assert -1e-12 <= found <= math.log(len(logits)) + 1e-12
    p = np.exp(np.array(logits) - max(logits))
    p /= p.sum()
    assert found == pytest.approx(-(p * np.log(p)).sum(), abs=1e-9)


def test_entropy_and_its_gradient_are_exact_where_probabilities_are_zero():
    logits_BChw = torch.tensor([1e4, 0.0, -1e4])[None, :, None, None].requires_grad_()
    value = entropy(logits_BChw).sum()
    value.backward()
    assert value == 0
    assert logits_BChw.grad is not None
    assert (logits_BChw.grad == 0).all()


def test_mean_where_nothing_is_kept_is_zero_with_a_gradient_of_zero():
    value_B = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert mean_where(value_B, torch.tensor([True, False, True])) == 3.5
    nothing = mean_where(value_B, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0
    assert value_B.grad is not None
    assert (value_B.grad == 0).all()


# -- BN ----------------------------------------------------------------------------------------------------------------


def test_bn_is_batchnorm_in_training_mode_and_alpha_mixes(build):
    """alpha 0 is the source; alpha 1 the module's own training mode; between them mean and variance are linear."""
    source = build("source")
    norm = source.segmenter.net.decode_head.batch_norm
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        state = source.segmenter.net.state_dict()
    seen = {}
    norm.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    expected = {0.0: source.step(image(1), task="t", key="k").logits_Chw}
    norm.train()
    norm.momentum = 0.0
    expected[1.0] = source.step(image(1), task="t", key="k").logits_Chw
    for alpha, logits_Chw in expected.items():
        method = build("bn", f"tta.options.alpha={alpha}")
        method.segmenter.net.load_state_dict(state)
        torch.testing.assert_close(method.step(image(1), task="t", key="k").logits_Chw, logits_Chw)
    mixed = build("bn-alpha")
    mixed.segmenter.net.load_state_dict(state)
    own = mixed.segmenter.net.decode_head.batch_norm
    x = seen["x"]
    mean_C = 0.9 * norm.running_mean + 0.1 * x.mean(dim=(0, 2, 3))
    var_C = 0.9 * norm.running_var + 0.1 * x.var(dim=(0, 2, 3), correction=0)
    shape = (1, -1, 1, 1)
    plain = (x - mean_C.view(shape)) / (var_C.view(shape) + norm.eps).sqrt()
    torch.testing.assert_close(own(x), plain * norm.weight.view(shape) + norm.bias.view(shape))
    assert torch.equal(own.running_mean, norm.running_mean)


def test_gradient_through_own_statistics_is_that_of_training_mode(build):
    norm = build("source").segmenter.net.decode_head.batch_norm.requires_grad_()
    found = []
    for forward in (mixed(norm, 1.0), norm.train().forward):
        x = torch.randn(1, norm.num_features, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        (forward(x) * torch.arange(30.0).view(5, 6)).square().sum().backward()
        found.append((x.grad, norm.weight.grad, norm.bias.grad))
        norm.zero_grad()
    torch.testing.assert_close(*found)


def test_generative_bn_predicts_like_bn_and_without_own_statistics_learns_like_generative(build, build_combined):
    names = ("generative-bn", "generative-bn", "generative")
    alphas = (("tta.options.alpha=1",), ("tta.options.alpha=0",), ())
    one, none, plain = (
        build_combined(f"tta.method={name}", *alpha, kind=METHODS[name], dtype=torch.float64)
        for name, alpha in zip(names, alphas, strict=True)
    )
    predicted, *alike = [
        [each.step(image(seed), task="t", key=str(seed)).logits_Chw for seed in (1, 2)] for each in (one, none, plain)
    ]
    torch.testing.assert_close(predicted[0], build("bn").step(image(1), task="t", key="1").logits_Chw)
    torch.testing.assert_close(*alike, rtol=1e-7, atol=1e-9)
    assert (predicted[0] - alike[0][0]).abs().max() > 1e-3


# -- Tent, pseudo-labels -----------------------------------------------------------------------------------------------


def test_first_steps_of_tent_against_a_plain_re_derivation(build, build_segmenter):
    method, plain = build("tent", "tta.optimizer.lr=1e-2"), build_segmenter(dtype=torch.float64)
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    norms = [module for module in plain.net.modules() if isinstance(module, kinds)]
    plain.net.requires_grad_(False)
    moving = [p.requires_grad_() for norm in norms for p in (norm.weight, norm.bias)]
    assert len(moving) == len(method.moving) > 20
    adam = torch.optim.Adam(moving, lr=1e-2)
    for seed in (1, 2, 3):
        prediction = method.step(image(seed), task="t", key=str(seed))
        logits_BChw = plain.logits(image(seed)[None])
        loss = plain_entropy(logits_BChw).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert prediction.loss == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(prediction.logits_Chw, logits_BChw[0].detach())
    expected = plain.net.state_dict()
    for name, parameter in method.moving.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)


def test_pseudo_labels_count_only_confident_pixels(build):
    method = build("pseudo-label")
    logits_BChw = torch.tensor([[2.0, 0.1], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    sure, unsure = (math.log1p(math.exp(-gap)) for gap in (2.0, 0.1))
    for threshold, expected in ((0.0, (sure + unsure) / 2), (0.8, sure), (0.9, 0.0)):
        method.options.threshold = threshold
        assert method.loss(logits_BChw, image(1), task="t", key="k").item() == pytest.approx(expected)


# -- EATA, RDumb -------------------------------------------------------------------------------------------------------


def test_filters_of_eata(build):
    """Three classes. Pixels: sure of class 0 twice, sure of class 2, unsure."""
    method = build("eata", "tta.options.fisher_images=1", "tta.options.fisher_alpha=0")
    sure_0, sure_2, unsure = [8.0, 0, 0], [0, 0, 8.0], [1.0, 1, 0]
    logits_BChw = torch.tensor([sure_0, sure_0, sure_2, unsure], dtype=torch.float64).T.view(1, 3, 1, 4)
    assert method.chosen(logits_BChw).flatten().tolist() == [True, True, True, False]  # nothing is redundant yet
    p_3C = logits_BChw.softmax(dim=1)[0, :, 0].T[:3]
    first_C = p_3C.mean(dim=0)
    torch.testing.assert_close(method.state["mean_C"], first_C)
    assert not method.chosen(logits_BChw).any()  # cosines 0.89 and 0.45
    torch.testing.assert_close(method.state["mean_C"], first_C)
    new = torch.tensor([[0.0, 8, 0]], dtype=torch.float64).T.view(1, 3, 1, 1)
    assert method.chosen(new).all()  # class 1 has been seen nowhere
    torch.testing.assert_close(method.state["mean_C"], 0.9 * first_C + 0.1 * new.softmax(dim=1).flatten())


def with_importances(build, images):
    """Source images of the tests' own, in float64."""
    method = build("eata", "tta.options.fisher_alpha=0")
    method.options.fisher_alpha = 2000.0
    method.see_source(images)
    return method


def test_loss_of_eata_weights_by_reliability_and_holds_the_source(build):
    method = with_importances(build, [image(1), image(2)])
    name, parameter = next(iter(method.moving.items()))
    assert set(method.fisher) == set(method.moving)
    assert all((value >= 0).all() for value in method.fisher.values())
    assert any((value > 0).any() for value in method.fisher.values())
    with torch.no_grad():
        parameter += 0.5
    anchor = 2000 * 0.25 * method.fisher[name].sum()
    logits_BChw = torch.tensor([[9.0, 3, 0.1], [0, 0, 0]], dtype=torch.float64).view(1, 2, 1, 3)
    limit, H_3 = 0.4 * math.log(2), plain_entropy(logits_BChw).flatten()
    kept_2 = H_3[limit > H_3]
    assert len(kept_2) == 2
    expected = ((limit - kept_2).exp() * kept_2).mean() + anchor
    assert method.loss(logits_BChw, image(1), task="t", key="k").item() == pytest.approx(expected.item())
    unsure = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    assert (
        method.loss(unsure, image(1), task="t", key="k").item() == 0
    )  # nothing chosen: no step, by the anchor neither


def test_importances_of_eata_are_mean_squared_gradients_of_its_own_labels(build):
    given = [image(1), image(2)]
    method = with_importances(build, given)
    squares = {name: torch.zeros_like(parameter) for name, parameter in method.moving.items()}
    for each in given:
        logits_BChw = method.segmenter.logits(each[None])
        loss = F.nll_loss(logits_BChw.log_softmax(dim=1), logits_BChw.argmax(dim=1))
        for name, gradient in zip(squares, torch.autograd.grad(loss, list(method.moving.values())), strict=True):
            squares[name] += gradient.square() / 2
    for name, expected in squares.items():
        torch.testing.assert_close(method.fisher[name], expected)
    assert all(parameter.grad is None for parameter in method.moving.values())


def test_rdumb_forgets_all_every_so_many_images(build):
    options = ("tta.options.reset_every=2", "tta.options.margin=1", "tta.options.distance=1", *SGD)
    method, fresh = build("rdumb", *options), build("rdumb", *options)
    for seed in (1, 2):
        method.step(image(seed), task="t", key=str(seed))
    for seed in (3, 4):
        one, other = (each.step(image(seed), task="t", key=str(seed)) for each in (method, fresh))
        assert torch.equal(one.logits_Chw, other.logits_Chw)
    for name, parameter in method.moving.items():
        assert torch.equal(parameter, fresh.moving[name])


# -- SAR ---------------------------------------------------------------------------------------------------------------


def test_two_step_gradient_of_sar(build, build_segmenter):
    method = build("sar", "tta.options.rho=0.5", "tta.options.reset_below=0", *SGD)
    plain = build_segmenter(dtype=torch.float64)
    everything, weights = dict(plain.net.named_parameters()), {}
    for name in method.moving:
        weights[name] = everything[name].detach().clone()
    limit = plain_entropy(plain.logits(image(1)[None])).median().item()
    method.options.margin = limit / math.log(len(CLASSES))

    def H(values):
        with torch.no_grad():
            for name, value in values.items():
                everything[name].copy_(value)
        return plain_entropy(plain.logits(image(1)[None]))

    moving = [everything[name] for name in weights]
    H_Bhw = H(weights)
    reliable_Bhw = H_Bhw < limit
    assert 0 < reliable_Bhw.sum() < reliable_Bhw.numel()
    g = torch.autograd.grad(H_Bhw[reliable_Bhw].mean(), moving)
    length = torch.cat([each.flatten() for each in g]).norm()
    worst = {name: value + 0.5 * each / length for (name, value), each in zip(weights.items(), g, strict=True)}
    H_Bhw = H(worst)
    g = torch.autograd.grad(H_Bhw[reliable_Bhw & (H_Bhw < limit)].mean(), moving)
    prediction = method.step(image(1), task="t", key="k")
    assert prediction.is_updated
    for (name, value), each in zip(weights.items(), g, strict=True):
        torch.testing.assert_close(method.moving[name].detach(), value - 0.1 * each, rtol=1e-6, atol=1e-10)
    assert method.state["average"] == pytest.approx(H_Bhw[reliable_Bhw].mean().item(), rel=1e-6)
    assert not any("decode_head" in name for name in weights)
    assert len(weights) < len(method.segmenter.norm_parameters())


@pytest.mark.parametrize("name", ["sar", "deyo"])
def test_the_top_norms_stay_as_they_are(build, name):
    moving = build(name).moving
    norms = set(build("tent").moving)
    stay = {one for one in norms if one.startswith(("decode_head.", "segformer.stages.3."))}
    assert set(moving) == norms - stay
    assert 0 < len(stay) < len(norms)


def test_sar_goes_back_when_its_average_falls(build):
    method = build("sar", "tta.options.margin=1", "tta.options.reset_below=100", *SGD)
    before = {name: parameter.detach().clone() for name, parameter in method.moving.items()}
    assert method.step(image(1), task="t", key="k").is_updated
    assert all(torch.equal(parameter, before[name]) for name, parameter in method.moving.items())
    assert method.state["average"] is None


# -- MEMO --------------------------------------------------------------------------------------------------------------


def test_chunked_gradient_of_memo_is_that_of_the_joint_loss(build):
    method = build("memo", "tta.options.augmentations=5")
    loss = method.marginal_backward(image(1), task="t", key="k")
    found = {name: parameter.grad.clone() for name, parameter in method.moving.items() if parameter.grad is not None}
    method._updates.drop()
    p, flips = [], 0
    for index in range(5):
        changed_3HW, is_flipped = method.augmented(image(1), index, task="t", key="k")
        p_BChw = method.segmenter.logits(changed_3HW[None]).softmax(dim=1)
        p.append(p_BChw.flip(3) if is_flipped else p_BChw)
        flips += is_flipped
    assert 0 < flips < 5
    marginal_BChw = torch.stack(p).mean(dim=0)
    joint = -(marginal_BChw * marginal_BChw.log()).sum(dim=1).mean()
    joint.backward()
    assert loss.item() == pytest.approx(joint.item(), rel=1e-12)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, method.moving[name].grad, rtol=1e-8, atol=1e-12)


def test_memo_keeps_nothing_of_other_images(build):
    method, fresh = build("memo", "tta.options.augmentations=2"), build("memo", "tta.options.augmentations=2")
    method.step(image(1), task="t", key="1")
    one, other = (each.step(image(2), task="t", key="2") for each in (method, fresh))
    assert torch.equal(one.logits_Chw, other.logits_Chw)


@given(st.integers(0, 2**31))
def test_augmix_stays_in_range_keeps_its_input_and_is_the_same_again(seed):
    image_3HW = random_noise(seed % 7)
    kept = image_3HW.clone()
    one, other = (augmix(image_3HW, numpy_generator(seed, "k")) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(image_3HW, kept)
    assert one.shape == image_3HW.shape
    assert 0 <= one.min() <= one.max() <= 1


def test_operations_of_augmix_on_known_values():
    ramp_3HW = torch.linspace(0.2, 0.6, 256).view(1, 1, 256).expand(3, 1, 256)
    torch.testing.assert_close(equalize(ramp_3HW, 0)[0, 0, [0, -1]], torch.tensor([0.0, 1.0]))
    assert (equalize(ramp_3HW, 0).diff(dim=2) >= 0).all()
    torch.testing.assert_close(posterize(torch.full((3, 1, 1), 200 / 255), 1.0), torch.full((3, 1, 1), 192 / 255))
    torch.testing.assert_close(solarize(torch.tensor([0.2, 0.8]), 0.3), torch.tensor([0.2, 0.2]))
    flat_3HW = torch.full((3, 2, 2), 0.5)
    assert all(operation(flat_3HW, 0.3).isfinite().all() for operation in OPERATIONS)


# -- CoTTA -------------------------------------------------------------------------------------------------------------


def test_teacher_of_cotta_averages_before_the_restore_and_its_share_goes_back(build):
    method = build("cotta", "tta.options.restore=0.25", "tta.options.average=0.9", "tta.options.scales=[1.0]", *SGD)
    source = {name: parameter.detach().clone() for name, parameter in method.moving.items()}
    assert method.step(image(1), task="t", key="k").is_updated
    back = moved = 0
    for name, parameter in method.moving.items():
        step = (method.state["teacher"][name] - source[name]) / 0.1  # the student's, before the restore
        went = step.abs() > 1e-6
        is_back = (parameter.detach() == source[name])[went]
        torch.testing.assert_close(parameter.detach()[went][~is_back], (source[name] + step)[went][~is_back])
        back, moved = back + int(is_back.sum()), moved + int(went.sum())
    assert moved > 1000
    assert abs(back / moved - 0.25) < 4 * math.sqrt(0.25 * 0.75 / moved)


def test_teacher_of_cotta_is_averaged_only_where_the_source_is_unsure(build):
    method = build("cotta", "tta.options.scales=[1.0,2.0]")
    plain_BChw = method.probabilities(method._source, image(1))
    confidence_Bhw = plain_BChw.amax(dim=1)
    method.options.confidence = confidence_Bhw.median().item()
    taught_BChw = method.taught(image(1))
    views = []
    for scale in (1, 2):
        size = [side * scale for side in image(1).shape[1:]]
        scaled_3HW = F.interpolate(image(1)[None], size=size, mode="bilinear", align_corners=False)[0]
        for axes in ((), (2,)):
            p_BChw = method.segmenter.logits(scaled_3HW.flip(axes)[None]).softmax(dim=1).detach()
            p_BChw = p_BChw.flip([axis + 1 for axis in axes])
            views.append(F.interpolate(p_BChw, size=plain_BChw.shape[2:], mode="bilinear", align_corners=False))
    is_sure_Bhw = confidence_Bhw > method.options.confidence
    assert 0 < is_sure_Bhw.sum() < is_sure_Bhw.numel()
    expected_BChw = torch.where(is_sure_Bhw[:, None], plain_BChw, torch.stack(views).mean(dim=0))
    torch.testing.assert_close(taught_BChw, expected_BChw)


# -- DeYO, ROID, RoTTA, DUSA-U -----------------------------------------------------------------------------------------


def test_patches_go_back_to_where_they_come_from():
    x_13YX = torch.arange(3 * 8 * 12, dtype=torch.float64).view(1, 3, 8, 12)
    order_N = torch.tensor([3, 1, 0, 2])
    moved = move_patches(x_13YX, order_N, 2)
    assert torch.equal(moved[..., :4, :6], x_13YX[..., 4:, 6:])  # the first patch is now the last
    assert torch.equal(move_patches(moved, order_N.argsort(), 2), x_13YX)


def test_deyo_keeps_sure_pixels_whose_decision_suffers(build, monkeypatch):
    """Two classes, four pixels: sure and shaken, sure and not shaken, unsure and shaken, sure and shaken."""
    method = build("deyo")
    logits_BChw = torch.tensor([[5.0, 5, 0.1, -4], [0, 0, 0, 0]], dtype=torch.float64).view(1, 2, 1, 4)
    p_BChw = logits_BChw.softmax(dim=1)
    falls = torch.tensor([0.5, 0.1, 0.5, 0.3], dtype=torch.float64)
    label_4 = p_BChw.argmax(dim=1).flatten()
    other = p_BChw.clone()
    for pixel, label in enumerate(label_4.tolist()):
        other[0, label, 0, pixel] -= falls[pixel]
    monkeypatch.setattr(method, "shuffled", lambda image_3HW, **names: other)
    H_4, most = plain_entropy(logits_BChw).flatten(), math.log(2)
    assert (0.5 * most > H_4).tolist() == [True, True, False, True]
    kept = [0, 3]
    expected = sum((1 / (H_4[i] - 0.4 * most).exp() + 1 / (-falls[i]).exp()) * H_4[i] for i in kept) / 2
    assert method.loss(logits_BChw, image(1), task="t", key="k").item() == pytest.approx(float(expected))


def test_shuffled_predictions_are_those_of_the_patches_themselves(build, monkeypatch):
    """A segmenter that sees one pixel at a time does not mind the shuffle, whatever the order."""
    method = build("deyo", "tta.options.patches=3")
    size = torch.Size([3, 48, 48])
    picture = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(method, "again", lambda x_13HW: (x_13HW[:, :, ::4, ::4],))
    found = method.shuffled(picture, task="t", key="k")
    torch.testing.assert_close(found, picture[None, :, ::4, ::4].softmax(dim=1))


def test_weights_and_losses_of_roid(build):
    method = build("roid")
    logits_BChw = torch.tensor([[6.0, 4, 0, 0], [0, 0, 3, 0.5], [0, 0, 0, 0]], dtype=torch.float64).view(1, 3, 1, 4)
    p = logits_BChw[0, :, 0].softmax(dim=0).numpy()  # [C, pixel]
    mean = np.full(3, 1 / 3)
    cosine = (p * mean[:, None]).sum(axis=0) / (np.linalg.norm(p, axis=0) * np.linalg.norm(mean))
    certainty, diversity = (p * np.log(p)).sum(axis=0), 1 - cosine
    div, cert = ((v - v.min()) / (v.max() - v.min()) for v in (diversity, certainty))
    expected = np.where(div < div.mean(), 0, np.exp(div * cert * 3))
    assert (expected > 0).sum() == 3
    np.testing.assert_allclose(method.weights(logits_BChw).flatten(), expected, rtol=1e-9)
    np.testing.assert_allclose(method.state["mean_C"], 0.9 * mean + 0.1 * p.mean(axis=1), rtol=1e-9)
    clipped = np.minimum(p, 0.99)
    slr = -(clipped * np.log(clipped / (1 - clipped) + 1e-5)).sum(axis=0)
    np.testing.assert_allclose(likelihood_ratio(logits_BChw).flatten(), slr, rtol=1e-9)
    flat = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    sure = torch.tensor([2.0, 0, 0], dtype=torch.float64).view(1, 3, 1, 1)
    q = np.exp([2.0, 0, 0]) / np.exp([2.0, 0, 0]).sum()
    half = 0.5 * math.log(3) - 0.5 * np.log(q).mean()
    assert symmetric_cross_entropy(sure, flat).item() == pytest.approx(half)
    assert symmetric_cross_entropy(flat, sure).item() == pytest.approx(half)


def test_roid_ends_each_step_near_the_source_and_corrects_by_the_prior(build):
    method = build("roid", "tta.options.ensemble=0.75", *SGD)
    source = {name: parameter.detach().clone() for name, parameter in method.moving.items()}
    full = build("roid", "tta.options.ensemble=1", *SGD)
    one, other = (each.step(image(1), task="t", key="k") for each in (method, full))
    assert torch.equal(one.logits_Chw, other.logits_Chw)
    for name, parameter in method.moving.items():
        expected = 0.75 * full.moving[name] + 0.25 * source[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-12)
    logits_Chw = torch.tensor([[3.0, 3], [0, 1]], dtype=torch.float64).view(2, 1, 2)
    prior = logits_Chw.softmax(dim=0).mean(dim=(1, 2))
    smooth = 0.5 / prior.max()
    factor = (prior + smooth) / (1 + 2 * smooth)
    torch.testing.assert_close(corrected(logits_Chw), logits_Chw * factor[:, None, None])


def test_memory_of_rotta_is_balanced_and_lets_the_oldest_and_least_certain_go(build):
    method = build("rotta", "tta.options.capacity=4")

    def remember(label, uncertainty, name):
        kept = Kept(image(1), label, uncertainty, ("t", name))
        method.remember(kept, classes=2)
        return [(each.label, each.name[1]) for each in method.state["memory"]]

    assert remember(0, 0.2, "a") == [(0, "a")]
    assert remember(0, 0.1, "b") == [(0, "a"), (0, "b")]
    assert remember(0, 0.0, "c") == [(0, "b"), (0, "c")]  # class 0 has its half: the oldest and least certain goes
    assert remember(1, 0.3, "d") == [(0, "b"), (0, "c"), (1, "d")]
    assert remember(1, 0.3, "e") == [(0, "b"), (0, "c"), (1, "d"), (1, "e")]
    assert remember(1, 0.69, "f") == [(0, "b"), (0, "c"), (1, "d"), (1, "e")]  # it is less certain than all
    assert [each.age for each in method.state["memory"]] == [5, 4, 3, 2]


def test_update_of_rotta_against_a_plain_re_derivation(build):
    """Two images, the update at the second: joint loss, statistics, teacher."""
    options = ("tta.options.capacity=2", "tta.options.every=2", "tta.options.alpha=0.5", *SGD)
    method, plain = build("rotta", *options), build("source")
    net, norm = plain.segmenter.net.requires_grad_(True), plain.segmenter.net.decode_head.batch_norm
    seen = []
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    assert not method.step(image(1), task="t", key="1").is_updated
    prediction = method.step(image(2), task="t", key="2")
    assert prediction.is_updated
    loss = torch.zeros((), dtype=torch.float64)
    both = []
    for seed in (1, 2):
        plain.segmenter.logits(image(seed)[None])  # what BatchNorm is given
        both.append(seen[-1])
    x = torch.cat([each.flatten(2) for each in both], dim=2)  # as one batch: both images have as many pixels
    norm.running_mean = norm.running_mean.lerp(x.mean(dim=(0, 2)), 0.5)
    norm.running_var = norm.running_var.lerp(x.var(dim=(0, 2), correction=0), 0.5)
    for seed, age in ((1, 2), (2, 1)):
        q_BChw = None
        for picture in (image(seed), augmix(image(seed), numpy_generator(0, "t", str(seed), "memory", age))):
            if q_BChw is None:
                q_BChw = plain.segmenter.logits(picture[None]).softmax(dim=1).detach()
            else:
                share = math.exp(-age / 2) / (1 + math.exp(-age / 2)) / 2
                cross = -(q_BChw * plain.segmenter.logits(picture[None]).log_softmax(dim=1)).sum(dim=1).mean()
                loss = loss + share * cross
    assert len(method.state["memory"]) == 2
    loss.backward()
    assert prediction.loss == pytest.approx(loss.item(), rel=1e-6)
    weights = dict(net.named_parameters())
    for name, parameter in method.moving.items():
        expected = weights[name] - 0.1 * weights[name].grad
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-6, atol=1e-10)
        teacher = 0.999 * weights[name] + 0.001 * expected
        torch.testing.assert_close(method.state["teacher"][name], teacher.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(method.state["statistics"][0], (norm.running_mean, norm.running_var))


@pytest.mark.parametrize("max_pairs", [1, 16])
def test_dusa_u_teaches_like_the_generative_method_and_learns_from_the_empty_prompt(build_combined, max_pairs):
    given = (f"model.generative.max_pairs={max_pairs}", "model.loss.topk=3")
    one, plain = (build_combined(*given, kind=kind, dtype=torch.float64) for kind in (DusaU, Combined))
    seen = [watch(each) for each in (one, plain)]
    losses = [each.step(image(1), task="t", key="k").loss for each in (one, plain)]
    assert losses[0] == losses[1]
    found, expected = ({n: g for n, g in each[0][1].items() if g is not None} for each in seen)
    for name in expected:
        if name.startswith("discriminative"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-15)
    other = build_combined(*given, dtype=torch.float64)
    noisy = other.sight.noise(image(1), task="t", key="k")
    teacher, rows = other.generative, len(noisy.x_t_Kzyx)
    velocity = teacher.transformer(
        noisy.x_t_Kzyx,
        teacher.embeddings.null_sequence_LE.double().expand(rows, -1, -1),
        teacher.embeddings.null_pooled_D.double().expand(rows, -1),
        1000 * noisy.sigma_K,
        return_dict=False,
    )[0]
    (velocity - noisy.target_Kzyx).square().mean().backward()
    for name, parameter in teacher.transformer.named_parameters():
        torch.testing.assert_close(found[f"generative.{name}"], parameter.grad, rtol=1e-7, atol=1e-12)


# -- what is saved -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cotta", "rotta"])
def test_saved_is_the_averaging_teacher_which_is_scored(build, name, tmp_path):
    more = {"cotta": ["tta.options.scales=[1.0]", "tta.options.flip=false"],
            "rotta": ["tta.options.every=1", "tta.options.alpha=0.5", "tta.options.nu=0.5"]}  # fmt: skip
    method = build(name, "tta.optimizer.lr=1e-2", *more[name])
    for seed in range(3):
        method.step(image(seed), task="t", key=str(seed))
    before = {key: value.clone() for key, value in method.segmenter.net.state_dict().items()}
    method.save(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in method.segmenter.net.state_dict().items())
    saved = load_segmenter(str(tmp_path), num_classes=len(CLASSES), device="cpu")
    scored_Chw = method.step(image(9), task="t", key="9").logits_Chw.log_softmax(dim=0)
    found_Chw = saved.logits(image(9).float()[None])[0].log_softmax(dim=0)
    torch.testing.assert_close(found_Chw, scored_Chw.float(), rtol=0, atol=3e-6)
    student_Chw = method.segmenter.logits(image(9)[None])[0].log_softmax(dim=0)
    assert (student_Chw - scored_Chw).abs().max() > 3e-4
