"""Placement: the plan against brute force, SD3-medium's true sizes, a dispatched model against an undispatched one."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from sd3_folder import build_transformer

from segadapt.errors import UserError
from segadapt.models.generative.placement import assert_placed, place
from segadapt.models.generative.plan import GIB, Cost, deal, plan, training_bytes

MEDIUM = [84_980_736 * 16] * 23 + [54_294_528 * 16]  # bytes to train the blocks of SD3-medium
TINY = {"trained": True, "pairs": 2, "tokens": 23}


@pytest.fixture
def transformer() -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_transformer(num_layers=4).eval()


def loss_and_gradients(transformer):
    generator = torch.Generator().manual_seed(1)
    main_device = transformer.pos_embed.proj.weight.device
    transformer.zero_grad()
    velocity_Pzyx = transformer(
        torch.randn(2, 16, 8, 8, generator=generator).to(main_device),
        encoder_hidden_states=torch.randn(2, 7, 32, generator=generator).to(main_device),
        pooled_projections=torch.randn(2, 24, generator=generator).to(main_device),
        timestep=torch.tensor([250.0, 250.0], device=main_device),
        return_dict=False,
    )[0]
    assert velocity_Pzyx.device == main_device
    loss = velocity_Pzyx.square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), virtual_stages=st.integers(1, 5))
def test_runs_follow_each_other_and_every_device_keeps_its_number_of_blocks(lengths, virtual_stages):
    stops = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    blocks = [range(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    runs = deal(blocks, virtual_stages)
    assert [block for _, run in runs for block in run] == list(range(sum(lengths)))
    for device, length in enumerate(lengths):
        own = [len(run) for of, run in runs if of == device]
        assert sum(own) == length
        assert len(own) == min(virtual_stages, length)
        assert not own or max(own) - min(own) <= 1
    if virtual_stages == 1:
        assert [run for _, run in runs] == [run for run in blocks if run]


def test_a_split_in_virtual_stages_is_printed_and_computes_the_same(transformer):
    plain = copy.deepcopy(transformer)
    placement = place(transformer, ["cpu", "cpu"], Cost(**TINY), force_hooks=True, virtual_stages=2)
    assert [line.split(",")[0] for line in placement.lines] == ["cpu: blocks 0 2", "cpu: blocks 1 3"]
    (loss, gradients), (expected, wanted) = loss_and_gradients(transformer), loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@settings(max_examples=150, deadline=None)
@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    devices=st.integers(1, 5),
    fixed_main=st.integers(0, 60),
    fixed_last=st.integers(0, 30),
    fixed_each=st.integers(0, 10),
    even_blocks=st.booleans(),
    capacity=st.sampled_from((60, 100, 10**6)),
)
def test_plan_is_the_best_of_all_splits(costs, devices, fixed_main, fixed_last, fixed_each, even_blocks, capacity):
    count = min(devices, len(costs))

    def loads(cuts):
        ends = [0, *cuts, len(costs)]
        fixed = [fixed_each + fixed_main * (a == 0) + fixed_last * (a == ends[-2]) for a in ends[:-1]]
        return [own + sum(costs[a:b]) for own, (a, b) in zip(fixed, itertools.pairwise(ends), strict=True)]

    def score(cuts):
        most = max(b - a for a, b in itertools.pairwise([0, *cuts, len(costs)]))
        return most if even_blocks else 0, max(loads(cuts)), sum(load**2 for load in loads(cuts))

    every = itertools.combinations(range(1, len(costs)), count - 1)
    fitting = [score(cuts) for cuts in every if max(loads(cuts)) <= capacity]
    fixed = {"fixed_main": fixed_main, "fixed_last": fixed_last, "fixed_each": fixed_each}
    sizes = {**fixed, "even_blocks": even_blocks}
    if not fitting:
        with pytest.raises(UserError):
            plan(costs, [capacity] * devices, **sizes)
        return
    split = plan(costs, [capacity] * devices, **sizes)
    most = max(len(run) for run in split.blocks) if even_blocks else 0
    assert (most, max(split.loads), sum(load**2 for load in split.loads)) == min(fitting)
    assert [index for run in split.blocks for index in run] == list(range(len(costs)))
    assert all(len(run) >= 1 for run in split.blocks)


@pytest.mark.parametrize("devices", range(1, 9))
def test_sd3_medium_fills_every_device_evenly(devices):
    split = plan(MEDIUM, [80 * GIB] * devices)
    assert [index for run in split.blocks for index in run] == list(range(24))
    assert len(split.blocks) == devices
    assert min(len(run) for run in split.blocks) >= 1
    # within 15 % of the mean, or as near as whole blocks allow: less than one block above it
    mean = sum(split.loads) / devices
    assert max(split.loads) <= max(1.15 * mean, mean + max(MEDIUM))
    if 24 % devices == 0:
        assert max(split.loads) <= 1.15 * mean


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_load_of_the_main_device_moves_blocks_to_the_others(devices):
    split = plan(MEDIUM, [80 * GIB] * devices, fixed_main=5 * GIB)
    assert len(split.blocks[0]) < min(len(run) for run in split.blocks[1:])
    assert max(split.loads) <= 1.15 * sum(split.loads) / devices


def test_more_devices_than_blocks_uses_the_first_ones():
    assert [list(run) for run in plan([5, 5], [100] * 4).blocks] == [[0], [1]]


def test_unequal_devices_are_respected():
    split = plan([10] * 6, [25, 45])
    assert [len(run) for run in split.blocks] == [2, 4]


def test_too_little_memory_tells_plan_shortfall_and_cure():
    with pytest.raises(UserError) as error:
        plan(MEDIUM, [14 * GIB] * 2, fixed_main=2 * GIB, names=["cuda:0", "cuda:1"])
    message = str(error.value)
    assert "\n" not in message
    for part in ("needs 31.9 GiB to train", "would land on the CPU", "cuda:0 blocks 0-8", "cuda:1 blocks 9-19",
                 "no room for 20-23", "Make another GPU visible", "model.update.generative=false"):  # fmt: skip
        assert part in message


def test_device_without_room_for_one_block_is_named():
    with pytest.raises(UserError, match=r"device 0 room for no block .* Hide the device"):
        plan([10, 10], [5, 100])


def test_plan_does_not_depend_on_the_hash_seed():
    code = (
        "from segadapt.models.generative.placement import place; from sd3_folder import build_transformer;"
        "from segadapt.models.generative.plan import Cost;"
        "p = place(build_transformer(4), ['cpu'] * 3, Cost(True, pairs=1, tokens=8),"
        " force_hooks=True); print(p)"
    )
    path = os.pathsep.join(["tests", "."])
    other_seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONHASHSEED": other_seed, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    ).stdout.strip()
    assert str(place(build_transformer(4), ["cpu"] * 3, Cost(True, pairs=1, tokens=8), force_hooks=True)) == other
    assert "transformer_blocks.3" in other


def test_training_takes_sixteen_bytes_a_parameter_and_freezing_four(transformer):
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    buffers = 4 * sum(buffer.numel() for buffer in transformer.buffers())
    assert training_bytes(transformer, trained=True) == 16 * parameters + buffers
    assert training_bytes(transformer, trained=False) == 4 * parameters + buffers


def test_sd3_medium_estimate_matches_the_measured_sizes():
    with torch.device("meta"):
        medium = SD3Transformer2DModel(
            sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
    assert training_bytes(medium, trained=True) == 16 * 2_028_328_000 + 4 * 192**2 * 1536
    assert [training_bytes(block, trained=True) for block in medium.transformer_blocks] == MEDIUM
    kept, _ = Cost(True, pairs=1, tokens=1357, bf16=True).block_bytes(width=1536)
    assert kept / GIB == pytest.approx(0.107, abs=0.002)
    kept, _ = Cost(True, pairs=4, tokens=1357, compiled=True, bf16=True).block_bytes(
        width=1536
    )  # 71.76 - 65.08 GiB measured
    assert 24 * kept / GIB == pytest.approx(6.7, abs=0.4)


def test_checkpointing_lets_a_larger_chunk_fit(transformer):
    sizes, options = (
        TINY | {"pairs": 64, "tokens": 230, "bf16": True},
        {"capacities": [40 * 10**6] * 2, "force_hooks": True},
    )
    with pytest.raises(UserError, match="gradient_checkpointing=true"):
        place(transformer, ["cpu"] * 2, Cost(**sizes), **options)
    place(transformer, ["cpu"] * 2, Cost(**sizes, checkpointing=True), **options)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_split_gives_the_same_loss_and_gradients_bit_for_bit(transformer, devices):
    loss, gradients = loss_and_gradients(transformer)
    placement = place(transformer, ["cpu"] * devices, Cost(**TINY), force_hooks=True)
    assert all(hasattr(block, "_hf_hook") for block in transformer.transformer_blocks)
    for recompute in (False, True):
        if recompute:
            transformer.enable_gradient_checkpointing()
        split_loss, split_gradients = loss_and_gradients(transformer)
        assert torch.equal(split_loss, loss)
        assert split_gradients.keys() == gradients.keys()
        assert all(torch.equal(split_gradients[name], gradient) for name, gradient in gradients.items())
    assert_placed(transformer, placement)


def test_one_device_is_a_plain_move_without_hooks(transformer):
    placement = place(transformer, ["cpu"], Cost(**TINY))
    assert not any(hasattr(module, "_hf_hook") for module in transformer.modules())
    assert placement.lines[0].startswith("cpu: blocks 0-3, ")


def test_every_tensor_is_covered_once_and_unused_devices_are_told(transformer):
    placement = place(transformer, ["cpu"] * 6, Cost(**TINY), force_hooks=True)
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        assert placement.device_of(name) == tensor.device
    assert placement.main_device == "cpu"
    assert [line.split(",")[0] for line in placement.lines[4:]] == ["cpu: unused"] * 2


def test_parameter_outside_the_map_is_refused(transformer):
    transformer.register_parameter("offset", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="offset is covered by"):
        place(transformer, ["cpu"], Cost(**TINY))


def test_hooks_are_left_at_the_seams_alone(transformer):
    placement = place(transformer, ["cpu"] * 2, Cost(**TINY), force_hooks=True)
    hooked = {name for name, module in transformer.named_modules() if hasattr(module, "_hf_hook")}
    assert hooked == {"", *placement.device_map}
    inside = [module for name, module in transformer.named_modules() if name not in hooked]
    assert len(inside) > 20
    assert not any("forward" in vars(module) for module in inside)


def test_float32_keeps_twice_what_bf16_does():
    bf16, fp32 = (Cost(True, pairs=3, tokens=7, bf16=precise).block_bytes(width=5)[0] for precise in (True, False))
    assert fp32 == 2 * bf16 > 0


def test_moved_block_is_found_before_the_next_task(transformer):
    placement = place(transformer, ["cpu"] * 2, Cost(**TINY), force_hooks=True)
    transformer.transformer_blocks[2].to("meta")
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.2\..* is on meta; the placement says cpu"):
        assert_placed(transformer, placement)


@pytest.mark.parametrize("devices", [[], ["disk"], ["meta"], [0, "cpu"], ["cuda:0"], [99]])
def test_devices_that_cannot_train_are_refused(transformer, devices):
    with pytest.raises(UserError, match=r"expected GPU indices|GPUs are visible"):
        place(transformer, devices, Cost(**TINY))


def test_model_without_weights_is_refused():
    with torch.device("meta"):
        empty = build_transformer(num_layers=2)
    with pytest.raises(UserError, match="no weights"):
        place(empty, ["cpu"], Cost(**TINY))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_split_over_gpus_equals_one_gpu(transformer):
    split = copy.deepcopy(transformer)
    place(transformer, [0], Cost(**TINY))
    placement = place(split, range(torch.cuda.device_count()), Cost(**TINY))
    used = {parameter.device.index for parameter in split.parameters()}
    assert used == set(range(min(4, torch.cuda.device_count())))
    loss, gradients = loss_and_gradients(transformer)
    for recompute in (False, True):
        if recompute:
            split.enable_gradient_checkpointing()
        split_loss, split_gradients = loss_and_gradients(split)
        assert split_loss.device == loss.device
        torch.testing.assert_close(split_loss, loss, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(split_gradients[name].to(gradient.device), gradient, rtol=1e-5, atol=1e-5)
    assert_placed(split, placement)
    split.transformer_blocks[-1].to(0)
    with pytest.raises(RuntimeError, match="the placement says"):
        assert_placed(split, placement)
