"""What the machine does to a run, in one line with its cure: versions, a full disk, a killed process."""

import errno
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors import SafetensorError

from segadapt.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, over the quota, over the largest size of a file


def check_versions(python: str) -> None:
    """Compare Python and the installed packages with the ranges that this package was installed with.

    Args:
        python: version of the interpreter.
    Raises:
        UserError: one outside of its range, or a package that is not there.
    """
    try:
        ours = distribution("segadapt")
    except PackageNotFoundError:  # run from a copy of the sources: nobody has said which ranges hold
        return
    supported = ours.metadata["Requires-Python"]
    if not SpecifierSet(supported).contains(python, prereleases=True):
        raise UserError(f"Python {python}: segadapt supports Python {supported}. Install it into such an environment.")
    for requirement in map(Requirement, ours.requires or ()):
        if requirement.marker is not None:  # of an extra
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "not installed"
        if found == "not installed" or not requirement.specifier.contains(found, prereleases=True):
            raise UserError(
                f"{requirement.name} {found}: segadapt supports {requirement}. Run pip install '{requirement}'."
            )


def fault_of(error: BaseException) -> str | None:
    """One line for what the machine did, or None: any other error is a bug of ours and keeps its traceback."""
    said = " ".join(str(error).split())
    if is_full(error):
        path = getattr(error, "filename", None) or "a file of the run"
        return (
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or said}); expected free space. What was "
            "there before is as it was. Make room, or set logging.root to another disk, and run the same command again."
        )
    if isinstance(error, BrokenProcessPool) or (isinstance(error, RuntimeError) and "DataLoader worker" in said):
        return (
            f"a process that reads images died ({said.partition('. ')[0]}); expected all of data.workers to live. The "
            "system kills processes where memory runs out: lower data.workers, or free memory, and run the same "
            "command again."
        )
    return None


def is_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space; safetensors hands on the system's number as text."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in FULL)
    return isinstance(error, OSError) and error.errno in FULL
