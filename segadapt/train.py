"""Train a segmenter on clean images: steps over global batches, validation, checkpoints; one process or several.

B images of a micro-batch   3 RGB   H W crop px   C classes
"""

import copy
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from segadapt import __version__
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError, counted
from segadapt.losses import ClassWeights, Objective, check_losses, losses_on, reduction_of
from segadapt.models.build import build_segmenter, refuse_unexpected_weights
from segadapt.models.discriminative.backbone import start_from
from segadapt.models.discriminative.make import explain_config, make_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.set_up import fingerprint
from segadapt.protocol import peak_memory_gib, rule_of, versions, without
from segadapt.record import RunFolder, write_json
from segadapt.rules import loaded_px
from segadapt.signals import Stopped, noted_signals
from segadapt.terminal import Terminal, open_terminal, percent
from segadapt.training.agreement import at_the_end
from segadapt.training.begin import Times, check_loop, gone_on_from, look, open_log, own_device, refuse_other_weights
from segadapt.training.images import Images, PixelScores, list_images, read_labels, shared_line
from segadapt.training.loop import Training
from segadapt.training.parallel import World, joined, refuse_parts
from segadapt.training.pipeline import refuse_pipeline
from segadapt.training.preparation import cached, check_settings
from segadapt.training.preview import write_preview
from segadapt.training.recorded import is_recorded, refuse_recorded
from segadapt.training.samples import build_samples
from segadapt.training.sizes import targets_of


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
    folder, kept, last, t = results["folder"], results["kept"], results["last"], settings.train
    said = f"{folder}/model: step {kept['step']}, validation mIoU {percent(results['validation']['miou'])} %"
    if kept["rule"] == "both":
        said += f"; {folder}/model_last: step {last['step']}, {percent(last['miou'])} %"
    if results["steps"] < t.iters:
        stale = counted(t.patience, "validation")
        said += f"; ended at step {results['steps']} of {t.iters}, {stale} without a better mIoU"
    said += f"; {results['rule']}; loss reduction {results['loss_reduction']}"
    terminal.console.print(said, highlight=False, soft_wrap=True, markup=False)
    terminal.result(said)
    terminal.event("result", **results)
    return results


def check_training(settings: TrainConfig) -> None:
    """UserError: settings of the loop that contradict each other or have no effect."""
    check_loop(settings)
    check_losses(settings.train.losses, iters=settings.train.iters)


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
        chosen.config,
        len(classes),
        classes=classes,
        seed=settings.experiment.seed,
        device=main,
        channel_order=chosen.channel_order,
        gradient_checkpointing=chosen.gradient_checkpointing,
    )
    return start_from(chosen, segmenter, console)


