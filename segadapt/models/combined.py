"""The two models as one step: logits -> windows -> candidates -> velocities -> loss -> backward -> update.

B images (1)   K windows   C classes   P (window, class) pairs   3 RGB   H W image px   h w logits, ceil(px / 4)
z y x latent channels and grid, px / 8   s window px
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segadapt.config import ModelSettings, OptimizerSettings, UpdateSettings
from segadapt.models.discriminative.segformer import Segmenter
from segadapt.models.generative import candidates as candidate_classes
from segadapt.models.generative import loss as objective
from segadapt.models.generative import windows
from segadapt.models.generative.sd3 import NoisyLatent, Sd3, add_noise
from segadapt.seeds import torch_generator

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Prediction:
    """What one step returns; the logits are those of the forward BEFORE the update, the only ones that are scored."""

    logits_Chw: Tensor  # float32, detached, raw
    is_finite: bool  # all of them
    loss: float | None = None  # None: no generative loss was asked for
    grad_norm: float | None = None  # of all moving parameters together
    is_updated: bool = False  # False: no loss, or it was not finite
    candidates: tuple[int, ...] = ()  # classes asked about, each window
    kept: float | None = None  # share of latent pixels that count


class Combined:
    """SegFormer taught by SD3, image by image. `generative=None` is `discriminative_only`: the same code, loss None.

    Not an nn.Module, so that nobody can move the split transformer with it. Both models stay in eval mode.

    Args:
        segmenter: on the main device.
        generative: None to only predict; the settings are then not needed.
        model, optimizer: settings.
        seed: all draws come from (seed, task, image key, purpose).
        precision: 'bf16' (autocast over float32 weights) or 'fp32'.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        generative: Sd3 | None,
        model: ModelSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        *,
        seed: int,
        precision: str,
    ):
        self.segmenter, self.generative = segmenter, generative
        self.seed, self.precision = seed, precision
        self.device = next(segmenter.net.parameters()).device
        self._groups: dict[str, dict[str, nn.Parameter]] = {"discriminative": {}, "generative": {}}
        segmenter.net.requires_grad_(False)
        if generative is not None:
            assert model is not None, "a generative model needs its settings"
            assert optimizer is not None
            self.loss, self.window, self.optimizer_settings = model.loss, model.generative, optimizer
            generative.transformer.requires_grad_(False)
            self._choose_parameters(model.update)
            self._source = {name: value.detach().to("cpu", copy=True) for name, value in self.parameters().items()}
            self._optimizer = self._new_optimizer()

    @property
    def trains_discriminative(self) -> bool:
        """Whether any parameter of the segmenter moves."""
        return bool(self._groups["discriminative"])

    @property
    def trains_generative(self) -> bool:
        """Whether any parameter of the teacher moves."""
        return bool(self._groups["generative"])

    def _choose_parameters(self, update: UpdateSettings) -> None:
        """Name what moves; all else is frozen. Norms are chosen by module type, and of the segmenter alone."""
        assert self.generative is not None
        if update.discriminative:
            norms, all_of_it = self.segmenter.norm_parameters, self.segmenter.parameters
            self._groups["discriminative"] = norms() if update.update_norm_only else all_of_it()
        if update.generative:
            self._groups["generative"] = dict(self.generative.transformer.named_parameters())
        assert any(self._groups.values()), "parse.py refuses settings under which nothing moves"
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What may move, by name with the model's prefix; all else stays bit-equal."""
        return {f"{model}.{name}": p for model, group in self._groups.items() for name, p in group.items()}

    def _new_optimizer(self) -> torch.optim.Optimizer:
        s = self.optimizer_settings
        rates = {
            "discriminative": s.lr if s.lr_discriminative is None else s.lr_discriminative,
            "generative": s.lr if s.lr_generative is None else s.lr_generative,
        }
        groups = [{"params": list(g.values()), "lr": rates[name]} for name, g in self._groups.items() if g]
        extra: dict = {"momentum": s.momentum}
        if s.name == "adamw":
            extra = {"betas": (s.beta1, s.beta2), "eps": s.eps}
        return OPTIMIZERS[s.name](groups, weight_decay=s.weight_decay, fused=self.device.type == "cuda", **extra)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the source state: weights and optimizer. Draws need none: their generators belong to the image."""
        if self.generative is None:
            return
        for name, parameter in self.parameters().items():
            parameter.copy_(self._source[name])
            parameter.grad = None
        self._optimizer = self._new_optimizer()

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        """Predict one image, then adapt on it: one loss, one backward into both models, one update.

        Args:
            image_3HW: float32 RGB in 0..1, already at the short side of the configuration; any device.
            task, key: name the image; noise, sigma and class draws come from (seed, task, key).
        """
        image_3HW = image_3HW.to(self.device, non_blocking=True)
        with torch.set_grad_enabled(self.trains_discriminative), self._autocast():
            logits_BChw = self.segmenter.logits(image_3HW[None])
        scored_Chw = logits_BChw[0].detach()
        if self.generative is None:
            return Prediction(scored_Chw, bool(scored_Chw.isfinite().all()))
        loss, candidates = self.backward(image_3HW, logits_BChw, task=task, key=key)
        return self._update(scored_Chw, loss, candidates)

    def backward(
        self, image_3HW: Tensor, logits_BChw: Tensor, *, task: str, key: str
    ) -> tuple[Tensor, candidate_classes.Candidates]:
        """The generative loss of one image and its gradients in every parameter that moves; no update.

        Returns the loss, detached, and the candidate classes of its windows.
        """
        q_KCyx, noisy = self._windows(image_3HW, logits_BChw, task=task, key=key)
        candidates = candidate_classes.select(
            q_KCyx.detach(),
            topk=self.loss.topk,
            classes_threshold=self.loss.classes_threshold,
            generators=[torch_generator(self.seed, task, key, "classes", window) for window in range(len(q_KCyx))],
        )
        leaf_KCyx = q_KCyx.detach().requires_grad_(self.trains_discriminative)
        loss = self._backward_chunks(leaf_KCyx, noisy, candidates)
        if self.trains_discriminative:
            q_KCyx.backward(leaf_KCyx.grad)
        return loss, candidates

    def _autocast(self) -> torch.autocast | nullcontext:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _windows(self, image_3HW: Tensor, logits_BChw: Tensor, *, task: str, key: str) -> tuple[Tensor, NoisyLatent]:
        """Cut image and logits with the same boxes; encode and noise the image. One noise draw a window, all classes.

        Returns q_KCyx (differentiable) and the noisy latents.
        """
        assert self.generative is not None
        height, width = image_3HW.shape[1:]
        w = self.window
        boxes_K2 = windows.plan(height, width, window_px=w.window_px, stride_px=w.stride_px)
        windows_K3ss = 2 * windows.cut(image_3HW, boxes_K2, window_px=w.window_px) - 1
        latent_Kzyx = self.generative.encode(windows_K3ss)
        noise_Kzyx = torch.randn(
            latent_Kzyx.shape, generator=torch_generator(self.seed, task, key, "noise"), dtype=latent_Kzyx.dtype
        )
        high = w.sigma if w.sigma_high is None else w.sigma_high
        uniform_K = torch.rand(len(boxes_K2), generator=torch_generator(self.seed, task, key, "sigma"))
        sigma_K = (w.sigma + (high - w.sigma) * uniform_K).to(latent_Kzyx)
        noisy = add_noise(latent_Kzyx, noise_Kzyx.to(self.device), sigma_K)
        q_BChw = objective.normalise(logits_BChw) if self.loss.logit_norm else logits_BChw
        q_KCyx = windows.logits_on_grid(
            q_BChw[0], boxes_K2, image_px=(height, width), window_px=w.window_px, grid=latent_Kzyx.shape[-1]
        )
        return q_KCyx, noisy

    def _backward_chunks(
        self, leaf_KCyx: Tensor, noisy: NoisyLatent, candidates: candidate_classes.Candidates
    ) -> Tensor:
        """Backward of (1/K) sum_w loss_w into the teacher and into the leaf, at most max_pairs pairs at a time.

        Equal to the joint backward: whole windows are summed, and a window of more pairs than fit is run twice, first
        without graph for the velocities, then chunk by chunk with the gradient that the loss gave each velocity.

        Returns the loss, detached.
        """
        assert self.generative is not None
        total = leaf_KCyx.new_zeros(())
        for of_windows, of_pairs in candidates.groups(self.window.max_pairs):
            pair_window_P = candidates.pair_window_P[of_pairs]
            pair_class_P = candidates.pair_class_P[of_pairs]
            chunks = list(
                zip(pair_window_P.split(self.window.max_pairs), pair_class_P.split(self.window.max_pairs), strict=True)
            )
            twice = self.trains_generative and len(chunks) > 1
            with torch.set_grad_enabled(self.trains_generative and not twice):
                velocity_Pzyx = torch.cat([self.generative.velocity(noisy, *chunk) for chunk in chunks])
            velocity_Pzyx.requires_grad_(self.trains_generative)
            weights_KCyx = objective.class_weights(
                leaf_KCyx[of_windows], candidates.chosen_KC[of_windows], temperature=self.loss.temperature
            )
            losses_K = objective.window_losses(
                weights_KCyx,
                velocity_Pzyx,
                noisy.target_Kzyx[of_windows],
                candidates.keep_Kyx[of_windows],
                pair_window_P=pair_window_P - of_windows.start,
                pair_class_P=pair_class_P,
                reduction=self.loss.mask_reduction,
            )
            share = losses_K.sum() / len(leaf_KCyx)
            share.backward()
            if twice:
                assert velocity_Pzyx.grad is not None
                for chunk, grad_Pzyx in zip(chunks, velocity_Pzyx.grad.split(self.window.max_pairs), strict=True):
                    self.generative.velocity(noisy, *chunk).backward(grad_Pzyx)
            total += share.detach()
        return total

    def _update(self, scored_Chw: Tensor, loss: Tensor, candidates: candidate_classes.Candidates) -> Prediction:
        """One optimizer step if loss and gradients are finite; one host read for all numbers of the image."""
        grads = [parameter.grad for parameter in self.parameters().values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).to(self.device)
        kept = candidates.keep_Kyx.double().mean().float()
        sound = scored_Chw.isfinite().all()
        numbers = torch.stack([loss.float(), norm.float(), kept, sound.float()]).tolist()
        loss_value, norm_value, kept_value, is_sound = numbers
        can_step = math.isfinite(loss_value) and math.isfinite(norm_value)
        if can_step:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Prediction(scored_Chw, bool(is_sound), loss_value, norm_value, can_step, candidates.counts, kept_value)
