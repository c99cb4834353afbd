"""Problems, exit codes and the nearest word."""

from pathlib import Path

import pytest

from vocseg.errors import (
    DataError,
    EnvironmentFault,
    Interrupted,
    Problem,
    TrainingError,
    UsageError,
    did_you_mean,
    nearest,
    shown_path,
)


def test_an_error_has_one_line_a_problem() -> None:
    error = UsageError(Problem("recipes/x.toml:3", "seed: expected a whole number"), "no such flag")
    assert str(error) == "recipes/x.toml:3: seed: expected a whole number\nno such flag"
    assert error.problems == (Problem("recipes/x.toml:3", "seed: expected a whole number"), Problem("", "no such flag"))


def test_exit_codes_are_those_of_the_tree() -> None:
    kinds = (UsageError, DataError, EnvironmentFault, TrainingError)
    assert [kind("x").exit_code for kind in kinds] == [2, 3, 4, 5]
    assert [Interrupted("x", number).exit_code for number in (2, 15)] == [130, 143]


def test_the_nearest_word_is_found_whatever_the_case() -> None:
    assert nearest("epocs", ["epochs", "ema"]) == "epochs"
    assert nearest("FPN", ["fpn", "pspnet"]) == "fpn"
    assert nearest("unet", ["Unet", "MAnet"]) == "Unet"
    assert nearest("banana", ["Unet", "MAnet"]) is None


def test_a_remedy_names_the_nearest_else_all_else_nothing() -> None:
    assert did_you_mean("epocs", ["ema", "epochs"]) == "; did you mean 'epochs'?"
    assert did_you_mean("zzz", ["epochs", "ema"]) == "; known: ema, epochs"
    assert did_you_mean("zzz", [f"word{i}" for i in range(31)]) == ""
    assert did_you_mean("zzz", []) == ""


def test_a_path_is_shown_relative_where_it_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "recipes" / "x.toml") == "recipes/x.toml"
    assert shown_path("recipes/x.toml") == "recipes/x.toml"
    assert shown_path(tmp_path.parent / "x.toml") == str(tmp_path.parent / "x.toml")
