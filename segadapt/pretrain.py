"""Train the encoder of a SegFormer as a classifier of an image folder, for a segmenter to start from.

The loop is that of `train`; what differs stands in training/classification.py. Adaptation has no part in it.
"""

import copy
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save

from segadapt import __version__
from segadapt.config_pretraining import PretrainConfig
from segadapt.datasets.image_folder import ImageFolder, list_images
from segadapt.errors import UserError, counted
from segadapt.models.discriminative.backbone import start_from
from segadapt.models.discriminative.keymaps import nvidia_names
from segadapt.models.set_up import fingerprint
from segadapt.protocol import peak_memory_gib, versions
from segadapt.record import RunFolder, write_bytes, write_json
from segadapt.signals import Stopped, noted_signals
from segadapt.terminal import Terminal, open_terminal, percent
from segadapt.training.agreement import at_the_end
from segadapt.training.begin import Times, check_loop, gone_on_from, look, open_log, own_device, refuse_other_weights
from segadapt.training.classification import FAMILY, MOST, Accuracy, Classifier, SoftCrossEntropy, make_classifier
from segadapt.training.classified_images import TrainingImages
from segadapt.training.loop import Training
from segadapt.training.parallel import World, joined
from segadapt.training.samples import check_range

OFFICIAL = "mit.safetensors"  # in the run folder: encoder and head under the names of NVIDIA's mit_b*.pth


