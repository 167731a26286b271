"""Diagnostics of one image: the numbers against plain loops and known teachers."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES
from test_combined import ALL_CLASSES, joint_loss, state
from torch.nn.functional import cross_entropy, interpolate

from segadapt.models.build import build_models
from segadapt.models.diagnostics import Tally, cosine, examine
from segadapt.models.generative.sd3 import add_noise
from segadapt.seeds import torch_generator

# K windows   C classes   P (window, class) pairs   z y x latent channels and grid

C = len(CLASSES)
BOXES = ((0, 0), (0, 13))  # top, left of the windows of a 32 x 45 image


def random_label(height: int = 32, width: int = 45, *, seed: int = 0) -> torch.Tensor:
    """Blocks of 4 px, one in seven of them 255."""
    small = torch.randint(C + 1, (1, 1, height // 4 + 1, width // 4 + 1), generator=torch.Generator().manual_seed(seed))
    label_HW = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)[0, 0, :height, :width]
    return label_HW.masked_fill(label_HW == C, 255).to(torch.uint8)


def truth_on_grid(label_HW: torch.Tensor) -> torch.Tensor:
    """Both windows' labels at the cell centres: [K, y, x]."""
    return torch.stack([label_HW[top + 4 : top + 32 : 8, left + 4 : left + 32 : 8].long() for top, left in BOXES])


def examined(combined, image_3HW, label_HW, **options) -> dict:
    options = {"task": "t", "key": "k", "sigmas": [0.25]} | options
    (tally,) = examine(combined, image_3HW, label_HW, **options)
    return tally.summary()


# -- one image ---------------------------------------------------------------------------------------------------------


def plain_scores(predicted_N, truth_N) -> dict[str, float]:
    """Accuracy and mIoU from sets of pixels."""
    ious = []
    for index in range(C):
        one, other = ({i for i, c in enumerate(each) if c == index} for each in (predicted_N, truth_N))
        ious += [len(one & other) / len(one | other)] if one | other else []
    accuracy = sum(a == b for a, b in zip(predicted_N, truth_N, strict=True)) / len(truth_N)
    return {"accuracy": pytest.approx(accuracy, abs=1e-12), "miou": pytest.approx(np.mean(ious), abs=1e-12)}


