"""Scores against a slow loop and against torchmetrics, and the traps of absent classes and sizes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from segadapt.metrics import ConfusionMatrix, predict_at_label_size, scores


def maps(seed: int, num_classes: int, *, size: tuple[int, int] = (13, 17)) -> tuple[np.ndarray, np.ndarray]:
    """Random (prediction, label): some classes absent from each, some pixels ignored."""
    rng = np.random.default_rng(seed)
    label_HW = rng.choice(rng.integers(0, num_classes, 4), size)
    predicted_HW = np.where(rng.random(size) < 0.5, label_HW, rng.choice(rng.integers(0, num_classes, 4), size))
    label_HW[rng.random(size) < 0.2] = 255
    return predicted_HW.astype(np.uint8), label_HW.astype(np.uint8)


def counts_of(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> np.ndarray:
    matrix = ConfusionMatrix(num_classes, "cpu")
    for prediction_HW, label_HW in pairs:
        matrix.update(torch.from_numpy(prediction_HW), torch.from_numpy(label_HW))
    return matrix.counts()


def slow_scores(prediction_HW: np.ndarray, label_HW: np.ndarray, num_classes: int) -> dict[str, float]:
    """Sets of pixels, class by class, straight from the definitions."""
    iou, acc, precision, f1 = [], [], [], []
    scored = label_HW != 255
    for c in range(num_classes):
        truth, found = (label_HW == c) & scored, (prediction_HW == c) & scored
        both = (truth & found).sum()
        if (truth | found).any():
            iou.append(both / (truth | found).sum())
            f1.append(2 * both / (truth.sum() + found.sum()))
        if truth.any():
            acc.append(both / truth.sum())
        if found.any():
            precision.append(both / found.sum())
    return {
        "miou": float(np.mean(iou)),
        "macc": float(np.mean(acc)),
        "mrecall": float(np.mean(acc)),
        "mprecision": float(np.mean(precision)),
        "mf1": float(np.mean(f1)),
        "aacc": float((prediction_HW == label_HW)[scored].mean()),
    }


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([2, 11, 150, 254]))
def test_scores_equal_their_definition_by_pixel_sets(seed, num_classes):
    prediction_HW, label_HW = maps(seed, num_classes)
    result = scores(counts_of([(prediction_HW, label_HW)], num_classes))
    for name, value in slow_scores(prediction_HW, label_HW, num_classes).items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("seed", range(5))
def test_miou_equals_torchmetrics_jaccard_index(seed):
    prediction_HW, label_HW = maps(seed, 20)
    reference = MulticlassJaccardIndex(20, average="macro", ignore_index=255)
    reference.update(torch.from_numpy(prediction_HW).long(), torch.from_numpy(label_HW).long())
    assert scores(counts_of([(prediction_HW, label_HW)], 20)).miou == pytest.approx(
        reference.compute().item(), abs=1e-7
    )


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.permutations(range(4)), st.integers(1, 12))
def test_counts_do_not_depend_on_order_or_split(seed, order, row):
    pairs = [maps(seed + index, 11) for index in range(4)]
    halves = [
        (p[rows], y[rows]) for p, y in (pairs[index] for index in order) for rows in (slice(row), slice(row, None))
    ]
    whole = (np.concatenate([p for p, _ in pairs]), np.concatenate([y for _, y in pairs]))
    assert np.array_equal(counts_of(halves, 11), counts_of([whole], 11))


def test_rows_are_labels_and_columns_predictions():
    counts = counts_of([(np.array([[2, 2]], np.uint8), np.array([[0, 255]], np.uint8))], 3)
    assert counts.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert counts.dtype == np.int64


def test_absent_class_is_nan_and_left_out_but_a_class_only_predicted_counts_zero():
    result = scores(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(result.iou_C, [0.75, 0.0, np.nan])
    np.testing.assert_array_equal(result.acc_C, [0.75, np.nan, np.nan])
    assert (result.miou, result.macc, result.aacc, result.mprecision) == (0.375, 0.75, 0.75, 0.5)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([2, 11, 150]))
def test_mfscore_is_the_mean_over_precision_and_recall_where_both_tell(seed, num_classes):
    """mmsegmentation's formula, class by class, NaN by NaN."""
    counts_CC = counts_of([maps(seed, num_classes)], num_classes)
    with np.errstate(invalid="ignore"):
        precision_C = np.diagonal(counts_CC) / counts_CC.sum(axis=0)
        recall_C = np.diagonal(counts_CC) / counts_CC.sum(axis=1)
        f_C = 2 * precision_C * recall_C / (precision_C + recall_C)
    expected = np.nan if np.isnan(f_C).all() else np.nanmean(f_C)
    assert scores(counts_CC).mfscore == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_classes_without_a_correct_pixel_are_in_mf1_and_not_in_mfscore():
    """Classes: right, only predicted, never predicted, always mistaken, absent."""
    counts_CC = np.array([[4, 2, 0, 0, 0], [0] * 5, [1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5])
    result = scores(counts_CC)
    np.testing.assert_array_equal(result.f1_C, [2 * 4 / (6 + 6), 0, 0, 0, np.nan])
    np.testing.assert_array_equal(result.precision_C, [4 / 6, 0, np.nan, 0, np.nan])
    np.testing.assert_array_equal(result.acc_C, [4 / 6, np.nan, 0, 0, np.nan])
    assert (result.mf1, result.mfscore) == (result.f1_C[0] / 4, result.f1_C[0])


def test_counts_are_exact_above_the_float32_limit():
    counts = np.array([[2**24 + 1, 0], [0, 2**53 - 1]])
    assert scores(counts).miou == 1.0
    assert scores(np.array([[2**25, 1], [0, 1]])).iou_C[0] == 2**25 / (2**25 + 1) != 1.0


@pytest.mark.filterwarnings("error")
def test_all_ignored_gives_nan_everywhere_without_a_warning():
    label_HW = np.full((4, 5), 255, np.uint8)
    result = scores(counts_of([(np.zeros_like(label_HW), label_HW)], 3))
    for name in ("miou", "macc", "aacc", "mf1", "mprecision", "mrecall", "mfscore"):
        assert math.isnan(getattr(result, name)), name
    assert np.isnan(result.iou_C).all()


@pytest.mark.filterwarnings("error")
def test_reset_and_a_new_matrix_hold_no_pixels():
    matrix = ConfusionMatrix(3, "cpu")
    assert matrix.counts().sum() == 0
    matrix.update(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8))
    before = matrix.counts()
    matrix.reset()
    assert matrix.counts().sum() == 0
    assert before.sum() == 4


