"""The learning-rate range test (Smith 2015, arXiv:1506.01186): a short training whose rate grows from step to step.

Rates are those of the parameters without a factor of their own; an encoder keeps its share (`optimizer.encoder_lr`).
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vocseg.evaluate.validation import Evaluation, Scored
from vocseg.train.loop import Step, Training, train
from vocseg.train.nonfinite import NonFiniteError

DIVERGED = 4.0
"""Training has diverged once the loss, smoothed, is more than so many times its lowest."""

_MEMORY = 0.8  # share of what went before in the loss that is watched while it goes
_REACH = 0.05  # of all steps, on either side of the one whose smoothed loss and slope are taken


def rates_between(low: float, high: float, steps: int) -> list[float]:
    """So many rates, each the same factor above the one before."""
    return np.geomspace(low, high, steps).tolist()


def sweep(training: Training, rates: Sequence[float]) -> Iterator[float]:
    """Trains with one rate after the other, from where `training` stands, and gives the loss of each step.

    It ends with the loss that shows that training has diverged. Epochs are gone through as often as it takes; nothing
    is validated, and an encoder that is frozen at first stays so.
    """
    epochs = math.ceil(len(rates) / training.steps_per_epoch) + 1  # the last of them, which is validated, never ends
    swept = replace(
        training,
        schedule=lambda step: rates[min(step, len(rates) - 1)] / training.base_lrs[0],
        epochs=epochs,
        frozen_epochs=epochs if training.frozen_epochs else 0,
        validate_every=epochs,
        ema=None,
        compile=False,
        skip_nonfinite=False,
        limit_seconds=None,
    )
    watched, lowest = 0.0, math.inf
    try:
        with closing(train(swept, _nothing_to_validate)) as events:
            steps = (event for event in events if isinstance(event, Step))
            for number, step in zip(range(1, len(rates) + 1), steps, strict=False):
                loss = float(step.loss)
                yield loss
                watched = _MEMORY * watched + (1 - _MEMORY) * loss
                smoothed = watched / (1 - _MEMORY**number)
                lowest = min(lowest, smoothed)
                if has_diverged(smoothed, lowest):
                    return
    except NonFiniteError as error:
        yield error.found.loss


def has_diverged(loss: float, lowest: float) -> bool:
    return not math.isfinite(loss) or 0 < DIVERGED * lowest < loss


def _nothing_to_validate(network: nn.Module) -> Generator[Scored, None, Evaluation]:
    raise AssertionError("the range test ends before anything is validated")
    yield  # which makes it a generator


@dataclass(frozen=True)
class Found:
    """What the losses of a range test say.

    Attributes:
        smoothed: the losses without their noise, up to the last that is not well above the first ones.
        suggestion: the rate at which the loss falls fastest; None where it does not clearly fall.
        stops_falling: the rate from which on the smoothed loss rises, or only moves up and down.
        diverged: the rate at which training diverged; None if it never did.
        remark: why there is no suggestion.
    """

    smoothed: list[float]
    suggestion: float | None
    stops_falling: float
    diverged: float | None
    remark: str = ""


def read_losses(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """Finds the rate to use.

    Args:
        rates: all that were to be tried.
        losses: those of the steps that were made, one at least and the first of them finite.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    reach = max(2, round(_REACH * len(rates)))
    # Where training diverges losses are of another order, and would hide in their neighbours' mean how these fall.
    start = float(np.mean(finite[:reach]))
    ceiling = start + max(start - min(finite), abs(start) / 4)
    last = max(i for i, loss in enumerate(finite) if loss <= ceiling)
    level = np.minimum(finite[: last + 1], ceiling)
    smoothed, slopes = _smooth(level, reach)
    bottom = _first_bottom(smoothed)
    ended_early = len(losses) < len(rates) or len(finite) < len(losses)
    found = Found(smoothed.tolist(), None, rates[bottom], rates[len(losses) - 1] if ended_early else None)
    if len(level) <= 2 * reach:
        return replace(found, remark=f"the loss rises after {len(level)} steps; begin lower with --from")
    # What the window of the first steps says is mostly noise, and behind the bottom nothing falls that is of use.
    steepest = reach + int(slopes[reach : max(bottom, reach) + 1].argmin())
    # The noise's standard deviation, by the median, which the diverging end does not move.
    noise = 1.48 * float(np.median(np.abs(level - smoothed)))
    if slopes[steepest] >= 0 or smoothed[: bottom + 1].max() - smoothed[bottom] <= 2 * noise:
        return replace(found, remark="the loss never clearly falls; try more --steps, or rates further apart")
    return replace(found, suggestion=float(f"{rates[steepest]:.1e}"))


def _first_bottom(smoothed: NDArray[np.float64]) -> int:
    """The lowest value, or the first that is nearly as low if the loss rises after it: later ones come by chance."""
    lowest = int(smoothed.argmin())
    top = smoothed[: lowest + 1].max()
    fall = top - smoothed[lowest]
    bottom = 0
    for i, value in enumerate(smoothed):
        if value < smoothed[bottom]:
            bottom = i
        elif value - smoothed[bottom] > fall / 10 and top - smoothed[bottom] > fall / 2:
            break
    return bottom


def _smooth(losses: NDArray[np.float64], reach: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Value and slope, at each step, of the straight line through the losses up to `reach` steps away."""
    values, slopes = np.empty_like(losses), np.zeros_like(losses)
    for i in range(len(losses)):
        first = max(0, i - reach)
        window = losses[first : i + reach + 1]
        away = np.arange(first, first + len(window)) - i
        centre = away.mean()
        spread = float(((away - centre) ** 2).sum())
        slopes[i] = ((away - centre) * window).sum() / spread if spread else 0.0
        values[i] = window.mean() - slopes[i] * centre
    return values, slopes