@pytest.mark.parametrize("max_pairs", [2, 100])
def test_numbers_of_one_image_equal_plain_loops(build_combined, random_image, max_pairs):
    """Velocities pair by pair, argmin and counts pixel by pixel, the objective and both gradients written out."""
    options = ("model.loss.classes_threshold=3", f"model.generative.max_pairs={max_pairs}")
    combined, draws = build_combined(*options, dtype=torch.float64), 3
    image_3HW, label_HW = random_image(dtype=torch.float64), random_label()
    got = examined(combined, image_3HW, label_HW, draws=draws)

    raw_1Chw = combined.segmenter.logits(image_3HW[None]).detach().requires_grad_()
    plain = copy.copy(combined)
    plain.segmenter = SimpleNamespace(short_side_px=None, logits=lambda _: raw_1Chw)
    loss, candidates = joint_loss(plain, image_3HW, task="t", key="k")
    (generative,) = torch.autograd.grad(loss, raw_1Chw)
    resized_1CHW = interpolate(raw_1Chw, size=(32, 45), mode="bilinear", align_corners=False)
    (right,) = torch.autograd.grad(cross_entropy(resized_1CHW, label_HW[None].long(), ignore_index=255), raw_1Chw)
    g, r = generative.numpy().ravel(), right.numpy().ravel()
    assert got["cosine"] == pytest.approx(g @ r / np.sqrt((g @ g) * (r @ r)), abs=1e-9)

    teacher, truth_Kyx = combined.generative, truth_on_grid(label_HW)
    windows_K3ss = torch.stack([2 * image_3HW[:, t : t + 32, l : l + 32] - 1 for t, l in BOXES])  # noqa: E741
    latent_Kzyx = teacher.encode(windows_K3ss)
    generator = torch_generator(combined.seed, "t", "k", "diagnose")
    noise_DKzyx = torch.randn(draws, *latent_Kzyx.shape, generator=generator, dtype=torch.float64)
    error_DKCyx = torch.empty(draws, 2, C, 4, 4, dtype=torch.float64)
    for d in range(draws):
        noisy = add_noise(latent_Kzyx, noise_DKzyx[d], torch.full((2,), 0.25, dtype=torch.float64))
        for k in range(2):
            for c in range(C):
                with torch.no_grad():
                    velocity_zyx = teacher.velocity(noisy, torch.tensor([k]), torch.tensor([c]))[0]
                error_DKCyx[d, k, c] = (velocity_zyx - noisy.target_Kzyx[k]).square().mean(dim=0)
    resized_1CHW = resized_1CHW.detach()
    on_grid_KCyx = torch.cat([
        interpolate(resized_1CHW[..., t : t + 32, l : l + 32], size=(4, 4), mode="bilinear", align_corners=False)
        for t, l in BOXES  # noqa: E741
    ])  # fmt: skip

    truth, judged = [], {name: [] for name in ("segmenter", "teacher", "candidates")}
    steady = {"teacher": [], "candidates": []}
    for k in range(2):
        of = {"teacher": range(C), "candidates": candidates.chosen_KC[k].nonzero()[:, 0].tolist()}
        for y in range(4):
            for x in range(4):
                if truth_Kyx[k, y, x] == 255:
                    continue
                truth.append(int(truth_Kyx[k, y, x]))
                judged["segmenter"].append(int(on_grid_KCyx[k, :, y, x].argmax()))
                for name, classes in of.items():
                    error_DC = error_DKCyx[:, k, :, y, x].tolist()
                    judged[name].append(min(classes, key=lambda c, e=error_DC: sum(row[c] for row in e)))
                    votes = [min(classes, key=row.__getitem__) for row in error_DC]
                    steady[name].append(max(votes.count(vote) for vote in votes) / draws)
    assert 0 < len(truth) < 32
    assert got["pixels"] == len(truth)
    assert {tuple(of) for of in candidates.chosen_KC.tolist()} != {(True,) * C}
    for name, predicted in judged.items():
        assert {part: got[name][part] for part in ("accuracy", "miou")} == plain_scores(predicted, truth)
    for name, values in steady.items():
        same = np.mean([a == b for a, b in zip(judged[name], judged["segmenter"], strict=True)])
        assert got[name]["agreement"] == pytest.approx(same, abs=1e-12)
        assert got[name]["self_agreement"] == pytest.approx(np.mean(values), abs=1e-12)

    entropies = []
    q_KCyx = interpolate_normalised(raw_1Chw.detach())
    for k in range(2):
        p_Nyx = q_KCyx[k, candidates.chosen_KC[k]].softmax(dim=0).numpy()
        entropies.append(-(p_Nyx * np.log(p_Nyx)).sum(axis=0).mean())
    numbers = candidates.chosen_KC.sum(dim=1).numpy()
    assert got["entropy"] == pytest.approx(np.mean(entropies), abs=1e-9)
    assert got["entropy_share"] == pytest.approx(np.mean(entropies / np.log(numbers)), abs=1e-9)
    assert got["candidates_per_window"] == numbers.mean()
    assert got["masked"] == pytest.approx(1 - candidates.keep_Kyx.double().mean().item(), abs=1e-12)


