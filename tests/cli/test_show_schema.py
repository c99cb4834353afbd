"""`vocseg show` and `vocseg schema`, help, and how the command line ends with errors."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from vocseg.cli import COMMANDS
from vocseg.plugins import bundled

RECIPE = """\
[model]
name = "fcn_baseline"
[data]
name = "synthetic"
[train]
epochs = 3
"""


Vocseg = Callable[..., tuple[str, str]]


@pytest.fixture
def vocseg(run_vocseg: Vocseg, tmp_path: Path) -> Vocseg:
    (tmp_path / "x.toml").write_text(RECIPE)
    return run_vocseg


def test_show_prints_a_complete_recipe_with_defaults_marked(vocseg: Vocseg, tmp_path: Path) -> None:
    out, _ = vocseg("show", "x.toml", "--set", "train.ema=0.9", "--seed", "5")
    marked = {line.split(" = ")[0] for line in out.splitlines() if line.endswith("# default")}
    assert "batch_size" in marked
    assert not {"epochs", "ema"} & marked
    assert "seed = 5" in out.splitlines()
    resolved = tomllib.loads(out)
    assert resolved["train"]["ema"] == 0.9
    assert resolved["seed"] == 5
    assert resolved["optimizer"]["name"] == "adamw"
    (tmp_path / "again.toml").write_text(out)
    assert tomllib.loads(vocseg("show", "again.toml")[0]) == resolved
    assert json.loads(vocseg("show", "again.toml", "--json")[0]) == resolved


@pytest.mark.parametrize("name", sorted(path.stem for path in bundled("recipes").glob("*.toml")))
def test_show_takes_a_bundled_name(vocseg: Vocseg, name: str) -> None:
    given = tomllib.loads((bundled("recipes") / f"{name}.toml").read_text())
    read = json.loads(vocseg("show", name, "--set", "model.weights=none", "--json")[0])
    assert read["description"] == given["description"]
    assert read["train"]["epochs"] == given["train"]["epochs"]


def test_data_and_plugins_have_their_say(vocseg: Vocseg, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "mine.py").write_text("from vocseg import loss\n@loss\ndef mine(*, p: float = 2): 'Mine.'")
    flags = ["--plugins", "more", "--data", "here", "--set", "loss=[{name='mine'}]"]
    read = json.loads(vocseg("show", "x.toml", "--json", *flags)[0])
    assert read["loss"] == [{"name": "mine", "weight": 1.0, "p": 2.0}]
    assert read["data"]["root"] == str(tmp_path / "here")


def test_problems_are_lines_on_stderr_and_exit_2(vocseg: Vocseg) -> None:
    out, err = vocseg("show", "x.toml", "--set", "train.epocs=3", "--set", "sead=1", code=2)
    assert out == ""
    assert err.splitlines() == [
        "--set train.epocs=3: train.epocs: unknown key; did you mean 'epochs'?",
        "--set sead=1: sead: unknown key or table; did you mean 'seed'?",
    ]
    out, err = vocseg("show", "x.toml", "--set", "sead=1", "--json", code=2)
    assert json.loads(out) == {
        "error": ["--set sead=1: sead: unknown key or table; did you mean 'seed'?"],
        "exit_code": 2,
    }


def test_schema_prints_json_that_knows_the_plugins_beside(vocseg: Vocseg, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mine.py").write_text("from vocseg import loss\n@loss\ndef mine(*, p: float = 2): 'Mine.'")
    schema = json.loads(vocseg("schema")[0])
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$defs"]["loss_mine"]["properties"]["p"]["type"] == "number"
    assert {"model", "data", "train", "seed"} <= schema["properties"].keys()


def test_help_names_every_command_with_what_it_does(vocseg: Vocseg) -> None:
    out, _ = vocseg("--help")
    assert len(COMMANDS) >= 8
    assert all(f"  {name}" in out and summary in out for name, summary in COMMANDS.items())
    assert "Exit codes" in out
    assert vocseg("-h")[0] == out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(vocseg: Vocseg, name: str) -> None:
    out, _ = vocseg(name, "--help")
    assert out.startswith(f"Usage: vocseg {name} ")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["lsit"], "no command is named 'lsit'; did you mean 'list'?"),
        (["show"], "Missing argument 'RECIPE'"),
        (["show", "quickstrat"], "quickstrat: no such recipe, neither a file nor a bundled name; did you mean 'quick"),
        (["show", "x.toml", "--sed", "3"], "No such option"),
        (["show", "x.toml", "--seed", "-1"], "Invalid value for '--seed'"),
        (["show", "x.toml", "--seed", "x"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_remedy(vocseg: Vocseg, arguments: list[str], found: str) -> None:
    out, err = vocseg(*arguments, code=2)
    assert out == ""
    assert found in err


def test_debug_shows_where_an_error_came_from(vocseg: Vocseg) -> None:
    from vocseg.errors import UsageError

    with pytest.raises(UsageError):
        vocseg("--debug", "show", "x.toml", "--set", "sead=1")
    with pytest.raises(UsageError):
        vocseg("show", "x.toml", "--set", "sead=1", "--debug")


def test_what_nobody_foresaw_is_one_line_that_asks_for_a_report(
    vocseg: Vocseg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("vocseg.recipe.prepare.read_recipe", fail)
    _, err = vocseg("show", "x.toml", code=1)
    assert err == "internal error: ZeroDivisionError: by zero; please report it with the output of --debug\n"


def test_the_version_is_told(vocseg: Vocseg) -> None:
    from vocseg import __version__

    assert vocseg("--version")[0] == f"vocseg {__version__}\n"
