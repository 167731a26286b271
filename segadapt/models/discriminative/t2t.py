"""T2T-ViT (Yuan et al. 2021, arXiv 2101.11986) as encoder, under the head of mmsegmentation's SegFormer.

Module names of the encoder are those of its authors' ImageNet files.

# B images  3 RGB  H W image px  C dataset classes  h w logits, about px / 4  y x a grid of T tokens  U channels of an
# unfolded neighbourhood  E of a token between  D of the trunk, or of a map  M random features
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, unfold
from transformers import PreTrainedConfig, SegformerConfig, initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from segadapt.models.discriminative.convolutional import ConvolutionalNet, Maps, check_numbers
from segadapt.models.discriminative.mmseg import MmsegHead

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of the three soft splits, px and tokens
PATCH = 16  # px to a token of the trunk: the product of the strides
TOKEN_DROPOUT = 0.1  # of its authors' Performer
DROPPED = ("head.",)  # of ImageNet's files: classifies ImageNet


@strict
class T2tConfig(PreTrainedConfig):
    """T2T-ViT-14.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads: of the trunk.
        mlp_ratio: inner channels of its feed-forward layers, in hidden_size.
        token_size: channels of the tokens at strides 4 and 8.
        token_attention: performer or transformer (the authors' T2T-ViT_t), of the tokens at strides 4 and 8.
        image_size: side that the table of positions is made for, px; other sizes interpolate it.
        drop_path_rate: share of images whose last layer's branches are dropped, in training; the first layer's 0.
        head_size: channels of the head.
        dropout: share of channels dropped before the classifier, in training.
    """

    model_type = "segadapt_t2t"

    hidden_size: int = 384
    num_hidden_layers: int = 14
    num_attention_heads: int = 6
    mlp_ratio: float | int = 3.0
    token_size: int = 64
    token_attention: str = "performer"
    image_size: int = 224
    drop_path_rate: float | int = 0.1
    head_size: int = 256
    dropout: float | int = 0.1

    def validate_sizes(self) -> None:
        """Asked by `strict`. ValueError: a value of which no net can be made."""
        check_numbers(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "token_size", "head_size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size}: expected a multiple of "
                             f"num_attention_heads={self.num_attention_heads}")  # fmt: skip
        if self.mlp_ratio * self.hidden_size < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio}: expected more than 0")
        if self.token_size % 2:
            raise ValueError(f"token_size={self.token_size}: expected an even number")
        if self.token_attention not in TOKEN_ATTENTIONS:
            raise ValueError(f"token_attention={self.token_attention}: expected one of {', '.join(TOKEN_ATTENTIONS)}")
        if self.image_size < PATCH or self.image_size % PATCH:
            raise ValueError(f"image_size={self.image_size}: expected a multiple of {PATCH}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate}: expected at least 0 and less than 1")


class Attention(nn.Module):
    """Self-attention that may have other channels than its input."""

    def __init__(self, channels: int, size: int, heads: int, *, scale: float):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * size, bias=False)
        self.proj = nn.Linear(size, size)
        self._heads, self._scale = heads, scale

    def forward(self, x_BTU: Tensor) -> tuple[Tensor, Tensor]:
        """What each token takes of all, and its own value: [B, T, size] both."""
        values_BTE = self.qkv(x_BTU)
        query, key, value = values_BTE.unflatten(2, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(query, key, value, scale=self._scale)
        return self.proj(found.transpose(1, 2).flatten(2)), value.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x_BTD)))


class TokenTransformer(nn.Module):
    """Re-structurization by one head of softmax attention; the shortcut is the value, as the input is wider."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, size, 1, scale=channels**-0.5)  # of the wide input, as its authors have it
        self.norm2 = nn.LayerNorm(size)
        self.mlp = Mlp(size, size)

    def forward(self, x_BTU: Tensor) -> Tensor:
        found_BTE, value_BTE = self.attn(self.norm1(x_BTU))
        x_BTE = value_BTE + found_BTE
        return x_BTE + self.mlp(self.norm2(x_BTE))


class TokenPerformer(nn.Module):
    """Re-structurization by positive random features (FAVOR+, Choromanski et al. 2021): linear in the tokens."""

    w: Tensor

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.kqv = nn.Linear(channels, 3 * size)
        self.dropout = nn.Dropout(TOKEN_DROPOUT)
        self.proj = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size), nn.Dropout(TOKEN_DROPOUT))
        features = size // 2
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, size)) * features**0.5)

    def features(self, x_BTE: Tensor) -> Tensor:
        """[B, T, M], above 0: their products estimate exp(query . key)."""
        squared_BT1 = x_BTE.square().sum(dim=2, keepdim=True)
        return (x_BTE @ self.w.T - squared_BT1 / 2).exp() / len(self.w) ** 0.5

    def forward(self, x_BTU: Tensor) -> Tensor:
        key, query, value = self.kqv(self.norm1(x_BTU)).chunk(3, dim=2)
        with torch.autocast(x_BTU.device.type, enabled=False):
            key_BTM, query_BTM = (self.features(part.to(self.w.dtype)) for part in (key, query))
            summed_BME = key_BTM.transpose(1, 2) @ value.to(self.w.dtype)
            total_BT1 = query_BTM @ key_BTM.sum(dim=1)[:, :, None]
            found_BTE = query_BTM @ summed_BME / (total_BT1 + 1e-8)  # the constant is its authors'
        x_BTE = value + self.dropout(self.proj(found_BTE))
        return x_BTE + self.mlp(self.norm2(x_BTE))


