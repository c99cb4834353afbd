"""docs/results.md is what its command makes of the kept runs, and docs/reliability.md names tests that there are."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from vocseg.plugins import bundled, import_file
from vocseg.recipe.prepare import load_recipe
from vocseg.run import start

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def results():
    return import_file(DOCS / "results.py")


def test_the_page_is_what_its_command_writes(results):
    assert (DOCS / "results.md").read_text(encoding="utf-8") == results.page()


def test_every_kept_run_is_on_the_page_and_every_recipe_on_voc_was_run(results):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    runs = results.entries()
    assert len(runs) >= 29
    assert all(f"| {results.title(run)} | {run['miou']:.3f} |" in page for run in runs)
    shipped = {path.stem for path in bundled("recipes").glob("*.toml")}
    assert shipped - {run["recipe"] for run in runs} == {"quickstart"}
    assert {run["images"] for run in runs} == {213}
    assert {run["train_images"] for run in runs} == {209}


def test_what_the_reports_printed_belongs_to_recipes_that_ship():
    figures = tomllib.loads((DOCS / "published.toml").read_text(encoding="utf-8"))["figure"]
    assert len(figures) >= 25
    assert {figure["recipe"] for figure in figures} <= {path.stem for path in bundled("recipes").glob("*.toml")}


def test_a_run_is_kept_with_what_it_changed_in_its_recipe(results, tmp_path, monkeypatch):
    small = ["train.epochs=1", "data.images=4", "data.val_images=2", "augmentation.0.size=32", "data.batch_size=2"]
    recipe, _ = load_recipe("quickstart", overrides=small)
    *_, finished = start(recipe, out=tmp_path / "runs", device="cpu")
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    results.keep(finished.run)
    (entry,) = results.entries()
    assert entry["miou"] == json.loads((finished.run / "result.json").read_text())["miou"]
    changed = dict(change.split("=", 1) for change in entry["changed"])
    assert changed["train.epochs"] == "1"
    assert changed["data.images"] == "4"
    assert json.loads(changed["augmentation"])[0]["size"] == 32
    assert str(tmp_path) not in json.dumps(entry)


def test_every_promise_stands_beside_tests_that_there_are():
    rows = [
        line for line in (DOCS / "reliability.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    promises = [row for row in rows if row != "| promise | tests |"]
    assert len(promises) >= 25
    tests = DOCS.parent / "tests"
    for promise in promises:
        named = re.findall(r"`([\w/]*\.py)?::(test_\w+)`", promise)
        assert named, promise
        file = ""
        for place, test in named:
            file = place or file  # a name without a file is of the file before
            functions = [node.name for node in ast.parse((tests / file).read_text()).body if hasattr(node, "name")]
            assert test in functions, f"{file}::{test}"
