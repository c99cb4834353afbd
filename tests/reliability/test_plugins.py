"""Plugins: a broken one is named and harms nobody, and no code runs but what a recipe names from where the user points.

Every plugin file here that must not run would leave a file `canary` behind.
"""

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vocseg.cli import main
from vocseg.errors import UNSEEN, UsageError, VocsegError
from vocseg.plugins import PACKAGE, discover, plugin_files
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.reader import read_recipe
from vocseg.runs.folder import _git

RECIPE = """
[model]
name = "{model}"
[data]
name = "synthetic"
size = 32
images = 4
val_images = 2
batch_size = 2
cache = "off"
[[augmentation]]
name = "crop"
size = 32
[train]
epochs = 1
precision = "fp32"
"""

HEAD = "from torch import nn\nfrom vocseg import architecture, augmentation, loss, schedule\n\n\n"
NET = HEAD + '@architecture\ndef {name}(num_classes: int) -> nn.Module:\n    """A net."""\n    {body}\n'
GOOD = "return nn.Sequential(nn.Conv2d(3, num_classes, 1))"


def bird(path: Path) -> str:
    """Code that leaves a canary behind."""
    return f"import pathlib\npathlib.Path({str(path)!r}).touch()\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with plugins/ in it that holds one good architecture, and a recipe that names it."""
    folder = tmp_path / "project"
    (folder / "plugins").mkdir(parents=True)
    (folder / "plugins" / "good.py").write_text(NET.format(name="good", body=GOOD))
    (folder / "good.toml").write_text(RECIPE.format(model="good"))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("VOCSEG_DATA", raising=False)
    return folder


@pytest.fixture
def vocseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`vocseg("list")` gives exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vocseg", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert not UNSEEN.search(err.replace("\n", ""))
        return int(done.value.code or 0), out, err

    return run


# Broken ones

CANNOT_BE_READ = {
    "no Python": ("def", "not Python"),
    "a null byte": ("from vocseg import loss\n\0", "null byte"),
    "no UTF-8": (b"from vocseg import loss\nx = '\xff'\n", "not Python"),
    "deep brackets": ("from vocseg import loss\nx = " + "(" * 5000 + ")" * 5000, "too many nested parentheses"),
    "a long sum": ("from vocseg import loss\nx = " + "+".join("1" * 100_000), "RecursionError"),
    "many signs": ("from vocseg import loss\nx = " + "-" * 100_000 + "1", "Error"),
    "many elifs": ("from vocseg import loss\nif 1: 0\n" + "elif 1: 0\n" * 5000, "RecursionError"),
    "two megabytes": ("from vocseg import loss\n" + "#" * 2_000_000, "expected a file of at most 1,048,576 bytes"),
    "no annotation": (NET.format(name="bad", body=GOOD).replace("int)", "int, *, x)"), "without an annotation"),
    "by position": (NET.format(name="bad", body=GOOD).replace("int)", "int, x: int)"), "takes 'x' by position"),
    "starred": (NET.format(name="bad", body=GOOD).replace("int)", "int, **x)"), "**kwargs"),
    "a call": (NET.format(name="bad", body=GOOD).replace("int)", "int, *, x: int = f())"), "'f' may not be called"),
    "a class": (HEAD + "@architecture\nclass Bad: ...\n", "must be a plain function"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "reason"), CANNOT_BE_READ.values(), ids=CANNOT_BE_READ)
