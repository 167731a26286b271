"""Stable Diffusion 3 through our code: equal to the raw library, noise identities, recompute, split and precision."""

from typing import Any

import pytest
import torch
from conftest import AUTOENCODER, CLASSES
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.models.generative.sd3 import add_noise, load_autoencoder, load_transformer, save_generative

WINDOW_P = torch.tensor([0, 0, 1, 1, 1])
CLASS_P = torch.tensor([1, 4, 0, 1, 5])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def noisy():
    return add_noise(random(2, 16, 4, 4), random(2, 16, 4, 4, seed=1), torch.tensor([0.25, 0.333]))


def raw_velocity(teacher, noisy):
    """The library call, pair by pair in one batch, from the embeddings as they were given."""
    return teacher.transformer(
        noisy.x_t_Kzyx[WINDOW_P],
        teacher.embeddings.sequence_CLE[CLASS_P],
        teacher.embeddings.pooled_CD[CLASS_P],
        1000 * noisy.sigma_K[WINDOW_P],
        return_dict=False,
    )[0]


def gradients(teacher):
    return {name: parameter.grad.clone() for name, parameter in teacher.transformer.named_parameters()}


@pytest.mark.parametrize("grad", [False, True])
def test_velocity_equals_the_raw_transformer_bit_for_bit(build_teacher, noisy, grad):
    ours, raw = build_teacher(), build_teacher()
    with torch.set_grad_enabled(grad):
        got_Pzyx, expected_Pzyx = ours.velocity(noisy, WINDOW_P, CLASS_P), raw_velocity(raw, noisy)
    assert torch.equal(got_Pzyx, expected_Pzyx)
    assert got_Pzyx.requires_grad == grad
    if grad:
        got_Pzyx.square().sum().backward()
        expected_Pzyx.square().sum().backward()
        expected = gradients(raw)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(ours).items())


def test_bf16_velocity_is_that_of_the_raw_transformer_under_autocast_as_float32(build_teacher, noisy):
    teacher = build_teacher(precision="bf16")
    got_Pzyx = teacher.velocity(noisy, WINDOW_P, CLASS_P)
    with torch.autocast("cpu", torch.bfloat16):
        raw_Pzyx = raw_velocity(teacher, noisy)
    assert raw_Pzyx.dtype == torch.bfloat16
    assert got_Pzyx.dtype == torch.float32
    assert torch.equal(got_Pzyx, raw_Pzyx.float())


def test_every_pair_has_its_own_window_and_class(build_teacher, noisy):
    teacher = build_teacher()
    together_Pzyx = teacher.velocity(noisy, WINDOW_P, CLASS_P)
    for row in range(len(WINDOW_P)):
        alone_1zyx = teacher.velocity(noisy, WINDOW_P[row : row + 1], CLASS_P[row : row + 1])
        torch.testing.assert_close(alone_1zyx[0], together_Pzyx[row])
        others_Pzyx = torch.cat([together_Pzyx[:row], together_Pzyx[row + 1 :]])
        assert ((others_Pzyx - alone_1zyx).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_timestep_reaches_the_transformer_in_float32(build_teacher, noisy, precision):
    """bf16 would turn 333 into 332."""
    teacher, seen = build_teacher(precision=precision), []
    teacher.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["timestep"]), with_kwargs=True
    )
    teacher.velocity(noisy, WINDOW_P, CLASS_P)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], torch.tensor([250.0, 250.0, 333.0, 333.0, 333.0]))


def test_every_part_is_in_eval_mode_and_only_the_transformer_can_learn(build_teacher):
    teacher = build_teacher()
    assert not any(module.training for part in (teacher.transformer, teacher.autoencoder) for module in part.modules())
    assert not any(parameter.requires_grad for parameter in teacher.autoencoder.parameters())
    assert all(parameter.requires_grad for parameter in teacher.transformer.parameters())


def test_recompute_happens_in_eval_mode_and_changes_nothing(build_teacher, noisy):
    outcome = {}
    for recompute in (False, True):
        teacher, calls = build_teacher(num_layers=4), []
        if recompute:
            teacher.transformer.enable_gradient_checkpointing()
        for block in teacher.transformer.transformer_blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        velocity_Pzyx = teacher.velocity(noisy, WINDOW_P, CLASS_P)
        velocity_Pzyx.square().mean().backward()
        outcome[recompute] = velocity_Pzyx, gradients(teacher)
        assert len(calls) == (8 if recompute else 4)
    assert torch.equal(outcome[False][0], outcome[True][0])
    for name, gradient in outcome[False][1].items():
        torch.testing.assert_close(outcome[True][1][name], gradient, rtol=0, atol=5e-5)


def test_latent_is_the_shifted_and_scaled_mean_of_the_library(build_teacher):
    teacher, windows_K3ss = build_teacher(), random(2, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        mean_Kzyx = teacher.autoencoder.encode(windows_K3ss).latent_dist.mean
    expected_Kzyx = (mean_Kzyx - 0.0609) * 1.5305
    assert expected_Kzyx.shape == (2, 16, 4, 4)
    assert torch.equal(teacher.encode(windows_K3ss), expected_Kzyx)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.encode(windows_K3ss), expected_Kzyx)
    for wrong in (0.0, 0.1159):  # none, and that of another model: diffusers#8708
        teacher.autoencoder.register_to_config(shift_factor=wrong)
        assert (teacher.encode(windows_K3ss) - expected_Kzyx).abs().min() > 0.05


