"""Trust: agreement of the draws, refused images, and the way back to the source weights."""

import itertools

import pytest
import torch
from conftest import CLASSES
from hypothesis import given
from hypothesis import strategies as st
from steps import decide, steps
from test_combined import ALL_CLASSES, LEARN, MOVING, changed, optimizer_state, poison_velocity, same, state, watch

from segadapt.config import TrustSettings
from segadapt.models.generative import loss as objective
from segadapt.models.generative import trust


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- agreement ---------------------------------------------------------------------------------------------------------


@given(windows=st.integers(1, 3), draws=st.integers(1, 5), classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_agreement_and_decision_are_those_of_a_plain_loop(windows, draws, classes, seed):
    error_RCyx = random(windows * draws, classes, 2, 3, seed=seed).square()
    agreement_Kyx, decision_Kyx = trust.agreement(error_RCyx, draws), trust.decision(error_RCyx, draws)
    for window, y, x in itertools.product(range(windows), range(2), range(3)):
        rows = error_RCyx[window * draws : (window + 1) * draws, :, y, x].tolist()
        votes = [min(range(classes), key=lambda k, row=row: row[k]) for row in rows]
        assert agreement_Kyx[window, y, x] == max(votes.count(k) for k in votes) / draws
        totals = [sum(row[k] for row in rows) for k in range(classes)]
        assert decision_Kyx[window, y, x] == totals.index(min(totals))


def test_errors_are_infinite_for_classes_that_were_not_asked():
    velocity_Pzyx, target_Rzyx = random(3, 4, 2, 2), random(2, 4, 2, 2, seed=1)
    rows, classes = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 2])
    error_RCyx = trust.asked_errors(velocity_Pzyx, target_Rzyx, pair_row_P=rows, pair_class_P=classes, num_classes=5)
    asked = {(0, 1): 0, (0, 4): 1, (1, 2): 2}
    for row, index in itertools.product(range(2), range(5)):
        got_yx, pair = error_RCyx[row, index], asked.get((row, index))
        if pair is None:
            assert got_yx.isinf().all()
        else:
            torch.testing.assert_close(got_yx, (velocity_Pzyx[pair] - target_Rzyx[row]).square().sum(dim=0) / 4)


def verdict_of(mode, threshold=1.0, draws=3):
    """Two windows of five classes; the draws of a window share its logits and its mask."""
    error_RCyx = random(2 * draws, 5, 4, 4).square()
    q_RCyx = random(2, 5, 4, 4, seed=1).repeat_interleave(draws, dim=0)
    keep_Ryx = (random(2, 4, 4, seed=2) > -0.5).repeat_interleave(draws, dim=0)
    settings = TrustSettings(mode=mode, threshold=threshold, max_agreement=1.0, restore=0.0)
    return error_RCyx, q_RCyx, keep_Ryx, trust.judge(error_RCyx, q_RCyx, keep_Ryx, draws=draws, trust=settings)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2 / 3, 0.67, 1.0])
def test_skip_leaves_out_exactly_the_pixels_below_the_threshold(threshold):
    error_RCyx, _, keep_Ryx, verdict = verdict_of("skip", threshold)
    is_steady_Ryx = (trust.agreement(error_RCyx, 3) >= threshold).repeat_interleave(3, dim=0)
    assert torch.equal(verdict.keep_Ryx, keep_Ryx & is_steady_Ryx)
    assert verdict.weight_Ryx is None
    assert verdict.sums_4[3] == verdict.keep_Ryx[::3].sum()
    assert is_steady_Ryx.any()
    assert is_steady_Ryx.all() == (threshold < 1 / 3)


def test_weight_is_the_agreement_and_keeps_every_pixel():
    error_RCyx, _, keep_Ryx, verdict = verdict_of("weight")
    assert torch.equal(verdict.keep_Ryx, keep_Ryx)
    assert torch.equal(verdict.weight_Ryx, trust.agreement(error_RCyx, 3).repeat_interleave(3, dim=0))
    assert len(verdict.weight_Ryx.unique()) > 1


