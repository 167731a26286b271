"""Which classes each window asks the generative model about, and which pixels count.

K windows, each repeated for every noise draw   C classes   P (window, class) pairs of all windows, flat
y x latent grid
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Candidate classes of every window, flat over windows and sorted by (window, class).

    With several noise draws the draws of an image window are neighbouring windows here, with equal candidates.
    """

    pair_window_P: Tensor  # int64, on the device of the logits
    pair_class_P: Tensor  # int64, likewise
    chosen_KC: Tensor  # bool: class is a candidate of the window
    keep_Kyx: Tensor  # bool: the pixel's own top class is a candidate
    counts: tuple[int, ...]  # candidates of each window, on the host
    draws: int = 1  # windows that are draws of one image window

    def groups(self, max_pairs: int) -> list[tuple[slice, slice]]:
        """Neighbouring windows packed up to max_pairs: (windows, pairs) slices; the draws of an image window stay
        together, and those of more pairs stand alone."""
        out: list[tuple[slice, slice]] = []
        window = pair = first_window = first_pair = 0
        for count in (self.draws * count for count in self.counts[:: self.draws]):
            if window > first_window and pair - first_pair + count > max_pairs:
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


def select(
    q_KCyx: Tensor,
    *,
    topk: int,
    classes_threshold: int,
    generators: list[torch.Generator],
    min_classes: int = 1,
    likely_KC: Tensor | None = None,
    draws: int = 1,
) -> Candidates:
    """Choose the candidate classes of each window (DUSA, section 3.3, with the budget of its released code).

    U: classes that are some pixel's top-1; S: classes in some pixel's top-k; budget: classes_threshold (20).
    |S| <= budget: S. |S| > budget >= |U|: U filled up at random from S. |U| > budget: a random `budget` of U, and
    the pixels whose top-1 class was dropped do not count. Windows with fewer than min_classes candidates are filled up
    from all other classes, which changes no pixel's count (DUSA, appendix F.3, fills uniformly to 20).

    Args:
        q_KCyx: logits of each window on the latent grid, any float dtype; normalised or raw (same order per pixel).
        topk: classes taken per pixel, 1..C.
        classes_threshold: most candidates a window, >= 1.
        generators: one CPU generator a window, of the image's own randomness.
        min_classes: at most classes_threshold; where there are fewer classes, all of them.
        likely_KC: probability of each class in the window, by which the fill is drawn; None: uniformly.
        draws: each window of the result stands that many times in a row.
    """
    assert min_classes <= classes_threshold, (min_classes, classes_threshold)
    K, C, _, _ = q_KCyx.shape
    top_Kkyx = q_KCyx.topk(min(topk, C), dim=1).indices
    present_2KC = torch.zeros(2, K, C, dtype=torch.bool, device=q_KCyx.device)
    present_2KC[0].scatter_(1, top_Kkyx[:, 0].flatten(1), True)
    present_2KC[1].scatter_(1, top_Kkyx.flatten(1), True)
    present_2KC = present_2KC.cpu()  # the one host read: class sets are ragged
    likely_KC = None if likely_KC is None else likely_KC.cpu()  # another one where the fill needs it

    chosen_KC = torch.zeros(K, C, dtype=torch.bool)
    for window, generator in zip(range(K), generators, strict=True):
        U = present_2KC[0, window].nonzero()[:, 0]
        S = present_2KC[1, window].nonzero()[:, 0]
        if len(S) <= classes_threshold:
            chosen = S
        elif len(U) <= classes_threshold:
            rest = (present_2KC[1, window] & ~present_2KC[0, window]).nonzero()[:, 0]
            chosen = torch.cat([U, _draw(rest, classes_threshold - len(U), generator)])
        else:
            chosen = _draw(U, classes_threshold, generator)
        chosen_KC[window, chosen] = True
        missing = min(min_classes, C) - len(chosen)
        if missing > 0:
            rest = (~chosen_KC[window]).nonzero()[:, 0]
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
    keep_Kyx = chosen_KC.gather(1, top_Kyx.flatten(1)).view_as(top_Kyx)
    return Candidates(pairs_P2[:, 0], pairs_P2[:, 1], chosen_KC, keep_Kyx, counts, draws)
