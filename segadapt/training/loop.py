"""The loop of a segmenter's training, or a classifier's, and all that it moves.

B images of a micro-batch   3 RGB   H W crop px   M micro-batches   T terms of the objective
labels: [B, H, W] of a segmenter, targets [B, C] of a classifier
"""

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from segadapt.checkpoint import Checkpoints, Parts
from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.signals import Asked, Stopped
from segadapt.stream import Samples
from segadapt.training import shards
from segadapt.training.agreement import Agreement
from segadapt.training.gradients import agree, clip
from segadapt.training.learner import AllLayers, Losses
from segadapt.training.log import LOG_EVERY, Log
from segadapt.training.micro_batches import steps_of
from segadapt.training.optimizer import build_optimizer, set_rates
from segadapt.training.out_of_memory import explain_step
from segadapt.training.parallel import World
from segadapt.training.pipeline import Pipeline
from segadapt.training.state import TrainingState


class Examination(Protocol):
    """How the weights are validated.

    Attributes:
        chosen_by: of the scores the one that is highest for the best weights.
    """

    chosen_by: str

    def __call__(self, segmenter: Any) -> dict[str, Any]:
        """Scores by name, the same in all processes, of a net in eval mode that all of them ask together."""
        ...


class Training:
    """Weights, their average, optimizer, objective and scores so far; `fit` moves them.

    Args:
        unsharded: a copy that holds all weights where the processes have parts of those of the segmenter; else None.
        objective: a losses.Objective, or another module with its methods.
        log: None in all processes but the first.
    """

    def __init__(
        self,
        settings: TrainConfig | PretrainConfig,
        segmenter: NetSegmenter,
        unsharded: NetSegmenter | None,
        objective: Any,
        examine: Examination,
        world: World,
        log: Log | None,
    ):
        self.settings, self.segmenter, self.world, self.log = settings, segmenter.train(), world, log
        self._unsharded, self._objective, self._examine = unsharded, objective, examine
        self._device, t = next(segmenter.net.parameters()).device, settings.train
        objective.to(self._device)
        if world.kind == "pipeline":
            assert unsharded is not None
            assert isinstance(settings, TrainConfig)
            self._learner = Pipeline(settings, segmenter, unsharded, objective, world)
        else:
            self._learner = AllLayers(settings, segmenter, objective, world)
        own = {f"objective.{name}": p for name, p in objective.named_parameters()}
        named = segmenter.parameters() | own
        self._optimizer = build_optimizer(segmenter, t.optimizer, more=own.values())
        self.state = TrainingState(
            {name: p for name, p in named.items() if p.requires_grad}, self._optimizer, decay=t.ema_decay
        )
        sizes = [Counter({group["name"]: len(group["params"])}) for group in self._optimizer.param_groups]
        everyone = world.every(sizes) if world.kind == "pipeline" else [sizes]
        self.group_sizes = dict(sum(chain.from_iterable(everyone), Counter()))  # tensors by parameter group
        self.validations: list[dict[str, Any]] = []  # step and scores
        rules = {"model": "last"} if t.keep == "last" else {"model": "best"}
        self._rules = rules | ({"model_last": "last"} if t.keep == "both" else {})  # folder: which validation's weights
        self._kept: dict[str, dict[str, Tensor]] = {}  # rule: weights and buffers on the CPU

    # --- what it has come to ---

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.state.step

    @property
    def best(self) -> dict[str, Any]:
        """The first validation of the highest score; NaN is below all."""
        name = self._examine.chosen_by
        return max(self.validations, key=lambda found: -1 if math.isnan(found[name]) else found[name])

    @property
    def last(self) -> dict[str, Any]:
        """The newest validation."""
        return self.validations[-1]

    @property
    def kept_scores(self) -> dict[str, Any]:
        """The validation of the weights that are saved as `model`."""
        return getattr(self, self._rules["model"])

    @property
    def _is_over(self) -> bool:
        """All steps are made, or too many validations were no better than the best."""
        t = self.settings.train
        stale = len(self.validations) - 1 - self.validations.index(self.best) if self.validations else 0
        return self.step == t.iters or bool(t.patience and stale >= t.patience)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, but what processes hold in parts; see `checkpoint.encode`.

        All processes ask for it together.
        """
        return {
            **({"step": self.step} if self.world.has_parts else self.state.state_dict()),
            "buffers": self._learner.buffers(),
            "objective": dict(self._objective.named_buffers()),
            "validations": self.validations,
            "kept": self._kept.get("best", {}),  # the last ones are those of a step to come
        }

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """As it was when `state_dict` gave this, in whatever layout of processes.

        checkpoint: the folder of the state, with the parts if there are any.
        """
        if "weights" in state:
            self.state.load_state_dict(state)
        else:
            folder = checkpoint / shards.FOLDER
            self.state.restore(state["step"], shards.names_in(folder), partial(shards.read, folder))
        for name, module in (("buffers", self.segmenter.net), ("objective", self._objective)):
            for key, buffer in module.named_buffers():
                buffer.copy_(state[name][key])
        self.validations, self._kept = state["validations"], {"best": state["kept"]}

    def save(self, path: Path, dtype: torch.dtype) -> None:
        """Write the kept weights into folders of the run folder; the training is over."""
        segmenter = self._unsharded or self.segmenter
        segmenter.net.to(dtype)  # pyright: ignore[reportArgumentType]
        for folder, rule in self._rules.items():
            segmenter.net.load_state_dict(self._kept[rule])
            segmenter.eval().save(path / folder)

    def close(self) -> None:
        """What is recorded on a GPU must go before the processes part."""
        if isinstance(self._learner, AllLayers):
            self._learner.close()

    # --- the loop ---

    def fit(
        self, samples: Samples, checkpoints: Checkpoints, asked: Asked, more: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Steps until the last one, or until patience is at its end.

        Args:
            more: gives what is written beside the state into each checkpoint.
        Raises:
            UserError: the loss or its gradient is not finite when it is read, or the contrast loss does nothing (see
                Objective.refuse_idle), before anything is validated or saved; or a device has no memory left.
            Stopped: a signal came to any of the processes; a checkpoint is written.
        """
        t = self.settings.train
        loader = steps_of(samples, t, self.world, first=self.step, workers=self.settings.data.workers,
                          is_pinned=self._device.type == "cuda")  # fmt: skip
        agreement = Agreement(self.world, checkpoints, asked, validate_every=t.validate_every)
        for micro_batches in () if self._is_over else loader:
            step = self.step + 1
            signum, is_due = agreement.at(step)
            is_validated = step % t.validate_every == 0 or step == t.iters
            is_logged = is_validated or step % LOG_EVERY == 0
            # read the loss (a CPU-GPU sync) once in a while, and before a broken model would be saved
            is_read = bool(is_logged or is_due or signum)
            with explain_step(self.settings, self.segmenter, self.world, step, micro_batches):
                line = self._step(micro_batches, is_read=is_read)
            if is_read:
                self._objective.refuse_idle(t.iters)
            if is_logged and self.log is not None:
                self.log.step(step, line)
            if is_validated:
                self._validate(line["loss"])
            if (is_due or signum) and not self._is_over:
                self._write(checkpoints, more)
            if self._is_over:
                return
            if signum:
                name = signal.Signals(signum).name
                said = f"{name} after step {step} of {t.iters}; the same command goes on from there"
                raise Stopped(signal.Signals(signum), said)

    def _step(self, micro_batches: Sequence[Any], *, is_read: bool) -> dict[str, Any]:
        """One step of the optimizer; its numbers if they are read.

        Each micro-batch's means count by their shares of what the whole step's mean divides by, mostly the labelled
        pixels, so that the gradient is that of one large batch, whatever its division. UserError: not finite.
        """
        t, world, index = self.settings.train, self.world, self.step
        rates = set_rates(self._optimizer, index, t)
        on_device = [batch.to(self._device) for batch in micro_batches]
        shares_MT = self._shares([label_BHW for _, label_BHW in on_device])
        found, weights = self._learner.backward(on_device, shares_MT, self.step + 1)
        moving = self.state.parameters.values()
        agree(moving, world)
        line: dict[str, Any] = {}
        if is_read or t.optimizer.clip_norm is not None:
            norm = clip(moving, t.optimizer.clip_norm, world)
            if is_read:
                rates, found, weights = self._learner.told(rates, found, weights)
                line = self._read(found, shares_MT, norm) | {"weights": weights, "lr": dict(rates)}
        self.state.advance()
        self._objective.remember()
        return line

    def _shares(self, labels: Sequence[Tensor]) -> Tensor | None:
        """Of each micro-batch's terms in the means of the whole step: float64 on the device; nothing waits for them.

        None: one micro-batch of one part is all of it.
        """
        if len(labels) * self.world.parts == 1:
            return None
        amounts_MT = torch.stack([self._objective.amounts(label_BHW) for label_BHW in labels])
        total_T = self.world.sum_of_parts(amounts_MT.sum(dim=0))
        return amounts_MT / torch.where(total_T > 0, total_T, 1)

    def _read(self, found: Losses, shares_MT: Tensor | None, norm: Tensor) -> dict[str, Any]:
        """Losses of the whole step over all processes, and the gradient's norm. UserError: not finite."""
        names = list(found[0])
        read = torch.stack([*(values[name].float() for values in found for name in names), norm.float()]).cpu().double()
        values = read[:-1].view(len(found), len(names)).numpy()
        if shares_MT is not None:
            values[:, 1:] *= shares_MT.cpu().numpy()  # the loss, which comes first, has them in it
        means = self.world.sum(values.sum(axis=0)) / self.world.together
        loss, grad_norm = float(means[0]), float(read[-1])
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {grad_norm}"
            raise UserError(f"train.optimizer.lr={self.settings.train.optimizer.lr}: the {what} at step "
                            f"{self.step + 1}; expected a finite number. Lower train.optimizer.lr, set "
                            "train.optimizer.clip_norm, or set runtime.precision=fp32.")  # fmt: skip
        return {"loss": loss, "terms": dict(zip(names[1:], means[1:].tolist(), strict=True)), "grad_norm": grad_norm}

    def _validate(self, loss: float) -> None:
        """Score the weights that would be saved, and keep them if they are the ones."""
        with self._evaluated() as segmenter:
            found = {"step": self.step, **self._examine(segmenter)}
            self.validations.append(found)
            kept = [rule for rule in self._rules.values() if getattr(self, rule) is self.last]
            if self.world.is_main and kept:
                now = {name: value.to("cpu", copy=True) for name, value in segmenter.net.state_dict().items()}
                self._kept |= dict.fromkeys(kept, now)
        if self.log is not None:
            self.log.validation(found, loss)

    @contextmanager
    def _evaluated(self) -> Iterator[NetSegmenter]:
        """The averaged weights in one piece and in eval mode, the same in all processes; training mode afterwards."""
        with self.state.averaged(), torch.no_grad():
            segmenter = self.segmenter if self._unsharded is None else self._unsharded
            if segmenter is self.segmenter:
                self._learner.buffers()
            else:
                self._learner.gather(segmenter.net.state_dict())
            yield segmenter.eval()
            self.segmenter.train()

    def _write(self, checkpoints: Checkpoints, more: Callable[[], Mapping[str, Any]]) -> None:
        state, parts = self.state_dict(), None
        if self.world.has_parts:
            tensors = self.state.tensors()
            parts = Parts(shards.FOLDER, tensors, partial(shards.write, tensors=tensors, world=self.world))
        if self.log is not None:
            checkpoints.write(self.step, {"training": state, **self.log.state_dict(), **more()}, parts)
        elif parts is not None:
            shards.write(None, parts.tensors, self.world)