def run(settings: PretrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Train and save `model/` and `mit.safetensors` in the run folder; returns results.json's content.

    The same command goes on where an earlier start stopped, on a CPU to the same bits, unless experiment.restart=true.

    Args:
        console: see open_terminal.
    Raises:
        UserError: a folder that is not of classes, a damaged image, a setting without effect, weights that do not fit,
            or processes that torchrun started otherwise than the settings say.
        Stopped: a signal came; the same command goes on.
    """
    check_pretraining(settings)
    with joined(settings) as world:
        check_pairs(settings, world)
        terminal = open_terminal(settings.logging.terminal, console)
        if not world.is_main:
            terminal = Terminal(Console(quiet=True), Console(quiet=True))
        results = _run(settings, world, terminal)
    folder, scores = results["folder"], results["validation"]
    said = ", ".join(f"{name.replace('top', 'top-')} {percent(score)} %" for name, score in scores.items())
    said = f"{folder}/{OFFICIAL}: step {results['kept']['step']}, validation {said}"
    terminal.console.print(said, highlight=False, soft_wrap=True, markup=False)
    terminal.result(said)
    terminal.event("result", **results)
    return results


def check_pretraining(settings: PretrainConfig) -> None:
    """UserError: settings that contradict each other or have no effect."""
    t, chosen = settings.train, settings.model.discriminative
    check_loop(settings)
    for name in ("area", "aspect"):
        check_range("train.transforms", t.transforms, f"{name}_low", f"{name}_high")
    if t.transforms.image_px > t.transforms.validation_short_side_px:
        raise UserError(f"train.transforms.validation_short_side_px={t.transforms.validation_short_side_px}: expected "
                        f"image_px={t.transforms.image_px} or more, as the centre is cut to that. Raise "
                        f"train.transforms.validation_short_side_px to {t.transforms.image_px} or more, or lower "
                        "image_px.")  # fmt: skip
    for name, value, neutral in (
        ("model.discriminative.family", chosen.family, FAMILY),
        ("model.discriminative.checkpoint", chosen.checkpoint, None),
        ("model.discriminative.short_side_px", chosen.short_side_px, None),
        ("model.discriminative.channel_order", chosen.channel_order, None),
        ("logging.predictions", settings.logging.predictions, "none"),
        ("runtime.checkpoint_images", settings.runtime.checkpoint_images, None),
    ):
        if value != neutral:
            raise UserError(f"{name}={value}: `pretrain` trains the encoder of a {FAMILY} from random weights or from "
                            "model.discriminative.backbone, and this would have no effect. Set it to "
                            f"{'null' if neutral is None else neutral}.")  # fmt: skip


def check_pairs(settings: PretrainConfig, world: World) -> None:
    """UserError: micro-batches of one image, which has no partner to be mixed with."""
    t = settings.train
    if t.transforms.mixing and t.batch_size == world.size * t.accumulate:
        who = counted(world.size, "process", "processes")
        raise UserError(f"train.batch_size={t.batch_size} with {who} x train.accumulate={t.accumulate} is one image a "
                        "micro-batch, which cannot be mixed with another; expected 2 or more. Raise train.batch_size, "
                        "or set train.transforms.mixing=0.")  # fmt: skip


def build(settings: PretrainConfig, classes: tuple[str, ...], main: torch.device, console: Console) -> Classifier:
    """Random weights, or where a backbone is given its encoder under a random classifier; the console says it."""
    chosen = settings.model.discriminative
    how = {"seed": settings.experiment.seed, "gradient_checkpointing": chosen.gradient_checkpointing}
    classifier = make_classifier(chosen.config, classes, device=main, **how)
    start_from(chosen, classifier, console)
    return classifier


def origin_of(images: ImageFolder, held_out: ImageFolder) -> dict[str, Any]:
    """What a run that goes on must find unchanged."""
    return {
        "training": {"images": len(images.keys), "keys_sha256": images.keys_hash()},
        "validation_order_sha256": held_out.keys_hash(),
        "manifest_sha256": {"training": images.manifest_hash(), "validation": held_out.manifest_hash()},
    }


def _run(settings: PretrainConfig, world: World, terminal: Terminal) -> dict[str, Any]:
    """What is finished, or the training from its start or its last checkpoint."""
    data, t = settings.data, settings.train
    images = list_images(data.data_root, data.split, "data.split")
    held_out = list_images(data.data_root, t.validation_split, "train.validation_split", classes=images.classes)
    origin = origin_of(images, held_out)
    with ExitStack() as stack:
        folder, is_new, results = look(settings, origin, world, terminal, stack)
        if results is None:
            return _train(settings, world, terminal, folder, (images, held_out), origin, stack, is_new=is_new)
        return results


def _train(
    settings: PretrainConfig,
    world: World,
    terminal: Terminal,
    folder: RunFolder,
    both: tuple[ImageFolder, ImageFolder],
    origin: dict[str, Any],
    stack: ExitStack,
    *,
    is_new: bool,
) -> dict[str, Any]:
    """The loop; then the kept weights and results.json. What is opened here is closed with the stack."""
    t, (images, held_out) = settings.train, both
    num_shared = len(held_out.keys) if t.validation_split == settings.data.split else 0
    checkpoints, state = gone_on_from(settings, origin, world, terminal, folder)
    times = Times(state)
    main = own_device(settings, world)
    classifier = build(settings, images.classes, main, terminal.console)
    weights = {"weights_sha256": {"discriminative": fingerprint(classifier.net)}}
    if state is not None:
        refuse_other_weights(folder, state, weights)
    else:
        if num_shared:
            said = (f"train.validation_split={t.validation_split}: the images are those that are trained on; their "
                    "scores say how well these were learned, not how others are classified. Set "
                    "train.validation_split to a split of its own, unless that is meant.")  # fmt: skip
            terminal.warnings.print(said, highlight=False, soft_wrap=True, markup=False)
        world.by_main(lambda: _verify(settings, both, terminal))  # the others wait for it
    said = {"is_new": is_new, "job_type": "pretrain", "score": ("top1", "top-1")}
    log = open_log(settings, world, terminal, folder, checkpoints.newest, state, stack, **said)
    training = Training(
        settings,
        classifier,
        copy.deepcopy(classifier) if world.has_parts else None,
        SoftCrossEntropy(),
        Accuracy(settings, held_out, world),
        world,
        log,
    )
    stack.callback(training.close)
    if state is not None:
        training.load_state_dict(state["training"], checkpoints.path_of(checkpoints.newest))
    asked = stack.enter_context(noted_signals())
    samples = TrainingImages(settings, images, count=t.iters * t.batch_size)
    whole_origin = {**origin, **weights}
    own = {**whole_origin, "segadapt": __version__}
    training.fit(samples, checkpoints, asked, lambda: {"origin": own, **times.state_dict()})
    kept = training.kept_scores
    results = {
        "steps": training.step,
        **times.state_dict(),
        "validation": {name: score for name, score in kept.items() if name != "step"},
        "validated_on": {"split": t.validation_split, "images": len(held_out.keys), "trained_on": num_shared},
        "kept": {"rule": t.keep, "step": kept["step"],
                 "chosen_on": "nothing" if t.keep == "last" else f"top-1 of all images of {t.validation_split}"},
        "last": training.last,
        "best": training.best,
        "classes": images.classes,
        "seed": settings.experiment.seed,
        "processes": world.size,
        "tensors": training.group_sizes,
        **whole_origin,
        "peak_memory_gib": peak_memory_gib(),
        "versions": versions(main),
    }  # fmt: skip
    if log is not None:
        training.save(folder.path, getattr(torch, t.save_dtype))
        export(folder)
        write_json(folder.path / "results.json", results)
        checkpoints.clear()
        log.summary({f"validation/{name}": score for name, score in results["validation"].items()})
    if (signum := at_the_end(world, asked)) is not None:
        raise Stopped(signum, f"{signum.name} after the last step; {folder.path} is finished")
    return results | {"folder": str(folder.path)}


def export(folder: RunFolder) -> None:
    """`model` under the names of NVIDIA's files, as OFFICIAL."""
    state = nvidia_names(load_file(folder.path / "model" / "model.safetensors"))
    write_bytes(folder.path / OFFICIAL, save(state, metadata={"format": "pt"}))


def _verify(settings: PretrainConfig, both: tuple[ImageFolder, ImageFolder], terminal: Terminal) -> None:
    """Look at every file once. UserError: a damaged one."""
    images, _ = both
    if len(images.classes) <= MOST:
        said = f"{len(images.classes)} classes: top-{MOST} accuracy would be 1 whatever is predicted, and is left out"
        terminal.warnings.print(said, highlight=False, soft_wrap=True, markup=False)
    for folder in both:
        folder.verify(workers=settings.data.workers, max_pixels=settings.data.max_pixels)
