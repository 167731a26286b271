"""EATA: entropy minimisation on reliable and non-redundant samples, with an anchor at the source weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from segadapt.config import DataSettings, setting
from segadapt.errors import UserError
from segadapt.methods.learner import Learner
from segadapt.methods.pixels import entropy, mean_where, most_entropy


class Eata(Learner):
    """Efficient anti-forgetting adaptation (Niu et al. 2022): Tent on chosen samples, held near the source weights.

    L = mean over chosen pixels of exp(E0 - H) H + alpha sum_i omega_i (theta_i - theta_source_i)^2   (eq. 3, 5, 8)
    none where no pixel is chosen;
    chosen: H < E0 = margin ln C, and |cos(p, m)| < distance for the running mean m of chosen predictions (eq. 3, 4);
    omega: mean squared gradient of the cross-entropy against own labels, over source images (section 3.3).

    Per pixel: both filters and the weight; m averages probabilities over the chosen pixels of an image. A class that
    fills much of m is redundant: with few classes only rare ones are left, and often none, as m follows chosen pixels
    alone; on ToyTown-C nothing is chosen from the third image on. Raise `distance` to learn more. Omega is per image:
    the gradient of the mean over its pixels. ETA is this method with fisher_alpha 0.

    Published: margin 0.4, distance 0.05, alpha 2000, 2000 source images, m 0.9 m + 0.1 new, SGD 2.5e-4 momentum 0.9.
    """

    @dataclass
    class Options:
        margin: float = setting("reliable: entropy below this times ln C", low=0, high=1)
        distance: float = setting("not redundant: cosine with the running mean below this", low=0, high=1)
        momentum: float = setting("share of the old value in the running mean of predictions", low=0, high=1)
        fisher_alpha: float = setting("weight of the anchor; 0: none (ETA)", low=0)
        fisher_images: int = setting("source images of which the anchor's importances are made", low=1)
        source_split: str = setting("split of the source images")
        source_image_path: str | None = setting("their path template; null: data.image_path")

    can_record = False  # the anchor's gradients come from elsewhere
    fisher: Mapping[str, Tensor]  # importances, from see_source

    def initial_state(self) -> dict[str, Any]:
        return {"mean_C": None}

    def source_data(self, data: DataSettings) -> DataSettings | None:
        o = self.options
        if not o.fisher_alpha:
            return None
        count = None if data.kind == "files" else o.fisher_images
        path = o.source_image_path or data.image_path
        if data.kind == "files" and "{corruption}" in str(path):
            raise UserError(f"tta.options.source_image_path={o.source_image_path}, data.image_path={data.image_path}: "
                            "where are the source images, uncorrupted? Set tta.options.source_image_path and "
                            "tta.options.source_split, or tta.options.fisher_alpha=0.")  # fmt: skip
        return replace(
            data, split=o.source_split, image_path=path, label_path=None, corruptions=[], limit=o.fisher_images,
            count=count, weather="clear",
        )  # fmt: skip

    def see_source(self, images_3HW: Iterable[Tensor]) -> None:
        """Importances of the parameters that move."""
        sums = {name: torch.zeros_like(parameter) for name, parameter in self.moving.items()}
        count = 0
        for image_3HW in images_3HW:
            logits_BChw = self.logits(self.fit(image_3HW))
            cross_entropy(logits_BChw, logits_BChw.detach().argmax(dim=1), reduction="none").mean().backward()
            for name, parameter in self.moving.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.square()
            self._updates.drop()
            count += 1
        self.fisher = {name: total / max(1, count) for name, total in sums.items()}

    def chosen(self, logits_BChw: Tensor) -> Tensor:
        """Which pixels count, [B, h, w]; their mean prediction enters the running one."""
        o, p_BChw = self.options, logits_BChw.detach().softmax(dim=1)
        is_chosen_Bhw = entropy(logits_BChw.detach()) < o.margin * most_entropy(logits_BChw.shape[1])
        mean_C = self.state["mean_C"]
        if mean_C is not None:
            similarity_Bhw = cosine_similarity(p_BChw, mean_C[None, :, None, None], dim=1)
            is_chosen_Bhw &= similarity_Bhw.abs() < o.distance
        new_C = (p_BChw * is_chosen_Bhw[:, None]).sum(dim=(0, 2, 3)) / is_chosen_Bhw.sum().clamp(min=1)
        old_C = new_C if mean_C is None else o.momentum * mean_C + (1 - o.momentum) * new_C
        if is_chosen_Bhw.any():
            self.state["mean_C"] = old_C
        return is_chosen_Bhw

    def loss(self, logits_BChw: Tensor, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        is_chosen_Bhw, H_Bhw = self.chosen(logits_BChw), entropy(logits_BChw)
        weight_Bhw = (self.options.margin * most_entropy(logits_BChw.shape[1]) - H_Bhw.detach()).exp()
        return mean_where(weight_Bhw * H_Bhw, is_chosen_Bhw) + is_chosen_Bhw.any() * self.anchor()

    def anchor(self) -> Tensor:
        """alpha sum_i omega_i (theta_i - theta_source_i)^2."""
        total = torch.zeros((), device=self.device)
        if self.options.fisher_alpha:
            for name, parameter in self.moving.items():
                total = total + (self.fisher[name] * (parameter - self._source[name]).square()).sum()
        return self.options.fisher_alpha * total
