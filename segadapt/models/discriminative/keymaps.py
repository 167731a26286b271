"""SegFormer files of other code bases: their key names to those that transformers' files have. Pure functions.

`from_pretrained` reads the names of those files whatever the modules of the installed transformers are called. Every
key gets a new name, is dropped for a reason that stands here, or keeps its own name, under which it is refused.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STAGES = 4
# of all SegFormers, B0 to B5 (Xie et al. 2021): no weight has a shape that tells the heads
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)
KINDS = "weight|bias|running_mean|running_var|num_batches_tracked"


@dataclass(frozen=True)
class Layout:
    """How a code base names the modules of a SegFormer. Patterns are of names without `backbone.` and kind."""

    name: str
    model_type: str  # of the config.json that the net is saved with
    known_by: str  # one key that every file has
    first_stage: int
    embedding: str
    norm: str
    block: str
    parts: Mapping[str, tuple[str, ...]]  # of a block; several new names: the rows are shared out in this order
    head: Mapping[str, str]
    width: str  # new name of the head's module that has as many rows as the head is wide
    classes: str  # and of the one that has a row a class
    dropped: Mapping[str, str]  # module: why


_BLOCK = {
    "norm1": ("layer_norm_1",),
    "norm2": ("layer_norm_2",),
    "attn.sr": ("attention.self.sr",),
    "attn.norm": ("attention.self.layer_norm",),
}
NVIDIA = Layout(  # github.com/NVlabs/SegFormer, mmseg/models/backbones/mix_transformer.py and decode_heads
    name="NVIDIA",
    model_type="segformer",
    known_by="patch_embed1.proj.weight",
    first_stage=1,
    embedding=r"patch_embed(?P<stage>\d)\.(?P<part>proj|norm)",
    norm=r"norm(?P<stage>\d)",
    block=r"block(?P<stage>\d)\.(?P<block>\d+)\.(?P<part>.+)",
    parts=_BLOCK
    | {
        "attn.q": ("attention.self.query",),
        "attn.kv": ("attention.self.key", "attention.self.value"),
        "attn.proj": ("attention.output.dense",),
        "mlp.fc1": ("mlp.dense1",),
        "mlp.dwconv.dwconv": ("mlp.dwconv.dwconv",),
        "mlp.fc2": ("mlp.dense2",),
    },
    head={f"linear_c{stage + 1}.proj": f"linear_c.{stage}.proj" for stage in range(STAGES)}
    | {"linear_fuse.conv": "linear_fuse", "linear_fuse.bn": "batch_norm", "linear_pred": "classifier"},
    width="linear_fuse",
    classes="classifier",
    dropped={"decode_head.conv_seg": "made by the base class of all heads and never used: linear_pred scores"},
)
MMSEG = Layout(  # mmsegmentation, models/backbones/mit.py, decode_heads/segformer_head.py, mit2mmseg.py
    name="mmsegmentation",
    model_type="segadapt_segformer_mmseg",
    known_by="layers.0.0.projection.weight",
    first_stage=0,
    embedding=r"layers\.(?P<stage>\d)\.0\.(?P<part>projection|norm)",
    norm=r"layers\.(?P<stage>\d)\.2",
    block=r"layers\.(?P<stage>\d)\.1\.(?P<block>\d+)\.(?P<part>.+)",
    parts=_BLOCK
    | {
        "attn.attn.in_proj": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attn.attn.out_proj": ("attention.output.dense",),
        "ffn.layers.0": ("mlp.dense1",),
        "ffn.layers.1": ("mlp.dwconv.dwconv",),
        "ffn.layers.4": ("mlp.dense2",),
    },
    head={},  # models/discriminative/mmseg.py has mmsegmentation's own names
    width="fusion_conv.conv",
    classes="conv_seg",
    dropped={},
)
LAYOUTS = (NVIDIA, MMSEG)
TRANSFORMERS = r"(segformer\.)?(encoder\.patch_embeddings\.0|stages\.0\.patch_embeddings)\.proj\.weight"


def recognise(keys: Collection[str]) -> Layout | None:
    """The code base that wrote them; None: neither, transformers' own files among them."""
    return next((one for one in LAYOUTS if {one.known_by, f"backbone.{one.known_by}"} & set(keys)), None)


def is_of_transformers(keys: Collection[str]) -> bool:
    """Whether they are those of a SegFormer that transformers wrote, with names of any version."""
    return any(re.fullmatch(TRANSFORMERS, key) for key in keys)


