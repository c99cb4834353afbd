"""What the command line and the environment change in a recipe, and paths made absolute."""

import os
from pathlib import Path

import pytest

from vocseg.errors import DataError, UsageError
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.reader import Recipe
from vocseg.recipe.writer import resolved_lines

RECIPE = """\
model = {name = "fcn_baseline"}
data = {name = "voc"}
train = {epochs = 1}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "x.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("VOCSEG_DATA", raising=False)


def load(*overrides: str, data: str | None = None, seed: int | None = None) -> Recipe:
    return load_recipe("../recipes/x.toml", overrides=overrides, data=Path(data) if data else None, seed=seed)[0]


def root(recipe: Recipe) -> str:
    assert recipe.resolved["data"]["root"] == recipe.data.settings.root
    return recipe.data.settings.root


def test_the_flag_comes_before_set_before_the_environment_before_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert root(load()) == str(tmp_path / "here" / "data")
    (tmp_path / "recipes" / "x.toml").write_text(RECIPE.replace('"voc"', '"voc", root = "/recipe"'))
    assert root(load()) == "/recipe"
    monkeypatch.setenv("VOCSEG_DATA", "")
    assert root(load()) == "/recipe"
    monkeypatch.setenv("VOCSEG_DATA", "/environment")
    assert root(load()) == "/environment"
    assert root(load('data.root="/set"')) == "/set"
    assert root(load('data.root="/set"', data="/flag")) == "/flag"


def test_the_datas_folder_is_absolute_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root(load(data="some/data")) == str(tmp_path / "here" / "some" / "data")
    monkeypatch.setenv("VOCSEG_DATA", "~/data")
    assert root(load()) == os.path.expanduser("~/data")


def test_a_relative_path_is_from_the_working_directory_else_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipes" / "data").mkdir()
    (tmp_path / "recipes" / "net.pth").touch()
    recipe = load("model.weights=net.pth")
    beside = tmp_path / "here" / ".." / "recipes"  # the recipe's folder as it was given
    assert root(recipe) == str(beside / "data")
    assert recipe.model.settings.weights == str(beside / "net.pth")
    assert recipe.resolved["model"]["weights"] == recipe.model.settings.weights
    (tmp_path / "here" / "data").mkdir()
    (tmp_path / "here" / "net.pth").touch()
    recipe = load("model.weights=net.pth")
    assert root(recipe) == str(tmp_path / "here" / "data")
    assert recipe.model.settings.weights == str(tmp_path / "here" / "net.pth")


def test_a_data_set_without_files_keeps_its_root_as_it_is() -> None:
    assert root(load("data.name=synthetic")) == "data"


def test_the_seed_of_the_flag_is_the_runs(tmp_path: Path) -> None:
    assert load().seed == 0
    assert load("seed=3", seed=4).seed == 4
    assert load(seed=4).resolved["seed"] == 4


def test_only_what_was_given_is_marked_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def defaults(recipe: Recipe) -> set[str]:
        return {line.split(" = ")[0] for line, default in resolved_lines(recipe) if default}

    assert {"root", "seed", "weights"} <= defaults(load())
    assert "seed" not in defaults(load(seed=0))
    assert "root" not in defaults(load(data="x"))
    monkeypatch.setenv("VOCSEG_DATA", "x")
    assert "root" not in defaults(load())


def test_problems_are_those_of_the_recipe_and_not_of_the_flags(tmp_path: Path) -> None:
    (tmp_path / "recipes" / "x.toml").write_text("")
    with pytest.raises(UsageError) as caught:
        load(data="/flag", seed=3)
    assert [p.message.split(";")[0] for p in caught.value.problems] == [
        "model: missing",
        "data: missing",
        "train: missing",
    ]
    assert {p.where for p in caught.value.problems} == {"../recipes/x.toml"}


def test_plugins_are_looked_for_from_the_recipe_and_for_a_bundled_one_from_the_working_directory(
    tmp_path: Path,
) -> None:
    for folder in ("recipes", "here"):
        (tmp_path / folder / "plugins").mkdir()
        (tmp_path / folder / "plugins" / "mine.py").write_text(
            f"from vocseg import loss\n@loss\ndef from_{folder}(): ..."
        )
    _, registry = load_recipe("../recipes/x.toml")
    assert registry.find("loss", "from_recipes")
    assert not registry.find("loss", "from_here")
    recipe, registry = load_recipe("quickstart", overrides=["loss=[{name='from_here'}]"])
    assert [part.name for part in recipe.losses] == ["from_here"]
    assert not registry.find("loss", "from_recipes")
    _, registry = load_recipe("quickstart", plugins=tmp_path / "recipes" / "plugins")
    assert registry.find("loss", "from_here")
    assert registry.find("loss", "from_recipes")


def wrong(*overrides: str, data: str | None = None) -> tuple[type, list[str]]:
    """What is said of the recipe when it is to be run."""
    with pytest.raises((DataError, UsageError)) as caught:
        load_recipe("../recipes/x.toml", overrides=overrides, data=Path(data) if data else None, to_run=True)
    return type(caught.value), [str(problem) for problem in caught.value.problems]


def test_before_it_is_run_missing_data_is_an_error_of_the_data_said_once_for_both_splits(tmp_path: Path) -> None:
    kind, (said,) = wrong()
    assert kind is DataError
    assert said.startswith(f"{tmp_path / 'here' / 'data' / 'VOCdevkit' / 'VOC2012'}: no such folder; ")
    kind, (said,) = wrong(data="/flag")
    assert said.startswith("/flag/VOCdevkit/VOC2012: no such folder")


def test_before_it_is_run_lists_and_files_are_looked_for_in_each_split(voc_root: Path) -> None:
    kind, said = wrong("data.train=nobody", "data.val=nowhere", data=str(voc_root))
    assert kind is DataError
    assert [line.partition(": ")[2].partition(";")[0] for line in said] == ["no such split"] * 2
    assert ["nobody.txt" in said[0], "nowhere.txt" in said[1]] == [True, True]
    load_recipe("../recipes/x.toml", data=voc_root, to_run=True)


def test_before_it_is_run_all_is_said_at_once_the_recipes_own_first() -> None:
    scaled = 'augmentation=[{name="random_scale", scale=[2.0, 0.5]}, {name="crop", size=0}]'
    kind, said = wrong("train.epocs=1", scaled)
    assert kind is UsageError
    assert len(said) == 4
    assert said[0].startswith("--set train.epocs=1: train.epocs: unknown key")
    assert "augmentation.1.size: expected" in said[1]
    assert said[2].startswith("random_scale.scale: expected [least, largest], found [2, 0.5]")
    assert "VOC2012: no such folder" in said[3]


def test_what_fails_in_a_plugin_that_is_tried_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    plugin = tmp_path / "plugins" / "mine.py"
    plugin.write_text("from vocseg import augmentation\n@augmentation\ndef mine(): 1 / 0\n")
    kind, said = wrong('augmentation=[{name="mine"}]')
    assert kind is UsageError
    assert said[0].startswith(f"{plugin}:3: augmentation 'mine' cannot be built with no parameters: ZeroDivisionError")
    assert "no such folder" in said[1]
