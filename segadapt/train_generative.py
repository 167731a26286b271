"""Train a teacher: from scratch with class tokens, or a checkpoint further, whole or by low-rank adapters.

B windows of a batch   N prompts of a window   P (window, class) pairs   s window px   z y x latent channels and grid
"""

import inspect
import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from rich.console import Console
from torch import nn

from segadapt import metrics, stream
from segadapt.config_training import TrainGenerativeConfig, TrainGenerativeSettings
from segadapt.datasets import Dataset, Task
from segadapt.errors import UserError, did_you_mean
from segadapt.models.generative.build import build_embeddings, check_shapes
from segadapt.models.generative.lora import add_lora, lora_parameters, merge_lora
from segadapt.models.generative.prompts import save_embeddings
from segadapt.models.generative.sd3 import Sd3, load_autoencoder, load_transformer, save_generative
from segadapt.models.generative.teacher import classify, true_classes
from segadapt.models.set_up import resolve, set_up
from segadapt.protocol import versions
from segadapt.record import JsonLines, RunFolder, write_json
from segadapt.seeds import derive
from segadapt.training.autoencoder import DECIDED, batches, cosine, train_autoencoder
from segadapt.training.log import LOG_EVERY
from segadapt.training.preparation import cached, check_settings, labelled_split, open_folder
from segadapt.training.state import TrainingState
from segadapt.training.teacher_objective import Alignment, ClassTokens, batch_loss
from segadapt.wandb_mirror import Mirror, mirrored

VALIDATION_SIGMA = 0.25  # the noise level at which adaptation asks the teacher
CHECKPOINT = "checkpoint.safetensors"  # of an interrupted run; removed at the end


