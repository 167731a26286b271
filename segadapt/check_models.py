"""What `check` finds in the models: sizes, placement, one step on one image, and from it the time of the whole run."""

import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from segadapt.checkpoint import KEPT, size_of
from segadapt.config_verbs import CheckConfig
from segadapt.datasets import Dataset
from segadapt.datasets.resize import resize_short_side
from segadapt.models.build import Models, build_models
from segadapt.models.combined import Combined
from segadapt.models.generative.plan import GIB
from segadapt.models.generative.sd3 import Sd3
from segadapt.models.out_of_memory import explain_out_of_memory
from segadapt.models.source import Prediction, Source
from segadapt.protocol import peak_memory_gib
from segadapt.stream import Entry

STEPS = 3  # the first compiles, the second records graphs, the third is like all that follow


def check_models(settings: CheckConfig, dataset: Dataset, entry: Entry) -> tuple[dict[str, Any], list[str]]:
    """Load both models as adapt would and take some steps on one image, from the source state each.

    Returns:
        what was found: lines to print under "models", numbers of the first step, seconds, memory in GiB.
        problems: numbers that are not finite, too little disk for the checkpoints.
    Raises:
        UserError: as build_models, and a device without memory.
    """
    models = build_models(settings, dataset.classes)
    method = models.method
    image_3HW = resize_short_side(dataset.load(entry.task, entry.key).image_HW3, settings.data.short_side_px)
    step, first_s = _timed_step(method, image_3HW, entry)
    is_finite = bool(step.logits_Chw.isfinite().all()) and step.is_step_finite
    disk, problems = check_disk(settings.logging.root, size_of(method.state_dict()))
    for _ in range(STEPS - 1):
        method.reset()
        _, step_s = _timed_step(method, image_3HW, entry)
    method.reset()
    numbers = "" if step.loss is None else f"loss {step.loss:.6g}, gradient norm {step.grad_norm:.6g}, "
    if not is_finite:
        problems.insert(0, f"{entry.key}: {numbers}expected finite numbers. Check the checkpoints, or set "
                           "runtime.precision=fp32.")  # fmt: skip
    found = {
        "models": [*describe(models), disk],
        "task": entry.task.name,
        "key": entry.key,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "first_step_s": first_s,
        "step_s": step_s,
        "gpu_gib": peak_memory_gib(),
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # from KiB
    }
    return found, problems


def _timed_step(method: Source, image_3HW: Tensor, entry: Entry) -> tuple[Prediction, float]:
    """One step, and its seconds until every GPU has done it."""
    start = time.perf_counter()
    with explain_out_of_memory(method, f"{entry.key} of {entry.task.name}", image_3HW):
        step = method.step(image_3HW, task=entry.task.name, key=entry.key)
        for gpu in range(torch.cuda.device_count()) if method.device.type == "cuda" else ():
            torch.cuda.synchronize(gpu)
    return step, time.perf_counter() - start


def step_lines(found: dict[str, Any]) -> list[str]:
    """The steps of `check_models`, and the memory they took, as printed."""
    numbers = "" if found["loss"] is None else f"loss {found['loss']:.6g}, gradient norm {found['grad_norm']:.6g}, "
    lines = [f"one step on {found['task']} {found['key']}: {numbers}{found['step_s']:.2f} s "
             f"(the first: {found['first_step_s']:.2f} s)"]  # fmt: skip
    lines += [f"cuda:{gpu}: {gib:.1f} GiB at most" for gpu, gib in enumerate(found["gpu_gib"])]
    return [*lines, f"host memory: {found['host_gib']:.1f} GiB at most, beside the processes that read images"]


def estimated_s(found: dict[str, Any], *, images: int, read_s: float) -> float:
    """Seconds of the whole run after loading: the first step, and for every other image the slower of step and reading.

    Args:
        found: of check_models.
        images: of the whole stream.
        read_s: seconds an image, with all workers.
    """
    return found["first_step_s"] + (images - 1) * max(found["step_s"], read_s)


def check_disk(root: str, state_bytes: int) -> tuple[str, list[str]]:
    """What the checkpoints of a run need of the disk and what is free there; and that as a problem if it is too little.

    Args:
        root: logging.root, which need not exist.
        state_bytes: of one checkpoint.
    """
    path = Path(root).expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    needed, free = (KEPT + 1) * state_bytes / GIB, shutil.disk_usage(there).free / GIB
    line = f"checkpoints: {KEPT} are kept while one is written, {needed:.2f} GiB; free: {free:.2f} GiB"
    cure = f"logging.root={root}: {line}. Make room, or choose another logging.root."
    return line, [] if needed <= free else [cure]


def describe(models: Models) -> list[str]:
    """Sizes, embeddings, autoencoder, placement and host memory of the loaded models."""
    method = models.method
    lines = [f"segmenter: {_millions(method.segmenter.net)}"]
    if not isinstance(method, Combined):
        return [*lines, "teacher: none, this method needs none"]
    teacher = method.generative
    assert isinstance(teacher, Sd3), "settings alone name no other"
    vae, text = teacher.autoencoder, teacher.embeddings
    latents = "already shifted and scaled"
    if isinstance(vae, AutoencoderKL):
        latents = "shift {shift_factor:g}, scale {scaling_factor:g}".format(**vae.config)
    snapshot = sum(parameter.numel() * parameter.element_size() for parameter in method.parameters().values())
    return [
        *lines,
        f"teacher: transformer {_millions(teacher.transformer)}, autoencoder {_millions(vae)}",
        f"latents: {latents}",
        f"embeddings: {text.source}, sequence {tuple(text.sequence_CLE.shape)}, pooled {tuple(text.pooled_CD.shape)}",
        *(f"placement: {line}" for line in models.map_lines),
        f"host memory of the source state: {snapshot / GIB:.2f} GiB",
    ]


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M parameters"
