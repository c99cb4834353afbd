"""The house: which room may import which."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from vocseg.plugins import PACKAGE, bundled

FILES = {
    ".".join(("vocseg", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "_bundled" not in path.parts
}
FLOORS = ("errors", "registry", "signature", "plugins", "recipe")
COMPOSITION = ("build", "lr", "run", "score", "trial")


def imports(path: Path, *, when_loaded: bool = False) -> set[str]:
    """The modules that a file imports, ours by their full names; `when_loaded`: leaving out those within functions."""

    def statements(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            only_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not only_types and not (when_loaded and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield child
                yield from statements(child)

    found: set[str] = set()
    for node in statements(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in inner}
    return found


def rooms(path: Path) -> set[str]:
    """The rooms of vocseg that a file imports from: `errors`, `recipe`, `data`, …"""
    return {name.split(".")[1] for name in imports(path) if name.startswith("vocseg.")}


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def in_rooms(*names: str) -> list[str]:
    found = [module for module in FILES if room(module) in names]
    assert {room(module) for module in found} == set(names)
    return found


def test_each_floor_rests_on_those_below_it() -> None:
    assert len(FILES) >= 70
    for i, floor in enumerate(FLOORS):
        for module in in_rooms(floor):
            assert rooms(FILES[module]) <= set(FLOORS[: i + (floor == "recipe")]), module
    assert rooms(FILES["vocseg"]) == {"registry"}


def test_what_is_composed_knows_nothing_of_who_composes_it() -> None:
    for module in in_rooms("components", "data", "evaluate", "train", "runs", "report"):
        assert not rooms(FILES[module]) & {*COMPOSITION, "cli"}, module


def test_only_the_composition_root_the_run_folder_and_the_command_line_see_a_recipe() -> None:
    seeing = {module for module, path in FILES.items() if "recipe" in rooms(path)}
    assert {module for module in seeing if room(module) not in ("recipe", "cli", *COMPOSITION)} <= {
        "vocseg.runs.folder"
    }


@pytest.mark.parametrize("package", ["rich", "click"])
def test_only_the_command_line_talks_to_a_terminal(package: str) -> None:
    using = {m for m, path in FILES.items() if any(name.split(".")[0] == package for name in imports(path))}
    assert using
    assert {room(module) for module in using} == {"cli"}


def test_no_module_needs_itself_to_be_loaded() -> None:
    needs = {module: imports(path, when_loaded=True) & FILES.keys() for module, path in FILES.items()}
    assert len(list(TopologicalSorter(needs).static_order())) == len(FILES)  # raises CycleError, naming the circle


def test_plugins_import_neither_each_other_nor_more_of_vocseg_than_is_promised() -> None:
    files = list(bundled("plugins").glob("*.py"))
    assert len(files) >= 3
    for path in files:
        assert rooms(path) <= {"errors"}, path
        assert not imports(path) & {f"plugins.{other.stem}" for other in files}, path