def interpolate_normalised(raw_1Chw):
    q_1CHW = interpolate(torch.nn.functional.normalize(raw_1Chw, dim=1), size=(32, 45), mode="bilinear")
    return torch.cat([interpolate(q_1CHW[..., t : t + 32, l : l + 32], size=(4, 4), mode="bilinear") for t, l in BOXES])  # noqa: E741


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("model.generative.max_pairs=2",),
        ("model.generative.draws=2", "model.trust.mode=weight"),
        ("model.generative.draws=3", "model.generative.sigma_high=0.9", "model.loss.logit_norm=false"),
        ("model.update.discriminative=false",),
        ("model.update.generative=false", "model.loss.mask_reduction=all", "model.loss.classes_threshold=2"),
    ],
)
def test_at_the_runs_own_noise_it_sees_what_the_step_sees(build_combined, random_image, options):
    """The gradient is that of `backward` in the logits; masks and candidates are those that the step reports."""
    combined = build_combined(*options, dtype=torch.float64)
    image_3HW, label_HW = random_image(dtype=torch.float64), random_label()
    got = examined(combined, image_3HW, label_HW, sigmas=[None])

    learning = build_combined(*options, "model.update.discriminative=true", dtype=torch.float64)
    logits_BChw = learning.segmenter.logits(image_3HW[None])
    logits_BChw.retain_grad()
    learning.backward(image_3HW, logits_BChw, learning.sight.noise(image_3HW, task="t", key="k"), task="t", key="k")
    generative, logits_BChw = logits_BChw.grad, logits_BChw.detach().requires_grad_()
    (right,) = torch.autograd.grad(
        cross_entropy(
            interpolate(logits_BChw, size=(32, 45), mode="bilinear"), label_HW[None].long(), ignore_index=255
        ),
        logits_BChw,
    )
    expected = torch.cosine_similarity(generative.flatten(), right.flatten(), dim=0).item()
    assert got["cosine"] == pytest.approx(expected, abs=1e-9)
    prediction = combined.step(image_3HW, task="t", key="k")
    assert got["masked"] == pytest.approx(1 - prediction.kept, abs=1e-6)
    assert got["candidates_per_window"] == np.mean(prediction.candidates)


@pytest.mark.parametrize("options", [(), ("model.generative.draws=2",), ("runtime.precision=bf16",)])
def test_nothing_is_touched(build_combined, random_image, options):
    combined, untouched = build_combined(*options), build_combined(*options)
    for each in (combined, untouched):
        each.step(random_image(), task="t", key="first")  # moments are there
    before, random = state(combined), torch.get_rng_state()
    attributes = dict(vars(combined))
    settings = copy.deepcopy((combined.window, combined.loss))
    examine(combined, random_image(seed=1), random_label(), task="t", key="k", sigmas=[0.5, None], draws=2)
    assert vars(combined) == attributes
    assert (combined.window, combined.loss) == settings
    assert torch.equal(torch.get_rng_state(), random)
    assert [name for name, parameter in combined.parameters().items() if parameter.grad is not None] == []
    assert all(torch.equal(value, before[name]) for name, value in state(combined).items())
    one, other = (each.step(random_image(seed=2), task="t", key="next") for each in (combined, untouched))
    assert torch.equal(one.logits_Chw, other.logits_Chw)
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    expected = state(untouched)
    assert all(torch.equal(value, expected[name]) for name, value in state(combined).items())


def test_an_image_has_the_same_numbers_whatever_was_asked_before(build_combined, random_image):
    combined = build_combined()
    one = examine(combined, random_image(), random_label(), task="t", key="k", sigmas=[0.1, 0.5])
    other = examine(combined, random_image(), random_label(), task="t", key="k", sigmas=[0.5])
    assert repr(one[1]) == repr(other[0])
    assert repr(one[0]) != repr(one[1])
    image, label = random_image(), random_label()
    another = examine(combined, image, label, task="t", key="another", sigmas=[0.5])
    assert repr(another[0]) != repr(other[0])


def test_the_split_teacher_says_the_same(compose_settings, saved_models, random_image):
    settings = compose_settings(*saved_models(CLASSES), "runtime.precision=fp32")
    plain, hooked = (build_models(settings, CLASSES, force_hooks=hooks).method for hooks in (False, True))
    one, other = (examined(each, random_image(), random_label(), draws=2) for each in (plain, hooked))
    assert one == other


# -- known teachers ----------------------------------------------------------------------------------------------------


