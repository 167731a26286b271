"""What every method of test-time adaptation keeps to: what moves, reset, round trip, what is scored, number formats."""

import copy

import pytest
import torch
from again import Again
from steps import random_noise, steps

from segadapt.checkpoint import Checkpoints
from segadapt.errors import UserError
from segadapt.methods import METHODS
from segadapt.methods.build import build_method
from segadapt.methods.learner import Learner
from segadapt.models.combined import Combined
from segadapt.parse import options_of

QUICK = {
    "eata": ("tta.options.fisher_images=2", "tta.options.distance=1", "tta.options.margin=1"),
    "rdumb": ("tta.options.reset_every=3", "tta.options.distance=1", "tta.options.margin=1"),
    "deyo": ("tta.options.margin=1", "tta.options.plpd=-1"),
    "rotta": ("tta.options.capacity=3", "tta.options.every=2"),
    "memo": ("tta.options.augmentations=2",),
    "sar": ("tta.options.margin=1",),
    "cotta": ("tta.options.scales=[1.0,1.5]",),
}
RATE = "tta.optimizer.lr=1e-2"
LEARNERS = [name for name, method in METHODS.items() if issubclass(method, Learner)]


@pytest.fixture
def build(compose_settings, build_segmenter, build_combined):
    """build(name, *overrides): the method with tiny models, as `build_models` makes it."""

    def build(name, *overrides, is_certain=False, memory=None):
        settings = compose_settings(f"tta.method={name}", "data.workers=0", RATE, *QUICK.get(name, ()), *overrides)
        if METHODS[name].has_teacher:
            combined = build_combined(f"tta.method={name}", RATE, *overrides, kind=METHODS[name])
            if is_certain:
                with torch.no_grad():
                    combined.segmenter.net.decode_head.classifier.bias[0] += 1e4
            return combined
        segmenter = build_segmenter()
        if is_certain:
            with torch.no_grad():
                segmenter.net.decode_head.classifier.bias[0] += 1e4
        return build_method(settings, segmenter, memory=memory)

    return build


def tensors(method):
    """Every parameter and buffer of every part, by name."""
    nets = {"discriminative": method.segmenter.net}
    if isinstance(method, Combined):
        nets |= {"generative": method.generative.transformer, "autoencoder": method.generative.autoencoder}
    return {f"{part}.{name}": v.detach().clone() for part, net in nets.items() for name, v in net.state_dict().items()}


def equal(one, other):
    """Of nested state: tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("name", METHODS)
def test_what_may_not_move_is_bit_equal_after_fifty_steps(build, name):
    method = build(name)
    before, moving = tensors(method), set(method.parameters())
    updates = [method.step(random_noise(seed % 5), task="t", key=str(seed)).is_updated for seed in range(50)]
    moved = {key for key, value in tensors(method).items() if not torch.equal(value, before[key])}
    assert moved <= moving
    assert any(updates) == bool(moving)
    assert bool(moved) == bool(moving)


@pytest.mark.parametrize("name", METHODS)
def test_reset_equals_a_fresh_process(build, name):
    method, fresh = build(name), build(name)
    steps(method, "abab")
    method.reset()
    for one, other in zip(steps(method, "cda"), steps(fresh, "cda"), strict=True):
        assert torch.equal(one.logits_Chw, other.logits_Chw)
        assert (one.loss, one.grad_norm, one.is_updated) == (other.loss, other.grad_norm, other.is_updated)
    assert equal(tensors(method), tensors(fresh))
    assert equal(method.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(
    ("name", "accumulate"), [(name, n) for name in METHODS for n in (1, 2) if (name, n) != ("memo", 2)]
)
def test_state_goes_through_a_file(build, tmp_path, name, accumulate):
    """What is in the file does not move with the method; read back, by it or another process's, it steps on alike."""
    method, other = (build(name, f"tta.optimizer.accumulate={accumulate}") for _ in range(2))
    steps(method, "aba")
    checkpoints = Checkpoints(tmp_path, seconds=None, images=None)
    checkpoints.write(3, method.state_dict())
    expected = steps(method, "cdb")
    last = copy.deepcopy(method.state_dict())
    for one in (other, method):
        one.load_state_dict(checkpoints.read(lambda _: None))
        for found, wanted in zip(steps(one, "cdb"), expected, strict=True):
            assert torch.equal(found.logits_Chw, wanted.logits_Chw)
            assert (found.loss, found.grad_norm) == (wanted.loss, wanted.grad_norm)
        assert equal(one.state_dict(), last)
    assert equal(tensors(method), tensors(other))


