"""What was measured, in words and numbers: the run's identity, its protocol line, and the versions it ran on."""

import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import reduce
from importlib.metadata import version
from typing import Any

import torch

from segadapt import __version__
from segadapt.config import (
    AdaptConfig,
    DataSettings,
    EvaluateConfig,
    GenerativeSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RunConfig,
)
from segadapt.methods import METHODS
from segadapt.methods.learner import Learner
from segadapt.models.generative.guided import MOST_BOXES
from segadapt.models.source import Source
from segadapt.rules import in_words, is_plain

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "torchmetrics",
    "numpy",
    "opencv-python-headless",
)
# Settings that cannot change results; all others are part of the run's identity.
FREE = (
    "experiment.name",
    "experiment.id",
    "experiment.restart",
    "experiment.any_version",
    "logging",
    "data.workers",
    "data.cache",
    "data.max_pixels",
    "runtime.threads",
    "runtime.checkpoint_seconds",
    "runtime.checkpoint_images",
    "tta.diagnose_every",
    "train.preview",
    "train.parallel",
    "train.tensor_parallel",
    "train.recorded",
    "evaluate.per_class",
    "evaluate.confusion_picture",
    "evaluate.submission",
    "train.checkpoint_every",
    "model.sha256",
    "model.generative.prompts.cache_dir",
)
# Younger settings at the value that changes nothing: the id of an older run stays what it was.
NEUTRAL: dict[str, Any] = {
    "data.label_class_ids": [],
    "data.unknown_ids": "error",
    "data.keys_file": None,
    "data.subset": 1,
    "model.discriminative.backbone": None,
    "model.discriminative.channel_order": None,
    "model.discriminative.family": "segformer",
    "tta.options": {},
    "tta.non_finite": "skip",
}


