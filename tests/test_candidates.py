"""Candidate classes: the three cases of the budget, the keep mask, and how pairs are packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segadapt.models.generative.candidates import Candidates, areas, select
from segadapt.seeds import torch_generator


def random_q(windows, classes, *, side=3, seed=0):
    return torch.randn(windows, classes, side, side, generator=torch.Generator().manual_seed(seed))


def q_with(tops_by_pixel, classes):
    """One window of one row whose pixels rank the given classes first, in that order."""
    q_1C1x = torch.zeros(1, classes, 1, len(tops_by_pixel))
    for x, ranked in enumerate(tops_by_pixel):
        for place, index in enumerate(ranked):
            q_1C1x[0, index, 0, x] = 100 - place
    return q_1C1x


def choose(q_KCyx, topk, budget, *, seed=0, **options):
    generators = [torch_generator(seed, window) for window in range(len(q_KCyx))]
    return select(q_KCyx, topk=topk, classes_threshold=budget, generators=generators, **options)


def chosen_by(candidates, window=0):
    return set(candidates.chosen_KC[window].nonzero()[:, 0].tolist())


@settings(max_examples=200)
@given(
    windows=st.integers(1, 3),
    classes=st.integers(1, 9),
    topk=st.integers(1, 5),
    budget=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_selection_follows_the_three_cases(windows, classes, topk, budget, seed):
    q_KCyx = random_q(windows, classes, seed=seed)
    got = choose(q_KCyx, topk, budget, seed=seed)
    for window in range(windows):
        ranked = [sorted(range(classes), key=lambda k: -pixel[k]) for pixel in q_KCyx[window].flatten(1).T.tolist()]
        U = {ranking[0] for ranking in ranked}
        S = {index for ranking in ranked for index in ranking[:topk]}
        chosen = chosen_by(got, window)
        if len(S) <= budget:
            assert chosen == S
        elif len(U) <= budget:
            assert U <= chosen <= S
            assert len(chosen) == budget
        else:
            assert chosen < U
            assert len(chosen) == budget
        assert got.keep_Kyx[window].flatten().tolist() == [ranking[0] in chosen for ranking in ranked]


@given(windows=st.integers(1, 4), topk=st.integers(1, 3), budget=st.integers(1, 6))
def test_pairs_list_every_chosen_class_once_sorted(windows, topk, budget):
    got = choose(random_q(windows, 8), topk, budget)
    pairs = list(zip(got.pair_window_P.tolist(), got.pair_class_P.tolist(), strict=True))
    assert pairs == [(window, index) for window in range(windows) for index in sorted(chosen_by(got, window))]
    assert got.counts == tuple(len(chosen_by(got, window)) for window in range(windows))


def test_few_classes_are_all_asked():
    got = choose(q_with([[0], [3], [3]], 6), 1, 2)
    assert chosen_by(got) == {0, 3}
    assert got.keep_Kyx.all()


def test_top1_classes_are_never_crowded_out_by_the_fill():
    q_KCyx = q_with([[0, 2, 3, 4], [1, 5, 6, 7]], 10)
    fills = [chosen_by(choose(q_KCyx, 4, 4, seed=seed)) for seed in range(60)]
    assert all({0, 1} < chosen and len(chosen) == 4 and chosen <= set(range(8)) for chosen in fills)
    drawn = [sum(index in chosen for chosen in fills) for index in range(2, 8)]
    assert all(5 <= count <= 35 for count in drawn)  # 20 expected of 60; 5 standard deviations are 18


def test_pixels_of_dropped_top1_classes_do_not_count():
    q_KCyx = q_with([[0], [1], [2], [1]], 6)
    masks = set()
    for seed in range(20):
        got = choose(q_KCyx, 1, 2, seed=seed)
        assert chosen_by(got) < {0, 1, 2}
        assert got.keep_Kyx.flatten().tolist() == [index in chosen_by(got) for index in (0, 1, 2, 1)]
        masks.add(tuple(got.keep_Kyx.flatten().tolist()))
    assert len(masks) == 3  # each class is the dropped one now and then


def test_nothing_is_filled_in_at_k_1():
    assert chosen_by(choose(q_with([[0], [1]], 30), 1, 20)) == {0, 1}


@pytest.mark.parametrize(("topk", "budget"), [(5, 6), (1, 3)])
def test_draws_depend_on_the_generator_of_the_window_alone(topk, budget):
    q_KCyx = random_q(3, 12)
    first, second = choose(q_KCyx, topk, budget), choose(q_KCyx, topk, budget)
    assert torch.equal(first.chosen_KC, second.chosen_KC)
    backwards = select(
        q_KCyx.flip(0),
        topk=topk,
        classes_threshold=budget,
        generators=[torch_generator(0, window) for window in (2, 1, 0)],
    )
    assert torch.equal(backwards.chosen_KC.flip(0), first.chosen_KC)
    others = [choose(q_KCyx, topk, budget, seed=seed).chosen_KC for seed in range(1, 6)]
    assert any(not torch.equal(other, first.chosen_KC) for other in others)


def test_normalising_the_logits_changes_no_choice():
    q_KCyx = random_q(2, 8)
    raw, normalised = choose(q_KCyx, 3, 4), choose(torch.nn.functional.normalize(q_KCyx, dim=1), 3, 4)
    assert torch.equal(raw.chosen_KC, normalised.chosen_KC)
    assert torch.equal(raw.keep_Kyx, normalised.keep_Kyx)


@settings(max_examples=200)
@given(
    windows=st.integers(1, 3),
    classes=st.integers(1, 9),
    budget=st.integers(1, 9),
    least=st.integers(1, 9),
    likely=st.booleans(),
    seed=st.integers(0, 99),
)
def test_filling_adds_classes_up_to_the_minimum_and_changes_nothing_else(windows, classes, budget, least, likely, seed):
    q_KCyx, least = random_q(windows, classes, seed=seed), min(least, budget)
    likely_KC = q_KCyx.softmax(dim=1).mean(dim=(2, 3)) if likely else None
    plain = choose(q_KCyx, 1, budget, seed=seed)
    filled = choose(q_KCyx, 1, budget, seed=seed, min_classes=least, likely_KC=likely_KC)
    assert torch.equal(filled.keep_Kyx, plain.keep_Kyx)
    for window in range(windows):
        assert chosen_by(plain, window) <= chosen_by(filled, window)
        assert len(chosen_by(filled, window)) == max(len(chosen_by(plain, window)), min(least, classes))


@pytest.mark.parametrize(("likely_C", "share"), [(None, 1 / 3), ((0.9, 0.0, 0.025, 0.075), 0.25)])
def test_fill_is_uniform_or_by_probability_and_without_the_chosen(likely_C, share):
    """Of classes 1, 2, 3 beside the chosen 0: how often class 2 is the one that is added."""
    q_KCyx, likely_KC = q_with([[0]], 4), None if likely_C is None else torch.tensor([likely_C])
    drawn = [chosen_by(choose(q_KCyx, 1, 4, seed=s, min_classes=2, likely_KC=likely_KC)) - {0} for s in range(600)]
    assert all(len(added) == 1 for added in drawn)
    count = sum(added == {2} for added in drawn)
    assert abs(count - 600 * share) < 5 * (600 * share * (1 - share)) ** 0.5
    if likely_C is not None:
        assert {1} not in drawn


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_fill_takes_classes_without_a_probability_where_no_other_is_left(value):
    likely_KC = torch.tensor([[1.0, value, value]])
    assert chosen_by(choose(q_with([[0]], 3), 1, 3, min_classes=3, likely_KC=likely_KC)) == {0, 1, 2}


@settings(max_examples=100)
@given(
    classes=st.integers(1, 7),
    k=st.integers(1, 4),
    budget=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.8, 2.0, 99.0]),
    ignored=st.sets(st.integers(0, 6), max_size=3),
    seed=st.integers(0, 99),
)
def test_area_takes_the_classes_above_the_threshold_the_largest_first(classes, k, budget, threshold, ignored, seed):
    """The sums pixel by pixel; pixels whose top class is ignored add to none."""
    q_KCyx = random_q(2, classes, seed=seed).double()
    ignored_C = torch.tensor([index in ignored for index in range(classes)])
    p_KCyx, is_counted_Kyx = q_KCyx.softmax(dim=1), ~ignored_C[q_KCyx.argmax(dim=1)]
    areas_KC = areas(p_KCyx, is_counted_Kyx, k=k)
    got = choose(q_KCyx, 1, budget, areas_KC=areas_KC, area_threshold=threshold, ignored_C=ignored_C)
    for window in range(2):
        sums = dict.fromkeys(range(classes), 0.0)
        for pixel in p_KCyx[window].flatten(1).T.tolist():
            ranked = sorted(range(classes), key=lambda c, p=pixel: -p[c])
            if ranked[0] not in ignored:
                for index in ranked[:k]:
                    sums[index] += pixel[index]
        assert areas_KC[window].tolist() == pytest.approx(list(sums.values()), abs=1e-12)
        free = sorted(set(sums) - ignored, key=lambda c, of=sums: -of[c])
        expected = [c for c in free if sums[c] > threshold][:budget] or free[:1]
        assert chosen_by(got, window) == (set(expected) if is_counted_Kyx[window].any() else set())
    assert torch.equal(got.keep_Kyx, is_counted_Kyx)
    top_Kyx = q_KCyx.argmax(dim=1)
    assert torch.equal(got.own_Kyx, got.chosen_KC.gather(1, top_Kyx.flatten(1)).view_as(top_Kyx))


@settings(max_examples=100)
@given(
    classes=st.integers(1, 7),
    topk=st.integers(1, 3),
    budget=st.integers(1, 5),
    least=st.integers(1, 5),
    ignored=st.sets(st.integers(0, 6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_ignored_classes_are_never_asked_and_their_pixels_never_count(classes, topk, budget, least, ignored, seed):
    """As if each pixel of an ignored class were not there: the choice is that among the other pixels."""
    q_KCyx, ignored_C = random_q(3, classes, seed=seed), torch.tensor([index in ignored for index in range(classes)])
    top_Kyx, least = q_KCyx.argmax(dim=1), min(least, budget)
    got = choose(q_KCyx, topk, budget, ignored_C=ignored_C, min_classes=least)
    for window in range(3):
        chosen, free = chosen_by(got, window), set(range(classes)) - ignored
        pixels = [p for p in q_KCyx[window].flatten(1).T if int(p.argmax()) not in ignored]
        if not pixels:
            assert chosen == set()
            continue
        named = {c for p in pixels for c in p.topk(min(topk, classes)).indices.tolist()} - ignored
        assert chosen <= free
        assert len(chosen) == max(min(budget, len(named)), min(least, len(free)))
        assert len(named) > budget or named <= chosen
    expected_Kyx = got.chosen_KC.gather(1, top_Kyx.flatten(1)).view_as(top_Kyx)
    assert torch.equal(got.keep_Kyx, expected_Kyx)
    assert not got.keep_Kyx[ignored_C[top_Kyx]].any()


@given(windows=st.integers(1, 3), draws=st.integers(1, 4), least=st.integers(1, 3))
def test_draws_repeat_each_window_with_its_candidates(windows, draws, least):
    q_KCyx = random_q(windows, 6)
    once, got = (choose(q_KCyx, 1, 3, min_classes=least, draws=count) for count in (1, draws))
    rows = [window for window in range(windows) for _ in range(draws)]
    assert torch.equal(got.chosen_KC, once.chosen_KC[rows])
    assert torch.equal(got.keep_Kyx, once.keep_Kyx[rows])
    assert got.counts == tuple(once.counts[window] for window in rows)
    pairs = list(zip(got.pair_window_P.tolist(), got.pair_class_P.tolist(), strict=True))
    assert pairs == [(row, index) for row in range(len(rows)) for index in sorted(chosen_by(got, row))]


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 40))
def test_groups_never_part_the_draws_of_a_window(counts, draws, max_pairs):
    none = torch.empty(0)
    rows = tuple(count for count in counts for _ in range(draws))
    groups = Candidates(none, none, none, none, rows, draws).groups(max_pairs)
    blocks = Candidates(none, none, none, none, tuple(draws * count for count in counts)).groups(max_pairs)
    assert [of_pairs for _, of_pairs in groups] == [of_pairs for _, of_pairs in blocks]
    assert [w for of_windows, _ in groups for w in range(len(rows))[of_windows]] == list(range(len(rows)))
    assert all(of_windows.start % draws == 0 for of_windows, _ in groups)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12).filter(any), st.integers(1, 5))
def test_windows_without_candidates_make_no_group_of_their_own(counts, max_pairs):
    none = torch.empty(0)
    groups = Candidates(none, none, none, none, tuple(counts)).groups(max_pairs)
    assert [w for of_windows, _ in groups for w in range(len(counts))[of_windows]] == list(range(len(counts)))
    pairs = [of_pairs.stop - of_pairs.start for _, of_pairs in groups]
    assert all(pairs)
    assert sum(pairs) == sum(counts)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_groups_cover_all_pairs_once_and_are_as_full_as_fits(counts, max_pairs):
    none = torch.empty(0)
    groups = Candidates(none, none, none, none, tuple(counts)).groups(max_pairs)
    assert [w for of_windows, _ in groups for w in range(len(counts))[of_windows]] == list(range(len(counts)))
    assert [p for _, of_pairs in groups for p in range(sum(counts))[of_pairs]] == list(range(sum(counts)))
    for of_windows, of_pairs in groups:
        pairs = of_pairs.stop - of_pairs.start
        assert pairs == sum(counts[of_windows])
        assert pairs <= max_pairs or of_windows.stop - of_windows.start == 1
        if of_windows.stop < len(counts):
            assert pairs + counts[of_windows.stop] > max_pairs
