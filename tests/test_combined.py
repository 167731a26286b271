"""One step of the two models: chunked = joint, scored before the update, what moves, reset, faults."""

import itertools

import pytest
import torch
from conftest import CLASSES
from torch.nn.functional import interpolate, normalize

from segadapt.errors import UserError
from segadapt.models.generative import windows
from segadapt.models.generative.candidates import Candidates, select
from segadapt.models.generative.sd3 import NoisyLatent
from segadapt.models.source import Source
from segadapt.seeds import torch_generator

ALL_CLASSES = f"model.loss.topk={len(CLASSES)}"
LEARN = ("tta.optimizer.lr=1e-3", ALL_CLASSES)


def watch(combined):
    """A list that receives (loss, gradients by name, candidates) of each step, just before the update."""
    seen, update = [], combined._update

    def watched(scored_Chw, taught, candidates):
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in combined.parameters().items()}
        seen.append((taught.loss.clone(), gradients, candidates))
        return update(scored_Chw, taught, candidates)

    combined._update = watched
    return seen


def state(combined):
    """Every parameter and buffer of every part, by name."""
    parts = {"discriminative": combined.segmenter.net, "generative": combined.generative.transformer}
    parts["autoencoder"] = combined.generative.autoencoder
    return {f"{part}.{name}": v.detach().clone() for part, net in parts.items() for name, v in net.state_dict().items()}


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def optimizer_state(combined):
    """Moments and counters in the order of the parameters."""
    return [v for p in combined._updates.optimizer.state_dict()["state"].values() for v in p.values() if v is not None]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


# -- one joint backward ------------------------------------------------------------------------------------------------


def joint_loss(combined, image_3HW, *, task, key):
    """The whole method written out: resize, slice, one transformer call for all pairs, one number. Sigma is 0.25."""
    segmenter, teacher = combined.segmenter, combined.generative
    size = image_3HW.shape[1:]
    boxes = windows.plan(*size, window_px=32, stride_px=16).tolist()
    q_1Chw = normalize(segmenter.logits(image_3HW[None]), dim=1)
    q_1CHW = interpolate(q_1Chw, size=tuple(size), mode="bilinear", align_corners=False)
    crops = [(slice(None), slice(None), slice(t, t + 32), slice(l, l + 32)) for t, l, _ in boxes]  # noqa: E741
    q_KCyx = torch.cat([interpolate(q_1CHW[crop], size=(4, 4), mode="bilinear", align_corners=False) for crop in crops])
    latent_Kzyx = torch.cat([teacher.encode(2 * image_3HW[None][crop] - 1) for crop in crops])
    generator = torch_generator(combined.seed, task, key, "noise")
    noise_Kzyx = torch.randn(latent_Kzyx.shape, generator=generator, dtype=latent_Kzyx.dtype)
    generators = [torch_generator(combined.seed, task, key, "classes", window) for window in range(len(boxes))]
    candidates = select(
        q_KCyx.detach(),
        topk=combined.loss.topk,
        classes_threshold=combined.loss.classes_threshold,
        generators=generators,
    )
    velocity_Pzyx = teacher.transformer(
        (0.75 * latent_Kzyx + 0.25 * noise_Kzyx)[candidates.pair_window_P],
        teacher.embeddings.sequence_CLE.double()[candidates.pair_class_P],
        teacher.embeddings.pooled_CD.double()[candidates.pair_class_P],
        torch.full(candidates.pair_class_P.shape, 250.0),
        return_dict=False,
    )[0]
    loss = torch.zeros((), dtype=torch.float64)
    for window in range(len(boxes)):
        is_here = candidates.pair_window_P == window
        p_Nyx = q_KCyx[window, candidates.pair_class_P[is_here]].softmax(dim=0)
        mixture_zyx = (p_Nyx[:, None] * velocity_Pzyx[is_here]).sum(dim=0)
        error_zyx = mixture_zyx - (noise_Kzyx - latent_Kzyx)[window]
        loss = loss + error_zyx[:, candidates.keep_Kyx[window]].square().mean() / len(boxes)
    return loss, candidates


@pytest.mark.parametrize("max_pairs", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("frozen", [None, "discriminative", "generative"])
def test_chunked_backward_equals_one_joint_backward(build_combined, random_image, max_pairs, frozen):
    """Three windows of up to four classes; windows of more pairs than max_pairs are among them."""
    options = ["model.loss.classes_threshold=4", f"model.generative.max_pairs={max_pairs}"]
    options += [f"model.update.{frozen}=false"] if frozen else []
    image_3HW = random_image(width=64, dtype=torch.float64)
    combined = build_combined(*options, dtype=torch.float64)
    seen = watch(combined)
    combined.step(image_3HW, task="t", key="k")
    ((got_loss, got, candidates),) = seen

    plain = build_combined(*options, dtype=torch.float64)
    loss, plain_candidates = joint_loss(plain, image_3HW, task="t", key="k")
    loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.parameters().items()}

    assert len(candidates.counts) == 3
    assert max(candidates.counts) > min(max_pairs, 3)
    assert torch.equal(candidates.chosen_KC, plain_candidates.chosen_KC)
    torch.testing.assert_close(got_loss, loss.detach(), rtol=1e-10, atol=1e-10)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("max_pairs", [1, 3, 4, 9])