class KnownTeacher:
    """Velocity = target for the class it holds for true at a pixel, off by `offset` for all others."""

    def __init__(self, believed_Kyx: torch.Tensor, *, grid_channels: int = 16, offset: float = 1.0):
        self.believed_Kyx, self.offset, self.channels = believed_Kyx, offset, grid_channels
        self.transformer = torch.nn.Identity()

    def encode(self, windows_K3ss):
        return windows_K3ss.new_zeros(len(windows_K3ss), self.channels, *self.believed_Kyx.shape[1:])

    def velocity(self, noisy, pair_window_P, pair_class_P):
        rows = len(noisy.target_Kzyx) // len(self.believed_Kyx)
        is_wrong_Pyx = self.believed_Kyx[pair_window_P // rows] != pair_class_P[:, None, None]
        return noisy.target_Kzyx[pair_window_P] + self.offset * is_wrong_Pyx[:, None]


def taught_by(build_combined, believed_Kyx, *options):
    combined = build_combined(*options)
    combined.generative = KnownTeacher(believed_Kyx)
    return combined


def blocks(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A label of 16-px blocks for a 32 x 32 image, one window, and its classes on the grid."""
    small_yx = torch.randperm(C, generator=torch.Generator().manual_seed(seed))[:4].view(2, 2)
    return (each.repeat_interleave(n, 0).repeat_interleave(n, 1) for each, n in ((small_yx, 16), (small_yx, 2)))  # type: ignore


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("logit_norm", ["true", "false"])
def test_a_teacher_that_knows_is_right_and_points_where_the_labels_do(build_combined, random_image, logit_norm, seed):
    """Its residual is (1 - p_true) * offset: the gradient is, pixel by pixel, a positive multiple of that of the
    cross-entropy on the grid. A teacher that holds the next class for true is never right and points away: at flat
    weights the cosine of a pixel is -1 / (C - 1)."""
    label_HW, truth_yx = blocks(seed)
    options = (ALL_CLASSES, f"model.loss.logit_norm={logit_norm}")
    image_3HW = random_image(32, 32, seed=seed)
    right = examined(taught_by(build_combined, truth_yx[None], *options), image_3HW, label_HW, draws=2)
    wrong = examined(taught_by(build_combined, (truth_yx[None] + 1) % C, *options), image_3HW, label_HW, draws=2)
    for judge in ("teacher", "candidates"):
        assert right[judge] | {"agreement": 0} == {"accuracy": 1, "miou": 1, "agreement": 0, "self_agreement": 1}
        assert (wrong[judge]["accuracy"], wrong[judge]["miou"]) == (0, 0)
        assert right[judge]["agreement"] == right["segmenter"]["accuracy"]
    assert right["cosine"] > (0.6 if logit_norm == "true" else 0.95)  # 0.74..0.86, 0.99 measured
    assert wrong["cosine"] < -0.03  # -0.06..-0.19 measured


def constant_logits(combined, logits_C) -> None:
    combined.segmenter = SimpleNamespace(
        short_side_px=None,
        logits=lambda image_B3HW: torch.tensor(logits_C, dtype=torch.float32)[None, :, None, None].expand(1, -1, 8, 8),
    )


def test_a_window_of_one_class_teaches_nothing_and_is_counted(build_combined, random_image):
    label_HW, truth_yx = blocks()
    present = int(truth_yx[0, 0])
    combined = taught_by(build_combined, truth_yx[None], "model.loss.topk=1")
    constant_logits(combined, [float(index == present) for index in range(C)])
    got = examined(combined, random_image(32, 32), label_HW)
    assert (got["single_class_windows"], got["candidates_per_window"], got["entropy"]) == (1, 1, 0)
    assert got["images_without_cosine"] == 1
    assert math.isnan(got["cosine"])
    assert math.isnan(got["entropy_share"])
    assert got["candidates"]["accuracy"] == got["reachable"] == got["segmenter"]["accuracy"] == 0.25
    assert (got["teacher"]["accuracy"], got["candidates"]["agreement"]) == (1, 1)
    assert math.isnan(got["teacher"]["self_agreement"])


def test_entropy_lies_between_certainty_and_the_uniform_weights(build_combined, random_image):
    label_HW, truth_yx = blocks()
    combined = taught_by(build_combined, truth_yx[None], ALL_CLASSES, "model.loss.logit_norm=false")
    found = []
    for scale in (0.0, 1.0, 50.0):
        constant_logits(combined, [scale * index for index in range(C)])
        got = examined(combined, random_image(32, 32), label_HW)
        assert got["entropy"] == pytest.approx(got["entropy_share"] * math.log(C), abs=1e-9)
        found.append(got["entropy_share"])
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert 0.1 < found[1] < 0.9
    assert found[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("topk", [1, 2, 6])
@pytest.mark.parametrize("seed", range(3))
def test_candidates_can_only_help_where_the_true_class_is_among_them(build_combined, random_image, topk, seed):
    """candidates right <= reachable, and a class that wins against all also wins against some."""
    combined = build_combined(f"model.loss.topk={topk}", "model.loss.classes_threshold=3")
    (tally,) = examine(
        combined, random_image(seed=seed), random_label(seed=seed), task="t", key="k", sigmas=[0.5]
    )  # fmt: skip
    right_of_all, right = np.trace(tally.teacher_CC), np.trace(tally.candidates_CC)
    assert right <= tally.reachable <= tally.pixels
    assert right >= right_of_all - (tally.pixels - tally.reachable)
    assert tally.teacher_CC.sum() == tally.candidates_CC.sum() == tally.segmenter_CC.sum() == tally.pixels


def test_an_error_that_is_not_finite_never_wins(build_combined, random_image):
    label_HW, truth_yx = blocks()
    combined = taught_by(build_combined, truth_yx[None], ALL_CLASSES)
    velocity = combined.generative.velocity
    absent = next(index for index in range(C) if index not in truth_yx)

    def poisoned(noisy, pair_window_P, pair_class_P):
        is_absent_P = (pair_class_P == absent)[:, None, None, None]
        return velocity(noisy, pair_window_P, pair_class_P).masked_fill(is_absent_P, torch.nan)

    combined.generative.velocity = poisoned
    got = examined(combined, random_image(32, 32), label_HW)
    assert got["teacher"]["accuracy"] == 1
    assert got["images_without_cosine"] == 1  # the loss mixes all classes


def test_an_image_without_labelled_pixels_counts_nothing(build_combined, random_image):
    got = examined(build_combined(), random_image(), torch.full((32, 45), 255))
    assert (got["pixels"], got["images_without_cosine"]) == (0, 1)
    assert math.isnan(got["teacher"]["accuracy"])
    assert math.isfinite(got["entropy"])


def test_labels_of_another_size_are_read_at_the_nearest_pixel(build_combined, random_image):
    combined, image_3HW, label_HW = build_combined(), random_image(), random_label()
    doubled = label_HW.repeat_interleave(2, 0).repeat_interleave(2, 1)
    one, other = (examined(combined, image_3HW, label) for label in (label_HW, doubled))
    del one["cosine"], other["cosine"]  # the cross-entropy is that of the label's own pixels
    assert repr(one) == repr(other)


def test_cosine_is_none_only_where_there_is_no_direction():
    one, none = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert cosine(one, 7 * one) == pytest.approx(1)
    assert cosine(one, -one) == pytest.approx(-1)
    assert cosine(one, torch.tensor([-4.0, 3.0])) == 0
    assert cosine(1e-30 * one, 1e-30 * one) == pytest.approx(1)  # float32 would underflow
    assert [cosine(one, none), cosine(none, one), cosine(one, one * torch.nan)] == [None] * 3


def test_tallies_of_images_add_up_to_one_of_their_pixels(build_combined, random_image):
    combined = build_combined()
    parts = [
        examine(combined, random_image(seed=s), random_label(seed=s), task="t", key=str(s), sigmas=[0.5])[0]
        for s in range(3)
    ]
    both = parts[0] + parts[1] + parts[2]
    assert isinstance(both, Tally)
    summary, cosines = both.summary(), [part.summary()["cosine"] for part in parts]
    assert summary["cosine"] == pytest.approx(np.mean(cosines), abs=1e-12)  # mean over images
    right = sum(np.trace(part.teacher_CC) for part in parts) / sum(part.pixels for part in parts)
    assert summary["teacher"]["accuracy"] == pytest.approx(right, abs=1e-12)  # over pixels
    assert summary["images"] == 3
