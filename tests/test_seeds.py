"""Seeds: pinned, distinct for distinct purposes, free of global state; and the draws of a step belong to its image."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segadapt.seeds import derive, numpy_generator, torch_generator

PARTS = st.lists(st.text(st.characters(exclude_characters="\x1f"), max_size=4), max_size=4)


def test_derived_seeds_are_pinned():
    """A changed value here means that noise, orders and corruptions of earlier runs cannot be drawn again."""
    assert derive(0) == 3456079177858693020
    assert derive(7, "gaussian_noise/5", "val/0001", "noise", 3) == 2121043244400024148


@given(PARTS, PARTS, st.integers(0, 20), st.integers(0, 20))
def test_other_parts_or_another_seed_give_another_value(one, other, seed, other_seed):
    is_same = (seed, one) == (other_seed, other)
    assert (derive(seed, *one) == derive(other_seed, *other)) == is_same


def test_parts_do_not_run_together():
    assert (
        len({derive(0, "a", "b"), derive(0, "ab"), derive(0, "ab", ""), derive(0, "", "ab"), derive(0, "b", "a")}) == 5
    )
    assert derive(1, "2") != derive(12)


@given(st.integers(), PARTS)
def test_value_fits_a_torch_seed(seed, parts):
    assert 0 <= derive(seed, *parts) < 2**63


def test_generators_draw_the_same_whatever_was_drawn_before():
    first = torch.rand(3, generator=torch_generator(0, "a")), numpy_generator(0, "a").random(3)
    assert len(torch.rand(5)) == 5  # the global generator moves on
    state = torch.get_rng_state()
    second = torch.rand(3, generator=torch_generator(0, "a")), numpy_generator(0, "a").random(3)
    assert torch.equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], torch.rand(3, generator=torch_generator(0, "b")))


def test_loss_of_an_image_depends_on_seed_task_and_key_alone(build_combined, random_image):
    options = ("tta.optimizer.lr=0", "model.generative.sigma_high=0.7", "model.loss.classes_threshold=2")
    images = {key: random_image(seed=seed) for seed, key in enumerate("abcd")}

    def losses(keys, *, task="t", seed=0, **images_by_key):
        combined = build_combined(*options, f"experiment.seed={seed}")
        return {key: combined.step((images | images_by_key)[key], task=task, key=key).loss for key in keys}

    expected = losses("abcd")
    assert losses("dbca") == expected
    assert losses("cd").items() <= expected.items()
    assert losses("b", b=images["a"])["b"] != expected["a"]
    assert losses("a", task="other")["a"] != expected["a"]
    assert losses("a", seed=1)["a"] != expected["a"]
    assert losses("a", b=random_image(seed=9)) == {"a": expected["a"]}


def test_draws_of_an_image_do_not_depend_on_the_chunks(build_combined, random_image):
    noisy = []
    for max_pairs in (1, 16):
        combined = build_combined(f"model.generative.max_pairs={max_pairs}", "model.generative.sigma_high=0.9")
        noisy.append(combined.sight.noise(random_image(), task="t", key="k"))
    assert all(map(torch.equal, *(vars(each).values() for each in noisy)))


@pytest.mark.parametrize(("high", "low", "top"), [("null", 0.25, 0.25), ("0.25", 0.25, 0.25), ("0.75", 0.25, 0.75)])
def test_sigma_stays_in_its_range_one_draw_a_window(build_combined, random_image, high, low, top):
    combined = build_combined(f"model.generative.sigma_high={high}", "model.generative.stride_px=1")
    image_3HW = random_image(width=96)
    noisy = combined.sight.noise(image_3HW, task="t", key="k")
    sigma_K = noisy.sigma_K
    assert (sigma_K.dtype, sigma_K.shape) == (torch.float32, (65,))
    assert sigma_K.min() >= low
    assert sigma_K.max() <= top
    assert len(sigma_K.unique()) == (65 if top > low else 1)
    assert sigma_K.max() - sigma_K.min() >= 0.8 * (top - low)


def test_noise_is_standard_normal_and_differs_between_windows(build_combined, random_image):
    combined = build_combined("model.generative.stride_px=1")
    image_3HW = random_image(width=96)
    noisy = combined.sight.noise(image_3HW, task="t", key="k")
    noise_Kzyx = noisy.x_t_Kzyx + 0.75 * noisy.target_Kzyx
    assert abs(noise_Kzyx.mean()) < 0.03
    assert abs(noise_Kzyx.std() - 1) < 0.03
    assert torch.corrcoef(noise_Kzyx.flatten(1)).fill_diagonal_(0).abs().max() < 0.4
