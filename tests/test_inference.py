"""The rules of `evaluate` on nets whose answer is known: sizes, padding, windows, mirrored, averages, resizes.

B images   3 RGB   H W image px   C classes
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_settings import quick_settings
from torch import Tensor, nn
from torch.nn.functional import interpolate
from training_runs import training

from segadapt import adapt, scoring, stream, train
from segadapt.config import EvaluateConfig, EvaluateSettings
from segadapt.datasets import Task
from segadapt.datasets.build import build_dataset
from segadapt.datasets.resize import size_in_box
from segadapt.errors import UserError
from segadapt.inference import Inference, window_starts
from segadapt.models.build import build_models, build_segmenter
from segadapt.models.discriminative.families import IMAGENET_MEAN
from segadapt.models.discriminative.wrapped import AS_IT_IS, Wrapped
from segadapt.protocol import identity, rule_of
from segadapt.seeds import numpy_generator

LANDSCAPE, PORTRAIT = (24, 36), (36, 24)
SIZES = (LANDSCAPE, PORTRAIT, (30, 30))
EVALUATE = ("data=toytown", "model/discriminative=toytown", "runtime=cpu", "data.workers=0", "data.limit=2")


class Seeing(nn.Module):
    """Its logits are its input, at a stride; remembers the sizes and the values that it was given."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride, self.inputs = stride, []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        self.inputs.append(image_B3HW.detach().clone())
        return (self.weight * image_B3HW)[:, :, :: self.stride, :: self.stride]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        return [tuple(image_B3HW.shape[2:]) for image_B3HW in self.inputs]


class Uneven(Seeing):
    """Its logits depend on where a pixel is, so that mirrored inputs and windows differ."""

    def forward(self, image_B3HW: Tensor) -> Tensor:
        logits_B3HW = super().forward(image_B3HW)
        return logits_B3HW * torch.linspace(1, 3, logits_B3HW.shape[3])


def settings_of(*overrides: str) -> EvaluateConfig:
    return quick_settings("evaluate", [*EVALUATE, *overrides], EvaluateConfig)


def inference(net: nn.Module, *overrides: str, short_side_px: int = 240) -> Inference:
    evaluate = settings_of(*overrides).evaluate
    segmenter = Wrapped(net, 3, mean=AS_IT_IS[0], std=AS_IT_IS[1])
    return Inference(segmenter, evaluate, short_side_px=short_side_px)


def image_of(height: int, width: int) -> Tensor:
    return torch.from_numpy(numpy_generator(0, "image").random((1, 3, height, width))).float()


@torch.no_grad()
def logits_of(net: nn.Module, image_B3HW: Tensor, *overrides: str, **more: int) -> Tensor:
    return inference(net, *overrides, **more).logits(image_B3HW)


ORIGINAL = ("evaluate.input_resize=original", "evaluate.logit_resize=two_step")
SLIDE = (*ORIGINAL, "evaluate.window_px=16", "evaluate.stride_px=10")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "overrides",
    [
        ORIGINAL,
        SLIDE,
        (*ORIGINAL, "evaluate.window_px=64", "evaluate.stride_px=64"),
        (*ORIGINAL, "evaluate.size_divisor=14"),
        (*ORIGINAL, "evaluate.size_divisor=14", "evaluate.padding=centre"),
        (*SLIDE, "evaluate.size_divisor=7", "evaluate.padding=centre"),
        (*ORIGINAL, "evaluate.flip=true", "evaluate.average=logits"),
        (*SLIDE, "evaluate.flip=true", "evaluate.average=logits"),
    ],
)
def test_a_net_whose_logits_are_the_image_gives_the_image(size, overrides):
    image_B3HW = image_of(*size)
    assert logits_of(Seeing(), image_B3HW, *overrides) == pytest.approx(image_B3HW, abs=1e-6)


