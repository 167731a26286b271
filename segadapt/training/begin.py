"""How a training in the loop begins: what its settings may not say, its run folder, its state, its records."""

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from segadapt import __version__
from segadapt.checkpoint import Checkpoints
from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError, counted
from segadapt.models.set_up import set_up
from segadapt.record import RunFolder, refuse_changes
from segadapt.resume import ANEW, earlier_state, finished_results
from segadapt.terminal import Terminal
from segadapt.training.log import Log
from segadapt.training.parallel import World
from segadapt.training.preparation import found_folder
from segadapt.training.schedule import check_schedule
from segadapt.wandb_mirror import mirrored


def check_loop(settings: TrainConfig | PretrainConfig) -> None:
    """UserError: settings of the loop that contradict each other or have no effect."""
    t = settings.train
    check_schedule(t.schedule, iters=t.iters)
    validations = -(-t.iters // t.validate_every)
    if t.patience and t.patience >= validations - 1:
        there = f"there {'is' if validations == 1 else 'are'} {counted(validations, 'validation')}"
        raise UserError(f"train.patience={t.patience}, but {there} (train.iters={t.iters}, train.validate_every="
                        f"{t.validate_every}): only the last could end the training. Validate more often, or set "
                        "train.patience=0.")  # fmt: skip
    lowest = t.optimizer.lr * min(1, t.optimizer.head_lr_factor)
    if t.schedule.decay in ("poly", "cosine") and t.schedule.min_lr > lowest:
        raise UserError(f"train.schedule.min_lr={t.schedule.min_lr} is above {lowest:g}, where a rate starts: it would "
                        "rise. Lower it, or raise train.optimizer.lr.")  # fmt: skip
    if t.checkpoint_every is not None and t.checkpoint_every >= t.iters:
        raise UserError(f"train.checkpoint_every={t.checkpoint_every} with train.iters={t.iters}: it would have no "
                        "effect, as the last step writes no checkpoint. Lower it, or set it to null.")  # fmt: skip


def look(
    settings: TrainConfig | PretrainConfig, origin: dict[str, Any], world: World, terminal: Terminal, stack: ExitStack
) -> tuple[RunFolder, bool, dict[str, Any] | None]:
    """The run's folder, whether it has yet to be made, and its results if it is finished, which is said.

    One that is there is locked until the stack ends. The first process looks, and the others begin once it is its own.
    The results are of these settings and images; the network that they began with is not built again.
    """
    folder, is_new, results = world.by_main(lambda: _look(settings, origin, stack))
    if results is not None:
        terminal.console.print(f"{folder.path} is finished; experiment.restart=true would start anew",
                               highlight=False, soft_wrap=True)  # fmt: skip
        results |= {"folder": str(folder.path)}
    return folder, is_new, results


def _look(
    settings: TrainConfig | PretrainConfig, origin: dict[str, Any], stack: ExitStack
) -> tuple[RunFolder, bool, dict[str, Any] | None]:
    folder = found_folder(settings, make=False)
    if is_new := not folder.is_there:
        return folder, is_new, None
    stack.enter_context(folder.locked())
    return folder, is_new, None if settings.experiment.restart else finished_results(folder, origin)


def gone_on_from(
    settings: TrainConfig | PretrainConfig, origin: dict[str, Any], world: World, terminal: Terminal, folder: RunFolder
) -> tuple[Checkpoints, Any]:
    """The run's checkpoints, and the state that it goes on from; None: from the first step.

    UserError: see earlier_state; the first process found a checkpoint that another does not see.
    """
    every = settings.train.checkpoint_every
    checkpoints = Checkpoints(folder.path, seconds=settings.runtime.checkpoint_seconds, images=every)
    state = None
    if not settings.experiment.restart:
        state = earlier_state(checkpoints, folder, settings, origin, terminal.console, unit="step")
    first, *others = world.every(checkpoints.newest)
    for rank, found in enumerate(others, start=1):
        if found != first:
            raise UserError(
                f"logging.root: the first process goes on from step {first}, process {rank} from {found}; "
                "expected one folder that all hosts share. Set logging.root to such a folder."
            )
    return checkpoints, state


class Times:
    """When a training began, and the seconds of all its starts so far.

    state: see gone_on_from.
    """

    def __init__(self, state: Any):
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z") if state is None else state["started"]
        self._earlier_s, self._began = 0.0 if state is None else state["seconds"], time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, and for results.json."""
        seconds = self._earlier_s + time.perf_counter() - self._began
        return {"started": self.started, "seconds": round(seconds, 1)}


def own_device(settings: TrainConfig | PretrainConfig, world: World) -> torch.device:
    """Where this process works, with torch set up as the settings say: the CPU, or its own GPU of the host."""
    main = set_up(settings.runtime)
    return torch.device(main.type, world.local_rank) if main.type == "cuda" else main


def _make_folder(settings: TrainConfig | PretrainConfig, folder: RunFolder, stack: ExitStack) -> None:
    """Make the run's folder and lock it, once all that can be refused is found right."""
    if folder.is_there:
        raise UserError(f"Run folder {folder.path} was begun by another process in the meantime; expected this one "
                        "alone. Run the same command again.")  # fmt: skip
    stack.enter_context(found_folder(settings).locked())


def open_log(
    settings: TrainConfig | PretrainConfig,
    world: World,
    terminal: Terminal,
    folder: RunFolder,
    step: int,
    state: Any,
    stack: ExitStack,
    *,
    is_new: bool,
    job_type: str,
    score: tuple[str, str],
) -> Log | None:
    """The folder, made or cleared unless a state is gone on from after so many steps; the records and the terminal.

    They are open until the stack ends; None in all processes but the first.

    Args:
        is_new: the folder has yet to be made.
        job_type: of the W&B run.
        score: see Log.
    """
    if is_new:
        world.by_main(lambda: _make_folder(settings, folder, stack))
    if not world.is_main:
        return None
    t = settings.train
    folder.start_over(asdict(settings), keep=state is not None)
    terminal.console.print(f"run folder {folder.path}", highlight=False, soft_wrap=True)
    if state is not None:
        terminal.console.print(f"goes on after step {step} of {t.iters}", highlight=False)
    mirror = stack.enter_context(mirrored(settings, folder, job_type=job_type))
    log = stack.enter_context(
        Log(folder.path, mirror, terminal, iters=t.iters, batch_size=t.batch_size, keep=state, step=step, score=score)
    )
    log.begin(started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=step, segadapt=__version__)
    return log


def refuse_other_weights(folder: RunFolder, state: Any, now: dict[str, Any]) -> None:
    """UserError: a run that goes on would start from other weights than it did, by their hashes."""
    cure = f"The weights that the training starts from are others now. {ANEW}"
    refuse_changes(folder.path, {name: state["origin"][name] for name in now}, now, cure=cure)
