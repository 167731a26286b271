"""`from_overrides` for many calls: it composes in 0.1 s, which most tests would spend again on the same files."""

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from segadapt.parse import methods_as_files, parse

T = TypeVar("T")


def quick_settings(primary: str, overrides: Sequence[str], schema: type[T]) -> T:
    """As `from_overrides` gives them: composed once for the same groups; values are set on top, as Hydra does."""
    overrides = methods_as_files(overrides)
    roots = [text for text in overrides if re.match(r"logging\.root=/[\w/.-]+$", text)]  # another one in each test
    values = tuple(text for text in overrides if re.match(r"\w+\.[\w.]+=", text) and text not in roots)
    groups = tuple(text for text in overrides if text not in (*values, *roots))
    settings: Any = copy.deepcopy(_parsed(primary, groups, values, schema))
    if roots:
        settings.logging.root = roots[-1].removeprefix("logging.root=")
    return settings


@functools.cache
def _parsed(primary: str, groups: tuple[str, ...], values: tuple[str, ...], schema: type[T]) -> T:
    whole = copy.deepcopy(_composed(primary, groups))
    for override in OverridesParser.create().parse_overrides(list(values)):
        OmegaConf.update(whole, override.key_or_group, override.value(), merge=True)
    return parse(whole, schema)


@functools.cache
def _composed(primary: str, groups: tuple[str, ...]) -> DictConfig:
    with initialize_config_module("segadapt.conf", version_base="1.3"):
        return compose(primary, list(groups))
