"""What may change in the recipe of a run that goes on: where things lie and how fast it is, not what is computed.

But for `train.on_nonfinite`: a run that a bad step ended goes on when such steps are left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vocseg.errors import Problem, UsageError
from vocseg.recipe.reader import Recipe
from vocseg.recipe.toml import Key, shorten, write_value

FREE = (
    "description", "data.root", "data.workers", "data.cache", "data.timeout_seconds", "train.on_nonfinite",
    "train.checkpoint_minutes",
)  # fmt: skip


def refuse_changes(began_with: dict[str, Any], recipe: Recipe, run: Path) -> None:
    """Compares the recipe of a run with the resolved one that its state was saved under.

    A key that neither has, because it is newer than the run, has its default in both.

    Raises:
        UsageError: with a problem for each key that changed and may not.
    """
    before, now = dict(_values(began_with)), dict(_values(recipe.resolved))
    problems = []
    for key in dict.fromkeys([*before, *(key for key in now if key in recipe.given)]):
        name = ".".join(map(str, key))
        if before.get(key) != now.get(key) and name not in FREE:
            message = f"{name}: the run began with {_shown(before.get(key))}, found {_shown(now.get(key))}"
            problems.append(Problem(str(run), message))
    if problems:
        remedy = f"a run that goes on can change {', '.join(FREE[:-1])} and {FREE[-1]} only; start a new one for others"
        raise UsageError(*problems, Problem(str(run), remedy))


def _values(data: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """The values of a resolved recipe by key; arrays of tables by their index."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _values(value, (*key, name))
    elif isinstance(data, list) and data and all(isinstance(entry, dict) for entry in data):
        for index, entry in enumerate(data):
            yield from _values(entry, (*key, index))
    else:
        yield key, data


def _shown(value: Any) -> str:
    return "nothing" if value is None else shorten(write_value(value))
