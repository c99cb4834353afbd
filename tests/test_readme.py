"""What the README shows works as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vocseg.data.synthetic import synthetic
from vocseg.errors import UsageError
from vocseg.plugins import bundled
from vocseg.recipe.prepare import load_recipe
from vocseg.run import start
from vocseg.score import predict
from vocseg.trial import try_recipe

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(label: str) -> str:
    """The code block behind `<!-- label -->`."""
    found = re.search(rf"<!-- {label} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, label
    return found[1]


def test_both_commands_are_one_line_that_a_shell_takes():
    assert block("quickstart").count("\n") == block("tests").count("\n") == 1
    assert block("quickstart").strip().endswith("vocseg run recipes/quickstart.toml")
    assert block("tests").strip().endswith("pytest -n auto")


def test_the_newcomers_path_leads_from_a_folder_of_images_to_predictions(tmp_path):
    drawn = synthetic("train", size=64, images=10)
    for folder in ("images", "masks"):
        (tmp_path / "mydata" / folder).mkdir(parents=True)
    for index in range(10):
        image, mask = drawn.read(index)
        mask = np.where(mask == 255, 255, np.minimum(mask, 2)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "mydata" / "images" / f"barn_{index:02}.jpg")
        Image.fromarray(mask).save(tmp_path / "mydata" / "masks" / f"barn_{index:02}.png")
    (tmp_path / "barns.toml").write_text(block("own recipe"))
    small = ("train.epochs=1", "augmentation.1.size=64")
    recipe, _ = load_recipe(str(tmp_path / "barns.toml"), overrides=small)
    assert try_recipe(recipe)["training_images"] == 8
    *_, finished = start(recipe, out=tmp_path / "runs", device="cpu")
    assert set(finished.result["iou"]) == {"background", "barn", "tree"}
    done = list(predict(finished.run, [tmp_path / "mydata" / "images"], device="cpu"))
    assert len(done) == 10
    assert all(p.mask.parent == finished.run / "predictions" for p in done)


def test_the_plugin_trains_from_the_file_and_recipe_that_are_shown(tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "blocknet.py").write_text(block("plugin"))
    (tmp_path / "first.toml").write_text(block("plugin recipe"))
    recipe, registry = load_recipe(str(tmp_path / "first.toml"), overrides=["data.images=16", "data.val_images=2"])
    assert registry.get("architecture", "blocknet").parameters[0].name == "width"
    *_, finished = start(recipe, out=tmp_path / "runs", device="cpu")
    assert finished.result["epochs"] == 3
    with pytest.raises(UsageError, match="from 4 to 512, found 2"):
        load_recipe(str(tmp_path / "first.toml"), overrides=["model.width=2"])


def test_the_table_of_recipes_names_those_that_are_shipped():
    shipped = {path.stem for path in bundled("recipes").glob("*.toml")}
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == shipped
