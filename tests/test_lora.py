"""Adapters of the teacher: no effect at first, the only thing that moves, gone after merging; cheap in the plan."""

import pytest
import torch
from conftest import CLASSES
from sd3_folder import build_transformer
from test_combined import changed, state

from segadapt.models.build import build_models
from segadapt.models.generative.lora import add_lora, lora_parameters, merge_lora, plain_state
from segadapt.models.generative.plan import training_bytes
from segadapt.models.generative.sd3 import load_transformer

RANK = ("model.update.lora_rank=2", "model.update.lora_alpha=4", "tta.optimizer.lr=1e-2", "model.loss.topk=6")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@pytest.fixture
def transformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_transformer(num_layers=2).eval()


def velocity_of(transformer):
    generator = torch.Generator().manual_seed(1)
    return transformer(
        torch.randn(2, 16, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 7, 32, generator=generator),
        pooled_projections=torch.randn(2, 24, generator=generator),
        timestep=torch.tensor([250.0, 250.0]),
        return_dict=False,
    )[0]


def disturb(transformer):
    """Adapters as after some training: B is no longer 0."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(transformer).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def test_adapters_sit_on_every_attention_projection_and_change_nothing_at_first(transformer):
    before, plain, rng = velocity_of(transformer), transformer.state_dict(), torch.random.get_rng_state()
    add_lora(transformer, rank=3, alpha=6.0, seed=0)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.equal(velocity_of(transformer), before)
    expected = {f"transformer_blocks.{block}.attn.{name}" for block in range(2) for name in PROJECTIONS}
    expected -= {"transformer_blocks.1.attn.to_add_out"}  # the last block drops its text stream
    adapters = lora_parameters(transformer)
    assert {name.partition(".lora_")[0] for name in adapters} == expected
    assert len(adapters) == 2 * len(expected)
    assert {name for name, p in transformer.named_parameters() if p.requires_grad} == set(adapters)
    assert all(p.any() == (".lora_A." in name) for name, p in adapters.items())
    state_now = plain_state(transformer)
    assert state_now.keys() == plain.keys()
    assert all(torch.equal(state_now[name], value) for name, value in plain.items())


def test_adapters_depend_on_the_seed_alone(transformer):
    drawn = []
    for seed, waste in ((0, 1), (0, 2), (1, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(waste)
            model = build_transformer(num_layers=2)
            add_lora(model, rank=2, alpha=2.0, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in lora_parameters(model).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_output_with_adapters_is_that_of_weights_with_the_scaled_product(transformer):
    """W + (alpha / rank) B A, put into a plain model by hand."""
    plain = build_transformer(num_layers=2).eval()
    plain.load_state_dict(transformer.state_dict())
    add_lora(transformer, rank=3, alpha=6.0, seed=0)
    disturb(transformer)
    adapters, own = lora_parameters(transformer), plain.state_dict()
    with torch.no_grad():
        for name in {name.partition(".lora_")[0] for name in adapters}:
            own[f"{name}.weight"] += 2 * (
                adapters[f"{name}.lora_B.default.weight"] @ adapters[f"{name}.lora_A.default.weight"]
            )
    torch.testing.assert_close(velocity_of(transformer), velocity_of(plain), rtol=1e-4, atol=1e-5)


def test_merged_model_is_a_plain_one_that_loads_strictly(transformer, tmp_path):
    names, source = list(transformer.state_dict()), velocity_of(transformer)
    add_lora(transformer, rank=3, alpha=6.0, seed=0)
    disturb(transformer)
    adapted = velocity_of(transformer)
    assert not torch.allclose(adapted, source, atol=1e-2)
    merge_lora(transformer)
    assert list(transformer.state_dict()) == names
    assert lora_parameters(transformer) == {}
    torch.testing.assert_close(velocity_of(transformer), adapted, rtol=1e-4, atol=1e-5)
    transformer.save_pretrained(tmp_path / "transformer", safe_serialization=True)
    loaded = load_transformer(str(tmp_path), revision=None).eval()
    assert torch.equal(velocity_of(loaded), velocity_of(transformer))
    add_lora(transformer, rank=1, alpha=1.0, seed=0)  # and it can be given adapters again
    assert torch.equal(velocity_of(transformer), velocity_of(loaded))


def test_merging_a_model_without_adapters_changes_nothing(transformer):
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    merge_lora(transformer)
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())


def test_of_the_teacher_only_the_adapters_move_and_reset_restores_them(saved_models, compose_settings, random_image):
    files = saved_models(CLASSES)
    full, models = (build_models(compose_settings(*files, *options), CLASSES) for options in ((), RANK))
    combined = models.method
    assert models.fingerprints == full.fingerprints
    before = state(combined)
    first = combined.step(random_image(), task="t", key="0")
    assert first.is_updated
    combined.step(random_image(seed=1), task="t", key="1")
    moved = {name for name in changed(before, state(combined)) if name.startswith("generative.")}
    adapters = {f"generative.{name}" for name in lora_parameters(combined.generative.transformer)}
    assert {name for name in combined.parameters() if name.startswith("generative.")} == adapters
    assert adapters - moved == {  # the last block drops what its text queries read
        f"generative.transformer_blocks.1.attn.add_q_proj.lora_{half}.default.weight" for half in "AB"
    }
    assert moved <= adapters
    combined.reset()
    assert changed(before, state(combined)) == set()
    again = combined.step(random_image(), task="t", key="0")
    assert (again.loss, again.grad_norm) == (first.loss, first.grad_norm)


def test_first_loss_with_adapters_is_that_without(saved_models, compose_settings, random_image):
    files = saved_models(CLASSES)
    losses = [
        build_models(compose_settings(*files, "model.loss.topk=6", *options), CLASSES)
        .method.step(random_image(), task="t", key="k")
        .loss
        for options in ((), RANK)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forced_hooks_of_the_split_change_no_number_with_adapters(
    saved_models, compose_settings, random_image, recompute, precision
):
    settings = compose_settings(
        *saved_models(CLASSES),
        *RANK,
        "model.generative.max_pairs=4",
        f"runtime.precision={precision}",
        f"model.generative.gradient_checkpointing={recompute}",
    )
    plain, hooked = (build_models(settings, CLASSES, force_hooks=force).method for force in (False, True))
    for seed in range(3):
        one, other = (c.step(random_image(seed=seed), task="t", key=str(seed)) for c in (plain, hooked))
        assert one.is_updated
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert changed(state(plain), state(hooked)) == set()


def test_plan_counts_gradients_and_moments_of_the_adapters_alone(transformer):
    whole = training_bytes(transformer, trained=True)
    frozen = training_bytes(transformer, trained=False)
    weights = 4 * sum(p.numel() for p in transformer.parameters())
    assert whole - frozen == 3 * weights
    assert training_bytes(transformer, trained=True, accumulates=True) - frozen == 4 * weights
    add_lora(transformer, rank=2, alpha=2.0, seed=0)
    adapters = 4 * sum(p.numel() for p in lora_parameters(transformer).values())
    assert training_bytes(transformer, trained=True) == frozen + 4 * adapters
    assert training_bytes(transformer, trained=True, accumulates=True) == frozen + 5 * adapters
    assert training_bytes(transformer, trained=False) == frozen + adapters
