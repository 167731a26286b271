"""Chunked, recomputed, split, copied and compiled steps against the plain one: fp32 and bf16, on small models.

Under bf16 no two orders of operations agree to more than rounding, and LogitNorm's gradient is a small difference of
large terms: the gradient at the logits is therefore held against the float32 one, with the plain step's own distance
from it as the measure.
"""

import pytest
import torch
from again import Again

from segadapt.models import build as building
from segadapt.models.build import build_models
from segadapt.models.generative import stages

CLASSES = ("sky", "road", "tree", "car", "person", "sign")
FORMS = {
    "chunked": ["model.generative.max_pairs=2"],
    "recomputed": ["model.generative.gradient_checkpointing=true"],
    "split": ["model.generative.parts=1"],
    "split, parts overlap": ["model.generative.parts=3"],
    "copies": ["model.generative.placement=replicate"],
    "compiled": [],
    "recorded": ["model.generative.max_pairs=9"],
    "recorded, split, parts overlap": ["model.generative.parts=3"],
    "recorded, copies": ["model.generative.placement=replicate", "model.generative.parts=4"],
}
SEVERAL = [form for form in FORMS if "split" in form or "copies" in form]


@pytest.fixture(scope="module")
def gradients(saved_models, compose_settings, random_image):
    """gradients(precision, form): of several images the loss, the logits' gradient and the teacher's gradients."""
    models = saved_models(CLASSES)

    def compute(precision: str, form: str | None) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
        devices = ["cpu", "cpu"] if form in SEVERAL else ["cpu"]
        overrides = ["model.generative.max_pairs=100", *FORMS.get(form or "", [])]
        settings = compose_settings(*models, f"runtime.precision={precision}", "model.loss.topk=6", *overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "devices_of", lambda _: devices)
            combined = build_models(settings, CLASSES, force_hooks=len(devices) > 1).method
        if form == "compiled":
            stages.compile_blocks(combined.generative.transformer, backend="aot_eager")
        if form and form.startswith("recorded"):
            record(combined, dtype=torch.bfloat16 if precision == "bf16" else None)
        out = []
        for seed in range(3):
            image_3HW, names = random_image(seed=seed), {"task": "t", "key": str(seed)}
            with combined.autocast():
                logits_BChw = combined.segmenter.logits(image_3HW[None])
            logits_BChw = logits_BChw.detach().requires_grad_()
            taught, _ = combined.backward(image_3HW, logits_BChw, combined.sight.noise(image_3HW, **names), **names)
            moving = [p for p in combined.groups["generative"].values() if p.grad is not None]
            out.append((taught.loss.item(), logits_BChw.grad, torch.cat([p.grad.flatten() for p in moving])))
            for parameter in moving:
                parameter.grad = None
        return out

    known: dict[tuple, list] = {}
    return lambda *of: known[of] if of in known else known.setdefault(of, compute(*of))


def record(combined, *, dtype, backend="aot_eager"):
    """As build.py does on GPUs; every block is a stage of its own, as if each lay on another device."""
    parallel = combined.parallel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "runs_of", lambda t: [(torch.device("cpu"), [block]) for block in t.transformer_blocks])
        parallel._stages = stages.record_stages(
            parallel.transformers,
            lambda device, priority: Again,
            parts=parallel.parts,
            pairs=combined.pairs_at_once,
            dtype=dtype,
            backend=backend,
        )
    assert len(parallel._stages) == 2 * len(parallel.transformers)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("form", FORMS)
def test_in_float32_loss_and_gradients_equal_the_plain_ones(gradients, form):
    for (loss, at_logits, of_teacher), plain in zip(gradients("fp32", form), gradients("fp32", None), strict=True):
        assert loss == pytest.approx(plain[0], rel=1e-5)
        assert distance(at_logits, plain[1]) < 1e-4
        assert distance(of_teacher, plain[2]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_in_bf16_they_are_as_near_to_float32_as_the_plain_ones(gradients, form):
    exact, plain, other = gradients("fp32", None), gradients("bf16", None), gradients("bf16", form)
    for (_, _, of_teacher), (_, _, expected) in zip(other, plain, strict=True):
        assert distance(of_teacher, expected) < 1e-2
    of_plain, of_form = (
        torch.tensor([distance(step[1], right[1]) for step, right in zip(steps, exact, strict=True)]).mean()
        for steps in (plain, other)
    )
    assert 0 < of_plain < 0.5
    assert of_form <= 1.2 * of_plain
