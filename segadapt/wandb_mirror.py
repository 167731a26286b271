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
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from segadapt.config import RunConfig
from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainGenerativeConfig
from segadapt.datasets.labels import IGNORE
from segadapt.errors import UserError, did_you_mean
from segadapt.record import RunFolder

MODES = ("online", "offline", "disabled")
INIT_TIMEOUT_S = 30
GIVEN_DATA_DIR = os.environ.get("WANDB_DATA_DIR")  # where wandb stages tables and pictures
CALL_TIMEOUT_S = 30  # of one image's numbers; wandb itself only puts them into a queue
NOTED = "mirrored.json"  # in the run folder: the last step copied, by axis
FINISH_TIMEOUT_S = 60  # then the rest stays on disk for `wandb sync`

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """An image with masks to lay over it."""

    image_HW3: np.ndarray  # uint8 RGB
    masks: Mapping[str, np.ndarray]  # by name, uint8 [H, W], index into classes, 255 = ignore
    classes: Sequence[str]
    caption: str


class Mirror(Protocol):
    """Where numbers are copied to; no method raises or waits for the network without limit."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Copy numbers and Pictures at a step; 'fog/miou' has the axis 'fog/step': each prefix counts its own."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Copy a table of texts and numbers, None where one is missing."""
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

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class Wandb:
    """Mirror around a wandb run; the first error, or call without answer, is its last: one warning, then as NoWandb."""

    def __init__(
        self,
        run: Any,
        noted: Path,
        teardown: Callable[[], Any],
        *,
        call_timeout_s: float = CALL_TIMEOUT_S,
        finish_timeout_s: float = FINISH_TIMEOUT_S,
    ):
        """run: what `wandb.init` returns; noted: file of the last step on each axis, also of earlier starts.

        teardown: `wandb.teardown`.
        """
        self._run, self._noted, self._teardown = run, noted, teardown
        self._call_timeout_s, self._finish_timeout_s = call_timeout_s, finish_timeout_s
        self._earlier: dict[str, int] = _noted_steps(noted)
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
            shown = {key: _image(value) if isinstance(value, Picture) else value for key, value in new.items()}
            self._run.log({**shown, **axes})
            self._note(axes)

        if new:
            self._attempt(send, self._call_timeout_s)

    def _note(self, axes: Mapping[str, int]) -> None:
        """Whole or not at all, but without waiting for the disk: it need outlive the process, not the machine."""
        self._steps |= axes
        temporary = self._noted.with_name(f".{self._noted.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._steps))
        os.replace(temporary, self._noted)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See Mirror."""

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._attempt(send, self._call_timeout_s)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See Mirror."""
        self._attempt(lambda: self._run.summary.update(dict(values)), self._call_timeout_s)

    def finish(self) -> None:
        """See Mirror."""
        self._attempt(lambda: self._run.finish(), self._finish_timeout_s)
        if self._is_lost:  # or wandb would do it at exit: wait there, or print a traceback
            _within(self._call_timeout_s, self._teardown)

    def _attempt(self, action: Callable[[], Any], timeout_s: float) -> None:
        if self._is_lost:
            return
        error = _within(timeout_s, action)
        if error is not None:
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
        os.environ["WANDB_DATA_DIR"] = GIVEN_DATA_DIR or str(folder / "wandb")  # no setting; the default is in the home
        # or the login prints before the run has its settings; and what is offline looks for no server
        wandb.setup(wandb.Settings(silent=True, mode="online" if mode == "online" else "offline"))
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
    return Wandb(run, folder / NOTED, wandb.teardown)


@contextmanager
def mirrored(
    settings: RunConfig | TrainGenerativeConfig | PretrainConfig, run: RunFolder, *, job_type: str, **more: Any
):
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


def _within(timeout_s: float, action: Callable[[], Any]) -> Exception | None:
    """What went wrong with a call that is waited for so long; one that never ends does not hold up the exit."""
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return TimeoutError(f"no answer in {timeout_s:g} s")
    return errors[0] if errors else None


def _image(picture: Picture) -> Any:
    """As W&B shows it: a JPEG, and masks whose pixels tell their class."""
    import wandb

    labels = dict(enumerate(picture.classes)) | {IGNORE: "ignore"}
    masks = {name: {"mask_data": ids_HW, "class_labels": labels} for name, ids_HW in picture.masks.items()}
    return wandb.Image(picture.image_HW3, caption=picture.caption, masks=masks, file_type="jpg")


def _noted_steps(noted: Path) -> dict[str, int]:
    """Empty where there is no such file, or one that lost power has torn."""
    try:
        return json.loads(noted.read_text()) if noted.is_file() else {}
    except ValueError:
        logger.warning("W&B: %s is torn, so points may be copied twice", noted)
        return {}


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
