"""A recipe with the command line's say in it: `--set`, `--data`, `--seed`, and paths made absolute."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vocseg.plugins import discover
from vocseg.recipe.reader import Recipe, find_recipe, locate, read_recipe
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

    Args:
        data: the flag `--data`; it comes before VOCSEG_DATA, and that before the recipe's `data.root`.

    Raises:
        UsageError: with every problem of the recipe.
    """
    path = find_recipe(name)
    registry = discover(project=path, plugins=plugins)
    overrides = [*overrides, *([f"seed={seed}"] if seed is not None else [])]
    root = data or os.environ.get("VOCSEG_DATA")
    if root:
        overrides.append(f"data.root={json.dumps(str(Path(root).expanduser().absolute()))}")
    recipe = read_recipe(path, registry, overrides)
    # Relative paths are made absolute once, so that the run folder's recipe works from any folder.
    absolute = []
    if not root and "root" in recipe.data.component.handed_over:
        absolute.append(f"data.root={json.dumps(str(locate(recipe.data.settings.root, path)))}")
    if recipe.model.settings.weights not in ("none", "imagenet"):
        absolute.append(f"model.weights={json.dumps(str(locate(recipe.model.settings.weights, path)))}")
    if absolute:
        recipe = replace(read_recipe(path, registry, [*overrides, *absolute]), given=recipe.given)
    return recipe, registry
