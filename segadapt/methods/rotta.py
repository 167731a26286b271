"""RoTTA: robust test-time adaptation in dynamic scenarios, with a memory of balanced, timely samples."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from segadapt.config import OptimizerSettings, setting
from segadapt.methods.augmix import augmix
from segadapt.methods.bn import batch_norms, own_statistics
from segadapt.methods.learner import Learner
from segadapt.methods.pixels import entropy, most_entropy
from segadapt.models.discriminative import Segmenter
from segadapt.models.recording import Memory
from segadapt.models.source import Prediction
from segadapt.seeds import numpy_generator


@dataclass(eq=False)
class Kept:
    """An image of the memory."""

    image_3HW: Tensor  # on the CPU
    label: int  # the class that most of its probability goes to
    uncertainty: float  # mean entropy, nats
    name: tuple[str, str]  # task and key
    age: int = 0


class Rotta(Learner):
    """Robust adaptation (Yuan et al. 2023): a student learns from a memory what its moving average says of it.

    1. memory: as many images of each class as of any other; where one must go, the one of the largest
       1 / (1 + exp(-age / capacity)) + uncertainty / ln C among the classes that have most, unless the new one's is
       larger                                                                                           (alg. 1, eq. 6)
    2. every `every` images: L = mean over the memory of E(age) CE(student(augmented x), teacher(x)),
       E = exp(-age / capacity) / (1 + exp(-age / capacity))                                            (eq. 7-9)
    3. teacher = (1 - nu) teacher + nu student                                                          (eq. 5)

    4. BatchNorm takes statistics that begin at the source's: with each update
       mu = (1 - alpha) mu + alpha mean over the memory, variance likewise                              (eq. 2-3)

    Per image: label (most probability), uncertainty (mean entropy) and age; cross-entropies are means over pixels.
    Augmentation by AugMix, which leaves pixels where they are. The teacher's prediction is scored. A class has room for
    capacity / C images: where one fills most of every image, as a road does, the memory stays small. Fewer images than
    `every` between two resets: nothing is ever learned.

    Published: capacity 64, every 64 images, nu 1e-3, alpha 0.05, Adam 1e-3.
    """

    can_record = False  # recorded work cannot follow the statistics
    scored = "the averaging teacher's, before the update"

    @dataclass
    class Options:
        capacity: int = setting("images in the memory", low=1)
        every: int = setting("images from one update to the next", low=1)
        nu: float = setting("share of the student in the teacher's weights at an update", low=0, high=1)
        alpha: float = setting("share of an image in BatchNorm's statistics", low=0, high=1)

    def __init__(
        self, segmenter: Segmenter, options: Any, optimizer: OptimizerSettings, *, seed: int, precision: str,
        memory: Memory | None = None,
    ):  # fmt: skip
        norms = batch_norms(segmenter)
        self._first: list[tuple[Any, Any]] = [(norm.running_mean, norm.running_var) for norm in norms]
        super().__init__(segmenter, options, optimizer, seed=seed, precision=precision, memory=memory)
        self._place: dict[str, Any] = {
            "statistics": self.state["statistics"],
            "seen": [[] for _ in norms],
            "most": options.capacity,
        }
        for index, norm in enumerate(norms):
            norm.forward = following(norm, self._place, index)  # pyright: ignore[reportAttributeAccessIssue]

    def initial_state(self) -> dict[str, Any]:
        return {
            "teacher": {name: value.clone() for name, value in self._source.items()},
            "statistics": list(self._first),
            "memory": [],
            "seen": 0,
        }

    @torch.no_grad()
    def taught(self, image_3HW: Tensor) -> Tensor:
        """The teacher's logits, [1, C, h, w]."""
        with self.holding(self.state["teacher"]):
            (logits_BChw,) = self.again(image_3HW[None])
        assert logits_BChw is not None
        return logits_BChw

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        self._place["statistics"] = self.state["statistics"]
        image_3HW = self.fit(image_3HW)
        logits_BChw = self.taught(image_3HW)
        label = int(logits_BChw.softmax(dim=1).mean(dim=(0, 2, 3)).argmax())
        uncertainty = float(entropy(logits_BChw).mean())
        self.remember(Kept(image_3HW.cpu(), label, uncertainty, (task, key)), classes=logits_BChw.shape[1])
        self.state["seen"] += 1
        if self.state["seen"] % self.options.every or not self.state["memory"]:
            return Prediction(logits_BChw[0], bool(logits_BChw.isfinite().all()))
        return self.update(self.memory_backward(), logits_BChw[0], task=task, key=key)

    def remember(self, new: Kept, *, classes: int) -> None:
        """Put it into the memory if there is room, or one that is older or less certain to go; all grow older.

        Not if its numbers are not finite: it would spoil every loss for as long as it stays.
        """
        o, memory = self.options, self.state["memory"]
        if not math.isfinite(new.uncertainty):
            return

        def score(kept: Kept) -> float:
            unsure = kept.uncertainty / most_entropy(classes) if classes > 1 else 0
            return 1 / (1 + math.exp(-kept.age / o.capacity)) + unsure

        count = Counter(kept.label for kept in memory)
        has_room = count[new.label] < o.capacity / classes
        if has_room and len(memory) < o.capacity:
            memory.append(new)
        else:
            among = {label for label, n in count.items() if n == max(count.values())} if has_room else {new.label}
            worst = max((kept for kept in memory if kept.label in among), key=score)
            if score(worst) > score(new):
                memory.remove(worst)
                memory.append(new)
        for kept in memory:
            kept.age += 1

    def memory_backward(self) -> Tensor:
        """Gradients of the loss over the memory, one image's graph at a time; returns it."""
        memory, total = self.state["memory"], torch.zeros((), device=self.device)
        for seen in self._place["seen"]:
            seen.clear()
        for kept in memory:
            self.taught(kept.image_3HW.to(self.device))
        self._follow()
        for kept in memory:
            image_3HW = kept.image_3HW.to(self.device)
            q_BChw = self.taught(image_3HW).softmax(dim=1)
            rng = numpy_generator(self.seed, *kept.name, "memory", kept.age)
            log_p_BChw = self.logits(augmix(image_3HW, rng)).log_softmax(dim=1)
            age = kept.age / self.options.capacity
            share = math.exp(-age) / (1 + math.exp(-age)) / len(memory)
            loss = -share * (q_BChw * log_p_BChw).sum(dim=1).mean()
            loss.backward()
            total += loss.detach()
        return total

    def _follow(self) -> None:
        """Statistics take up alpha of those of all images just seen, as one batch."""
        for index, seen in enumerate(self._place["seen"]):
            if not seen:  # of a head that only training asks
                continue
            var_NC, mean_NC = (torch.stack(each) for each in zip(*seen, strict=True))
            mean_C = mean_NC.mean(dim=0)
            var_C = (var_NC + mean_NC.square()).mean(dim=0) - mean_C.square()
            old = self.state["statistics"][index]
            self.state["statistics"][index] = tuple(
                value.lerp(new.to(value), self.options.alpha) for value, new in zip(old, (mean_C, var_C), strict=True)
            )

    @torch.no_grad()
    def after_step(self, *, task: str, key: str) -> None:
        for name, parameter in self.moving.items():
            self.state["teacher"][name].lerp_(parameter, self.options.nu)

    def state_dict(self) -> dict[str, Any]:
        values = super().state_dict()
        return values | {"state": self.state | {"memory": [dict(vars(kept)) for kept in self.state["memory"]]}}

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        super().load_state_dict(values)
        self.state["memory"] = [
            Kept(**(kept | {"image_3HW": kept["image_3HW"].cpu()})) for kept in self.state["memory"]
        ]

    def save(self, folder: str | Path) -> None:
        """The averaging teacher and the statistics it predicts with, as they are what is scored."""
        layers = zip(self._first, self.state["statistics"], strict=True)
        statistics = [pair for source, now in layers for pair in zip(source, now, strict=True)]
        with self.holding(self.state["teacher"], statistics):
            super().save(folder)


def following(norm: nn.modules.batchnorm._BatchNorm, place: dict[str, Any], index: int) -> Callable[[Tensor], Tensor]:
    """Forward of a BatchNorm with place["statistics"][index]; the last images' own are kept in place["seen"][index]."""

    def forward(x: Tensor) -> Tensor:
        mean, var = place["statistics"][index]
        if not torch.is_grad_enabled():  # the teacher's
            seen = place["seen"][index]
            seen.append(own_statistics(x))
            del seen[: -place["most"]]
        return batch_norm(x, mean, var, norm.weight, norm.bias, training=False, eps=norm.eps)

    return forward