def test_equal_windows_share_one_gradient_evenly(build_combined, max_pairs):
    """K times the same window: the loss and the teacher's gradient of one, and a K-th of it in each window's logits."""
    generator = torch.Generator().manual_seed(0)
    q_1Cyx, x_t_1zyx, target_1zyx = (
        torch.randn(1, size, 4, 4, generator=generator, dtype=torch.float64) for size in (len(CLASSES), 16, 16)
    )
    outcome = []
    for K in (1, 4):
        combined = build_combined(f"model.generative.max_pairs={max_pairs}", dtype=torch.float64)
        leaf_KCyx = q_1Cyx.repeat(K, 1, 1, 1).requires_grad_()
        noisy = NoisyLatent(
            x_t_1zyx.repeat(K, 1, 1, 1), target_1zyx.repeat(K, 1, 1, 1), torch.full((K,), 0.25).double()
        )
        pairs_P2 = torch.cartesian_prod(torch.arange(K), torch.arange(3))
        chosen_KC = torch.arange(len(CLASSES)).expand(K, -1) < 3
        keep_Kyx = torch.ones(K, 4, 4, dtype=torch.bool)
        taught = combined._backward_chunks(
            leaf_KCyx, noisy, Candidates(pairs_P2[:, 0], pairs_P2[:, 1], chosen_KC, keep_Kyx, (3,) * K)
        )
        outcome.append((taught.loss, leaf_KCyx.grad, [p.grad for p in combined.generative.transformer.parameters()]))
    (loss, logits_1Cyx, teacher), (loss_of_4, logits_4Cyx, teacher_of_4) = outcome
    torch.testing.assert_close(loss_of_4, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(4 * logits_4Cyx, logits_1Cyx.expand(4, -1, -1, -1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(teacher_of_4, teacher, rtol=1e-10, atol=1e-12)


# -- what is scored, what moves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prediction_is_made_before_the_update(build_combined, random_image, precision):
    combined, image_3HW = build_combined(*LEARN, f"runtime.precision={precision}"), random_image()

    def logits():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return combined.segmenter.logits(image_3HW[None])[0]

    before_Chw = logits()
    prediction = combined.step(image_3HW, task="t", key="k")
    assert prediction.is_updated
    assert torch.equal(prediction.logits_Chw, before_Chw)
    assert not prediction.logits_Chw.requires_grad
    assert not torch.equal(logits(), before_Chw)


def test_without_a_teacher_the_same_logits_and_nothing_moves(build_segmenter, build_combined, random_image):
    source = Source(build_segmenter(), seed=0, precision="fp32")
    prediction = source.step(random_image(), task="t", key="k")
    assert torch.equal(prediction.logits_Chw, build_combined().step(random_image(), task="t", key="k").logits_Chw)
    assert (prediction.loss, prediction.is_updated) == (None, False)
    source.reset()
    fresh = build_segmenter().net.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in source.segmenter.net.state_dict().items())


MOVING = {
    "both": ((), lambda name: True),
    "discriminative": (("model.update.generative=false",), lambda name: name.startswith("discriminative.")),
    "generative": (("model.update.discriminative=false",), lambda name: name.startswith("generative.")),
    "norms": (
        ("model.update.generative=false", "model.update.update_norm_only=true"),
        lambda name: name.startswith("discriminative.") and "norm" in name,
    ),
    "norms and generative": (
        ("model.update.update_norm_only=true",),
        lambda name: name.startswith("generative.") or "norm" in name,
    ),
}


@pytest.mark.parametrize("flags", MOVING)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_exactly_the_chosen_parameters_move(build_combined, random_image, flags, optimizer):
    overrides, is_chosen = MOVING[flags]
    combined = build_combined(*LEARN, *overrides, f"tta.optimizer.name={optimizer}", "tta.optimizer.weight_decay=0.1")
    before = state(combined)
    for seed in range(3):
        assert combined.step(random_image(seed=seed), task="t", key=str(seed)).is_updated
    parts = {"discriminative": combined.segmenter.net, "generative": combined.generative.transformer}
    parameters = {f"{part}.{name}" for part, net in parts.items() for name, _ in net.named_parameters()}
    expected = {name for name in parameters if is_chosen(name)}
    assert set(combined.parameters()) == expected
    assert changed(before, state(combined)) == expected
    learning = {
        f"{part}.{name}" for part, net in parts.items() for name, p in net.named_parameters() if p.requires_grad
    }
    assert learning == expected  # a frozen weight costs no gradient either
    assert not combined.generative.autoencoder.training
    assert not any(module.training for net in parts.values() for module in net.modules())


def test_nothing_to_move_is_refused(build_combined):
    with pytest.raises(UserError, match=r"model\.update\.discriminative=false and model\.update\.generative=false"):
        build_combined("model.update.discriminative=false", "model.update.generative=false")


def test_each_model_has_its_own_rate(build_combined, random_image):
    for model, other in itertools.permutations(["discriminative", "generative"]):
        combined = build_combined(*LEARN, f"tta.optimizer.lr_{model}=0")
        before = state(combined)
        combined.step(random_image(), task="t", key="k")
        moved = changed(before, state(combined))
        assert moved
        assert all(name.startswith(f"{other}.") for name in moved)


@pytest.mark.parametrize("max_pairs", [4, 16])
def test_every_moving_parameter_has_a_gradient_under_autocast_after_a_forward_without(
    build_combined, random_image, max_pairs
):
    """autocast may keep weights that were cast without grad (pytorch#65766): then their gradient never arrives.

    The last block of SD3 drops what its text queries read, so these alone have none, by design.
    """
    combined = build_combined(*LEARN, "runtime.precision=bf16", f"model.generative.max_pairs={max_pairs}")
    with torch.no_grad(), combined.autocast():
        combined.segmenter.logits(random_image()[None])
        latent_Kzyx = combined.generative.encode(torch.zeros(1, 3, 32, 32))
        pair = torch.zeros(1, dtype=torch.long)
        combined.generative.velocity(NoisyLatent(latent_Kzyx, latent_Kzyx, torch.tensor([0.25])), pair, pair)
    seen = watch(combined)
    combined.step(random_image(64, 96), task="t", key="k")  # a smaller one has a single key token: no gradient in q, k
    gradients = seen[0][1]
    without = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    assert without == {f"generative.transformer_blocks.1.attn.add_q_proj.{part}" for part in ("weight", "bias")}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


# -- reset and faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_task_after_reset_equals_the_task_in_a_fresh_process(build_combined, random_image, optimizer):
    options = (*LEARN, f"tta.optimizer.name={optimizer}", "tta.optimizer.momentum=0.9")

    def run(combined, task):
        images = [random_image(seed=seed, width=45 + seed) for seed in range(3)]
        return [combined.step(image, task=task, key=str(i)) for i, image in enumerate(images)]

    alone, after_reset, continual = (build_combined(*options) for _ in range(3))
    expected = run(alone, "B")
    for combined, is_same in ((after_reset, True), (continual, False)):
        run(combined, "A")
        if is_same:
            combined.reset()
        got = run(combined, "B")
        assert all(prediction.is_updated for prediction in got)
        assert (changed(state(alone), state(combined)) == set()) == is_same
        assert same(optimizer_state(alone), optimizer_state(combined)) == is_same
        assert same([p.logits_Chw for p in expected], [p.logits_Chw for p in got]) == is_same
        assert ([p.loss for p in expected] == [p.loss for p in got]) == is_same
        assert len(optimizer_state(alone)) >= len(alone.parameters())


def poison_velocity(combined, value):
    """One class of the first pair's window, so that other windows stay fine."""
    velocity = combined.generative.velocity

    def poisoned(noisy, pair_window_P, pair_class_P):
        velocity_Pzyx = velocity(noisy, pair_window_P, pair_class_P)
        return torch.where((pair_window_P == 0)[:, None, None, None], value, 1.0) * velocity_Pzyx

    combined.generative.velocity = poisoned
    return lambda: setattr(combined.generative, "velocity", velocity)


def poison_gradient(combined, value):
    """The loss stays finite."""
    name = next(name for name in combined.parameters() if name.startswith("generative."))
    return combined.parameters()[name].register_hook(lambda gradient: gradient * value).remove


@pytest.mark.parametrize("poison", [poison_velocity, poison_gradient])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_pairs", [4, 16])
def test_nonfinite_step_is_skipped_and_leaves_no_trace(build_combined, random_image, poison, value, max_pairs):
    options = (*LEARN, f"model.generative.max_pairs={max_pairs}")
    combined, spared = build_combined(*options), build_combined(*options)
    for each in (combined, spared):
        each.step(random_image(), task="t", key="first")
    before = state(combined)
    cure = poison(combined, value)
    prediction = combined.step(random_image(seed=1), task="t", key="bad")
    assert not prediction.is_updated
    assert prediction.logits_Chw.isfinite().all()
    assert changed(before, state(combined)) == set()
    cure()
    one, other = (each.step(random_image(seed=2), task="t", key="next") for each in (combined, spared))
    assert one.is_updated
    assert one.loss == other.loss
    assert changed(state(combined), state(spared)) == set()
    assert same(optimizer_state(combined), optimizer_state(spared))
