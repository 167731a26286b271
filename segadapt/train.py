"""Train a segmenter on clean images: cross-entropy at full resolution, AdamW, poly schedule.

B images of a batch   C classes   s crop px   h w logits, ceil(px / 4)
"""

import copy
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segadapt import metrics, stream
from segadapt.augment import Crops, keep_light, photometric
from segadapt.config import TrainConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset
from segadapt.datasets.cache import Cached
from segadapt.errors import UserError
from segadapt.models.build import build_segmenter, set_up
from segadapt.models.discriminative.segformer import Segmenter, build_segformer
from segadapt.protocol import versions
from segadapt.record import JsonLines, RunFolder, write_json
from segadapt.wandb_mirror import open_mirror

LOG_EVERY = 50  # steps between two lines of the record


def poly(step: int, *, iters: int, warmup_iters: int, power: float) -> float:
    """Factor on the learning rate: linear warm-up, then (1 - progress)^power, 0 at the end ('chained' in mmengine)."""
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    return (1 - (step - warmup_iters) / max(1, iters - warmup_iters)) ** power


def segmentation_loss(logits_BChw: Tensor, label_Bss: Tensor) -> Tensor:
    """Cross-entropy of logits resized to the label, mean over pixels that are not 255; 0 where there are none."""
    logits_BCss = F.interpolate(logits_BChw, size=label_Bss.shape[1:], mode="bilinear", align_corners=False)
    summed = F.cross_entropy(logits_BCss, label_Bss, ignore_index=255, reduction="sum")
    return summed / (label_Bss != 255).sum().clamp(min=1)


def parameter_groups(segmenter: Segmenter, *, lr: float, head_lr_factor: float, weight_decay: float) -> list[dict]:
    """Norms (by module type) without decay; the decode head faster; each parameter in exactly one group."""
    norms = {id(parameter) for parameter in segmenter.norm_parameters().values()}
    head = {id(parameter) for parameter in segmenter.net.decode_head.parameters()}
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
def validate(segmenter: Segmenter, dataset: Dataset, entries: list, *, settings: TrainConfig) -> metrics.Scores:
    """Score the segmenter in eval mode, as `evaluate` does."""
    segmenter.eval()
    device = next(segmenter.net.parameters()).device
    matrix = metrics.ConfusionMatrix(len(dataset.classes), device)
    data = settings.data
    for sample in stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers):
        assert sample.label_HW is not None
        logits_Chw = segmenter.logits(sample.image_3HW[None].to(device))[0]
        matrix.update(metrics.predict_at_label_size(logits_Chw, sample.size_px), sample.label_HW.to(device))
    segmenter.net.train()
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


def run(settings: TrainConfig) -> dict[str, Any]:
    """Train and save `model/` (a folder that from_pretrained reads) in the run folder; returns results.json's content.

    Raises:
        UserError: no labels, an unknown setting of the architecture, or a checkpoint that does not fit.
    """
    t, data, console, main = settings.train, settings.data, Console(), set_up(settings.runtime)
    dataset, held_out = labelled_split(settings, data.split), labelled_split(settings, t.validation_split)
    entries = stream.order(held_out, Task(0), seed=settings.experiment.seed, shuffle=True, limit=t.validation_images)
    if settings.model.discriminative.config:
        config = dict(settings.model.discriminative.config) | {"id2label": dict(enumerate(dataset.classes))}
        segmenter = build_segformer(config, len(dataset.classes), seed=settings.experiment.seed, device=main)
    else:
        segmenter = build_segmenter(settings.model.discriminative, len(dataset.classes), main)
    identity = {name: value for name, value in asdict(settings).items() if name != "logging"}
    folder = RunFolder.open(
        settings.logging.root, settings.experiment.name, run_id=settings.experiment.id, settings=identity
    )
    folder.start_over(asdict(settings))
    crops = Crops(
        cached(dataset, settings),
        count=t.iters * t.batch_size,
        seed=settings.experiment.seed,
        short_side_px=data.short_side_px,
        crop_px=t.crop_px,
        scale=(t.scale_low, t.scale_high),
        light=photometric if t.photometric else keep_light,
    )
    loader = DataLoader(crops, t.batch_size, num_workers=data.workers, worker_init_fn=stream.one_thread_each)
    optimizer = torch.optim.AdamW(
        parameter_groups(segmenter, lr=t.lr, head_lr_factor=t.head_lr_factor, weight_decay=t.weight_decay)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: poly(step, iters=t.iters, warmup_iters=t.warmup_iters, power=t.power)
    )
    mirror = open_mirror(
        settings.logging.wandb.mode,
        entity=settings.logging.wandb.entity,
        project=settings.logging.wandb.project,
        name=f"{folder.id}-{settings.experiment.name}",
        group=settings.experiment.name,
        job_type="train",
        config=asdict(settings),
        folder=folder.path,
    )
    segmenter.net.train()
    torch.manual_seed(settings.experiment.seed)  # dropout and drop path draw from the global generator
    began, scores = time.perf_counter(), None
    with JsonLines(folder.path / "records.jsonl") as records:
        for step, (image_B3ss, label_Bss) in enumerate(loader, start=1):
            with torch.autocast(main.type, torch.bfloat16, enabled=settings.runtime.precision == "bf16"):
                logits_BChw = segmenter.logits(image_B3ss.to(main, non_blocking=True))
            loss = segmentation_loss(logits_BChw, label_Bss.to(main, non_blocking=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            # once in a while: read the loss (a CPU-GPU sync), stop before a broken model is saved
            if step % LOG_EVERY == 0 or step == t.iters:
                value = loss.item()
                if not torch.isfinite(loss):
                    raise UserError(f"train.lr={t.lr}: the loss is {value} at step {step}; expected a finite number. "
                                    "Lower train.lr or set runtime.precision=fp32.")  # fmt: skip
                records.append({"step": step, "loss": value, "lr": schedule.get_last_lr()[0]})
                mirror.log({"train/loss": value}, step=step)
            if step % t.validate_every == 0 or step == t.iters:
                scores = validate(segmenter, held_out, entries, settings=settings)
                records.append({"step": step, "miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc})
                mirror.log({"validation/miou": scores.miou}, step=step)
                said = f"step {step}/{t.iters}: loss {loss.item():.4f}, validation mIoU {100 * scores.miou:.2f} %"
                console.print(f"{said}, {time.perf_counter() - began:.0f} s", highlight=False)
    assert scores is not None
    segmenter.eval()
    segmenter.net.to(getattr(torch, t.save_dtype)).save_pretrained(folder.path / "model")
    results = {"steps": t.iters, "validation": {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc},
               "per_class": dict(zip(dataset.classes, scores.iou_C.tolist(), strict=True)),
               "seconds": round(time.perf_counter() - began, 1), "seed": settings.experiment.seed,
               "versions": versions(main)}  # fmt: skip
    write_json(folder.path / "results.json", results)
    mirror.summary({"validation/miou": scores.miou})
    mirror.finish()
    console.print(f"saved {folder.path / 'model'}", highlight=False, soft_wrap=True)
    return results | {"folder": str(folder.path)}
