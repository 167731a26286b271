"""The teacher judged on its own: a per-pixel diffusion classifier. A diagnostic, never used to adapt.

K windows (or windows x draws)   C classes   P (window, class) pairs   3 RGB   s window px
z y x latent channels and grid, px / 8
"""

import torch
from torch import Tensor

from segadapt.models.generative import Teacher
from segadapt.models.generative.sd3 import NoisyLatent, Sd3, add_noise
from segadapt.seeds import torch_generator


def true_classes(label_Kss: Tensor, grid: int) -> Tensor:
    """Labels on the latent grid: the pixel at each cell's centre; int64 [K, y, x], 255 = ignore."""
    cell = label_Kss.shape[-1] // grid
    return label_Kss[:, cell // 2 :: cell, cell // 2 :: cell]


@torch.no_grad()
def class_errors(teacher: Teacher, noisy: NoisyLatent, *, num_classes: int, max_pairs: int) -> Tensor:
    """Mean over channels of (v_k - target)^2 of every class at each latent pixel: float32 [K, C, y, x].

    Args:
        max_pairs: (window, class) pairs of one forward; it does not change the result beyond rounding.
    """
    K, _, y, x = noisy.x_t_Kzyx.shape
    pairs_P2 = torch.cartesian_prod(torch.arange(K), torch.arange(num_classes)).to(noisy.x_t_Kzyx.device)
    error_Pyx = noisy.x_t_Kzyx.new_empty(len(pairs_P2), y, x)
    for start in range(0, len(pairs_P2), max_pairs):
        window_P, class_P = pairs_P2[start : start + max_pairs].unbind(1)
        velocity_Pzyx = teacher.velocity(noisy, window_P, class_P)
        error_Pyx[start : start + max_pairs] = (velocity_Pzyx - noisy.target_Kzyx[window_P]).square().mean(dim=1)
    return error_Pyx.unflatten(0, (K, num_classes))


@torch.no_grad()
def classify(
    teacher: Sd3, windows_K3ss: Tensor, *, sigma: float, seed: int, draws: int = 1, max_pairs: int = 64
) -> Tensor:
    """The class with the smallest velocity error at each latent pixel, all classes asked: int64 [K, y, x].

    argmin_k mean over channels and noise draws of (v_k - target)^2, as in Li et al. 2023 (Your Diffusion Model is
    Secretly a Zero-Shot Classifier), per pixel.
    """
    latent_Kzyx = teacher.encode(windows_K3ss)
    K, C = len(latent_Kzyx), len(teacher.embeddings.sequence_CLE)
    sigma_K = torch.full((K,), sigma, device=teacher.device)
    error_KCyx = torch.zeros(K, C, *latent_Kzyx.shape[2:], device=teacher.device)
    generator = torch_generator(seed, "classify")
    for _ in range(draws):
        noise_Kzyx = torch.randn(latent_Kzyx.shape, generator=generator).to(teacher.device)
        noisy = add_noise(latent_Kzyx, noise_Kzyx, sigma_K)
        error_KCyx += class_errors(teacher, noisy, num_classes=C, max_pairs=max_pairs)
    return error_KCyx.argmin(dim=1)