def test_autoencoder_without_shift_is_refused(tmp_path):
    config: dict[str, Any] = AUTOENCODER | {"shift_factor": None}
    AutoencoderKL(**config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no shift_factor; expected a number, 0\.0609 for SD3"):
        load_autoencoder("unused", revision=None, folder=str(tmp_path))


def test_saved_parts_are_loaded_as_they_were(build_teacher, tmp_path):
    teacher = build_teacher()
    save_generative(tmp_path, teacher.transformer, teacher.autoencoder)
    loaded = (
        load_transformer(str(tmp_path), revision=None),
        load_autoencoder(str(tmp_path), revision=None, folder=None),
    )
    for part, original in zip(loaded, (teacher.transformer, teacher.autoencoder), strict=True):
        expected = original.state_dict()
        assert part.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in part.state_dict().items())


def test_noise_and_target_give_back_the_latent_and_the_noise():
    latent, noise = random(3, 16, 4, 4, dtype=torch.float64), random(3, 16, 4, 4, seed=1, dtype=torch.float64)
    sigma_K = torch.tensor([1e-6, 0.3, 1.0], dtype=torch.float64)
    noisy = add_noise(latent, noise, sigma_K)
    sigma_K111 = sigma_K.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.x_t_Kzyx - sigma_K111 * noisy.target_Kzyx, latent)
    torch.testing.assert_close(noisy.x_t_Kzyx + (1 - sigma_K111) * noisy.target_Kzyx, noise)
    torch.testing.assert_close(noisy.x_t_Kzyx[0], latent[0], atol=1e-5, rtol=0)
    assert torch.equal(noisy.x_t_Kzyx[2], noise[2])
    assert torch.equal(noisy.sigma_K, sigma_K)


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forced_hooks_of_the_split_change_no_number(saved_models, compose_settings, random_image, recompute, precision):
    settings = compose_settings(
        *saved_models(CLASSES),
        "model.generative.max_pairs=4",
        "tta.optimizer.lr=1e-3",
        f"runtime.precision={precision}",
        f"model.generative.gradient_checkpointing={recompute}",
    )
    plain, hooked = (build_models(settings, CLASSES, force_hooks=force).method for force in (False, True))
    assert plain.generative is not None
    assert hooked.generative is not None
    assert not hasattr(plain.generative.transformer, "_hf_hook")
    assert all(hasattr(block, "_hf_hook") for block in hooked.generative.transformer.transformer_blocks)
    for seed in range(3):
        one, other = (c.step(random_image(seed=seed), task="t", key=str(seed)) for c in (plain, hooked))
        assert one.is_updated
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
        assert torch.equal(one.logits_Chw, other.logits_Chw)
    after = hooked.parameters()
    assert all(torch.equal(value, after[name]) for name, value in plain.parameters().items())


def loss_and_borders(combined, image_3HW):
    """The loss of one step and every tensor that passes from one part to the next, gradients and weights included."""
    teacher, seen, backward_chunks = combined.generative, [], combined._backward_chunks
    teacher.autoencoder.encoder.register_forward_hook(lambda _, given, latent: seen.extend([*given, latent]))

    def watched(leaf_KCyx, noisy, candidates, **others):
        taught = backward_chunks(leaf_KCyx, noisy, candidates, **others)
        seen.extend([leaf_KCyx, leaf_KCyx.grad, noisy.x_t_Kzyx, noisy.target_Kzyx, noisy.sigma_K, taught.loss])
        seen.extend(parameter.grad for parameter in teacher.transformer.parameters())
        return taught

    combined._backward_chunks = watched
    prediction = combined.step(image_3HW, task="t", key="k")
    return prediction.loss, [*seen, prediction.logits_Chw, *combined.parameters().values()]


def test_many_windows_are_encoded_a_few_at_a_time_to_the_same_latents(build_teacher):
    teacher, sizes = build_teacher(dtype=torch.float64), []
    windows_K3ss, encode = random(9, 3, 32, 32, dtype=torch.float64), teacher._encode
    teacher._encode = lambda some_K3ss: sizes.append(len(some_K3ss)) or encode(some_K3ss)
    got_Kzyx = teacher.encode(windows_K3ss)
    assert sizes == [4, 4, 1]
    alone_Kzyx = torch.cat([teacher.encode(window_3ss[None]) for window_3ss in windows_K3ss])
    torch.testing.assert_close(got_Kzyx, alone_Kzyx, rtol=0, atol=1e-10)


def test_bf16_loss_is_near_float32_and_the_borders_are_float32(build_combined, random_image):
    losses = {}
    for precision in ("fp32", "bf16"):
        combined = build_combined(f"runtime.precision={precision}", "model.loss.topk=6")
        losses[precision], borders = loss_and_borders(combined, random_image())
        assert {tensor.dtype for tensor in borders} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
