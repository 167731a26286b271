"""What an earlier start of the same run left: its results, or the state from which it goes on."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from segadapt import __version__
from segadapt.checkpoint import Checkpoints
from segadapt.config import RunConfig
from segadapt.config_pretraining import PretrainConfig
from segadapt.record import RunFolder, refuse_changes
from segadapt.untrusted import read_json

ANEW = "Restore it, choose another experiment.id, or start anew with experiment.restart=true"


def finished_results(folder: RunFolder, origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results that are there; None: not finished.

    UserError: they are of other weights, images or order than `origin` says; what it does not name is not compared.
    """
    path = folder.path / "results.json"
    if not path.is_file():
        return None
    results = read_json(path, cure=f"{ANEW}.")
    earlier = {name: results[name] for name in origin if name in results}
    refuse_changes(folder.path, earlier, origin, cure=ANEW)
    return results


def earlier_state(
    checkpoints: Checkpoints,
    folder: RunFolder,
    settings: RunConfig | PretrainConfig,
    origin: Mapping[str, Any],
    console: Console,
    *,
    unit: str = "image",
) -> Any:
    """The newest state that is whole and whose records are there; None, and said: from the first image (or `unit`).

    UserError: it is of another version, or of other weights, images or order than `origin` says; what that does not
    name is not compared.
    """

    def records_are_there(state: Mapping[str, Any]) -> str | None:
        for name in ("records", "timings"):
            size = (folder.path / f"{name}.jsonl").stat().st_size
            if size < state[name]:
                return f"{name}.jsonl has {size} bytes, expected {state[name]} or more"
        return None

    state = checkpoints.read(records_are_there)
    if state is None:
        if (folder.path / "records.jsonl").exists():
            console.print(f"an earlier start left no checkpoint: from the first {unit}", highlight=False)
        return None
    version, known = __version__, state["origin"]
    earlier = {name: known[name] for name in (*origin, "segadapt") if name in known}
    if settings.experiment.any_version:
        version = known["segadapt"]
    cure = f"{ANEW}, or of another segadapt go on all the same with experiment.any_version=true"
    refuse_changes(folder.path, earlier, {**origin, "segadapt": version}, cure=cure)
    return state