def build_objective(settings: TrainConfig, segmenter: NetSegmenter, class_weights: ClassWeights) -> Objective:
    """The losses of the settings, for the features that the segmenter is seen to have, on its device.

    An auxiliary head without its loss is frozen, so that it is in no parameter group. UserError: the auxiliary loss,
    that of earlier stages or that of masks is on, and the network has no such part.
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
    px = min(t.transforms.crop_px, 512)  # a look at what it gives; none of it depends on the size
    with torch.no_grad(), explain_config(f"no net that takes an image of {px} x {px} px"):
        seen = segmenter.outputs(torch.zeros(1, 3, px, px, device=device))
    if t.losses.masks.weight and seen.queries is None:
        raise UserError(f"train.losses.masks.weight={t.losses.masks.weight}, but {chosen} has no queries that answer "
                        "with masks. Choose other train/losses, or a file of model/discriminative that has: "
                        "mask2former_swin_t_scratch.")  # fmt: skip
    return Objective(
        t.losses,
        num_classes=seen.logits_BChw.shape[1],
        feature_channels=seen.features_BDyx.shape[1],
        class_weights_C=class_weights.weights_C,
        seed=settings.experiment.seed,
        num_queries=None if seen.queries is None else seen.queries.class_LBQn[-1].shape[1],
    ).to(device)


def unread_line(settings: TrainConfig, segmenter: NetSegmenter) -> str | None:
    """That outputs which the network has for its own loss are read by none that is on; None: all are."""
    family, config, on = segmenter.family, segmenter.net.config, losses_on(settings.train.losses)
    has = {"masks": family.has_queries, "stages": family.has_stages, "auxiliary": family.has_auxiliary(config)}
    unread = [name for name in has if has[name] and name not in on]
    if not unread:
        return None
    own = "knet" if family.has_stages else unread[0]
    return f"{config.model_type}: its own loss is train/losses={own}; now {', '.join(on)} alone"


def _run(settings: TrainConfig, world: World, terminal: Terminal) -> dict[str, Any]:
    """What is finished, or the training from its start or its last checkpoint."""
    images = list_images(settings)
    with ExitStack() as stack:
        folder, is_new, results = look(settings, images.origin, world, terminal, stack)
        if results is None:
            return _train(settings, world, terminal, folder, images, stack, is_new=is_new)
        return results


def _train(
    settings: TrainConfig,
    world: World,
    terminal: Terminal,
    folder: RunFolder,
    images: Images,
    stack: ExitStack,
    *,
    is_new: bool,
) -> dict[str, Any]:
    """The loop; then the kept weights and results.json. What is opened here is closed with the stack."""
    t, classes = settings.train, images.dataset.classes
    checkpoints, state = gone_on_from(settings, images.origin, world, terminal, folder)
    times = Times(state)
    segmenter, objective, origin = _built(settings, world, terminal, folder, images, state)
    said = {"is_new": is_new, "job_type": "train", "score": ("miou", "mIoU")}
    log = open_log(settings, world, terminal, folder, checkpoints.newest, state, stack, **said)
    whole = copy.deepcopy(segmenter) if world.has_parts else None
    training = Training(settings, segmenter, whole, objective, PixelScores(settings, images, world), world, log)
    stack.callback(training.close)
    if state is not None:
        training.load_state_dict(state["training"], checkpoints.path_of(checkpoints.newest))
    own = {**origin, "segadapt": __version__}
    samples = build_samples(settings, cached(images.dataset, settings), count=t.iters * t.batch_size)
    if world.is_main and state is None:
        write_preview(folder.path / "preview", samples, count=t.preview)
    asked = stack.enter_context(noted_signals())
    training.fit(samples, checkpoints, asked, lambda: {"origin": own, **times.state_dict()})
    kept = training.kept_scores
    shared = f", {images.num_shared} of which were trained on" if images.num_shared else ""
    chosen_on = f"mIoU of {len(images.entries)} images of {t.validation_split}{shared}"
    results = {
        "steps": training.step,
        **times.state_dict(),
        "validation": {name: kept[name] for name in ("miou", "macc", "aacc")},
        "rule": rule_of(settings),
        "loss_reduction": reduction_of(t.losses),
        "validated_on": {"split": t.validation_split, "images": len(images.entries), "trained_on": images.num_shared},
        "kept": {"rule": t.keep, "step": kept["step"], "chosen_on": "nothing" if t.keep == "last" else chosen_on},
        "last": without(training.last, ["iou"]),
        "best": without(training.best, ["iou"]),
        "per_class": dict(zip(classes, kept["iou"], strict=True)),
        "seed": settings.experiment.seed,
        "processes": world.size,
        "recorded": is_recorded(settings, segmenter),
        "tensors": training.group_sizes,
        **origin,
        "peak_memory_gib": peak_memory_gib(),
        "versions": versions(next(segmenter.net.parameters()).device),
    }
    if log is not None:
        training.save(folder.path, getattr(torch, t.save_dtype))
        write_json(folder.path / "results.json", results)
        checkpoints.clear()
        log.summary({"validation/miou": kept["miou"]})
    if (signum := at_the_end(world, asked)) is not None:
        raise Stopped(signum, f"{signum.name} after the last step; {folder.path} is finished")
    return results | {"folder": str(folder.path)}


def _built(
    settings: TrainConfig, world: World, terminal: Terminal, folder: RunFolder, images: Images, state: Any
) -> tuple[NetSegmenter, Objective, dict[str, Any]]:
    """Network and losses on this process's device, and what a checkpoint must agree with.

    The labels are read by the first process, before the first step alone: a run that goes on has read them.
    """
    segmenter = build(settings, images.dataset.classes, own_device(settings, world), console=terminal.console)
    _refuse_small_images(settings, segmenter)
    segmenter.net.config.loss_reduction = reduction_of(settings.train.losses)  # saved; told with scores
    refuse_recorded(settings, segmenter.net.device)
    refuse_parts(settings, world, segmenter.net)
    if world.kind == "pipeline":
        refuse_pipeline(settings, world, segmenter.net)
    _refuse_single_images(settings, world, segmenter)
    weights = {"weights_sha256": {"discriminative": fingerprint(segmenter.net)}}
    if state is None:
        if said := unread_line(settings, segmenter):
            terminal.warnings.print(said, highlight=False, soft_wrap=True, markup=False)
        if images.num_shared:
            said = shared_line(settings, images)
            terminal.warnings.print(said, highlight=False, soft_wrap=True, markup=False)
        class_weights = world.by_main(lambda: read_labels(settings, images))
    else:
        refuse_other_weights(folder, state, weights)
        class_weights = ClassWeights.read(state["origin"]["class_weights"])
    objective = build_objective(settings, segmenter, class_weights)
    return segmenter, objective, {
        **images.origin, **weights, "class_weights": class_weights.shown(images.dataset.classes)
    }  # fmt: skip


# --- refused before the first step ---


def _refuse_single_images(settings: TrainConfig, world: World, segmenter: NetSegmenter) -> None:
    """UserError: micro-batches of one image, of which the network's BatchNorm would have no statistics."""
    t, is_on_gpu = settings.train, segmenter.net.device.type == "cuda"
    is_single = t.batch_size == world.parts * t.accumulate and (world.parts == 1 or not is_on_gpu)  # else SyncBatchNorm
    if is_single and segmenter.family.pools_images(segmenter.net):
        chosen = segmenter.net.config.model_type
        who = counted(world.size, "process", "processes")
        who += f" / {world.together} on the same images" if world.together > 1 else ""
        raise UserError(f"train.batch_size={t.batch_size} with {who} x train.accumulate="
                        f"{t.accumulate} is one image a micro-batch; {chosen} pools whole images, and BatchNorm has "
                        "no statistics of a single one: expected 2 or more. Raise train.batch_size, or lower "
                        "train.accumulate or the number of processes.")  # fmt: skip


def _refuse_small_images(settings: TrainConfig, segmenter: NetSegmenter) -> None:
    """UserError: crops, or images of the validation, with a side that the network's convolutions do not take."""
    t, config = settings.train.transforms, segmenter.net.config
    least_px, narrow = segmenter.family.least_px(config), (t.crop_width_px or t.crop_px) < t.crop_px
    crop = "sizes_px" if t.sizes_px else "crop_width_px" if narrow else "crop_px"
    sides = {f"train.transforms.{crop}": min(map(min, targets_of(t))), "data.short_side_px": loaded_px(settings)}
    for name, side_px in sides.items():
        if side_px is not None and side_px < least_px:
            raise UserError(f"{name}: images of {side_px} px are too small for {config.model_type}; expected "
                            f"{least_px} px or more on each side. Raise it.")  # fmt: skip
