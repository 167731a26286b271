"""Where weights come from, and what to tell the user when they do not come: both models load inside this."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.utils.logging
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, StrictDataclassError
from safetensors import SafetensorError

from segadapt.errors import UserError

LOADING = (
    OSError,  # of the hub and the connection, too
    ValueError,
    StrictDataclassError,  # a value of config.json
    SafetensorError,
    pickle.UnpicklingError,
    RecursionError,  # JSON that is nested too deep
)


def local_folder(checkpoint: str, setting: str) -> Path | None:
    """The folder that a checkpoint names, or None for a hub id (owner/name).

    Raises:
        UserError: it is written as a path, but no such folder exists.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    if checkpoint.startswith(("/", ".", "~")) or checkpoint.count("/") != 1:
        raise UserError(
            f"{setting}={checkpoint} is neither a folder that exists nor a hub id such as owner/name. "
            f"Correct the path, or give a hub id."
        )
    return None


@contextmanager
def explain_checkpoint_errors(kind: str, checkpoint: str, setting: str, *, without: str = "") -> Iterator[None]:
    """Turn what the loading libraries raise for a missing, gated or damaged checkpoint into one UserError line.

    Only the library's own loading calls belong inside, so that none of our bugs is dressed up as the user's.

    Args:
        kind: the model in words, "generative model".
        checkpoint: hub id or folder, as the user wrote it.
        setting: the setting that holds it, "model.generative.checkpoint".
        without: how to do without it, ", or ..."; said where the hub does not give it.
    Raises:
        UserError: in place of one of LOADING; the original is its cause.
    """
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries would print ten lines before ours
    try:
        yield
    except UserError:
        raise
    except LOADING as error:
        raise UserError(f"{setting}={checkpoint}: {_diagnosis(kind, checkpoint, setting, error, without)}") from error


def _diagnosis(kind: str, checkpoint: str, setting: str, error: Exception, without: str) -> str:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if local_folder(checkpoint, setting) is not None:
        return (
            f"the {kind} cannot be loaded from this folder, which is incomplete or damaged ({said}). "
            f"Download it again (hf download ID --local-dir FOLDER), or point {setting} to a complete folder."
        )
    page = f"https://huggingface.co/{checkpoint}"
    elsewhere = f"or set {setting}=/path/to/folder to a copy of it{without}"
    # transformers wraps the hub's errors in OSError: the reason is further down the chain
    reasons = tuple(_chain(error))
    if any(isinstance(reason, GatedRepoError) for reason in reasons):
        return (
            f"the {kind} is behind a licence that this account has not accepted. Accept it at {page}, "
            f"run `hf auth login` and `hf download {checkpoint}`, {elsewhere}."
        )
    if any(isinstance(reason, RevisionNotFoundError) for reason in reasons):
        return f"the {kind} has no such revision at {page}. Choose one of those listed there, {elsewhere}."
    if any(isinstance(reason, RepositoryNotFoundError) for reason in reasons):
        return (
            f"the hub shows no such {kind} to this account. Check the id; where it is licensed, accept the licence at "
            f"{page} and run `hf auth login`; then `hf download {checkpoint}`, {elsewhere}."
        )
    return (
        f"the {kind} is not on this machine and could not be fetched ({said}). With a connection, accept the licence "
        f"at {page} if it has one and run `hf download {checkpoint}`, {elsewhere}."
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
