"""The segmenter recorded and replayed: the steps of the plain one, bit for bit. On the CPU a replay works again."""

import gc
import weakref

import pytest
import torch
from again import Again

from segadapt import config
from segadapt.models.combined import Combined
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.generative.sd3 import Sd3
from segadapt.models.recording import Graphs, Piece, Recorder
from segadapt.models.source import segmenting

SIZES = ((32, 48), (32, 32), (48, 32))


@pytest.fixture
def build(compose_settings, build_segmenter, build_teacher):
    """build(*overrides, memory): the tiny models in float64."""

    def build(*overrides: str, memory=None) -> Combined:
        settings: config.AdaptConfig = compose_settings(*overrides)
        segmenter, teacher = build_segmenter(dtype=torch.float64), build_teacher(dtype=torch.float64)
        return Combined(
            segmenter, teacher, settings.model, settings.tta.optimizer, seed=0, precision="fp32", memory=memory
        )

    return build


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.update.update_norm_only=true",),
        ("model.update.discriminative=false",),
        ("tta.optimizer.accumulate=3",),
        ("model.trust.max_agreement=0.99", "model.trust.restore=0.5"),
    ],
)
def test_recorded_steps_equal_plain_ones(build, random_image, overrides):
    plain, recorded = build(*overrides), build(*overrides, memory=Again())
    for index in range(9):
        image_3HW = random_image(*SIZES[index % 3], seed=index, dtype=torch.float64)
        expected, found = (c.step(image_3HW, task="t", key=str(index)) for c in (plain, recorded))
        assert torch.equal(found.logits_Chw, expected.logits_Chw)
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert len(recorded._segment.recordings) == len(SIZES)
    for name, value in recorded.parameters().items():
        assert torch.equal(value, plain.parameters()[name]), name


def test_recorded_encoding_equals_the_plain_one(build_teacher):
    """Also after others, and results that are kept stay."""
    plain, memory = build_teacher(), Again()
    recorded = Sd3(plain.transformer, plain.autoencoder, plain.embeddings, device=plain.device, memory=memory)
    draw = torch.Generator().manual_seed(0)
    given = [torch.rand(count, 3, 32, 32, generator=draw) for count in (2, 1, 2, 2, 1, 2)]
    found = [recorded.encode(windows_K3ss) for windows_K3ss in given]
    assert memory.recorded == 2  # one window and two
    for windows_K3ss, latent_Kzyx in zip(given, found, strict=True):
        assert torch.equal(latent_Kzyx, plain.encode(windows_K3ss))


def test_what_stays_float32_inside_autocast_does_so_in_the_recorded_backward():
    weight = torch.nn.Parameter(torch.rand(5, 3, generator=torch.Generator().manual_seed(0)))

    def forward(x_BD):
        with torch.autocast("cpu", enabled=False):
            return (x_BD @ weight,)

    x_BD = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    recorder = Recorder([Piece(forward, [weight], [weight], [torch.empty_like(weight)])], Again())
    with torch.autocast("cpu", torch.bfloat16):
        recorder(x_BD)[0].backward(torch.full((7, 3), 1 / 3))
    assert torch.equal(weight.grad, x_BD.T @ torch.full((7, 3), 1 / 3))


def test_each_size_is_recorded_the_second_time_and_no_more_than_allowed(build_segmenter, random_image):
    segmenter, calls = build_segmenter(), []

    def forward(image_B3HW):
        calls.append(image_B3HW.shape[2:])
        return (segmenter.logits(image_B3HW),)

    memory = Again()
    recorder = Recorder([Piece(forward, [], [], [])], memory, plain=forward, most_sizes=2)
    with torch.no_grad():
        for _ in range(3):
            for size in SIZES:
                image_B3HW = random_image(*size)[None]
                assert torch.equal(recorder(image_B3HW)[0], segmenter.logits(image_B3HW))
    assert [tuple(shape[2:]) for _, shape in recorder.recordings] == list(SIZES[:2])
    assert memory.recorded == 2


def test_logits_are_not_overwritten_by_the_next_image_and_a_late_backward_is_found(build, random_image):
    recorded = build(memory=Again())
    images = [random_image(*SIZES[0], seed=seed, dtype=torch.float64) for seed in range(3)]
    recorded.logits(images[0])
    first = recorded.logits(images[1])
    kept = first.detach().clone()
    second = recorded.logits(images[2])
    assert torch.equal(first, kept)
    assert not torch.equal(second, first)
    with pytest.raises(AssertionError, match="another forward came"):
        first.sum().backward()
    second.sum().backward()


def test_a_late_backward_is_found_across_sizes_as_all_share_their_memory(build, random_image):
    recorded = build(memory=Again())
    one, other = (random_image(*size, dtype=torch.float64) for size in SIZES[:2])
    for image_3HW in (one, other):
        recorded.logits(image_3HW)
    first = recorded.logits(one)
    recorded.logits(other)
    with pytest.raises(AssertionError, match="another forward came"):
        first.sum().backward()


class Once(Again):
    """It keeps nothing of the work, as a graph does."""

    def record(self, work):
        return work(), lambda: None


@pytest.mark.parametrize("memory", [None, Once()])
def test_weights_go_with_the_last_reference_to_them(build, random_image, memory):
    combined = build(memory=memory)
    for seed in range(3):
        combined.step(random_image(seed=seed, dtype=torch.float64), task="t", key=str(seed))
    weights = weakref.ref(next(iter(combined.parameters().values())))
    gc.collect()
    gc.disable()
    try:
        del combined
        assert weights() is None, "the next job of --multirun would find them still there"
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_on_a_gpu_equal_the_plain_segmenter(build_segmenter, random_image, precision):
    """Several sizes in turn, with the weights moving in between, as optimizer, restoring and reset move them."""
    segmenter = NetSegmenter(build_segmenter().net.cuda())
    moving = list(segmenter.parameters().values())
    plain = segmenting(segmenter, precision, None, moving)
    recorder = segmenting(segmenter, precision, Graphs(torch.device("cuda")).memory(), moving)

    def outcome(forward, image_B3HW):  # no graph survives it
        (logits_BChw,) = forward(image_B3HW)
        logits_BChw.square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in moving if p.grad is not None])
        segmenter.net.zero_grad()
        return logits_BChw.detach(), grads

    limit = 1e-4 if precision == "fp32" else 1e-2  # bf16: atomic additions differ from run to run
    for index in range(12):
        image_B3HW = random_image(*SIZES[index % 3], seed=index).cuda()[None]
        for expected, found in zip(*(outcome(forward, image_B3HW) for forward in (plain, recorder)), strict=True):
            assert expected.shape == found.shape
            assert (found - expected).norm() <= limit * expected.norm()
        with torch.no_grad():
            for parameter in moving:
                parameter.mul_(0.97)
    assert len(recorder.recordings) == 3
