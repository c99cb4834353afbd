"""A package with an entry point, as `vocseg new --package` writes it: built, installed and used like a stranger's."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vocseg.new import write_new
from vocseg.plugins import PACKAGE

NAME = "made_up_net"

Command = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def place_in(env: Path, what: str) -> Path:
    return Path(sysconfig.get_path(what, "venv", {"base": str(env), "platbase": str(env)}))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in it, the wheel that was built of it in `dist`, and `env`, where that is installed."""
    folder = tmp_path_factory.mktemp("project")
    write_new("architecture", NAME, folder, package=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    alone = ("--no-deps", "--no-index")
    run(*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", "dist", f"./{NAME}", cwd=folder)

    venv.create(folder / "env")
    # torch and the rest are not installed again: this environment's packages are seen from the new one.
    new_site = place_in(folder / "env", "purelib")
    lines = [f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("-packages")]
    (new_site / "this_environment.pth").write_text("\n".join(lines) + "\n")
    (wheel,) = (folder / "dist").iterdir()
    run(*pip, "install", *alone, "--target", new_site, wheel, cwd=folder)
    return folder


@pytest.fixture
def vocseg(project: Path) -> Command:
    """Runs a command in the new environment."""
    python = place_in(project / "env", "scripts") / "python"
    return lambda *arguments, options=(): run(python, *options, "-m", "vocseg", *arguments, cwd=project)


def test_the_wheel_holds_the_module_and_its_entry_point(project: Path) -> None:
    (wheel,) = (project / "dist").iterdir()
    assert wheel.name == f"{NAME}-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if "dist-info" not in name} == {f"{NAME}/__init__.py"}
        info = archive.read(f"{NAME}-0.1.0.dist-info/entry_points.txt").decode()
    assert info == f"[vocseg.plugins]\n{NAME} = {NAME}\n"


def test_the_installed_architecture_is_listed_without_being_imported(project: Path, vocseg: Command) -> None:
    done = vocseg("list", options=("-X", "importtime"))
    row = next(line.split("\t") for line in done.stdout.splitlines() if f"\t{NAME}\t" in line)
    assert row[:3] == ["architecture", NAME, "Three strided convolutions and one skip connection."]
    file, _, line = row[3].rpartition(":")
    assert (project / file).parent.name == NAME
    assert (project / file).parent.parent.name == "site-packages"
    assert (project / file).read_text().splitlines()[int(line) - 1].startswith(f"def {NAME}(")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vocseg.plugins" in imported
    assert NAME not in imported


def test_the_recipe_of_the_package_is_read_and_would_run(vocseg: Command) -> None:
    assert f'name = "{NAME}"' in vocseg("show", f"{NAME}/recipes/{NAME}.toml").stdout
    assert "ready to run" in vocseg("check", f"{NAME}/recipes/{NAME}.toml").stdout


def test_without_the_package_its_recipe_says_what_is_missing(project: Path) -> None:
    command = [sys.executable, "-m", "vocseg", "show", f"{NAME}/recipes/{NAME}.toml"]
    with pytest.raises(AssertionError, match=f"no architecture is named '{NAME}'"):
        run(*command, cwd=project)
