"""The step at full size: SegFormer-B5 and SD3-medium shapes, random weights, 512x683, 2 windows x 20 of 150 classes.

CUDA_VISIBLE_DEVICES=0,1 python benchmarks/full_size.py          one card, then all visible cards
python benchmarks/full_size.py --tiny                            the same on the CPU at toy size, in seconds

Prints for each placement the seconds per image and the peak memory of each card, and the relative difference of the
loss and of all gradients, in float32 and under bf16 autocast, from one card's first run: the same card's second run
shows how far repeated sums alone differ.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segadapt import config
from segadapt.models.build import segmenter_bytes
from segadapt.models.combined import Combined
from segadapt.models.discriminative.segformer import Segmenter
from segadapt.models.generative import placement as placing
from segadapt.models.generative.parallel import Parallel, count_parts
from segadapt.models.generative.plan import training_bytes
from segadapt.models.generative.prompts import PromptEmbeddings
from segadapt.models.generative.sd3 import Sd3
from segadapt.parse import from_overrides

SD3_MEDIUM = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
              "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
              "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192}  # fmt: skip
SD3_TINY = SD3_MEDIUM | {"num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
                         "caption_projection_dim": 16, "pooled_projection_dim": 32}  # fmt: skip
B5 = {"depths": [3, 6, 40, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
B_TINY = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 20, 32], "num_attention_heads": [1, 2, 4, 8],
          "decoder_hidden_size": 16}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
VAE_TINY = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
CLASSES = 150


def tokens_of(transformer_config: Mapping[str, Any]) -> int:
    """Text tokens of a pair: SD3's 333; fewer at toy size, where a CPU pays for each."""
    return 333 if transformer_config["joint_attention_dim"] == SD3_MEDIUM["joint_attention_dim"] else 13


def build(args: argparse.Namespace, main: torch.device) -> tuple[Segmenter, SD3Transformer2DModel, AutoencoderKL]:
    """The three networks with random weights of one seed, made on the main device."""
    torch.manual_seed(0)
    labels = {index: f"class {index}" for index in range(CLASSES)}
    with main:
        net = SegformerForSemanticSegmentation(SegformerConfig(**(B_TINY if args.tiny else B5), id2label=labels))
        transformer = SD3Transformer2DModel(**(SD3_TINY if args.tiny else SD3_MEDIUM))
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
            latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False, **(VAE_TINY if args.tiny else VAE))  # fmt: skip
    return Segmenter(net), transformer, vae


