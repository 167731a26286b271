"""Options of the objective in a whole step: area, ignored classes, weights of windows."""

import pytest
import torch
from conftest import CLASSES
from test_combined import ALL_CLASSES, changed, state, watch
from torch.nn.functional import interpolate

from segadapt import metrics
from segadapt.errors import UserError
from segadapt.methods.dusa_u import DusaU
from segadapt.models.build import build_models, ignored_classes
from segadapt.models.diagnostics import examine
from segadapt.models.generative import windows
from segadapt.models.generative.candidates import choose
from segadapt.models.generative.sd3 import NoisyLatent
from segadapt.seeds import torch_generator

WINDOWS = {"window_px": 32, "stride_px": 16}


def on_grid(logits_BChw, image_3HW):
    """Raw logits of each window on its latent grid, step by step: [K, C, 4, 4]."""
    logits_1CHW = interpolate(logits_BChw.detach(), size=image_3HW.shape[1:], mode="bilinear")
    boxes = windows.plan(*image_3HW.shape[1:], **WINDOWS).tolist()
    crops = [logits_1CHW[:, :, box[0] : box[0] + 32, box[1] : box[1] + 32] for box in boxes]
    return torch.cat([interpolate(crop, size=(4, 4), mode="bilinear") for crop in crops])


@pytest.fixture
def build_ignoring(build_combined):
    """build_ignoring(names, *overrides): the tiny models, which ignore these classes."""

    def build(names, *overrides, **more):
        combined = build_combined(*overrides, **more)
        combined.ignored_C = torch.tensor([name in names for name in CLASSES])
        return combined

    return build


def test_an_image_of_ignored_classes_alone_gives_no_step_and_no_nan(build_ignoring, random_image):
    for options in ((), ("model.generative.draws=2",), ("model.loss.select=area", "model.loss.topk=1")):
        combined = build_ignoring(("tree",), "tta.optimizer.lr=1e-3", "model.loss.min_classes=3", *options)
        with torch.no_grad():
            combined.segmenter.net.decode_head.classifier.bias[CLASSES.index("tree")] = 50
        before, asked = state(combined), []
        velocity = combined.generative.velocity
        combined.generative.velocity = lambda *given, of=velocity, to=asked: to.append(given) or of(*given)
        prediction = combined.step(random_image(), task="t", key="k")
        assert (prediction.loss, prediction.grad_norm, prediction.kept) == (0, 0, 0)
        assert prediction.candidates == (0, 0)
        assert not prediction.is_updated
        assert asked == []
        assert changed(before, state(combined)) == set()
        (tally,) = examine(combined, random_image(), torch.zeros(32, 45), task="t", key="k", sigmas=[0.25])
        assert tally.summary()["pixels"] == 0
        assert tally.summary()["images_without_cosine"] == 1


@pytest.mark.parametrize("max_pairs", [1, 4, 1000])
def test_a_window_without_candidates_counts_as_a_loss_of_zero(build_ignoring, random_image, max_pairs):
    """Its share stays in the mean: the loss and the gradients are those of the other two windows, by three."""

    def backward(rows):
        combined = build_ignoring(
            ("sign",), ALL_CLASSES, f"model.generative.max_pairs={max_pairs}", dtype=torch.float64
        )
        noisy = combined.sight.noise(random_image(width=64, dtype=torch.float64), task="t", key="k")
        leaf_KCyx = random_q(3)[rows].requires_grad_()
        asked = choose(
            leaf_KCyx.detach(),
            None,
            combined.loss,
            generators=[torch_generator(0, row) for row in rows],
            draws=1,
            ignored_C=combined.ignored_C,
        )
        rows = NoisyLatent(*(value[rows] for value in vars(noisy).values()))
        taught = combined._backward_chunks(leaf_KCyx, rows, asked)
        of_teacher = [p.grad for p in combined.generative.transformer.parameters() if p.grad is not None]
        return taught, asked.counts, leaf_KCyx.grad, of_teacher

    taught, counts, grad_KCyx, of_teacher = backward([0, 1, 2])
    assert counts[1] == 0
    assert not grad_KCyx[1].any()
    assert float(taught.kept) == pytest.approx(2 / 3)
    (first, _, first_1Cyx, one), (third, _, third_1Cyx, other) = (backward([row]) for row in (0, 2))
    torch.testing.assert_close(taught.loss, (first.loss + third.loss) / 3, rtol=1e-9, atol=0)
    torch.testing.assert_close(grad_KCyx[[0, 2]], torch.cat([first_1Cyx, third_1Cyx]) / 3, rtol=1e-8, atol=1e-14)
    for got, left, right in zip(of_teacher, one, other, strict=True):
        torch.testing.assert_close(got, (left + right) / 3, rtol=1e-8, atol=1e-12)