def test_a_file_that_cannot_be_read_is_a_row_and_stops_no_other(
    project: Path, vocseg: Callable, source: str | bytes, reason: str
) -> None:
    (project / "plugins" / "bad.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    code, out, err = vocseg("list")
    assert (code, err) == (0, "")
    if b"vocseg" in (project / "plugins" / "bad.py").read_bytes():
        (row,) = [line.split("\t") for line in out.splitlines() if line.startswith("broken\t")]
        assert row[1] == "bad.py"
        assert reason in row[2]
        code, _, err = vocseg("show", "good.toml", "--set", "model.name=bad")
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"plugins{os.sep}bad.py could not be read: " in err
        assert reason in err
    assert load_recipe("good.toml")[0].model.name == "good"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes among files")
def test_what_is_no_file_is_a_row_and_is_not_waited_for(project: Path, vocseg: Callable) -> None:
    os.mkfifo(project / "plugins" / "pipe.py")
    (project / "plugins" / "zero.py").symlink_to("/dev/zero")
    (project / "plugins" / "ring.py").symlink_to("ring.py")
    (project / "plugins" / "folder.py").mkdir()
    _, out, _ = vocseg("list")
    rows = {row[1]: row[2] for line in out.splitlines() if (row := line.split("\t"))[0] == "broken"}
    assert rows.keys() == {"pipe.py", "zero.py", "ring.py", "folder.py"}
    assert rows["pipe.py"] == rows["zero.py"] == rows["folder.py"] == "not a file"


CANNOT_BE_LOADED = {
    "an import that is not there": ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "an error": ("raise ValueError('my\\nown \\x1b[5m')\n", r"ValueError: my own \x1b[5m"),
    "the end": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "a name taken away": ("", "once the file is imported that name is no marked function"),
}


@pytest.mark.parametrize(("source", "reason"), CANNOT_BE_LOADED.values(), ids=CANNOT_BE_LOADED)
def test_a_file_that_cannot_be_imported_is_told_when_it_is_used_or_with_load(
    project: Path, vocseg: Callable, source: str, reason: str
) -> None:
    after = "" if source else "del bad\n"
    (project / "plugins" / "bad.py").write_text(source + NET.format(name="bad", body=GOOD) + after)
    code, out, _ = vocseg("list", "architecture")
    assert code == 0
    assert "broken" not in out
    code, out, _ = vocseg("list", "architecture", "--load")
    (row,) = [line.split("\t") for line in out.splitlines() if line.startswith("broken\t")]
    assert row[1] == "bad"
    assert reason in row[2]
    code, _, err = vocseg("check", "good.toml", "--set", "model.name=bad")
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith(f"plugins{os.sep}bad.py:")
    assert reason in line
    assert vocseg("show", "good.toml")[0] == 0


CANNOT_BE_BUILT = {
    "an error": ("raise ValueError('my\\nown')", "cannot be built with no parameters: ValueError: my own"),
    "the end": ("raise SystemExit(0)", "cannot be built with no parameters: SystemExit: 0"),
    "nothing": ("return None", "returned NoneType, not a torch module"),
    "another thing": ("return 3", "returned int, not a torch module"),
}


@pytest.mark.parametrize(("body", "reason"), CANNOT_BE_BUILT.values(), ids=CANNOT_BE_BUILT)
def test_what_cannot_be_built_is_told_with_its_file(project: Path, vocseg: Callable, body: str, reason: str) -> None:
    (project / "plugins" / "bad.py").write_text(NET.format(name="bad", body=body))
    code, _, err = vocseg("check", "good.toml", "--set", "model.name=bad")
    (line,) = err.splitlines()
    assert code == 2
    assert f"bad.py:6: architecture 'bad' {reason}" in line


@pytest.mark.parametrize(
    ("table", "kind"), [("[[loss]]", "loss"), ("[[augmentation]]", "augmentation"), ("[schedule]", "schedule")]
)
def test_what_makes_no_function_is_told_before_training(project: Path, vocseg: Callable, table: str, kind: str) -> None:
    (project / "plugins" / "bad.py").write_text(f'{HEAD}@{kind}\ndef bad():\n    """Makes nothing."""\n')
    (project / "bad.toml").write_text(RECIPE.format(model="good") + f'{table}\nname = "bad"\n')
    code, _, err = vocseg("check", "bad.toml")
    assert code == 2
    assert err == f"plugins{os.sep}bad.py:6: {kind} 'bad' returned NoneType, not a function\n"


def test_a_name_that_is_taken_is_neithers_and_stops_no_other(project: Path, vocseg: Callable) -> None:
    (project / "plugins" / "more.py").write_text(NET.format(name="unet", body=bird(project / "canary").split("\n")[0]))
    code, out, err = vocseg("list")
    assert (code, err) == (0, "")
    (row,) = [line.split("\t") for line in out.splitlines() if line.startswith("broken\t")]
    assert row[1] == "unet"
    code, _, err = vocseg("show", "good.toml", "--set", "model.name=unet")
    (line,) = err.splitlines()
    assert code == 2
    assert "more.py:6; rename or delete all but one" in line
    assert "unet.py:" in line
    assert vocseg("show", "good.toml")[0] == 0


# What runs, and what does not


def test_no_recipe_or_file_of_weights_makes_code_run_by_naming_it(project: Path, vocseg: Callable) -> None:
    canary = project / "canary"
    for place in ("plugins/unused.py", "beside.py", "plugins/_private.py", "plugins/net/__init__.py", "conftest.py"):
        (project / place).parent.mkdir(exist_ok=True)
        (project / place).write_text(bird(canary) + NET.format(name=f"canary_{Path(place).stem}", body=GOOD))
    (project / "beside.pth").write_text(bird(canary))
    registry = discover(project=project)
    for key in ("model", "data", "augmentation.0", "loss.0", "optimizer", "schedule", "initializer"):
        for name in (
            "beside", "beside.py", "./beside.py", str(project / "beside.py"), "beside:canary_beside", "os.system",
            "plugins.unused", "plugins/unused.py", "_private", "__import__", "net.__init__", "good.__globals__",
        ):  # fmt: skip
            with pytest.raises(UsageError):
                read_recipe(Path("good.toml"), registry, ["loss=[{name='dice'}]", f"{key}.name={json.dumps(name)}"])
    for weights in ("beside.py", "beside.pth"):
        code, _, err = vocseg("check", "good.toml", "--set", f"model.weights='{weights}'")
        assert code in (2, 4)
        assert len(err.splitlines()) == 1
    assert not canary.exists()


def test_what_a_recipe_does_not_name_does_not_run(project: Path, vocseg: Callable) -> None:
    canary = project / "canary"
    (project / "plugins" / "unused.py").write_text(bird(canary) + NET.format(name="unused", body=GOOD))
    for command in (["list"], ["list", "unused"], ["show", "good.toml"], ["schema"], ["check", "good.toml"]):
        assert vocseg(*command)[0] == 0
    assert vocseg("run", "good.toml", "--quiet")[0] == 0
    assert not canary.exists()
    assert vocseg("check", "good.toml", "--set", "model.name=unused")[0] == 0
    assert canary.exists()


def test_weights_with_another_files_names_in_them_are_only_weights(project: Path, vocseg: Callable) -> None:
    assert vocseg("run", "good.toml", "--quiet", "--out", "made")[0] == 0
    (made,) = project.glob("made/*/*")
    weights = made / "model.safetensors"
    (project / "other.py").write_text(bird(project / "canary") + NET.format(name="other", body=GOOD))
    named = {"vocseg": json.dumps({"recipe": "../other.toml", "architecture": "other", "file": "other.py"})}
    save_file(load_file(weights), weights, metadata=named)
    code, _, err = vocseg("eval", str(made), "--device", "cpu")
    assert code == 0, err
    torch.save({"__file__": "other.py", "weight": torch.ones(1)}, project / "other.pth")
    assert vocseg("check", "good.toml", "--set", "model.weights=other.pth")[0] == 2
    assert not (project / "canary").exists()


def test_a_working_directory_is_no_place_that_modules_come_from(project: Path) -> None:
    for module in ("click", "rich", "pydantic", "numpy", "torch", "tomllib", "usercustomize"):
        (project / f"{module}.py").write_text(bird(project / "canary"))
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "vocseg", "show", "good.toml"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (project / "canary").exists()


def test_the_plugins_of_a_run_are_those_it_was_made_with(project: Path, vocseg: Callable) -> None:
    assert vocseg("run", "good.toml", "--quiet", "--out", "made")[0] == 0
    (made,) = project.glob("made/*/*")
    (project / "plugins" / "good.py").write_text(bird(project / "canary") + NET.format(name="good", body=GOOD))
    assert vocseg("eval", str(made), "--device", "cpu")[0] == 0
    assert not (project / "canary").exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no such folders")
@pytest.mark.parametrize(("mode", "owner", "trusted"), [(0o777, 1, False), (0o777, 0, True), (0o755, 1, True)])
def test_plugins_that_another_user_put_above_a_recipe_are_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, trusted: bool
) -> None:
    shared, recipe = tmp_path / "shared", tmp_path / "shared" / "mine" / "good.toml"
    for folder in (shared / "plugins", recipe.parent):
        folder.mkdir(parents=True)
    (shared / "plugins" / "good.py").write_text(NET.format(name="good", body=GOOD))
    recipe.write_text(RECIPE.format(model="good"))
    shared.chmod(mode | stat.S_ISVTX)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + owner)  # as if another user looked
    if trusted:
        assert load_recipe(str(recipe))[0].model.name == "good"
        return
    with pytest.raises(
        VocsegError, match=r"no architecture is named 'good'.*another user put it where anyone may write"
    ):
        load_recipe(str(recipe))
    assert load_recipe(str(recipe), plugins=shared / "plugins")[0].model.name == "good"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no such folders")
