"""From the model settings to the two models, placed on their devices and joined."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segadapt.config import AdaptConfig, DiscriminativeSettings, RunConfig
from segadapt.errors import UserError, did_you_mean
from segadapt.inference import as_evaluated
from segadapt.methods import METHODS
from segadapt.methods.build import build_method
from segadapt.models.combined import Combined
from segadapt.models.discriminative import Segmenter
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.generative import Teacher
from segadapt.models.generative import placement as placing
from segadapt.models.generative.build import build_generative
from segadapt.models.generative.plan import GIB, training_bytes
from segadapt.models.generative.sd3 import ENCODED_AT_ONCE, Sd3
from segadapt.models.recording import Graphs
from segadapt.models.set_up import count, devices_of, fingerprint, resolve, set_up
from segadapt.models.source import Source
from segadapt.parse import options_of, wants_teacher


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

    @property
    def loss_reduction(self) -> str:
        """That the segmenter was trained with, if its config says it, as that of `train` does; else unknown."""
        config = getattr(getattr(self.method.segmenter, "net", None), "config", None)
        return getattr(config, "loss_reduction", "unknown")

    def assert_placed(self) -> None:
        """RuntimeError: a part of a transformer is no longer where it was placed."""
        if isinstance(self.method, Combined) and self.placements:
            for transformer, placement in zip(self.method.parallel.transformers, self.placements, strict=True):
                placing.assert_placed(transformer, placement)


def build_segmenter(settings: DiscriminativeSettings, num_classes: int | None, device: torch.device) -> NetSegmenter:
    """The source model, on the main device; num_classes as in load_segmenter.

    UserError: a setting of models made from scratch beside the checkpoint; see load_segmenter.
    """
    for name, given, cure in (
        ("config", settings.config, "Choose model/discriminative=local, which has none"),
        ("backbone", settings.backbone, "Set backbone=null"),
    ):
        if given and settings.checkpoint is not None:
            raise UserError(f"model.discriminative.{name} beside checkpoint={settings.checkpoint}: it would have no "
                            f"effect. {cure}, or to train from scratch checkpoint=null.")  # fmt: skip
    return load_segmenter(
        resolve(settings.checkpoint, "model.discriminative.checkpoint"),
        revision=settings.revision,
        num_classes=num_classes,
        device=device,
        channel_order=settings.channel_order,
        gradient_checkpointing=settings.gradient_checkpointing,
        allow_pickle=settings.allow_pickle,
    )


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
        short_side_px: of what the segmenter sees; its graph grows with the square. Of images of 4:3: those of 2:1 need
            half as much again.
    """
    main = training_bytes(segmenter.net, trained=is_trained, accumulates=accumulates)
    last = training_bytes(autoencoder, trained=False)
    if count(segmenter.net) < 5 * 10**7:
        return main, last
    graph = 3 * is_trained * GIB * short_side_px**2 // 512**2
    return main + graph + 4 * is_recorded * GIB, last + windows * 3 * GIB // 2


def refuse_unexpected_weights(expected: Mapping[str, str], got: Mapping[str, str]) -> None:
    """UserError: weights that are not the ones that model.sha256 asks for, or no such model.

    Args:
        expected: model.sha256.
        got: see Models.fingerprints.
    """
    for model, sha256 in expected.items():
        if model not in got:
            raise UserError(f"model.sha256.{model}: nothing of that name is loaded.{did_you_mean(model, got)}")
        if sha256.lower() != got[model]:
            raise UserError(
                f"model.sha256.{model}={sha256}, but the weights that were loaded have {got[model]}. Fetch the "
                "checkpoint again, or correct the setting if these are the ones you mean."
            )


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


def refuse_settings_of_sd3(settings: AdaptConfig, teacher: Teacher) -> None:
    """UserError: a setting that only SD3, as built here, would follow, for a teacher that came built."""
    g, update = settings.model.generative, settings.model.update
    for name, value, neutral in (
        ("update.lora_rank", update.lora_rank, 0),
        ("update.prompt_offset", update.prompt_offset, False),
        ("generative.shuffle_classes", g.shuffle_classes, False),
        ("generative.prompts.file", g.prompts.file, None),
        ("generative.gradient_checkpointing", g.gradient_checkpointing, False),
        ("generative.placement", g.placement, "dispatch"),
    ):
        if value != neutral:
            raise UserError(
                f"model.{name}={value} is made for SD3, but the teacher is a {type(teacher).__name__}. Set "
                f"model.{name}={'null' if neutral is None else str(neutral).lower()}."
            )


def build_models(
    settings: RunConfig,
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
        UserError: a checkpoint or a plan that does not fit; other weights than model.sha256 asks for; a given model on
            another device than the main one; a setting that is SD3's, for a teacher that is given.
    """
    ignored_C = None
    if isinstance(settings, AdaptConfig):
        ignored_C = ignored_classes(settings.model.loss.ignored_classes, classes)
    main = set_up(settings.runtime)
    if segmenter is None:
        segmenter = build_segmenter(settings.model.discriminative, len(classes), main)
    segmenter.short_side_px = settings.model.discriminative.short_side_px
    for given, device in (("segmenter", next(segmenter.net.parameters()).device),
                          ("teacher", teacher.parallel.devices[0] if teacher is not None else main)):  # fmt: skip
        if torch.device(device) != main:
            raise UserError(f"the {given} lies on {device}, but the run's main device is {main}. Move it there, or set "
                            "runtime.device.")  # fmt: skip
    fingerprints = {"discriminative": fingerprint(segmenter.net)}
    # recomputed activations save and restore the state of a generator, which a CUDA graph can't
    can_record = main.type == "cuda" and not settings.model.discriminative.gradient_checkpointing
    seed, precision = settings.experiment.seed, settings.runtime.precision
    if not isinstance(settings, AdaptConfig) or not wants_teacher(settings.tta):
        memory = Graphs(main).memory() if can_record and settings.runtime.compile else None
        refuse_unexpected_weights(settings.model.sha256, fingerprints)
        method = build_method(settings, as_evaluated(segmenter, settings), memory=memory)
        return Models(method, (), fingerprints)
    update, accumulates = settings.model.update, settings.tta.optimizer.accumulate > 1
    if teacher is not None:
        refuse_settings_of_sd3(settings, teacher)
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
    refuse_unexpected_weights(settings.model.sha256, fingerprints)
    window = dataclasses.replace(settings.model.generative, max_pairs=pairs)
    kind: Any = METHODS[settings.tta.method]
    combined = kind(
        segmenter,
        teacher,
        dataclasses.replace(settings.model, generative=window),
        settings.tta.optimizer,
        seed=seed,
        precision=precision,
        memory=Graphs(main).memory() if can_record and compiled else None,
        ignored_C=ignored_C,
        options=options_of(settings.tta),
    )
    return Models(combined, placements, fingerprints)
