"""Pixel contrast against double loops in float64, its guards, and which pixels become anchors."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional as F

from segadapt.losses import contrast
from segadapt.losses.contrast import Anchors, Projection, choose_anchors, label_on_grid, pixel_contrast
from segadapt.losses.memory import Rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(rows, seed=0, width=5):
    drawn = torch.randn(rows, width, generator=generator(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=1).requires_grad_()


def anchors_of(classes, there=None):
    class_S = torch.tensor(classes)
    is_there_S = torch.ones(len(classes), dtype=torch.bool) if there is None else torch.tensor(there)
    return Anchors(torch.arange(len(classes)), class_S, is_there_S)


def by_loops(anchor_SD, anchors, rows=None, *, temperature=0.1, negatives=math.inf, hardest_share=1.0):
    """Mean of l_a, one pair of embeddings at a time."""
    places = [s for s in range(len(anchor_SD)) if anchors.is_there_S[s]]
    memory = [r for r in range(len(rows.class_R)) if rows.is_there_R[r]] if rows else []
    losses = []
    for a in places:
        own, f_a = anchors.class_S[a], anchor_SD[a].detach().numpy()
        s = [(anchors.class_S[b] == own, np.dot(f_a, anchor_SD[b].detach().numpy())) for b in places if b != a]
        from_memory = [(rows.class_R[r] == own, np.dot(f_a, rows.embedding_RD[r].numpy())) for r in memory]
        of_others = [cosine for same, cosine in from_memory if not same]
        hardest = sorted(of_others, reverse=True)[: math.ceil(hardest_share * len(of_others))]
        drawn = [cosine for cosine in of_others if cosine in hardest][: int(min(negatives, len(of_others)))]
        positives = [cosine for same, cosine in s + from_memory if same]
        mass = sum(math.exp(cosine / temperature) for cosine in [c for same, c in s if not same] + drawn)
        terms = [-math.log((e := math.exp(cosine / temperature)) / (e + mass)) for cosine in positives]
        if terms:
            losses.append(sum(terms) / len(terms))
    return (sum(losses) / len(losses) if losses else 0.0), len(losses)


def loss_of(anchor_SD, anchors, rows=None, **options):
    return pixel_contrast(anchor_SD, anchors, temperature=0.1, base_temperature=0.07, memory=rows, **options)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9),
    st.integers(0, 99),
)
@example([(1, False)], 0)  # no eligible class
@example([(1, True)], 0)  # one anchor
@example([(1, True), (1, True)], 0)  # no negatives
@example([(1, True), (2, True)], 0)  # no positives
@example([(1, True), (2, True), (2, True)], 0)  # a class with one anchor
def test_the_loss_is_that_of_double_loops_finite_and_differentiable(drawn, seed):
    anchor_SD, anchors = unit(len(drawn), seed), anchors_of(*zip(*drawn, strict=True))
    loss, counted = loss_of(anchor_SD, anchors)
    expected, number = by_loops(anchor_SD, anchors)
    assert loss.item() == pytest.approx(0.1 / 0.07 * expected, rel=1e-12, abs=1e-12)
    assert counted == number
    loss.backward()
    assert torch.isfinite(anchor_SD.grad).all()  # pyright: ignore
    assert not anchor_SD.grad[~anchors.is_there_S].any()  # pyright: ignore


@pytest.mark.parametrize("negatives", [1, 4, 100])
@pytest.mark.parametrize("hardest_share", [0.3, 1.0])
def test_the_loss_with_a_memory_is_that_of_double_loops(negatives, hardest_share):
    anchor_SD, anchors = unit(6), anchors_of([0, 0, 1, 2, 2, 3])
    rows = Rows(unit(40, 1).detach(), torch.arange(40) % 5, torch.arange(40) % 7 != 0)
    chosen = {"negatives": negatives, "hardest_share": hardest_share}
    loss, counted = loss_of(anchor_SD, anchors, rows, **chosen)
    expected, number = by_loops(anchor_SD, anchors, rows, **chosen)
    assert loss.item() == pytest.approx(0.1 / 0.07 * expected, rel=1e-12)
    assert counted == number == 6


def test_a_whole_number_of_hardest_rows_is_not_rounded_up():
    """In float32 0.15 x 100 is above 15, which asked for one row more than were sorted."""
    anchor_SD, anchors = unit(2), anchors_of([0, 0])
    rows = Rows(unit(100, 1).detach(), torch.ones(100, dtype=torch.int64), torch.ones(100) > 0)
    loss, _ = loss_of(anchor_SD, anchors, rows, negatives=100, hardest_share=0.15)
    expected, _ = by_loops(anchor_SD, anchors, rows, hardest_share=0.15)
    assert loss.item() == pytest.approx(0.1 / 0.07 * expected, rel=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 50, 100, 300])
def test_every_share_in_hundredths_is_rounded_up_as_in_fractions(rows):
    """In float64 0.07 x 100 is above 7, and 0.29 x 100 below 29."""
    logits_1R, may_be_1R = torch.arange(rows)[None].double(), torch.ones(1, rows, dtype=torch.bool)
    for hundredths in range(1, 100):
        found = contrast._drawn(logits_1R, may_be_1R, rows, hundredths / 100).sum()
        assert found == math.ceil(Fraction(hundredths, 100) * rows), hundredths


def test_the_gradient_is_that_of_finite_differences():
    anchors, rows = anchors_of([0, 0, 1, 1]), Rows(unit(12, 1).detach(), torch.arange(12) % 3, torch.ones(12) > 0)
    assert torch.autograd.gradcheck(lambda anchor_SD: loss_of(anchor_SD, anchors, rows, negatives=9)[0], unit(4))


def test_a_large_similarity_does_not_overflow():
    anchor_SD = torch.eye(4, dtype=torch.float32)[[0, 0, 0, 1]].requires_grad_()
    loss, _ = pixel_contrast(anchor_SD, anchors_of([0, 1, 1, 0]), temperature=1e-3, base_temperature=1e-3)
    loss.backward()
    # anchors 0, 1, 2 are alike: 0 is 1000 nearer to both negatives than to 3, 1 and 2 have one negative just as near
    assert loss.item() == pytest.approx((1000 + math.log(2) + 2 * math.log(2) + math.log(3)) / 4)
    assert torch.isfinite(anchor_SD.grad).all()  # pyright: ignore


# Anchors


def choose(label, predicted, **options):
    defaults = {"max_samples": 40, "max_views": 6, "min_views": None, "fill": "shrink", "generator": generator()}
    return choose_anchors(torch.tensor(label), torch.tensor(predicted), num_classes=4, **(defaults | options))


def taken(anchors):
    return anchors.pixel_S[anchors.is_there_S].tolist()


def row(*runs):
    """[1, 1, x] label of (class, pixels) runs."""
    return [[[c for c, pixels in runs for _ in range(pixels)]]]


@pytest.mark.parametrize(
    ("hard", "easy", "expected_hard"),
    [(9, 9, 3), (9, 4, 3), (4, 9, 3), (9, 2, 4), (2, 9, 2), (9, 0, 6), (0, 9, 0), (3, 3, 3), (12, 3, 3)],
)
def test_hard_and_easy_pixels_come_in_halves_or_fill_up_each_other(hard, easy, expected_hard):
    anchors = choose(row((1, hard + easy)), row((2, hard), (1, easy)), min_views=6)
    assert len(set(taken(anchors))) == 6
    assert sum(pixel < hard for pixel in taken(anchors)) == expected_hard


@pytest.mark.parametrize(("max_views", "expected_hard"), [(1, 0), (5, 2)])
def test_an_odd_number_takes_one_more_easy_pixel(max_views, expected_hard):
    anchors = choose(row((1, 18)), row((2, 9), (1, 9)), max_views=max_views)
    assert (len(taken(anchors)), sum(pixel < 9 for pixel in taken(anchors))) == (max_views, expected_hard)


def test_a_class_takes_part_with_more_than_max_views_pixels_or_from_min_views_on():
    label = row((0, 7), (1, 6), (2, 3), (255, 9))
    assert choose(label, label).class_S[choose(label, label).is_there_S].unique().tolist() == [0]
    anchors = choose(label, label, min_views=4)
    assert anchors.class_S[anchors.is_there_S].unique().tolist() == [0, 1]


def test_the_samples_are_shared_out_among_classes_of_all_images():
    label = [row((0, 20), (1, 20))[0], row((1, 20), (255, 20))[0]]
    anchors = choose(label, label, max_samples=16)  # 16 // 3 pairs = 5 each
    classes = anchors.class_S[anchors.is_there_S]
    assert [(classes == c).sum().item() for c in range(4)] == [5, 10, 0, 0]
    flat = torch.tensor(label).flatten()
    assert torch.equal(flat[taken(anchors)], classes)


@pytest.mark.parametrize(("fill", "expected"), [("shrink", 4), ("repeat", 6)])
def test_a_short_class_shrinks_or_repeats_all_its_pixels_evenly(fill, expected):
    anchors = choose(row((1, 4)), row((2, 1), (1, 3)), min_views=1, fill=fill)
    assert len(taken(anchors)) == expected
    assert {taken(anchors).count(pixel) for pixel in range(4)} <= {1, 2}


@pytest.mark.parametrize("label", [row((255, 20)), row((1, 3), (2, 3)), row(*[(c, 7) for c in (0, 1, 2)])])
def test_no_class_that_is_large_enough_or_more_classes_than_samples_give_no_anchor(label):
    assert taken(choose(label, label, max_samples=2)) == []


def test_another_step_draws_other_pixels_and_all_are_drawn_alike():
    label, predicted = row((1, 24)), row((2, 12), (1, 12))
    counts = torch.zeros(24)
    for seed in range(400):
        counts[taken(choose(label, predicted, generator=generator(seed)))] += 1
    assert (counts > 60).all()  # 100 expected of each, deviation 9
    assert (counts < 140).all()


def test_labels_come_to_the_grid_by_nearest_at_its_exact_size():
    label_BHW = torch.arange(7 * 5).view(1, 7, 5)
    rows, columns = [0, 2, 4], [0, 1, 2, 3]  # floor(index * 7 / 3), floor(index * 5 / 4)
    assert label_on_grid(label_BHW, torch.Size([3, 4]))[0].tolist() == [[5 * y + x for x in columns] for y in rows]


@pytest.mark.parametrize(("kind", "weights"), [("mlp", 3), ("linear", 1)])
def test_a_projection_gives_unit_vectors(kind, weights):
    """In float32 also where the convolutions run in bf16: lengths were once rounded too."""
    projection = Projection(6, 9, kind=kind)
    with torch.autocast("cpu", torch.bfloat16):
        embedding_BDyx = projection(torch.randn(2, 6, 3, 4, generator=generator()).bfloat16())
    assert embedding_BDyx.shape == (2, 9, 3, 4)
    torch.testing.assert_close(embedding_BDyx.norm(dim=1), torch.ones(2, 3, 4))
    assert sum(name.endswith("weight") for name, _ in projection.named_parameters()) == weights