def test_windows_cover_every_pixel_and_are_averaged_by_their_hits():
    """Against a count and a sum, window by window in float64, of a net that answers by the place in the window."""
    height, width, side, stride = 37, 50, 16, 11
    image_B3HW = image_of(height, width)
    found_B3HW = logits_of(
        Uneven(), image_B3HW, *ORIGINAL, f"evaluate.window_px={side}", f"evaluate.stride_px={stride}"
    )
    sums, hits = np.zeros((3, height, width)), np.zeros((height, width))
    for row in range(max(height - side + stride - 1, 0) // stride + 1):
        for column in range(max(width - side + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + side, height), min(column * stride + side, width)
            top, left = max(bottom - side, 0), max(right - side, 0)
            window = image_B3HW[0, :, top:bottom, left:right].double().numpy()
            sums[:, top:bottom, left:right] += window * np.linspace(1, 3, right - left)
            hits[top:bottom, left:right] += 1
    assert found_B3HW[0].numpy() == pytest.approx(sums / hits, abs=1e-5)


@given(st.integers(1, 200), st.integers(1, 80), st.integers(1, 80))
def test_window_starts_leave_no_pixel_out_and_stay_inside(length, window, stride):
    stride = min(stride, window)
    starts = window_starts(length, window_px=window, stride_px=stride)
    covered = {px for start in starts for px in range(start, min(start + window, length))}
    assert covered == set(range(length))
    assert len(set(starts)) == len(starts)
    assert starts[-1] == max(0, length - window)
    assert starts[:-1] == [index * stride for index in range(len(starts) - 1)]


def test_a_window_larger_than_the_image_shrinks_to_it():
    net = Seeing()
    logits_of(net, image_of(20, 50), *ORIGINAL, "evaluate.window_px=32", "evaluate.stride_px=32")
    assert net.sizes == [(20, 32), (20, 32)]


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        ((375, 500), (2048, 512), (512, 683)),
        ((500, 375), (2048, 512), (683, 512)),
        ((3000, 500), (2048, 512), (2048, 341)),
        ((512, 683), (2048, 512), (512, 683)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
    ],
)
def test_the_box_gives_mmsegs_sizes(size, box, expected):
    """Numbers of mmcv.imrescale; portrait is transposed landscape."""
    assert size_in_box(*size, long_px=box[0], short_px=box[1]) == expected
    assert size_in_box(*size[::-1], long_px=box[0], short_px=box[1]) == expected[::-1]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("evaluate.logit_resize=two_step",), (40, 60)),
        (("evaluate.input_resize=box", "evaluate.long_side_px=48"), (32, 48)),
        (("evaluate.input_resize=box", "evaluate.long_side_px=2048"), (40, 60)),
        (("evaluate.input_resize=aligned32", "evaluate.long_side_px=2048"), (64, 64)),
        (("evaluate.input_resize=original",), LANDSCAPE),
        (("evaluate.input_resize=original", "evaluate.scales=[1.75]"), (42, 63)),
        (("evaluate.input_resize=box", "evaluate.long_side_px=2048", "evaluate.scales=[0.5]"), (20, 30)),
        (("evaluate.scales=[0.5]",), (20, 30)),
    ],
)
def test_the_net_is_given_the_size_of_the_rule_and_the_logits_have_the_images(overrides, expected):
    for size, given_size in ((LANDSCAPE, expected), (PORTRAIT, expected[::-1])):
        net = Seeing(stride=4)
        logits_B3HW = logits_of(net, image_of(*size), "data.short_side_px=40", *overrides, short_side_px=40)
        assert net.sizes == [given_size]
        assert tuple(logits_B3HW.shape) == (1, 3, *size)


def test_aligned_sizes_are_reached_from_those_of_the_box():
    """Two resizes, as SegFormer's AlignedResize."""
    net, image_B3HW = Seeing(), image_of(*LANDSCAPE)
    logits_of(net, image_B3HW, "evaluate.input_resize=aligned32", "evaluate.long_side_px=2048", short_side_px=40)
    bilinear = {"mode": "bilinear", "align_corners": False}
    expected_B3yx = interpolate(interpolate(image_B3HW, size=(40, 60), **bilinear), size=(64, 64), **bilinear)
    assert torch.equal(net.inputs[0], expected_B3yx)


