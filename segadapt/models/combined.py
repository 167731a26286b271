"""The two models as one step: logits -> windows -> candidates -> velocities -> loss -> backward -> update.

B images (1)   K windows   D noise draws   R = K * D rows (window, draw), draws innermost   C classes
P (row, class) pairs   3 RGB   H W image px   h w logits, ceil(px / 4)   z y x latent channels and grid, px / 8
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config import ModelSettings, OptimizerSettings
from segadapt.errors import UserError
from segadapt.models.discriminative import Segmenter
from segadapt.models.generative import Teacher, trust
from segadapt.models.generative import candidates as candidate_classes
from segadapt.models.generative import loss as objective
from segadapt.models.generative.lora import choose
from segadapt.models.generative.parallel import Lane, read_later
from segadapt.models.generative.sd3 import NoisyLatent, Sd3
from segadapt.models.generative.sight import Sight
from segadapt.models.generative.witness import Witness
from segadapt.models.recording import Memory
from segadapt.models.source import NO_NORMS, Prediction, Source
from segadapt.models.updates import Updates, total_norm
from segadapt.seeds import torch_generator


@dataclass(frozen=True)
class Taught:
    """What one image's backward found: scalars on the main device, to be read at once."""

    loss: Tensor
    kept: Tensor  # float64, shares as in Prediction
    agreement: Tensor
    teacher_agrees: Tensor


