"""The oldest versions that pyproject.toml allows, installed together and used: the bounds are not made up.

It downloads some gigabytes, takes half an hour, and wants about 8 GB in the folder for temporary files. What is not
vocseg's is left to be noisy: the oldest versions of some packages warn about the newest of others.
"""

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

# Left out is what compares with a picture, a terminal or a server as the newest versions draw, colour and ask it.
TESTS = (
    "components/test_augmentations.py", "components/test_initializers.py", "components/test_losses.py",
    "components/test_optimizers.py", "components/test_overlap_losses.py", "components/test_schedules.py",
    "data/test_cache.py", "data/test_fetch.py", "data/test_folder.py", "data/test_images.py", "data/test_loader.py",
    "data/test_render.py", "data/test_sample.py", "data/test_synthetic.py", "data/test_verify.py", "data/test_voc.py",
    "data/test_weights.py", "evaluate", "plugins", "recipe", "runs", "train", "test_recipes.py", "test_run.py",
    "test_score.py",
)  # fmt: skip


def oldest() -> list[str]:
    """Every requirement of pyproject.toml, those of the extras too, with the least version it allows."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    requirements = [line for line in (*project["dependencies"], *extras) if not line.startswith("vocseg[")]
    pinned = {re.sub("^([A-Za-z0-9_.-]+)>=([0-9.]+)$", r"\1==\2", line) for line in requirements}
    return sorted(pinned)


def test_every_requirement_has_a_least_version_and_only_that() -> None:
    pins = oldest()
    assert len(pins) > 15
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9]+(\.[0-9]+)+", pin), pin
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names)), "a package has two least versions"


def run(*command: object, home: Path) -> str:
    temporary, work = (
        home / "temporary",
        home / "work",
    )  # beside each other: paths below where one works are shown short
    for folder in (temporary, work):
        folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIP_NO_INPUT": "1", "TMPDIR": str(temporary)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, command)], cwd=work, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the programs are of an environment of the oldest versions, in which vocseg is installed from here."""
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder / "env", with_pip=True)
    found = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder / "env"), "platbase": str(folder / "env")}))
    pins = folder / "oldest.txt"
    pins.write_text("\n".join(oldest()) + "\n")
    pip = (found / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check")
    run(*pip, "--constraint", pins, f"{PROJECT}[test]", home=folder)
    yield found
    shutil.rmtree(folder)


@pytest.mark.long
def test_the_oldest_versions_are_the_ones_installed(scripts: Path, tmp_path: Path) -> None:
    listed = run(scripts / "python", "-m", "pip", "list", "--format=freeze", home=tmp_path)
    installed = dict(line.lower().replace("_", "-").split("==") for line in listed.splitlines())
    assert "vocseg" in installed
    checked = 0
    for pin in oldest():
        name, _, version = pin.lower().replace("_", "-").partition("==")
        if name in installed:  # mypy and what else is only for developers is not
            checked += 1
            assert re.fullmatch(rf"{re.escape(version)}(\.0)*(\+.*)?", installed[name]), name
    assert checked > 15


@pytest.mark.long
def test_the_oldest_versions_list_components(scripts: Path, tmp_path: Path) -> None:
    assert "\tfcn_baseline\t" in run(scripts / "vocseg", "list", home=tmp_path)


@pytest.mark.long
def test_the_oldest_versions_train(scripts: Path, tmp_path: Path) -> None:
    small = ("train.epochs=1", "data.images=32", "data.val_images=4")
    sets = [word for setting in small for word in ("--set", setting)]
    done = run(scripts / "vocseg", "run", "quickstart", "--quiet", *sets, home=tmp_path)
    assert (tmp_path / "work" / done.strip() / "result.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize("tests", TESTS)
def test_the_oldest_versions_pass_the_tests(tests: str, scripts: Path, tmp_path: Path) -> None:
    quiet = [word for kind in ("Deprecation", "PendingDeprecation") for word in ("-W", f"default::{kind}Warning")]
    run(scripts / "pytest", "-q", "-p", "no:cacheprovider", *quiet, PROJECT / "tests" / tests, home=tmp_path)