def test_verdict_compares_teacher_and_segmenter_on_the_pixels_that_were_asked():
    error_RCyx, q_RCyx, keep_Ryx, verdict = verdict_of("none")
    assert torch.equal(verdict.keep_Ryx, keep_Ryx)
    assert verdict.weight_Ryx is None
    is_alike_Kyx = trust.decision(error_RCyx, 3) == q_RCyx[::3].argmax(dim=1)
    agreement, alike, asked, counted = verdict.sums_4.tolist()
    assert (alike, asked, counted) == ((is_alike_Kyx & keep_Ryx[::3]).sum(), *[keep_Ryx[::3].sum()] * 2)
    assert 0 < alike < is_alike_Kyx.sum()
    assert agreement == pytest.approx(trust.agreement(error_RCyx, 3).sum().item())


def trusted_loss(combined, image_3HW, mode, threshold):
    """The trust of a step written out on all pairs at once: loss, share of pixels that count, mean agreement."""
    D, q = combined.window.draws, []
    logits_BChw = combined.segmenter.logits(image_3HW[None])
    noisy = combined.sight.noise(image_3HW, task="t", key="k")
    q_KCyx = combined.in_windows(logits_BChw, image_3HW, grid=noisy.x_t_Kzyx.shape[-1])
    losses, kept, steady = [], [], []
    every = torch.arange(len(CLASSES))
    for row in range(len(noisy.sigma_K)):
        v_Czyx = combined.generative.velocity(noisy, torch.full_like(every, row), every)
        error_zyx = (q_KCyx[row // D].softmax(dim=0)[:, None] * v_Czyx).sum(dim=0) - noisy.target_Kzyx[row]
        q.append(((v_Czyx - noisy.target_Kzyx[row]).square().mean(dim=1).argmin(dim=0), error_zyx.square().mean(dim=0)))
    for window in range(len(q_KCyx)):
        mine = q[window * D : (window + 1) * D]
        votes_Dyx = torch.stack([decided for decided, _ in mine])
        share_yx = torch.stack([(votes_Dyx == k).sum(dim=0) for k in range(len(CLASSES))]).amax(dim=0).double() / D
        counts_yx = share_yx >= threshold - 1e-6 if mode == "skip" else torch.ones_like(share_yx)
        factor_yx = counts_yx * (share_yx if mode == "weight" else 1)
        losses += [(factor_yx * squared_yx).sum() / counts_yx.sum().clamp(min=1) for _, squared_yx in mine]
        kept.append(counts_yx.double().mean())
        steady.append(share_yx.double().mean())
    return tuple(torch.stack(values).mean() for values in (losses, kept, steady))


@pytest.mark.parametrize("max_pairs", [5, 18, 1000])
@pytest.mark.parametrize(("mode", "threshold"), [("none", 1.0), ("skip", 1.0), ("skip", 0.6), ("weight", 1.0)])
def test_trusted_step_equals_the_method_written_out(build_combined, random_image, mode, threshold, max_pairs):
    options = (
        ALL_CLASSES,
        "model.generative.draws=3",
        f"model.trust.mode={mode}",
        f"model.trust.threshold={threshold}",
    )
    options += (f"model.generative.max_pairs={max_pairs}",)
    image_3HW = random_image(dtype=torch.float64)
    combined, plain = (build_combined(*options, dtype=torch.float64) for _ in range(2))
    for each in (combined, plain):
        with torch.no_grad():  # a wide output of the teacher, so that its draws do not always agree
            each.generative.transformer.proj_out.weight.mul_(3)
    seen = watch(combined)
    prediction = combined.step(image_3HW, task="t", key="k")
    loss, kept, steady = trusted_loss(plain, image_3HW, mode, threshold)
    loss.backward()
    assert set(prediction.candidates) == {len(CLASSES)}
    assert prediction.kept == pytest.approx(kept.item())
    assert prediction.agreement == pytest.approx(steady.item())
    assert 0.34 < steady < 1
    assert (kept < 1) == (mode == "skip")
    torch.testing.assert_close(seen[0][0], loss.detach(), rtol=1e-10, atol=1e-10)
    for name, parameter in plain.parameters().items():
        torch.testing.assert_close(seen[0][1][name], parameter.grad, rtol=1e-9, atol=1e-10)


def test_image_without_a_gradient_makes_no_step(build_combined, random_image, monkeypatch):
    """AdamW's moments alone would move every weight by about lr."""
    combined = build_combined(*LEARN)
    assert combined.step(random_image(), task="t", key="first").is_updated
    before = state(combined)
    nothing = lambda weights_KCyx, velocity_Pzyx, *_, **__: 0 * (weights_KCyx.sum((1, 2, 3)) + velocity_Pzyx.sum())  # noqa: E731
    monkeypatch.setattr(objective, "window_losses", nothing)
    prediction = combined.step(random_image(seed=1), task="t", key="second")
    assert (prediction.loss, prediction.grad_norm) == (0, 0)
    assert (prediction.is_updated, prediction.is_refused, prediction.is_step_finite) == (False, False, True)
    assert changed(before, state(combined)) == set()


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("is_right", [True, False])
def test_teacher_agrees_with_the_segmenter_where_it_decides_alike(build_combined, random_image, draws, is_right):
    combined = build_combined(*LEARN, f"model.generative.draws={draws}")
    decide(combined, is_right)
    prediction = combined.step(random_image(), task="t", key="k")
    assert prediction.teacher_agrees == float(is_right)
    assert prediction.agreement == (None if draws == 1 else 1.0)
    assert prediction.is_updated  # max_agreement=1 never refuses
    assert not prediction.is_refused


def test_image_on_which_the_teacher_has_nothing_to_add_makes_no_step_and_leaves_no_trace(build_combined, random_image):
    options = (*LEARN, "model.trust.max_agreement=0.999")
    combined, spared = build_combined(*options), build_combined(*options)
    for each in (combined, spared):
        assert each.step(random_image(), task="t", key="first").is_updated
    before, chunks = state(combined), combined._backward_chunks
    decide(combined, is_right=True)
    refused = combined.step(random_image(seed=1), task="t", key="agreed")
    assert (refused.is_refused, refused.is_updated) == (True, False)
    assert refused.loss is not None
    assert changed(before, state(combined)) == set()
    combined._backward_chunks = chunks
    one, other = (each.step(random_image(seed=2), task="t", key="next") for each in (combined, spared))
    assert one.is_updated
    assert one.loss == other.loss
    assert changed(state(combined), state(spared)) == set()
    assert same(optimizer_state(combined), optimizer_state(spared))


def test_what_is_not_finite_is_skipped_and_not_refused(build_combined, random_image):
    combined = build_combined(*LEARN, "model.trust.max_agreement=0")
    poison_velocity(combined, float("nan"))
    prediction = combined.step(random_image(), task="t", key="k")
    assert (prediction.is_updated, prediction.is_refused) == (False, False)


# -- restore -----------------------------------------------------------------------------------------------------------


REFUSING = (*LEARN, "model.trust.max_agreement=0.999")  # only images on which all is alike


def refused(combined, image_3HW, task="t"):
    """A step on an image for which the teacher decides everywhere as the segmenter does."""
    chunks = combined._backward_chunks
    decide(combined, is_right=True)
    prediction = combined.step(image_3HW, task=task, key="agreed")
    combined._backward_chunks = chunks
    assert (prediction.is_refused, prediction.is_updated) == (True, False)
    return prediction


@torch.no_grad()
def disturb(combined):
    """Every weight and buffer away from the source, what is frozen too."""
    for net in (combined.segmenter.net, combined.generative.transformer, combined.generative.autoencoder):
        for value in net.state_dict().values():
            value += 1 if value.dtype == torch.int64 else 0.01


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_refused_image_takes_the_weights_that_share_of_the_way_to_the_source(build_combined, random_image, share):
    """After n of them (1 - share)^n of the distance is left, of each weight."""
    combined = build_combined(*REFUSING, f"model.trust.restore={share}", dtype=torch.float64)
    source, image_3HW = state(combined), random_image(dtype=torch.float64)
    for seed in range(2):
        assert combined.step(random_image(seed=seed, dtype=torch.float64), task="t", key=str(seed)).is_updated
    learned = state(combined)
    assert len(changed(source, learned)) > len(source) / 2
    for n in (1, 2, 3):
        refused(combined, image_3HW)
        for name, value in combined.parameters().items():
            distance = (1 - share) ** n * (learned[name] - source[name])
            torch.testing.assert_close(value.detach(), source[name] + distance, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", [0, 1])
def test_restoring_nothing_or_all_is_exact_to_the_bit(build_combined, random_image, share):
    combined = build_combined(*REFUSING, f"model.trust.restore={share}")
    source = state(combined)
    steps(combined, "ab")
    learned = state(combined)
    refused(combined, random_image())
    assert changed(source, learned)
    assert changed(source if share else learned, state(combined)) == set()


def test_refused_image_is_scored_before_the_weights_go_back(build_combined, random_image):
    fresh, combined = build_combined(*REFUSING), build_combined(*REFUSING, "model.trust.restore=1")
    steps(combined, "ab")
    with torch.no_grad():
        learned_Chw, source_Chw = (each.segmenter.logits(random_image()[None])[0] for each in (combined, fresh))
    assert not torch.equal(learned_Chw, source_Chw)
    assert torch.equal(refused(combined, random_image()).logits_Chw, learned_Chw)
    assert torch.equal(combined.step(random_image(), task="t", key="next").logits_Chw, source_Chw)


def test_an_image_that_updates_does_not_restore(build_combined):
    restoring, plain = (build_combined(*REFUSING, f"model.trust.restore={share}") for share in (0.5, 0))
    for each in (restoring, plain):
        assert all(prediction.is_updated for prediction in steps(each, "abc"))
    assert changed(state(restoring), state(plain)) == set()


def test_an_image_without_a_finite_gradient_or_with_none_does_not_restore(build_combined, random_image, monkeypatch):
    nothing = lambda weights_KCyx, velocity_Pzyx, *_, **__: 0 * (weights_KCyx.sum((1, 2, 3)) + velocity_Pzyx.sum())  # noqa: E731
    for fault, limit in (("nan", 0), ("zero", 0.999)):
        combined = build_combined(*LEARN, f"model.trust.max_agreement={limit}", "model.trust.restore=0.5")
        disturb(combined)
        before = state(combined)
        if fault == "nan":
            poison_velocity(combined, float("nan"))
        else:
            monkeypatch.setattr(objective, "window_losses", nothing)
        prediction = combined.step(random_image(), task="t", key="k")
        assert (prediction.is_updated, prediction.is_refused) == (False, False)
        assert changed(before, state(combined)) == set()


@pytest.mark.parametrize("flags", MOVING)
def test_frozen_weights_are_not_restored(build_combined, random_image, flags):
    overrides, is_chosen = MOVING[flags]
    combined = build_combined(*REFUSING, *overrides, "model.trust.restore=0.5")
    disturb(combined)
    before = state(combined)
    refused(combined, random_image())
    went_back = changed(before, state(combined))
    assert went_back == set(combined.parameters())
    assert went_back
    assert all(map(is_chosen, went_back))


def test_restoring_leaves_moments_and_waiting_gradients_as_they_are(build_combined, random_image):
    combined = build_combined(*REFUSING, "model.trust.restore=0.5", "tta.optimizer.accumulate=2")
    steps(combined, "abc")  # one step, and one image that waits
    before, moments = state(combined), [value.clone() for value in optimizer_state(combined)]
    waiting = [value.clone() for value in combined._updates._sums.values()]
    refused(combined, random_image())
    assert changed(before, state(combined))
    assert moments
    assert same(moments, optimizer_state(combined))
    assert waiting
    assert same(waiting, list(combined._updates._sums.values()))
    assert combined._updates.waiting == 1


def test_continual_tasks_are_restored_to_the_source_and_not_to_where_they_began(build_combined, random_image):
    combined = build_combined(*REFUSING, "model.trust.restore=1")
    source = state(combined)
    for task in "AB":  # no reset between them: tta.continual=true
        began = state(combined)
        for seed in range(2):
            assert combined.step(random_image(seed=seed), task=task, key=str(seed)).is_updated
        combined.flush()
    assert changed(source, began)
    refused(combined, random_image(), task="B")
    assert changed(source, state(combined)) == set()


def test_reset_after_restoring_is_the_source_state(build_combined, random_image):
    combined = build_combined(*REFUSING, "model.trust.restore=0.5")
    source = state(combined)
    steps(combined, "ab")
    refused(combined, random_image())
    combined.reset()
    assert changed(source, state(combined)) == set()
    assert optimizer_state(combined) == []
