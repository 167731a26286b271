"""The small autoencoder of a bundled world, and the batches of windows that both stages of a teacher train on.

B windows of a batch   s window px   z y x latent channels and grid, px / 8
"""

import math
from collections.abc import Iterator

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from segadapt import stream
from segadapt.config_training import TrainGenerativeConfig
from segadapt.datasets import Dataset
from segadapt.errors import UserError
from segadapt.models.set_up import devices_of
from segadapt.record import JsonLines
from segadapt.seeds import derive
from segadapt.training.augment import Crops, keep_light, light_of
from segadapt.training.log import LOG_EVERY
from segadapt.training.order import places_of_classes

# Of AutoencoderKL's settings, those that `train_autoencoder` decides itself.
DECIDED = ("down_block_types", "up_block_types", "use_quant_conv", "use_post_quant_conv")


def cosine(step: int, *, iters: int, warmup_iters: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine to 0."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_iters) / max(1, iters - warmup_iters)))


def batches(
    dataset: Dataset, settings: TrainGenerativeConfig, *, iters: int, purpose: str, first: int = 0, plain: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows in -1..1 and labels, on the main device; batch i depends on (seed, purpose, i) alone.

    Args:
        first: batches before it are passed over.
        plain: the images as they are, at scale 1, every place as likely; for validation.
    """
    t = settings.train
    crops = Crops(
        dataset,
        count=iters * t.batch_size,
        seed=derive(settings.experiment.seed, purpose),
        short_side_px=settings.data.short_side_px,
        crop_px=settings.model.generative.window_px,
        scale=(1.0, 1.0) if plain else (t.scale_low, t.scale_high),
        light=keep_light if plain else light_of(t.broad),
        first=first * t.batch_size,
        places=places_of_classes(dataset, workers=settings.data.workers) if t.balanced and not plain else None,
    )
    stretches = [range(item, item + t.batch_size) for item in range(0, len(crops), t.batch_size)]
    main = torch.device(devices_of(settings.runtime)[0])
    for image_B3ss, label_Bss in stream.batches(crops, stretches, workers=settings.data.workers):
        yield 2 * image_B3ss.to(main, non_blocking=True) - 1, label_Bss.to(main, non_blocking=True)


def train_autoencoder(
    dataset: Dataset, settings: TrainGenerativeConfig, main: torch.device, records: JsonLines, console: Console
) -> AutoencoderKL:
    """L1 reconstruction with a small KL term; then shift and scale make the latents standard (as in SD3's config).

    Raises:
        UserError: the loss or a gradient is not finite.
    """
    t, config = settings.train, dict(settings.model.generative.autoencoder_config)
    torch.manual_seed(derive(settings.experiment.seed, "autoencoder"))
    levels = len(config["block_out_channels"])
    config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, **config)
    nn.Module.to(vae, main)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=t.autoencoder_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, iters=t.autoencoder_iters, warmup_iters=100)
    )
    batch = enumerate(batches(dataset, settings, iters=t.autoencoder_iters, purpose="autoencoder"), start=1)
    recent: list[Tensor] = []
    for step, (windows_B3ss, _) in batch:
        with torch.autocast(main.type, torch.bfloat16, enabled=settings.runtime.precision == "bf16"):
            (posterior,) = vae.encode(windows_B3ss, return_dict=False)
            (rebuilt_B3ss,) = vae.decode(posterior.sample(), return_dict=False)  # pyright: ignore[reportArgumentType]
        loss = F.l1_loss(rebuilt_B3ss.float(), windows_B3ss) + t.kl_weight * posterior.kl().float().mean()
        loss.backward()
        if step % LOG_EVERY == 0 or step == t.autoencoder_iters:
            norm = torch.nn.utils.get_total_norm([p.grad for p in vae.parameters() if p.grad is not None]).item()
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
                raise UserError(f"train.autoencoder_lr={t.autoencoder_lr}: the loss of the autoencoder is "
                                f"{loss.item():g} and the norm of its gradient {norm:g} at step {step}; expected "
                                "finite numbers. Lower train.autoencoder_lr.")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % LOG_EVERY == 0:
            records.append({"stage": "autoencoder", "step": step, "loss": loss.item()})
        if step > t.autoencoder_iters - 20:
            recent.append(posterior.mean.detach().float())
    latents = torch.cat(recent)
    shift, spread = latents.mean().item(), latents.std().item()
    if not math.isfinite(shift) or not 0 < spread < math.inf:
        raise UserError(f"train.autoencoder_lr={t.autoencoder_lr}: the autoencoder's latents have mean {shift:g} and "
                        f"spread {spread:g}; expected finite numbers, and a spread above 0. Lower "
                        "train.autoencoder_lr.")  # fmt: skip
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / spread)
    console.print(f"autoencoder: {t.autoencoder_iters} steps, loss {loss.item():.4f}", highlight=False)
    return vae.eval()
