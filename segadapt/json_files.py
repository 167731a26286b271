"""Read JSON that others may have written: of bounded size and depth."""

import json
from pathlib import Path
from typing import Any

from segadapt.errors import UserError

MOST_BYTES = 2**28  # a manifest of all images of ADE20K-C is a tenth of it


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
