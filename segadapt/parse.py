"""From composed YAML to checked dataclasses: unknown keys, types, choices, ranges, and settings that contradict."""

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar, get_args

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segadapt import rules, values
from segadapt.config import TtaSettings, fields_of
from segadapt.errors import UserError, did_you_mean
from segadapt.explain import as_group, explained, nearest

T = TypeVar("T")
METHOD = "tta.method="
PASSWORD = r"://[^/@\s]+:[^/@\s]+@"
PLAIN_TEMPLATE = "a photo of a {}"  # what model.generative.prompts.template is unless it is set


def from_overrides(
    primary: str, overrides: Sequence[str], schema: type[T], *, where_missing: Mapping[str, Any] = MappingProxyType({})
) -> T:
    """Settings as the command line would give them, for scripts: from_overrides("adapt", ["data=toytown_c"], ...).

    A Hydra that the calling program is in is left as it was.

    Args:
        where_missing: values, by dotted name, of settings that would otherwise have none.
    Raises:
        UserError: see `parse`; an override that cannot be read, or names no group, option or setting.
    """
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()  # there can be only one
    try:
        with explained(schema, overrides), initialize_config_module("segadapt.conf", version_base="1.3"):
            composed = compose(primary, methods_as_files(overrides))
    finally:
        GlobalHydra.instance().hydra = callers
    for name in OmegaConf.missing_keys(composed) & where_missing.keys():
        OmegaConf.update(composed, name, where_missing[name])
    return parse(composed, schema)


def methods_as_files(overrides: Sequence[str]) -> list[str]:
    """tta.method=NAME asks for all of conf/tta/NAME.yaml: the method's own optimizer and options."""
    names = [given.lstrip("+") for given in overrides]
    return [f"tta={name.removeprefix(METHOD)}" if name.startswith(METHOD) else given
            for name, given in zip(names, overrides, strict=True)]  # fmt: skip


