"""From the teacher's settings to SD3: embeddings, placed transformer, autoencoder."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segadapt.config import GenerativeSettings, UpdateSettings
from segadapt.errors import UserError
from segadapt.models.generative import placement as placing
from segadapt.models.generative.lora import add_lora
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.plan import Cost
from segadapt.models.generative.prompts import PromptEmbeddings, load_embeddings, prompt_embeddings
from segadapt.models.generative.sd3 import Sd3, load_autoencoder, load_transformer
from segadapt.models.generative.stages import compile_and_record
from segadapt.models.recording import Graphs
from segadapt.models.set_up import count, resolve
from segadapt.seeds import numpy_generator

LARGE = 10**9  # parameters of a transformer that is worth a minute of compiling


def build_embeddings(
    settings: GenerativeSettings, checkpoint: str, *, classes: Sequence[str], dataset_name: str, device: torch.device
) -> PromptEmbeddings:
    """Class embeddings: the named file, else the one beside the checkpoint, else the prompts' (cached) encoding."""
    beside = Path(checkpoint) / "embeddings.safetensors"
    path = settings.embeddings or (str(beside) if beside.is_file() else None)
    if path is not None and settings.prompts.file is not None:
        raise UserError(f"model.generative.prompts.file={settings.prompts.file}, but the class embeddings in {path} "
                        "are taken, and no prompt is encoded. Move them away, or set it to null.")  # fmt: skip
    if path is not None:
        return load_embeddings(Path(path).expanduser(), classes=classes)
    prompts = settings.prompts
    return prompt_embeddings(
        classes=classes,
        dataset_name=dataset_name,
        template=prompts.template,
        overrides=prompts.overrides,
        file=prompts.file,
        checkpoint=checkpoint,
        revision=settings.revision,
        max_sequence_length=prompts.max_sequence_length,
        dtype=getattr(torch, prompts.dtype),
        cache_dir=Path(prompts.cache_dir).expanduser(),
        device=device,
    )


def shuffled(embeddings: PromptEmbeddings, *, seed: int) -> PromptEmbeddings:
    """Every class gets the embedding of another one, along one random cycle through all classes: a control.

    Raises:
        UserError: there is only one class.
    """
    order_C = numpy_generator(seed, "shuffle_classes").permutation(len(embeddings.pooled_CD))
    if len(order_C) < 2:
        raise UserError("model.generative.shuffle_classes=true: the data set has 1 class; expected 2 or more. "
                        "Set model.generative.shuffle_classes=false.")  # fmt: skip
    source_C = torch.empty(len(order_C), dtype=torch.long)
    source_C[torch.from_numpy(order_C)] = torch.from_numpy(order_C).roll(1)
    return dataclasses.replace(
        embeddings, sequence_CLE=embeddings.sequence_CLE[source_C], pooled_CD=embeddings.pooled_CD[source_C]
    )


