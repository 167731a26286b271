"""One class for every mistake a user can make; all other exceptions are our bugs and keep their traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake, in one line: where, what was got, what was expected, what to do. Exit status 2."""


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' of a valid name that begins so, or the nearest; ' Choose from: ...' where none is near."""
    names = sorted(valid)
    longer = [name for name in names if len(got) > 3 and name.startswith(got)]
    near = longer or difflib.get_close_matches(got, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]}?"
    if not names:
        return " There is none."
    shown = ", ".join(names[:60]) + (", ..." if len(names) > 60 else "")
    return f" Choose from: {shown}."


def in_one_line(error: Exception) -> str:
    """KeyError: 'foo'; at most 200 characters of what another package said, without an end."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": .")


def counted(count: int, one: str, more: str | None = None) -> str:
    """1 validation, 2 validations; `more` where an s does not make the plural."""
    return f"{count} {one if count == 1 else more or f'{one}s'}"
