"""What a teacher is trained to do: flow matching for the prompted class, telling classes apart, and DINOv2's features.

B windows of a batch   N prompts of a window   P (window, class) pairs   C classes   s window px
z y x latent channels and grid, px / 8   t image tokens of the transformer   d D widths of teacher and DINOv2
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model

from segadapt.config_training import AlignSettings, TrainGenerativeSettings
from segadapt.errors import UserError
from segadapt.models.checkpoint_errors import explain_checkpoint_errors, local_folder
from segadapt.models.discriminative.families import IMAGENET_MEAN, IMAGENET_STD
from segadapt.models.discriminative.load import without_load_report
from segadapt.models.generative.prompts import PromptEmbeddings
from segadapt.models.generative.sd3 import Sd3, add_noise
from segadapt.models.generative.teacher import true_classes
from segadapt.seeds import derive
from segadapt.training.cross_entropy import cross_entropy


class ClassTokens(nn.Module):
    """Learned in the place of a text encoder: `tokens` vectors and a pooled one a class; the last row is null."""

    def __init__(self, sequence: Tensor, pooled: Tensor, *, source: str = "learned"):
        super().__init__()
        self.source = source
        self.sequence, self.pooled = nn.Parameter(sequence), nn.Parameter(pooled)

    @classmethod
    def random(cls, num_classes: int, *, tokens: int, width: int, pooled_width: int) -> "ClassTokens":
        """From the global generator."""
        return cls(torch.randn(num_classes + 1, tokens, width), torch.randn(num_classes + 1, pooled_width))

    @classmethod
    def of(cls, embeddings: PromptEmbeddings) -> "ClassTokens":
        """Those of a checkpoint or of its text encoders, kept as they are."""
        sequence = torch.cat([embeddings.sequence_CLE, embeddings.null_sequence_LE[None]])
        pooled = torch.cat([embeddings.pooled_CD, embeddings.null_pooled_D[None]])
        return cls(sequence.float(), pooled.float(), source=embeddings.source).requires_grad_(False)

    def frozen(self) -> PromptEmbeddings:
        """As a file holds them: float32 on the CPU."""
        sequence, pooled = self.sequence.detach().float().cpu(), self.pooled.detach().float().cpu()
        return PromptEmbeddings(sequence[:-1], pooled[:-1], sequence[-1], pooled[-1], source=self.source)


@dataclass(frozen=True)
class TeacherLoss:
    """Terms of the objective, scalars."""

    flow: Tensor  # squared velocity error, over the pixels of the prompted class or over all
    comparing: Tensor  # cross-entropy of softmax(-scale * error) over the prompts of a window
    accuracy: Tensor  # share of pixels whose own prompt has the smallest error

    def total(self, comparing_weight: float) -> Tensor:
        """Their weighted sum."""
        return self.flow + comparing_weight * self.comparing


def teacher_loss(
    error_BNyx: Tensor, prompts_BN: Tensor, classes_Byx: Tensor, scale: Tensor, *, flow_mask: bool = True
) -> TeacherLoss:
    """Flow matching, class-masked or not, with a class-comparing term.

    The masked term alone leaves v_k undefined at pixels of other classes, so that the prompt is ignored; comparing the
    errors of several prompts at the same pixel mends that (a diffusion classifier, Li et al. 2023, trained per pixel).

    Args:
        error_BNyx: mean over channels of (v - target)^2 for each prompt.
        prompts_BN: int64 classes of the prompts.
        classes_Byx: int64 true classes on the latent grid, 255 = ignore.
        scale: inverse temperature, > 0.
        flow_mask: False: the flow term counts every pixel under every prompt, as in plain conditional training.
    """
    is_own_BNyx = prompts_BN[:, :, None, None] == classes_Byx[:, None]
    own_flow = (error_BNyx * is_own_BNyx).sum() / is_own_BNyx.sum().clamp(min=1)
    is_asked_Byx = is_own_BNyx.any(dim=1)
    own_Byx = is_own_BNyx.int().argmax(dim=1)
    logits_BNyx = -scale * error_BNyx
    is_hit_Byx = (logits_BNyx.argmax(dim=1) == own_Byx) & is_asked_Byx
    accuracy = is_hit_Byx.sum() / is_asked_Byx.sum().clamp(min=1)
    flow = own_flow if flow_mask else error_BNyx.mean()
    return TeacherLoss(flow, cross_entropy(logits_BNyx, own_Byx, is_asked_Byx), accuracy)


def draw_prompts(classes_Byx: Tensor, num_classes: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different classes for each window, mostly present ones, however many classes there are: int64 [B, N]."""
    present_BC = torch.zeros(len(classes_Byx), 256, device=classes_Byx.device).scatter_(1, classes_Byx.flatten(1), 1.0)
    weights_BC = present_BC[:, :num_classes] + 0.6 / num_classes
    return torch.multinomial(weights_BC, count, replacement=False, generator=generator)


