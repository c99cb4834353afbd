"""A recipe with the command line's say in it: `--set`, `--data`, `--seed`, and paths made absolute."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vocseg.errors import IncompleteError, Problem, UsageError, VocsegError
from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import Part, Recipe, find_recipe, locate, read_recipe
from vocseg.recipe.schema import CACHES, WEIGHTS
from vocseg.recipe.toml import encodable
from vocseg.registry import Registry


def load_recipe(
    name: str,
    *,
    overrides: Sequence[str] = (),
    data: Path | None = None,
    seed: int | None = None,
    plugins: Path | None = None,
    to_run: bool = False,
) -> tuple[Recipe, Registry]:
    """Reads a recipe by path or bundled name, its paths made absolute.

    The data's folder is `data` (the flag `--data`), else `--set data.root`, else VOCSEG_DATA, else the recipe's
    `data.root`. A bundled recipe has the plugins that are beside or above the working directory.

    Args:
        to_run: its data must be there too, and its augmentations are built: all that can be tried before torch is
            imported, which takes longer than all of this.

    Raises:
        UsageError: with every problem of the recipe.
        DataError: the recipe is right, and its data is missing or wrong.
    """
    path = find_recipe(name)
    project = Path.cwd() if path.parent == bundled("recipes") else path
    registry = discover(project=project, plugins=plugins)
    seeded = [*overrides, f"seed={seed}"] if seed is not None else overrides
    by_flag = any(override.partition("=")[0].strip() == "data.root" for override in overrides)
    named = data or (None if by_flag else os.environ.get("VOCSEG_DATA"))
    root = Path(os.path.expanduser(named)).absolute() if named else None
    trial = partial(_failures, path=path, root=root) if to_run else None
    recipe = read_recipe(path, registry, seeded, look_for_weights=True, trial=trial)

    # Relative paths are made absolute once, so that the run folder's recipe works from any folder.
    if root:
        recipe = replace(recipe, given=recipe.given | {("data", "root")})
        recipe = with_setting(recipe, "data", "root", str(root))
    elif "root" in recipe.data.component.handed_over:
        recipe = with_setting(recipe, "data", "root", str(locate(recipe.data.settings.root, path)))
    if recipe.model.settings.weights not in WEIGHTS:
        recipe = with_setting(recipe, "model", "weights", str(locate(recipe.model.settings.weights, path)))
    if recipe.data.settings.cache not in CACHES:
        recipe = with_setting(recipe, "data", "cache", str(locate(recipe.data.settings.cache, path)))
    return recipe, registry


def _failures(parts: Mapping[str, list[Part[Any]]], path: Path, root: Path | None) -> Iterator[VocsegError]:
    """What keeps the data's splits from being opened, and the augmentations from being built."""
    tries: list[tuple[Part[Any], dict[str, Any]]] = [(part, {}) for part in parts["augmentation"]]
    for part in parts["data"]:
        settings = part.settings
        found = root or locate(settings.root, path)
        tries += [(part, {"root": found, "split": split}) for split in dict.fromkeys((settings.train, settings.val))]
    for part, available in tries:
        try:
            part.build(available)
        except VocsegError as error:
            skips = getattr(part.settings, "on_bad_image", "") == "skip"
            if not (skips and isinstance(error, IncompleteError)):
                yield error


def with_setting(recipe: Recipe, table: str, key: str, value: str | int) -> Recipe:
    """The recipe with one of the core's keys changed, in its settings and in its resolved form.

    Raises:
        UsageError: the value is a path that no recipe can hold.
    """
    if isinstance(value, str) and not encodable(value):
        raise UsageError(Problem(value, f"a folder's name is not UTF-8, and {table}.{key} is; rename the folder"))
    part = getattr(recipe, table)
    changed = replace(part, settings=part.settings.model_copy(update={key: value}))
    resolved = {**recipe.resolved, table: {**recipe.resolved[table], key: value}}
    return replace(recipe, **{table: changed}, resolved=resolved)
