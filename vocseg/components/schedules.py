"""Learning-rate schedules, and the linear warm-up that can precede each of them.

A schedule is f(step from 0) -> factor on the learning rate: a pure function of the step, so that a resumed run goes on
where it stopped with nothing to restore. Past the last step the factor stays as it was at the end.
"""

import math
from collections.abc import Callable
from typing import Annotated

from annotated_types import Ge, Gt, Interval

from vocseg import schedule
from vocseg.errors import Problem, UsageError

Schedule = Callable[[int], float]


@schedule
def constant() -> Schedule:
    """The same learning rate throughout."""
    return lambda step: 1.0


@schedule
def cosine(steps: int, lr: float, *, eta_min: Annotated[float, Ge(0)] = 0.0) -> Schedule:
    """Half a cosine from the learning rate down to `eta_min` (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Report 001 took T_max = epochs and eta_min = 1e-6; here it falls with every step rather than every epoch.

    Args:
        eta_min: the learning rate at the end, not a factor. A slower encoder ends at the same share of its own.

    Raises:
        UsageError: `eta_min` is above the learning rate.
    """
    floor = _floor("cosine", eta_min, lr)
    return lambda step: _half_cosine(step, steps, 1.0, floor)


@schedule
def cosine_restarts(
    steps_per_epoch: int,
    lr: float,
    *,
    period_epochs: Annotated[int, Ge(1)] = 20,
    multiplier: Annotated[int, Ge(1)] = 1,
    eta_min: Annotated[float, Ge(0)] = 0.0,
) -> Schedule:
    """Cosines that start again from the full learning rate, SGDR (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Report 002: a learning rate of 1e-2, eta_min 1e-5 and a period of 20 epochs.

    Args:
        period_epochs: epochs of the first cosine.
        multiplier: how many times as long as the one before it each further cosine is.
        eta_min: the learning rate at the end of each cosine, not a factor.

    Raises:
        UsageError: `eta_min` is above the learning rate.
    """
    floor = _floor("cosine_restarts", eta_min, lr)
    first = period_epochs * steps_per_epoch

    def factor(step: int) -> float:
        period = first
        if multiplier == 1:
            step %= period
        while step >= period:
            step -= period
            period *= multiplier
        return _half_cosine(step, period, 1.0, floor)

    return factor


@schedule
def poly(steps: int, *, power: Annotated[float, Gt(0)] = 0.9) -> Schedule:
    """Polynomial decay to zero, usual in segmentation (Chen et al. 2017, arXiv:1606.00915).

    Args:
        power: exponent of (1 - step / steps); 1 is a straight line.
    """
    return lambda step: (1 - _progress(step, steps)) ** power


@schedule
def one_cycle(
    steps: int,
    *,
    warmup_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.3,
    initial_divisor: Annotated[float, Ge(1)] = 25.0,
    final_divisor: Annotated[float, Ge(1)] = 1e4,
) -> Schedule:
    """One cosine up to the learning rate and one down, far below the start (Smith and Topin 2018, arXiv:1708.07120).

    The values of torch's `OneCycleLR` with two phases.

    Args:
        warmup_fraction: share of the steps on the way up.
        initial_divisor: the first learning rate is lr / initial_divisor.
        final_divisor: the last one is lr / initial_divisor / final_divisor.
    """
    first, last = 1 / initial_divisor, 1 / initial_divisor / final_divisor
    peak = warmup_fraction * steps - 1  # as in torch: the top lies between two steps where this is no whole number

    def factor(step: int) -> float:
        if step <= peak:
            return _half_cosine(step, peak, first, 1.0)
        start = max(peak, 0.0)
        return _half_cosine(step - start, steps - 1 - start, 1.0, last)

    return factor


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """A linear rise over `warmup_steps` to where `schedule` starts, which begins after it with its own step 0."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return schedule(0) * (step + 1) / (warmup_steps + 1)
        return schedule(step - warmup_steps)

    return factor


def _progress(step: float, steps: float) -> float:
    """How much of the way lies behind, from 0 to 1. A schedule of no steps, after a warm-up of all, is at its start."""
    return min(step / max(steps, 1e-9), 1.0) if step > 0 else 0.0


def _half_cosine(step: float, steps: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * _progress(step, steps))) / 2


def _floor(name: str, eta_min: float, lr: float) -> float:
    if eta_min > lr:
        raise UsageError(
            Problem(
                f"{name}.eta_min",
                f"expected at most the learning rate {lr:g}, found {eta_min:g}; lower it or raise optimizer.lr",
            )
        )
    return eta_min / lr
