"""Marks, the registry, and how a component is loaded and built."""

from types import SimpleNamespace
from typing import Any

import pytest

import vocseg
from vocseg.errors import UsageError
from vocseg.recipe.schema import PLACES
from vocseg.registry import HANDED_OVER, KINDS, MARK, RESERVED, BrokenPlugin, Component, Mark, Registry


def component(name: str, kind: str = "loss", file: str = "a.py", line: int = 1, **more: Any) -> Component:
    module = more.pop("module", SimpleNamespace())
    fields = {"doc": "", "origin": "x", "handed_over": (), "parameters": (), "options": {}} | more
    importer = module if callable(module) else lambda: module
    return Component(kind=kind, name=name, file=file, line=line, importer=importer, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_tags_the_function_and_changes_nothing_else(kind: str) -> None:
    def function() -> int:
        return 3

    for marked in (getattr(vocseg, kind)(function), getattr(vocseg, kind)()(function)):
        assert marked is function
        assert marked() == 3
        assert getattr(marked, MARK).kind == kind


def test_an_architecture_keeps_the_name_of_its_encoder() -> None:
    @vocseg.architecture(backbone="encoder")
    def net(num_classes: int) -> None: ...

    assert getattr(net, MARK) == Mark("architecture", {"backbone": "encoder"})


def test_the_reserved_names_are_the_keys_that_the_schema_gives_each_table() -> None:
    assert len(PLACES) == len(KINDS) == 7
    assert {place.kind: set(place.core.model_fields) for place in PLACES} == {k: set(v) for k, v in RESERVED.items()}
    assert HANDED_OVER.keys() == RESERVED.keys()


def test_components_are_listed_by_kind_then_name() -> None:
    found = [component("b"), component("z", "architecture"), component("a"), component("sgd", "optimizer")]
    registry = Registry(found)
    assert [c.name for c in registry] == ["z", "a", "b", "sgd"]
    assert registry.names("loss") == ["a", "b"]
    assert registry.names("dataset") == []


def test_one_name_may_be_of_two_kinds() -> None:
    registry = Registry([component("none", "initializer"), component("none", "augmentation")])
    assert registry.get("initializer", "none").kind == "initializer"


def test_a_name_that_two_components_of_a_kind_have_is_neithers_and_the_error_names_both_places() -> None:
    twice = [component("dice", file="a.py", line=3), component("dice", file="b.py", line=7), component("focal")]
    registry = Registry([*twice, component("dice", "initializer")])
    assert registry.find("loss", "dice") is None
    assert [c.name for c in registry] == ["focal", "dice"]
    assert registry.clashes == [twice[1]]
    with pytest.raises(UsageError) as caught:
        registry.get("loss", "dice")
    assert str(caught.value) == "loss 'dice' is defined at a.py:3 and at b.py:7; rename or delete all but one"


def test_a_missing_component_names_the_nearest_and_the_plugins_that_could_not_be_read() -> None:
    registry = Registry([component("focal")], [BrokenPlugin("plugins/new.py", "line 2: not Python: invalid syntax")])
    assert registry.find("loss", "focl") is None
    with pytest.raises(UsageError) as caught:
        registry.get("loss", "focl")
    assert str(caught.value) == (
        "no loss is named 'focl'; did you mean 'focal'? "
        "(note: plugins/new.py could not be read: line 2: not Python: invalid syntax)"
    )


def test_a_component_gets_what_it_asks_for_by_name_and_its_parameters_by_keyword() -> None:
    @vocseg.schedule
    def given(lr: float, steps: int, *, power: float) -> tuple:
        return lr, steps, power

    made = component("given", "schedule", handed_over=("lr", "steps"), module=SimpleNamespace(given=given))
    assert made.build({"steps": 100, "steps_per_epoch": 10, "lr": 0.1}, {"power": 2.0}) == (0.1, 100, 2.0)


def fails(error: BaseException) -> Any:
    def importer() -> None:
        raise error

    return importer


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (fails(ImportError("no module\n named 'foo'")), "cannot be loaded: ImportError: no module named 'foo'"),
        (fails(SystemExit(3)), "cannot be loaded: SystemExit: 3"),
        (SimpleNamespace(), "that name is no marked function"),
        (SimpleNamespace(dice=len), "that name is no marked function"),
        (SimpleNamespace(dice=vocseg.dataset(lambda: None)), "that name is a function marked dataset"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_with_its_place(module: Any, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        component("dice", module=module).load()
    assert str(caught.value).startswith("a.py:1: loss 'dice' ")
    assert reason in str(caught.value)


def test_ctrl_c_while_a_plugin_is_imported_is_no_fault_of_the_plugin() -> None:
    with pytest.raises(KeyboardInterrupt):
        component("dice", module=fails(KeyboardInterrupt())).load()
