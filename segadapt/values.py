"""One value against its setting: type, choices, range; and the type in words, for messages."""

import dataclasses
import math
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from segadapt.errors import UserError, did_you_mean

WORDS = {  # one, and many
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Any: ("any value", "any values"),
    NoneType: ("null", "null"),
}


def in_words(kind: Any, *, many: bool = False) -> str:
    """'a list of whole numbers, or null' of list[int] | None."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return ", or ".join(in_words(one, many=many) for one in inner)
    if get_origin(kind) is list:
        return f"{'lists' if many else 'a list'} of {in_words(inner[0], many=True)}"
    if get_origin(kind) is dict:
        return f"{'mappings' if many else 'a mapping'} {{name: value}} of {in_words(inner[1], many=True)}"
    return WORDS[kind][many]


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, to the last element; an int is a float too, a bool is no number."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(fits(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if get_origin(kind) is dict:
        pairs = value.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(fits(key, inner[0]) and fits(one, inner[1]) for key, one in pairs)
    if kind is Any or isinstance(value, bool):
        return kind in (Any, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def mismatch(name: str, value: Any, item: dataclasses.Field) -> str:
    """The line for a value of another type."""
    return f"{name}={value!r}: expected {in_words(item.type)} ({item.metadata['help']}). Correct it."


def check(name: str, value: Any, item: dataclasses.Field) -> None:
    """UserError: a value of another type, not finite, outside its choices or its range; of a list, an element."""
    rule: Any = item.metadata
    if not fits(value, item.type):
        raise UserError(mismatch(name, value, item))
    if rule["choices"] and value is not None and value not in rule["choices"]:
        raise UserError(
            f"{name}={value!r} is not a choice ({rule['help']}).{did_you_mean(str(value), rule['choices'])}"
        )
    for number in numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{name}={value}: expected finite numbers ({rule['help']}). Correct it.")
        if not rule["low"] <= number <= rule["high"]:
            top = "" if rule["high"] == math.inf else f" and at most {rule['high']:g}"
            raise UserError(f"{name}={value}: expected at least {rule['low']:g}{top} ({rule['help']}).")


def numbers(value: Any) -> Iterator[int | float]:
    """Those in a value, at any depth; a bool is none."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
