"""The learned offset that all prompts share: zero at first, a parameter like others, the same on any placement."""

import copy

import pytest
import torch
from conftest import CLASSES
from test_combined import ALL_CLASSES, changed, state

from segadapt.errors import UserError
from segadapt.methods.dusa_u import DusaU
from segadapt.models.build import build_models
from segadapt.models.combined import Combined
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.sd3 import Sd3

CPU, NAME = torch.device("cpu"), "prompt_offset.pooled"
ON = ("model.update.prompt_offset=true", ALL_CLASSES)


@pytest.fixture
def build(compose_settings, build_segmenter, build_teacher):
    """build(*overrides, copies, parts): the tiny models in float64 with an offset."""

    def build(*overrides: str, copies: int = 1, parts: int = 1, kind: type[Combined] = Combined) -> Combined:
        settings = compose_settings(*ON, *overrides)
        one = build_teacher(dtype=torch.float64)
        transformers = [one.transformer, *(copy.deepcopy(one.transformer) for _ in range(copies - 1))]
        parallel = Parallel(transformers, [CPU] * copies, parts=max(parts, copies))
        how = {"device": CPU, "precision": "fp32", "parallel": parallel, "has_offset": True}
        teacher = Sd3(one.transformer, one.autoencoder, one.embeddings, **how)
        segmenter = build_segmenter(dtype=torch.float64)
        return kind(segmenter, teacher, settings.model, settings.tta.optimizer, seed=0, precision="fp32")

    return build


def backward(combined, image_3HW, *, at=0.0):
    """Loss, and the offset's gradient, with the offset at this value."""
    with torch.no_grad():
        combined.generative.offset_D.copy_(torch.as_tensor(at).expand_as(combined.generative.offset_D))
    logits_BChw, names = combined.segmenter.logits(image_3HW[None]), {"task": "t", "key": "k"}
    noisy = combined.sight.noise(image_3HW, **names)
    taught, _ = combined.backward(image_3HW, logits_BChw, noisy, **names)
    return float(taught.loss), combined.parameters()[NAME].grad


@pytest.mark.parametrize("max_pairs", [1, 4, 100])
@pytest.mark.parametrize(("copies", "parts"), [(1, 1), (1, 3), (2, 2)])
def test_its_gradient_is_the_derivative_of_the_loss_on_any_placement(build, random_image, max_pairs, copies, parts):
    image_3HW, options = random_image(dtype=torch.float64), (f"model.generative.max_pairs={max_pairs}",)
    start_D = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    way_D = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, grad_D = backward(build(*options, copies=copies, parts=parts), image_3HW, at=start_D)
    step = 1e-5
    up, down = (backward(build(), image_3HW, at=start_D + sign * step * way_D)[0] for sign in (1, -1))
    assert grad_D.shape == (24,)
    assert float(grad_D @ way_D) == pytest.approx((up - down) / (2 * step), rel=1e-5)


def test_zero_at_rate_zero_changes_nothing(saved_models, compose_settings, random_image):
    files, runs = saved_models(CLASSES), []
    for overrides in (ON, (ALL_CLASSES,)):
        rates = ("tta.optimizer.lr=1e-3", *(("tta.optimizer.lr_prompt_offset=0",) if overrides is ON else ()))
        combined = build_models(compose_settings(*files, *overrides, *rates), CLASSES).method
        found = [combined.step(random_image(seed=seed), task="t", key=str(seed)) for seed in range(3)]
        runs.append(([(p.loss, p.logits_Chw.tolist()) for p in found], state(combined), combined))
    (one, weights, combined), (other, expected, plain) = runs
    assert one == other
    assert changed(weights, expected) == set()
    assert not combined.parameters()[NAME].any()
    assert set(combined.parameters()) == {*plain.parameters(), NAME}


@pytest.mark.parametrize("kind", [Combined, DusaU])
def test_it_learns_is_reset_and_goes_on_from_a_saved_state(build, random_image, kind):
    """At a rate of its own; DUSA-U's teacher learns from the empty prompt, which has the offset too."""
    rates = ("tta.optimizer.lr=1e-4", "tta.optimizer.lr_prompt_offset=0.1")
    combined, fresh = build(*rates, kind=kind), build(*rates, kind=kind)
    images = [random_image(seed=seed, dtype=torch.float64) for seed in range(3)]
    for index in range(2):
        assert combined.step(images[index], task="t", key=str(index)).is_updated
    learned_D = combined.parameters()[NAME].detach().clone()
    assert learned_D.abs().max() == pytest.approx(0.2, rel=0.1)  # AdamW: about the rate at each step
    fresh.load_state_dict(combined.state_dict())
    assert torch.equal(fresh.parameters()[NAME], learned_D)
    one, other = (each.step(images[2], task="t", key="2") for each in (combined, fresh))
    assert one.loss == other.loss
    assert torch.equal(combined.parameters()[NAME], fresh.parameters()[NAME])
    combined.reset()
    assert not combined.parameters()[NAME].any()


def test_it_is_added_to_every_prompt(build, random_image):
    """The transformer is given pooled embeddings that all differ from the plain ones by the offset."""
    combined, seen = build(), []
    transformer = combined.generative.transformer
    transformer.register_forward_pre_hook(
        lambda _m, _a, given: seen.append(given["pooled_projections"]), with_kwargs=True
    )
    with torch.no_grad():
        combined.generative.offset_D.copy_(torch.arange(24))
    noisy = combined.sight.noise(random_image(dtype=torch.float64), task="t", key="k")
    class_P = torch.arange(combined.generative.null_class + 1)
    combined.generative.velocity(noisy, torch.zeros_like(class_P), class_P)
    text = combined.generative.embeddings
    plain_ND = torch.cat([text.pooled_CD, text.null_pooled_D[None]])
    torch.testing.assert_close(seen[0] - plain_ND, torch.arange(24.0, dtype=torch.float64).expand(7, -1))


def test_a_rate_without_an_offset_is_refused(compose_settings):
    with pytest.raises(UserError, match=r"lr_prompt_offset=0\.1, but model\.update\.prompt_offset=false"):
        compose_settings("tta.optimizer.lr_prompt_offset=0.1")