def random_q(K):
    q_KCyx = torch.randn(K, len(CLASSES), 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q_KCyx[:, CLASSES.index("sign")] -= 9
    q_KCyx[1, CLASSES.index("sign")] += 99  # on top of all pixels of window 1 alone
    return q_KCyx


def test_area_counts_all_pixels_and_asks_of_agreement_those_with_their_class(build_combined, random_image):
    """Threshold so high that one class is left: all pixels count, and agreement is that of pixels on which it leads."""
    combined = build_combined("model.loss.select=area", "model.loss.topk=1", "model.loss.area_threshold=99")
    image_3HW = random_image()
    logits_BChw = combined.segmenter.logits(image_3HW[None])
    seen = watch(combined)
    prediction = combined.step(image_3HW, task="t", key="k")
    assert prediction.kept == 1
    assert prediction.candidates == (1, 1)
    raw_KCyx = on_grid(logits_BChw, image_3HW)
    largest = torch.nn.functional.one_hot(raw_KCyx.softmax(1).topk(5, dim=1).indices, len(CLASSES))
    area_KC = (raw_KCyx.softmax(1) * largest.sum(dim=1).permute(0, 3, 1, 2)).sum(dim=(2, 3))
    assert seen[0][2].chosen_KC.int().argmax(dim=1).tolist() == area_KC.argmax(dim=1).tolist()
    assert prediction.teacher_agrees == 1  # the one candidate always wins where it is asked


def test_ignored_classes_are_known_by_name(saved_models, compose_settings):
    assert ignored_classes(["road", " sign "], CLASSES).nonzero().flatten().tolist() == [1, 5]
    assert ignored_classes([], CLASSES) is None
    with pytest.raises(UserError, match=r"model\.loss\.ignored_classes: 'raod' is not a class .*Did you mean road\?"):
        ignored_classes(["raod"], CLASSES)
    with pytest.raises(UserError, match=r"model\.loss\.ignored_classes names all 6 classes"):
        ignored_classes(CLASSES, CLASSES)
    settings = compose_settings(*saved_models(CLASSES), "model.loss.ignored_classes=[car,sky]")
    assert build_models(settings, CLASSES).method.ignored_C.nonzero()[:, 0].tolist() == [0, 3]


def half_ignored(combined):
    """Logits that decide for the ignored class (tree) in the left window alone, and for others beside it."""
    logits_Chw = torch.randn(len(CLASSES), 8, 12, generator=torch.Generator().manual_seed(3))
    logits_Chw[CLASSES.index("tree")] = -9
    logits_Chw[CLASSES.index("tree"), :, :9] = 9
    combined.segmenter.logits = lambda _: logits_Chw[None].clone()


def test_a_window_that_asks_nothing_has_no_agreement(build_ignoring, random_image):
    combined = build_ignoring(("tree",), "model.generative.draws=2", "model.update.discriminative=false")
    half_ignored(combined)
    verdicts, backward = [], combined._backward_chunks
    combined._backward_chunks = lambda *given, **more: verdicts.append(given[2]) or backward(*given, **more)
    prediction = combined.step(random_image(), task="t", key="k")
    (candidates,) = verdicts
    assert candidates.counts[0] == 0 < candidates.counts[-1]
    assert 0.5 <= prediction.agreement <= 1
    everything = build_ignoring(CLASSES[:-1], "model.generative.draws=2", "model.update.discriminative=false")
    everything.segmenter.logits = lambda _: torch.zeros(1, len(CLASSES), 8, 12)
    nothing = everything.step(random_image(), task="t", key="k")
    assert (nothing.candidates, nothing.agreement, nothing.teacher_agrees) == ((0, 0), None, None)


def test_agreement_is_that_of_the_windows_that_ask():
    from segadapt.config import TrustSettings
    from segadapt.models.generative import trust

    error_RCyx = torch.rand(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))  # 2 windows of 2 draws
    error_RCyx[:2] = torch.inf
    q_RCyx, keep_Ryx = torch.rand(4, 5, 3, 3), torch.ones(4, 3, 3, dtype=torch.bool)
    how = {"draws": 2, "trust": TrustSettings(mode="none", threshold=1, max_agreement=1, restore=0)}
    both = trust.judge(error_RCyx, q_RCyx, keep_Ryx, **how).sums_4[0]
    alone = trust.judge(error_RCyx[2:], q_RCyx[2:], keep_Ryx[2:], **how).sums_4[0]
    assert both == alone > 0


def test_dusa_u_takes_no_step_where_nothing_is_asked(build_ignoring, random_image):
    combined = build_ignoring(CLASSES[:-1], kind=DusaU)
    combined.segmenter.logits = lambda _: torch.zeros(1, len(CLASSES), 8, 12)
    before = state(combined)
    prediction = combined.step(random_image(), task="t", key="k")
    assert (prediction.is_updated, prediction.grad_norm) == (False, 0)
    assert changed(before, state(combined)) == set()


def test_cosine_leaves_out_pixels_of_ignored_classes(build_ignoring, build_combined, random_image):
    """As if the label did not count there."""
    image_3HW, label_HW = random_image(), torch.arange(32 * 45).view(32, 45) % len(CLASSES)
    combined = build_ignoring(("tree",), "model.loss.topk=1")
    with torch.no_grad():
        top_HW = metrics.predict_at_label_size(combined.segmenter.logits(image_3HW[None])[0], (32, 45))
    is_ignored_HW = top_HW == CLASSES.index("tree")
    assert 0 < is_ignored_HW.sum() < label_HW.numel()
    how = {"task": "t", "key": "k", "sigmas": [0.25]}
    (given,) = examine(combined, image_3HW, label_HW, **how)
    (masked,) = examine(combined, image_3HW, label_HW.masked_fill(is_ignored_HW, 255), **how)
    assert given.cosine == pytest.approx(masked.cosine, abs=1e-12)
