"""What a training run moves: its average against a plain loop, and a file that brings everything back to the bit."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segadapt.errors import UserError
from segadapt.training.state import TrainingState


def state_of(net: nn.Module, *, decay: float = 0.9) -> TrainingState:
    parameters = dict(net.named_parameters())
    return TrainingState(parameters, torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1), decay=decay)


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def train(net: nn.Module, state: TrainingState, steps: int) -> None:
    """Gradients that depend on the step alone, as in training."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        net(torch.randn(4, 5, generator=generator)).square().mean().backward()
        state.advance()


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@given(decay=st.sampled_from((0.0, 0.3, 0.9, 0.999)), steps=st.integers(1, 30))
def test_average_is_that_of_a_loop_with_a_decay_that_warms_up(decay, steps):
    net = small_net()
    state, expected = state_of(net, decay=decay), [p.double() for p in weights(net)]
    for step in range(1, steps + 1):
        train(net, state, 1)
        now = min(decay, (1 + step) / (10 + step))
        expected = [now * old + (1 - now) * p.double() for old, p in zip(expected, weights(net), strict=True)]
    trained = weights(net)
    with state.averaged():
        for one, other in zip(weights(net), expected, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-6)
        assert equal(weights(net), trained) == (decay == 0)


def test_averaged_gives_the_weights_back_to_the_bit_even_after_an_error():
    net = small_net()
    state = state_of(net)
    train(net, state, 5)
    before = weights(net)
    with state.averaged():
        average = weights(net)
    assert equal(weights(net), before)
    with pytest.raises(RuntimeError), state.averaged():
        raise RuntimeError
    assert equal(weights(net), before)
    state.keep_average()
    assert equal(weights(net), average)
    assert not equal(average, before)


def test_a_look_at_the_average_changes_no_later_step():
    nets = small_net(), small_net()
    for net, is_looked_at in zip(nets, (True, False), strict=True):
        state = state_of(net)
        for _ in range(6):
            train(net, state, 1)
            if is_looked_at:
                with state.averaged():
                    net(torch.ones(1, 5))
        state.keep_average()
    assert equal(*map(weights, nets))


def test_advance_is_one_step_of_the_optimizer_and_clears_the_gradients():
    net, twin = small_net(), small_net()
    state = state_of(net)
    train(net, state, 1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    twin(torch.randn(4, 5, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    assert equal(weights(net), weights(twin))
    assert all(p.grad is None for p in net.parameters())
    assert state.step == 1


@pytest.mark.parametrize("before", [0, 1, 4])
def test_a_saved_state_goes_on_to_the_same_bits(tmp_path, before):
    """Weights, average, both moments and the count: without any of these six more steps would end elsewhere."""
    path = tmp_path / "checkpoint.safetensors"
    straight = small_net()
    whole = state_of(straight)
    train(straight, whole, before)
    whole.save(path)
    assert TrainingState.step_of(path) == before
    kept = path.read_bytes()
    other = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    state = state_of(other)
    state.load(path)
    assert state.step == before
    assert equal(weights(other), weights(straight))
    for net, its in ((straight, whole), (other, state)):
        train(net, its, 6)
    assert equal(weights(other), weights(straight))
    for its in (whole, state):
        its.keep_average()
    assert equal(weights(other), weights(straight))
    assert path.read_bytes() == kept  # going on does not write into the file that was read


def test_a_parameter_without_gradient_has_no_moments_and_comes_back(tmp_path):
    """As with the adapters of the last block's text queries."""
    net = small_net()
    state = state_of(net)
    idle = nn.Parameter(torch.ones(2))
    state = TrainingState(state.parameters | {"idle": idle}, torch.optim.AdamW([*net.parameters(), idle]), decay=0.5)
    train(net, state, 2)
    state.save(tmp_path / "checkpoint.safetensors")
    again, other = small_net(), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([*again.parameters(), other])
    restored = TrainingState(dict(again.named_parameters()) | {"idle": other}, optimizer, decay=0.5)
    restored.load(tmp_path / "checkpoint.safetensors")
    for its, moving in ((state, net), (restored, again)):
        train(moving, its, 2)
    assert equal(weights(again), weights(net))
    assert torch.equal(other, idle)


def test_saving_neither_moves_nor_shares_anything(tmp_path):
    net = small_net()
    state = state_of(net)
    train(net, state, 3)
    before, moments = weights(net), copy.deepcopy(state.optimizer.state_dict())
    state.save(tmp_path / "checkpoint.safetensors")
    assert equal(weights(net), before)
    for index, held in state.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][index][key]) for key, value in held.items())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(5, 7),
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)),  # copying one into three would broadcast
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4)),
    ],
    ids=["fewer", "more", "broadcasts", "wider"],
)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_state_of_other_weights_is_refused_and_nothing_is_read(tmp_path, other, is_reversed):
    saved, read = (other, small_net()) if is_reversed else (small_net(), copy.deepcopy(other))
    path = tmp_path / "checkpoint.safetensors"
    state_of(saved).save(path)
    before = weights(read)
    with pytest.raises(UserError, match=rf"^{path}: other weights than this run trains\. Remove the file, or [^\n]*$"):
        state_of(read).load(path)
    assert equal(weights(read), before)


def test_decay_reaches_its_setting_when_the_warm_up_is_over():
    """(1 + step) / (10 + step) passes 0.9 at step 80: from there on the average forgets at the rate of the setting."""
    net = nn.Linear(1, 1, bias=False)
    state = TrainingState({"w": net.weight}, torch.optim.AdamW([net.weight], lr=0.0), decay=0.9)
    nn.init.zeros_(net.weight)
    for _ in range(200):
        net.weight.grad = torch.zeros_like(net.weight)
        state.advance()
    nn.init.ones_(net.weight)
    for _ in range(10):
        net.weight.grad = torch.zeros_like(net.weight)
        state.advance()
    with state.averaged():
        assert net.weight.item() == pytest.approx(1 - math.pow(0.9, 10), rel=1e-5)