def build_generative(
    settings: GenerativeSettings,
    *,
    classes: Sequence[str],
    dataset_name: str,
    devices: Sequence[int] | Sequence[str],
    precision: str,
    update: UpdateSettings,
    seed: int,
    fixed: Callable[[nn.Module, bool], tuple[int, int]],
    accumulates: bool = False,
    compiled: bool | None = False,
    force_hooks: bool = False,
) -> tuple[Sd3, tuple[placing.Placement, ...], int, bool]:
    """The teacher: its transformer split over the devices or copied to each, the autoencoder on the last one.

    Returns it, where its transformers lie, how many pairs each device has at work at a time, and whether the blocks are
    compiled.

    Args:
        update: what of it moves; adapters are added here.
        seed: of the adapters and of the shuffle control.
        fixed: see fixed_bytes, of an autoencoder and whether the segmenter is recorded if it can be.
        accumulates: gradients are summed over images.
        compiled: see runtime.compile.
        force_hooks: accelerate's hooks even on one device, to test the split path.
    """
    main = torch.device(devices[0])
    checkpoint = resolve(settings.checkpoint, "model.generative.checkpoint")
    embeddings = build_embeddings(settings, checkpoint, classes=classes, dataset_name=dataset_name, device=main)
    if settings.shuffle_classes:
        embeddings = shuffled(embeddings, seed=seed)
    folder = None if settings.autoencoder is None else str(Path(settings.autoencoder).expanduser())
    autoencoder = load_autoencoder(checkpoint, revision=settings.revision, folder=folder)
    transformer = load_transformer(checkpoint, revision=settings.revision).requires_grad_(update.generative)
    check_shapes(transformer, autoencoder, embeddings, window_px=settings.window_px)
    is_large = count(transformer) >= LARGE and main.type == "cuda"
    if compiled is None:
        compiled = is_large and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    if update.lora_rank:
        add_lora(transformer, rank=update.lora_rank, alpha=update.lora_alpha, seed=seed)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    text_bytes = sum(t.numel() * t.element_size() for t in (embeddings.sequence_CLE, embeddings.pooled_CD))
    main_bytes, last_bytes = fixed(autoencoder, compiled)
    cost = Cost(
        trained=update.generative,
        pairs=0,
        tokens=(settings.window_px // 16) ** 2 + embeddings.sequence_CLE.shape[1],
        checkpointing=settings.gradient_checkpointing,
        compiled=compiled,
        recorded=compiled and main.type == "cuda" and not settings.gradient_checkpointing,
        bf16=precision == "bf16",
        accumulates=accumulates,
        fixed_main_bytes=main_bytes + text_bytes,
        fixed_last_bytes=last_bytes,
    )
    copied, max_pairs, parts = settings.placement == "replicate", settings.max_pairs, settings.parts
    cost = placing.share_out(transformer, devices, cost, copied=copied, max_pairs=max_pairs, parts=parts)
    in_parts = f", in {cost.parts} parts" if cost.parts > 1 else ""
    how = ", compiled" if compiled else ""
    further = [f"{cost.pairs} (window, class) pairs at work at a time{in_parts}{how}"]
    if is_large and not compiled:
        further.append("not compiled, which is slow: runtime.compile=false, or neither gcc nor clang was found")
    if len(devices) > 1:
        further.append(placing.comparison(transformer, devices, cost, max_pairs=max_pairs, parts=parts))
    if copied:
        transformers, placements = placing.replicate(transformer, devices, cost)
    else:
        more = {"force_hooks": force_hooks, "virtual_stages": settings.virtual_stages}
        placements = [placing.place(transformer, devices, cost, **more)]
        transformers = [transformer]
    placements[-1] = dataclasses.replace(placements[-1], lines=(*placements[-1].lines, *further))
    on, stages = [torch.device(device) for device in devices], compile_and_record(transformers, cost)
    parallel = Parallel(transformers, on, parts=cost.parts, stages=stages)
    memory = Graphs(on[-1]).memory() if compiled and main.type == "cuda" else None
    teacher = Sd3(
        transformer,
        autoencoder,
        embeddings,
        device=main,
        precision=precision,
        parallel=parallel,
        memory=memory,
        has_offset=update.prompt_offset,
    )
    return teacher, tuple(placements), cost.pairs // len(devices), compiled


def check_shapes(transformer: Any, autoencoder: Any, embeddings: PromptEmbeddings, *, window_px: int) -> None:
    """UserError: parts of different checkpoints, or windows larger than the transformer has positions for."""
    wants, vae = transformer.config, autoencoder.config
    pairs = {
        "latent channels (autoencoder)": (vae.latent_channels, wants.in_channels),
        "text width (embeddings)": (embeddings.sequence_CLE.shape[-1], wants.joint_attention_dim),
        "pooled width (embeddings)": (embeddings.pooled_CD.shape[-1], wants.pooled_projection_dim),
    }
    for what, (got, expected) in pairs.items():
        if got != expected:
            raise UserError(f"model.generative: {what} is {got}, but the transformer expects {expected}. Use parts of "
                            "one checkpoint.")  # fmt: skip
    if window_px > (largest := 8 * wants.patch_size * wants.pos_embed_max_size):
        raise UserError(f"model.generative.window_px={window_px}: the transformer has positions for {largest} px. Use "
                        "that or less, also for data.short_side_px.")  # fmt: skip
