"""What others may have written: no path leads out of its folder, and JSON is of bounded size and depth."""

import json
from pathlib import Path
from typing import Any

from segadapt.errors import UserError

MOST_BYTES = 2**28  # of JSON; a manifest of all images of ADE20K-C is a tenth of it


def check_inside(path: Path, *roots: Path, cure: str) -> None:
    """UserError: with its links followed, a path lies in none of these folders; ends in `cure`."""
    real = path.resolve()
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        folders = " or ".join(map(str, roots))
        raise UserError(f"{path} leads to {real}, outside of {folders}; expected a place inside. {cure}")


def read_json(path: Path, *, cure: str) -> dict[str, Any]:
    """The object in a file. UserError: larger than MOST_BYTES, not JSON, too deep, or no object; ends in `cure`."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UserError(f"{path}: {size} bytes; expected at most {MOST_BYTES}. {cure}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path}: JSON nested too deep to be read; expected a few levels. {cure}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected an object. {cure}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: JSON of a {type(value).__name__}; expected an object. {cure}")
    return value
