"""A tiny, random, but whole StableDiffusion3Pipeline folder: every part is real and loads with from_pretrained."""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_L, CLIP_G, T5 = 8, 16, 32  # text widths; SD3-medium has 768, 1280, 4096


def build_sd3_folder(path: Path, *, num_layers: int = 2, with_t5: bool = True, seed: int = 0) -> Path:
    """Write the folder and return it; the weights depend on `seed` alone, the global generator is left as it was.

    The transformer takes joint width 32 and pooled width 24; latents have 16 channels at 1/8 of up to 512 px.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=build_transformer(num_layers),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=_clip(CLIP_L),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(CLIP_G),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5() if with_t5 else None,
            tokenizer_3=_t5_tokenizer() if with_t5 else None,
        )
    pipeline.save_pretrained(path)
    return path


def build_transformer(num_layers: int) -> SD3Transformer2DModel:
    """SD3Transformer2DModel of width 32 from the current random state, in train mode like any new module."""
    return SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        num_layers=num_layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5,
        caption_projection_dim=32,
        pooled_projection_dim=CLIP_L + CLIP_G,
        out_channels=16,
        pos_embed_max_size=32,
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ph", "photo</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[("p", "h")], model_max_length=77)


def _clip(width: int) -> CLIPTextModelWithProjection:
    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _t5_tokenizer() -> T5Tokenizer:
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("\u2581", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    return T5Tokenizer(vocab=[*specials, *pieces], extra_ids=0)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(_t5_tokenizer()), d_model=T5, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
