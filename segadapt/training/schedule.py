"""Learning rates by step: a warm-up, then a decay, in mmengine's and in mmcv 1.x's convention. Pure functions.

t steps done, 0 .. iters - 1   N warm-up steps   f factor at the first of them   p progress of the decay, 0..1
"""

import math
from bisect import bisect_right

from segadapt.config_loop import ScheduleSettings
from segadapt.errors import UserError

OPENSEG_POWER = 4  # of the encoder's own warm-up, ((t + 1) / N)^4


def rate(t: int, base: float, schedule: ScheduleSettings, *, iters: int, is_encoder: bool = False) -> float:
    """Learning rate of step t for a group whose rate is `base`.

    chained (mmengine): base (f + (1 - f) t / (N - 1)) for t < N, then the decay from step N on, p = 1 at the last step.
    multiplied (mmcv 1.x): the decay counts from step 0, p = t / end, and is multiplied for t < N by
    1 - (1 - t / N) (1 - f).

    Args:
        iters: steps of the training; the decay's own end may be another (schedule.end).
        is_encoder: openseg's further warm-up (schedule.encoder_warmup_iters) holds for this group.
    """
    s, N, end = schedule, schedule.warmup_iters, schedule.end or iters
    if s.kind == "multiplied":
        warm = 1 - (1 - t / N) * (1 - s.warmup_factor) if t < N else 1.0
        value = warm * _decayed(t, base, s, p=min(1.0, t / end))
    elif t < N:
        value = base * (s.warmup_factor + (1 - s.warmup_factor) * t / (N - 1) if N > 1 else 1.0)
    else:
        value = _decayed(t, base, s, p=min(1.0, (t - N) / max(1, end - N - 1)))
    if is_encoder and t < s.encoder_warmup_iters:
        value *= ((t + 1) / s.encoder_warmup_iters) ** OPENSEG_POWER
    return value


def _decayed(t: int, base: float, s: ScheduleSettings, *, p: float) -> float:
    match s.decay:
        case "poly":
            return (base - s.min_lr) * (1 - p) ** s.power + s.min_lr
        case "cosine":
            return (base - s.min_lr) * (1 + math.cos(math.pi * p)) / 2 + s.min_lr
        case "step":
            return base * s.gamma ** bisect_right(s.milestones, t)
    return base  # constant


def check_schedule(schedule: ScheduleSettings, *, iters: int) -> None:
    """UserError: a schedule that ends before training does without saying so, or a part of it without effect."""
    s, name = schedule, "train.schedule"
    end = s.end or iters
    is_curve = s.decay in ("poly", "cosine")
    if s.end is not None and not is_curve:
        raise UserError(f"{name}.end={s.end} with {name}.decay={s.decay}, which has no end: it would have no effect. "
                        f"Set {name}.end=null.")  # fmt: skip
    if end < iters and s.tail == "refuse":
        raise UserError(f"{name}.end={end} is before train.iters={iters}: {iters - end} steps would be taken at "
                        f"{s.min_lr:g}. Set {name}.end=null, or {name}.tail=hold if that is meant.")  # fmt: skip
    if end >= iters and s.tail == "hold":
        raise UserError(f"{name}.tail=hold, but the decay ends with the training or after it ({name}.end={s.end}): it "
                        f"would have no effect. Set {name}.tail=refuse.")  # fmt: skip
    for key in ("warmup_iters", "encoder_warmup_iters"):
        if (steps := getattr(s, key)) and steps >= min(end, iters):
            raise UserError(f"{name}.{key}={steps}, but there are {min(end, iters)} steps: the rate would never be "
                            f"reached. Expected fewer; lower {name}.{key} or raise train.iters.")  # fmt: skip
    if (s.decay == "step") != bool(s.milestones) or s.milestones != sorted(set(s.milestones)):
        raise UserError(f"{name}.decay={s.decay} and {name}.milestones={s.milestones}: expected rising steps with "
                        f"decay=step, and [] with any other. Correct one of the two.")  # fmt: skip
    if s.milestones and not 0 < s.milestones[0] <= s.milestones[-1] < iters:
        raise UserError(f"{name}.milestones={s.milestones}: expected steps from 1 to {iters - 1}, as train.iters="
                        f"{iters}; others are never reached. Correct them.")  # fmt: skip
    if s.min_lr and not is_curve:
        raise UserError(f"{name}.min_lr={s.min_lr:g} with {name}.decay={s.decay}: it would have no effect. Set it to "
                        "0.")  # fmt: skip
