"""The weighted sum: which losses are on, their weights, the contrast loss in it, its state; and what settings say."""

import numpy as np
import pytest
import torch
from quick_settings import quick_settings
from torch import distributed as dist
from torch.nn import functional as F
from training_runs import QUIET, training

from segadapt import train
from segadapt.config_training import LossesSettings, TrainConfig
from segadapt.datasets import Sample
from segadapt.errors import UserError
from segadapt.losses import LOSSES, Objective, check_losses, class_weights_of, objective
from segadapt.losses.region import lovasz_softmax
from segadapt.models.discriminative import Outputs
from segadapt.training.loop import Training

CONTRAST = (
    "train/losses=contrast", "train.losses.contrast.warmup_iters=2", "train.losses.contrast.max_samples=24",
    "train.losses.contrast.min_views=2", "train.losses.contrast.width=8",
)  # fmt: skip
MEMORY = (
    "train/losses=contrast_memory", *CONTRAST[1:], "train.losses.contrast.memory.pixel_rows=7",
    "train.losses.contrast.memory.region_rows=5", "train.losses.contrast.memory.min_filled=2",
)  # fmt: skip


def losses_of(*overrides: str) -> LossesSettings:
    return quick_settings("train", overrides, TrainConfig).train.losses


def build(*overrides: str, **options) -> Objective:
    defaults = {"num_classes": 3, "feature_channels": 4, "class_weights_C": None, "seed": 0}
    return Objective(losses_of(*overrides), **(defaults | options))


