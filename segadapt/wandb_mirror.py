"""A copy of the numbers for Weights & Biases. The files on disk are the record of truth; this copy may be lost.

Whatever goes wrong here (no package, no login, no network, an error in a call) costs one warning line; the run goes on.

A run that goes on in another process keeps its W&B id, and no point of a step axis is given twice: the last step of
each is noted in the run folder as soon as wandb has it. What is lost if the process is killed: points that wandb had
not sent yet, and the point of one image whose record was written and whose copy was not. Offline, each start is a
folder of its own; `wandb sync --append` joins them under the id.
"""

import json
import logging
import netrc
import os
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from segadapt.config import EvaluateConfig, TrainGenerativeConfig
from segadapt.errors import UserError, did_you_mean
from segadapt.record import RunFolder

MODES = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 30
NOTED = "mirrored.json"  # in the run folder: the last step copied, by axis
FINISH_TIMEOUT_S = 60  # then the rest stays on disk for `wandb sync`

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """Where numbers are copied to; no method raises or waits for the network without limit."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Copy values at a step; 'fog/miou' has the axis 'fog/step', so every prefix counts its own steps."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Copy final values."""
        ...

    def finish(self) -> None:
        """Send what is left."""
        ...


class NoWandb:
    """Null object."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class Wandb:
    """Mirror around a wandb run; the first error is its last: one warning, then it behaves as NoWandb."""

    def __init__(self, run: Any, noted: Path):
        """run: what `wandb.init` returns; noted: file of the last step on each axis, also of earlier starts."""
        self._run, self._noted = run, noted
        self._earlier: dict[str, int] = json.loads(noted.read_text()) if noted.is_file() else {}
        self._steps = dict(self._earlier)
        self._defined: set[str] = set()
        self._is_lost = False

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """See Mirror; what an earlier start has copied is not copied again."""
        new = {key: value for key, value in values.items() if self._earlier.get(_axis(key), -1) < step}

        def send() -> None:
            axes = {_axis(key): step for key in new}
            for key in new:
                if key not in self._defined:
                    self._run.define_metric(key, step_metric=_axis(key))
                    self._defined.add(key)
            self._run.log({**new, **axes})
            self._note(axes)

        if new:
            self._attempt(send)

    def _note(self, axes: Mapping[str, int]) -> None:
        """Whole or not at all, but without waiting for the disk: it need outlive the process, not the machine."""
        self._steps |= axes
        temporary = self._noted.with_name(f".{self._noted.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._steps))
        os.replace(temporary, self._noted)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See Mirror."""
        self._attempt(lambda: self._run.summary.update(dict(values)))

    def finish(self) -> None:
        """See Mirror."""
        self._attempt(lambda: self._run.finish())

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except Exception as error:
            self._is_lost = True
            _warn_lost(error)


def open_mirror(
    mode: str,
    *,
    entity: str | None,
    project: str,
    name: str,
    group: str,
    job_type: str,
    config: Mapping[str, Any],
    folder: Path,
) -> Mirror:
    """Start the copy; never asks for a login.

    Args:
        mode: one of MODES; online without a stored login becomes offline, with a warning.
        entity: W&B user or team; None: the login's default.
        name: of the run, also its id: of two starts under one name the second goes on, or replaces the first.
        config: settings to show; must hold no secret.
        folder: wandb writes into folder/wandb; where the NOTED of an earlier start lies, this one goes on.
    Raises:
        UserError: unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"logging.wandb.mode={mode} is not a mode.{did_you_mean(mode, MODES)}")
    if mode == "disabled":
        return NoWandb()
    if mode == "online" and not _has_login():
        logger.warning("W&B: no login found, so the copy stays on disk. Run `wandb login`, later `wandb sync`.")
        mode = "offline"
    try:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))  # or the login prints before the run has its settings
        run = wandb.init(
            mode="online" if mode == "online" else "offline",
            entity=entity,
            project=project,
            name=name,
            id=name[:128],  # the most that W&B takes
            resume="allow" if mode == "online" and (folder / NOTED).is_file() else None,
            group=group,
            job_type=job_type,
            config=dict(config),
            dir=folder,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # command line, user, host and paths
            ),
        )
    except Exception as error:
        _warn_lost(error)
        return NoWandb()
    return Wandb(run, folder / NOTED)


@contextmanager
def mirrored(settings: EvaluateConfig | TrainGenerativeConfig, run: RunFolder, *, job_type: str, **more: Any):
    """The copy of one run, named by its id and experiment; finished however the run ends. Yields a Mirror.

    more: shown beside the settings, such as the protocol line.
    """
    mirror = open_mirror(
        settings.logging.wandb.mode,
        entity=settings.logging.wandb.entity,
        project=settings.logging.wandb.project,
        name=f"{run.id}-{settings.experiment.name}",
        group=settings.experiment.name,
        job_type=job_type,
        config=asdict(settings) | more,
        folder=run.path,
    )
    try:
        yield mirror
    finally:
        mirror.finish()


def _axis(key: str) -> str:
    prefix, slash, _ = key.rpartition("/")
    return f"{prefix}{slash}step"


def _has_login() -> bool:
    """Is there a key or token in the environment, or an entry for the server in a netrc file?"""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        try:
            if path and netrc.netrc(str(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue  # no such file, or not ours to repair: wandb could not use it either
    return False


def _warn_lost(error: Exception) -> None:
    """One line, with keys and the user part of addresses struck out."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    key = os.environ.get("WANDB_API_KEY")
    text = text.replace(key, "***") if key else text
    text = re.sub(r"//[^/@\s]+@", "//***@", text)[:300]
    logger.warning("W&B: copy lost, the run goes on and its files are complete (%s)", text)
