"""Which classes each window asks the generative model about, and which pixels count.

K windows, each repeated for every noise draw   C classes   P (window, class) pairs of all windows, flat
y x latent grid
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from segadapt.config import LossSettings


@dataclass(frozen=True)
class Candidates:
    """Candidate classes of every window, flat over windows and sorted by (window, class).

    With several noise draws the draws of an image window are neighbouring windows here, with equal candidates.
    """

    pair_window_P: Tensor  # int64, on the device of the logits
    pair_class_P: Tensor  # int64, likewise
    chosen_KC: Tensor  # bool: class is a candidate of the window
    keep_Kyx: Tensor  # bool: the pixel counts
    counts: tuple[int, ...]  # candidates of each window, on the host; 0: none of its pixels counts
    draws: int = 1  # windows that are draws of one image window
    own_Kyx: Tensor | None = None  # bool: the pixel's own top class is a candidate; None: those that count

    def groups(self, max_pairs: int) -> list[tuple[slice, slice]]:
        """Neighbouring windows packed up to max_pairs: (windows, pairs) slices; the draws of an image window stay
        together, and those of more pairs stand alone."""
        out: list[tuple[slice, slice]] = []
        window = pair = first_window = first_pair = 0
        for count in (self.draws * count for count in self.counts[:: self.draws]):
            if count and pair > first_pair and pair - first_pair + count > max_pairs:
                out.append((slice(first_window, window), slice(first_pair, pair)))
                first_window, first_pair = window, pair
            window, pair = window + self.draws, pair + count
        out.append((slice(first_window, window), slice(first_pair, pair)))
        return out


def _draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random subset of `count` class ids of the pool."""
    return pool[torch.randperm(len(pool), generator=generator)[:count]]


def _draw_likely(pool: Tensor, count: int, likely_C: Tensor, generator: torch.Generator) -> Tensor:
    """`count` class ids of the pool, one after the other without replacement, each by its probability."""
    weights = likely_C[pool].double().nan_to_num(0.0).clamp(min=1e-300)  # a probability may be 0 in float32
    return pool[torch.multinomial(weights, count, generator=generator)]


def _largest(areas_C: Tensor, threshold: float, count: int) -> Tensor:
    """The class ids above the threshold, at most so many, the largest first; if there is none the largest."""
    order = areas_C.nan_to_num(0.0).argsort(descending=True, stable=True)
    return order[: max(1, min(count, int((areas_C > threshold).sum())))]


def reads_raw(loss: LossSettings) -> bool:
    """Whether `choose` reads the logits as they are, beside the normalised ones."""
    return loss.select == "area" or (loss.fill == "likely" and loss.min_classes > 1)


def choose(
    q_KCyx: Tensor,
    raw_KCyx: Tensor | None,
    loss: LossSettings,
    *,
    generators: list[torch.Generator],
    draws: int,
    ignored_C: Tensor | None,
) -> Candidates:
    """`select` as the settings say.

    Args:
        raw_KCyx: logits on the grid that no LogitNorm has changed; needed where `reads_raw` says so.
        ignored_C: bool, classes never asked about, on the device of the logits; None: there are none.
    """
    likely_KC = areas_KC = None
    if reads_raw(loss):
        assert raw_KCyx is not None
        p_KCyx = raw_KCyx.softmax(dim=1)
        if loss.fill == "likely" and loss.min_classes > 1:
            likely_KC = p_KCyx.mean(dim=(2, 3))
        if loss.select == "area":
            is_counted_Kyx = None if ignored_C is None else ~ignored_C[q_KCyx.argmax(dim=1)]
            areas_KC = areas(p_KCyx, is_counted_Kyx, k=loss.area_k)
    return select(
        q_KCyx,
        topk=loss.topk,
        classes_threshold=loss.classes_threshold,
        generators=generators,
        min_classes=loss.min_classes,
        likely_KC=likely_KC,
        areas_KC=areas_KC,
        area_threshold=loss.area_threshold,
        ignored_C=ignored_C,
        draws=draws,
    )


def areas(p_KCyx: Tensor, is_counted_Kyx: Tensor | None, *, k: int) -> Tensor:
    """Sum over a window's pixels of each pixel's k largest class probabilities: [K, C], in latent pixels.

    Args:
        is_counted_Kyx: pixels that take part; None: all.
    """
    top = p_KCyx.topk(min(k, p_KCyx.shape[1]), dim=1)
    share_Kkyx = top.values if is_counted_Kyx is None else top.values * is_counted_Kyx[:, None]
    areas_KC = p_KCyx.new_zeros(p_KCyx.shape[:2])
    return areas_KC.scatter_add_(1, top.indices.flatten(1), share_Kkyx.flatten(1))


