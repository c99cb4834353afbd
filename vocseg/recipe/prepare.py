"""A recipe with the command line's say in it: `--set`, `--data`, `--seed`, and paths made absolute."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import Recipe, find_recipe, locate, read_recipe
from vocseg.recipe.schema import WEIGHTS
from vocseg.registry import Registry


def load_recipe(
    name: str,
    *,
    overrides: Sequence[str] = (),
    data: Path | None = None,
    seed: int | None = None,
    plugins: Path | None = None,
) -> tuple[Recipe, Registry]:
    """Reads a recipe by path or bundled name, its paths made absolute.

    The data's folder is `data` (the flag `--data`), else `--set data.root`, else VOCSEG_DATA, else the recipe's
    `data.root`. A bundled recipe has the plugins that are beside or above the working directory.

    Raises:
        UsageError: with every problem of the recipe.
    """
    path = find_recipe(name)
    project = Path.cwd() if path.parent == bundled("recipes") else path
    registry = discover(project=project, plugins=plugins)
    seeded = [*overrides, f"seed={seed}"] if seed is not None else overrides
    recipe = read_recipe(path, registry, seeded, look_for_weights=True)

    # Relative paths are made absolute once, so that the run folder's recipe works from any folder.
    by_flag = any(override.partition("=")[0].strip() == "data.root" for override in overrides)
    root = data or (None if by_flag else os.environ.get("VOCSEG_DATA"))
    if root:
        recipe = replace(recipe, given=recipe.given | {("data", "root")})
        recipe = _with_path(recipe, "data", "root", Path(os.path.expanduser(root)).absolute())
    elif "root" in recipe.data.component.handed_over:
        recipe = _with_path(recipe, "data", "root", locate(recipe.data.settings.root, path))
    if recipe.model.settings.weights not in WEIGHTS:
        recipe = _with_path(recipe, "model", "weights", locate(recipe.model.settings.weights, path))
    return recipe, registry


def _with_path(recipe: Recipe, table: str, key: str, path: Path) -> Recipe:
    """The recipe with one of the core's paths replaced, in its settings and in its resolved form."""
    part = getattr(recipe, table)
    changed = replace(part, settings=part.settings.model_copy(update={key: str(path)}))
    resolved = {**recipe.resolved, table: {**recipe.resolved[table], key: str(path)}}
    return replace(recipe, **{table: changed}, resolved=resolved)
