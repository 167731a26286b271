"""Windows: full coverage in both orientations, plain slices, and one linear map in place of resize, cut, resize."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, interpolate

from segadapt.models.generative.windows import cut, logits_on_grid, plan, starts

SIDES = st.integers(0, 300)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slices(image_CHW, boxes_K3, window_px):
    """The oracle of `cut`: one slice a window."""
    return torch.stack([image_CHW[:, t : t + window_px, l : l + window_px] for t, l, _ in boxes_K3.tolist()])  # noqa: E741


@pytest.mark.parametrize(
    ("length", "expected"), [(512, [0]), (513, [0, 1]), (683, [0, 171]), (768, [0, 256]), (910, [0, 256, 398])]
)
def test_starts_of_known_lengths(length, expected):
    assert starts(length, window_px=512, stride_px=256) == expected


@settings(max_examples=200)
@given(window=st.integers(1, 64), stride=st.integers(1, 64), extra_height=SIDES, extra_width=SIDES)
@example(window=32, stride=32, extra_height=0, extra_width=0)
@example(window=32, stride=16, extra_height=0, extra_width=1)
@example(window=32, stride=16, extra_height=1, extra_width=0)
def test_every_pixel_is_covered_by_windows_inside_the_image(window, stride, extra_height, extra_width):
    stride, height, width = min(stride, window), window + extra_height, window + extra_width
    boxes_K3 = plan(height, width, window_px=window, stride_px=stride)
    assert len((boxes_K3[:, 0] * 1000 + boxes_K3[:, 1]).unique()) == len(boxes_K3)  # no box twice
    tops, lefts = (boxes_K3[:, axis].unique().tolist() for axis in (0, 1))
    for side, firsts in ((height, tops), (width, lefts)):
        assert firsts[0] == 0
        assert firsts[-1] == side - window
        assert all(0 < second - first <= stride for first, second in itertools.pairwise(firsts))
        assert len(firsts) == -(-(side - window) // stride) + 1
    assert len(boxes_K3) == len(tops) * len(lefts)


@given(extra=SIDES)
def test_portrait_has_the_windows_of_landscape_turned(extra):
    landscape = plan(32, 32 + extra, window_px=32, stride_px=16)
    assert plan(32 + extra, 32, window_px=32, stride_px=16).tolist() == landscape[:, [1, 0, 2]].tolist()
    assert set(landscape[:, 0].tolist()) == {0}


@pytest.mark.parametrize(("height", "width"), [(31, 64), (64, 31), (31, 31)])
def test_image_smaller_than_a_window_is_refused(height, width):
    with pytest.raises(ValueError, match="side of 31 px is shorter than a window of 32 px"):
        plan(height, width, window_px=32, stride_px=16)


@settings(max_examples=30)
@given(extra_height=st.integers(0, 40), extra_width=st.integers(0, 40), stride=st.integers(1, 16))
def test_cut_equals_slices_and_stitches_back_to_the_image(extra_height, extra_width, stride):
    image_CHW = random(3, 16 + extra_height, 16 + extra_width)
    boxes_K3 = plan(*image_CHW.shape[1:], window_px=16, stride_px=stride)
    windows_KCss = cut(image_CHW, boxes_K3, window_px=16)
    assert torch.equal(windows_KCss, slices(image_CHW, boxes_K3, 16))
    stitched_CHW = torch.full_like(image_CHW, torch.nan)
    for (top, left, _), window_Css in zip(boxes_K3.tolist(), windows_KCss, strict=True):
        stitched_CHW[:, top : top + 16, left : left + 16] = window_Css
    assert torch.equal(stitched_CHW, image_CHW)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (32, 43), (43, 32), (32, 33), (32, 91), (45, 58)], ids=lambda side: str(side)
)
def test_logits_on_grid_equal_resize_cut_resize_in_value_and_gradient(height, width):
    boxes_K3 = plan(height, width, window_px=32, stride_px=16)
    logits_Chw = random(5, -(-height // 4), -(-width // 4)).requires_grad_()
    plain_CHW = interpolate(logits_Chw[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    plain_KCyx = interpolate(slices(plain_CHW, boxes_K3, 32), size=(4, 4), mode="bilinear", align_corners=False)
    got_KCyx = logits_on_grid(logits_Chw, boxes_K3, image_px=(height, width), grid=4)
    torch.testing.assert_close(got_KCyx, plain_KCyx, rtol=0, atol=1e-10)
    upstream_KCyx = random(*plain_KCyx.shape)
    gradients = [torch.autograd.grad(q, logits_Chw, upstream_KCyx)[0] for q in (got_KCyx, plain_KCyx)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@settings(max_examples=25)
@given(data=st.data(), height=st.integers(32, 60), width=st.integers(32, 60))
def test_boxes_of_any_side_equal_resize_cut_resize_in_value_and_gradient(data, height, width):
    """Of the logits at 1/4, and of the image, whose crops are resized to the window; several boxes of one side too."""
    sides = data.draw(st.lists(st.integers(8, 32), min_size=1, max_size=4))
    boxes = [(data.draw(st.integers(0, height - s)), data.draw(st.integers(0, width - s)), s) for s in sides]
    boxes_K3, logits_Chw = torch.tensor(boxes), random(5, -(-height // 4), -(-width // 4)).requires_grad_()
    resized = {"mode": "bilinear", "align_corners": False}
    plain_1CHW = interpolate(logits_Chw[None], size=(height, width), **resized)
    crops = [plain_1CHW[:, :, y : y + side, x : x + side] for y, x, side in boxes]
    plain_KCyx = torch.cat([interpolate(crop, size=(4, 4), **resized) for crop in crops])
    got_KCyx = logits_on_grid(logits_Chw, boxes_K3, image_px=(height, width), grid=4)
    torch.testing.assert_close(got_KCyx, plain_KCyx, rtol=0, atol=1e-10)
    upstream_KCyx = random(*plain_KCyx.shape)
    gradients = [torch.autograd.grad(q, logits_Chw, upstream_KCyx)[0] for q in (got_KCyx, plain_KCyx)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    image_3HW = random(3, height, width)
    cut_K3ss = cut(image_3HW, boxes_K3, window_px=32)
    for got_3ss, (y, x, side) in zip(cut_K3ss, boxes, strict=True):
        expected_13ss = interpolate(image_3HW[None, :, y : y + side, x : x + side], size=(32, 32), **resized)
        assert torch.equal(got_3ss, expected_13ss[0])


def test_fourfold_logits_and_boxes_on_the_latent_grid_give_the_mean_of_2x2_cells():
    boxes_K3 = plan(32, 72, window_px=32, stride_px=8)
    logits_Chw = random(5, 8, 18)
    got_KCyx = logits_on_grid(logits_Chw, boxes_K3, image_px=(32, 72), grid=4)
    cells_KChw = slices(logits_Chw, boxes_K3 // 4, 8)
    torch.testing.assert_close(got_KCyx, avg_pool2d(cells_KChw, 2), rtol=0, atol=1e-12)


def test_window_sees_the_logits_of_its_own_place():
    """A bright column of the image and of the logits must show in the same window at the same place."""
    image_1HW, logits_1hw = torch.zeros(1, 32, 80), torch.zeros(1, 8, 20)
    image_1HW[:, :, 56:64], logits_1hw[:, :, 14:16] = 1, 1
    boxes_K3 = plan(32, 80, window_px=32, stride_px=16)
    from_image_K1yx = avg_pool2d(cut(image_1HW, boxes_K3, window_px=32), 8)
    from_logits_K1yx = logits_on_grid(logits_1hw, boxes_K3, image_px=(32, 80), grid=4)
    assert torch.equal(from_logits_K1yx.argmax(dim=-1), from_image_K1yx.argmax(dim=-1))
    assert torch.equal(from_logits_K1yx.amax(dim=(1, 2, 3)) > 0, from_image_K1yx.amax(dim=(1, 2, 3)) > 0)


def test_autocast_leaves_the_logits_in_float32():
    logits_Chw = random(5, 8, 11).float()
    boxes_K3 = plan(32, 43, window_px=32, stride_px=16)
    plain = logits_on_grid(logits_Chw, boxes_K3, image_px=(32, 43), grid=4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = logits_on_grid(logits_Chw, boxes_K3, image_px=(32, 43), grid=4)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