class Combined(Source):
    """A segmenter taught by a generative model, image by image.

    Not an nn.Module, so that nobody can move the split transformer with it. Both models stay in eval mode.

    Args:
        segmenter, seed, precision, memory: as in Source.
        generative: the teacher.
        model, optimizer: settings.
        ignored_C: bool, the classes that are never asked about; None: none.
        options: of a method built on this one, which has none itself.
    """

    has_teacher = learns = True
    learns_from_classes = True  # the teacher, from the velocities that it gives for each class

    def __init__(
        self,
        segmenter: Segmenter,
        generative: Teacher,
        model: ModelSettings,
        optimizer: OptimizerSettings,
        *,
        seed: int,
        precision: str,
        memory: Memory | None = None,
        ignored_C: Tensor | None = None,
        options: Any = None,
    ):
        norms, all_of_it, update = segmenter.norm_parameters, segmenter.parameters, model.update
        moving = (norms() if update.update_norm_only else all_of_it()) if update.discriminative else {}
        if update.discriminative and not moving:
            raise UserError(NO_NORMS)
        super().__init__(segmenter, seed=seed, precision=precision, memory=memory, moving=moving)
        self.generative, self.parallel = generative, generative.parallel
        self.loss, self.window, self.trust = model.loss, model.generative, model.trust
        self.sight = Sight(generative, model.generative, devices=self.parallel.devices, seed=seed)
        self.ignored_C = None if ignored_C is None else ignored_C.to(self.device)
        self.optimizer_settings = optimizer
        assert self.window.max_pairs is not None, "build.py finds out how many fit"
        self.pairs_at_once = self.window.max_pairs * len(self.parallel.devices)
        offset_D = generative.offset_D if isinstance(generative, Sd3) else None
        self.groups = {
            "discriminative": self.moving,
            "prompt_offset": {} if offset_D is None else {"pooled": offset_D},
            "generative": choose(self.parallel, update),
        }
        assert any(self.groups.values()), "parse.py refuses settings under which nothing moves"
        self._source = {name: value.detach().to("cpu", copy=True) for name, value in self.parameters().items()}
        self._updates = self._new_updates()
        self._beside = Lane([self.device])
        self.witness: Witness | None = None  # keeps what the teacher says in the next steps

    @property
    def trains_discriminative(self) -> bool:
        """Whether any parameter of the segmenter moves."""
        return bool(self.groups["discriminative"])

    @property
    def trains_generative(self) -> bool:
        """Whether any parameter of the teacher moves."""
        return bool(self.groups["generative"])

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Of both models, as the last update left them."""
        self.parallel.arrive()
        return {f"{model}.{name}": p for model, group in self.groups.items() for name, p in group.items()}

    def _new_updates(self) -> Updates:
        return Updates(self.groups, self.optimizer_settings, fused=self.device.type == "cuda")

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the source state: weights, optimizer, and no gradient that waits. Draws need none: their generators
        belong to the image."""
        for name, parameter in self.parameters().items():
            parameter.copy_(self._source[name])
            parameter.grad = None
        self.parallel.spread()
        self._updates = self._new_updates()

    @torch.no_grad()
    def _move_to_source(self, share: float) -> None:
        """Weights alone, as an image that needs no teacher asks for none of what was learned; moments stay."""
        for name, parameter in self.parameters().items():
            parameter.lerp_(self._source[name].to(parameter.device), share)
        self.parallel.spread()

    def flush(self) -> None:
        """The step of the images that still wait for one (optimizer.accumulate); for the end of a task."""
        self.parallel.arrive()
        if self._updates.flush():
            self.parallel.spread()

    def forget(self) -> None:
        """See Source; of all copies."""
        super().forget()
        for transformer in self.parallel.transformers:
            transformer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """See Source: both models' parameters that move, and the optimizer."""
        return {"parameters": dict(self.parameters()), "updates": self._updates.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(values["parameters"][name])
            parameter.grad = None
        self.parallel.spread()
        self._updates = self._new_updates()
        self._updates.load_state_dict(values["updates"])

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        """Predict one image, then adapt on it: one loss, one backward into both models, one update.

        The update may still be under way on the GPUs; `parameters` waits for it, and `flush`.

        Args:
            image_3HW: float32 RGB in 0..1, already at the short side of the configuration; any device.
            task, key: name the image; noise, sigma and class draws come from (seed, task, key).
        """
        sight, noisy = self.sight, None
        if not sight.is_guided:  # then this waits for no update, and needs not be waited for
            noisy = sight.noise(image_3HW, task=task, key=key)
        image_3HW = image_3HW.to(self.device, non_blocking=True)
        self._beside.fork()
        with self._beside():
            logits_BChw = self.logits(self.fit(image_3HW))
        self.parallel.prepare()
        self._beside.join()
        scored_Chw, boxes_K3 = logits_BChw[0].detach(), sight.boxes(image_3HW, logits_BChw)
        if noisy is None:
            noisy = sight.noise(image_3HW, boxes_K3, task=task, key=key)
        if self.witness is not None:
            self.witness.place(boxes_K3, sight.size(image_3HW))
        taught, candidates = self.backward(image_3HW, logits_BChw, noisy, boxes_K3, task=task, key=key)
        prediction = self._update(scored_Chw, taught, candidates)
        if not sight.is_guided:
            return prediction
        return dataclasses.replace(prediction, is_guided=not torch.equal(boxes_K3, sight.grid(image_3HW)))

    def logits(self, image_3HW: Tensor) -> Tensor:
        """As in Source, of the weights after the last update."""
        self.parallel.join_update()
        return super().logits(image_3HW)

    def backward(
        self,
        image_3HW: Tensor,
        logits_BChw: Tensor,
        noisy: NoisyLatent,
        boxes_K3: Tensor | None = None,
        *,
        task: str,
        key: str,
    ) -> tuple[Taught, candidate_classes.Candidates]:
        """The generative loss of one image and its gradients in every parameter that moves; no update.

        Args:
            boxes_K3: those of `noisy`; None: the grid's.
        Returns:
            The loss, detached, with what else the velocities tell, and the candidate classes of the rows.
        """
        q_KCyx = self.in_windows(logits_BChw, image_3HW, boxes_K3, grid=noisy.x_t_Kzyx.shape[-1])
        raw_KCyx = weight_R = None
        if candidate_classes.reads_raw(self.loss) or self.loss.window_weights == "entropy":
            raw_KCyx = self.sight.on_grid(logits_BChw[0].detach(), image_3HW, boxes_K3, grid=q_KCyx.shape[-1])
        if raw_KCyx is not None and self.loss.window_weights == "entropy":
            weight_K = objective.window_weights(raw_KCyx, tau=self.loss.entropy_tau)
            weight_R = weight_K.repeat_interleave(self.window.draws)
        candidates = candidate_classes.choose(
            q_KCyx.detach(),
            raw_KCyx,
            self.loss,
            generators=[torch_generator(self.seed, task, key, "classes", window) for window in range(len(q_KCyx))],
            draws=self.window.draws,
            ignored_C=self.ignored_C,
        )
        q_RCyx = q_KCyx.repeat_interleave(self.window.draws, dim=0)
        leaf_RCyx = q_RCyx.detach().requires_grad_(self.trains_discriminative)

        def segmenter_learns() -> None:
            if leaf_RCyx.grad is not None:
                self._beside.fork()
                with self._beside():
                    q_RCyx.backward(leaf_RCyx.grad)

        taught = self._backward_chunks(leaf_RCyx, noisy, candidates, weight_R=weight_R, when_complete=segmenter_learns)
        self.parallel.sum_gradients()
        self.parallel.arrive()
        self._beside.join()
        return taught, candidates

    def in_windows(
        self, logits_BChw: Tensor, image_3HW: Tensor, boxes_K3: Tensor | None = None, *, grid: int
    ) -> Tensor:
        """What the objective reads of the logits, on the latent grid of each window: [K, C, y, x], differentiable."""
        q_BChw = objective.normalise(logits_BChw) if self.loss.logit_norm else logits_BChw
        return self.sight.on_grid(q_BChw[0], image_3HW, boxes_K3, grid=grid)

    def _backward_chunks(
        self,
        leaf_RCyx: Tensor,
        noisy: NoisyLatent,
        candidates: candidate_classes.Candidates,
        *,
        weight_R: Tensor | None = None,
        when_complete: Callable[[], None] = lambda: None,
    ) -> Taught:
        """Backward of (1/R) sum_r weight_r loss_r into teacher and leaf, at most pairs_at_once pairs at a time.

        Equal to the joint backward: whole windows are summed, and a window of more pairs than fit (all its draws
        together) is run twice, first without graph for the velocities, then chunk by chunk with the gradient that the
        loss gave each velocity.

        Args:
            weight_R: None: 1 each.
            when_complete: called as soon as the leaf has its gradient, while the teacher still has to go backward.
        Returns:
            The loss, detached, and how far the teacher agrees with itself and with the segmenter.
        """
        total = leaf_RCyx.new_zeros(())
        sums_4 = torch.zeros(4, dtype=torch.float64, device=leaf_RCyx.device)
        groups = list(candidates.groups(self.pairs_at_once)) if any(candidates.counts) else []
        for of_rows, of_pairs in groups:
            pair_row_P = candidates.pair_window_P[of_pairs]
            pair_class_P = candidates.pair_class_P[of_pairs]
            chunks = list(
                zip(pair_row_P.split(self.pairs_at_once), pair_class_P.split(self.pairs_at_once), strict=True)
            )
            learns = self.trains_generative and self.learns_from_classes
            twice = learns and len(chunks) > 1
            with torch.set_grad_enabled(learns and not twice):
                given_Pzyx = torch.cat([self.generative.velocity(noisy, *chunk) for chunk in chunks])
            velocity_Pzyx = given_Pzyx.detach().requires_grad_(learns)
            pair_row_P, target_Rzyx = pair_row_P - of_rows.start, noisy.target_Kzyx[of_rows]
            error_RCyx = trust.asked_errors(
                velocity_Pzyx,
                target_Rzyx,
                pair_row_P=pair_row_P,
                pair_class_P=pair_class_P,
                num_classes=leaf_RCyx.shape[1],
            )
            verdict = trust.judge(
                error_RCyx,
                leaf_RCyx[of_rows],
                candidates.keep_Kyx[of_rows],
                draws=candidates.draws,
                trust=self.trust,
                asked_Ryx=None if candidates.own_Kyx is None else candidates.own_Kyx[of_rows],
            )
            weights_RCyx = objective.class_weights(
                leaf_RCyx[of_rows], candidates.chosen_KC[of_rows], temperature=self.loss.temperature
            )
            losses_R = objective.window_losses(
                weights_RCyx,
                velocity_Pzyx,
                target_Rzyx,
                verdict.keep_Ryx,
                pair_window_P=pair_row_P,
                pair_class_P=pair_class_P,
                reduction=self.loss.mask_reduction,
                trust_Kyx=verdict.weight_Ryx,
            )
            if self.witness is not None:
                squared_Ryx = objective.mixture_errors(
                    weights_RCyx.detach(), velocity_Pzyx.detach(), target_Rzyx,
                    pair_window_P=pair_row_P, pair_class_P=pair_class_P,
                )  # fmt: skip
                self.witness.see(of_rows, weights_RCyx, error_RCyx, squared_Ryx)
            if weight_R is not None:
                losses_R = losses_R * weight_R[of_rows]
            share = losses_R.sum() / len(leaf_RCyx)
            share.backward()
            if of_rows.stop == groups[-1][0].stop:
                when_complete()
            if twice:
                assert velocity_Pzyx.grad is not None
                for chunk, grad_Pzyx in zip(chunks, velocity_Pzyx.grad.split(self.pairs_at_once), strict=True):
                    self.generative.velocity(noisy, *chunk).backward(grad_Pzyx)
            elif learns:
                given_Pzyx.backward(velocity_Pzyx.grad)
            total += share.detach()
            sums_4 += verdict.sums_4
        agreement, alike, asked, counted = sums_4
        keep_Kyx = candidates.keep_Kyx[:: candidates.draws]
        num_asking = max(1, sum(count > 0 for count in candidates.counts[:: candidates.draws]))
        agreement = agreement / (num_asking * keep_Kyx[0].numel())
        return Taught(total, counted / keep_Kyx.numel(), agreement, alike / asked.clamp(min=1))

    def _update(self, scored_Chw: Tensor, taught: Taught, candidates: candidate_classes.Candidates) -> Prediction:
        """Use the gradients if they, loss and logits are finite and trust does not refuse the image.

        The devices decide, and go on; the host reads all numbers of the image at once.
        """
        grads = [parameter.grad for parameter in self.parameters().values() if parameter.grad is not None]
        norm = total_norm(grads, self.device)
        is_sound = scored_Chw.isfinite().all()
        is_finite = taught.loss.isfinite() & norm.isfinite() & is_sound
        is_refused = is_finite & (taught.teacher_agrees > self.trust.max_agreement)
        is_used = is_finite & ~is_refused & (norm > 0)  # moments alone would move the weights
        numbers = (taught.loss, norm, is_sound, is_used, is_refused, taught.kept, taught.agreement,
                   taught.teacher_agrees)  # fmt: skip
        read = read_later(torch.stack([number.float() for number in numbers]))
        self.parallel.update(lambda: self._updates.take(is_used), reads=[*grads, is_used])
        self._updates.drop()
        loss, grad_norm, sound, updated, refused, kept, agreement, agrees = read()
        if refused and self.trust.restore:
            self._move_to_source(self.trust.restore)
        return Prediction(
            scored_Chw,
            bool(sound),
            loss,
            grad_norm,
            is_updated=bool(updated),
            is_refused=bool(refused),
            candidates=candidates.counts[:: candidates.draws],
            kept=kept,
            agreement=agreement if candidates.draws > 1 and any(candidates.counts) else None,
            teacher_agrees=agrees if any(candidates.counts) else None,
        )
