"""Recipes of class weights: their formulas by hand, and what holds of all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segadapt import config, config_verbs
from segadapt.training.class_weights import LARGEST, RECIPES, class_weights, ratio

PIXELS_NC = np.array([[60, 40, 0], [100, 0, 0], [38, 60, 2]])  # f = 198, 100, 2 of 300


@pytest.mark.parametrize(
    ("recipe", "expected_C"),
    [
        ("inverse_sqrt", 3 * np.array([198**-0.5, 0.1, 2**-0.5]) / (198**-0.5 + 0.1 + 2**-0.5)),
        ("enet_log", 1 / np.log(1.02 + np.array([198, 100, 2]) / 300)),
        ("median_frequency", 0.5 / np.array([198 / 300, 100 / 200, 2 / 100])),
        ("effective_number", 3 * np.array([9 / 19, 9 / 15, 1]) / (9 / 19 + 9 / 15 + 1)),  # b = 2/3
        ("max_over_count", [1, 1.98, LARGEST]),
    ],
)
def test_the_formulas(recipe, expected_C):
    assert class_weights(recipe, PIXELS_NC) == pytest.approx(np.asarray(expected_C, float))


def test_every_recipe_can_be_asked_for():
    assert config.fields_of(config_verbs.CheckConfig)["check.class_weights"].metadata["choices"] == tuple(RECIPES)


counts = st.lists(st.lists(st.integers(0, 10**7), min_size=4, max_size=4), min_size=1, max_size=6).map(np.array)


@pytest.mark.parametrize("recipe", RECIPES)
@given(pixels_NC=counts)
def test_rarer_classes_weigh_more_and_absent_ones_nothing_at_all(recipe, pixels_NC):
    weights_C, pixels_C = class_weights(recipe, pixels_NC), pixels_NC.sum(axis=0)
    assert np.array_equal(np.isnan(weights_C), pixels_C == 0)
    there_C = weights_C[pixels_C > 0]
    assert (there_C > 0).all()
    assert np.isfinite(there_C).all()
    if recipe in ("inverse_sqrt", "enet_log", "max_over_count"):
        assert (np.diff(weights_C[np.argsort(pixels_C)][(pixels_C == 0).sum() :]) <= 1e-12).all()
    wider_NC = np.insert(pixels_NC, 1, 0, axis=1)  # a class that is nowhere changes no other
    assert class_weights(recipe, wider_NC)[[0, 2, 3, 4]] == pytest.approx(weights_C, nan_ok=True)
    more_NC = np.concatenate([pixels_NC, np.zeros_like(pixels_NC)])  # nor does an image without labels
    assert class_weights(recipe, more_NC) == pytest.approx(weights_C, nan_ok=True)


def test_the_ratio_is_of_classes_that_are_there():
    assert ratio(PIXELS_NC) == 99
    assert ratio(np.array([[5, 0]])) == 1
    assert np.isnan(ratio(np.zeros((2, 3), int)))
