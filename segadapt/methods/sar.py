"""SAR: sharpness-aware and reliable entropy minimisation, with recovery."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config import setting
from segadapt.methods.learner import Learner, below_top
from segadapt.methods.pixels import entropy, mean_where, most_entropy
from segadapt.models.discriminative import Segmenter
from segadapt.models.source import Prediction


class Sar(Learner):
    """Stable adaptation (Niu et al. 2023): the entropy of reliable samples, at the worst point near the weights.

    1. g = gradient of the mean of H over S = {H < margin ln C}                     (eq. 2)
    2. theta' = theta + rho g / ||g||, H again; the mean over S where also H' < margin ln C; its gradient g' (eq. 3-5)
    3. the step from theta with g'
    4. the mean of H' over S enters a moving average; below `reset_below` all goes back to the source (section 4.2)

    Per pixel: S and both means. Reliable pixels are mostly inner ones of almost no entropy, so that 0.2 nats, meant for
    1,000 classes and whole images, is soon passed: on ToyTown-C most images end at the source. `reset_below=0` shows
    what the rest of the method does. The authors' code averages the loss of 2 there, over the pixels kept twice, which
    is lower. The top layers stay as they are, see `below_top`.

    Published: margin 0.4, rho 0.05, reset below 0.2, average 0.9; SGD momentum 0.9, rate 1e-3 / 64 for batches of one.
    """

    @dataclass
    class Options:
        margin: float = setting("reliable: entropy below this times ln C", low=0, high=1)
        rho: float = setting("length of the step to the worst point", low=0)
        average: float = setting("share of the old value in the moving average of the loss", low=0, high=1)
        reset_below: float = setting("moving average at which all goes back to the source; 0: never", low=0)
        skip_top: bool = setting("leave the norms of the last encoder stage and of the head as they are")

    @staticmethod
    def choose(segmenter: Segmenter, options: Any) -> Mapping[str, nn.Parameter]:
        return below_top(segmenter) if options.skip_top else segmenter.norm_parameters()

    def initial_state(self) -> dict[str, Any]:
        return {"average": None}

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        image_3HW = self.fit(image_3HW)
        logits_BChw = self.logits(image_3HW)
        scored_Chw = logits_BChw[0].detach()
        limit = self.options.margin * most_entropy(logits_BChw.shape[1])
        H_Bhw = entropy(logits_BChw)
        is_reliable_Bhw = H_Bhw.detach() < limit
        mean_where(H_Bhw, is_reliable_Bhw).backward()
        del logits_BChw, H_Bhw  # no graph of a forward may be alive when the next is recorded
        kept = {name: parameter.detach().clone() for name, parameter in self.moving.items()}
        self._climb()
        try:
            H_Bhw = entropy(self.logits(image_3HW))
            self.second = mean_where(H_Bhw.detach(), is_reliable_Bhw)
            loss = mean_where(H_Bhw, is_reliable_Bhw & (H_Bhw.detach() < limit))
            loss.backward()
        finally:
            with torch.no_grad():
                for name, parameter in self.moving.items():
                    parameter.copy_(kept[name])
        return self.update(loss.detach(), scored_Chw, task=task, key=key)

    @torch.no_grad()
    def _climb(self) -> None:
        """To theta + rho g / ||g||, without gradients there."""
        moving = [parameter for parameter in self.moving.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in moving if parameter.grad is not None])
        for parameter in moving:
            assert parameter.grad is not None
            parameter += self.options.rho * parameter.grad / (norm + 1e-12)
        self._updates.drop()

    def after_step(self, *, task: str, key: str) -> None:
        o, now = self.options, self.second.item()
        old = self.state["average"]
        self.state["average"] = now if old is None else o.average * old + (1 - o.average) * now
        if self.state["average"] < o.reset_below:
            self.reset()
