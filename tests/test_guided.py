"""Windows where the segmenter is unsure: placed by rule, and the same for image, logits and labels."""

import numpy as np
import pytest
import torch
from conftest import CLASSES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss_options import WINDOWS, on_grid
from torch.nn.functional import interpolate

from segadapt.models.diagnostics import examine
from segadapt.models.generative.guided import MOST_BOXES, unsure_boxes
from segadapt.models.generative.windows import plan

GUIDED = ("model.generative.windows=entropy", f"model.loss.topk={len(CLASSES)}")


def map_with(*spots, size=(128, 171)):
    """Entropy 0.1, and squares of (y, x, cells, value)."""
    entropy_hw = np.full(size, 0.1)
    for y, x, cells, value in spots:
        entropy_hw[y : y + cells, x : x + cells] = value
    return entropy_hw


def test_boxes_surround_the_unsure_regions_the_most_unsure_first():
    """Spots of 4 and 50 cells of 4 px, 5 cells wider on each side by dilation: sides of 128, the least, and 240 px."""
    entropy_hw = map_with((20, 20, 4, 1.0), (60, 100, 50, 0.9))
    boxes = unsure_boxes(entropy_hw, image_px=(512, 684), window_px=512).tolist()
    assert [side for *_, side in boxes] == [240, 128]
    centres = [(y + side / 2, x + side / 2) for y, x, side in boxes]
    assert centres == [pytest.approx((85 * 4, 125 * 4), abs=1), pytest.approx((22 * 4, 22 * 4), abs=1)]


def test_a_region_larger_than_a_window_gets_one_of_a_windows_size():
    (box,) = unsure_boxes(map_with((0, 90, 60, 1.0), size=(128, 256)), image_px=(512, 1024), window_px=256).tolist()
    assert box[2] == 256


def test_boxes_nearer_than_an_eighth_of_a_window_are_one():
    """In a corner both are shifted into the image, their centres 26 px apart: the higher mean stays."""
    far, near = map_with((2, 2, 5, 0.9), (2, 60, 5, 1.0)), map_with((2, 2, 5, 0.9), (2, 20, 5, 1.0))
    assert len(unsure_boxes(far, image_px=(512, 684), window_px=512)) == 2
    assert unsure_boxes(near, image_px=(512, 684), window_px=512).tolist() == [[0, 0, 128]]


def test_at_most_eight_boxes_are_taken_and_none_of_a_flat_or_broken_map():
    spots = [(y, x, 3, 0.5 + 0.01 * (y + x)) for y in (10, 40, 70) for x in (10, 40, 70, 100)]
    assert len(unsure_boxes(map_with(*spots), image_px=(512, 684), window_px=512)) == MOST_BOXES
    for value in (0.5, np.nan):
        assert len(unsure_boxes(np.full((128, 171), value), image_px=(512, 684), window_px=512)) == 0


