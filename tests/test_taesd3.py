"""TAESD3 with its real weights: the variable TAESD3 names the folder of its two safetensors files."""

import os
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from segadapt.models.generative.sd3 import Sd3, load_autoencoder, taesd3

FOLDER = os.environ.get("TAESD3")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="TAESD3 does not name a folder with the weights")


@pytest.fixture(scope="module")
def vae() -> AutoencoderTiny:
    assert FOLDER is not None
    return taesd3(Path(FOLDER)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def smooth_K3ss() -> Tensor:
    """Two images of slow colour waves in -1..1."""
    y_ss, x_ss = torch.meshgrid(torch.linspace(0, 1, 128), torch.linspace(0, 1, 128), indexing="ij")
    waves = [torch.sin(6 * (y_ss * a + x_ss * b) + a) for a, b in ((1, 0), (0, 1), (1, 1), (2, 1), (1, -1), (0, 2))]
    return torch.stack(waves).view(2, 3, 128, 128) * 0.9


def test_smooth_images_survive_encoding_and_decoding(vae, smooth_K3ss):
    latent_Kzyx = vae.encode(smooth_K3ss).latents
    assert latent_Kzyx.shape == (2, 16, 16, 16)
    error_K3ss = vae.decode(latent_Kzyx).sample - smooth_K3ss
    assert error_K3ss.abs().mean() < 0.05  # of a range of 2; 0.027 measured


def test_latents_come_out_shifted_and_scaled(vae, smooth_K3ss):
    latent_Kzyx = vae.encode(smooth_K3ss).latents
    assert 0.6 < latent_Kzyx.std() < 1.6  # 1.35 measured, near 1 on photographs
    assert abs(latent_Kzyx.mean()) < 0.5


def test_teacher_uses_it_as_it_is(vae, smooth_K3ss, build_teacher):
    tiny = build_teacher()
    teacher = Sd3(tiny.transformer, vae, tiny.embeddings, device=torch.device("cpu"), precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        latent_Kzyx = teacher.encode(smooth_K3ss)
    assert latent_Kzyx.dtype == torch.float32
    assert torch.equal(latent_Kzyx, vae.encode(smooth_K3ss).latents)


def test_folder_with_its_two_files_is_recognised(vae):
    loaded = load_autoencoder("unused", revision=None, folder=FOLDER)
    assert isinstance(loaded, AutoencoderTiny)
    expected = vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