def learning_rate_groups(named: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay for the transformer's matrices alone; class tokens, scale and vectors have none."""
    decays = {name: p.ndim > 1 and not name.startswith("tokens.") for name, p in named.items()}
    return [
        {"params": [p for name, p in named.items() if decays[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if not decays[name]], "weight_decay": 0.0},
    ]


def check_keys(section: str, config: Mapping[str, Any], architecture: type, *, decided: tuple[str, ...] = ()) -> None:
    """UserError: a key that the architecture's constructor does not take, or that is decided for it."""
    known = set(inspect.signature(architecture).parameters) - set(decided)
    for key in config:
        if key not in known:
            raise UserError(f"model.generative.{section}.{key} is not a setting of {architecture.__name__} here."
                            f"{did_you_mean(key, known)}")  # fmt: skip


def check_model(settings: TrainGenerativeConfig) -> None:
    """UserError: neither an architecture nor a checkpoint, both, an unknown key, or a setting without effect."""
    g, t = settings.model.generative, settings.train
    if t.align.weight and t.align.checkpoint is None:
        raise UserError(f"train.align.weight={t.align.weight}, but train.align.checkpoint=null: there is no DINOv2 to "
                        "align with. Give its folder, or set train.align.weight=0.")  # fmt: skip
    if not g.config:
        _check_checkpoint(settings)
        return
    if g.checkpoint is not None:
        raise UserError(f"model.generative.checkpoint={g.checkpoint} beside model.generative.config: the transformer "
                        "is made from scratch and the checkpoint would be ignored. Set it to null; "
                        "give an autoencoder as model.generative.autoencoder=FOLDER.")  # fmt: skip
    if t.lora_rank:
        raise UserError(f"train.lora_rank={t.lora_rank} beside model.generative.config: adapters on random weights. "
                        "Train a checkpoint (model/generative=local), or set train.lora_rank=0.")  # fmt: skip
    check_keys("config", g.config, SD3Transformer2DModel)
    check_keys("autoencoder_config", g.autoencoder_config, AutoencoderKL, decided=DECIDED)
    if g.autoencoder is not None and t.autoencoder_iters:
        raise UserError(f"train.autoencoder_iters={t.autoencoder_iters} beside model.generative.autoencoder="
                        f"{g.autoencoder}: a given autoencoder is not trained. Set train.autoencoder_iters=0, or "
                        "model.generative.autoencoder=null to make one from autoencoder_config.")  # fmt: skip
    if g.autoencoder is None and not (g.autoencoder_config and t.autoencoder_iters):
        raise UserError(f"model.generative.autoencoder=null, train.autoencoder_iters={t.autoencoder_iters} and "
                        f"autoencoder_config={g.autoencoder_config}: there is no trained autoencoder. Give one, "
                        "model.generative.autoencoder=FOLDER, or an architecture and 1 step or more.")  # fmt: skip
    wants, makes = g.config.get("in_channels", 16), g.autoencoder_config.get("latent_channels", 4)
    if g.autoencoder is None and wants != makes:
        raise UserError(f"model.generative.config.in_channels={wants}, but autoencoder_config.latent_channels={makes}: "
                        "expected the same number. Set one to the other.")  # fmt: skip


def _check_checkpoint(settings: TrainGenerativeConfig) -> None:
    """UserError: nothing to train further, or an autoencoder to train beside a finished one."""
    g, t = settings.model.generative, settings.train
    if g.checkpoint is None:
        raise UserError("model.generative.config={} and model.generative.checkpoint=null: there is no transformer. "
                        "Use model/generative=toytown_scratch, set an architecture, or a checkpoint.")  # fmt: skip
    if t.autoencoder_iters:
        raise UserError(f"train.autoencoder_iters={t.autoencoder_iters} beside model.generative.checkpoint="
                        f"{g.checkpoint}: it keeps its own. Set train.autoencoder_iters=0.")  # fmt: skip


def run(settings: TrainGenerativeConfig) -> dict[str, Any]:
    """Train and save `model/` (transformer, vae, embeddings) in the run folder; returns results.json's content.

    An interrupted run goes on from its last validation, to the same weights, unless experiment.restart=true.

    Raises:
        UserError: no labels, settings that contradict each other or have no effect, an unknown one of the architecture,
            or a checkpoint, autoencoder or DINOv2 that cannot be loaded.
    """
    check_settings(settings)
    if settings.experiment.any_version:
        raise UserError("experiment.any_version=true: training a teacher asks for no version, so it would have no "
                        "effect. Set experiment.any_version=false.")  # fmt: skip
    check_model(settings)
    t, console, main = settings.train, Console(), set_up(settings.runtime)
    dataset, held_out = labelled_split(settings, settings.data.split), labelled_split(settings, t.validation_split)
    for each in (dataset, held_out):
        entries = [stream.Entry(Task(0), key) for key in each.keys(Task(0))]
        stream.verify(each, entries, workers=settings.data.workers)
    if t.prompts_per_window > len(dataset.classes):
        raise UserError(f"train.prompts_per_window={t.prompts_per_window}, but the data set has {len(dataset.classes)} "
                        "classes. Use at most that many.")  # fmt: skip
    g = settings.model.generative
    checkpoint = "" if g.config else resolve(g.checkpoint, "model.generative.checkpoint")
    given = None
    if checkpoint or g.autoencoder is not None:
        other = None if g.autoencoder is None else str(Path(g.autoencoder).expanduser())
        given = as_stored(load_autoencoder(checkpoint, revision=g.revision, folder=other), getattr(torch, t.save_dtype))
    transformer, tokens = build_teacher(settings, checkpoint, dataset.classes, main)
    if given is not None:
        check_shapes(transformer, given, tokens.frozen(), window_px=g.window_px)
    align = Alignment(transformer, t.align, seed=settings.experiment.seed).to(main) if t.align.weight else None
    began = time.perf_counter()
    with (
        open_folder(settings, checkpoint=CHECKPOINT) as folder,
        mirrored(settings, folder, job_type="train-generative") as mirror,
    ):
        dataset = cached(dataset, settings)
        with JsonLines(folder.path / "records.jsonl", keep=_earlier_records(folder)) as records:
            vae = given or _own_autoencoder(folder.path / "model" / "vae", dataset, settings, main, records, console)
            teacher = Sd3(transformer, vae, tokens.frozen(), device=main, precision=settings.runtime.precision)
            logs = records, mirror, console
            scores = train_transformer(teacher, tokens, align, dataset, held_out, settings, folder.path, *logs)
        dtype = getattr(torch, t.save_dtype)
        save_generative(folder.path / "model", stored(plain(transformer, settings), dtype), stored(vae, dtype))
        save_embeddings(
            folder.path / "model" / "embeddings.safetensors",
            tokens.frozen(),
            classes=dataset.classes,
            dataset_name=settings.data.name,
            model=settings.experiment.name,
        )
        results = {"steps": t.iters, "seconds": round(time.perf_counter() - began, 1),
                   "validation": {"pixel_accuracy": scores.aacc, "miou": scores.miou, "sigma": VALIDATION_SIGMA},
                   "parameters": sum(p.numel() for p in transformer.parameters()), "seed": settings.experiment.seed,
                   "versions": versions(main)}  # fmt: skip
        write_json(folder.path / "results.json", results)
        (folder.path / CHECKPOINT).unlink(missing_ok=True)
        mirror.summary({"validation/accuracy": scores.aacc, "validation/miou": scores.miou})
    console.print(f"saved {folder.path / 'model'}", highlight=False, soft_wrap=True)
    return results | {"folder": str(folder.path)}


def build_teacher(
    settings: TrainGenerativeConfig, checkpoint: str, classes: tuple[str, ...], main: torch.device
) -> tuple[SD3Transformer2DModel, ClassTokens]:
    """Random weights and class tokens, or a checkpoint's with its embeddings kept; adapters put in where asked."""
    g, t, seed = settings.model.generative, settings.train, settings.experiment.seed
    if not checkpoint:
        torch.manual_seed(derive(seed, "transformer"))
        transformer = SD3Transformer2DModel(**g.config)
        widths = {"width": transformer.config["joint_attention_dim"],
                  "pooled_width": transformer.config["pooled_projection_dim"]}  # fmt: skip
        tokens = ClassTokens.random(len(classes), tokens=t.tokens, **widths)
    else:
        embeddings = build_embeddings(g, checkpoint, classes=classes, dataset_name=settings.data.name, device=main)
        tokens = ClassTokens.of(embeddings)
        transformer = load_transformer(checkpoint, revision=g.revision)
        if t.lora_rank:
            add_lora(transformer, rank=t.lora_rank, alpha=t.lora_alpha, seed=seed)
    if g.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    nn.Module.to(transformer, main)
    return transformer, tokens.to(main)


def _own_autoencoder(
    folder: Path,
    dataset: Dataset,
    settings: TrainGenerativeConfig,
    main: torch.device,
    records: JsonLines,
    console: Console,
) -> AutoencoderKL | AutoencoderTiny:
    """Train it, or take an interrupted start's; read back as stored: the teacher learns on what is kept."""
    if not (folder / "config.json").is_file():
        vae = train_autoencoder(dataset, settings, main, records, console)
        stored(vae, getattr(torch, settings.train.save_dtype)).save_pretrained(folder)
    return load_autoencoder("", revision=None, folder=str(folder))


def _earlier_records(folder: RunFolder) -> list[dict[str, Any]]:
    """Lines of an interrupted start, up to its checkpoint."""
    records, checkpoint = folder.path / "records.jsonl", folder.path / CHECKPOINT
    if not (records.is_file() and checkpoint.is_file()):
        return []
    step = TrainingState.step_of(checkpoint)
    lines = [json.loads(line) for line in records.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if line["stage"] == "autoencoder" or line["step"] <= step]


def stored(module: Any, dtype: torch.dtype) -> Any:
    """Cast for the file, which does not say what folder of this machine it came from.

    Past diffusers' own `.to`, which warns about modules that are none of ours.
    """
    module.register_to_config(_name_or_path="")
    return nn.Module.to(module, dtype)


def as_stored(module: Any, dtype: torch.dtype) -> Any:
    """In float32 with the values that a file of another dtype keeps."""
    return stored(stored(module, dtype), torch.float32)


def train_transformer(
    teacher: Sd3,
    tokens: ClassTokens,
    align: Alignment | None,
    dataset: Dataset,
    held_out: Dataset,
    settings: TrainGenerativeConfig,
    folder: Path,
    records: JsonLines,
    mirror: Mirror,
    console: Console,
) -> metrics.Scores:
    """Move the teacher; it holds the averaged weights at the end. Returns the scores of the last validation."""
    t, main, transformer = settings.train, teacher.device, teacher.transformer
    log_scale = nn.Parameter(torch.tensor(math.log(t.comparing_scale), device=main))
    named = {f"transformer.{name}": p for name, p in trained_parameters(transformer, t).items()}
    named |= {f"tokens.{name}": p for name, p in tokens.named_parameters() if p.requires_grad}
    named |= {f"align.{name}": p for name, p in align.named_parameters() if p.requires_grad} if align else {}
    moving = named | {"scale": log_scale}
    optimizer = torch.optim.AdamW(
        learning_rate_groups(moving, t.weight_decay), lr=t.lr, betas=(0.9, 0.99), fused=main.type == "cuda"
    )
    state = TrainingState(moving, optimizer, decay=t.ema_decay)
    if (folder / CHECKPOINT).is_file():
        state.load(folder / CHECKPOINT)
        console.print(f"going on after step {state.step}", highlight=False)
    scores = None
    loader = batches(dataset, settings, iters=t.iters, purpose="transformer", first=state.step)
    for windows_B3ss, label_Bss in loader:
        for group in optimizer.param_groups:
            group["lr"] = t.lr * cosine(state.step, iters=t.iters, warmup_iters=t.warmup_iters)
        generator = torch.Generator(main).manual_seed(derive(settings.experiment.seed, "training noise", state.step))
        loss, extra = batch_loss(teacher, tokens, align, windows_B3ss, label_Bss, log_scale.exp(), t, generator)
        (loss.total(t.comparing_weight) + sum(extra.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 1.0)  # not finite if any term is not
        state.advance()
        step = state.step
        # once in a while: read the numbers (a CPU-GPU sync), stop before a broken state is saved
        if step % LOG_EVERY == 0 or step % t.validate_every == 0 or step == t.iters:
            terms = {"flow": loss.flow, "comparing": loss.comparing, "accuracy": loss.accuracy, **extra}
            line = {name: value.item() for name, value in terms.items()} | {"scale": log_scale.exp().item()}
            if not math.isfinite(norm.item()):
                flow = line["flow"]
                what = f"norm of the gradient is {norm.item()}" if math.isfinite(flow) else f"flow loss is {flow}"
                raise UserError(f"train.lr={t.lr}: the {what} at step {step}; expected a finite number. "
                                "Lower train.lr.")  # fmt: skip
            records.append({"stage": "transformer", "step": step} | line)
            mirror.log({f"train/{name}": value for name, value in line.items()}, step=step)
        if step % t.validate_every == 0 or step == t.iters:
            with state.averaged():
                asked = Sd3(transformer, teacher.autoencoder, tokens.frozen(), device=main, precision=teacher.precision)
                scores = validate(asked, held_out, settings)
            found = {"validation_accuracy": scores.aacc, "validation_miou": scores.miou}
            records.append({"stage": "transformer", "step": step} | found)
            mirror.log({name.replace("_", "/"): value for name, value in found.items()}, step=step)
            among = f"{100 * loss.accuracy.item():.1f} % among {t.prompts_per_window} prompts"
            asked_all = f"validation accuracy {100 * scores.aacc:.1f} %, mIoU {100 * scores.miou:.1f} %"
            said = f"step {step}/{t.iters}: flow {loss.flow.item():.4f}, accuracy {among}; {asked_all}"
            console.print(said, highlight=False, soft_wrap=True)
            state.save(folder / CHECKPOINT)
    state.keep_average()
    if scores is None:  # the checkpoint was that of the last step
        asked = Sd3(transformer, teacher.autoencoder, tokens.frozen(), device=main, precision=teacher.precision)
        scores = validate(asked, held_out, settings)
    return scores


def trained_parameters(transformer: SD3Transformer2DModel, t: TrainGenerativeSettings) -> dict[str, nn.Parameter]:
    """The adapters, or every weight."""
    return lora_parameters(transformer) if t.lora_rank else dict(transformer.named_parameters())


def plain(transformer: SD3Transformer2DModel, settings: TrainGenerativeConfig) -> SD3Transformer2DModel:
    """Adapters merged into the weights: SD3's own layout."""
    if settings.train.lora_rank:
        merge_lora(transformer)
    return transformer


def validate(teacher: Sd3, held_out: Dataset, settings: TrainGenerativeConfig) -> metrics.Scores:
    """The teacher as classifier of clean held-out windows: all classes asked, one noise draw, latent grid."""
    t, matrix = settings.train, metrics.ConfusionMatrix(len(held_out.classes), teacher.device)
    iters = math.ceil(t.validation_images / t.batch_size)
    loader = batches(held_out, settings, iters=iters, purpose="validation", plain=True)
    samples = (sample for windows_B3ss, label_Bss in loader for sample in zip(windows_B3ss, label_Bss, strict=True))
    for window_3ss, label_ss in itertools.islice(samples, t.validation_images):
        predicted_Kyx = classify(teacher, window_3ss[None], sigma=VALIDATION_SIGMA, seed=settings.experiment.seed)
        matrix.update(predicted_Kyx, true_classes(label_ss[None], predicted_Kyx.shape[-1]))
    return metrics.scores(matrix.counts())
