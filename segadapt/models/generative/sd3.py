"""Stable Diffusion 3 as teacher: windows to latents, noise, and one velocity for each (window, class) pair.

K windows   P (window, class) pairs   3 RGB   s window px   z y x latent channels and grid, px / 8
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from segadapt.errors import UserError
from segadapt.models.checkpoint_errors import explain_checkpoint_errors
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.prompts import PromptEmbeddings
from segadapt.models.precision import autocast, tf32
from segadapt.models.recording import Memory, recorder_of

ENCODED_AT_ONCE = 4  # windows; 1.5 GiB each at 512 px
AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(frozen=True)
class NoisyLatent:
    """A noisy latent and the velocity to predict, from one draw, so that they cannot disagree."""

    x_t_Kzyx: Tensor  # float32
    target_Kzyx: Tensor  # float32, noise - x_0
    sigma_K: Tensor  # float32, in (0, 1]


def add_noise(latent_Kzyx: Tensor, noise_Kzyx: Tensor, sigma_K: Tensor) -> NoisyLatent:
    """Mix latents with noise; give the noisy latents and the velocity to predict.

    Rectified flow as in SD3 (Esser et al. 2024): x_t = (1 - sigma) x_0 + sigma eps, target v = eps - x_0.

    Args:
        latent_Kzyx: (VAE mean - shift) * scale.
        noise_Kzyx: standard normal, same shape and dtype.
        sigma_K: noise level of each window, in (0, 1].
    """
    assert latent_Kzyx.shape == noise_Kzyx.shape, (latent_Kzyx.shape, noise_Kzyx.shape)
    sigma_K111 = sigma_K.view(-1, 1, 1, 1)
    return NoisyLatent((1 - sigma_K111) * latent_Kzyx + sigma_K111 * noise_Kzyx, noise_Kzyx - latent_Kzyx, sigma_K)


def taesd3(folder: Path) -> AutoencoderTiny:
    """TAESD3 (github.com/madebyollin/taesd) from its two files; latents come out already shifted and scaled.

    Raises:
        UserError: a file is missing or damaged.
    """
    vae = AutoencoderTiny(latent_channels=16)
    with explain_checkpoint_errors("autoencoder", str(folder), "model.generative.autoencoder"):
        encoder = load_file(folder / "taesd3_encoder.safetensors")
        decoder = load_file(folder / "taesd3_decoder.safetensors")
    state = {f"encoder.layers.{name}": value for name, value in encoder.items()}
    for name, value in decoder.items():  # the file counts the clamp that diffusers applies outside its layers
        index, _, rest = name.partition(".")
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    vae.load_state_dict(state)
    return vae


def _read_strictly(kind: Any, what: str, source: dict[str, Any], setting: str) -> Any:
    """`from_pretrained` in float32. UserError: a key is missing, unexpected or of another shape, with the list."""
    checkpoint = source["pretrained_model_name_or_path"]
    with explain_checkpoint_errors("generative model", checkpoint, setting):
        module, info = kind.from_pretrained(
            **source, torch_dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {fault: info[fault] for fault in kinds if info.get(fault)}
    if wrong:
        listed = "; ".join(f"{fault}: {sorted(map(str, names))[:5]}" for fault, names in wrong.items())
        raise UserError(f"{setting}={checkpoint}: the {what}'s weights do not fit its config ({listed}); expected "
                        "every key once. Download the checkpoint again, complete.")  # fmt: skip
    return module


def load_autoencoder(checkpoint: str, *, revision: str | None, folder: str | None) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder in `folder` (TAESD3's files, or a diffusers folder), else `vae/` of the checkpoint; float32.

    Raises:
        UserError: files missing; a class we cannot use; keys that do not fit; AutoencoderKL whose config.json does not
            state its scale and shift (diffusers would take those of Stable Diffusion 1.5: diffusers#8708).
    """
    if folder is not None and (Path(folder) / "taesd3_encoder.safetensors").is_file():
        return taesd3(Path(folder))
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder or checkpoint}
    if folder is None:
        source |= {"subfolder": "vae", "revision": revision}
    setting = "model.generative.autoencoder" if folder else "model.generative.checkpoint"
    with explain_checkpoint_errors("autoencoder", folder or checkpoint, setting):
        loaded: Any = AutoencoderKL.load_config(**source)
    config = dict(loaded)
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise UserError(f"{setting}={folder or checkpoint}: the autoencoder is a {name}; expected one of "
                        f"{', '.join(AUTOENCODERS)}. Point to an SD3 checkpoint.")  # fmt: skip
    for key, usual in (("shift_factor", 0.0609), ("scaling_factor", 1.5305)):
        if name == "AutoencoderKL" and config.get(key) is None:
            raise UserError(f"{setting}={folder or checkpoint}: vae/config.json has no {key}; expected a number, "
                            f"{usual} for SD3. Set it in that file, or use a complete checkpoint.")  # fmt: skip
    return _read_strictly(AUTOENCODERS[name], "autoencoder", source, setting)


def load_transformer(checkpoint: str, *, revision: str | None) -> SD3Transformer2DModel:
    """The transformer of a hub id or local folder, float32 master weights, strict: every key is used.

    Raises:
        UserError: files missing, gated, or weights that do not fit their config, with the list.
    """
    source = {"pretrained_model_name_or_path": checkpoint, "subfolder": "transformer", "revision": revision}
    return _read_strictly(SD3Transformer2DModel, "transformer", source, "model.generative.checkpoint")