@pytest.mark.parametrize(("padding", "corner"), [("right_down", (0, 0)), ("centre", (2, 3))])
def test_padding_is_the_mean_colour_around_the_image(padding, corner):
    """24 x 36 to 28 x 42: of 4 and 6 px, half lie above and left if it is centred."""
    net, image_B3HW = Seeing(), image_of(*LANDSCAPE)
    logits_of(net, image_B3HW, *ORIGINAL, "evaluate.size_divisor=14", f"evaluate.padding={padding}")
    (padded_B3yx,), (top, left) = net.inputs, corner
    expected_B3yx = np.broadcast_to(np.float32(IMAGENET_MEAN)[None, :, None, None], (1, 3, 28, 42)).copy()
    expected_B3yx[:, :, top : top + 24, left : left + 36] = image_B3HW
    assert np.array_equal(padded_B3yx, expected_B3yx)


def test_a_size_that_is_a_multiple_gets_no_padding():
    """cheapseg added a whole patch."""
    net = Seeing()
    logits_of(net, image_of(28, 42), *ORIGINAL, "evaluate.size_divisor=14")
    assert net.sizes == [(28, 42)]


def test_padding_is_cut_before_the_last_resize():
    """A border that says nothing of the image must not bleed into it, nor stretch it: a constant stays constant."""
    image_B3HW = torch.full((1, 3, 30, 45), 0.25)
    logits_B3HW = logits_of(Seeing(), image_B3HW, "evaluate.input_resize=box", "evaluate.long_side_px=2048",
                            "evaluate.logit_resize=two_step", "evaluate.size_divisor=32", short_side_px=40)  # fmt: skip
    assert logits_B3HW == pytest.approx(image_B3HW, abs=1e-6)


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_mirrored_predictions_are_mirrored_back(average):
    """Of an image and of its mirror image the averages are mirror images, whatever the net."""
    image_B3HW = image_of(*LANDSCAPE)
    overrides = (*ORIGINAL, "evaluate.flip=true", f"evaluate.average={average}", "evaluate.scales=[0.5,1.0]")
    net = Uneven(stride=3)
    one, other = (logits_of(net, image, *overrides) for image in (image_B3HW, image_B3HW.flip(3)))
    assert one.flip(3) == pytest.approx(other, abs=1e-6)
    assert not torch.allclose(one, logits_of(net, image_B3HW, *ORIGINAL, "evaluate.scales=[0.5]"), atol=1e-3)


def test_averages_are_those_of_the_single_views():
    image_B3HW, views = image_of(*LANDSCAPE), []
    for scale in (0.5, 1.0, 1.5):
        for image in (image_B3HW, image_B3HW.flip(3)):
            logits_B3HW = 5 * logits_of(Uneven(stride=2), image, *ORIGINAL, f"evaluate.scales=[{scale}]").double()
            views.append(logits_B3HW if image is image_B3HW else logits_B3HW.flip(3))

    class Fivefold(Uneven):
        def forward(self, image_B3HW: Tensor) -> Tensor:
            return 5 * super().forward(image_B3HW)

    many = (*ORIGINAL, "evaluate.scales=[0.5,1.0,1.5]", "evaluate.flip=true")
    soft = logits_of(Fivefold(stride=2), image_B3HW, *many)
    plain = logits_of(Fivefold(stride=2), image_B3HW, *many, "evaluate.average=logits")
    assert soft.exp().double() == pytest.approx(torch.stack(views).softmax(dim=2).mean(dim=0), abs=1e-6)
    assert plain.double() == pytest.approx(torch.stack(views).mean(dim=0), abs=1e-5)
    assert (soft.argmax(dim=1) != plain.argmax(dim=1)).any()