@pytest.mark.parametrize("name", METHODS)
def test_prediction_scored_is_the_declared_one(build, name):
    method = build(name)
    steps(method, "ab")

    def now(image_3HW):
        with torch.no_grad():
            return method.segmenter.logits(image_3HW[None])[0]

    image_3HW = random_noise(3)
    before_Chw = now(image_3HW)
    prediction = method.step(image_3HW, task="t", key="k")
    if method.scored == "before the update":
        torch.testing.assert_close(prediction.logits_Chw, before_Chw, rtol=0, atol=0)
    elif method.scored == "after the update":
        torch.testing.assert_close(prediction.logits_Chw, now(image_3HW), rtol=0, atol=0)
        assert not torch.equal(prediction.logits_Chw, before_Chw)
    elif "prior" in method.scored:
        p_Chw = before_Chw.softmax(dim=0)
        ratio_Chw = prediction.logits_Chw / before_Chw  # one factor a class, larger for a larger share of the image
        torch.testing.assert_close(ratio_Chw, ratio_Chw.mean(dim=(1, 2), keepdim=True).expand_as(ratio_Chw))
        assert torch.equal(ratio_Chw.mean(dim=(1, 2)).argsort(), p_Chw.mean(dim=(1, 2)).argsort())
    elif name == "rotta":
        assert "teacher" in method.scored
        assert not torch.equal(prediction.logits_Chw, before_Chw)  # the student's
    else:
        assert "teacher" in method.scored
        torch.testing.assert_close(prediction.logits_Chw.exp().sum(dim=0), torch.ones(before_Chw.shape[1:]))
    assert prediction.logits_Chw.dtype == torch.float32
    assert not prediction.logits_Chw.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("is_certain", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_image_of_one_class_stays_finite(build, name, is_certain, precision):
    """One colour; and a head that is certain of one class, so that entropy and most probabilities are 0."""
    method = build(name, f"runtime.precision={precision}", "model.generative.max_pairs=8", is_certain=is_certain)
    for key in "ab":
        prediction = method.step(torch.full((3, 32, 45), 0.5), task="t", key=key)
        assert bool(prediction.logits_Chw.softmax(dim=0)[0].min() > 0.99) == is_certain
        assert prediction.is_finite
        assert prediction.is_step_finite
    assert all(value.isfinite().all() for value in tensors(method).values() if value.is_floating_point())


@pytest.mark.parametrize("name", METHODS)
def test_bf16_steps_follow_those_of_fp32(build, name):
    one, other = (build(name, f"runtime.precision={precision}") for precision in ("fp32", "bf16"))
    for name_, exact, rough in zip("ab", steps(one, "ab"), steps(other, "ab"), strict=True):
        assert rough.logits_Chw.dtype == torch.float32, name_
        torch.testing.assert_close(rough.logits_Chw, exact.logits_Chw, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.has_teacher])
def test_recorded_steps_equal_plain_ones(build, name):
    """Two sizes in turn, each recorded when it comes again."""
    plain, recorded = build(name), build(name, memory=Again())
    for index in range(6):
        image_3HW = torch.rand(3, 32, 45 + 3 * (index % 2), generator=torch.Generator().manual_seed(index))
        one, other = (method.step(image_3HW, task="t", key=str(index)) for method in (plain, recorded))
        torch.testing.assert_close(other.logits_Chw, one.logits_Chw, rtol=1e-5, atol=1e-6)
        assert other.is_updated == one.is_updated
        assert other.loss == (None if one.loss is None else pytest.approx(one.loss, rel=1e-4))


@pytest.mark.parametrize("more", ["tta.method=memo", "tta.episodic=true"])
def test_images_that_are_alone_cannot_accumulate(compose_settings, more):
    with pytest.raises(UserError, match=r"tta\.optimizer\.accumulate=2, but each image is alone"):
        compose_settings(more, "tta.optimizer.accumulate=2")


def test_what_follows_a_step_follows_no_image_that_only_waits(build):
    method, count = build("roid", "tta.optimizer.accumulate=2"), []
    method.after_step = lambda **names: count.append(names["key"])
    steps(method, "abcd")
    assert count == ["2", "4"]


@pytest.mark.parametrize("name", METHODS)
def test_published_values_are_complete_and_of_their_types(compose_settings, name):
    settings = compose_settings(f"tta.method={name}")
    options = options_of(settings.tta)
    assert set(vars(options)) == set(settings.tta.options)
    assert settings.tta.method == name
    if name in LEARNERS:
        text = METHODS[name].__doc__
        assert text is not None
        assert "Published:" in text
        assert "er pixel" in text or "er image" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tta.method=eata", "tta.options.fisher_alpha=-1"), r"tta\.options\.fisher_alpha=-1\.0: expected at least 0"),
        (("tta.method=eata", "tta.options.margin=wide"), r"tta\.options\.margin='wide'.*entropy below"),
        (("tta.method=tent", "+tta.options.margn=0.1"), r"tta\.options\.margn is not a setting"),
        (("tta.method=sar", "+tta.options.roh=0.1"), r"tta\.options\.roh is not a setting\. Did you mean rho\?"),
    ],
)
def test_wrong_options_are_refused_in_one_line(given, message):
    from segadapt import config
    from segadapt.parse import from_overrides

    with pytest.raises(UserError, match=message) as caught:
        from_overrides("adapt", ["data=toytown_c", *given], config.AdaptConfig)
    assert "\n" not in str(caught.value)