def select(
    q_KCyx: Tensor,
    *,
    topk: int,
    classes_threshold: int,
    generators: list[torch.Generator],
    min_classes: int = 1,
    likely_KC: Tensor | None = None,
    areas_KC: Tensor | None = None,
    area_threshold: float = 0.0,
    ignored_C: Tensor | None = None,
    draws: int = 1,
) -> Candidates:
    """Choose the candidate classes of each window (DUSA, section 3.3, with the budget of its released code).

    U: classes that are some pixel's top-1; S: classes in some pixel's top-k; budget: classes_threshold (20).
    |S| <= budget: S. |S| > budget >= |U|: U filled up at random from S. |U| > budget: a random `budget` of U, and
    the pixels whose top-1 class was dropped do not count. Windows with fewer than min_classes candidates are filled up
    from all other classes, which changes no pixel's count (DUSA, appendix F.3, fills uniformly to 20).
    By area: the classes above the threshold, if there are too many the largest, if there is none the largest one; every
    pixel counts. Ignored classes are never chosen; a pixel on whose top they are names no candidate and does not count,
    and a window of such pixels alone has no candidates.

    Args:
        q_KCyx: logits of each window on the latent grid, any float dtype; normalised or raw (same order per pixel).
        topk: classes taken per pixel, 1..C.
        classes_threshold: most candidates a window, >= 1.
        generators: one CPU generator a window, of the image's own randomness.
        min_classes: at most classes_threshold; where there are fewer classes, all of them.
        likely_KC: probability of each class in the window, by which the fill is drawn; None: uniformly.
        areas_KC: see `areas`; None: candidates are the pixels' top classes.
        area_threshold: what a class must exceed there.
        ignored_C: bool, on the device of the logits; None: no class is ignored.
        draws: each window of the result stands that many times in a row.
    """
    assert min_classes <= classes_threshold, (min_classes, classes_threshold)
    K, C, _, _ = q_KCyx.shape
    top_Kkyx = q_KCyx.topk(min(topk, C), dim=1).indices
    if ignored_C is not None:
        top_Kkyx = torch.where(ignored_C[top_Kkyx[:, :1]], top_Kkyx[:, :1], top_Kkyx)
    present_2KC = torch.zeros(2, K, C, dtype=torch.bool, device=q_KCyx.device)
    present_2KC[0].scatter_(1, top_Kkyx[:, 0].flatten(1), True)
    present_2KC[1].scatter_(1, top_Kkyx.flatten(1), True)
    present_2KC = present_2KC.cpu()  # the one host read: class sets are ragged
    likely_KC = None if likely_KC is None else likely_KC.cpu()  # another one where the fill needs it
    areas_KC = None if areas_KC is None else areas_KC.cpu()
    is_free_C = torch.ones(C, dtype=torch.bool) if ignored_C is None else ~ignored_C.cpu()
    present_2KC &= is_free_C

    chosen_KC = torch.zeros(K, C, dtype=torch.bool)
    for window, generator in zip(range(K), generators, strict=True):
        U = present_2KC[0, window].nonzero()[:, 0]
        S = present_2KC[1, window].nonzero()[:, 0]
        if not len(U):
            continue  # no pixel counts: nothing to ask
        if areas_KC is not None:
            chosen = _largest(areas_KC[window].masked_fill(~is_free_C, -1), area_threshold, classes_threshold)
        elif len(S) <= classes_threshold:
            chosen = S
        elif len(U) <= classes_threshold:
            rest = (present_2KC[1, window] & ~present_2KC[0, window]).nonzero()[:, 0]
            chosen = torch.cat([U, _draw(rest, classes_threshold - len(U), generator)])
        else:
            chosen = _draw(U, classes_threshold, generator)
        chosen_KC[window, chosen] = True
        missing = min(min_classes, int(is_free_C.sum())) - len(chosen)
        if missing > 0:
            rest = (~chosen_KC[window] & is_free_C).nonzero()[:, 0]
            fill = (
                _draw(rest, missing, generator)
                if likely_KC is None
                else _draw_likely(rest, missing, likely_KC[window], generator)
            )
            chosen_KC[window, fill] = True

    chosen_KC = chosen_KC.repeat_interleave(draws, dim=0)
    pairs_P2 = chosen_KC.nonzero()
    counts = tuple(chosen_KC.sum(1).tolist())
    pairs_P2, chosen_KC = pairs_P2.to(q_KCyx.device), chosen_KC.to(q_KCyx.device)
    top_Kyx = top_Kkyx[:, 0].repeat_interleave(draws, dim=0)
    own_Kyx = chosen_KC.gather(1, top_Kyx.flatten(1)).view_as(top_Kyx)
    if areas_KC is None:
        return Candidates(pairs_P2[:, 0], pairs_P2[:, 1], chosen_KC, own_Kyx, counts, draws)
    keep_Kyx = torch.ones_like(own_Kyx) if ignored_C is None else ~ignored_C[top_Kyx]
    return Candidates(pairs_P2[:, 0], pairs_P2[:, 1], chosen_KC, keep_Kyx, counts, draws, own_Kyx)
