"""The versions that were tested together: all that vocseg needs, each file by its hash, and no host they come from."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[0-9][\w.]*)(?: ; (?P<marker>.+?))? \\")
HASH = re.compile(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    text = (ROOT / "constraints.txt").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def pins(lines: list[str]) -> dict[str, str]:
    return {match["name"]: match["version"] for line in lines if (match := PINNED.fullmatch(line))}


def test_every_line_is_a_pin_or_one_of_its_hashes_and_names_no_host(lines: list[str]) -> None:
    for before, line in zip(["", *lines], lines, strict=False):
        match = PINNED.fullmatch(line)
        assert match or (HASH.fullmatch(line) and before.endswith("\\")), line
        if match and match["marker"]:
            Marker(match["marker"])
    assert not lines[-1].endswith("\\")


def test_all_that_vocseg_its_tests_and_its_tools_need_is_pinned_within_the_bounds(pins: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, needed):
        if requirement.name != "vocseg":
            version = pins[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"{requirement} and {version}"