TOKEN_ATTENTIONS: dict[str, type[nn.Module]] = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Three soft splits, overlapping neighbourhoods as tokens, with attention between them (section 3.1)."""

    def __init__(self, config: T2tConfig):
        super().__init__()
        kind, size = TOKEN_ATTENTIONS[config.token_attention], config.token_size
        areas = [kernel**2 for kernel, _, _ in SPLITS]
        self.attention1 = kind(3 * areas[0], size)
        self.attention2 = kind(size * areas[1], size)
        self.project = nn.Linear(size * areas[2], config.hidden_size)

    def forward(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """Maps [B, D, y, x] of strides 4, 8 and 16, the last with the trunk's channels."""
        maps = [pixels_B3HW]
        for (kernel, stride, padding), layer in zip(
            SPLITS, (self.attention1, self.attention2, self.project), strict=True
        ):
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in maps[-1].shape[2:])
            x_BTU = unfold(maps[-1], kernel, stride=stride, padding=padding).transpose(1, 2)
            maps.append(layer(x_BTU).transpose(1, 2).unflatten(2, (rows, columns)))
        return maps[1:]


class Block(GradientCheckpointingLayer):
    """Layer of the trunk: attention and feed-forward, both behind a norm and with stochastic depth."""

    def __init__(self, config: T2tConfig, drop_path: float):
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.norm1 = nn.LayerNorm(size)
        self.attn = Attention(size, size, heads, scale=(size // heads) ** -0.5)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = Mlp(size, int(size * config.mlp_ratio))
        # whose `training` the recompute of an adapted net leaves off, unlike the block's own
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.drop_path(self.attn(self.norm1(x_BTD))[0])
        return x_BTD + self.drop_path(self.mlp(self.norm2(x_BTD)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016), an image at a time, in training."""

    def __init__(self, share: float):
        super().__init__()
        self._share = share

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.training or not self._share:
            return x_BTD
        kept_B11 = torch.rand(len(x_BTD), 1, 1, device=x_BTD.device) >= self._share
        return x_BTD * kept_B11 / (1 - self._share)


def sinusoids(positions: int, channels: int) -> Tensor:
    """[1, positions, channels]: sine at even, cosine at odd channels, as Vaswani et al. 2017, section 3.5."""
    channel_D = torch.arange(channels)
    rate_D = 10000 ** (-2 * (channel_D // 2) / channels)
    angle_TD = torch.arange(positions)[:, None] * rate_D
    return torch.where(channel_D % 2 == 0, angle_TD.sin(), angle_TD.cos())[None]


class T2tEncoder(nn.Module):
    """Images of any size to maps of strides 4, 8 and 16."""

    pos_embed: Tensor

    def __init__(self, config: T2tConfig):
        super().__init__()
        self.tokens_to_token = TokensToToken(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self._side = config.image_size // PATCH
        self.register_buffer("pos_embed", sinusoids(1 + self._side**2, config.hidden_size))
        last = max(config.num_hidden_layers - 1, 1)
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path_rate * layer / last) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table for this grid, [1, 1 + rows columns, D]: bicubic from its own grid, the first entry apart."""
        if rows == columns == self._side:
            return self.pos_embed
        own_1Dyx = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self._side, self._side))
        grid_1Dyx = interpolate(own_1Dyx, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid_1Dyx.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """Normalised images to [B, channels, px / 4, px / 8, px / 16]."""
        *fine, coarse_BDyx = self.tokens_to_token(pixels_B3HW)
        rows, columns = coarse_BDyx.shape[2:]
        first_B1D = self.cls_token.expand(len(coarse_BDyx), -1, -1)
        x_BTD = torch.cat([first_B1D.to(coarse_BDyx.dtype), coarse_BDyx.flatten(2).transpose(1, 2)], dim=1)
        x_BTD = x_BTD + self.positions(rows, columns)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return [*fine, self.norm(x_BTD)[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))]


class T2tSegmenter(ConvolutionalNet):
    """Encoder and head; the features are the fused maps, which the classifier sees."""

    config: T2tConfig
    config_class = T2tConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: T2tConfig):
        super().__init__(config)
        self.encoder = T2tEncoder(config)
        of_head = SegformerConfig(
            hidden_sizes=[config.token_size, config.token_size, config.hidden_size],
            decoder_hidden_size=config.head_size,
            classifier_dropout_prob=config.dropout,
        )
        of_head.num_labels = config.num_labels or 0
        self.head = MmsegHead(of_head)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, T2tEncoder):
            initialization.normal_(module.cls_token, std=0.02)

    def forward(self, pixel_values: Tensor) -> Maps:
        """Normalised images [B, 3, H, W]."""
        maps: Sequence[Tensor] = self.encoder(pixel_values)
        features_BDhw = self.head.fused(maps)
        return Maps(self.head.classified(features_BDhw), None, features_BDhw)


def t2t_tops(net: Any) -> re.Pattern[str]:
    """The last layer of the trunk and the norm behind it, and the head."""
    return re.compile(rf"head\.|encoder\.(blocks\.{net.config.num_hidden_layers - 1}|norm)\.")


def t2t_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an ImageNet file under the names of `T2tEncoder`, which are the file's; DROPPED are left out."""
    plain = {key.removeprefix("module."): value for key, value in state.items()}  # of a file that DDP wrote
    return {key: value for key, value in plain.items() if not key.startswith(DROPPED)}
