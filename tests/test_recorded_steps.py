"""Steps with recorded stages against steps without, over several images: weights move, sizes change, all is reset."""

import pytest
import torch
from test_exact import record

from segadapt.models import build as building
from segadapt.models.build import build_models

CLASSES = ("sky", "road", "tree", "car", "person", "sign")
SIZES = ((32, 45), (32, 32), (32, 64))


@pytest.fixture(scope="module")
def models(saved_models):
    return saved_models(CLASSES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.generative.max_pairs=20",),
        ("model.generative.max_pairs=2",),
        ("model.generative.max_pairs=20", "model.generative.parts=3"),
        ("model.generative.max_pairs=3", "model.generative.placement=replicate"),
        ("model.generative.max_pairs=3", "model.update.lora_rank=2", "model.generative.parts=2"),
        ("model.generative.max_pairs=3", "model.update.prompt_offset=true", "model.update.lora_rank=2"),
        ("model.generative.max_pairs=6", "model.update.prompt_offset=true", "model.generative.placement=replicate"),
        ("model.generative.max_pairs=3", "model.update.generative=false"),
        ("model.generative.max_pairs=3", "model.update.discriminative=false"),
        ("model.generative.max_pairs=20", "tta.optimizer.accumulate=2"),
        ("model.generative.max_pairs=20", "model.trust.max_agreement=0.2", "model.trust.restore=0.5"),
    ],
)
def test_recorded_steps_equal_plain_ones(models, compose_settings, monkeypatch, random_image, overrides, precision):
    several = any("parts" in override or "placement" in override for override in overrides)
    monkeypatch.setattr(building, "devices_of", lambda _: ["cpu"] * (2 if several else 1))
    settings = compose_settings(
        *models, *overrides, f"runtime.precision={precision}", "model.loss.topk=6", "tta.optimizer.lr=1e-3"
    )
    plain, recorded = (build_models(settings, CLASSES, force_hooks=several).method for _ in range(2))
    # sums of gradients as dynamo traces them: test_exact.py holds against the plain ones what is made of the trace
    record(recorded, dtype=torch.bfloat16 if precision == "bf16" else None, backend="eager")
    source = {name: value.detach().clone() for name, value in plain.parameters().items()}
    tight = 1e-4 if precision == "fp32" else 3e-2  # bf16 rounds sums of parts in another order
    for turn in range(2):
        for index in range(5):
            image_3HW, names = random_image(*SIZES[index % 3], seed=index), {"task": str(turn), "key": str(index)}
            expected, found = (method.step(image_3HW, **names) for method in (plain, recorded))
            assert found.loss == pytest.approx(expected.loss, rel=tight)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=3 * tight)
            assert (found.is_updated, found.is_refused) == (expected.is_updated, expected.is_refused)
        moved, other = plain.parameters(), recorded.parameters()
        way = sum((moved[name] - value).square().sum() for name, value in source.items())
        apart = sum((moved[name] - other[name]).square().sum() for name in source)
        assert way > 0, "nothing was learned"
        assert apart <= (0.05 if precision == "fp32" else 0.3) * way  # AdamW takes the sign of the smallest gradient
        plain.reset()
        recorded.reset()
        assert all(torch.equal(value, source[name]) for name, value in recorded.parameters().items())