def _encoding(autoencoder: AutoencoderKL | AutoencoderTiny, precision: str) -> Callable[[Tensor], tuple[Tensor]]:
    """Windows in -1..1 to the autoencoder's own mean, [K, z, y, x]; no method of a class, which would be a cycle."""

    def run(windows_K3ss: Tensor) -> tuple[Tensor]:
        with torch.autocast(windows_K3ss.device.type, enabled=False), tf32(precision == "bf16"):
            found: Any = autoencoder.encode(windows_K3ss, return_dict=False)[0]
            return (found if isinstance(autoencoder, AutoencoderTiny) else found.mean,)

    return run


class Sd3:
    """The generative model: frozen autoencoder, class embeddings, and the transformer that judges a labelling.

    Not an nn.Module: the transformer may be split over devices, and moving a parent would break the split silently.
    All inputs and outputs live on `device`, the main device; the autoencoder on the last. Every part is in eval mode.

    Args:
        memory: on the last device, where encoding is recorded, to be replayed for as many windows; None: it is not.
        has_offset: `offset_D`, zero until others move it, is added to the pooled embedding of all classes and of none.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        autoencoder: AutoencoderKL | AutoencoderTiny,
        embeddings: PromptEmbeddings,
        *,
        device: torch.device,
        precision: str = "bf16",
        parallel: Parallel | None = None,
        memory: Memory | None = None,
        has_offset: bool = False,
    ):
        self.parallel = parallel or Parallel([transformer], [device], parts=1)
        assert self.parallel.transformers[0] is transformer
        self.transformer = transformer
        for copy in self.parallel.transformers:
            copy.eval()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self._encoding_device = self.parallel.devices[-1]  # which has nothing else to do while the main one segments
        torch.nn.Module.to(self.autoencoder, self._encoding_device)
        self._encode = recorder_of(_encoding(self.autoencoder, precision), memory)
        self.embeddings = embeddings
        self.device = device
        self.precision = precision
        self._dtype = next(transformer.parameters()).dtype
        text_dtype = torch.bfloat16 if precision == "bf16" else self._dtype
        sequence_NLE = torch.cat([embeddings.sequence_CLE, embeddings.null_sequence_LE[None]])  # N = C + 1
        pooled_ND = torch.cat([embeddings.pooled_CD, embeddings.null_pooled_D[None]])
        self._sequence_NLE = sequence_NLE.to(device, text_dtype)
        self._pooled_ND = pooled_ND.to(device, self._dtype)
        self.null_class = len(pooled_ND) - 1  # what `velocity` takes for the empty prompt
        self.offset_D = torch.nn.Parameter(torch.zeros_like(self._pooled_ND[0])) if has_offset else None

    def autocast(self) -> torch.autocast | nullcontext:
        """As the settings say; see models/precision.py."""
        return autocast(self.device, self.precision)

    @torch.no_grad()
    def encode(self, windows_K3ss: Tensor) -> Tensor:
        """Windows in -1..1 to latents [K, z, y, x]: (mean - shift) * scale, the mean and no sample; no autocast.

        float32; with precision 'bf16' a GPU may use TF32 (10 bits of mantissa) inside convolutions and matrix products.
        """
        windows_K3ss = windows_K3ss.to(self._encoding_device)
        found = [self._encode(some_K3ss)[0] for some_K3ss in windows_K3ss.split(ENCODED_AT_ONCE)]
        found_Kzyx = found[0] if len(found) == 1 else torch.cat(found)  # type: ignore[arg-type]
        assert found_Kzyx is not None
        if isinstance(self.autoencoder, AutoencoderTiny):
            return found_Kzyx.to(self.device)
        config = self.autoencoder.config
        return (found_Kzyx.to(self.device) - config["shift_factor"]) * config["scaling_factor"]

    def velocity(self, noisy: NoisyLatent, pair_window_P: Tensor, pair_class_P: Tensor) -> Tensor:
        """Conditional velocities of all pairs: [P, z, y, x] in the dtype of the latents (float32). No CFG.

        The timestep, 1000 * sigma, stays float32: bf16 would turn 333 into 332.
        """

        def part(transformer: SD3Transformer2DModel, of_pairs: slice) -> Tensor:
            window_P, class_P = pair_window_P[of_pairs], pair_class_P[of_pairs]
            pooled_PD = self._pooled_ND[class_P]
            if self.offset_D is not None:
                pooled_PD = pooled_PD + self.offset_D
            there = transformer.pos_embed.proj.weight.device  # a copy's own; of a split transformer the main device
            with self.autocast():
                velocity_Pzyx = transformer(
                    hidden_states=noisy.x_t_Kzyx[window_P].to(there),
                    encoder_hidden_states=self._sequence_NLE[class_P].to(there),
                    pooled_projections=pooled_PD.to(there),
                    timestep=1000 * noisy.sigma_K[window_P].to(there),
                    return_dict=False,
                )[0]
            return velocity_Pzyx.to(noisy.x_t_Kzyx)

        return self.parallel.velocities(part, len(pair_window_P))


def save_generative(folder: Path, transformer: SD3Transformer2DModel, autoencoder: torch.nn.Module) -> None:
    """Write `transformer/` and `vae/` in the layout that `from_pretrained` reads, safetensors, with a model index."""
    transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    autoencoder.save_pretrained(folder / "vae", safe_serialization=True)  # type: ignore[operator]
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
             "vae": ["diffusers", type(autoencoder).__name__]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