def batch(seed=0, *, auxiliary=False):
    """Outputs with graphs on a grid of 6 x 8, and a label of 24 x 32."""
    generator = torch.Generator().manual_seed(seed)
    logits_BChw, auxiliary_BChw, features_BDyx = (
        torch.randn(2, channels, 6, 8, generator=generator).requires_grad_() for channels in (3, 3, 4)
    )
    label_BHW = torch.randint(0, 3, (2, 3, 4), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    label_BHW[0, :4] = 255
    return Outputs(logits_BChw, auxiliary_BChw if auxiliary else None, features_BDyx), label_BHW


def resized(logits_BChw):
    return F.interpolate(logits_BChw, size=(24, 32), mode="bilinear", align_corners=False)


def test_by_default_it_is_torchs_cross_entropy_of_resized_logits_and_nothing_else():
    outputs, label_BHW = batch()
    terms = build()(outputs, label_BHW, step=1)
    expected = F.cross_entropy(resized(outputs.logits_BChw), label_BHW, ignore_index=255)
    torch.testing.assert_close(terms.total, expected)
    assert list(terms.values) == list(terms.weights) == ["cross_entropy"]
    assert not list(build().parameters())
    assert not build().state_dict()


def test_terms_are_added_by_their_weights():
    outputs, label_BHW = batch(auxiliary=True)
    objective = build("train/losses=lovasz", "train.losses.lovasz.weight=1.5", "train.losses.auxiliary.weight=0.4",
                      "train.losses.cross_entropy.weight=2")  # fmt: skip
    terms = objective(outputs, label_BHW, step=1)
    assert outputs.auxiliary_BChw is not None
    expected = {
        "cross_entropy": F.cross_entropy(resized(outputs.logits_BChw), label_BHW, ignore_index=255),
        "lovasz": lovasz_softmax(resized(outputs.logits_BChw), label_BHW),
        "auxiliary": F.cross_entropy(resized(outputs.auxiliary_BChw), label_BHW, ignore_index=255),
    }
    torch.testing.assert_close(terms.values, expected)
    assert terms.weights == {"cross_entropy": 2, "lovasz": 1.5, "auxiliary": 0.4}
    assert terms.total.item() == pytest.approx(sum(terms.weights[name] * expected[name].item() for name in expected))
    assert not any(value.requires_grad for value in terms.values.values())


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_learns(name):
    outputs, label_BHW = batch()
    terms = build("train.losses.cross_entropy.weight=0", f"train.losses.{name}.weight=1")(outputs, label_BHW, step=1)
    terms.total.backward()
    assert terms.weights == {name: 1}
    assert outputs.logits_BChw.grad.any()  # pyright: ignore


def test_losses_are_in_float32_whatever_the_autocast():
    outputs, label_BHW = batch()
    low = Outputs(outputs.logits_BChw.bfloat16(), None, outputs.features_BDyx.bfloat16())
    same = Outputs(low.logits_BChw.float(), None, low.features_BDyx.float())
    plain, other = (build(*CONTRAST, "train.losses.lovasz.weight=1") for _ in range(2))
    expected = other(same, label_BHW, step=3)
    with torch.autocast("cpu", torch.bfloat16):
        terms = plain(low, label_BHW, step=3)
    assert {value.dtype for value in (terms.total, *terms.values.values())} == {torch.float32}
    assert terms.values["lovasz"] == expected.values["lovasz"]
    torch.testing.assert_close(terms.total, expected.total, rtol=0.01, atol=0)  # the projection is in bf16


def test_an_auxiliary_loss_without_its_head_is_refused():
    with pytest.raises(UserError, match=r"train\.losses\.auxiliary\.weight=0\.4, but the network has no auxiliary"):
        build("train/losses=auxiliary")(*batch(), step=1)


# Contrast


def test_contrast_weighs_nothing_before_its_warm_up_ends_but_every_parameter_is_used():
    weights = []
    for step in range(1, 5):
        (outputs, label_BHW), objective = batch(), build(*CONTRAST)
        terms = objective(outputs, label_BHW, step=step)
        terms.total.backward()
        weights.append(terms.weights["contrast"])
        assert terms.values["contrast"] > 0
        grads = [parameter.grad for parameter in objective.parameters()]
        assert all(grad is not None for grad in grads)
        assert outputs.features_BDyx.grad.any() == any(grad.any() for grad in grads) == (step > 2)  # pyright: ignore
    assert weights == [0, 0, 0.1, 0.1]


def test_draws_belong_to_seed_and_step_and_each_call_of_a_step_has_its_own():
    outputs, label_BHW = batch()

    def values(steps, **options):
        objective = build(*CONTRAST, "train.losses.contrast.max_views=2", **options)
        return [objective(outputs, label_BHW, step=step).values["contrast"].item() for step in steps]

    first = values([3, 3, 4])
    assert len(set(first)) == 3
    assert values([4]) == first[2:]
    assert values([1, 3, 3, 4])[1:] == first
    assert values([3, 3, 4], seed=1) != first


def test_the_switch_of_the_memory_counts_by_its_value():
    """A memory was once on because the key was there, false or not."""
    off, on = build(*CONTRAST, "train.losses.contrast.memory.enabled=false"), build(*MEMORY)
    assert not [name for name in off.state_dict() if name.startswith("memory.")]
    assert [name for name, _ in on.named_buffers() if name.startswith("memory.")]


def steps(objective, numbers):
    """Losses of training steps on batches of their own."""
    found = []
    for step in numbers:
        outputs, label_BHW = batch(step)
        found.append(objective(outputs, label_BHW, step=step).total.item())
        objective.remember()
    return found


def test_the_memory_is_read_once_filled_and_a_state_goes_on_to_the_bit():
    without, objective = build(*CONTRAST), build(*MEMORY)
    assert [a == b for a, b in zip(steps(without, [1, 2, 3]), steps(objective, [1, 2, 3]), strict=True)] == [
        True, True, False,
    ]  # fmt: skip
    resumed = build(*MEMORY, seed=0)
    resumed.load_state_dict({name: value.clone() for name, value in objective.state_dict().items()})
    assert steps(resumed, [4, 5]) == steps(objective, [4, 5])
    theirs = objective.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.state_dict().items())


def test_a_projection_starts_from_the_seed_alone():
    one, two, other = build(*CONTRAST), build(*CONTRAST), build(*CONTRAST, seed=1)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize("steps", [3, 2])
def test_a_contrast_loss_that_never_finds_an_anchor_ends_the_training(monkeypatch, steps):
    """After IDLE_STEPS steps, of two micro-batches each, or at the end of a shorter training, which said nothing."""
    monkeypatch.setattr(objective, "IDLE_STEPS", 3)
    (outputs, label_BHW), idle = batch(), build(*CONTRAST, "train.losses.contrast.min_views=999")
    for step in range(1, steps + 1):
        idle.refuse_idle(steps)
        for _ in range(2):
            assert idle(outputs, label_BHW, step=step).values["contrast"] == 0
    with pytest.raises(
        UserError, match=rf"\.weight=0\.1: in the last {steps} steps .* min_views=999 .*max_samples=24 "
    ):
        idle.refuse_idle(steps)