def test_other_shapes_are_refused_even_with_equally_many_pixels():
    with pytest.raises(ValueError, match=r"\(2, 3\) and label \(3, 2\) differ"):
        ConfusionMatrix(3, "cpu").update(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8))


def test_deterministic_mode_changes_neither_counts_nor_memory_and_stays_on():
    # Its stand-in for bincount in torchmetrics would take 8 bytes x 40,000 px x 150 x 150 = 7.2 GB here.
    prediction_HW, label_HW = maps(0, 150, size=(200, 200))
    expected = counts_of([(prediction_HW, label_HW)], 150)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert np.array_equal(counts_of([(prediction_HW, label_HW)], 150), expected)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def upsampled(logits_Chw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with half-pixel centres, pixel by pixel in float64."""
    num_classes, h, w = logits_Chw.shape
    result = np.empty((num_classes, height, width))
    for row in range(height):
        y = max((row + 0.5) * h / height - 0.5, 0.0)
        top, bottom = int(y), min(int(y) + 1, h - 1)
        for column in range(width):
            x = max((column + 0.5) * w / width - 0.5, 0.0)
            left, right = int(x), min(int(x) + 1, w - 1)
            upper = logits_Chw[:, top, left] * (left + 1 - x) + logits_Chw[:, top, right] * (x - left)
            lower = logits_Chw[:, bottom, left] * (left + 1 - x) + logits_Chw[:, bottom, right] * (x - left)
            result[:, row, column] = upper * (top + 1 - y) + lower * (y - top)
    return result


@pytest.mark.parametrize("size", [(65, 97), (70, 101), (17, 25), (9, 12)])
def test_logits_of_a_65x97_image_are_scored_at_the_size_of_the_label(size):
    logits_Chw = torch.randn(5, 17, 25, generator=torch.Generator().manual_seed(0))
    reference = upsampled(logits_Chw.double().numpy(), *size)
    ranked = np.sort(reference, axis=0)
    is_clear = ranked[-1] - ranked[-2] > 1e-4  # elsewhere float32 may decide otherwise
    prediction_HW = predict_at_label_size(logits_Chw, size)
    assert prediction_HW.dtype == torch.uint8
    assert prediction_HW.shape == size
    assert is_clear.mean() > 0.99
    assert np.array_equal(prediction_HW.numpy()[is_clear], reference.argmax(axis=0)[is_clear])
