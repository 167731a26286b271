"""Train a small teacher from scratch: an autoencoder (unless one is given), then class-masked flow matching.

B windows of a batch   N prompts of a window   P (window, class) pairs   C classes   s window px
z y x latent channels and grid, px / 8   L text tokens   E text width
"""

import copy
import inspect
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from segadapt.config import TrainGenerativeConfig, TrainGenerativeSettings
from segadapt.datasets import Dataset
from segadapt.errors import UserError, did_you_mean
from segadapt.models.build import set_up
from segadapt.models.generative.prompts import PromptEmbeddings, save_embeddings
from segadapt.models.generative.sd3 import Sd3, add_noise, load_autoencoder, save_generative
from segadapt.models.generative.teacher import classify, true_classes
from segadapt.protocol import versions
from segadapt.record import JsonLines, write_json
from segadapt.seeds import derive
from segadapt.train import LOG_EVERY, cached, check_settings, cross_entropy, labelled_split, open_folder
from segadapt.train_autoencoder import DECIDED, batches, cosine, train_autoencoder
from segadapt.wandb_mirror import Mirror, mirrored

VALIDATION_SIGMA = 0.25  # the noise level at which adaptation asks the teacher


class ClassTokens(nn.Module):
    """Learned in the place of a text encoder: `tokens` vectors and a pooled one a class; the last row is null."""

    def __init__(self, num_classes: int, *, tokens: int, width: int, pooled_width: int):
        super().__init__()
        self.sequence = nn.Parameter(torch.randn(num_classes + 1, tokens, width))
        self.pooled = nn.Parameter(torch.randn(num_classes + 1, pooled_width))

    def frozen(self) -> PromptEmbeddings:
        """As a file holds them: float32 on the CPU."""
        sequence, pooled = self.sequence.detach().float().cpu(), self.pooled.detach().float().cpu()
        return PromptEmbeddings(sequence[:-1], pooled[:-1], sequence[-1], pooled[-1], source="learned")


@dataclass(frozen=True)
class TeacherLoss:
    """Terms of the objective, scalars."""

    flow: Tensor  # squared velocity error over the pixels of the prompted class
    comparing: Tensor  # cross-entropy of softmax(-scale * error) over the prompts of a window
    accuracy: Tensor  # share of pixels whose own prompt has the smallest error

    def total(self, comparing_weight: float) -> Tensor:
        """Their weighted sum."""
        return self.flow + comparing_weight * self.comparing


def teacher_loss(error_BNyx: Tensor, prompts_BN: Tensor, classes_Byx: Tensor, scale: Tensor) -> TeacherLoss:
    """Class-masked flow matching with a class-comparing term.

    The masked term alone leaves v_k undefined at pixels of other classes, so that the prompt is ignored; comparing the
    errors of several prompts at the same pixel mends that (a diffusion classifier, Li et al. 2023, trained per pixel).

    Args:
        error_BNyx: mean over channels of (v - target)^2 for each prompt.
        prompts_BN: int64 classes of the prompts.
        classes_Byx: int64 true classes on the latent grid, 255 = ignore.
        scale: inverse temperature, > 0.
    """
    is_own_BNyx = prompts_BN[:, :, None, None] == classes_Byx[:, None]
    flow = (error_BNyx * is_own_BNyx).sum() / is_own_BNyx.sum().clamp(min=1)
    is_asked_Byx = is_own_BNyx.any(dim=1)
    own_Byx = is_own_BNyx.int().argmax(dim=1)
    logits_BNyx = -scale * error_BNyx
    is_hit_Byx = (logits_BNyx.argmax(dim=1) == own_Byx) & is_asked_Byx
    accuracy = is_hit_Byx.sum() / is_asked_Byx.sum().clamp(min=1)
    return TeacherLoss(flow, cross_entropy(logits_BNyx, own_Byx, is_asked_Byx), accuracy)


