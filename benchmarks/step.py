"""One adaptation step in several forms, in one process and on the same inputs: seconds, memory, rate, equality.

CUDA_VISIBLE_DEVICES=0,1 python benchmarks/step.py --rows windows,classes,segadapt,dispatch-2,replicate-2 --compile
python benchmarks/step.py --tiny --device cpu                    toy size, under a minute; no claim of speed

    windows      as the public implementations: a forward a window with all its classes, every graph kept until one
                 joint backward, AdamW not fused
    classes      the same, a forward a class
    segadapt     this package's step on one card
    dispatch-N   the transformer split over the first N cards; replicate-N: a copy on each of them

SegFormer-B5 and SD3-medium shapes, random weights. Workload: one 512x683 image, 150 classes, 2 windows x --classes
candidates, 333 text tokens, both models updated, bf16 autocast over float32 weights. Loss and gradients of one image
are compared with those of the first row. A row that does not fit the card prints null. --compile compiles and records
all but the first two forms. The rate of the transformer part is that of forward and
backward of the same pairs in the same chunks, in operations of real pairs: no padding, no recomputation.
"""

import argparse
import copy
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from shapes import SD3_MEDIUM, SD3_TINY, build, cost_of, difference, join, tokens_of
from torch.utils.flop_counter import FlopCounterMode

from segadapt import config
from segadapt.errors import UserError
from segadapt.models.combined import Combined
from segadapt.models.generative import candidates as candidate_classes
from segadapt.models.generative import loss as objective
from segadapt.models.generative import placement as placing
from segadapt.models.generative.lora import add_lora
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.plan import GIB, RESERVE_BYTES
from segadapt.models.generative.stages import compile_and_record
from segadapt.models.updates import Updates
from segadapt.parse import from_overrides
from segadapt.seeds import torch_generator

Step = Callable[[str], float]  # image key -> loss
PLAIN = ("windows", "classes")  # the forms of others


def joint_backward(combined: Combined, image_3HW: torch.Tensor, key: str, *, pairs_a_time: int) -> float:
    """The plain form: all velocities with their graphs, then one backward into both models."""
    assert combined.generative is not None
    image_3HW = image_3HW.to(combined.device)
    with combined.autocast():  # around everything: one bf16 copy of each weight
        logits_BChw = combined.segmenter.logits(image_3HW[None])
        noisy = combined.sight.noise(image_3HW, task="step", key=key)
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
    noisy = combined.sight.noise(image_3HW, task="step", key=key)
    logits_BChw = combined.logits(image_3HW.to(combined.device))
    taught, _ = combined.backward(image_3HW, logits_BChw, noisy, task="step", key=key)
    return taught.loss.item()


def forms(combined: Combined, image_3HW: torch.Tensor, *, pairs: int, name: str) -> tuple[Step, Step]:
    """Of a row: backward alone, and the whole step."""
    if name in PLAIN:
        plain = Updates(combined.groups, combined.optimizer_settings, fused=False)

        def backward(key: str) -> float:
            return joint_backward(combined, image_3HW, key, pairs_a_time=pairs if name == "windows" else 1)

        def step(key: str) -> float:
            loss = backward(key)
            plain.take(torch.tensor(True))
            return loss

        return backward, step

    def ours(key: str) -> float:
        prediction = combined.step(image_3HW, task="step", key=key)
        assert prediction.is_updated, prediction
        assert sum(prediction.candidates) == pairs, prediction.candidates
        assert prediction.loss is not None
        return prediction.loss

    return lambda key: our_backward(combined, image_3HW, key), ours


def seconds(work: Callable[[str], object], devices: list[torch.device], *, warmup: int, images: int) -> float:
    """Mean over images that follow each other, as in a stream: what is sent to copies may travel meanwhile."""
    for index in range(warmup):
        work(f"warm-up {index}")
    synchronize(devices)
    start = time.perf_counter()
    for index in range(images):
        work(str(index))
    synchronize(devices)
    return (time.perf_counter() - start) / images


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
                encoder_hidden_states=torch.empty(1, tokens_of(c), c["joint_attention_dim"]),
                pooled_projections=torch.empty(1, c["pooled_projection_dim"]),
                timestep=torch.empty(1),
            )
    return counter.get_total_flops()