def cost_of(
    transformer: SD3Transformer2DModel, parts: tuple, g: config.GenerativeSettings, *, devices: int, copies: int = 1
) -> dict[str, Any]:
    """What a placement counts."""
    segmenter, vae = parts
    tokens = tokens_of(transformer.config)
    fixed = segmenter_bytes(segmenter, is_trained=True) + training_bytes(vae, trained=False)
    return {
        "trained": True,
        "max_pairs": g.max_pairs,
        "tokens": (g.window_px // 16) ** 2 + tokens,
        "checkpointing": g.gradient_checkpointing,
        "bf16": True,
        "parts": count_parts(g.parts, devices=devices, copies=copies),
        "fixed_main_bytes": fixed + 2 * CLASSES * tokens * transformer.config["joint_attention_dim"],
    }


def place(
    transformer: SD3Transformer2DModel,
    parts: tuple,
    g: config.GenerativeSettings,
    devices: list,
    capacities: list[int] | None = None,
) -> None:
    """Split the transformer over the devices, print the map, assert that every device is used."""
    placement = placing.place(transformer, devices, force_hooks=len(devices) > 1, capacities=capacities,
                              **cost_of(transformer, parts, g, devices=len(devices)))  # fmt: skip
    print("map:", *placement.lines, sep="\n  ", flush=True, file=sys.stderr)
    placing.assert_placed(transformer, placement)
    used = {str(parameter.device) for parameter in transformer.parameters()}
    assert used == {str(torch.device(device)) for device in devices}, (used, devices)


def join(
    parts: tuple,
    transformer: SD3Transformer2DModel,
    settings: config.AdaptConfig,
    precision: str,
    parallel: Parallel | None = None,
) -> Combined:
    """The two models as `segadapt adapt` joins them, with random text embeddings."""
    segmenter, vae = parts
    main = next(segmenter.net.parameters()).device
    width = transformer.config["joint_attention_dim"], transformer.config["pooled_projection_dim"]
    tokens, generator = tokens_of(transformer.config), torch.Generator().manual_seed(1)
    text = PromptEmbeddings(
        torch.randn(CLASSES, tokens, width[0], generator=generator),
        torch.randn(CLASSES, width[1], generator=generator),
        torch.zeros(tokens, width[0]),
        torch.zeros(width[1]),
        source="learned",
    )
    teacher = Sd3(transformer, vae, text, device=main, precision=precision, parallel=parallel)
    return Combined(segmenter, teacher, settings.model, settings.tta.optimizer, seed=0, precision=precision)


def loss_of(combined: Combined, image_3HW: torch.Tensor) -> float:
    """Backward of one image: the loss; the gradients stay in the parameters."""
    with combined.autocast():
        logits_BChw = combined.segmenter.logits(image_3HW[None])
    noisy = combined.noise(image_3HW, task="full_size", key="0")
    taught, candidates = combined.backward(image_3HW, logits_BChw, noisy, task="full_size", key="0")
    assert candidates.counts == (20, 20), candidates.counts
    return taught.loss.item()


def difference(combined: Combined, reference: dict[str, torch.Tensor], prefix: str) -> float:
    """Relative difference of all gradients whose name starts with the prefix: ||g - reference|| / ||reference||."""
    squares = [0.0, 0.0]
    for name, parameter in combined.parameters().items():
        if name.startswith(prefix):
            if parameter.grad is None:  # the last block drops its text stream, and with it add_q_proj
                assert name not in reference, name
                continue
            expected = reference[name].to(parameter.device).double()
            squares[0] += (parameter.grad.double() - expected).square().sum().item()
            squares[1] += expected.square().sum().item()
    return (squares[0] / squares[1]) ** 0.5


def timed(combined: Combined, image_3HW: torch.Tensor, devices: list, *, warmup: int, images: int) -> dict:
    """Seconds per image of whole steps (predict, backward, AdamW) and the peak memory of each card."""
    on_gpu = combined.device.type == "cuda"
    seconds = []
    for index in range(warmup + images):
        if on_gpu and index == warmup:
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        prediction = combined.step(image_3HW, task="full_size", key=str(index))  # ends in a host read
        for device in devices if on_gpu else []:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        assert prediction.is_updated, prediction
        assert sum(prediction.candidates) == 40, prediction.candidates
    peak = [round(torch.cuda.max_memory_allocated(device) / 2**30, 2) for device in devices] if on_gpu else []
    return {"seconds_per_image": round(sorted(seconds[warmup:])[images // 2], 4), "peak_gib": peak}


def main() -> None:
    """One card, then all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--max-pairs", type=int, default=20)
    args = parser.parse_args()
    gpus = list(range(torch.cuda.device_count()))
    assert args.tiny or gpus, "full size needs a GPU; --tiny runs anywhere"
    placements = [["cpu"], ["cpu"], ["cpu", "cpu"]] if args.tiny else [gpus[:1], gpus[:1], gpus][: len(gpus) + 1]
    first = torch.device(placements[0][0])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as models.build.set_up does
    overrides = ["data=ade20k_c", "data.data_root=none", "model.loss.topk=150"]  # top-150: the budget of 20 is filled
    overrides.append(f"model.generative.max_pairs={args.max_pairs}")
    settings = from_overrides("adapt", overrides, config.AdaptConfig)
    segmenter, transformer, vae = build(args, first)
    parts = (segmenter, vae)
    image_3HW = torch.rand(3, 512, 683, generator=torch.Generator().manual_seed(0)).to(first)
    networks = {"segformer": segmenter.net, "transformer": transformer, "vae": vae}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    device = torch.cuda.get_device_name() if gpus and not args.tiny else "cpu"
    print(json.dumps({"parameters": counts, "torch": torch.__version__, "device": device}), flush=True)

    reference: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}
    for run, devices in enumerate(placements):
        place(transformer, parts, settings.model.generative, devices)
        compared = {}
        for precision in ("fp32", "bf16"):
            chosen = copy.deepcopy(settings)
            if precision == "fp32":  # twice the activations: half the pairs, so each window is run in two chunks
                chosen.model.generative.max_pairs = max(1, args.max_pairs // 2)
            combined = join(parts, transformer, chosen, precision)
            loss = loss_of(combined, image_3HW)
            if precision in reference:
                expected, grads = reference[precision]
                compared[precision] = {"loss": loss, "loss_difference": abs(loss - expected) / abs(expected)}
                assert compared[precision]["loss_difference"] < 1e-6, compared
                for model in ("generative", "discriminative"):
                    apart = compared[precision][f"{model}_gradients"] = difference(combined, grads, model)
                    assert apart < (1e-4 if precision == "fp32" else 1e-2), (precision, model, apart)
            else:
                moving = combined.parameters().items()
                found = {name: parameter.grad.cpu() for name, parameter in moving if parameter.grad is not None}
                reference[precision] = (loss, found)
                compared["bf16 against fp32"] = {
                    model: difference(combined, reference["fp32"][1], model)
                    for model in ("generative", "discriminative")
                    if precision == "bf16"
                }
            for parameter in combined.parameters().values():
                parameter.grad = None
        print(json.dumps({"devices": devices, "compared": compared}), flush=True)
        if run == 0:  # only there for the comparison
            continue
        measured = timed(combined, image_3HW, devices, warmup=2, images=args.images)
        line = {"devices": devices, "pairs": 40, "max_pairs": args.max_pairs, "precision": "bf16"}
        print(json.dumps(line | measured), flush=True)
        combined.reset()
        del combined
        if gpus:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
