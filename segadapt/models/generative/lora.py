"""Low-rank adapters on the attention of SD3's joint blocks, by peft (Hu et al. 2022): W x + (alpha / rank) B A x.

Inject before placement: accelerate's hooks must find the layers as they will be.
"""

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from segadapt.config import UpdateSettings
from segadapt.models.generative.parallel import Parallel
from segadapt.seeds import derive

# attn2 is the second attention of SD3.5; to_add_out is missing from the last block
TARGETS = r"transformer_blocks\.\d+\.attn2?\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


def add_lora(transformer: SD3Transformer2DModel, *, rank: int, alpha: float, seed: int) -> None:
    """Put adapters on every attention projection and freeze all else; the output stays as it was, as B is zero.

    Args:
        transformer: not yet dispatched, without adapters; changed in place.
        rank: >= 1.
        alpha: the product B A is scaled by alpha / rank.
        seed: A is drawn from (seed, "lora"); the global generator is left as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert rank >= 1, rank
    assert not lora_parameters(transformer), "the transformer has adapters already"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS)  # type: ignore[arg-type]  # floats are fine
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "lora"))
        inject_adapter_in_model(config, transformer)
    transformer.requires_grad_(False)
    for parameter in lora_parameters(transformer).values():
        parameter.requires_grad_(True)


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' A and B by name; empty for a transformer without."""
    return {name: p for name, p in transformer.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def choose(parallel: Parallel, update: UpdateSettings) -> dict[str, nn.Parameter]:
    """What moves of a teacher's net, by name: its adapters where it has any, else all; the rest is frozen."""
    owned: dict[str, nn.Parameter] = {}
    if update.generative:
        adapters = lora_parameters(parallel.transformers[0])
        assert bool(adapters) == (update.lora_rank > 0), "adapters come before placement, see models/build.py"
        owned = parallel.own(list(adapters or dict(parallel.transformers[0].named_parameters())))
    for transformer in parallel.transformers:
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(name in owned)
    return owned


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict as it would be without adapters: same tensors, same names."""
    state = module.state_dict()
    adapters = {name for name in state if ".lora_A." in name or ".lora_B." in name}
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if name not in adapters}


@torch.no_grad()
def merge_lora(transformer: SD3Transformer2DModel) -> None:
    """Add the adapters to the weights and put the plain Linear layers back, so that `save_pretrained` writes SD3's own
    layout. All weights stay frozen.

    Raises:
        ValueError: a merged weight would not be finite (peft).
    """
    from peft.tuners.lora import LoraLayer

    adapted = [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)  # type: ignore[operator]
        parent, _, attribute = name.rpartition(".")
        setattr(transformer.get_submodule(parent), attribute, layer.get_base_layer())
    if adapted:
        del transformer.peft_config
