"""Train a segmenter on clean images: steps over global batches, validation, checkpoints; one process or several.

B images of a micro-batch   3 RGB   H W crop px   C classes
"""

import copy
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from segadapt import __version__, stream
from segadapt.checkpoint import Checkpoints
from segadapt.config_training import TrainConfig
from segadapt.datasets import Dataset, Task
from segadapt.errors import UserError
from segadapt.losses import ClassWeights, Objective, check_losses, class_weights_of
from segadapt.models.build import build_segmenter, refuse_unexpected_weights
from segadapt.models.discriminative.backbone import start_from
from segadapt.models.discriminative.load import make_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.set_up import fingerprint, set_up
from segadapt.protocol import peak_memory_gib, versions, without
from segadapt.record import RunFolder, write_json
from segadapt.resume import earlier_state, finished_results
from segadapt.signals import Stopped, noted_signals
from segadapt.terminal import Terminal, open_terminal, percent
from segadapt.training.log import Log
from segadapt.training.loop import Training
from segadapt.training.parallel import World, joined
from segadapt.training.preparation import cached, check_settings, found_folder, labelled_split
from segadapt.training.preview import write_preview
from segadapt.training.samples import build_samples
from segadapt.training.schedule import check_schedule
from segadapt.wandb_mirror import mirrored


