"""Train a segmenter on clean images: cross-entropy at full resolution, AdamW, poly schedule.

B images of a batch   C classes   s crop px   h w logits, ceil(px / 4)
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segadapt import metrics, stream
from segadapt.config_training import TrainConfig, TrainGenerativeConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset
from segadapt.datasets.cache import Cached
from segadapt.errors import UserError
from segadapt.models.build import build_segmenter, refuse_unexpected_weights
from segadapt.models.discriminative.backbone import start_from
from segadapt.models.discriminative.load import make_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.set_up import fingerprint, set_up
from segadapt.protocol import FREE, versions, without
from segadapt.record import JsonLines, RunFolder, write_json
from segadapt.training.augment import Crops, light_of, places_of_classes
from segadapt.wandb_mirror import Mirror, mirrored

LOG_EVERY = 50  # steps between two lines of the record


def poly(step: int, *, iters: int, warmup_iters: int, power: float) -> float:
    """Factor on the learning rate: linear warm-up, then (1 - progress)^power, 0 at the end ('chained' in mmengine)."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    return (1 - (step - warmup_iters) / max(1, iters - warmup_iters)) ** power


def cross_entropy(logits_BCss: Tensor, label_Bss: Tensor, is_counted_Bss: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[label] over the pixels that count; 0 where there are none.

    As F.cross_entropy, which refuses images on CUDA under deterministic algorithms.

    Args:
        label_Bss: int64, 0..C-1 where a pixel counts, anything elsewhere.
        is_counted_Bss: bool.
    """
    index_B1ss = label_Bss.masked_fill(~is_counted_Bss, 0)[:, None]
    own_Bss = logits_BCss.log_softmax(dim=1).gather(1, index_B1ss)[:, 0]
    return -own_Bss.masked_fill(~is_counted_Bss, 0).sum() / is_counted_Bss.sum().clamp(min=1)


def segmentation_loss(logits_BChw: Tensor, label_Bss: Tensor) -> Tensor:
    """Cross-entropy of logits resized to the label, mean over pixels that are not 255; 0 where there are none."""
    logits_BCss = F.interpolate(logits_BChw, size=label_Bss.shape[1:], mode="bilinear", align_corners=False)
    return cross_entropy(logits_BCss, label_Bss, label_Bss != 255)


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


@torch.no_grad()
def validate(segmenter: NetSegmenter, dataset: Dataset, entries: list, *, settings: TrainConfig) -> metrics.Scores:
    """Score the segmenter in eval mode and the run's precision, as `evaluate` does."""
    segmenter.eval()
    device = next(segmenter.net.parameters()).device
    matrix = metrics.ConfusionMatrix(len(dataset.classes), device)
    data = settings.data
    for sample in stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers):
        assert sample.label_HW is not None
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.runtime.precision == "bf16"):
            logits_Chw = segmenter.logits(sample.image_3HW[None].to(device))[0]
        matrix.update(metrics.predict_at_label_size(logits_Chw, sample.size_px), sample.label_HW.to(device))
    segmenter.train()
    return metrics.scores(matrix.counts())


def labelled_split(settings: Any, split: str) -> Dataset:
    """The data set of another split. UserError: it has no labels."""
    data = copy.deepcopy(settings.data)
    data.split = split
    if data.kind == "files" and data.label_path is None:
        raise UserError("data.label_path=null: training needs labels. Set data.label_path.")
    return build_dataset(data)


def cached(dataset: Dataset, settings: Any) -> Dataset:
    """The data set, or with data.cache its decoded samples in memory."""
    return Cached(dataset, workers=settings.data.workers) if settings.data.cache else dataset


