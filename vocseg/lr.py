"""A learning-rate range test of a recipe, with a plot: which `optimizer.lr` to use. It changes no recipe."""

import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vocseg.build import build
from vocseg.errors import EnvironmentFault, Problem, TrainingError, VocsegError, one_line
from vocseg.recipe.reader import Recipe
from vocseg.report.lr_range import draw_lr_range
from vocseg.runs.files import write_json
from vocseg.train.lr_range import rates_between, read_losses, sweep


@dataclass(frozen=True)
class Tried:
    """So many of the steps are done; before the first, `said` tells what is about to happen."""

    done: int
    total: int
    said: tuple[str, ...] = ()


def try_rates(
    recipe: Recipe, *, low: float, high: float, steps: int, out: Path | None = None, device: str = "auto"
) -> Generator[Tried, None, dict[str, Any]]:
    """Trains a recipe for a few steps at rates that grow from `low` to `high`, and writes lr.json and lr.png.

    Args:
        out: the folder they go to; runs/<recipe>/lr-<time> without one.

    Returns:
        What lr.json holds, and the `folder`.

    Raises:
        VocsegError: whatever a user can mend; TrainingError if the loss is not finite from the start.
    """
    job = build(recipe, device)
    training = job.training
    used = training.base_lrs[0]
    where = job.placement.describe()
    images = f"{n} x " if (n := training.batches_per_step) > 1 else ""
    images += f"{training.batches.batch_size} images"
    plan = f"{recipe.name} on {where}: {steps} steps of {images}, at rates from {low:g} to {high:g}"
    yield Tried(0, steps, (plan, *job.notes))

    rates = rates_between(low, high, steps)
    losses: list[float] = []
    try:
        for loss in sweep(training, rates):
            losses.append(loss)
            yield Tried(len(losses), steps)
    except VocsegError:
        raise
    except Exception as error:  # out of memory, or something inside a plugin
        raise TrainingError(f"step {len(losses) + 1}: {type(error).__name__}: {one_line(error)}") from error
    if not math.isfinite(losses[0]):
        raise TrainingError(f"the loss of the first step is {losses[0]}; `vocseg check {recipe.name}` says more")
    found = read_losses(rates, losses)
    result = {
        "recipe": recipe.name,
        "optimizer": recipe.optimizer.name,
        "device": where,
        "batch_size": training.batches.batch_size,
        "accumulate": training.accumulate,
        "seed": recipe.seed,
        "recipe_lr": used,
        "suggestion": found.suggestion,
        "stops_falling": found.stops_falling,
        "diverged": found.diverged,
        "remark": found.remark,
        "rates": rates[: len(losses)],
        "losses": losses,
        "smoothed": found.smoothed,
    }
    folder = out or Path("runs") / recipe.name / f"lr-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "lr.json", result)
        draw_lr_range(
            rates,
            losses,
            found.smoothed,
            folder / "lr.png",
            suggestion=found.suggestion,
            stops_falling=found.stops_falling,
            diverged=found.diverged,
            used=used,
            title=recipe.name,
        )
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}; choose another folder with --out"
        raise EnvironmentFault(Problem(str(folder), reason)) from error
    return {**result, "folder": str(folder)}