def run(settings: TrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Train and save `model/` (a folder that from_pretrained reads) in the run folder; returns results.json's content.

    The same command goes on where an earlier start stopped, on a CPU to the same bits, unless experiment.restart=true.

    Args:
        console: see open_terminal.
    Raises:
        UserError: no labels, a damaged or unknown one, a setting without effect, an unknown one of the architecture, a
            checkpoint that does not fit, or processes that torchrun started otherwise than the settings say.
        Stopped: a signal came; the same command goes on.
    """
    check_settings(settings)
    check_training(settings)
    with joined(settings) as world:
        terminal = open_terminal(settings.logging.terminal, console)
        if not world.is_main:
            terminal = Terminal(Console(quiet=True), Console(quiet=True))
        results = _run(settings, world, terminal)
    kept, folder = results["validation"], results["folder"]
    said = f"{folder}/model: step {results['kept']['step']}, validation mIoU {percent(kept['miou'])} %"
    terminal.console.print(said, highlight=False, soft_wrap=True, markup=False)
    terminal.result(said)
    terminal.event("result", **results)
    return results


def check_training(settings: TrainConfig) -> None:
    """UserError: settings of the loop that contradict each other or have no effect."""
    t = settings.train
    check_schedule(t.schedule, iters=t.iters)
    check_losses(t.losses, iters=t.iters)
    validations = -(-t.iters // t.validate_every)
    if t.patience >= validations:
        raise UserError(f"train.patience={t.patience}, but there are {validations} validations (train.iters={t.iters}, "
                        f"train.validate_every={t.validate_every}): it would have no effect. Validate more often, or "
                        "set train.patience=0.")  # fmt: skip
    lowest = t.optimizer.lr * min(1, t.optimizer.head_lr_factor)
    if t.schedule.decay in ("poly", "cosine") and t.schedule.min_lr > lowest:
        raise UserError(f"train.schedule.min_lr={t.schedule.min_lr} is above {lowest:g}, where a rate starts: it would "
                        "rise. Lower it, or raise train.optimizer.lr.")  # fmt: skip
    if t.checkpoint_every is not None and t.checkpoint_every > t.iters:
        raise UserError(f"train.checkpoint_every={t.checkpoint_every} is above train.iters={t.iters}: it would have no "
                        "effect. Lower it, or set it to null.")  # fmt: skip


def build(
    settings: TrainConfig, classes: tuple[str, ...], main: torch.device, *, console: Console | None = None
) -> NetSegmenter:
    """The segmenter to train: the checkpoint, or where there is none random weights of the family and its config.

    console: where it is said what was read into the encoder; None: nowhere.
    """
    chosen = settings.model.discriminative
    if chosen.checkpoint is not None:
        segmenter = build_segmenter(chosen, len(classes), main)
        refuse_unexpected_weights(settings.model.sha256, {"discriminative": fingerprint(segmenter.net)})
        return start_from(chosen, segmenter, console)
    refuse_unexpected_weights(settings.model.sha256, {})
    segmenter = make_segmenter(
        chosen.family,
        dict(chosen.config) | {"id2label": dict(enumerate(classes))},
        len(classes),
        seed=settings.experiment.seed,
        device=main,
        channel_order=chosen.channel_order,
        gradient_checkpointing=chosen.gradient_checkpointing,
    )
    return start_from(chosen, segmenter, console)


def build_objective(settings: TrainConfig, segmenter: NetSegmenter, class_weights: ClassWeights) -> Objective:
    """The losses of the settings, for the features that the segmenter is seen to have, on its device.

    An auxiliary head without its loss is frozen, so that it is in no parameter group. UserError: the auxiliary loss, or
    that of earlier stages, is on, and the network has no such part.
    """
    t, device, family = settings.train, segmenter.net.device, segmenter.family
    chosen = segmenter.net.config.model_type
    has_auxiliary = family.has_auxiliary(segmenter.net.config)
    if t.losses.auxiliary.weight and not has_auxiliary:
        raise UserError(f"train.losses.auxiliary.weight={t.losses.auxiliary.weight}, but {chosen} has no auxiliary "
                        "head. Set it to 0, or choose another network.")  # fmt: skip
    if t.losses.stages.weight and not family.has_stages:
        raise UserError(f"train.losses.stages.weight={t.losses.stages.weight}, but {chosen} has one output, and no "
                        "stages before it. Set it to 0, or choose segadapt_knet.")  # fmt: skip
    if has_auxiliary and family.auxiliary_head is not None and not t.losses.auxiliary.weight:
        segmenter.net.get_submodule(family.auxiliary_head).requires_grad_(False)
    with torch.no_grad():
        seen = segmenter.outputs(torch.zeros(1, 3, t.transforms.crop_px, t.transforms.crop_px, device=device))
    return Objective(
        t.losses,
        num_classes=seen.logits_BChw.shape[1],
        feature_channels=seen.features_BDyx.shape[1],
        class_weights_C=class_weights.weights_C,
        seed=settings.experiment.seed,
    ).to(device)


def _run(settings: TrainConfig, world: World, terminal: Terminal) -> dict[str, Any]:
    """What is finished, or the training from its start or its last checkpoint."""
    main, data = set_up(settings.runtime), settings.data
    main = torch.device(main.type, world.local_rank) if main.type == "cuda" else main
    dataset = labelled_split(settings, data.split)
    held_out = labelled_split(settings, settings.train.validation_split)
    entries = stream.order(
        held_out, Task(0), seed=settings.experiment.seed, shuffle=True, limit=settings.train.validation_images
    )
    drawn = [stream.Entry(Task(0), key) for key in dataset.keys(Task(0))]
    if world.is_main:  # unknown labels and damaged files, before the first step
        for read, of_it in ((dataset, drawn), (held_out, entries)):
            stream.verify(read, of_it, workers=data.workers)
    if len(dataset.classes) < 2:
        raise UserError(f"data.classes={settings.data.classes} has one class: a softmax over it is always right, and "
                        "nothing would be learned. Name the background as a class too.")  # fmt: skip
    segmenter = build(settings, dataset.classes, main, console=terminal.console)
    losses = settings.train.losses
    class_weights = class_weights_of(losses, dataset, [entry.key for entry in drawn], workers=data.workers)
    objective = build_objective(settings, segmenter, class_weights)
    origin = {
        "training": {"images": len(drawn), "keys_sha256": stream.order_hash(drawn)},
        "validation_order_sha256": stream.order_hash(entries),
        "manifest_sha256": {"training": stream.manifest_hash(dataset, drawn),
                            "validation": stream.manifest_hash(held_out, entries)},
        "weights_sha256": {"discriminative": fingerprint(segmenter.net)},
    }  # fmt: skip
    with ExitStack() as stack:
        folder = found_folder(settings) if world.is_main else None
        if folder is not None:
            stack.enter_context(folder.locked())
        folder = world.of_main(folder)  # the others begin once it is the first one's
        results = None if settings.experiment.restart else finished_results(folder, origin)
        if results is not None:
            terminal.console.print(f"{folder.path} is finished; experiment.restart=true would start anew",
                                   highlight=False, soft_wrap=True)  # fmt: skip
            return results | {"folder": str(folder.path)}
        more = {**origin, "class_weights": class_weights.shown(dataset.classes)}
        return _train(settings, world, terminal, folder, segmenter, objective, dataset, held_out, entries, more, stack)


def _train(
    settings: TrainConfig,
    world: World,
    terminal: Terminal,
    folder: RunFolder,
    segmenter: NetSegmenter,
    objective: Objective,
    dataset: Dataset,
    held_out: Dataset,
    entries: list[stream.Entry],
    origin: Mapping[str, Any],
    stack: ExitStack,
) -> dict[str, Any]:
    """The loop; then the kept weights and results.json. What is opened here is closed with the stack."""
    t, began = settings.train, time.perf_counter()
    checkpoints = Checkpoints(folder.path, seconds=settings.runtime.checkpoint_seconds, images=t.checkpoint_every)
    state = None
    if not settings.experiment.restart:
        state = earlier_state(checkpoints, folder, settings, origin, terminal.console, unit="step")
    _refuse_other_disks(world, 0 if state is None else state["training"]["step"])
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z") if state is None else state["started"]
    log = None
    if world.is_main:
        folder.start_over(asdict(settings), keep=state is not None)
        terminal.console.print(f"run folder {folder.path}", highlight=False, soft_wrap=True)
        if state is not None:
            terminal.console.print(f"goes on after step {checkpoints.newest} of {t.iters}", highlight=False)
        mirror = stack.enter_context(mirrored(settings, folder, job_type="train"))
        log = stack.enter_context(
            Log(folder.path, mirror, terminal, iters=t.iters, batch_size=t.batch_size, keep=state,
                step=checkpoints.newest)
        )  # fmt: skip
        log.begin(started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=checkpoints.newest, segadapt=__version__)
    whole = copy.deepcopy(segmenter) if world.kind == "fsdp" else None
    training = Training(settings, segmenter, whole, objective, held_out, entries, world, log)
    if state is not None:
        training.load_state_dict(state["training"])
    more = {"origin": {**origin, "segadapt": __version__}, "started": started}
    samples = build_samples(settings, cached(dataset, settings), count=t.iters * t.batch_size)
    if world.is_main and state is None:
        write_preview(folder.path / "preview", samples, count=t.preview)
    asked = stack.enter_context(noted_signals())
    training.fit(samples, checkpoints, asked, more)
    kept = training.kept_scores
    chosen_on = f"mIoU of {len(entries)} images of {t.validation_split}" if t.keep == "best" else "nothing"
    results = {
        "steps": training.step,
        "started": started,
        "seconds": round(time.perf_counter() - began, 1),
        "validation": {name: kept[name] for name in ("miou", "macc", "aacc")},
        "kept": {"rule": t.keep, "step": kept["step"], "chosen_on": chosen_on},
        "last": without(training.validations[-1], ["iou"]),
        "best": without(training.best, ["iou"]),
        "per_class": dict(zip(dataset.classes, kept["iou"], strict=True)),
        "seed": settings.experiment.seed,
        "processes": world.size,
        "tensors": training.group_sizes,
        **origin,
        "peak_memory_gib": peak_memory_gib(),
        "versions": versions(next(segmenter.net.parameters()).device),
    }
    if world.is_main:
        training.save(folder.path / "model", getattr(torch, t.save_dtype))
        write_json(folder.path / "results.json", results)
        checkpoints.clear()
        mirror.summary({"validation/miou": kept["miou"]})
    if asked.signum is not None:
        raise Stopped(asked.signum, f"{asked.signum.name} after the last step; {folder.path} is finished")
    return results | {"folder": str(folder.path)}


def _refuse_other_disks(world: World, step: int) -> None:
    """UserError: the first process found a checkpoint that this one does not see."""
    if (found := world.of_main(step)) != step:
        raise UserError(f"logging.root: the first process goes on from step {found}, this one from {step}; expected "
                        "one folder that all hosts share. Set logging.root to such a folder.")  # fmt: skip
