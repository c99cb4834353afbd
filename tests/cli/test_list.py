"""`vocseg list`: rows, one component, broken plugins; and that listing loads nothing heavy."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vocseg.plugins import PACKAGE
from vocseg.registry import KINDS

Vocseg = Callable[..., tuple[str, str]]


def write_plugin(folder: Path, name: str, text: str) -> None:
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / f"{name}.py").write_text(f"from vocseg import loss\n{text}")


# All components


def test_without_a_terminal_there_is_a_line_of_four_fields_a_component(run_vocseg: Vocseg) -> None:
    out, err = run_vocseg("list")
    rows = [line.split("\t") for line in out.splitlines()]
    assert len(rows) >= 32
    assert {len(row) for row in rows} == {4}
    assert list(dict.fromkeys(row[0] for row in rows)) == list(KINDS)
    assert ["loss", "dice"] in [row[:2] for row in rows]
    assert err == ""


def test_json_is_an_array_of_objects_with_kind_name_summary_and_source(run_vocseg: Vocseg) -> None:
    rows = json.loads(run_vocseg("list", "--json")[0])
    assert len(rows) >= 32
    assert all(list(row) == ["kind", "name", "summary", "source"] for row in rows)
    crop = next(row for row in rows if row["name"] == "crop")
    assert crop["kind"] == "augmentation"
    assert crop["summary"].startswith("Cuts out a window")
    file, _, line = crop["source"].rpartition(":")
    assert Path(file).read_text().splitlines()[int(line) - 1].startswith("def crop(")


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_is_listed_alone(run_vocseg: Vocseg, kind: str) -> None:
    out, _ = run_vocseg("list", kind)
    assert {line.split("\t")[0] for line in out.splitlines()} == {kind}
    rows = json.loads(run_vocseg("list", kind, "--json")[0])
    assert [row["name"] for row in rows] == [line.split("\t")[1] for line in out.splitlines()]


def test_recipes_are_listed_with_what_they_say_of_themselves(run_vocseg: Vocseg, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('description = "Mine."\n[model]\nname = "unet"\n[train]\nepochs = 1\n')
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "half.toml").write_text("[model\n")
    rows = [line.split("\t") for line in run_vocseg("list", "recipe")[0].splitlines()]
    assert ["recipe", "quickstart"] in [row[:2] for row in rows]
    assert ["recipe", "mine.toml", "Mine.", "mine.toml"] in rows
    assert [row[:2] for row in rows if row[0] != "recipe"] == [["broken", "half.toml"]]
    assert "pyproject.toml" not in {row[3] for row in rows}


def test_whatever_lies_beside_recipes_they_are_listed_a_line_each(run_vocseg: Vocseg, tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "deep.toml").write_text(f"a = {'[' * 10_000}{']' * 10_000}\n")
    tables = "[model]\n[train]\n"
    (tmp_path / "marked.toml").write_text(f'description = "Marked."\n{tables}', encoding="utf-8-sig")
    (tmp_path / "number.toml").write_text(f"description = 5\n{tables}")
    (tmp_path / "two.toml").write_text(f'description = """Two\n\tlines."""\n{tables}')
    rows = [line.split("\t") for line in run_vocseg("list", "recipe")[0].splitlines()]
    assert {len(row) for row in rows} == {4}
    own = {row[1]: row for row in rows if row[1].endswith(".toml")}
    assert own.keys() == {"deep.toml", "marked.toml", "number.toml", "two.toml"}
    assert own["deep.toml"][::2] == ["broken", "nested deeper than 64 levels"]
    assert own["marked.toml"][::2] == ["recipe", "Marked."]
    assert own["number.toml"][::2] == ["recipe", "5"]
    assert own["two.toml"][::2] == ["recipe", "Two lines."]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_link_to_nowhere_as_an_editor_leaves_it_is_no_recipe(run_vocseg: Vocseg, tmp_path: Path) -> None:
    (tmp_path / ".#mine.toml").symlink_to("user@host.1234")
    assert "mine.toml" not in run_vocseg("list", "recipe")[0]


def test_plugins_beside_the_working_directory_and_of_the_flag_are_listed_with_a_short_source(
    run_vocseg: Vocseg, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    write_plugin(tmp_path, "one", "@loss\ndef one(): 'One.'")
    write_plugin(tmp_path / "more", "two", "@loss\ndef two(): 'Two.'")
    out, _ = run_vocseg("list", "loss", "--plugins", "more/plugins")
    assert f"loss\tone\tOne.\t{os.path.join('plugins', 'one.py')}:3\n" in out
    assert f"loss\ttwo\tTwo.\t{os.path.join('more', 'plugins', 'two.py')}:3\n" in out


def test_a_broken_plugin_is_a_row_with_its_reason(run_vocseg: Vocseg, tmp_path: Path) -> None:
    write_plugin(tmp_path, "bad", "def f(:")
    out, err = run_vocseg("list")
    assert out.endswith(f"broken\tbad.py\tline 2: not Python: invalid syntax\t{os.path.join('plugins', 'bad.py')}\n")
    assert "loss\tdice" in out
    assert err == ""
    row = json.loads(run_vocseg("list", "--json")[0])[-1]
    assert row == {
        "kind": "broken",
        "name": "bad.py",
        "summary": "line 2: not Python: invalid syntax",
        "source": str(tmp_path / "plugins" / "bad.py"),
    }


def test_load_imports_every_plugin_and_shows_which_fail(run_vocseg: Vocseg, tmp_path: Path) -> None:
    write_plugin(tmp_path, "loud", "print('imported')\n@loss\ndef loud(): 'Loud.'")
    write_plugin(tmp_path, "gone", "import no_such_package\n@loss\ndef gone(): 'Gone.'")
    assert "imported" not in "".join(run_vocseg("list", "loss"))
    out, err = run_vocseg("list", "loss", "--load", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert err == "imported\n"
    assert rows["loud"]["kind"] == "loss"
    assert rows["gone"]["kind"] == "broken"
    assert rows["gone"]["summary"] == (
        "loss 'gone' cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"
    )


def test_one_name_twice_is_a_row_that_names_both_places(run_vocseg: Vocseg, tmp_path: Path) -> None:
    write_plugin(tmp_path, "mine", "@loss\ndef dice(): 'Mine.'")
    out, _ = run_vocseg("list", "loss")
    kind, name, summary, source = next(row for line in out.splitlines() if (row := line.split("\t"))[1] == "dice")
    assert (kind, name, source) == ("broken", "dice", f"plugins{os.sep}mine.py:3")
    assert "losses.py:" in summary
    assert f"and at plugins{os.sep}mine.py:3; rename or delete all but one" in summary
    assert "cross_entropy" in out
    _, err = run_vocseg("list", "dice", code=2)
    assert err.strip() == summary


# One component


def test_one_component_is_shown_with_parameters_bounds_text_and_file(run_vocseg: Vocseg) -> None:
    out, _ = run_vocseg("list", "crop")
    assert "crop  augmentation  [[augmentation]]" in out
    assert "Cuts out a window at a random position" in out
    assert "required" in out
    assert "whole number from 1 to 8192" in out
    assert "side of a square, or [height, width]." in out
    assert "number from 0 to 1" in out
    assert "augmentations.py:" in out
    assert "Args:" not in out
    assert "arXiv:1412.6980" in run_vocseg("list", "adam")[0]
    assert "Every [optimizer] also takes encoder_lr." in run_vocseg("list", "adam")[0]


def test_one_component_as_json_has_its_parameters(run_vocseg: Vocseg) -> None:
    (crop,) = json.loads(run_vocseg("list", "crop", "--json")[0])
    assert (crop["kind"], crop["name"]) == ("augmentation", "crop")
    assert "smaller of the two" in crop["doc"]
    size, foreground = crop["parameters"]
    assert size["required"]
    assert size["description"] == "side of a square, or [height, width]."
    assert (foreground["default"], foreground["required"], foreground["values"]) == (0.0, False, "number from 0 to 1")


def test_components_of_one_name_and_two_kinds_are_both_shown(run_vocseg: Vocseg, tmp_path: Path) -> None:
    write_plugin(tmp_path, "mine", "@loss\ndef crop(): 'Mine.'")
    assert [row["kind"] for row in json.loads(run_vocseg("list", "crop", "--json")[0])] == ["loss", "augmentation"]


def test_every_component_can_be_shown(run_vocseg: Vocseg) -> None:
    names = {row["name"] for row in json.loads(run_vocseg("list", "--json")[0])}
    assert len(names) >= 31
    for name in names:
        assert run_vocseg("list", name)[0].startswith(f"{name}  ")


def test_an_unknown_name_is_an_error_with_the_nearest_and_what_could_not_be_read(
    run_vocseg: Vocseg, tmp_path: Path
) -> None:
    assert run_vocseg("list", "corp", code=2)[1] == "no kind or component is named 'corp'; did you mean 'crop'?\n"
    write_plugin(tmp_path, "bad", "def f(:")
    assert "note: plugins/bad.py could not be read: line 2" in run_vocseg("list", "corp", code=2)[1]
    assert run_vocseg("list", "--plugins", "nowhere", code=2)[1] == "--plugins nowhere: no such folder\n"


# On a terminal


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_kinds_are_headings_and_no_line_is_wider_than_it(
    tmp_path: Path, width: int, on_terminal: Callable[..., str]
) -> None:
    write_plugin(tmp_path, "mine", "@loss\ndef mine(): 'Mine [bold]or not[/bold].'")
    write_plugin(tmp_path, "bad", "def f(:")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(tmp_path, width, "list")).replace("\r", "")
    lines = plain.splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line in (*KINDS, "broken")] == [*KINDS, "broken"]
    assert "Mine [bold]or not[/bold].  plugins/mine.py:3" in plain
    assert "line 2: not Python: invalid syntax  plugins/bad.py" in plain
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(tmp_path, width, "list", "crop"))
    assert "Every [[augmentation]]" not in shown
    assert max(map(len, shown.replace("\r", "").splitlines())) <= width


# What is imported


def imported(cwd: Path, *arguments: str) -> set[str]:
    """The packages that are in memory after a command."""
    script = (
        "import sys\nfrom vocseg.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=True)
    return set(done.stderr.split())


HEAVY = {"torch", "numpy", "cv2", "PIL", "timm", "matplotlib", "torchvision", "segmentation_models_pytorch"}


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--help"], HEAVY | {"pydantic", "rich"}),
        (["list", "--help"], HEAVY | {"pydantic", "rich"}),
        (["list"], HEAVY | {"pydantic", "rich"}),
        (["list", "--json"], HEAVY | {"pydantic", "rich"}),
        (["list", "crop"], HEAVY),
        (["show", "quickstart"], HEAVY),
        (["schema"], HEAVY),
    ],
)
def test_listing_help_and_recipes_import_nothing_heavy(tmp_path: Path, arguments: list[str], refused: set[str]) -> None:
    found = imported(tmp_path, *arguments)
    assert "vocseg" in found
    assert "click" in found
    assert found & refused == set()


def test_importing_vocseg_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys, vocseg; assert vocseg.loss.__name__ == 'loss'; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "vocseg.registry" in done.stdout
    assert set(done.stdout.split()) & (HEAVY | {"pydantic", "rich", "click"}) == set()


def test_a_pipe_that_cannot_take_a_letter_gets_its_number(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "vocseg", "list", "adamw"]
    done = subprocess.run(command, capture_output=True, encoding="latin-1", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u2265 0 and < 1" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = f"{sys.executable} -m vocseg list | head -1"
    head = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (head.returncode, head.stderr) == (0, "")
    assert head.stdout.startswith("architecture\t")