@settings(max_examples=60)
@given(seed=st.integers(0, 999), height=st.integers(64, 150), width=st.integers(64, 150), portrait=st.booleans())
def test_boxes_are_inside_the_image_apart_and_of_allowed_sides(seed, height, width, portrait):
    rng = np.random.default_rng(seed)
    small_hw = rng.random((height // 12, width // 12)).astype(np.float32)
    entropy_hw = np.kron(small_hw, np.ones((3, 3), np.float32))
    boxes = unsure_boxes(entropy_hw.T if portrait else entropy_hw, image_px=(height, width), window_px=64).tolist()
    assert len(boxes) <= MOST_BOXES
    for index, (y, x, side) in enumerate(boxes):
        assert 16 <= side <= 64
        assert 0 <= y <= height - side
        assert 0 <= x <= width - side
        for y_2, x_2, side_2 in boxes[:index]:
            apart = (y + side / 2 - y_2 - side_2 / 2) ** 2 + (x + side / 2 - x_2 - side_2 / 2) ** 2
            assert apart >= 8**2


@pytest.fixture
def guided(build_combined, random_image, monkeypatch):
    """guided(boxes, *overrides): the tiny models, which find these boxes; and the image."""
    from segadapt.models.generative import sight

    def build(boxes, *overrides, **more):
        monkeypatch.setattr(sight, "unsure_boxes", lambda *_, **__: torch.tensor(boxes).view(-1, 3))
        dtype = more.get("dtype", torch.float32)
        return build_combined(*GUIDED, *overrides, **more), random_image(40, 64, dtype=dtype)

    return build


def test_fewer_than_two_boxes_give_the_grid(guided):
    combined, image_3HW = guided([(0, 3, 16)])
    logits_BChw = combined.segmenter.logits(image_3HW[None])
    assert torch.equal(combined.sight.boxes(image_3HW, logits_BChw), plan(40, 64, **WINDOWS))
    prediction = combined.step(image_3HW, task="t", key="k")
    assert (prediction.is_updated, prediction.is_guided) == (True, False)


def test_a_step_cuts_image_and_logits_with_the_same_boxes_after_the_segmenter(guided):
    """The windows as the autoencoder gets them and q as the objective gets it, against crops that are resized."""
    boxes = [(3, 17, 20), (0, 5, 32), (24, 40, 16)]
    combined, image_3HW = guided(boxes, "model.generative.draws=2", dtype=torch.float64)
    q_1Chw = torch.nn.functional.normalize(combined.segmenter.logits(image_3HW[None]), dim=1)
    q_1CHW = interpolate(q_1Chw, size=(40, 64), mode="bilinear").detach()
    given, encode, chunks = [], combined.generative.encode, combined._backward_chunks
    combined.generative.encode = lambda cut: given.append(cut) or encode(cut)
    combined._backward_chunks = lambda leaf, *rest, **more: given.append(leaf) or chunks(leaf, *rest, **more)
    prediction = combined.step(image_3HW, task="t", key="k")
    assert prediction.is_updated
    assert prediction.is_guided
    assert len(prediction.candidates) == 3
    windows_K3ss, leaf_RCyx = given
    for window, (y, x, side) in enumerate(boxes):
        crop = image_3HW[None, :, y : y + side, x : x + side]
        expected_1 = interpolate(crop, size=(32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(windows_K3ss[window], 2 * expected_1[0] - 1)
        crop = q_1CHW[:, :, y : y + side, x : x + side]
        expected_1 = interpolate(crop, size=(4, 4), mode="bilinear", align_corners=False)
        for draw in range(2):
            torch.testing.assert_close(leaf_RCyx[2 * window + draw], expected_1[0], rtol=0, atol=1e-10)


def test_the_map_is_the_entropy_of_the_raw_logits(build_combined, random_image, monkeypatch):
    from segadapt.models.generative import sight

    given = []
    monkeypatch.setattr(
        sight, "unsure_boxes", lambda *args, **names: given.append(args) or unsure_boxes(*args, **names)
    )
    combined, image_3HW = build_combined(*GUIDED), random_image(40, 64)
    p_Chw = combined.segmenter.logits(image_3HW[None])[0].detach().softmax(dim=0)
    combined.step(image_3HW, task="t", key="k")
    expected_hw = -(p_Chw * p_Chw.log()).sum(dim=0) / np.log(len(CLASSES))
    np.testing.assert_allclose(given[0][0], expected_hw.numpy(), rtol=1e-5)


def test_a_diagnosis_reads_labels_of_the_same_boxes(guided):
    """A segmenter whose logits are the label is right on every latent pixel, however large the boxes are."""
    combined, image_3HW = guided([(0, 0, 32), (8, 32, 16), (8, 48, 16)])
    label_HW = torch.arange(5 * 8).view(5, 8).remainder(len(CLASSES)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    logits_1Chw = torch.nn.functional.one_hot(label_HW[2::4, 2::4], len(CLASSES)).permute(2, 0, 1)[None] * 9.0
    combined.segmenter.logits = lambda _: logits_1Chw
    (tally,) = examine(combined, image_3HW, label_HW, task="t", key="k", sigmas=[0.25])
    found = tally.summary()
    assert found["pixels"] == 3 * 16
    assert found["segmenter"]["accuracy"] == 1


# -- weights of windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pairs", [1, 7, 1000])
@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_weights_of_windows_weigh_the_losses_of_all_their_draws(build_combined, random_image, max_pairs, tau):
    """Loss and gradients are the weighted sums of what each window gives alone; the weights have no gradient."""
    options = (GUIDED[1], "model.generative.draws=2", f"model.generative.max_pairs={max_pairs}")
    image_3HW = random_image(width=64, dtype=torch.float64)
    image_3HW[:, :, 20:] *= 0.1
    combined = build_combined(
        *options, "model.loss.window_weights=entropy", f"model.loss.entropy_tau={tau}", dtype=torch.float64
    )
    logits_BChw = combined.segmenter.logits(image_3HW[None])
    noisy = combined.sight.noise(image_3HW, task="t", key="k")
    taught, candidates = combined.backward(image_3HW, logits_BChw, noisy, task="t", key="k")
    got = {name: p.grad for name, p in combined.parameters().items() if p.grad is not None}

    p_KCyx = on_grid(logits_BChw, image_3HW).softmax(dim=1)
    entropy_K = -(p_KCyx * p_KCyx.log()).sum(dim=1).mean(dim=(1, 2)) / np.log(len(CLASSES))
    weight_K = (entropy_K / tau).softmax(dim=0)
    assert len(weight_K) == 3
    total, sums = 0.0, {name: torch.zeros_like(value) for name, value in got.items()}
    for window, weight in enumerate(weight_K.tolist()):
        alone = build_combined(*options, dtype=torch.float64)
        q_KCyx = alone.in_windows(alone.segmenter.logits(image_3HW[None]), image_3HW, grid=4)
        q_RCyx = q_KCyx[[window, window]]
        leaf_RCyx, rows = q_RCyx.detach().requires_grad_(), slice(2 * window, 2 * window + 2)
        of_pairs = (candidates.pair_window_P >= rows.start) & (candidates.pair_window_P < rows.stop)
        mine = type(candidates)(
            candidates.pair_window_P[of_pairs] - rows.start, candidates.pair_class_P[of_pairs],
            candidates.chosen_KC[rows], candidates.keep_Kyx[rows], candidates.counts[rows], 2,
        )  # fmt: skip
        loss = alone._backward_chunks(leaf_RCyx, type(noisy)(*(v[rows] for v in vars(noisy).values())), mine).loss
        q_RCyx.backward(leaf_RCyx.grad)
        total += weight * loss
        for name, p in alone.parameters().items():
            if p.grad is not None:
                sums[name] += weight * p.grad
    torch.testing.assert_close(taught.loss, total, rtol=1e-9, atol=0)
    for name, value in got.items():
        torch.testing.assert_close(value, sums[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_equal_windows_weigh_alike_and_nan_does_not_pass():
    from segadapt.models.generative.loss import window_weights

    raw_KCyx = torch.randn(1, 5, 4, 4).repeat(3, 1, 1, 1)
    torch.testing.assert_close(window_weights(raw_KCyx, tau=1.0), torch.ones(3))
    raw_KCyx[1] = torch.nan
    assert window_weights(raw_KCyx, tau=1.0).isnan().all()  # the loss is then not finite, and the image skipped
