"""Own short sides: what each model sees of the loaded image, and that boxes, logits and labels follow the teacher's."""

import pytest
import torch
from conftest import CLASSES
from test_combined import ALL_CLASSES, changed, state
from torch.nn.functional import interpolate, normalize

from segadapt.errors import UserError
from segadapt.methods import METHODS
from segadapt.models.build import fixed_bytes
from segadapt.models.diagnostics import examine
from segadapt.models.source import Source
from segadapt.parse import options_of
from segadapt.protocol import protocol

LOADED = "data.short_side_px=64"
RESIZED = {"mode": "bilinear", "align_corners": False}


@pytest.fixture
def build(build_combined):
    """build(segmenter_px, teacher_px): the tiny models, which load at 64 px."""

    def build(segmenter_px, teacher_px, *overrides, **more):
        combined = build_combined(
            LOADED, f"model.generative.short_side_px={teacher_px}", ALL_CLASSES, *overrides, **more
        )
        combined.segmenter.short_side_px = segmenter_px  # as build.py does
        return combined

    return build


@pytest.mark.parametrize(("segmenter_px", "teacher_px"), [(48, 32), (64, 32), (32, 64), (32, 40)])
@pytest.mark.parametrize("portrait", [False, True])
def test_each_model_sees_the_loaded_image_at_its_own_size(build, random_image, segmenter_px, teacher_px, portrait):
    """Logits of the segmenter's size, windows of the teacher's, and q on their grid, from plain interpolations."""
    image_3HW = random_image(64, 96, dtype=torch.float64)
    image_3HW = image_3HW.transpose(1, 2).contiguous() if portrait else image_3HW
    combined, given = build(segmenter_px, teacher_px, dtype=torch.float64), []
    size = [round(side * teacher_px / 64) for side in image_3HW.shape[1:]]
    seen_1 = interpolate(
        image_3HW[None], size=[round(side * segmenter_px / 64) for side in image_3HW.shape[1:]], **RESIZED
    )
    logits_1Chw = combined.segmenter.logits(seen_1).detach()
    encode, chunks = combined.generative.encode, combined._backward_chunks
    combined.generative.encode = lambda cut: given.append(cut) or encode(cut)
    combined._backward_chunks = lambda leaf, *rest, **more: given.append(leaf) or chunks(leaf, *rest, **more)
    prediction = combined.step(image_3HW, task="t", key="k")
    assert torch.equal(prediction.logits_Chw, logits_1Chw[0])
    windows_K3ss, leaf_KCyx = given
    teacher_1, q_1CHW = (interpolate(each, size=size, **RESIZED) for each in (image_3HW[None], normalize(logits_1Chw)))
    boxes = combined.sight.boxes(image_3HW).tolist()
    assert {(y + side, x + side) for y, x, side in boxes} >= {tuple(size)}  # the far corner of the teacher's image
    for window, (y, x, side) in enumerate(boxes):
        crop_1 = teacher_1[:, :, y : y + side, x : x + side]
        torch.testing.assert_close(windows_K3ss[window], 2 * crop_1[0] - 1)
        on_grid_1 = interpolate(q_1CHW[:, :, y : y + side, x : x + side], size=(4, 4), **RESIZED)
        torch.testing.assert_close(leaf_KCyx[window], on_grid_1[0], rtol=0, atol=1e-10)


def test_the_loaded_size_as_own_size_changes_no_bit(build, random_image):
    found = []
    for own in ((None, "null"), (64, 64)):
        combined = build(*own, "tta.optimizer.lr=1e-3")
        losses = [combined.step(random_image(64, 90, seed=seed), task="t", key=str(seed)).loss for seed in range(2)]
        found.append((losses, state(combined)))
    (one, weights), (other, expected) = found
    assert one == other
    assert changed(weights, expected) == set()


def test_a_diagnosis_reads_labels_on_the_teachers_windows(build, random_image):
    """Logits that are the label: the segmenter is right on every latent pixel of the teacher's image of 32 x 64 px."""
    combined = build(64, 32)
    label_HW = torch.arange(4 * 8).view(4, 8).remainder(len(CLASSES)).repeat_interleave(16, 0).repeat_interleave(16, 1)
    logits_1Chw = torch.nn.functional.one_hot(label_HW[2::4, 2::4], len(CLASSES)).permute(2, 0, 1)[None] * 9.0
    combined.segmenter.logits = lambda image_B3HW: logits_1Chw if image_B3HW.shape[2:] == (64, 128) else None
    (tally,) = examine(combined, random_image(64, 128), label_HW, task="t", key="k", sigmas=[0.25])
    found = tally.summary()
    assert found["pixels"] == 3 * 16
    assert found["segmenter"]["accuracy"] == 1


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not kind.has_teacher])
def test_every_method_without_teacher_works_at_the_segmenters_size(
    build_segmenter, compose_settings, random_image, name
):
    """As if the images had been loaded at that size; views and copies of an image are made of the smaller one."""
    settings, found = compose_settings(f"tta.method={name}", LOADED), []
    for is_loaded_small in (True, False):
        segmenter = build_segmenter()
        segmenter.short_side_px = None if is_loaded_small else 64
        how = {"seed": 0, "precision": "fp32"}
        kind = METHODS[name]
        method = (
            kind(segmenter, **how)
            if kind is Source
            else kind(segmenter, options_of(settings.tta), settings.tta.optimizer, **how)
        )
        losses = []
        for seed in range(2):
            image_3HW = random_image(128, 180, seed=seed)
            if is_loaded_small:
                image_3HW = interpolate(image_3HW[None], size=(64, 90), **RESIZED)[0]
            if not seed:
                method.see_source([image_3HW])
            losses.append(method.step(image_3HW, task="t", key=str(seed)).logits_Chw)
        found.append(losses)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [LOADED, "model.generative.short_side_px=80"],
            r"model\.generative\.short_side_px=80 is larger than data\.short",
        ),
        ([LOADED, "model.discriminative.short_side_px=80"], r"model\.discriminative\.short_side_px=80 is larger than"),
        (
            [LOADED, "model.generative.short_side_px=16"],
            r"model\.generative\.short_side_px=16 is smaller than .*window",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(compose_settings, overrides, message):
    with pytest.raises(UserError, match=message):
        compose_settings(*overrides)


def test_protocol_tells_own_sides(compose_settings):
    def sentence(*overrides):
        return protocol(compose_settings(LOADED, *overrides), order_sha256="0" * 64)

    own = ("model.generative.short_side_px=32", "model.discriminative.short_side_px=48")
    assert "short side 64 px;" in sentence()
    assert "short side 64 px (segmenter 48 px, teacher 32 px);" in sentence(*own)
    assert "short side 64 px (segmenter 48 px);" in sentence(*own, "tta.forward_mode=discriminative_only")


def test_memory_of_the_segmenter_grows_with_its_own_size(build_segmenter, build_teacher, monkeypatch):
    monkeypatch.setattr("segadapt.models.build.count", lambda _: 10**8)
    segmenter, autoencoder = build_segmenter(), build_teacher().autoencoder
    at = [fixed_bytes(segmenter, autoencoder, is_trained=True, short_side_px=px)[0] for px in (512, 1024)]
    assert at[1] - at[0] == 9 * 2**30
    last = [fixed_bytes(segmenter, autoencoder, is_trained=True, windows=count)[1] for count in (2, 4)]
    assert last[1] - last[0] == 3 * 2**30