def test_a_link_that_another_user_put_above_a_recipe_is_as_little_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, recipe = tmp_path / "shared", tmp_path / "shared" / "mine" / "good.toml"
    recipe.parent.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "good.py").write_text(NET.format(name="good", body=GOOD))
    (shared / "plugins").symlink_to(tmp_path / "mine")
    recipe.write_text(RECIPE.format(model="good"))
    shared.chmod(0o777 | stat.S_ISVTX)
    assert load_recipe(str(recipe))[0].model.name == "good"
    lstat = os.lstat

    def of_another(path: str | Path) -> os.stat_result:
        found = [*lstat(path)]
        found[stat.ST_UID] += 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "lstat", of_another)
    with pytest.raises(VocsegError, match="another user put it where anyone may write"):
        load_recipe(str(recipe))


# What is kept


def test_the_run_folder_names_every_file_of_a_plugin_with_its_hash(project: Path, vocseg: Callable) -> None:
    package = project / "plugins" / "net"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("from .parts import width\n")
    (package / "parts.py").write_text("width = 3\n")
    (package / "deep" / "table.bin").write_bytes(b"\0\1")
    (package / "head.py").write_text(
        NET.format(name="packed", body="return nn.Sequential(nn.Conv2d(width, num_classes, 1))").replace(
            "from torch", "from .parts import width\nfrom torch"
        )
    )
    assert vocseg("run", "good.toml", "--set", "model.name=packed", "--quiet", "--out", "made")[0] == 0
    (made,) = project.glob("made/*/*")
    components = json.loads((made / "environment.json").read_bytes())["components"]
    wanted = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (package / "__init__.py", package / "deep" / "table.bin", package / "head.py", package / "parts.py")
    }
    assert components["architecture packed"]["files"] == wanted
    core = components["optimizer adamw"]
    assert [*core["files"].values()] == [core["sha256"]]
    for path in wanted:
        assert (made / "plugins" / Path(path).relative_to(project / "plugins")).read_bytes() == Path(path).read_bytes()


def test_an_installed_package_is_known_by_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "thing"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text(NET.format(name="thing_net", body=GOOD))
    info = tmp_path / "thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vocseg.plugins]\nthing = thing.inner\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = plugin_files(discover().get("architecture", "thing_net"))
    assert found == [package / "__init__.py", package / "inner" / "__init__.py"]


def test_to_note_the_repository_runs_no_program_of_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    Path("file").write_text("content")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'canary'}\ncat\n")
    program.chmod(0o755)
    for setting in ("core.fsmonitor", "filter.bad.clean", "filter.bad.process"):
        subprocess.run([*git, "config", setting, str(program)], check=True)
    Path(".gitattributes").write_text("* filter=bad\n")
    os.utime("file", (1, 1))  # so that git would look whether it changed
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert _git() == {"commit": commit}
    assert not Path("canary").exists()
