"""Every shipped recipe can be read, says what it is, and resolves to itself."""

import tomllib
from pathlib import Path

import pytest

from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import find_recipe, read_recipe
from vocseg.recipe.writer import write_resolved

RECIPES = sorted(bundled("recipes").iterdir())
REGISTRY = discover()


def test_there_are_recipes_and_nothing_else_is_beside_them() -> None:
    assert len(RECIPES) >= 3
    assert all(path.suffix == ".toml" for path in RECIPES)
    assert "quickstart" in [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_read(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, REGISTRY)
    assert recipe.name == path.stem
    assert find_recipe(path.stem) == path
    again = tmp_path / path.name
    again.write_text(write_resolved(recipe))
    assert read_recipe(again, REGISTRY).resolved == recipe.resolved


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_names_what_a_reader_would_ask_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "a comment at the top says what the experiment answers"
    given = tomllib.loads(text)
    assert len(given["description"]) >= 40
    assert given["description"].endswith(".")
    # What decides the outcome stands in the file, whatever the defaults become.
    assert {"model", "data", "augmentation", "loss", "optimizer", "train"} <= given.keys()
    assert {"seed", "description"} <= given.keys()
    assert "lr" in given["optimizer"]
    assert "batch_size" in given["data"]