def matrix_rate(device: torch.device, side: int) -> float:
    """bf16 operations a second of a square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda _: a @ b, [device], warmup=3, images=10)


def transformer_part(combined: Combined, image_3HW: torch.Tensor, *, classes: int) -> Step:
    """Forward and backward of all pairs in the step's own groups of whole windows, with a given gradient.

    A window of more pairs than are at work at once runs forward twice in the step, and once here.
    """
    teacher = combined.generative
    assert teacher is not None
    noisy = combined.sight.noise(image_3HW, task="step", key="transformer")
    windows = len(noisy.x_t_Kzyx)
    window_P = torch.arange(windows, device=combined.device).repeat_interleave(classes)
    class_P = torch.arange(classes, device=combined.device).repeat(windows)
    at_once = max(1, combined.pairs_at_once // classes) * classes  # whole windows
    at_once = at_once if classes <= combined.pairs_at_once else combined.pairs_at_once

    def run(_: str) -> float:
        for group in zip(window_P.split(at_once), class_P.split(at_once), strict=True):
            velocity_Pzyx = teacher.velocity(noisy, *group)
            velocity_Pzyx.backward(torch.ones_like(velocity_Pzyx))
        combined.parallel.sum_gradients()
        return 0.0

    return run


def assemble(a: argparse.Namespace, settings: config.AdaptConfig, *, name: str, names: list[Any]) -> Combined:
    """The two models on the first of these devices, or the transformer on all of them; always the same weights."""
    devices = [torch.device(each) for each in names]
    segmenter, transformer, vae = build(a, devices[0])
    if settings.model.generative.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if a.lora:
        add_lora(transformer, rank=a.lora, alpha=a.lora, seed=0)
    compiled, copied = a.compile and name not in PLAIN, name.startswith("replicate")
    g, capacities = settings.model.generative, [int(a.gib * GIB) - RESERVE_BYTES] * len(names) if a.gib else None
    cost = cost_of(transformer, segmenter, vae, g, compiled=compiled, precision=a.precision)
    asked = {"max_pairs": g.max_pairs, "parts": g.parts}
    cost = placing.share_out(transformer, names, cost, copied=copied, capacities=capacities, **asked)
    if copied:
        transformers, placements = placing.replicate(transformer, names, cost, capacities=capacities)
    else:
        hooks = len(names) > 1
        more = {"force_hooks": hooks, "capacities": capacities, "virtual_stages": g.virtual_stages}
        placements = [placing.place(transformer, names, cost, **more)]
        transformers = [transformer]
    lines = [line for placement in placements for line in placement.lines]
    sys.stderr.write("\n  ".join([f"{name}: {cost.pairs} pairs at work, {cost.parts} parts", *lines]) + "\n")
    settings = copy.deepcopy(settings)
    settings.model.generative.max_pairs = cost.pairs // len(names)
    parallel = Parallel(transformers, devices, parts=cost.parts, stages=compile_and_record(transformers, cost))
    how = {"precision": a.precision, "is_recorded": compiled}
    return join(segmenter, transformer, vae, settings, parallel=parallel, **how)


def measure(
    combined: Combined, image_3HW: torch.Tensor, reference: dict[str, Any], *, name: str, pairs: int, warmup: int,
    images: int,
) -> dict[str, Any]:  # fmt: skip
    """Loss and gradients of one image against the first row's, kept in `reference`; then whole steps and parts."""
    devices = list(combined.parallel.devices)
    on_gpu = devices[0].type == "cuda"
    backward, step = forms(combined, image_3HW, pairs=pairs, name=name)
    for _ in range(3):  # as it is, recorded, replayed
        clear(combined)
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
    times = {"warmup": warmup, "images": images}
    for device in devices if on_gpu else []:
        torch.cuda.reset_peak_memory_stats(device)
    row["seconds_per_image"] = seconds(step, devices, **times)
    row["peak_gib"] = [round(torch.cuda.max_memory_reserved(d) / 2**30, 2) for d in devices] if on_gpu else None
    if name not in PLAIN:
        clear(combined)
        row["seconds_transformer"] = seconds(
            transformer_part(combined, image_3HW, classes=pairs // 2), devices, **times
        )
        clear(combined)
        row["seconds_autoencoder"] = seconds(
            lambda key: combined.sight.noise(image_3HW, task="t", key=key), devices, **times
        )

        def segment(_: str) -> None:
            combined.segmenter.net.zero_grad()
            combined.logits(image_3HW.to(combined.device)).square().mean().backward()

        row["seconds_segmenter"] = seconds(segment, devices, **times)
    clear(combined)
    return row


def clear(combined: Combined) -> None:
    for transformer in combined.parallel.transformers:
        transformer.zero_grad()
    combined.segmenter.net.zero_grad()


def options(description: str | None, rows: str) -> argparse.ArgumentParser:
    """What step.py and curve.py are told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=rows)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--max-pairs", type=int, help="model.generative.max_pairs")
    parser.add_argument("--parts", type=int, help="model.generative.parts")
    parser.add_argument("--virtual-stages", type=int, default=1, help="model.generative.virtual_stages")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lora", type=int, default=0, help="model.update.lora_rank")
    parser.add_argument("--gib", type=float, help="let the process have no more of each card")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    return parser


def set_up(a: argparse.Namespace, classes: int) -> tuple[list[int], config.AdaptConfig]:
    """The GPUs, and the settings of `segadapt adapt`; with `classes` candidates a window."""
    gpus = list(range(torch.cuda.device_count())) if a.device == "cuda" else []
    if a.device == "cuda" and not gpus:
        sys.exit("No GPU is visible; expected one or more. Use --tiny --device cpu.")
    for gpu in gpus if a.gib else []:
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, a.gib * GIB / total), gpu)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as models.set_up does
    px = 128 if a.tiny else 512
    overrides = ["data=ade20k_c", "data.data_root=none", "model.loss.topk=150", f"data.short_side_px={px}",
                 f"model.loss.classes_threshold={classes}", f"model.generative.max_pairs={a.max_pairs or 'null'}",
                 f"model.generative.parts={a.parts or 'null'}",
                 f"model.generative.virtual_stages={a.virtual_stages}",
                 f"model.generative.gradient_checkpointing={a.checkpointing}",
                 f"model.update.lora_rank={a.lora}", f"model.generative.window_px={px}",
                 f"model.generative.stride_px={px // 2}"]  # fmt: skip
    return gpus, from_overrides("adapt", overrides, config.AdaptConfig)


def draw_image(settings: config.AdaptConfig, width_px: int, device: torch.device) -> torch.Tensor:
    """[3, H, W] on the host, the same at each call; pinned where it goes to a GPU."""
    size = 3, settings.data.short_side_px, width_px
    image_3HW = torch.rand(size, generator=torch.Generator().manual_seed(0))
    return image_3HW.pin_memory() if device.type == "cuda" else image_3HW


def devices_of(name: str, gpus: list[int]) -> list[Any]:
    """Those of a row: 'dispatch-2' takes two."""
    if not re.fullmatch(r"windows|classes|segadapt|(dispatch|replicate)-[1-9]\d*", name):
        sys.exit(f"--rows: {name} is no row; expected windows, classes, segadapt, dispatch-N or replicate-N.")
    count = int(name.partition("-")[2] or 1)
    if gpus and count > len(gpus):
        sys.exit(f"--rows: {name}, but {len(gpus)} GPUs are visible. Show more (CUDA_VISIBLE_DEVICES), or name fewer.")
    return gpus[:count] if gpus else ["cpu"] * count


def free() -> None:
    torch._dynamo.reset()  # compiled blocks of one row must not count against those of the next
    gc.collect()  # the hooks of a split model refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """All rows, one after the other."""
    parser = options(__doc__, "windows,classes,segadapt")
    parser.add_argument("--classes", type=int, help="candidates a window; 20, or 16 where `windows` does not fit")
    a = parser.parse_args()
    a.classes = a.classes or (5 if a.tiny else 20)
    gpus, settings = set_up(a, a.classes)
    main_device = torch.device(gpus[0] if gpus else "cpu")
    image_3HW = draw_image(settings, math.ceil(settings.data.short_side_px * 4 / 3), main_device)
    pairs = 2 * a.classes
    peak = matrix_rate(main_device, 512 if a.tiny else 8192)
    flops = 3 * pairs * operations(SD3_TINY if a.tiny else SD3_MEDIUM, side=settings.model.generative.window_px // 8)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpus else "cpu", "torch": torch.__version__,
                           "pairs": pairs, "matrix_tflops": peak / 1e12} | vars(a) | {"rows": {}}  # fmt: skip
    reference: dict[str, Any] = {}
    times = {"warmup": a.warmup, "images": a.images}
    for name, names in {name: devices_of(name, gpus) for name in a.rows.split(",")}.items():
        combined = None
        try:
            combined = assemble(a, settings, name=name, names=names)
            row = measure(combined, image_3HW, reference, name=name, pairs=pairs, **times)
        except (torch.OutOfMemoryError, UserError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            row = None
        if row and "seconds_transformer" in row:
            rate = flops / row["seconds_transformer"] / len(names)
            row |= {"transformer_tflops_a_gpu": rate / 1e12, "share_of_matrix_rate": rate / peak}
        out["rows"][name] = row
        del combined
        free()
        sys.stderr.write(f"{name}: {json.dumps(row)}\n")
    timed = {name: row["seconds_per_image"] for name, row in out["rows"].items() if row}
    first = next(iter(timed), None)
    out["faster_than_the_first"] = {name: timed[first] / value for name, value in timed.items()} if first else {}
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