def _flat(config: dict, known: dict[str, dataclasses.Field], prefix: str = "") -> dict[str, Any]:
    """Composed values by dotted name; a dict setting, or a dict that no setting is in, is one value."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = any(setting_name.startswith(f"{name}.") for setting_name in known)
        out |= _flat(value, known, f"{name}.") if is_section and isinstance(value, dict) else {name: value}
    return out


def parse(config: DictConfig, schema: type[T], *, prefix: str = "") -> T:
    """Check a composed config against its schema and return it as plain dataclasses.

    Args:
        prefix: of the names in messages, where the config is a part of a larger one.
    Raises:
        UserError: an unknown, missing or mistyped setting, a value outside its choices or range, an address with a
            password; names the nearest.
    """
    known = fields_of(schema)
    given = _flat(_resolved(config, prefix), known)
    for name in given:
        if name not in known:
            shown = f"{prefix}{name}"
            shown = shown if shown.isprintable() else repr(shown)
            raise UserError(f"{shown} is not a setting.{as_group(name, given[name], known) or nearest(name, known)}")
        if re.search(PASSWORD, str(given[name])):
            raise UserError(f"{prefix}{name} holds an address with a password; expected none, as settings are written "
                            "to records. Keep keys in the environment, and remove it.")  # fmt: skip
        if any(isinstance(number, int) and abs(number) > sys.float_info.max for number in values.numbers(given[name])):
            raise UserError(f"{prefix}{name}: a whole number beyond {sys.float_info.max:.2g}; expected a smaller one. "
                            "Correct it.")  # fmt: skip
    try:
        typed = OmegaConf.unsafe_merge(OmegaConf.structured(schema), _resolved(config, prefix))  # neither is used again
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            name = f"{prefix}{missing[0]}"
            if missing[0] not in known:
                raise UserError(f"{name} is missing; expected its settings. Leave ~{name} out.")
            raise UserError(f"{name} has no value: {known[missing[0]].metadata['help']}. Set {name}=VALUE.")
        parsed = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        name = _mistyped(str(error.full_key), given, known)
        if name is None:
            raise
        raise UserError(values.mismatch(f"{prefix}{name}", given[name], known[name])) from error
    for name, item in known.items():
        values.check(f"{prefix}{name}", attrgetter(name)(parsed), item)
    if not prefix:
        _check_fields_together(parsed)
    return parsed  # type: ignore[return-value]


def _mistyped(full_key: str, given: Mapping[str, Any], known: Mapping[str, dataclasses.Field]) -> str | None:
    """The setting that OmegaConf found at fault: the one that its key lies in, else the first list or dict amiss."""
    for name in given:
        if re.match(rf"{re.escape(name)}($|[.\[])", full_key):
            return name
    amiss = (name for name in given if get_args(known[name].type) and not values.fits(given[name], known[name].type))
    return next(amiss, None)


def _resolved(config: DictConfig, prefix: str) -> dict[str, Any]:
    """Plain values, with ${other.setting} in its place.

    UserError: one that names no setting, or a resolver, ${name:...}, which would compute or read the environment.
    """
    cure = "expected a plain value, or ${NAME} for the value of another setting. Write the value itself."
    resolver = re.search(r"\$\{[^}]*:", str(OmegaConf.to_container(config, resolve=False)))
    if resolver:
        raise UserError(f"{prefix or 'a setting'} holds {resolver[0]}...}}; {cure}")
    try:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        said = " ".join(str(error.msg).split())
        raise UserError(f"{prefix}{error.full_key or 'a setting'}: {said}; {cure}") from error
    return resolved


def wants_teacher(tta: TtaSettings) -> bool:
    """Whether a generative model is loaded."""
    from segadapt.methods import METHODS

    return tta.forward_mode == "tta" and METHODS[tta.method].has_teacher


def options_of(tta: TtaSettings) -> Any:
    """The method's `Options`.

    Raises:
        UserError: no such method; an option that it does not have, or without value, or out of range.
    """
    from segadapt.methods import METHODS  # which imports torch

    if tta.method not in METHODS:
        raise UserError(f"tta.method={tta.method} is not a method.{did_you_mean(tta.method, METHODS)}")
    return parse(OmegaConf.create(tta.options), METHODS[tta.method].Options, prefix="tta.options.")


def _check_fields_together(config: Any) -> None:
    """UserError: two settings that contradict each other; both are named."""
    tta = getattr(config, "tta", None)
    if tta is not None:
        options_of(tta)
        if tta.continual and tta.episodic:
            raise UserError("tta.continual=true and tta.episodic=true: keep all, or nothing? Switch one off.")
        if tta.optimizer.lr_prompt_offset is not None and not config.model.update.prompt_offset:
            raise UserError(
                f"tta.optimizer.lr_prompt_offset={tta.optimizer.lr_prompt_offset}, but model.update.prompt_offset="
                "false: nothing would learn at that rate. Set model.update.prompt_offset=true, or the rate to null."
            )
        if tta.optimizer.accumulate > 1 and (tta.episodic or tta.method == "memo"):
            raise UserError(
                f"tta.optimizer.accumulate={tta.optimizer.accumulate}, but each image is alone (tta.method="
                f"{tta.method}, tta.episodic={tta.episodic}): no step would be taken. Set it to 1."
            )
    if hasattr(config, "model") and hasattr(getattr(config, "data", None), "short_side_px"):
        _check_short_sides(config)
    if hasattr(config, "evaluate"):
        rules.check(config)
    generative = getattr(getattr(config, "model", None), "generative", None)
    if generative is None or (tta is not None and not wants_teacher(tta)):
        return
    update = getattr(config.model, "update", None)
    if update is not None and not (update.discriminative or update.generative):
        raise UserError(
            "model.update.discriminative=false and model.update.generative=false: nothing would move. Switch one on, "
            "or set tta.forward_mode=discriminative_only."
        )
    prompts = generative.prompts
    if prompts.file is not None and (prompts.overrides or prompts.template != PLAIN_TEMPLATE):
        other = "overrides" if prompts.overrides else f"template={prompts.template!r}"
        raise UserError(
            f"model.generative.prompts.file={prompts.file} and model.generative.prompts.{other}: the file holds every "
            "class's whole prompt, so nothing would read the other. Use one of the two."
        )
    if generative.window_px % 16:
        raise UserError(f"model.generative.window_px={generative.window_px}: expected a multiple of 16 (latent px / 8, "
                        f"patches of 2). Use {round(generative.window_px / 16) * 16}.")  # fmt: skip
    if generative.stride_px > generative.window_px:
        gap = generative.stride_px - generative.window_px
        raise UserError(
            f"model.generative.stride_px={generative.stride_px} is larger than model.generative.window_px="
            f"{generative.window_px}: strips of {gap} px would never reach the generative model. Use a stride of "
            f"{generative.window_px} px or less."
        )
    name = "data.short_side_px" if generative.short_side_px is None else "model.generative.short_side_px"
    short_side_px = generative.short_side_px or config.data.short_side_px
    if short_side_px < generative.window_px:
        raise UserError(
            f"{name}={short_side_px} is smaller than model.generative.window_px="
            f"{generative.window_px}: no window fits. Use the same value for both, a multiple of 16."
        )
    if generative.sigma_high is not None and generative.sigma_high < generative.sigma:
        raise UserError(
            f"model.generative.sigma_high={generative.sigma_high} is below model.generative.sigma="
            f"{generative.sigma}: expected an upper end. Swap them, or set sigma_high=null."
        )
    if update is not None:
        _check_adaptation(config.model)


def _check_short_sides(config: Any) -> None:
    """UserError: a model would see more pixels than were loaded, or training would not see its own size."""
    for model in ("discriminative", "generative"):
        own, loaded = getattr(getattr(config.model, model, None), "short_side_px", None), config.data.short_side_px
        if getattr(getattr(config.model, model, None), "windows", "grid") != "grid" and hasattr(config, "train"):
            raise UserError(
                "model.generative.windows=entropy: training has no segmenter that is unsure. Set it to grid."
            )
        if own is not None and hasattr(config, "train"):
            raise UserError(f"model.{model}.short_side_px={own}: training takes data.short_side_px={loaded} for all. "
                            "Set that, and this to null.")  # fmt: skip
        if own is not None and own > loaded:
            raise UserError(f"model.{model}.short_side_px={own} is larger than data.short_side_px={loaded}, at which "
                            "images are loaded: it would see enlarged pixels. Raise data.short_side_px.")  # fmt: skip


def _check_adaptation(model: Any) -> None:
    """UserError: options of the objective or of what moves that contradict each other."""
    generative, update, loss, trust = model.generative, model.update, model.loss, model.trust
    if trust.mode != "none" and generative.draws < 2:
        raise UserError(
            f"model.trust.mode={trust.mode}, but model.generative.draws={generative.draws}: one draw always agrees "
            "with itself. Use 2 draws or more, or set model.trust.mode=none."
        )
    if trust.restore and trust.max_agreement == 1:
        raise UserError(
            f"model.trust.restore={trust.restore}, but model.trust.max_agreement=1: no image is refused, so nothing "
            "would be restored. Lower max_agreement, or set restore=0."
        )
    if loss.min_classes > loss.classes_threshold:
        raise UserError(
            f"model.loss.min_classes={loss.min_classes} is above model.loss.classes_threshold="
            f"{loss.classes_threshold}: a window cannot be filled beyond its limit. Raise the limit, or lower "
            "min_classes."
        )
    if loss.select == "area" and loss.topk > 1:
        raise UserError(
            f"model.loss.topk={loss.topk}, but model.loss.select=area: no top-k is taken. Set model.loss.topk=1; "
            "model.loss.area_k says whose probabilities count."
        )
    if update.prompt_offset and not update.generative:
        raise UserError(
            "model.update.prompt_offset=true, but model.update.generative=false: a frozen teacher runs without graph, "
            "and the offset would never move. Set model.update.generative=true, or prompt_offset=false."
        )
    if update.lora_rank and not update.generative:
        raise UserError(
            f"model.update.lora_rank={update.lora_rank}, but model.update.generative=false: the adapters would never "
            "move. Set model.update.generative=true, or lora_rank=0."
        )
