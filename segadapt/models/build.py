"""From the model settings to the two models, placed on their devices and joined."""

import dataclasses
import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

import segadapt
from segadapt.config import (
    AdaptConfig,
    DiscriminativeSettings,
    EvaluateConfig,
    GenerativeSettings,
    RuntimeSettings,
    UpdateSettings,
)
from segadapt.errors import UserError, did_you_mean
from segadapt.methods import METHODS
from segadapt.methods.build import build_method
from segadapt.models.combined import Combined
from segadapt.models.discriminative import Segmenter
from segadapt.models.discriminative.segformer import Segformer, load_segformer
from segadapt.models.generative import Teacher
from segadapt.models.generative import placement as placing
from segadapt.models.generative.lora import add_lora, plain_state
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.plan import GIB, Cost, training_bytes
from segadapt.models.generative.prompts import PromptEmbeddings, load_embeddings, prompt_embeddings
from segadapt.models.generative.sd3 import ENCODED_AT_ONCE, Sd3, load_autoencoder, load_transformer
from segadapt.models.generative.stages import compile_and_record
from segadapt.models.recording import Graphs
from segadapt.models.source import Source
from segadapt.parse import wants_teacher
from segadapt.seeds import numpy_generator

DEFAULT_THREADS = torch.get_num_threads()
BUNDLED = "segadapt:"  # prefix of the models inside the package
LARGE = 10**9  # parameters of a transformer that is worth a minute of compiling


@dataclass(frozen=True)
class Models:
    """What a run needs of the models, and where each transformer lies (nowhere: no teacher, or one that came built)."""

    method: Source  # or one built on it
    placements: tuple[placing.Placement, ...]
    fingerprints: dict[str, str]  # sha256 of the weights as loaded, by model

    @property
    def map_lines(self) -> list[str]:
        """Where the transformers live, as printed."""
        return [line for placement in self.placements for line in placement.lines]

    def assert_placed(self) -> None:
        """RuntimeError: a part of a transformer is no longer where it was placed."""
        if isinstance(self.method, Combined) and self.placements:
            for transformer, placement in zip(self.method.parallel.transformers, self.placements, strict=True):
                placing.assert_placed(transformer, placement)


def resolve(checkpoint: str | None, setting: str) -> str:
    """A checkpoint as the loaders take it: bundled names become folders of the package.

    Raises:
        UserError: no checkpoint, or an unknown bundled name.
    """
    if checkpoint is None:
        raise UserError(f"{setting} has no value; expected a hub id or a folder. Set it in your experiment file.")
    if checkpoint.startswith("~"):
        return str(Path(checkpoint).expanduser())
    if not checkpoint.startswith(BUNDLED):
        return checkpoint
    weights = Path(segadapt.__file__).parent / "weights"
    folder = weights / checkpoint.removeprefix(BUNDLED)
    if not folder.is_dir():
        names = sorted(str(path.parent.relative_to(weights)) for path in weights.glob("*/*/*.json"))
        raise UserError(f"{setting}={checkpoint} is not a bundled model. Choose from: {', '.join(names)}.")
    return str(folder)


def devices_of(runtime: RuntimeSettings) -> list[int] | list[str]:
    """All visible GPUs as integers, or ['cpu']; the first one is the main device.

    Raises:
        UserError: cuda is asked for and no GPU is visible.
    """
    gpus = list(range(torch.cuda.device_count()))
    if runtime.device == "cuda" and not gpus:
        raise UserError("runtime.device=cuda, but no GPU is visible; expected one or more. Check CUDA_VISIBLE_DEVICES "
                        "and the driver, or set runtime.device=cpu.")  # fmt: skip
    return gpus if gpus and runtime.device != "cpu" else ["cpu"]


def set_up(runtime: RuntimeSettings) -> torch.device:
    """Process-wide switches of torch; returns the main device."""
    main = torch.device(devices_of(runtime)[0])
    transformers_logging.disable_progress_bar()  # ours is the only bar
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(runtime.threads or DEFAULT_THREADS)  # all three anew: --multirun shares one process
    torch.use_deterministic_algorithms(runtime.deterministic)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gc.collect()  # recorded and compiled models refer to themselves, and --multirun shares one process
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    if main.type == "cuda":
        torch.cuda.init()  # or the next call finds no allocator
        torch.cuda.empty_cache()
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    return main


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state(module).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_segmenter(settings: DiscriminativeSettings, num_classes: int, device: torch.device) -> Segformer:
    """The source model, on the main device."""
    segmenter = load_segformer(
        resolve(settings.checkpoint, "model.discriminative.checkpoint"),
        revision=settings.revision,
        num_classes=num_classes,
        device=device,
        gradient_checkpointing=settings.gradient_checkpointing,
        allow_pickle=settings.allow_pickle,
    )
    segmenter.short_side_px = settings.short_side_px
    return segmenter


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


