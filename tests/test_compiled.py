"""Compiled blocks: the same velocities and gradients, and no compilation for another number of pairs."""

import pytest
import torch
from sd3_folder import build_transformer
from torch._dynamo.utils import counters

from segadapt.models.generative.placement import assert_placed, place
from segadapt.models.generative.plan import Cost
from segadapt.models.generative.stages import compile_blocks

BACKEND = "aot_eager"  # traces as inductor does, and needs no C++ compiler


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def transformer_of(*, hooks: bool, checkpointing: bool = False):
    """Two blocks, one of each kind, together or on two devices that are both the CPU; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = build_transformer(num_layers=2).eval()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    cost = Cost(trained=True, pairs=2, tokens=23, checkpointing=checkpointing)
    return transformer, place(transformer, ["cpu"] * (1 + hooks), cost, force_hooks=hooks)


def loss_and_gradients(transformer, pairs: int):
    generator = torch.Generator().manual_seed(pairs)
    transformer.zero_grad()
    (velocity_Pzyx,) = transformer(
        torch.randn(pairs, 16, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(pairs, 7, 32, generator=generator),
        pooled_projections=torch.randn(pairs, 24, generator=generator),
        timestep=torch.full((pairs,), 250.0),
        return_dict=False,
    )
    loss = velocity_Pzyx.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("hooks", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_compiled_blocks_compute_the_same_for_any_number_of_pairs(hooks, checkpointing):
    plain, _ = transformer_of(hooks=hooks, checkpointing=checkpointing)
    compiled, placement = transformer_of(hooks=hooks, checkpointing=checkpointing)
    compile_blocks(compiled, backend=BACKEND)
    made = []
    for pairs in (3, 5, 1, 4, 2):
        (loss, gradients), (expected, wanted) = (loss_and_gradients(each, pairs) for each in (compiled, plain))
        made.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert made[0] > 0, "nothing was compiled"
    assert made[2:] == [made[2]] * 3, "a number of pairs compiled again after the first, another, and a single one"
    assert_placed(compiled, placement)


def test_velocities_of_the_compiled_step_equal_the_plain_ones(build_combined, random_image):
    chunks = ("model.generative.max_pairs=3", "model.loss.topk=6")  # two of three pairs in each window
    plain, compiled = (build_combined(*chunks) for _ in range(2))
    compile_blocks(compiled.generative.transformer, backend=BACKEND)
    for key in ("a", "b"):
        one, other = (each.step(random_image(), task="t", key=key) for each in (plain, compiled))
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert one.is_updated
        assert other.is_updated
    assert counters["stats"]["unique_graphs"] > 0
