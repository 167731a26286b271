"""What Hydra finds wrong with a command line, and names that are no settings: one line, with the nearest right name."""

import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from segadapt import values
from segadapt.config import fields_of
from segadapt.errors import UserError, did_you_mean

OPTIONS = "tta.options"  # a mapping whose names the method decides on; in others any may be
NAME = re.compile(r"(?!(null|true|false|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)  # of a file of a group


@contextmanager
def explained(schema: type, arguments: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra finds wrong with the command line inside into a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, schema, arguments)) from error
    except (LookupError, TypeError, ValueError) as error:
        # Hydra's own, of a group that is set to no name; all others are ours
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("hydra."):
            raise
        raise UserError(_explain(error, schema, arguments)) from error


def _explain(error: Exception, schema: type, arguments: Sequence[str]) -> str:
    """One line for what Hydra found wrong, with the nearest right name."""
    text = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        given = " ".join(error.override.split())
        return f"{given} cannot be read; expected key=value. Quote values with spaces: \"key='a b'\"."
    found = re.search(r"Could not find '(.+)/(.+?)' Available options in '.+?':(.*?)(?:Config search path|$)", text)
    if found:
        group, wrong, options = found.groups()
        choices = [option for option in options.split() if not option.startswith("_")]
        return f"{group}={wrong} is not a choice.{did_you_mean(wrong, choices)}"
    known = fields_of(schema)
    for argument in arguments:
        key = argument.split("=", 1)[0].lstrip("+~").split("@")[0]
        is_override = "=" in argument or argument.startswith("~")
        if not is_override or argument.startswith("-"):
            continue
        if (section := key.replace("/", ".")) in _sections(known):
            is_merged = f"Error merging override {argument}" in text or f"Could not override '{key}'" in text
            is_named = NAME.fullmatch(argument.partition("=")[2]) or argument.startswith("~")
            if is_merged or not (is_named or isinstance(error, HydraException)):
                inside = next(name for name in known if name.startswith(f"{section}."))
                return (f"{argument}: {section} holds settings; expected the name of one of its choices, or a mapping "
                        f"of its settings. Set them one by one, such as {inside}=VALUE.")  # fmt: skip
            continue
        of_dict = [name for name, item in known.items()
                   if key == name or (key.startswith(f"{name}.") and "dict[" in str(item.type))]  # fmt: skip
        if not of_dict:
            return f"{key} is not a setting.{nearest(key, known)}"
        if f"Error merging override {argument}" in text:
            return values.mismatch(key, argument.partition("=")[2], known[of_dict[0]])
        if f"Could not override '{key}'" in text and not argument.startswith("~"):
            return _added(argument, key, of_dict[0], getattr(error.__cause__, "parent_node", None))
    return text


def _added(argument: str, key: str, setting: str, there: DictConfig | None) -> str:
    """One line for a name that a mapping does not have: the nearest of those that it has, or that it needs a plus.

    Args:
        setting: the mapping's name.
        there: the mapping as composed, or the one in it where the name is missing.
    """
    from segadapt.methods import METHODS  # which imports torch

    before = setting if there is None else str(there._get_full_key(None))
    name, known, is_open = key.removeprefix(f"{before}."), {str(one) for one in there or ()}, setting != OPTIONS
    if there is not None and before == OPTIONS:
        tta: Any = there._get_parent()
        kind = METHODS.get(tta.method)
        known |= set() if kind is None else fields_of(kind.Options).keys()
    near = did_you_mean(name, known).replace(" Did you mean ", f" Did you mean {before}.")
    if name in known or (is_open and not near.startswith(" Did")):
        return f"{argument} adds a name to {setting}; expected a plus in front of it. Write +{argument}."
    return f"{key} is not a setting.{near}" + (
        f" A new name has a plus in front of it: +{argument}." if is_open else ""
    )


def _sections(names: Iterable[str]) -> set[str]:
    """Dotted names of all that holds settings."""
    parts = [name.split(".") for name in names]
    return {".".join(one[:length]) for one in parts for length in range(1, len(one))}


def as_group(key: str, value: Any, known: Iterable[str]) -> str:
    """A sentence: the option of a group that `key=value` means, with dots in place of slashes; "": it means none."""
    if "." not in key or key not in _sections(known):
        return ""
    group = key.replace(".", "/")
    options = [path.stem for path in Path(__file__).parent.joinpath("conf", group).glob("[!_]*.yaml")]
    return f" Did you mean {group}={value}?" if value in options else ""


def nearest(key: str, known: Iterable[str]) -> str:
    """A sentence: the setting or section that was meant, else what there is in the section that the key begins with."""
    names, sections = list(known), _sections(known)
    if ends_alike := [name for name in names if name.endswith(f".{key}")]:
        return f" Did you mean {ends_alike[0]}?"
    near = did_you_mean(key, [*names, *sections, *(name.replace(".", "/") for name in sections)])
    if near.startswith(" Did") and key not in sections:
        return near
    parts = key.split(".")
    starts = [".".join([*parts[:length], ""]) for length in range(len(parts), 0, -1)]
    start = next((start for start in starts if start[:-1] in sections), "")
    inside = {start + name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)}
    return did_you_mean("", inside)  # nothing is near: all of them
