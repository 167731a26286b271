"""From the gradients of images to optimizer steps: rates, clipping, accumulation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config import OptimizerSettings

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Updates:
    """The optimizer and what waits for its next step; a new one is the state before the first image.

    Args:
        groups: parameters that move, by model ('discriminative', 'prompt_offset', 'generative') and name.
        settings: rule, rates, clipping, images of one step.
        fused: one kernel for all parameters.
    """

    def __init__(
        self, groups: Mapping[str, Mapping[str, nn.Parameter]], settings: OptimizerSettings, *, fused: bool
    ) -> None:
        s = self.settings = settings
        self._fused = fused
        rates = {
            "discriminative": s.lr if s.lr_discriminative is None else s.lr_discriminative,
            "generative": s.lr if s.lr_generative is None else s.lr_generative,
        }
        rates["prompt_offset"] = rates["generative"] if s.lr_prompt_offset is None else s.lr_prompt_offset
        by_model = [{"params": list(g.values()), "lr": rates[name]} for name, g in groups.items() if g]
        extra: dict = {"momentum": s.momentum}
        if s.name == "adamw":
            extra = {"betas": (s.beta1, s.beta2), "eps": s.eps}
        self.optimizer = OPTIMIZERS[s.name](by_model, weight_decay=s.weight_decay, fused=fused, **extra)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._steps = 0
        self.waiting = 0  # images whose gradients wait for a step
        self._sums: dict[nn.Parameter, Tensor] = {}  # empty unless images accumulate

    def take(self, use: Tensor) -> bool:
        """Use the gradients of one image: a step (True), or a part of a later one. Or do not, as the image may say.

        Args:
            use: one bool, where the gradients are; if not, nothing changes. The host waits for it only if it must: for
                accumulation, while rates rise, on the CPU, and with SGD (torch 2.13 leaves its momentum undefined if
                the first step is not taken).
        """
        s = self.settings
        if self._fused and s.name == "adamw" and s.accumulate == 1 and self._steps >= s.warmup:
            self._step(skip=~use)
            return True
        if not use:
            self.drop()
            return False
        if s.accumulate == 1:
            self._step()
            return True
        for parameter, gradient in self._gradients():
            if parameter in self._sums:
                self._sums[parameter] += gradient
            else:
                self._sums[parameter] = gradient.clone()  # a recorded backward writes the next one into the same memory
        self.waiting += 1
        self.drop()
        return self.flush() if self.waiting == s.accumulate else False

    def drop(self) -> None:
        """Forget the gradients of the last image; those that wait stay."""
        self.optimizer.zero_grad(set_to_none=True)

    def flush(self) -> bool:
        """One step with the mean gradient of the images that wait (True); nothing if none does."""
        if not self.waiting:
            return False
        for parameter, total in self._sums.items():
            parameter.grad = total.div_(self.waiting)
        self._step()
        self._sums.clear()
        self.waiting = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the parameters; not copied."""
        parameters = self._parameters()
        sums = [self._sums.get(parameter) for parameter in parameters]
        return {"optimizer": self.optimizer.state_dict(), "steps": self._steps, "waiting": self.waiting, "sums": sums}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Into a new one of the same parameters and settings; the tensors are copied and may be on any device."""
        self.optimizer.load_state_dict(values["optimizer"])
        for state in self.optimizer.state.values():  # one at a time; torch keeps those that were in their place already
            state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})
        self._steps, self.waiting = values["steps"], values["waiting"]
        pairs = zip(self._parameters(), values["sums"], strict=True)
        self._sums = {p: total.to(p.device, copy=True) for p, total in pairs if total is not None}

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(parameter, parameter.grad) for parameter in self._parameters() if parameter.grad is not None]

    def _step(self, skip: Tensor | None = None) -> None:
        """One optimizer step with .grad, each model's clipped to its own norm; the first ones shorter if asked.

        Args:
            skip: one bool: whether all stays as it is. The fused AdamW reads it where torch.amp.GradScaler tells of
                gradients that are not finite.
        """
        self._steps += 1
        if self.settings.warmup:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * min(1, self._steps / self.settings.warmup)
        if self.settings.clip_norm is not None:
            for group in self.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], self.settings.clip_norm)
        if skip is not None:
            # on the device whose turn is last: no other then waits for the step of the one that its copy comes from
            last = self.optimizer.param_groups[-1]["params"][-1].device
            self.optimizer.found_inf = skip.float().to(last, non_blocking=True)  # type: ignore[union-attr]
        self.optimizer.step()
        self.drop()


def total_norm(grads: Sequence[Tensor], main: torch.device) -> Tensor:
    """L2, on the main device; by device first, as each tensor's own norm would travel alone."""
    devices = dict.fromkeys(grad.device for grad in grads)
    norms = [torch.nn.utils.get_total_norm([g for g in grads if g.device == device]) for device in devices]
    return torch.nn.utils.get_total_norm([norm.to(main) for norm in norms]).to(main)
