"""Weights of the classes in a training loss, from the labelled pixels of each image.

N images   C classes   n_c pixels of class c   f_c its share of all labelled pixels   m_c images that show it
"""

from collections.abc import Callable

import numpy as np

LARGEST = 10.0  # of max_over_count; the plain ratio reaches 10,000 and drowns the common classes
RATIO = 10  # of the commonest to the rarest class that is there, in pixels: from here on, weights are worth a try


def _inverse_sqrt(pixels_NC: np.ndarray) -> np.ndarray:
    return _mean_one(pixels_NC.sum(axis=0) ** -0.5)


def _enet_log(pixels_NC: np.ndarray) -> np.ndarray:
    """Paszke et al. 2016."""
    return 1 / np.log(1.02 + pixels_NC.sum(axis=0) / pixels_NC.sum())


def _median_frequency(pixels_NC: np.ndarray) -> np.ndarray:
    """Eigen and Fergus 2015: the frequency counts only the images that show the class."""
    shown_NC = pixels_NC > 0
    frequency_C = pixels_NC.sum(axis=0) / (shown_NC * pixels_NC.sum(axis=1, keepdims=True)).sum(axis=0)
    return np.median(frequency_C) / frequency_C


def _effective_number(pixels_NC: np.ndarray) -> np.ndarray:
    """Cui et al. 2019, a sample being an image: of millions of pixels all effective numbers are alike."""
    beta = 1 - 1 / len(pixels_NC)
    return _mean_one((1 - beta) / (1 - beta ** (pixels_NC > 0).sum(axis=0)))


def _max_over_count(pixels_NC: np.ndarray, cap: float = LARGEST) -> np.ndarray:
    pixels_C = pixels_NC.sum(axis=0)
    return np.minimum(pixels_C.max() / pixels_C, cap)


def _mean_one(weights_C: np.ndarray) -> np.ndarray:
    return weights_C / weights_C.mean()


# Name -> its formula, and int64 [N, C] pixels, every class in some image, to float64 [C].
RECIPES: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "inverse_sqrt": ("1 / sqrt(f_c), mean 1", _inverse_sqrt),
    "enet_log": ("1 / ln(1.02 + f_c)", _enet_log),
    "median_frequency": ("median over classes of g / g_c, g_c the share of c in the images that show it",
                         _median_frequency),
    "effective_number": ("(1 - b) / (1 - b^m_c), b = 1 - 1 / images, mean 1", _effective_number),
    "max_over_count": (f"max n / n_c, at most {LARGEST:g}", _max_over_count),
}  # fmt: skip


def class_weights(recipe: str, pixels_NC: np.ndarray, *, cap: float | None = None) -> np.ndarray:
    """Weight of each class by RECIPES[recipe]: float64 [C], NaN for a class that no image shows.

    Args:
        pixels_NC: int64, labelled pixels; classes without any take no part in means and medians.
        cap: of max_over_count alone, its largest weight; None: LARGEST.
    """
    options = {} if cap is None else {"cap": cap}
    weights_C = np.full(pixels_NC.shape[1], np.nan)
    is_there_C = pixels_NC.any(axis=0)
    labelled_NC = pixels_NC[pixels_NC.any(axis=1)][:, is_there_C]
    if labelled_NC.size:
        weights_C[is_there_C] = RECIPES[recipe][1](labelled_NC, **options)
    return weights_C


def ratio(pixels_NC: np.ndarray) -> float:
    """Pixels of the commonest class over those of the rarest that is there; NaN without labels."""
    pixels_C = pixels_NC.sum(axis=0)
    there_C = pixels_C[pixels_C > 0]
    return float(there_C.max() / there_C.min()) if there_C.size else float("nan")