def method_of(settings: RunConfig) -> str:
    """The name of METHODS; 'source' where there is only a segmenter."""
    return settings.tta.method if isinstance(settings, AdaptConfig) and settings.tta.forward_mode == "tta" else "source"


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Nested settings less those of dotted names, or less whole sections; a name that is not there is passed over."""
    heads = [name.partition(".") for name in names]
    dropped = {head for head, _, rest in heads if not rest}
    return {
        key: without(value, [rest for head, _, rest in heads if head == key]) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in dropped
    }


def identity(settings: RunConfig) -> dict[str, Any]:
    """All settings that can change results, as nested JSON values."""
    values, method = without(asdict(settings), (*FREE, "tta.method")), METHODS[method_of(settings)]
    if not method.has_teacher:  # what nothing reads does not make another run
        values["model"] = {"discriminative": values["model"]["discriminative"]}
    if isinstance(settings, EvaluateConfig) and is_plain(settings.evaluate):  # the rule of `adapt`
        values.pop("evaluate")
    if method is Source:
        values.pop("tta", None)
    values = without(values, [name for name, neutral in NEUTRAL.items() if _value(values, name) == neutral])
    return values | {"method": method_of(settings)}


def _value(values: Mapping[str, Any], name: str) -> Any:
    """Of a dotted name; {} where there is no such section."""
    return reduce(lambda section, key: section.get(key, {}), name.split("."), values)


def protocol(settings: RunConfig, *, order_sha256: str) -> str:
    """One sentence that says what was measured."""
    data, runtime, seed = settings.data, settings.runtime, settings.experiment.seed
    parts = [f"method {method_of(settings)}", f"segmenter {settings.model.discriminative.checkpoint}"]
    if isinstance(settings, AdaptConfig) and METHODS[method_of(settings)].has_teacher:
        g, loss, opt, update = (
            settings.model.generative,
            settings.model.loss,
            settings.tta.optimizer,
            settings.model.update,
        )
        moving = [name for name in ("discriminative", "generative") if getattr(update, name)]
        rates = {"discriminative": opt.lr_discriminative, "generative": opt.lr_generative}
        sigma = f"{g.sigma:g}" if g.sigma_high is None else f"{g.sigma:g}..{g.sigma_high:g}"
        parts += [
            f"teacher {g.checkpoint}" + ("" if g.prompts.file is None else f", prompts of {g.prompts.file}"),
            windows_of(g),
            f"sigma {sigma}" + (f", {g.draws} draws" if g.draws > 1 else ""),
            f"LogitNorm {'on' if loss.logit_norm else 'off'}, temperature {loss.temperature:g}",
            f"classes {choice_of(loss)}, {_limits(loss)} a window, mask {loss.mask_reduction}",
            *([f"windows weighted by entropy, tau {loss.entropy_tau:g}"] if loss.window_weights == "entropy" else []),
            *_controls(settings.model),
            f"{opt.name} on " + " and ".join(f"{m} {rates[m] if rates[m] is not None else opt.lr:g}" for m in moving)
            + (" (norms only)" if update.update_norm_only else "")
            + (f" (adapters of rank {update.lora_rank}, alpha {update.lora_alpha:g})" if update.lora_rank else "")
            + (" and a shared prompt offset" if update.prompt_offset else "")
            + (f" {opt.lr_prompt_offset:g}" if update.prompt_offset and opt.lr_prompt_offset is not None else "")
            + _steps(opt),
        ]  # fmt: skip
    elif isinstance(settings, AdaptConfig):
        parts += [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in settings.tta.options.items()
        ]
    if isinstance(settings, AdaptConfig) and issubclass(METHODS[method_of(settings)], Learner):
        opt = settings.tta.optimizer
        rate = opt.lr if opt.lr_discriminative is None else opt.lr_discriminative
        detail = (f", momentum {opt.momentum:g}" if opt.name == "sgd" and opt.momentum else "") + _steps(opt)
        decay = f", weight decay {opt.weight_decay:g}" if opt.weight_decay else ""
        parts.append(f"{opt.name} {rate:g}{detail}{decay}")
    if isinstance(settings, AdaptConfig) and METHODS[method_of(settings)].learns:
        stretch = "round" if data.order == "mixed" else "task"
        rule = f"reset before each {'image' if settings.tta.episodic else stretch}"
        parts.append("continual" if settings.tta.continual else rule)
        if settings.tta.non_finite == "reset":
            parts.append("reset also where a loss is not finite")
    parts += [
        rule_of(settings),
        f"shuffle seed {seed}" if data.shuffle else "not shuffled",
        f"{runtime.precision} {'autocast over fp32 weights' if runtime.precision == 'bf16' else ''}".strip(),
        f"data {data.name} {data.split}, {_shift(data)}, order {order_sha256[:12]}",
    ]
    return "; ".join(parts)


def _steps(opt: OptimizerSettings) -> str:
    """What is done to gradients and rates; empty by default."""
    return (
        (f", clipped to norm {opt.clip_norm:g}" if opt.clip_norm is not None else "")
        + (f", rates rise over {opt.warmup} steps" if opt.warmup else "")
        + (f", a step every {opt.accumulate} images" if opt.accumulate > 1 else "")
    )


def rule_of(settings: RunConfig) -> str:
    """What is scored, and through which resizes: a score without it is not comparable."""
    if isinstance(settings, EvaluateConfig) and not is_plain(settings.evaluate):
        return in_words(settings.evaluate, settings.data.short_side_px)
    scored = METHODS[method_of(settings)].scored
    return f"scored {scored} at label size, one bilinear resize; {short_sides(settings)}"


def short_sides(settings: RunConfig) -> str:
    """'short side 512 px', or 'short side 1024 px (teacher 512 px)'."""
    model, own = settings.model, []
    if model.discriminative.short_side_px is not None:
        own.append(f"segmenter {model.discriminative.short_side_px} px")
    if isinstance(model, ModelSettings) and METHODS[method_of(settings)].has_teacher and model.generative.short_side_px:
        own.append(f"teacher {model.generative.short_side_px} px")
    return f"short side {settings.data.short_side_px} px" + (f" ({', '.join(own)})" if own else "")


def windows_of(g: GenerativeSettings) -> str:
    """'windows 512 px, stride 256 px'."""
    grid = f"windows {g.window_px} px, stride {g.stride_px} px"
    guided = f"up to {MOST_BOXES} windows of high entropy, {g.window_px // 4}..{g.window_px} px, or else "
    return guided + grid if g.windows == "entropy" else grid


def choice_of(loss: LossSettings) -> str:
    """'top-1', or 'of area above 15 (top-5)'; with those that are ignored."""
    of_area = f"of area above {loss.area_threshold:g} (top-{loss.area_k})"
    ignored = f" without {', '.join(loss.ignored_classes)}" if loss.ignored_classes else ""
    return (of_area if loss.select == "area" else f"top-{loss.topk}") + ignored


def _limits(loss: LossSettings) -> str:
    """'at most 20', or 'at least 2 (uniform fill) and at most 20'."""
    low = f"at least {loss.min_classes} ({loss.fill} fill) and " if loss.min_classes > 1 else ""
    return f"{low}at most {loss.classes_threshold}"


def _controls(model: ModelSettings) -> list[str]:
    """What is not believed of the teacher, and whether its classes were shuffled; empty by default."""
    trust, parts = model.trust, []
    if trust.mode == "skip":
        parts.append(f"only pixels on which {trust.threshold:g} of the draws agree")
    elif trust.mode == "weight":
        parts.append("pixels weighted by the agreement of the draws")
    if trust.max_agreement < 1:
        parts.append(f"no update where teacher and segmenter agree on more than {trust.max_agreement:g}")
    if trust.restore:
        parts.append(f"there {trust.restore:g} of the way back to the source weights")
    if model.generative.shuffle_classes:
        parts.append("CONTROL: class embeddings shuffled")
    return parts


def _shift(data: DataSettings) -> str:
    """What was done to the images: '15 corruptions severity 5 made with seed 0', '... from disk', or 'clean'."""
    if not data.corruptions:
        return "as they are" + ("" if data.rounds == 1 else f", {data.rounds} rounds")
    made = "from disk" if "{corruption}" in str(data.image_path) else f"made with seed {data.corruption_seed}"
    limit = "" if data.limit is None else f", {data.limit} images each"
    limit += "" if data.order == "tasks" else f", {data.order}"
    limit += "" if data.rounds == 1 else f", {data.rounds} rounds"
    return f"{len(data.corruptions)} corruptions severity {data.severity} {made}{limit}"


def versions(main: torch.device) -> dict[str, str]:
    """Python, packages and device."""
    device = torch.cuda.get_device_name(main) if main.type == "cuda" else platform.machine() + " CPU"
    count = torch.cuda.device_count() if main.type == "cuda" else torch.get_num_threads()
    packages = {name: version(name) for name in PACKAGES}
    return {"segadapt": __version__, "python": platform.python_version(), "device": f"{count} x {device}"} | packages


def peak_memory() -> str:
    """'GPU 61.7 GiB', of the fullest one, or 'RSS 1.2 GiB' of this process without GPUs; '' where nobody counts."""
    if reserved_gib := peak_memory_gib():
        return f"GPU {max(reserved_gib):.1f} GiB"
    if sys.platform == "win32":
        return ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return f"RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


def peak_memory_gib() -> list[float]:
    """Peak of memory reserved on each visible GPU since the run began, GiB; empty without GPUs."""
    return [round(torch.cuda.max_memory_reserved(gpu) / 2**30, 3) for gpu in range(torch.cuda.device_count())]