def encoder_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a MiT under the names of transformers' files; those of no LAYOUTS keep theirs."""
    layout = recognise(state)
    return dict(state) if layout is None else renamed(state, layout)


def renamed(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The same weights under the names of transformers' files, packed projections cut, 1x1 convolutions as matrices.

    A key without a new name, or whose new name is taken, keeps its own.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(rf"(.+?)[._]({KINDS})", key)
        module, kind = found.groups() if found else (key, "")
        if module in layout.dropped:
            continue
        names = [f"{name}.{kind}" for name in _modules(module, layout)]
        if not names or any(name in out for name in names):
            out[key] = value
            continue
        shares = value.chunk(len(names)) if len(names) > 1 and value.ndim else [value]
        for name, rows in zip(names, shares, strict=False):  # too few rows: what is missing is found missing
            is_matrix = name.endswith(("dense1.weight", "dense2.weight"))
            out[name] = rows.flatten(1) if is_matrix and rows.ndim == 4 else rows
    add_counters(out)
    return out


def nvidia_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a MiT, with or without its classifier, under the names of mit_b*.pth: what `renamed` undoes.

    Args:
        state: under the names of transformers' files; keys and values are packed.
    """
    parts = {new: old for old, news in NVIDIA.parts.items() for new in news}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.removeprefix("segformer.encoder.").rpartition(".")
        if module.endswith("attention.self.value"):
            continue  # with the key
        match module.split("."):
            case ["patch_embeddings", stage, part]:
                name = f"patch_embed{int(stage) + 1}.{'norm' if part == 'layer_norm' else part}"
            case ["layer_norm", stage]:
                name = f"norm{int(stage) + 1}"
            case ["block", stage, block, *rest]:
                name = f"block{int(stage) + 1}.{block}.{parts['.'.join(rest)]}"
            case _:
                assert module == "classifier", key
                name = "head"
        if module.endswith("attention.self.key"):
            value = torch.cat([value, state[key.replace("self.key", "self.value")]])
        out[f"{name}.{kind}"] = value
    return out


def add_counters(state: dict[str, Tensor]) -> None:
    """BatchNorm's, which nothing reads at its fixed momentum, where they are not: files from before torch 0.4.1."""
    for name in [name for name in state if name.endswith(".running_mean")]:
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))


def sizes(state: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of SegformerConfig as the shapes tell them, and the keys that should and do not tell.

    Args:
        state: from `renamed`.
    """
    embedding = [f"segformer.encoder.patch_embeddings.{stage}.proj.weight" for stage in range(STAGES)]
    width, classes = (f"decode_head.{module}.weight" for module in (layout.width, layout.classes))
    rows = {key: len(state[key]) for key in (*embedding, width, classes) if key in state and state[key].ndim}
    blocks = [{key.split(".")[4] for key in state if key.startswith(f"segformer.encoder.block.{stage}.")}
              for stage in range(STAGES)]  # fmt: skip
    missing = [key for key in (*embedding, width, classes) if not rows.get(key)]
    missing += [f"segformer.encoder.block.{stage}.0" for stage in range(STAGES) if not blocks[stage]]
    config = {
        "depths": [len(of_stage) for of_stage in blocks],
        "hidden_sizes": [rows.get(key, 0) for key in embedding],
        "decoder_hidden_size": rows.get(width, 0),
        "num_labels": rows.get(classes, 0),
        "num_attention_heads": list(HEADS),
        "sr_ratios": list(REDUCTIONS),
    }
    return config, missing


def _modules(module: str, layout: Layout) -> list[str]:
    """New names of a module, none if it is unknown."""
    if module.startswith("decode_head."):
        own = module.removeprefix("decode_head.")
        return [f"decode_head.{layout.head[own]}"] if own in layout.head else []
    module = module.removeprefix("backbone.")
    if found := re.fullmatch(layout.embedding, module):
        part = "layer_norm" if found["part"] == "norm" else "proj"
        return [f"segformer.encoder.patch_embeddings.{int(found['stage']) - layout.first_stage}.{part}"]
    if found := re.fullmatch(layout.norm, module):
        return [f"segformer.encoder.layer_norm.{int(found['stage']) - layout.first_stage}"]
    if found := re.fullmatch(layout.block, module):
        stage = int(found["stage"]) - layout.first_stage
        new = layout.parts.get(found["part"], ())
        return [f"segformer.encoder.block.{stage}.{found['block']}.{part}" for part in new]
    return []
