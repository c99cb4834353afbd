"""Every shipped recipe can be read, says what it is, resolves to itself, and trains a step."""

import re
import tomllib
from pathlib import Path

import pytest

from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import find_recipe, read_recipe
from vocseg.recipe.writer import write_resolved
from vocseg.trial import try_recipe

RECIPES = sorted(bundled("recipes").iterdir())
REGISTRY = discover()


def test_there_are_recipes_and_nothing_else_is_beside_them() -> None:
    assert len(RECIPES) == 30
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


def test_the_heads_quote_what_the_reports_printed() -> None:
    published = Path(__file__).parent.parent / "docs" / "published.toml"
    figures = tomllib.loads(published.read_text(encoding="utf-8"))["figure"]
    heads = {path.stem: path.read_text(encoding="utf-8").partition("\n\n")[0] for path in RECIPES}
    printed = [(f["recipe"], f"{f[key]:g}") for f in figures for key in ("iou", "accuracy") if key in f]
    assert len(printed) >= 50
    assert [(recipe, number) for recipe, number in printed if number not in heads[recipe]] == []
    assert {f["recipe"] for f in figures if f["source"][:3] not in heads[f["recipe"]]} == set()
    answering = {name for name, head in heads.items() if re.search(r"Answers report .*[^.]0\.\d", head, re.DOTALL)}
    assert answering == {f["recipe"] for f in figures if "iou" in f}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_step(path: Path, voc_root: Path, tmp_path: Path) -> None:
    small = tmp_path / path.name  # images of 64 px, two a batch; all else as it ships, but for weights to download
    small.write_text(re.sub(r"(?m)^size = \d+$", "size = 64", path.read_text(encoding="utf-8")))
    images = ["data.images=4", "data.val_images=2"] if path.stem == "quickstart" else ['data.train="train"']
    root = f"data.root={str(voc_root)!r}"
    recipe = read_recipe(small, REGISTRY, ["data.batch_size=2", 'model.weights="none"', root, *images])
    tried = try_recipe(recipe)
    assert tried["batch"] == "2 x 64 x 64"
    assert tried["first_loss"] > 0
    moved, _, of, *_ = tried["moved_by_one_step"].split()
    # Not all: timm's untrained residual blocks begin as identities, and batch norm over the two values of a 1x1 map
    # lets no gradient through.
    assert int(moved) > 0.7 * int(of)
