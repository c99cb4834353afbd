"""`vocseg new`: what it prints, and how it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

Vocseg = Callable[..., tuple[str, str]]


def test_the_files_are_printed_with_the_commands_to_try(run_vocseg: Vocseg, tmp_path: Path) -> None:
    out, err = run_vocseg("new", "architecture", "my_net", "--from", "mini_unet")
    assert out == (
        "plugins/my_net.py\n"
        "recipes/my_net.toml\n"
        "tests/test_my_net.py\n"
        "\n"
        "Next:\n"
        "  vocseg check plugins/my_net.py\n"
        "  vocseg run recipes/my_net.toml\n"
        "  pytest tests/test_my_net.py\n"
    )
    assert err == ""
    assert all((tmp_path / file).is_file() for file in out.split("\n")[:3])
    assert "architecture\tmy_net\tA small residual U-Net" in run_vocseg("list", "architecture")[0]
    assert 'name = "my_net"' in run_vocseg("show", "recipes/my_net.toml")[0]


def test_a_package_is_to_be_installed_first(run_vocseg: Vocseg) -> None:
    answer = json.loads(run_vocseg("new", "loss", "my_loss", "--package", "--json")[0])
    assert answer == {
        "written": [
            "my_loss/src/my_loss/__init__.py",
            "my_loss/recipes/my_loss.toml",
            "my_loss/tests/test_my_loss.py",
            "my_loss/pyproject.toml",
            "my_loss/README.md",
        ],
        "next": [
            "pip install -e ./my_loss",
            "vocseg list my_loss",
            "vocseg check my_loss/recipes/my_loss.toml",
            "vocseg run my_loss/recipes/my_loss.toml",
            "pytest my_loss/tests/test_my_loss.py",
        ],
    }


def test_problems_are_lines_and_the_exit_code_is_that_of_usage(run_vocseg: Vocseg, tmp_path: Path) -> None:
    out, err = run_vocseg("new", "architecture", "my-net", "--from", "mini_unte", code=2)
    assert out == ""
    assert err == (
        "my-net: cannot be the name of a Python function; use letters, digits and _, such as my_net\n"
        "--from: no architecture is named 'mini_unte'; did you mean 'mini_unet'?\n"
    )
    assert "'network' is not one of" in run_vocseg("new", "network", "mine", code=2)[1]
    assert list(tmp_path.iterdir()) == []
