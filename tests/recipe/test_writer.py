"""The resolved recipe as TOML, and the JSON schema."""

import copy
import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
from annotated_types import MultipleOf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vocseg.plugins import bundled, discover
from vocseg.recipe.reader import Recipe, read_recipe
from vocseg.recipe.schema import PLACES
from vocseg.recipe.toml import without_foreign, write_value
from vocseg.recipe.writer import json_schema, resolved_lines, write_resolved
from vocseg.registry import Component

REGISTRY = discover()
SCHEMA = json_schema(REGISTRY)
BASE: dict[str, Any] = {
    "model": {"name": "fcn_baseline"},
    "data": {"name": "synthetic"},
    "train": {"epochs": 3},
}


def read(path: Path, data: dict[str, Any] | str) -> Recipe:
    text = data if isinstance(data, str) else "".join(f"{key} = {write_value(value)}\n" for key, value in data.items())
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, REGISTRY)


def value_of(annotation: Any) -> st.SearchStrategy[Any]:
    """What Hypothesis makes of a type; multiples it does not know, and their bounds are multiples themselves."""
    marks = getattr(annotation, "__metadata__", ())
    steps = [mark.multiple_of for mark in marks if isinstance(mark, MultipleOf)]
    if not steps:
        return st.from_type(annotation)
    (step,) = steps
    rest = Annotated[annotation.__origin__, *(mark for mark in marks if not isinstance(mark, MultipleOf))]
    return st.from_type(rest).map(lambda value: value // step * step)


def values(component: Component) -> st.SearchStrategy[dict[str, Any]]:
    """Recipe values for a component's parameters, any of which may be left out if it has a default."""
    required = {p.name: value_of(p.annotation) for p in component.parameters if p.required}
    optional = {p.name: value_of(p.annotation) for p in component.parameters if not p.required}
    drawn = st.fixed_dictionaries(required, optional=optional)
    named = drawn.map(lambda params: {"name": component.name, **{k: v for k, v in params.items() if v is not None}})
    return named.filter(lambda table: not without_foreign(json.loads(json.dumps(table)))[1])


def component_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from([c for c in REGISTRY if c.kind == kind]).flatmap(values)


recipes = st.fixed_dictionaries(
    {
        "model": component_of("architecture"),
        "data": component_of("dataset"),
        "train": st.fixed_dictionaries(
            {"epochs": st.integers(100, 1000)},
            optional={"minutes": st.floats(0.5, 90), "clip": st.integers(1, 9), "ema": st.floats(0, 0.999)},
        ),
    },
    optional={
        "description": st.text(st.characters(codec="utf-8", exclude_characters="\0")),
        "augmentation": st.lists(component_of("augmentation"), max_size=3),
        "loss": st.lists(component_of("loss"), min_size=1, max_size=3),
        "optimizer": component_of("optimizer"),
        "schedule": component_of("schedule"),
        "initializer": component_of("initializer"),
        "early_stopping": st.just({"patience": 3}),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(recipes)
def test_what_is_given_is_what_is_resolved_and_the_resolved_form_resolves_to_itself(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("recipe", numbered=True)
    recipe = read(folder / "x.toml", data)
    plain = json.loads(json.dumps(data))
    for table, value in plain.items():
        found = recipe.resolved[table]
        for given_value, resolved in zip(*([v] if not isinstance(v, list) else v for v in (value, found)), strict=True):
            if isinstance(given_value, dict):
                assert given_value == {key: resolved[key] for key in given_value}
            else:
                assert given_value == resolved
    again = read(folder / "x.toml", write_resolved(recipe))
    assert again.resolved == recipe.resolved
    assert write_resolved(again) == write_resolved(recipe)
    for first, second in ((recipe.model, again.model), (recipe.data, again.data), (recipe.optimizer, again.optimizer)):
        assert (first.component, first.settings, first.params) == (second.component, second.settings, second.params)
    assert [part.params for part in again.augmentations] == [part.params for part in recipe.augmentations]
    assert (again.train, again.early_stopping) == (recipe.train, recipe.early_stopping)
    jsonschema.validate(plain, SCHEMA)


def test_the_resolved_form_is_a_recipe_of_one_line_a_value_with_defaults_marked(tmp_path: Path) -> None:
    data = {**BASE, "description": 'Two\nlines, "quoted".', "augmentation": [{"name": "crop", "size": [9, 8]}]}
    recipe = read(tmp_path / "x.toml", data)
    lines = list(resolved_lines(recipe))
    assert lines[:7] == [
        ('description = "Two\\nlines, \\"quoted\\"."', False),
        ("seed = 0", True),
        ("", False),
        ("[model]", False),
        ('name = "fcn_baseline"', False),
        ('weights = "none"', True),
        ('norm_order = "relu_bn"', True),
    ]
    assert ("[[augmentation]]", False) in lines
    assert ("size = [9, 8]", False) in lines
    assert ("foreground = 0.0", True) in lines
    assert ("epochs = 3", False) in lines
    assert not any("\n" in line for line, _ in lines)
    assert tomllib.loads(write_resolved(recipe)) == recipe.resolved


def test_no_augmentation_stays_no_augmentation(tmp_path: Path) -> None:
    recipe = read(tmp_path / "x.toml", {**BASE, "augmentation": []})
    assert ("augmentation = []", False) in list(resolved_lines(recipe))
    assert read(tmp_path / "x.toml", write_resolved(recipe)).resolved["augmentation"] == []


# The JSON schema


def test_the_schema_is_a_schema_and_knows_every_component() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    json.dumps(SCHEMA, allow_nan=False)
    expected = {f"{place.table}_{name}" for place in PLACES for name in REGISTRY.names(place.kind)}
    assert len(expected) >= 32
    assert expected <= SCHEMA["$defs"].keys()


def test_the_schema_tells_what_each_key_means_and_what_it_is_without_it() -> None:
    crop = SCHEMA["$defs"]["augmentation_crop"]
    assert crop["properties"]["name"]["const"] == "crop"
    assert crop["properties"]["size"]["description"] == "side of a square, or [height, width]."
    assert crop["properties"]["foreground"]["default"] == 0.0
    assert crop["properties"]["foreground"]["maximum"] == 1
    assert set(crop["required"]) == {"name", "size"}
    assert SCHEMA["required"] == ["model", "data", "train"]


def test_the_schema_accepts_every_bundled_recipe() -> None:
    paths = list(bundled("recipes").glob("*.toml"))
    assert len(paths) >= 3
    for path in paths:
        jsonschema.validate(tomllib.loads(path.read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("sead", 3),
        ("seed", -1),
        ("seed", "3"),
        ("model", {"name": "fcn_baselin"}),
        ("model", {"name": "fcn_baseline", "weight": "none"}),
        ("model", {"norm_order": "relu_bn"}),
        ("data", {"name": "synthetic", "batch_size": 0}),
        ("augmentation", {"name": "crop", "size": 96}),
        ("augmentation", [{"name": "crop"}]),
        ("augmentation", [{"name": "crop", "size": 96, "p": 1}]),
        ("optimizer", {"name": "adam", "betas": [0.9]}),
        ("train", {"epocs": 3}),
        ("train", {}),
        ("early_stopping", {"metric": "iou"}),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(table: str, value: object) -> None:
    data = copy.deepcopy(BASE)
    jsonschema.validate(data, SCHEMA)
    data[table] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_numbers_survive_to_the_last_digit(tmp_path: Path) -> None:
    lr = math.nextafter(0.1, 1)
    recipe = read(tmp_path / "x.toml", {**BASE, "optimizer": {"name": "adam", "lr": lr}})
    assert read(tmp_path / "x.toml", write_resolved(recipe)).optimizer.params["lr"] == lr
