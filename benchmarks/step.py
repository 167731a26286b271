"""One adaptation step in three forms, in one process and on the same inputs: seconds, memory, rate, equality.

CUDA_VISIBLE_DEVICES=0 python benchmarks/step.py                 SegFormer-B5 and SD3-medium shapes, random weights
python benchmarks/step.py --tiny --device cpu                    toy size, under a minute; no claim of speed

    windows    as the public implementations: a forward a window with all its classes, every graph kept until one joint
               backward, AdamW not fused
    classes    the same, a forward a class
    segadapt   this package's step; --compile compiles the transformer's blocks

Workload: one 512x683 image, 150 classes, 2 windows x --classes candidates, 333 text tokens, both models updated, bf16
autocast over float32 weights. A form that does not fit the card prints null. The rate of the transformer part is that
of forward and backward of the same pairs in the same chunks, in operations of real pairs: no padding, no recomputation.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from full_size import SD3_MEDIUM, SD3_TINY, TOKENS, build, difference, join, place
from torch.utils.flop_counter import FlopCounterMode

from segadapt import config
from segadapt.models.combined import Combined
from segadapt.models.generative import candidates as candidate_classes
from segadapt.models.generative import loss as objective
from segadapt.models.generative.compiled import compile_blocks
from segadapt.models.updates import Updates
from segadapt.parse import from_overrides
from segadapt.seeds import torch_generator

Step = Callable[[str], float]  # image key -> loss


def joint_backward(combined: Combined, image_3HW: torch.Tensor, key: str, *, pairs_a_time: int) -> float:
    """The plain form: all velocities with their graphs, then one backward into both models."""
    assert combined.generative is not None
    with combined.autocast():  # around everything: one bf16 copy of each weight
        logits_BChw = combined.segmenter.logits(image_3HW[None])
        noisy = combined.noise(image_3HW, task="step", key=key)
        q_KCyx = combined.in_windows(logits_BChw, image_3HW, grid=noisy.x_t_Kzyx.shape[-1])
        loss = combined.loss
        chosen = candidate_classes.select(
            q_KCyx.detach(),
            topk=loss.topk,
            classes_threshold=loss.classes_threshold,
            generators=[
                torch_generator(combined.seed, "step", key, "classes", window) for window in range(len(q_KCyx))
            ],
        )
        losses = []
        for window in range(len(q_KCyx)):
            class_P = chosen.pair_class_P[chosen.pair_window_P == window]
            here_P = torch.full_like(class_P, window)
            chunks = zip(here_P.split(pairs_a_time), class_P.split(pairs_a_time), strict=True)
            velocity_Pzyx = torch.cat([combined.generative.velocity(noisy, *chunk) for chunk in chunks])
            only = slice(window, window + 1)
            with torch.autocast(combined.device.type, enabled=False):
                weights = objective.class_weights(q_KCyx[only], chosen.chosen_KC[only], temperature=loss.temperature)
                losses.append(
                    objective.window_losses(
                        weights, velocity_Pzyx, noisy.target_Kzyx[only], chosen.keep_Kyx[only],
                        pair_window_P=torch.zeros_like(here_P), pair_class_P=class_P)
                )  # fmt: skip
    total = torch.cat(losses).mean()
    total.backward()
    return total.item()


def our_backward(combined: Combined, image_3HW: torch.Tensor, key: str) -> float:
    """The package's."""
    noisy = combined.noise(image_3HW, task="step", key=key)
    with combined.autocast():
        logits_BChw = combined.segmenter.logits(image_3HW[None])
    taught, _ = combined.backward(image_3HW, logits_BChw, noisy, task="step", key=key)
    return taught.loss.item()


def forms(combined: Combined, image_3HW: torch.Tensor, *, pairs: int) -> dict[str, tuple[Step, Step]]:
    """Of each form: backward alone, and the whole step."""
    plain = Updates(combined.groups, combined.optimizer_settings, fused=False)

    def joint(pairs_a_time: int) -> tuple[Step, Step]:
        def backward(key: str) -> float:
            return joint_backward(combined, image_3HW, key, pairs_a_time=pairs_a_time)

        def step(key: str) -> float:
            loss = backward(key)
            plain.take()
            return loss

        return backward, step

    def ours(key: str) -> float:
        prediction = combined.step(image_3HW, task="step", key=key)
        assert prediction.is_updated, prediction
        assert sum(prediction.candidates) == pairs, prediction.candidates
        assert prediction.loss is not None
        return prediction.loss

    return {
        "windows": joint(pairs),
        "classes": joint(1),
        "segadapt": (lambda k: our_backward(combined, image_3HW, k), ours),
    }


def seconds(work: Callable[[str], object], devices: list[torch.device], *, warmup: int, images: int) -> float:
    """Median over images."""
    found = []
    for index in range(warmup + images):
        synchronize(devices)
        start = time.perf_counter()
        work(str(index))
        synchronize(devices)
        found.append(time.perf_counter() - start)
    return statistics.median(found[warmup:])


