"""SegFormer-B5 and SD3-medium in shape, with random weights of one seed, joined as `segadapt adapt` joins them."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segadapt import config
from segadapt.models.build import fixed_bytes
from segadapt.models.combined import Combined
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.generative.parallel import Parallel
from segadapt.models.generative.plan import Cost
from segadapt.models.generative.prompts import PromptEmbeddings
from segadapt.models.generative.sd3 import Sd3
from segadapt.models.recording import Graphs

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


def build(args: argparse.Namespace, main: torch.device) -> tuple[NetSegmenter, SD3Transformer2DModel, AutoencoderKL]:
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
    return NetSegmenter(net), transformer, vae


def cost_of(
    transformer: SD3Transformer2DModel,
    segmenter: NetSegmenter,
    vae: AutoencoderKL,
    g: config.GenerativeSettings,
    *,
    compiled: bool,
    precision: str,
) -> Cost:
    """What a placement counts, before the pairs are shared out."""
    tokens = tokens_of(transformer.config)
    main_bytes, last_bytes = fixed_bytes(segmenter, vae, is_trained=True, is_recorded=compiled)
    return Cost(
        trained=True,
        pairs=0,
        tokens=(g.window_px // 16) ** 2 + tokens,
        checkpointing=g.gradient_checkpointing,
        compiled=compiled,
        recorded=compiled and next(segmenter.net.parameters()).is_cuda and not g.gradient_checkpointing,
        bf16=precision == "bf16",
        fixed_main_bytes=main_bytes + 2 * CLASSES * tokens * transformer.config["joint_attention_dim"],
        fixed_last_bytes=last_bytes,
    )


def join(
    segmenter: NetSegmenter,
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    settings: config.AdaptConfig,
    *,
    precision: str,
    parallel: Parallel,
    is_recorded: bool,
) -> Combined:
    """The two models as `segadapt adapt` joins them, with random text embeddings."""
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
    memory, encoding_memory = (
        Graphs(device).memory() if is_recorded and device.type == "cuda" else None
        for device in (main, parallel.devices[-1])
    )
    both = {"precision": precision}
    teacher = Sd3(transformer, vae, text, device=main, parallel=parallel, memory=encoding_memory, **both)
    return Combined(segmenter, teacher, settings.model, settings.tta.optimizer, seed=0, memory=memory, **both)


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
