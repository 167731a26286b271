"""SegFormer files of other code bases, and mmsegmentation's net in plain torch; written out from their sources' names.

Nothing here uses segadapt: the key maps and the head are tested against it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEPTHS, WIDTHS, HEADS, REDUCTIONS, HEAD_WIDTH = (1, 2, 1, 1), (8, 16, 20, 32), (1, 2, 5, 8), (8, 4, 2, 1), 12
PATCHES, STRIDES = (7, 3, 3, 3), (4, 2, 2, 2)


class Attention(nn.Module):
    """EfficientMultiheadAttention: nn.MultiheadAttention inside, whose three projections are one matrix."""

    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.reduction = reduction
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_BNE: Tensor, size: tuple[int, int]) -> Tensor:
        there_BNE = x_BNE
        if self.reduction > 1:
            grid = self.sr(x_BNE.transpose(1, 2).unflatten(2, size))
            there_BNE = self.norm(grid.flatten(2).transpose(1, 2))
        return self.attn(x_BNE, there_BNE, there_BNE, need_weights=False)[0]


class MixFfn(nn.Module):
    """1x1 convolution, depth-wise 3x3, GELU, (dropout), 1x1."""

    def __init__(self, width: int):
        super().__init__()
        wide = 4 * width
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.layers = nn.Sequential(
            nn.Conv2d(width, wide, 1), depthwise, nn.GELU(), nn.Dropout(0), nn.Conv2d(wide, width, 1), nn.Dropout(0)
        )

    def forward(self, x_BNE: Tensor, size: tuple[int, int]) -> Tensor:
        return self.layers(x_BNE.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, reduction: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.ffn = Attention(width, heads, reduction), MixFfn(width)

    def forward(self, x_BNE: Tensor, size: tuple[int, int]) -> Tensor:
        x_BNE = x_BNE + self.attn(self.norm1(x_BNE), size)
        return x_BNE + self.ffn(self.norm2(x_BNE), size)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int, stride: int):
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, stride, padding=patch // 2)
        self.norm = nn.LayerNorm(width, eps=1e-6)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        before = (3, *WIDTHS[:-1])
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PatchEmbed(before[i], WIDTHS[i], PATCHES[i], STRIDES[i]),
                    nn.ModuleList(Block(WIDTHS[i], HEADS[i], REDUCTIONS[i]) for _ in range(DEPTHS[i])),
                    nn.LayerNorm(WIDTHS[i], eps=1e-6),
                ]
            )
            for i in range(4)
        )

    def forward(self, x_B3HW: Tensor) -> list[Tensor]:
        out, x = [], x_B3HW
        for embed, blocks, norm in self.layers:
            x = embed.projection(x)
            size = (x.shape[2], x.shape[3])
            x_BNE = embed.norm(x.flatten(2).transpose(1, 2))
            for block in blocks:
                x_BNE = block(x_BNE, size)
            x = norm(x_BNE).transpose(1, 2).unflatten(2, size)
            out.append(x)
        return out


class ConvModule(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv_seg = nn.Conv2d(HEAD_WIDTH, num_classes, 1)
        self.convs = nn.ModuleList(ConvModule(width, HEAD_WIDTH) for width in WIDTHS)
        self.fusion_conv = ConvModule(4 * HEAD_WIDTH, HEAD_WIDTH)

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = list(maps[0].shape[2:])
        same = [F.interpolate(c(x), size, mode="bilinear") for c, x in zip(self.convs, maps, strict=True)]
        return self.conv_seg(self.fusion_conv(torch.cat(same, dim=1)))


class MmsegNet(nn.Module):
    """EncoderDecoder of MixVisionTransformer and SegformerHead, with their names."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone, self.decode_head = Encoder(), Head(num_classes)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return self.decode_head(self.backbone(x_B3HW))


def scramble(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and statistics, so that no two tensors are alike and none is 0 or 1; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
                if name.endswith("running_var"):
                    value.abs_().add_(0.5)
            else:
                value.fill_(3)
    return net.eval()


def nvidia_state(hf_file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What github.com/NVlabs/SegFormer would have saved, of the weights in a file of transformers (old names)."""
    out = {
        "decode_head.conv_seg.weight": torch.randn(hf_file["decode_head.classifier.weight"].shape),
        "decode_head.conv_seg.bias": torch.randn(hf_file["decode_head.classifier.bias"].shape),
    }

    def take(new: str, old: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = hf_file[f"{old}.{kind}"]

    for i in range(4):
        encoder, backbone = "segformer.encoder", "backbone"
        take(f"{backbone}.patch_embed{i + 1}.proj", f"{encoder}.patch_embeddings.{i}.proj")
        take(f"{backbone}.patch_embed{i + 1}.norm", f"{encoder}.patch_embeddings.{i}.layer_norm")
        take(f"{backbone}.norm{i + 1}", f"{encoder}.layer_norm.{i}")
        take(f"decode_head.linear_c{i + 1}.proj", f"decode_head.linear_c.{i}.proj")
        for j in range(DEPTHS[i]):
            new, old = f"{backbone}.block{i + 1}.{j}", f"{encoder}.block.{i}.{j}"
            take(f"{new}.norm1", f"{old}.layer_norm_1")
            take(f"{new}.norm2", f"{old}.layer_norm_2")
            take(f"{new}.attn.q", f"{old}.attention.self.query")
            for kind in ("weight", "bias"):
                halves = [hf_file[f"{old}.attention.self.{part}.{kind}"] for part in ("key", "value")]
                out[f"{new}.attn.kv.{kind}"] = torch.cat(halves)
            take(f"{new}.attn.proj", f"{old}.attention.output.dense")
            if REDUCTIONS[i] > 1:
                take(f"{new}.attn.sr", f"{old}.attention.self.sr")
                take(f"{new}.attn.norm", f"{old}.attention.self.layer_norm")
            take(f"{new}.mlp.fc1", f"{old}.mlp.dense1")
            take(f"{new}.mlp.dwconv.dwconv", f"{old}.mlp.dwconv.dwconv")
            take(f"{new}.mlp.fc2", f"{old}.mlp.dense2")
    out["decode_head.linear_fuse.conv.weight"] = hf_file["decode_head.linear_fuse.weight"]
    for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        out[f"decode_head.linear_fuse.bn.{kind}"] = hf_file[f"decode_head.batch_norm.{kind}"]
    take("decode_head.linear_pred", "decode_head.classifier")
    return out
