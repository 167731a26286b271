"""Learning rates against recurrences and closed forms written here, and schedules that are refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_runs import training

from segadapt import train
from segadapt.config_loop import ScheduleSettings
from segadapt.errors import UserError
from segadapt.training.schedule import check_schedule, rate

PLAIN = {
    "kind": "chained", "decay": "poly", "power": 1.0, "min_lr": 0.0, "milestones": [], "gamma": 0.1, "warmup_iters": 0,
    "warmup_factor": 1e-6, "encoder_warmup_iters": 0, "end": None, "tail": "refuse",
}  # fmt: skip


def schedule(**changes) -> ScheduleSettings:
    return ScheduleSettings(**{**PLAIN, **changes})


def rates(iters: int, base: float, **changes) -> list[float]:
    return [rate(t, base, schedule(**changes), iters=iters) for t in range(iters)]


def mmengine(iters: int, base: float, N: int, f: float, power: float, low: float) -> list[float]:
    """LinearLR on steps 0 .. N and PolyLR on N .. iters, each by its recurrence from one step to the next."""
    lr, found = base * f, []
    for t in range(N):
        found.append(lr)
        if t < N - 1:
            lr *= 1 + (1 - f) / ((N - 1) * f + t * (1 - f))
    lr = base
    for t in range(iters - N):
        found.append(lr)
        left = iters - N - 1 - t
        lr = (lr - low) * (1 - 1 / left) ** power + low if left else lr
    return found


@given(
    iters=st.integers(3, 80),
    share=st.floats(0, 0.9),
    f=st.floats(1e-6, 1),
    power=st.floats(0.5, 2),
    low=st.sampled_from([0.0, 1e-4, 1e-3]),
)
def test_chained_is_mmengines_recurrence(iters, share, f, power, low):
    N = int(share * iters)
    N = 0 if N == 1 else N  # mmengine divides by N - 1
    expected = mmengine(iters, 0.01, N, f, power, low)
    found = rates(iters, 0.01, warmup_iters=N, warmup_factor=f, power=power, min_lr=low)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if iters - N > 1:
        assert found[-1] == low  # exactly
    assert found[N] == pytest.approx(0.01)


def test_chained_holds_the_rate_for_the_two_middle_steps():
    found = rates(160, 6e-5, warmup_iters=15)
    assert found[0] == pytest.approx(6e-11)
    assert found[14] == found[15] == pytest.approx(6e-5)
    assert found[16] < 6e-5


@pytest.mark.parametrize("t", [0, 1, 749, 1499, 1500, 80_000, 159_999])
def test_multiplied_is_mmcvs_product(t):
    base, low, power = 6e-5, 1e-7, 1.0
    poly = (base - low) * (1 - t / 160_000) ** power + low
    warm = 1 - (1 - t / 1500) * (1 - 1e-6) if t < 1500 else 1
    settings = schedule(kind="multiplied", warmup_iters=1500, min_lr=low)
    assert rate(t, base, settings, iters=160_000) == pytest.approx(poly * warm, rel=1e-12)


def test_the_two_conventions_differ():
    chained = rates(100, 1.0, warmup_iters=10)
    multiplied = rates(100, 1.0, warmup_iters=10, kind="multiplied")
    assert chained[10] == 1
    assert multiplied[10] == pytest.approx(0.9)
    assert multiplied[99] == pytest.approx(0.01)
    assert chained[99] == 0


def test_openseg_has_no_floor_and_warms_its_encoder_up():
    """Poly from step 0, base (1 - t / max)^0.9; the backbone's also times ((t + 1) / N)^4."""
    settings = schedule(kind="multiplied", power=0.9, encoder_warmup_iters=20)
    for t in (0, 7, 19, 20, 39):
        plain = 0.01 * (1 - t / 40) ** 0.9
        assert rate(t, 0.01, settings, iters=40) == pytest.approx(plain)
        warm = min(1, ((t + 1) / 20) ** 4)
        assert rate(t, 0.01, settings, iters=40, is_encoder=True) == pytest.approx(plain * warm)


def test_steps_multiply_by_gamma_from_each_milestone_on():
    found = rates(10, 1.0, decay="step", milestones=[4, 8], gamma=0.1, warmup_iters=2, warmup_factor=0.001)
    assert found == pytest.approx([0.001, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_is_half_a_wave_and_constant_stays():
    assert rates(5, 1.0, decay="cosine", min_lr=0.2) == pytest.approx(
        [0.2 + 0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]
    )
    assert rates(4, 0.3, decay="constant", kind="multiplied") == [0.3] * 4


def test_a_tail_holds_the_last_rate():
    found = rates(10, 1.0, end=5, tail="hold", min_lr=0.25)
    assert found[4:] == [0.25] * 6
    assert found[:5] == rates(5, 1.0, min_lr=0.25)


def test_one_step_is_taken_at_the_rate():
    assert rates(1, 0.7) == [0.7]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"end": 40_000}, r"schedule\.end=40000 is before train\.iters=80000: 40000 steps .* at 0\. Set .*tail=hold"),
        ({"tail": "hold"}, r"schedule\.tail=hold, but the decay ends with the training"),
        ({"end": 90_000, "tail": "hold"}, r"tail=hold, but"),
        ({"end": 80_000, "decay": "constant"}, r"schedule\.end=80000 with train\.schedule\.decay=constant"),
        ({"warmup_iters": 80_000}, r"schedule\.warmup_iters=80000, but there are 80000 steps"),
        ({"warmup_iters": 300, "end": 300, "tail": "hold"}, r"warmup_iters=300, but there are 300 steps"),
        ({"encoder_warmup_iters": 80_000}, r"encoder_warmup_iters=80000"),
        ({"milestones": [5]}, r"decay=poly and train\.schedule\.milestones=\[5\]"),
        ({"decay": "step"}, r"decay=step and train\.schedule\.milestones=\[\]"),
        ({"decay": "step", "milestones": [9, 5]}, r"milestones=\[9, 5\]: expected rising steps"),
        ({"decay": "step", "milestones": [5, 80_000]}, r"expected steps from 1 to 79999"),
        ({"decay": "constant", "min_lr": 1e-4}, r"min_lr=0\.0001 with train\.schedule\.decay=constant"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schedule_that_would_surprise_is_refused(changes, said):
    """The first: DINOv2's runs once took their second half at rate 0, as poly ended at 40k of 80k steps."""
    with pytest.raises(UserError, match=rf"^train\.schedule[^\n]*{said}[^\n]*$|^[^\n]*{said}[^\n]*$"):
        check_schedule(schedule(**changes), iters=80_000)


def test_it_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"train\.schedule\.end=3 is before train\.iters=6"):
        train.run(training(tmp_path, "train.schedule.end=3"))
    assert not any(tmp_path.iterdir())