def draw_sigmas(count: int, t: TrainGenerativeSettings, generator: torch.Generator) -> Tensor:
    """Noise levels in [sigma_low, sigma_high]: uniform, or the logistic of a standard normal brought to that range."""
    if t.sigma_distribution == "uniform":
        share_B = torch.rand(count, device=generator.device, generator=generator)
    else:  # SD3's own choice (Esser et al. 2024, section 3.1), location 0 and scale 1
        share_B = torch.randn(count, device=generator.device, generator=generator).sigmoid()
    return t.sigma_low + (t.sigma_high - t.sigma_low) * share_B


class Alignment(nn.Module):
    """Representation alignment (REPA, Yu et al. 2025): a block's image tokens, projected, near DINOv2's patch features.

    DINOv2 sees the clean window, scaled so that one of its patches covers one of the transformer's; it stays frozen.
    """

    def __init__(self, transformer: SD3Transformer2DModel, settings: AlignSettings, *, seed: int):
        """The projector is drawn from (seed, "align"). UserError: no such block, or see `load_dinov2`."""
        super().__init__()
        if settings.block >= (blocks := len(transformer.transformer_blocks)):
            raise UserError(f"train.align.block={settings.block}: the transformer has {blocks} blocks, counted from 0. "
                            f"Use {blocks - 1} or less.")  # fmt: skip
        self.dinov2 = load_dinov2(str(settings.checkpoint)).eval().requires_grad_(False)
        width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
        features = self.dinov2.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "align"))
            self.project = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, features))
        self.tokens_Ptd: Tensor | None = None
        block = transformer.transformer_blocks[settings.block]
        block.register_forward_hook(lambda _module, _args, output: setattr(self, "tokens_Ptd", output[1]))

    def forward(self, windows_B3ss: Tensor, pair_P: Tensor) -> Tensor:
        """1 - cosine of projected tokens and features, mean; call it right after the transformer.

        Args:
            windows_B3ss: clean windows in -1..1.
            pair_P: int64, one pair of each window: the pairs share image and noise.
        """
        assert self.tokens_Ptd is not None, "the transformer has not run"
        tokens_Btd, self.tokens_Ptd = self.tokens_Ptd[pair_P], None
        side = round(tokens_Btd.shape[1] ** 0.5) * self.dinov2.config.patch_size
        mean_311, std_311 = (windows_B3ss.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        image_B3rr = F.interpolate((windows_B3ss + 1) / 2, size=(side, side), mode="bilinear", antialias=True)
        with torch.no_grad():
            features_BtD = self.dinov2((image_B3rr - mean_311) / std_311).last_hidden_state[:, 1:]
        return 1 - F.cosine_similarity(self.project(tokens_Btd).float(), features_BtD.float(), dim=-1).mean()


def load_dinov2(checkpoint: str) -> Dinov2Model:
    """A hub id, a folder that from_pretrained reads, or a *.safetensors file with its dinov2*config.json beside it.

    Raises:
        UserError: nothing there, or weights that do not fit their config.
    """
    setting, file = "train.align.checkpoint", Path(checkpoint).expanduser()
    is_one_file = file.suffix == ".safetensors"
    blamed = str(file.parent) if is_one_file else checkpoint
    with explain_checkpoint_errors("DINOv2", blamed, setting), tempfile.TemporaryDirectory() as folder:
        source = "" if is_one_file else str(local_folder(checkpoint, setting) or checkpoint)
        if is_one_file:
            configs = sorted(file.parent.glob("dinov2*config.json"))
            if len(configs) != 1 or not file.is_file():
                raise UserError(f"{setting}={checkpoint}: expected this file and one dinov2*config.json beside it, got "
                                f"{'the' if file.is_file() else 'no such'} file and {len(configs)} configs. Or give a "
                                "folder that from_pretrained reads.")  # fmt: skip
            Path(folder, "config.json").symlink_to(configs[0].resolve())  # from_pretrained knows old and new key names
            Path(folder, "model.safetensors").symlink_to(file.resolve())
            source = folder
        with without_load_report():
            loaded: Any = Dinov2Model.from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
            )
    model, info = loaded
    wrong = [str(key) for fault in ("missing_keys", "unexpected_keys") for key in sorted(info[fault])]
    wrong += sorted(str(key) for key, *_ in info["mismatched_keys"])
    if wrong:
        raise UserError(f"{setting}={checkpoint}: the weights do not fit their config ({', '.join(wrong[:5])}); "
                        "expected every key once, in its shape. Use files that belong together.")  # fmt: skip
    return model