def test_probabilities_too_small_for_float32_stay_finite():
    class Sure(Seeing):
        def forward(self, image_B3HW: Tensor) -> Tensor:
            return 1000 * super().forward(image_B3HW)

    logits_B3HW = logits_of(Sure(), image_of(*LANDSCAPE), *ORIGINAL, "evaluate.flip=true")
    assert logits_B3HW.isfinite().all()


def test_one_scale_without_flip_is_the_plain_result():
    image_B3HW, net = image_of(*LANDSCAPE), Uneven(stride=4)
    direct_B3HW = logits_of(net, image_B3HW, "evaluate.input_resize=original", "evaluate.scales=[1.0]")
    expected_B3HW = interpolate(net(image_B3HW), size=LANDSCAPE, mode="bilinear", align_corners=False)
    assert torch.equal(direct_B3HW, expected_B3HW)


def test_two_resizes_are_not_one():
    image_B3HW, net = image_of(*LANDSCAPE), Seeing(stride=4)
    bilinear = {"mode": "bilinear", "align_corners": False}
    input_B3yx = interpolate(image_B3HW, size=(40, 60), **bilinear)
    grid_B3hw = net(input_B3yx)
    expected = {
        "direct": interpolate(grid_B3hw, size=LANDSCAPE, **bilinear),
        "two_step": interpolate(interpolate(grid_B3hw, size=(40, 60), **bilinear), size=LANDSCAPE, **bilinear),
    }
    found = {name: logits_of(net, image_B3HW, "evaluate.input_resize=box", "evaluate.long_side_px=2048",
                             f"evaluate.logit_resize={name}", short_side_px=40) for name in expected}  # fmt: skip
    assert torch.equal(found["direct"], expected["direct"])
    assert torch.equal(found["two_step"], expected["two_step"])
    assert not torch.allclose(found["direct"], found["two_step"], atol=1e-2)