def fixed_bytes(
    segmenter: Segmenter,
    autoencoder: nn.Module,
    *,
    is_trained: bool,
    accumulates: bool = False,
    is_recorded: bool = False,
    windows: int = 2,
    short_side_px: int = 512,
) -> tuple[int, int]:
    """Bytes beside the transformer on the main device and on the last, which may be the same.

    Weights; if trained, gradients and AdamW moments; at full size what one image needs, measured with B5 at 512x683:
    3 GiB for the segmenter's graph and logits, 3 GiB to encode two windows, 4 GiB for what CUDA graphs keep.

    Args:
        windows: encoded at a time.
        short_side_px: of what the segmenter sees; its graph grows with the square.
    """
    main = training_bytes(segmenter.net, trained=is_trained, accumulates=accumulates)
    last = training_bytes(autoencoder, trained=False)
    if count(segmenter.net) < 5 * 10**7:
        return main, last
    graph = 3 * is_trained * GIB * short_side_px**2 // 512**2
    return main + graph + 4 * is_recorded * GIB, last + windows * 3 * GIB // 2


def ignored_classes(names: Sequence[str], classes: Sequence[str]) -> torch.Tensor | None:
    """Whether each class is one of model.loss.ignored_classes: bool [C]; None: none is.

    UserError: no such class, or none would be left.
    """
    known = [name.strip() for name in classes]
    for name in names:
        if name.strip() not in known:
            near = did_you_mean(name, known)
            raise UserError(f"model.loss.ignored_classes: {name!r} is not a class of the data set.{near}")
    is_ignored = [name in {given.strip() for given in names} for name in known]
    if all(is_ignored):
        raise UserError(f"model.loss.ignored_classes names all {len(known)} classes: none would be left to ask about. "
                        "Shorten the list.")  # fmt: skip
    return torch.tensor(is_ignored) if names else None


def build_models(
    settings: EvaluateConfig | AdaptConfig,
    classes: Sequence[str],
    *,
    segmenter: Segmenter | None = None,
    teacher: Teacher | None = None,
    force_hooks: bool = False,
) -> Models:
    """Load, place and join the models; without a generative model unless an AdaptConfig asks for `tta`.

    Args:
        segmenter, teacher: built already, of any family, on the main device; None: those of the settings.
    Raises:
        UserError: a checkpoint or a plan that does not fit; adapters, which are SD3's, for a teacher that is given.
    """
    ignored_C = None
    if isinstance(settings, AdaptConfig):
        ignored_C = ignored_classes(settings.model.loss.ignored_classes, classes)
    main = set_up(settings.runtime)
    if segmenter is None:
        segmenter = build_segmenter(settings.model.discriminative, len(classes), main)
    fingerprints = {"discriminative": fingerprint(segmenter.net)}
    # recomputed activations save and restore the state of a generator, which a CUDA graph can't
    can_record = main.type == "cuda" and not settings.model.discriminative.gradient_checkpointing
    seed, precision = settings.experiment.seed, settings.runtime.precision
    if not isinstance(settings, AdaptConfig) or not wants_teacher(settings.tta):
        memory = Graphs(main).memory() if can_record and settings.runtime.compile else None
        return Models(build_method(settings, segmenter, memory=memory), (), fingerprints)
    update, accumulates = settings.model.update, settings.tta.optimizer.accumulate > 1
    for setting, value, off in (("lora_rank", update.lora_rank, "0"), ("prompt_offset", update.prompt_offset, "false")):
        if teacher is not None and value:
            raise UserError(
                f"model.update.{setting}={value} is made for SD3, but the teacher is a {type(teacher).__name__}. Set "
                f"model.update.{setting}={off}."
            )

    g = settings.model.generative  # one row of windows: most images have two
    is_one_row = (g.short_side_px or settings.data.short_side_px) == g.window_px
    windows = 2 if g.windows == "grid" and is_one_row else ENCODED_AT_ONCE
    short_side_px = segmenter.short_side_px or settings.data.short_side_px

    def fixed(autoencoder: nn.Module, compiled: bool) -> tuple[int, int]:
        how = {"accumulates": accumulates, "is_recorded": compiled and can_record}
        sizes = {"windows": windows, "short_side_px": short_side_px}
        return fixed_bytes(segmenter, autoencoder, is_trained=update.discriminative, **sizes, **how)

    placements, pairs, compiled = (), settings.model.generative.max_pairs or placing.MOST_PAIRS, False
    if teacher is None:
        teacher, placements, pairs, compiled = build_generative(
            settings.model.generative,
            classes=classes,
            dataset_name=settings.data.name,
            devices=devices_of(settings.runtime),
            precision=precision,
            update=update,
            seed=seed,
            fixed=fixed,
            accumulates=accumulates,
            compiled=settings.runtime.compile,
            force_hooks=force_hooks,
        )
    fingerprints["generative"] = fingerprint(teacher.parallel.transformers[0])
    if isinstance(teacher, Sd3):
        fingerprints |= {
            "autoencoder": fingerprint(teacher.autoencoder),
            "embeddings": teacher.embeddings.fingerprint(),
        }
    window = dataclasses.replace(settings.model.generative, max_pairs=pairs)
    method: Any = METHODS[settings.tta.method]
    combined = method(
        segmenter,
        teacher,
        dataclasses.replace(settings.model, generative=window),
        settings.tta.optimizer,
        seed=seed,
        precision=precision,
        memory=Graphs(main).memory() if can_record and compiled else None,
        ignored_C=ignored_C,
    )
    return Models(combined, placements, fingerprints)
