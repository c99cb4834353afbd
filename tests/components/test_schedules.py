"""Schedules give, step by step, what torch's own schedulers give."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from vocseg.components.schedules import constant, cosine, cosine_restarts, one_cycle, poly, with_warmup
from vocseg.errors import UsageError
from vocseg.plugins import discover

LR = 0.02


def torch_factors(make: Callable, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls a deprecated form of step, and complains of it
        scheduler = make(optimizer)
        factors = []
        for _ in range(steps):
            factors.append(optimizer.param_groups[0]["lr"] / LR)
            optimizer.step()
            scheduler.step()
    return factors


def every_schedule() -> list:
    components = [c for c in discover() if c.kind == "schedule" and c.origin == "vocseg"]
    assert {c.name for c in components} == {"constant", "cosine", "cosine_restarts", "poly", "one_cycle"}
    return [pytest.param(c, id=c.name) for c in components]


@pytest.mark.parametrize("component", every_schedule())
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 100])
def test_factors_lie_between_zero_and_one_at_any_step(component, steps: int):
    schedule = component.build({"steps": steps, "steps_per_epoch": max(1, steps // 2), "lr": LR}, {})
    factors = [schedule(step) for step in range(2 * steps + 3)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[0] > 0
    assert factors == [schedule(step) for step in range(2 * steps + 3)]


def test_constant_is_one():
    assert [constant()(step) for step in (0, 1, 10**9)] == [1, 1, 1]


def test_cosine_is_that_of_torch():
    ours = cosine(50, LR, eta_min=1e-4)
    expected = torch_factors(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=1e-4), 50)
    assert [ours(step) for step in range(50)] == pytest.approx(expected)
    assert ours(50) == ours(1000) == pytest.approx(1e-4 / LR)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_cosine_restarts_is_that_of_torch(multiplier: int):
    ours = cosine_restarts(5, LR, period_epochs=3, multiplier=multiplier, eta_min=1e-4)
    expected = torch_factors(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=15, T_mult=multiplier, eta_min=1e-4), 150
    )
    assert [ours(step) for step in range(150)] == pytest.approx(expected)
    assert ours(15) == 1


def test_poly_is_that_of_torch():
    ours = poly(50, power=0.9)
    expected = torch_factors(lambda o: lr_scheduler.PolynomialLR(o, total_iters=50, power=0.9), 50)
    assert [ours(step) for step in range(50)] == pytest.approx(expected)
    assert ours(50) == 0


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.33])
def test_one_cycle_is_that_of_torch(fraction: float):
    ours = one_cycle(50, warmup_fraction=fraction, initial_divisor=20, final_divisor=100)
    expected = torch_factors(
        lambda o: lr_scheduler.OneCycleLR(
            o, LR, 50, pct_start=fraction, div_factor=20, final_div_factor=100, cycle_momentum=False
        ),
        49,  # torch refuses to be asked beyond
    )
    assert [ours(step) for step in range(49)] == pytest.approx(expected)
    assert ours(49) == pytest.approx(1 / 2000)


def test_one_cycle_without_a_rise_starts_at_the_top():
    ours = one_cycle(10, warmup_fraction=0.0)
    assert ours(0) == 1
    assert ours(9) == pytest.approx(1 / 25e4)


def test_warmup_is_that_of_torch():
    ours = with_warmup(poly(40), 10)

    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / 11, total_iters=10)
        return lr_scheduler.SequentialLR(
            optimizer, [rise, lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=0.9)], milestones=[10]
        )

    assert [ours(step) for step in range(50)] == pytest.approx(torch_factors(make, 50))


def test_warmup_rises_to_where_the_schedule_starts():
    # One cycle starts at 1/25; a warm-up of 4 steps takes 1/5, 2/5, 3/5, 4/5 of that.
    ours = with_warmup(one_cycle(100), 4)
    assert [ours(step) for step in range(5)] == pytest.approx([x / 125 for x in (1, 2, 3, 4, 5)])


def test_no_warmup_leaves_the_schedule_alone():
    plain, warm = cosine(10, LR), with_warmup(cosine(10, LR), 0)
    assert [warm(step) for step in range(12)] == [plain(step) for step in range(12)]


def test_a_floor_above_the_learning_rate_is_refused():
    with pytest.raises(UsageError, match=r"cosine\.eta_min: expected at most the learning rate 0\.02, found 0\.1"):
        cosine(10, LR, eta_min=0.1)
    with pytest.raises(UsageError, match=r"cosine_restarts\.eta_min"):
        cosine_restarts(10, LR, eta_min=0.1)