def synchronize(devices: list[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def operations(transformer_config: dict[str, Any], *, side: int) -> int:
    """Floating-point operations of the transformer's forward for one pair, counted on the meta device."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**transformer_config)
        c = transformer.config
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(
                hidden_states=torch.empty(1, c["in_channels"], side, side),
                encoder_hidden_states=torch.empty(1, TOKENS, c["joint_attention_dim"]),
                pooled_projections=torch.empty(1, c["pooled_projection_dim"]),
                timestep=torch.empty(1),
            )
    return counter.get_total_flops()


def matrix_rate(device: torch.device, side: int) -> float:
    """bf16 operations a second of a square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda _: a @ b, [device], warmup=3, images=10)


def transformer_part(combined: Combined, image_3HW: torch.Tensor, *, pairs: int, max_pairs: int) -> Callable:
    """Forward and backward of all pairs in chunks, as the step runs them, with a given gradient."""
    teacher = combined.generative
    assert teacher is not None
    noisy = combined.noise(image_3HW, task="step", key="transformer")
    window_P = torch.arange(pairs, device=combined.device) * len(noisy.x_t_Kzyx) // pairs
    class_P = torch.arange(pairs, device=combined.device)

    def run(_: str) -> None:
        for chunk in zip(window_P.split(max_pairs), class_P.split(max_pairs), strict=True):
            velocity_Pzyx = teacher.velocity(noisy, *chunk)
            velocity_Pzyx.backward(torch.ones_like(velocity_Pzyx))

    return run


def measure(
    combined: Combined,
    backward: Step,
    step: Step,
    devices: list[torch.device],
    reference: dict[str, Any],
    *,
    warmup: int,
    images: int,
) -> dict[str, Any]:
    """Loss and gradients of one image against the first form's, kept in `reference`; then whole steps."""
    on_gpu = devices[0].type == "cuda"
    for device in devices if on_gpu else []:
        torch.cuda.reset_peak_memory_stats(device)
    loss = backward("equality")
    row: dict[str, Any] = {"loss": loss}
    if reference:
        row["loss_difference"] = abs(loss - reference["loss"]) / abs(reference["loss"])
        for model in ("generative", "discriminative"):
            row[f"{model}_gradient_difference"] = difference(combined, reference["gradients"], model)
    else:
        moving = combined.parameters().items()
        reference |= {"loss": loss, "gradients": {n: p.grad.cpu().clone() for n, p in moving if p.grad is not None}}
    clear(combined)
    row["seconds_per_image"] = seconds(step, devices, warmup=warmup, images=images)
    row["peak_gib"] = [round(torch.cuda.max_memory_allocated(d) / 2**30, 2) for d in devices] if on_gpu else None
    return row


def clear(combined: Combined) -> None:
    for parameter in combined.parameters().values():
        parameter.grad = None


def main() -> None:
    """All forms: first loss and gradients of one image against the first form's, then whole steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--classes", type=int, default=20, help="candidates a window; 16 where `windows` does not fit")
    parser.add_argument("--max-pairs", type=int, default=20, help="of a forward of segadapt's step")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--forms", default="windows,classes,segadapt")
    a = parser.parse_args()
    gpus = list(range(torch.cuda.device_count())) if a.device == "cuda" else []
    if a.device == "cuda" and not gpus:
        sys.exit("step.py: no GPU is visible; expected one or more. Use --tiny --device cpu.")
    names: list[Any] = gpus or ["cpu"]
    devices = [torch.device(name) for name in names]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as models.build.set_up does
    short_side_px = 128 if a.tiny else 512
    overrides = ["data=ade20k_c", "data.data_root=none", "model.loss.topk=150",
                 f"model.loss.classes_threshold={a.classes}", f"model.generative.max_pairs={a.max_pairs}",
                 *(f"{name}={short_side_px}" for name in ("data.short_side_px", "model.generative.window_px")),
                 f"model.generative.stride_px={short_side_px // 2}"]  # fmt: skip
    settings = from_overrides("adapt", overrides, config.AdaptConfig)
    segmenter, transformer, vae = build(a, devices[0])
    place(transformer, (segmenter, vae), settings.model.generative, names)
    if a.compile:
        compile_blocks(transformer)
    combined = join((segmenter, vae), transformer, copy.deepcopy(settings), a.precision)
    size = (short_side_px, math.ceil(short_side_px * 4 / 3))
    image_3HW = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).to(devices[0])
    pairs = 2 * a.classes
    known = forms(combined, image_3HW, pairs=pairs)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "gpus": len(gpus),
                           "torch": torch.__version__, "precision": a.precision, "pairs": pairs,
                           "max_pairs": a.max_pairs, "compiled": a.compile, "forms": {}}  # fmt: skip
    reference: dict[str, Any] = {}
    for name in a.forms.split(","):
        try:
            out["forms"][name] = measure(combined, *known[name], devices, reference, warmup=a.warmup, images=a.images)
        except torch.OutOfMemoryError:
            out["forms"][name] = None
        clear(combined)
        combined.reset()
        if gpus:
            torch.cuda.empty_cache()
    timed = {name: row["seconds_per_image"] for name, row in out["forms"].items() if row}
    for name in set(timed) & {"windows", "classes"}:
        if "segadapt" in timed:
            out[f"{name} / segadapt"] = timed[name] / timed["segadapt"]
    part = transformer_part(combined, image_3HW, pairs=pairs, max_pairs=a.max_pairs)
    taken = seconds(part, devices, warmup=a.warmup, images=a.images)
    transformer_config = SD3_TINY if a.tiny else SD3_MEDIUM
    rate = 3 * pairs * operations(transformer_config, side=settings.model.generative.window_px // 8) / taken
    peak = matrix_rate(devices[0], 512 if a.tiny else 8192)
    out["transformer"] = {"seconds": taken, "tflops": rate / 1e12, "matrix_tflops": peak / 1e12, "share": rate / peak}
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