def batch_loss(
    teacher: Sd3,
    tokens: ClassTokens,
    align: Alignment | None,
    windows_B3ss: Tensor,
    label_Bss: Tensor,
    scale: Tensor,
    t: TrainGenerativeSettings,
    generator: torch.Generator,
) -> tuple[TeacherLoss, dict[str, Tensor]]:
    """The objective of one batch, and its weighted further terms (null prompt, alignment)."""
    num_classes, main = len(tokens.sequence) - 1, teacher.device
    latent_Bzyx = teacher.encode(windows_B3ss)
    B, N = len(latent_Bzyx), t.prompts_per_window
    classes_Byx = true_classes(label_Bss, latent_Bzyx.shape[-1])
    sigma_B = draw_sigmas(B, t, generator)
    noise_Bzyx = torch.randn(latent_Bzyx.shape, device=main, generator=generator)
    noisy = add_noise(latent_Bzyx, noise_Bzyx, sigma_B)
    prompts_BN = draw_prompts(classes_Byx, num_classes, N, generator)
    nulls = max(1, round(t.null_share * B)) if t.null_share else 0
    window_P = torch.cat([torch.arange(B, device=main).repeat_interleave(N), torch.arange(nulls, device=main)])
    class_P = F.pad(prompts_BN.flatten(), (0, nulls), value=num_classes)
    with teacher.autocast():
        velocity_Pzyx = teacher.transformer(
            hidden_states=noisy.x_t_Kzyx[window_P],
            encoder_hidden_states=tokens.sequence[class_P],
            pooled_projections=tokens.pooled[class_P],
            timestep=1000 * sigma_B[window_P],
            return_dict=False,
        )[0]
        extra = {"align": t.align.weight * align(windows_B3ss, N * torch.arange(B, device=main))} if align else {}
    error_Pyx = (velocity_Pzyx.float() - noisy.target_Kzyx[window_P]).square().mean(dim=1)
    if nulls:
        extra["null"] = t.null_share * error_Pyx[B * N :].mean()
    error_BNyx = error_Pyx[: B * N].unflatten(0, (B, N))
    return teacher_loss(error_BNyx, prompts_BN, classes_Byx, scale, flow_mask=t.flow_mask), extra
