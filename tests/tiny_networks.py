"""Tiny networks of every convolutional family and of Mask2Former, and modules whose norms do something."""

import torch
from torch import nn

from segadapt.models.discriminative.make import make_segmenter

BRANCHES = {"hidden_sizes": [4, 8, 12, 16], "modules": [1, 2, 1], "blocks": 1, "stem_size": 4}
TINY = {  # family: config
    "segadapt_deeplabv3": {
        "depths": [1, 1, 2, 2], "widths": [2, 4, 6, 8], "stem_sizes": [4, 4, 8], "head_size": 8, "auxiliary_size": 8,
    },
    "segadapt_hrnet": BRANCHES,
    "segadapt_hrnet_ocr": BRANCHES | {"ocr_size": 8, "key_size": 4, "auxiliary_size": 8},
}  # fmt: skip

SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4,
        "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
MASK2FORMER = {
    "backbone_config": SWIN, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32,
    "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2,
    "dim_feedforward": 16, "num_queries": 5,
}  # fmt: skip


def make(family, num_classes=6, **more):
    return make_segmenter(family, TINY[family] | more, num_classes, seed=1)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def disturbed(net, seed=0):
    """Norms and their statistics as after some training, so that none of them is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net


def seeded(kind, *given):
    """A module in eval mode, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return disturbed(kind(*given)).eval()
