"""Train a segmenter on clean images: the losses of train.losses at full resolution, AdamW, poly schedule.

B images of a batch   C classes   H W px of a batch
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from segadapt import metrics, scoring, stream
from segadapt.config_training import TrainConfig, TrainGenerativeConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, of_split
from segadapt.datasets.cache import Cached
from segadapt.errors import UserError
from segadapt.losses import Objective, check_losses, class_weights_of
from segadapt.models.build import build_segmenter, refuse_unexpected_weights
from segadapt.models.discriminative.backbone import start_from
from segadapt.models.discriminative.load import make_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.set_up import fingerprint, set_up
from segadapt.protocol import FREE, versions, without
from segadapt.record import JsonLines, RunFolder, write_json
from segadapt.training.preview import write_preview
from segadapt.training.samples import batches, build_samples, check_range, check_transforms
from segadapt.wandb_mirror import Mirror, mirrored

LOG_EVERY = 50  # steps between two lines of the record


def poly(step: int, *, iters: int, warmup_iters: int, power: float) -> float:
    """Factor on the learning rate: linear warm-up, then (1 - progress)^power, 0 at the end ('chained' in mmengine)."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    return (1 - (step - warmup_iters) / max(1, iters - warmup_iters)) ** power


def parameter_groups(segmenter: NetSegmenter, *, lr: float, head_lr_factor: float, weight_decay: float) -> list[dict]:
    """Norms (by module type) without decay; the decode head faster; each parameter in exactly one group."""
    norms = {id(parameter) for parameter in segmenter.norm_parameters().values()}
    head = {id(parameter) for parameter in segmenter.head_parameters().values()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in segmenter.parameters().values():
        groups.setdefault((id(parameter) in norms, id(parameter) in head), []).append(parameter)
    return [
        {
            "params": params,
            "lr": lr * (head_lr_factor if in_head else 1),
            "weight_decay": 0 if is_norm else weight_decay,
        }
        for (is_norm, in_head), params in groups.items()
    ]


def validate(segmenter: NetSegmenter, dataset: Dataset, entries: list, *, settings: TrainConfig) -> metrics.Scores:
    """Score the segmenter in eval mode, as `evaluate` does under the same rule."""
    segmenter.eval()
    counts_CC = scoring.count(segmenter, dataset, entries, settings=settings)
    segmenter.train()
    return metrics.scores(counts_CC)


def labelled_split(settings: Any, split: str) -> Dataset:
    """The data set of another split. UserError: it has no labels."""
    data = of_split(settings.data, split)
    if data.kind == "files" and data.label_path is None:
        raise UserError("data.label_path=null: training needs labels. Set data.label_path.")
    return build_dataset(data)


def cached(dataset: Dataset, settings: Any) -> Dataset:
    """The data set, or with data.cache its decoded samples in memory."""
    return Cached(dataset, workers=settings.data.workers) if settings.data.cache else dataset


def check_settings(settings: TrainConfig | TrainGenerativeConfig) -> None:
    """UserError: a setting that training would pass over in silence, or a range upside down."""
    data = settings.data
    if data.corruptions:
        raise UserError(f"data.corruptions={data.corruptions}: training reads the clean images, so it would have no "
                        "effect. Set data.corruptions=[].")  # fmt: skip
    if data.limit is not None:
        raise UserError(f"data.limit={data.limit}: training draws from all images, so it would have no effect. Set "
                        "data.limit=null; train.iters and train.validation_images set the amount.")  # fmt: skip
    if settings.logging.predictions != "none":
        raise UserError(f"logging.predictions={settings.logging.predictions}: training writes no predictions. Set "
                        "logging.predictions=none, and `evaluate` the trained model.")  # fmt: skip
    for name in ("per_class", "confusion_picture", "submission"):
        value = getattr(settings.evaluate, name) if isinstance(settings, TrainConfig) else False
        if value not in (False, "none"):
            raise UserError(f"evaluate.{name}={value}: a validation writes scores alone. Leave it out, and `evaluate` "
                            "the trained model.")  # fmt: skip
    if settings.runtime.checkpoint_images is not None:
        raise UserError(f"runtime.checkpoint_images={settings.runtime.checkpoint_images}: training saves at its "
                        "validations, if at all. Set runtime.checkpoint_images=null.")  # fmt: skip
    if settings.experiment.any_version:
        raise UserError("experiment.any_version=true: training asks for no version, so it would have no effect. Set "
                        "experiment.any_version=false.")  # fmt: skip
    if isinstance(settings, TrainConfig):
        check_transforms(settings)
    else:
        check_range("train", settings.train, "scale_low", "scale_high")
        check_range("train", settings.train, "sigma_low", "sigma_high")
        check_range("train.broad", settings.train.broad, "grain_min_px", "grain_max_px")


@contextmanager
def open_folder(settings: TrainConfig | TrainGenerativeConfig, *, checkpoint: str | None = None) -> Iterator[RunFolder]:
    """The run's folder, locked, and cleared of what an earlier start left unless its `checkpoint` is there.

    UserError: it is another run's, or another process's.
    """
    folder = RunFolder.open(
        settings.logging.root,
        settings.experiment.name,
        run_id=settings.experiment.id,
        settings=without(asdict(settings), FREE),
    )
    with folder.locked():
        goes_on = checkpoint is not None and not settings.experiment.restart and (folder.path / checkpoint).is_file()
        folder.start_over(asdict(settings), keep=goes_on)
        yield folder


def build(settings: TrainConfig, classes: tuple[str, ...], main: torch.device) -> NetSegmenter:
    """The segmenter to train: the checkpoint, or where there is none random weights of the family and its config."""
    chosen = settings.model.discriminative
    if chosen.checkpoint is not None:
        if chosen.config:
            raise UserError(f"model.discriminative.config beside checkpoint={chosen.checkpoint}: it would have no "
                            "effect. Set checkpoint=null to start from random weights, or config={}.")  # fmt: skip
        segmenter = build_segmenter(chosen, len(classes), main)
        refuse_unexpected_weights(settings.model.sha256, {"discriminative": fingerprint(segmenter.net)})
        return start_from(chosen, segmenter)
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
    return start_from(chosen, segmenter)


def run(settings: TrainConfig) -> dict[str, Any]:
    """Train and save `model/` (a folder that from_pretrained reads) in the run folder; returns results.json's content.

    Raises:
        UserError: no labels, a setting without effect, an unknown one of the architecture, or a checkpoint that does
            not fit.
    """
    check_settings(settings)
    t, console, main = settings.train, Console(), set_up(settings.runtime)
    check_losses(t.losses, iters=t.iters)
    dataset, held_out = labelled_split(settings, settings.data.split), labelled_split(settings, t.validation_split)
    entries = stream.order(held_out, Task(0), seed=settings.experiment.seed, shuffle=True, limit=t.validation_images)
    segmenter = build(settings, dataset.classes, main)
    weights = class_weights_of(t.losses, dataset, dataset.keys(Task(0)), workers=settings.data.workers)
    objective = build_objective(settings, segmenter, weights.weights_C)
    trained_on = stream.order(dataset, Task(0), seed=0, shuffle=False, limit=None)
    began = time.perf_counter()
    with open_folder(settings) as folder, mirrored(settings, folder, job_type="train") as mirror:
        with JsonLines(folder.path / "records.jsonl") as records:
            samples = build_samples(settings, cached(dataset, settings), count=t.iters * t.batch_size)
            write_preview(folder.path / "preview", samples, count=t.preview)
            crops = batches(samples, t.batch_size, workers=settings.data.workers)
            scores = fit(segmenter, objective, crops, held_out, entries, settings, records, mirror, console)
        segmenter.eval()
        segmenter.net.to(getattr(torch, t.save_dtype))
        segmenter.save(folder.path / "model")
        results = {"steps": t.iters, "validation": {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc},
                   "per_class": dict(zip(dataset.classes, scores.iou_C.tolist(), strict=True)),
                   "class_weights": weights.shown(dataset.classes),
                   "training": {"images": len(trained_on), "keys_sha256": stream.order_hash(trained_on)},
                   "seconds": round(time.perf_counter() - began, 1), "seed": settings.experiment.seed,
                   "versions": versions(main)}  # fmt: skip
        write_json(folder.path / "results.json", results)
        mirror.summary({"validation/miou": scores.miou})
    console.print(f"saved {folder.path / 'model'}", highlight=False, soft_wrap=True)
    return results | {"folder": str(folder.path)}


def build_objective(settings: TrainConfig, segmenter: NetSegmenter, class_weights_C: torch.Tensor | None) -> Objective:
    """The losses of the settings, for the features that the segmenter is seen to have, on its device."""
    t, device = settings.train, segmenter.net.device
    with torch.no_grad():
        seen = segmenter.outputs(torch.zeros(1, 3, t.transforms.crop_px, t.transforms.crop_px, device=device))
    return Objective(
        t.losses,
        num_classes=seen.logits_BChw.shape[1],
        feature_channels=seen.features_BDyx.shape[1],
        class_weights_C=class_weights_C,
        seed=settings.experiment.seed,
    ).to(device)


def fit(
    segmenter: NetSegmenter,
    objective: Objective,
    crops: Iterable[tuple[Tensor, Tensor]],
    held_out: Dataset,
    entries: list,
    settings: TrainConfig,
    records: JsonLines,
    mirror: Mirror,
    console: Console,
) -> metrics.Scores:
    """The loop over random crops; returns the scores of the last validation."""
    t, main = settings.train, next(segmenter.net.parameters()).device
    groups = parameter_groups(segmenter, lr=t.lr, head_lr_factor=t.head_lr_factor, weight_decay=t.weight_decay)
    groups.append({"params": list(objective.parameters()), "lr": t.lr * t.head_lr_factor})
    optimizer = torch.optim.AdamW(groups, weight_decay=t.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: poly(step, iters=t.iters, warmup_iters=t.warmup_iters, power=t.power)
    )
    segmenter.train()
    torch.manual_seed(settings.experiment.seed)  # dropout and drop path draw from the global generator
    began, scores = time.perf_counter(), None
    for step, (image_B3HW, label_BHW) in enumerate(crops, start=1):
        with torch.autocast(main.type, torch.bfloat16, enabled=settings.runtime.precision == "bf16"):
            outputs = segmenter.outputs(image_B3HW.to(main, non_blocking=True))
            terms = objective(outputs, label_BHW.to(main, non_blocking=True), step=step)
        terms.total.backward()
        # once in a while: read the loss (a CPU-GPU sync), stop before a broken model is saved
        if is_read := step % LOG_EVERY == 0 or step % t.validate_every == 0 or step == t.iters:
            value = terms.total.item()
            moved = [*segmenter.net.parameters(), *objective.parameters()]
            grads = [parameter.grad for parameter in moved if parameter.grad is not None]
            if not math.isfinite(value) or not math.isfinite(norm := torch.nn.utils.get_total_norm(grads).item()):
                what = f"loss is {value}" if not math.isfinite(value) else f"norm of the gradient is {norm}"
                raise UserError(f"train.lr={t.lr}: the {what} at step {step}; expected a finite number. "
                                "Lower train.lr or set runtime.precision=fp32.")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.remember()
        schedule.step()
        if is_read:
            of_terms = {
                name: {"value": each.item(), "weight": terms.weights[name]} for name, each in terms.values.items()
            }
            records.append({"step": step, "loss": value, "terms": of_terms, "lr": schedule.get_last_lr()[0]})
            mirror.log({"train/loss": value}, step=step)
        if step % t.validate_every == 0 or step == t.iters:
            scores = validate(segmenter, held_out, entries, settings=settings)
            records.append({"step": step, "miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc})
            mirror.log({"validation/miou": scores.miou}, step=step)
            said = f"step {step}/{t.iters}: loss {value:.4f}, validation mIoU {100 * scores.miou:.2f} %"
            console.print(f"{said}, {time.perf_counter() - began:.0f} s", highlight=False)
    assert scores is not None
    return scores
