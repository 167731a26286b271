"""A method that moves the segmenter by a loss of its own predictions: predict, then one step of the optimizer.

B images (1)   C classes   3 RGB   H W image px   h w logits, ceil(px / 4)
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config import OptimizerSettings
from segadapt.errors import UserError
from segadapt.models.discriminative import Segmenter
from segadapt.models.recording import Memory
from segadapt.models.source import NO_NORMS, Prediction, Source, segmenting
from segadapt.models.updates import Updates


def below_top(segmenter: Segmenter) -> dict[str, nn.Parameter]:
    """Norm parameters but those of the last encoder stage and of the head.

    As SAR and DeYO leave the last blocks and the final norm of ViT, and layer4 of ResNet.
    """
    top = segmenter.top_norm_parameters()
    return {name: parameter for name, parameter in segmenter.norm_parameters().items() if name not in top}


class Learner(Source):
    """Ground of the methods that need no teacher. One of them defines `loss`, and where it must the rest.

    Attributes:
        Options: dataclass of `tta.options`, made with `segadapt.config.setting`; values are in conf/tta/NAME.yaml.
        state: all that changes from image to image beside parameters and optimizer: tensors, numbers, None. `loss`
            gives it new values and never writes into the old ones.

    Args:
        segmenter, seed, precision, memory: as in Source.
        options: an `Options`.
        optimizer: rule and rates.
    """

    learns = True
    can_record = True  # every gradient of a parameter comes from `logits`, the recorded forward

    def __init__(
        self,
        segmenter: Segmenter,
        options: Any,
        optimizer: OptimizerSettings,
        *,
        seed: int,
        precision: str,
        memory: Memory | None = None,
    ):
        moving, memory = self.choose(segmenter, options), memory if self.can_record else None
        if not moving:
            raise UserError(NO_NORMS)
        super().__init__(segmenter, seed=seed, precision=precision, memory=memory, moving=moving)
        self.options, self._optimizer_settings = options, optimizer
        # beside the recorded forward that is learned from: no backward of that one may be waiting when it comes again
        self.again = segmenting(segmenter, precision, None, ())
        self._source = {name: value.detach().clone() for name, value in self.moving.items()}
        self._updates = self._new_updates()
        self.state = self.initial_state()

    # --- what a method defines ---

    @staticmethod
    def choose(segmenter: Segmenter, options: Any) -> Mapping[str, nn.Parameter]:
        """The parameters that move: all affine parameters of normalisation layers, unless a method says otherwise."""
        return segmenter.norm_parameters()

    def initial_state(self) -> dict[str, Any]:
        """See `state`; made anew at each reset."""
        return {}

    def loss(self, logits_BChw: Tensor, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        """What the step minimises, a scalar; where its gradient is 0 nothing moves."""
        raise NotImplementedError

    def after_step(self, *, task: str, key: str) -> None:
        """What follows an update: averages, restores, resets."""

    # --- the step ---

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        """Predict one image, then learn from it; where a number is not finite, the image leaves no trace."""
        image_3HW, before, is_used = self.fit(image_3HW), dict(self.state), False
        try:
            logits_BChw = self.logits(image_3HW)
            scored_Chw = logits_BChw[0].detach()
            loss = self.loss(logits_BChw, image_3HW, task=task, key=key)
            prediction = self.learn(loss, scored_Chw, task=task, key=key)
            is_used = prediction.is_finite and prediction.is_step_finite
        finally:
            if not is_used:
                self.state = before
        return prediction

    def learn(self, loss: Tensor, scored_Chw: Tensor, *, task: str, key: str) -> Prediction:
        """Backward and update; nothing moves where loss, gradient or logits are not finite, or the gradient is 0."""
        if loss.requires_grad:
            loss.backward()
        return self.update(loss.detach(), scored_Chw, task=task, key=key)

    def update(self, loss: Tensor, scored_Chw: Tensor, *, task: str, key: str) -> Prediction:
        """The step from gradients that are there, and one host read for all numbers of the image."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.moving.values() if p.grad is not None]).to(loss)
        is_sound = scored_Chw.isfinite().all()
        is_used = loss.isfinite() & norm.isfinite() & is_sound & (norm > 0)
        is_step = self._updates.take(is_used)
        self._updates.drop()
        value, grad_norm, was_used, sound = torch.stack(
            [number.float() for number in (loss, norm, is_used, is_sound)]
        ).tolist()
        if was_used and is_step:
            self.after_step(task=task, key=key)
        return Prediction(scored_Chw, bool(sound), value, grad_norm, is_updated=bool(was_used))

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor], more: Iterable[tuple[Tensor, Tensor]] = ()) -> Iterator[None]:
        """Within it the moving parameters have these values, and each first tensor of `more` the second one's."""
        pairs = [*((parameter, weights[name]) for name, parameter in self.moving.items()), *more]
        own = [tensor.data for tensor, _ in pairs]
        for tensor, value in pairs:
            tensor.data = value
        try:
            yield
        finally:
            for (tensor, _), value in zip(pairs, own, strict=True):
                tensor.data = value

    # --- back, and elsewhere ---

    def _new_updates(self) -> Updates:
        return Updates({"discriminative": self.moving}, self._optimizer_settings, fused=self.device.type == "cuda")

    @torch.no_grad()
    def reset(self) -> None:
        """Weights, optimizer and state as before the first image."""
        for name, parameter in self.moving.items():
            parameter.copy_(self._source[name])
            parameter.grad = None
        self._updates, self.state = self._new_updates(), self.initial_state()

    def flush(self) -> None:
        """The step of the images that still wait for one (optimizer.accumulate)."""
        self._updates.flush()

    def state_dict(self) -> dict[str, Any]:
        """See Source."""
        return {"parameters": dict(self.moving), "updates": self._updates.state_dict(), "state": self.state}

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        assert values["parameters"].keys() == self.moving.keys()
        for name, parameter in self.moving.items():
            parameter.copy_(values["parameters"][name])
            parameter.grad = None
        self._updates = self._new_updates()
        self._updates.load_state_dict(values["updates"])
        self.state = _copied(values["state"], self.device)


def _copied(value: Any, device: torch.device) -> Any:
    """Nested state with its tensors anew, on one device."""
    match value:
        case Tensor():
            return value.detach().to(device, copy=True)
        case dict():
            return {key: _copied(item, device) for key, item in value.items()}
        case list() | tuple():
            return type(value)(_copied(item, device) for item in value)
    return value
