"""The segmenter recorded and replayed: the steps of the plain one, bit for bit. On the CPU a replay works again."""

import pytest
import torch

from segadapt import config
from segadapt.models.combined import Combined
from segadapt.models.discriminative.recording import Recorder, cuda_recorder

SIZES = ((32, 48), (32, 32), (48, 32))


def run_again(work):
    """A recorder as CUDA's: the result stays where it is, and doing it again writes there."""
    result = work()

    def again():
        with torch.enable_grad():
            fresh = work()
        if isinstance(result, torch.Tensor):
            result.copy_(fresh)

    return result, again


@pytest.fixture
def build(compose_settings, build_segmenter, build_teacher):
    """build(*overrides, record): the tiny models in float64."""

    def build(*overrides: str, record=None) -> Combined:
        settings: config.AdaptConfig = compose_settings(*overrides)
        segmenter, teacher = build_segmenter(dtype=torch.float64), build_teacher(dtype=torch.float64)
        return Combined(
            segmenter, teacher, settings.model, settings.tta.optimizer, seed=0, precision="fp32", record=record
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
    plain, recorded = build(*overrides), build(*overrides, record=run_again)
    for index in range(9):
        image_3HW = random_image(*SIZES[index % 3], seed=index, dtype=torch.float64)
        expected, found = (c.step(image_3HW, task="t", key=str(index)) for c in (plain, recorded))
        assert torch.equal(found.logits_Chw, expected.logits_Chw)
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert len(recorded._segment.recordings) == len(SIZES)
    for name, value in recorded.parameters().items():
        assert torch.equal(value, plain.parameters()[name]), name


def test_each_size_is_recorded_the_second_time_and_no_more_than_allowed(build_segmenter, random_image):
    segmenter, calls = build_segmenter(), []

    def forward(image_B3HW):
        calls.append(image_B3HW.shape[2:])
        return segmenter.logits(image_B3HW)

    records = []
    recorder = Recorder(forward, [], record=lambda work: (records.append(1), run_again(work))[1], most_sizes=2)
    with torch.no_grad():
        for _ in range(3):
            for size in SIZES:
                image_B3HW = random_image(*size)[None]
                assert torch.equal(recorder(image_B3HW), segmenter.logits(image_B3HW))
    assert [tuple(size[2:]) for size in recorder.recordings] == list(SIZES[:2])
    assert len(records) == 2


def test_logits_are_not_overwritten_by_the_next_image_and_a_late_backward_is_found(build, random_image):
    recorded = build(record=run_again)
    images = [random_image(*SIZES[0], seed=seed, dtype=torch.float64) for seed in range(3)]
    recorded.logits(images[0])
    first = recorded.logits(images[1])
    kept = first.detach().clone()
    second = recorded.logits(images[2])
    assert torch.equal(first, kept)
    assert not torch.equal(second, first)
    with pytest.raises(AssertionError, match="another image of this size"):
        first.sum().backward()
    second.sum().backward()
    with pytest.raises(AssertionError, match="does not add to older gradients"):
        recorded.logits(images[0]).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_on_a_gpu_equal_the_plain_segmenter(build_segmenter, random_image, precision):
    segmenter = build_segmenter()
    segmenter.net.cuda()
    plain = Combined(segmenter, None, seed=0, precision=precision)
    moving = list(segmenter.parameters().values())
    recorder = Recorder(plain._forward, moving, record=cuda_recorder())
    for parameter in moving:
        parameter.requires_grad_(True)
    for index in range(12):
        image_B3HW = random_image(*SIZES[index % 3], seed=index).cuda()[None]
        outcomes = []
        for forward in (plain._forward, recorder):
            logits_BChw = forward(image_B3HW)
            logits_BChw.square().mean().backward()
            outcomes.append((logits_BChw.detach(), [p.grad.clone() for p in moving if p.grad is not None]))
            segmenter.net.zero_grad()
        (expected, wanted), (logits_BChw, grads) = outcomes
        torch.testing.assert_close(logits_BChw, expected, rtol=1e-5, atol=1e-6)
        assert len(grads) == len(wanted)
        for grad, right in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-3, atol=1e-5)
        with torch.no_grad():  # graphs read the weights where they are
            for parameter in moving:
                parameter.mul_(0.99)
    assert len(recorder.recordings) == 3
