"""The rule by which `evaluate` asks a segmenter: what it means, in words, and what contradicts; see inference.py."""

from typing import Any

from segadapt.config import EvaluateConfig, EvaluateSettings, RunConfig
from segadapt.errors import UserError

LEAST_SCALE, MOST_SCALE = 0.1, 10.0


def is_plain(e: EvaluateSettings) -> bool:
    """The rule of `adapt`: one forward of the image at data.short_side_px, its logits straight to the label's size."""
    is_whole, is_one_view = e.window_px is None and e.size_divisor == 1, e.scales == [1.0] and not e.flip
    return e.input_resize == "short_side" and e.logit_resize == "direct" and is_whole and is_one_view


def loaded_px(settings: RunConfig) -> int | None:
    """The short side at which images reach the segmenter, px; None: as on disk, since the rule resizes them."""
    if isinstance(settings, EvaluateConfig) and not is_plain(settings.evaluate):
        return None
    return settings.data.short_side_px


def in_words(e: EvaluateSettings, short_side_px: int) -> str:
    """A rule that is not plain, as a part of a protocol line."""
    sizes = {"short_side": f"short side {short_side_px} px", "original": "size on disk"}
    size = sizes.get(e.input_resize, f"box {e.long_side_px} x {short_side_px} px")
    size += " aligned to 32 px" if e.input_resize == "aligned32" else ""
    padded = f", padded {e.padding.replace('_', ' and ')} to a multiple of {e.size_divisor} px"
    parts = [f"input of {size}" + (padded if e.size_divisor > 1 else "")]
    parts += [f"windows of {e.window_px} px, stride {e.stride_px} px"] if e.window_px is not None else []
    if len(e.scales) > 1 or e.flip:
        views = f"scales {', '.join(f'{scale:g}' for scale in e.scales)}" + (", mirrored too" if e.flip else "")
        parts.append(f"{views}, mean of the {e.average}")
    elif e.scales != [1.0]:
        parts.append(f"scale {e.scales[0]:g}")
    steps = {"direct": "one bilinear resize", "two_step": "two bilinear resizes, the first to the input's size"}
    return "; ".join([f"scored at label size, {steps[e.logit_resize]}", *parts])


def check(config: Any) -> None:
    """UserError: settings of the rule that contradict each other, or of which one would have no effect."""
    e: EvaluateSettings = config.evaluate
    is_in_range = all(LEAST_SCALE <= scale <= MOST_SCALE for scale in e.scales)
    if not e.scales or not is_in_range or len(set(e.scales)) < len(e.scales):
        raise UserError(f"evaluate.scales={e.scales}: expected one factor or more, each once and in {LEAST_SCALE:g}.."
                        f"{MOST_SCALE:g}. Use [1.0] for the input's own size.")  # fmt: skip
    if (e.window_px is None) != (e.stride_px is None):
        raise UserError(f"evaluate.window_px={e.window_px} and evaluate.stride_px={e.stride_px}: windows need both, "
                        "the whole input neither. Set both, or both to null.")  # fmt: skip
    if e.window_px is not None and e.stride_px is not None and e.stride_px > e.window_px:
        raise UserError(f"evaluate.stride_px={e.stride_px} is larger than evaluate.window_px={e.window_px}: strips of "
                        f"{e.stride_px - e.window_px} px would be left out. Use {e.window_px} px or less.")  # fmt: skip
    has_box = e.input_resize in ("box", "aligned32")
    if has_box != (e.long_side_px is not None):
        raise UserError(f"evaluate.long_side_px={e.long_side_px}, but evaluate.input_resize={e.input_resize}: it is "
                        f"the long side of that rule's box. Set it {'to 2048' if has_box else 'to null'}.")  # fmt: skip
    if has_box and e.long_side_px < config.data.short_side_px:
        raise UserError(f"evaluate.long_side_px={e.long_side_px} is below data.short_side_px="
                        f"{config.data.short_side_px}: expected the longer side of a box. Raise it.")  # fmt: skip
    if e.logit_resize == "direct" and (e.window_px is not None or e.size_divisor > 1):
        name = "size_divisor" if e.window_px is None else "window_px"
        raise UserError(f"evaluate.logit_resize=direct, but evaluate.{name}={getattr(e, name)}: windows are joined, "
                        "and padding is cut, at the input's size. Set evaluate.logit_resize=two_step.")  # fmt: skip
    if e.padding != "right_down" and e.size_divisor == 1:
        raise UserError(f"evaluate.padding={e.padding}, but evaluate.size_divisor=1: nothing is padded. Set "
                        "evaluate.padding=right_down, or a divisor.")  # fmt: skip
    if e.average != "softmax" and len(e.scales) == 1 and not e.flip:
        raise UserError(f"evaluate.average={e.average}, but there is one scale and no flip: nothing is averaged. Set "
                        "evaluate.average=softmax, more scales, or evaluate.flip=true.")  # fmt: skip
    own_px = config.model.discriminative.short_side_px
    if own_px is not None and not is_plain(e):
        raise UserError(f"model.discriminative.short_side_px={own_px}, but the rule of evaluate.* resizes the image. "
                        "Set it to null; data.short_side_px is the rule's short side.")  # fmt: skip