def check_settings(settings: TrainConfig | TrainGenerativeConfig) -> None:
    """UserError: a setting that training would pass over in silence, or a range upside down."""
    data, t = settings.data, settings.train
    if data.corruptions:
        raise UserError(f"data.corruptions={data.corruptions}: training reads the clean images, so it would have no "
                        "effect. Set data.corruptions=[].")  # fmt: skip
    if data.limit is not None:
        raise UserError(f"data.limit={data.limit}: training draws from all images, so it would have no effect. Set "
                        "data.limit=null; train.iters and train.validation_images set the amount.")  # fmt: skip
    if settings.logging.predictions != "none":
        raise UserError(f"logging.predictions={settings.logging.predictions}: training writes no predictions. Set "
                        "logging.predictions=none, and `evaluate` the trained model.")  # fmt: skip
    if settings.runtime.checkpoint_images is not None:
        raise UserError(f"runtime.checkpoint_images={settings.runtime.checkpoint_images}: training saves at its "
                        "validations, if at all. Set runtime.checkpoint_images=null.")  # fmt: skip
    if settings.experiment.any_version:
        raise UserError("experiment.any_version=true: training asks for no version, so it would have no effect. Set "
                        "experiment.any_version=false.")  # fmt: skip
    for name in ("scale", "sigma"):
        low, high = getattr(t, f"{name}_low", 0), getattr(t, f"{name}_high", 0)  # `train` has no sigma
        if low > high:
            raise UserError(f"train.{name}_low={low} is above train.{name}_high={high}: expected the lower end of a "
                            "range and its upper end. Swap them.")  # fmt: skip
    if t.broad.grain_min_px > t.broad.grain_max_px:
        raise UserError(f"train.broad.grain_min_px={t.broad.grain_min_px} is above train.broad.grain_max_px="
                        f"{t.broad.grain_max_px}: expected the smallest and the largest cell. Swap them.")  # fmt: skip


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
    dataset, held_out = labelled_split(settings, settings.data.split), labelled_split(settings, t.validation_split)
    entries = stream.order(held_out, Task(0), seed=settings.experiment.seed, shuffle=True, limit=t.validation_images)
    segmenter = build(settings, dataset.classes, main)
    began = time.perf_counter()
    with open_folder(settings) as folder, mirrored(settings, folder, job_type="train") as mirror:
        with JsonLines(folder.path / "records.jsonl") as records:
            scores = fit(segmenter, cached(dataset, settings), held_out, entries, settings, records, mirror, console)
        segmenter.eval()
        segmenter.net.to(getattr(torch, t.save_dtype))
        segmenter.save(folder.path / "model")
        results = {"steps": t.iters, "validation": {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc},
                   "per_class": dict(zip(dataset.classes, scores.iou_C.tolist(), strict=True)),
                   "seconds": round(time.perf_counter() - began, 1), "seed": settings.experiment.seed,
                   "versions": versions(main)}  # fmt: skip
        write_json(folder.path / "results.json", results)
        mirror.summary({"validation/miou": scores.miou})
    console.print(f"saved {folder.path / 'model'}", highlight=False, soft_wrap=True)
    return results | {"folder": str(folder.path)}


def fit(
    segmenter: NetSegmenter,
    dataset: Dataset,
    held_out: Dataset,
    entries: list,
    settings: TrainConfig,
    records: JsonLines,
    mirror: Mirror,
    console: Console,
) -> metrics.Scores:
    """The loop over random crops; returns the scores of the last validation."""
    t, main = settings.train, next(segmenter.net.parameters()).device
    crops = Crops(
        dataset,
        count=t.iters * t.batch_size,
        seed=settings.experiment.seed,
        short_side_px=settings.data.short_side_px,
        crop_px=t.crop_px,
        scale=(t.scale_low, t.scale_high),
        light=light_of(use_photometric=t.photometric, broad_settings=t.broad),
        places=places_of_classes(dataset, workers=settings.data.workers) if t.balanced else None,
    )
    loader = DataLoader(crops, t.batch_size, num_workers=settings.data.workers, worker_init_fn=stream.one_thread_each)
    optimizer = torch.optim.AdamW(
        parameter_groups(segmenter, lr=t.lr, head_lr_factor=t.head_lr_factor, weight_decay=t.weight_decay)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: poly(step, iters=t.iters, warmup_iters=t.warmup_iters, power=t.power)
    )
    segmenter.train()
    torch.manual_seed(settings.experiment.seed)  # dropout and drop path draw from the global generator
    began, scores = time.perf_counter(), None
    for step, (image_B3ss, label_Bss) in enumerate(loader, start=1):
        with torch.autocast(main.type, torch.bfloat16, enabled=settings.runtime.precision == "bf16"):
            logits_BChw = segmenter.logits(image_B3ss.to(main, non_blocking=True))
        loss = segmentation_loss(logits_BChw, label_Bss.to(main, non_blocking=True))
        loss.backward()
        # once in a while: read the loss (a CPU-GPU sync), stop before a broken model is saved
        if is_read := step % LOG_EVERY == 0 or step % t.validate_every == 0 or step == t.iters:
            value = loss.item()
            grads = [parameter.grad for parameter in segmenter.net.parameters() if parameter.grad is not None]
            if not math.isfinite(value) or not math.isfinite(norm := torch.nn.utils.get_total_norm(grads).item()):
                what = f"loss is {value}" if not math.isfinite(value) else f"norm of the gradient is {norm}"
                raise UserError(f"train.lr={t.lr}: the {what} at step {step}; expected a finite number. "
                                "Lower train.lr or set runtime.precision=fp32.")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if is_read:
            records.append({"step": step, "loss": value, "lr": schedule.get_last_lr()[0]})
            mirror.log({"train/loss": value}, step=step)
        if step % t.validate_every == 0 or step == t.iters:
            scores = validate(segmenter, held_out, entries, settings=settings)
            records.append({"step": step, "miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc})
            mirror.log({"validation/miou": scores.miou}, step=step)
            said = f"step {step}/{t.iters}: loss {loss.item():.4f}, validation mIoU {100 * scores.miou:.2f} %"
            console.print(f"{said}, {time.perf_counter() - began:.0f} s", highlight=False)
    assert scores is not None
    return scores
