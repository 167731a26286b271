"""Clipping, warm-up and accumulation: what a step makes of the gradients of images."""

import pytest
import torch
from steps import decide, steps
from test_combined import ALL_CLASSES, LEARN, changed, optimizer_state, poison_velocity, same, state, watch

from segadapt.models.updates import Updates

SGD = (ALL_CLASSES, "tta.optimizer.name=sgd", "tta.optimizer.lr=0.1")


def moved(before, combined):
    """Displacement of each model: one vector."""
    after = {name: value.detach() for name, value in combined.parameters().items()}
    return {
        model: torch.cat([(after[n] - before[n]).flatten() for n in after if n.startswith(model)])
        for model in ("discriminative", "generative")
    }


def test_gradient_of_each_model_is_clipped_to_its_own_norm(build_combined, random_image):
    options = (ALL_CLASSES, "tta.optimizer.name=sgd", "tta.optimizer.lr=1")
    plain = build_combined(*options)
    source = {name: value.detach().clone() for name, value in plain.parameters().items()}
    unclipped = plain.step(random_image(), task="t", key="k")
    free = moved(source, plain)
    small, large = sorted(vector.norm().item() for vector in free.values())
    limit = (small * large) ** 0.5  # between the two models' norms: one is clipped, one is not
    assert large > 1.1 * small
    clipped = build_combined(*options, f"tta.optimizer.clip_norm={limit}")
    prediction = clipped.step(random_image(), task="t", key="k")
    assert prediction.grad_norm == unclipped.grad_norm  # recorded as it was
    for model, vector in moved(source, clipped).items():
        factor = min(1.0, limit / free[model].norm().item())
        torch.testing.assert_close(vector, factor * free[model], rtol=1e-3, atol=1e-6)


def single_gradients(build_combined, names):
    """Of each image alone, at the source weights."""
    out = []
    for name in names:
        combined = build_combined(*SGD)
        seen = watch(combined)
        steps(combined, name)
        out.append(seen[0][1])
    return out


def test_first_steps_after_a_reset_take_a_growing_share_of_each_models_rate(build_combined):
    rates = ("tta.optimizer.lr_discriminative=0.2", "tta.optimizer.lr_generative=0.1")
    combined = build_combined(*SGD, *rates, "tta.optimizer.momentum=0", "tta.optimizer.warmup=4")
    seen = watch(combined)
    for _ in range(2):
        for share in (0.25, 0.5, 0.75, 1.0, 1.0):
            before = {name: p.detach().double() for name, p in combined.parameters().items()}
            steps(combined, "a")
            for name, gradient in seen[-1][1].items():
                if gradient is None:
                    continue
                rate = share * (0.2 if name.startswith("discriminative") else 0.1)
                moved = before[name] - combined.parameters()[name].detach().double()
                torch.testing.assert_close(moved, rate * gradient.double(), rtol=1e-3, atol=1e-6, msg=name)
        combined.reset()


def test_accumulated_step_moves_by_the_mean_gradient(build_combined):
    combined, source = build_combined(*SGD, "tta.optimizer.accumulate=2"), build_combined(*SGD)
    before = state(combined)
    first, second = single_gradients(build_combined, "ab")
    assert steps(combined, "a")[0].is_updated
    assert changed(before, state(combined)) == set()
    steps(combined, "b")
    for name, value in source.parameters().items():
        if first[name] is not None:
            expected = value.detach() - 0.1 * (first[name] + second[name]) / 2
            torch.testing.assert_close(combined.parameters()[name].detach(), expected, rtol=1e-5, atol=1e-7)
    assert changed(before, state(combined))
    after = state(combined)
    combined.flush()
    assert changed(after, state(combined)) == set()  # nothing waits


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_flush_takes_the_mean_of_what_waits_and_reset_drops_it(build_combined, optimizer):
    options = (*LEARN, f"tta.optimizer.name={optimizer}")
    pair, many = (build_combined(*options, f"tta.optimizer.accumulate={n}") for n in (2, 5))
    steps(many, "cd")
    many.reset()
    for each in (pair, many):
        steps(each, "ab")
        each.flush()
        assert len(each._updates._sums) == 0
    assert changed(state(pair), state(many)) == set()
    assert same(optimizer_state(pair), optimizer_state(many))
    assert changed(state(build_combined(*options)), state(many))


@pytest.mark.parametrize("fault", ["nan", "refused"])
def test_bad_image_adds_nothing_to_those_that_wait(build_combined, fault):
    options = (*LEARN, "tta.optimizer.accumulate=2", "model.trust.max_agreement=0.999")
    combined, spared = build_combined(*options), build_combined(*options)
    steps(combined, "a")
    velocity, chunks = combined.generative.velocity, combined._backward_chunks
    if fault == "nan":
        poison_velocity(combined, float("nan"))
    else:
        decide(combined, is_right=True)
    assert not steps(combined, "c")[0].is_updated
    combined.generative.velocity, combined._backward_chunks = velocity, chunks
    steps(combined, "b")
    steps(spared, "ab")
    assert changed(state(combined), state(spared)) == set()
    assert same(optimizer_state(combined), optimizer_state(spared))
    assert optimizer_state(combined)


def test_no_sum_of_gradients_is_kept_without_accumulation(build_combined):
    combined = build_combined(*LEARN)
    steps(combined, "a")
    assert combined._updates._sums == {}
    assert all(parameter.grad is None for parameter in combined.parameters().values())


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_step_that_the_device_decides_equals_the_hosts(compose_settings, device, warmup):
    """Five images of which three are used; the very first is not, nor is it counted as a step."""
    draw = torch.Generator().manual_seed(0)
    source = [torch.randn(size, generator=draw) for size in ((3, 4), (5,))]
    options = ("name=adamw", "lr=0.1", "weight_decay=0.1", f"warmup={warmup}", "clip_norm=1")
    settings = compose_settings(*(f"tta.optimizer.{option}" for option in options)).tta.optimizer
    both = []
    for fused in (True, False):
        parameters = [torch.nn.Parameter(value.clone().to(device)) for value in source]
        groups = {"discriminative": dict(zip("ab", parameters, strict=True))}
        both.append((parameters, Updates(groups, settings, fused=fused)))
    for use in (False, True, False, True, True):
        grads = [torch.randn(value.shape, generator=draw) * (1 if use else torch.nan) for value in source]
        for parameters, updates in both:
            before = [parameter.detach().clone() for parameter in parameters]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad.to(device)
            updates.take(torch.tensor(use, device=device))
            assert all(parameter.grad is None for parameter in parameters)
            moved = [not torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)]
            assert moved == [use, use]
        for fused, plain in zip(both[0][0], both[1][0], strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert all(each["step"].item() == 3 for _, updates in both for each in updates.optimizer.state.values())
