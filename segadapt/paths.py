"""No name from a file or a setting leads out of the folder that it belongs to."""

from pathlib import Path

from segadapt.errors import UserError


def check_inside(path: Path, *roots: Path, cure: str) -> None:
    """UserError: with its links followed, a path lies in none of these folders; ends in `cure`."""
    real = path.resolve()
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        folders = " or ".join(map(str, roots))
        raise UserError(f"{path} leads to {real}, outside of {folders}; expected a place inside. {cure}")