def test_a_short_training_says_that_its_contrast_loss_did_nothing(tmp_path):
    own = ("train/losses=contrast", "train.losses.contrast.warmup_iters=0", "train.losses.contrast.max_views=999")
    with pytest.raises(
        UserError, match=r"^train\.losses\.contrast\.[^\n]*in the last 2 steps [^\n]*max_views=999[^\n]*$"
    ):
        train.run(training(tmp_path, *own, "train.iters=2"), console=QUIET)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_step_counts_as_idle_only_where_none_of_its_micro_batches_has_an_anchor(monkeypatch):
    monkeypatch.setattr(objective, "IDLE_STEPS", 1)
    (outputs, label_BHW), busy = batch(), build(*CONTRAST)
    nothing_BHW = torch.full_like(label_BHW, 255)
    for step, labels in enumerate([(label_BHW, nothing_BHW), (nothing_BHW, label_BHW)], start=1):
        for each_BHW in labels:
            busy(outputs, each_BHW, step=step)
        busy.refuse_idle(9)
    busy(outputs, nothing_BHW, step=3)
    with pytest.raises(UserError, match=r"in the last 1 steps .* min_views=2 pixels"):
        busy.refuse_idle(9)


def test_a_count_of_idle_steps_is_that_of_the_rank_with_the_fewest(monkeypatch):
    """Of the first rank alone it was in the checkpoint, and every rank went on with it."""
    idle = build(*CONTRAST)
    idle.idle_steps.fill_(49)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        dist, "all_reduce", lambda value, operation: value.clamp_(max=3 if operation == dist.ReduceOp.MIN else 0)
    )
    idle.refuse_idle(99)
    assert dict(idle.named_buffers())["idle_steps"] == 3


def test_the_count_of_idle_steps_is_shared_before_every_checkpoint(tmp_path, monkeypatch):
    asked, written = [], []
    monkeypatch.setattr(objective.Objective, "refuse_idle", lambda own, iters: asked.append(own._step))
    monkeypatch.setattr(Training, "_write", lambda own, *_: written.append((own.step, asked[-1])))
    own = ("train/losses=contrast", "train.losses.contrast.warmup_iters=0", "train.losses.contrast.min_views=2")
    train.run(training(tmp_path, *own, "train.iters=3", "train.checkpoint_every=1"), console=QUIET)
    assert written == [(1, 1), (2, 2)]


# Settings


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cross_entropy.weight=0"], "every weight is 0"),
        (["class_weights.recipe=enet_log", "reduction=all"], "reduction=all with train.losses.class_weights.recipe=en"),
        (["class_weights.recipe=enet_log", "cross_entropy.weight=0", "dice.weight=1"], "recipe=enet_log, but of cross"),
        (
            ["reduction=all", "cross_entropy.weight=0", "ohem.weight=1"],
            "reduction=all, but of cross_entropy, auxiliary",
        ),
        (["class_weights.recipe=list"], r"values=[] with train.losses.class_weights.recipe=list"),
        (["class_weights.values=[1]"], r"values=[1.0] with train.losses.class_weights.recipe=none"),
        (["class_weights.recipe=list", "class_weights.values=[1,-2]"], "expected finite numbers of at least 0"),
        (["class_weights.recipe=list", "class_weights.values=[0,0]"], "and one above 0"),
        (["class_weights.recipe=enet_log", "class_weights.cap=2"], "cap=2.0 with train.losses.class_weights.recipe=en"),
        (["class_weights.absent=[sky]"], r"absent=['sky'] with train.losses.class_weights.recipe=none"),
        (["contrast.weight=1", "contrast.warmup_iters=80"], "warmup_iters=80 with train.iters=80"),
        (["contrast.weight=1", "contrast.fill=repeat"], "fill=repeat with train.losses.contrast.min_views=None"),
        (["contrast.memory.enabled=true"], "memory.enabled=true with train.losses.contrast.weight=0"),
        (["contrast.weight=1", "contrast.memory.enabled=true", "contrast.memory.pixel_rows=9"], "min_filled=32, but"),
    ],
)
def test_settings_that_contradict_or_do_nothing_are_refused(overrides, said):
    base = ["train.losses.contrast.warmup_iters=10"]
    with pytest.raises(UserError) as caught:
        check_losses(losses_of(*base, *(f"train.losses.{each}" for each in overrides)), iters=80)
    assert said in str(caught.value)
    assert str(caught.value).startswith("train.losses")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", ["default", "weighted", "auxiliary", "ohem", "lovasz", "rmi", "contrast",
                                    "contrast_memory"])  # fmt: skip