def draw_prompts(classes_Byx: Tensor, num_classes: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different classes for each window, present ones first to be drawn: int64 [B, N]."""
    present_BC = torch.zeros(len(classes_Byx), 256, device=classes_Byx.device).scatter_(1, classes_Byx.flatten(1), 1.0)
    weights_BC = present_BC[:, :num_classes] + 0.05
    return torch.multinomial(weights_BC, count, replacement=False, generator=generator)


def learning_rate_groups(transformer: nn.Module, tokens: ClassTokens, scale: nn.Parameter, t: TrainGenerativeSettings):
    """Decay for matrices alone; the class tokens and the comparing scale have none."""
    matrices = [p for p in transformer.parameters() if p.ndim > 1]
    rest = [p for p in transformer.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": t.weight_decay},
        {"params": [*rest, *tokens.parameters(), scale], "weight_decay": 0.0},
    ]


def check_keys(section: str, config: Mapping[str, Any], architecture: type, *, decided: tuple[str, ...] = ()) -> None:
    """UserError: a key that the architecture's constructor does not take, or that is decided for it."""
    known = set(inspect.signature(architecture).parameters) - set(decided)
    for key in config:
        if key not in known:
            raise UserError(f"model.generative.{section}.{key} is not a setting of {architecture.__name__} here."
                            f"{did_you_mean(key, known)}")  # fmt: skip


def check_model(settings: TrainGenerativeConfig) -> None:
    """UserError: no architecture, an unknown key of one, or a checkpoint or autoencoder that would not be used."""
    g, iters = settings.model.generative, settings.train.autoencoder_iters
    if not g.config:
        raise UserError("model.generative.config={}: train-generative makes its transformer from scratch; expected an "
                        "architecture. Use model/generative=toytown_scratch, or set its keys.")  # fmt: skip
    if g.checkpoint is not None:
        raise UserError(f"model.generative.checkpoint={g.checkpoint} beside model.generative.config: the transformer "
                        "is made from scratch and the checkpoint would be ignored. Set it to null; "
                        "give an autoencoder as model.generative.autoencoder=FOLDER.")  # fmt: skip
    check_keys("config", g.config, SD3Transformer2DModel)
    check_keys("autoencoder_config", g.autoencoder_config, AutoencoderKL, decided=DECIDED)
    if g.autoencoder_config and not iters:
        raise UserError("train.autoencoder_iters=0 beside model.generative.autoencoder_config: the autoencoder would "
                        "stay random. Train it for 1 step or more, or give one: "
                        "model.generative.autoencoder_config={} and model.generative.autoencoder=FOLDER.")  # fmt: skip
    if iters and not g.autoencoder_config:
        raise UserError(f"train.autoencoder_iters={iters} beside model.generative.autoencoder_config={{}}: there is no "
                        "autoencoder to train. Set train.autoencoder_iters=0, or the architecture's keys.")  # fmt: skip
    if bool(g.autoencoder_config) == (g.autoencoder is not None):
        raise UserError(f"model.generative.autoencoder={g.autoencoder or 'null'} beside model.generative."
                        f"autoencoder_config={g.autoencoder_config}: expected one of the two, a given autoencoder or "
                        "one made from scratch. Set one and empty the other.")  # fmt: skip


def run(settings: TrainGenerativeConfig) -> dict[str, Any]:
    """Train and save `model/` (transformer, vae, embeddings) in the run folder; returns results.json's content.

    Raises:
        UserError: no labels, settings that contradict each other or have no effect, an unknown one of the architecture,
            or an autoencoder that cannot be loaded.
    """
    check_settings(settings)
    check_model(settings)
    t, console, main = settings.train, Console(), set_up(settings.runtime)
    dataset, held_out = labelled_split(settings, settings.data.split), labelled_split(settings, t.validation_split)
    if t.prompts_per_window > len(dataset.classes):
        raise UserError(f"train.prompts_per_window={t.prompts_per_window}, but the data set has {len(dataset.classes)} "
                        "classes. Use at most that many.")  # fmt: skip
    given = None
    if settings.model.generative.autoencoder is not None:
        given = load_autoencoder("", revision=None, folder=settings.model.generative.autoencoder)
    folder = open_folder(settings)
    began = time.perf_counter()
    dataset = cached(dataset, settings)
    with mirrored(settings, folder, job_type="train-generative") as mirror:
        with JsonLines(folder.path / "records.jsonl") as records:
            vae = given or train_autoencoder(dataset, settings, main, records, console)
            teacher, tokens, accuracy = train_transformer(
                dataset, held_out, vae, settings, main, records, mirror, console
            )
        dtype = getattr(torch, t.save_dtype)
        save_generative(folder.path / "model", stored(teacher.transformer, dtype), stored(teacher.autoencoder, dtype))
        save_embeddings(
            folder.path / "model" / "embeddings.safetensors",
            tokens.frozen(),
            classes=dataset.classes,
            dataset_name=settings.data.name,
            model=settings.experiment.name,
        )
        results = {"steps": t.iters, "validation": {"pixel_accuracy": accuracy, "sigma": VALIDATION_SIGMA},
                   "seconds": round(time.perf_counter() - began, 1), "seed": settings.experiment.seed,
                   "versions": versions(main)}  # fmt: skip
        write_json(folder.path / "results.json", results)
        mirror.summary({"validation/accuracy": accuracy})
    console.print(f"saved {folder.path / 'model'}", highlight=False, soft_wrap=True)
    return results | {"folder": str(folder.path)}


def stored(module: Any, dtype: torch.dtype) -> Any:
    """Cast for the file; past diffusers' own `.to`, which warns about modules that are none of ours."""
    return nn.Module.to(module, dtype)


def train_transformer(
    dataset: Dataset,
    held_out: Dataset,
    vae: AutoencoderKL | AutoencoderTiny,
    settings: TrainGenerativeConfig,
    main: torch.device,
    records: JsonLines,
    mirror: Mirror,
    console: Console,
) -> tuple[Sd3, ClassTokens, float]:
    """Flow matching on the latents of random windows; returns the averaged teacher and its validation accuracy."""
    t, seed = settings.train, settings.experiment.seed
    torch.manual_seed(derive(seed, "transformer"))
    transformer = SD3Transformer2DModel(**settings.model.generative.config)
    nn.Module.to(transformer, main)
    widths = transformer.config["joint_attention_dim"], transformer.config["pooled_projection_dim"]
    tokens = ClassTokens(len(dataset.classes), tokens=t.tokens, width=widths[0], pooled_width=widths[1]).to(main)
    log_scale = nn.Parameter(torch.tensor(math.log(t.comparing_scale), device=main))
    optimizer = torch.optim.AdamW(learning_rate_groups(transformer, tokens, log_scale, t), lr=t.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, iters=t.iters, warmup_iters=t.warmup_iters)
    )
    moving = nn.ModuleList([transformer, tokens])
    average = torch.optim.swa_utils.AveragedModel(
        moving, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(t.ema_decay)
    )
    encoder = Sd3(transformer, vae, tokens.frozen(), device=main, precision=settings.runtime.precision)
    transformer.train()
    generator = torch.Generator(main).manual_seed(derive(seed, "training noise"))
    nulls = max(1, round(t.null_share * t.batch_size)) if t.null_share else 0
    accuracy = 0.0
    loader = enumerate(batches(dataset, settings, iters=t.iters, purpose="transformer"), start=1)
    for step, (windows_B3ss, label_Bss) in loader:
        latent_Bzyx = encoder.encode(windows_B3ss)
        classes_Byx = true_classes(label_Bss, latent_Bzyx.shape[-1])
        sigma_B = torch.rand(len(latent_Bzyx), device=main, generator=generator)
        sigma_B = t.sigma_low + (t.sigma_high - t.sigma_low) * sigma_B
        noise_Bzyx = torch.randn(latent_Bzyx.shape, device=main, generator=generator)
        noisy = add_noise(latent_Bzyx, noise_Bzyx, sigma_B)
        prompts_BN = draw_prompts(classes_Byx, len(dataset.classes), t.prompts_per_window, generator)
        window_P = torch.arange(len(latent_Bzyx), device=main).repeat_interleave(t.prompts_per_window)
        window_P = torch.cat([window_P, torch.arange(nulls, device=main)])
        class_P = F.pad(prompts_BN.flatten(), (0, nulls), value=len(dataset.classes))
        with encoder.autocast():
            velocity_Pzyx = transformer(
                hidden_states=noisy.x_t_Kzyx[window_P],
                encoder_hidden_states=tokens.sequence[class_P],
                pooled_projections=tokens.pooled[class_P],
                timestep=1000 * sigma_B[window_P],
                return_dict=False,
            )[0]
        error_Pyx = (velocity_Pzyx.float() - noisy.target_Kzyx[window_P]).square().mean(dim=1)
        asked = prompts_BN.numel()
        loss = teacher_loss(error_Pyx[:asked].unflatten(0, prompts_BN.shape), prompts_BN, classes_Byx, log_scale.exp())
        null_loss = error_Pyx[asked:].mean() if nulls else 0.0
        (loss.total(t.comparing_weight) + t.null_share * null_loss).backward()
        torch.nn.utils.clip_grad_norm_(moving.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average.update_parameters(moving)
        # once in a while: read the numbers (a CPU-GPU sync)
        if step % LOG_EVERY == 0 or step == t.iters:
            line = {"stage": "transformer", "step": step, "flow": loss.flow.item(), "comparing": loss.comparing.item(),
                    "accuracy": loss.accuracy.item(), "scale": log_scale.exp().item()}  # fmt: skip
            if not math.isfinite(line["flow"]):
                raise UserError(f"train.lr={t.lr}: the flow loss is {line['flow']} at step {step}; expected a finite "
                                "number. Lower train.lr.")  # fmt: skip
            records.append(line)
            mirror.log({f"train/{name}": line[name] for name in ("flow", "comparing", "accuracy")}, step=step)
        if step % t.validate_every == 0 or step == t.iters:
            best, best_tokens = copy.deepcopy(average.module).children()
            assert isinstance(best, SD3Transformer2DModel)
            assert isinstance(best_tokens, ClassTokens)
            teacher = Sd3(best, vae, best_tokens.frozen(), device=main, precision=settings.runtime.precision)
            accuracy = validation_accuracy(teacher, held_out, settings)
            records.append({"stage": "transformer", "step": step, "validation_accuracy": accuracy})
            mirror.log({"validation/accuracy": accuracy}, step=step)
            console.print(f"step {step}/{t.iters}: flow {loss.flow.item():.4f}, accuracy among "
                          f"{t.prompts_per_window} prompts {100 * loss.accuracy.item():.1f} %, validation accuracy "
                          f"among all {100 * accuracy:.1f} %", highlight=False)  # fmt: skip
    return teacher, best_tokens, accuracy


def validation_accuracy(teacher: Sd3, held_out: Dataset, settings: TrainGenerativeConfig) -> float:
    """Pixel accuracy of the teacher as classifier on clean held-out windows, all classes asked, one noise draw."""
    t = settings.train
    clean = copy.deepcopy(settings)
    clean.train.broad, clean.train.scale_low, clean.train.scale_high = False, 1.0, 1.0
    hits = pixels = 0
    iters = math.ceil(t.validation_images / t.batch_size)
    for windows_B3ss, label_Bss in batches(held_out, clean, iters=iters, purpose="validation"):
        for window_3ss, label_ss in zip(windows_B3ss, label_Bss, strict=True):
            predicted_Kyx = classify(teacher, window_3ss[None], sigma=VALIDATION_SIGMA, seed=settings.experiment.seed)
            classes_Kyx = true_classes(label_ss[None], predicted_Kyx.shape[-1])
            hits += ((predicted_Kyx == classes_Kyx) & (classes_Kyx != 255)).sum().item()
            pixels += (classes_Kyx != 255).sum().item()
    return hits / max(1, pixels)