# --- settings ---


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["scales=[]"], r"evaluate\.scales=\[\]: expected one factor or more"),
        (["scales=[1.0,0.0]"], r"evaluate\.scales=\[1\.0, 0\.0\]: .* in 0\.1\.\.10"),
        (["scales=[1.0,1.0]"], r"each once"),
        (["window_px=64", "logit_resize=two_step"], r"window_px=64 and evaluate\.stride_px=None: .* Set both"),
        (["stride_px=64"], r"window_px=None and evaluate\.stride_px=64"),
        (["window_px=64", "stride_px=80", "logit_resize=two_step"], r"strips of 16 px would be left out"),
        (["input_resize=box"], r"long_side_px=None, but evaluate\.input_resize=box: .* Set it to 2048"),
        (["long_side_px=2048"], r"long_side_px=2048, but evaluate\.input_resize=short_side: .* Set it to null"),
        (["input_resize=box", "long_side_px=100"], r"long_side_px=100 is below data\.short_side_px=240"),
        (["window_px=64", "stride_px=64"], r"logit_resize=direct, but evaluate\.window_px=64: .*two_step"),
        (["size_divisor=14"], r"logit_resize=direct, but evaluate\.size_divisor=14: .*two_step"),
        (["padding=centre"], r"evaluate\.padding=centre, but evaluate\.size_divisor=1: nothing is padded"),
        (["average=logits"], r"evaluate\.average=logits, but there is one scale and no flip"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        settings_of(*(f"evaluate.{override}" for override in overrides))


def test_a_short_side_of_the_segmenter_has_no_place_beside_a_rule():
    own = "model.discriminative.short_side_px=120"
    assert settings_of(own).model.discriminative.short_side_px == 120
    with pytest.raises(UserError, match=r"model\.discriminative\.short_side_px=120, but the rule of evaluate"):
        settings_of(own, "evaluate=mmseg")


def test_the_rule_is_said_and_makes_another_run():
    plain, again = settings_of(), settings_of("evaluate.per_class=true", "evaluate.submission=ids")
    assert identity(plain) == identity(again)
    assert "evaluate" not in identity(plain)
    assert rule_of(plain) == "scored before the update at label size, one bilinear resize; short side 240 px"
    said = {rule_of(settings_of(f"evaluate={name}")) for name in PRESETS}
    assert len(said) == len(PRESETS)
    slide = rule_of(settings_of("evaluate=mmseg_slide"))
    assert "box 2048 x 240 px; windows of 1024 px, stride 768 px" in slide
    assert slide.startswith("scored at label size, two bilinear resizes")
    many = rule_of(settings_of("evaluate=mmseg_multiscale"))
    assert "size on disk; scales 0.5, 0.75, 1, 1.25, 1.5, 1.75, mirrored too, mean of the softmax" in many
    assert "padded right and down to a multiple of 14 px" in rule_of(settings_of("evaluate=dinov2"))
    assert "aligned to 32 px" in rule_of(settings_of("evaluate=segformer_aligned"))


PRESETS = sorted(path.stem for path in Path(adapt.__file__).parent.glob("conf/evaluate/*.yaml"))


def test_every_setting_of_a_rule_is_said_or_part_of_another():
    """No two rules that differ share a protocol line: each field changed alone changes the words."""
    base = settings_of("evaluate=mmseg_slide", "evaluate.size_divisor=14", "evaluate.flip=true")
    other = {"input_resize": "aligned32", "long_side_px": 1000, "size_divisor": 7, "padding": "centre",
             "window_px": 512, "stride_px": 500, "logit_resize": "direct", "scales": [0.5], "flip": False,
             "average": "logits"}  # fmt: skip
    written = {"per_class", "confusion_picture", "submission"}
    assert set(other) | written == {field.name for field in dataclasses.fields(EvaluateSettings)}
    for name, value in other.items():
        changed = dataclasses.replace(base, evaluate=dataclasses.replace(base.evaluate, **{name: value}))
        assert rule_of(changed) != rule_of(base), name


# --- runs ---


def run(root: Path, *overrides: str) -> dict:
    return adapt.run(settings_of(f"logging.root={root}", "logging.terminal=quiet", *overrides))


def test_validation_counts_what_evaluate_counts_under_every_rule(tmp_path):
    for index, name in enumerate(("default", "openseg", "dinov2")):
        overrides = (f"evaluate={name}", "data.short_side_px=64")
        settings = settings_of(*overrides)
        dataset = build_dataset(settings.data)
        entries = stream.order(dataset, Task(0), seed=0, shuffle=True, limit=2)
        segmenter = build_segmenter(settings.model.discriminative, len(dataset.classes), torch.device("cpu"))
        parts = [scoring.count(segmenter, dataset, [entry], settings=settings) for entry in entries]
        results = run(tmp_path / str(index), *overrides)
        matrix = np.loadtxt(
            Path(results["folder"]) / "tasks" / "00_clean.confusion.csv", np.int64, delimiter=",", skiprows=1,
            usecols=range(1, 1 + len(dataset.classes)),
        )  # fmt: skip
        assert np.array_equal(sum(parts), matrix)
        assert parts[0].dtype == np.int64
        assert results["rule"] == rule_of(settings)
        assert results["rule"] in results["protocol"]


@pytest.mark.parametrize("given", ["per_class=true", "confusion_picture=true", "submission=ids"])
def test_training_refuses_what_a_validation_would_not_write(given, tmp_path):
    with pytest.raises(UserError, match=rf"evaluate\.{given.partition('=')[0]}=\w+: a validation writes scores alone"):
        train.run(training(tmp_path, f"evaluate.{given}"))
    assert list(tmp_path.iterdir()) == []


def test_the_default_rule_wraps_nothing():
    """Its predictions are one forward of the loaded image, once resized: as before there were rules."""
    settings = settings_of("data.short_side_px=64")
    dataset = build_dataset(settings.data)
    models = build_models(settings, dataset.classes)
    assert not isinstance(models.method.segmenter, Inference)
    ruled = build_models(settings_of("evaluate=openseg"), dataset.classes)
    assert isinstance(ruled.method.segmenter, Inference)
    assert ruled.fingerprints == models.fingerprints