def test_every_preset_is_fine_with_the_default_length(preset):
    settings = quick_settings("train", [f"train/losses={preset}"], TrainConfig)
    check_losses(settings.train.losses, iters=settings.train.iters)
    assert sum(getattr(settings.train.losses, name).weight for name in (*LOSSES, "contrast")) >= 1


class Labels:
    """Two labels of three classes, the last of which no pixel shows."""

    classes = ("road", "sky", "sign")

    def load(self, task, key):
        label_HW = np.array([[0, 0, 0, 1], [0, 255, 255, 1]], np.uint8) if key == "a" else np.zeros((2, 4), np.uint8)
        return Sample(key, np.zeros((*label_HW.shape, 3), np.uint8), label_HW)


def weights_of(*overrides: str):
    losses = losses_of(*(f"train.losses.class_weights.{each}" for each in overrides))
    return class_weights_of(losses, Labels(), ["a", "b"], workers=0)  # pyright: ignore


def test_a_recipe_weighs_by_the_training_labels():
    found = weights_of("recipe=max_over_count", "absent=[sign]")
    assert found.pixels_C is not None
    assert found.weights_C is not None
    assert found.pixels_C.tolist() == [12, 2, 0]
    assert found.weights_C.tolist() == [1, 6, 0]
    capped, _ = weights_of("recipe=max_over_count", "absent=[sign]", "cap=4.5")
    assert capped is not None
    assert capped.tolist() == [1, 4.5, 0]


def test_without_a_recipe_no_label_is_read():
    assert weights_of("recipe=none") == (None, None)
    weights_C, pixels_C = weights_of("recipe=list", "values=[1,2,0.5]")
    assert (weights_C.tolist(), pixels_C) == ([1, 2, 0.5], None)  # pyright: ignore


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe=list", "values=[1,2]"], "has 2 numbers, but the data set has 3 classes (road, sky, sign"),
        (["recipe=enet_log"], "shows ['sign']; expected pixels"),
        (["recipe=enet_log", "absent=[sign,sky]"], "the training labels show sky at 2 pixels"),
        (["recipe=enet_log", "absent=[sing]"], "sing is not a class. Did you mean sign?"),
    ],
)
def test_weights_that_do_not_fit_the_labels_are_refused(overrides, said):
    with pytest.raises(UserError) as caught:
        weights_of(*overrides)
    assert said in str(caught.value)


def test_class_weights_are_no_part_of_the_state():
    """They follow from settings and labels; a list of another length would make a state unreadable."""
    outputs, label_BHW = batch()
    weights_C = torch.tensor([1.0, 2.0, 3.0])
    weighted = build(class_weights_C=weights_C)
    expected = F.cross_entropy(resized(outputs.logits_BChw), label_BHW, weight=weights_C, ignore_index=255)
    torch.testing.assert_close(weighted(outputs, label_BHW, step=1).total, expected)
    assert not weighted.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_loss_is_that_of_the_cpu_under_deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    on = (f"train.losses.{name}.weight=1" for name in (*LOSSES, "auxiliary", "stages"))
    small = (*MEMORY, *on, "train.losses.ohem.min_kept=50")
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for device in ("cpu", "cuda"):
            summed, losses = build(*small).to(device), []
            for step in range(1, 6):
                given, label_BHW = batch(step, auxiliary=True)
                of_net = given.logits_BChw, given.auxiliary_BChw, given.features_BDyx, given.auxiliary_BChw
                maps = [each.detach().to(device).requires_grad_() for each in of_net]
                terms = summed(Outputs(*maps[:3], stages_BChw=(maps[3],)), label_BHW.to(device), step=step)
                terms.total.backward()
                summed.remember()
                losses.append({name: value.cpu() for name, value in terms.values.items()})
                losses.append({str(i): each.grad.cpu() for i, each in enumerate(maps)})
            found.append(losses)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
