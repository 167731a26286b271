"""The teacher judged on its own: a per-pixel diffusion classifier. A diagnostic, never used to adapt.

K windows   C classes   P (window, class) pairs   3 RGB   s window px   z y x latent channels and grid, px / 8
"""

import torch
from torch import Tensor

from segadapt.models.generative.sd3 import Sd3, add_noise
from segadapt.seeds import torch_generator


def true_classes(label_Kss: Tensor, grid: int) -> Tensor:
    """Labels on the latent grid: the pixel at each cell's centre; int64 [K, y, x], 255 = ignore."""
    cell = label_Kss.shape[-1] // grid
    return label_Kss[:, cell // 2 :: cell, cell // 2 :: cell]


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
    pairs_P2 = torch.cartesian_prod(torch.arange(K), torch.arange(C)).to(teacher.device)
    sigma_K = torch.full((K,), sigma, device=teacher.device)
    error_Pyx = torch.zeros(K * C, *latent_Kzyx.shape[2:], device=teacher.device)
    generator = torch_generator(seed, "classify")
    for _ in range(draws):
        noise_Kzyx = torch.randn(latent_Kzyx.shape, generator=generator).to(teacher.device)
        noisy = add_noise(latent_Kzyx, noise_Kzyx, sigma_K)
        for start in range(0, K * C, max_pairs):
            window_P, class_P = pairs_P2[start : start + max_pairs].unbind(1)
            velocity_Pzyx = teacher.velocity(noisy, window_P, class_P)
            error_Pyx[start : start + max_pairs] += (velocity_Pzyx - noisy.target_Kzyx[window_P]).square().mean(dim=1)
    return error_Pyx.unflatten(0, (K, C)).argmin(dim=1)
