"""`vocseg check`: recipes as `tests/cli/test_run.py` has them; here architectures, by file and by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vocseg.testing import CHECK_NAMES

Vocseg = Callable[..., tuple[str, str]]

SOURCE = '''
from torch import nn

from vocseg import architecture

print("imported")


class Net(nn.Module):
    stride = {stride}

    def __init__(self, num_classes, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, 4, 1), nn.Conv2d(width, num_classes, 1), nn.Upsample(scale_factor=4)
        )

    def forward(self, x):
        return self.layers(x)


@architecture
def net(num_classes: int, *, width: int = 4) -> nn.Module:
    """A small network."""
    print("built")
    return Net(num_classes, width)
'''
BROKEN = (
    SOURCE
    + '''

@architecture
def broken(num_classes: int) -> nn.Module:
    """Never built."""
    raise ValueError("no idea")
'''
)
QUICK = ("--without", "export", "--without", "compile", "--without", "step-time")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "plugins").mkdir()
    path = tmp_path / "plugins" / "net.py"
    path.write_text(SOURCE.format(stride=4))
    return path


def test_a_plugin_that_passes_exits_with_0_and_is_a_row_a_check(run_vocseg: Vocseg, plugin: Path) -> None:
    out, err = run_vocseg("check", "plugins/net.py", *QUICK)
    title, *rows, summary = out.splitlines()
    assert title.split() == ["net", os.path.join("plugins", "net.py:23")]
    assert [row.split()[1] for row in rows] == [name for name in CHECK_NAMES if name not in QUICK]
    assert {row.split()[0] for row in rows} == {"pass", "info"}
    assert len({row.index(row.split(maxsplit=2)[2]) for row in rows}) == 1  # the findings stand below each other
    assert summary.endswith("passed, 0 warnings, 0 failed")
    assert "imported\n" in err
    assert "built\n" in err


def test_a_failure_exits_with_2_and_says_what_to_do(run_vocseg: Vocseg, plugin: Path) -> None:
    plugin.write_text(SOURCE.format(stride=2))
    lines = run_vocseg("check", "plugins/net.py", *QUICK, code=2)[0].splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("fail")]
    assert lines[at].split()[1] == "stride"
    assert lines[at + 1].strip() == "-> set stride = 4 on the module; sides of 36 work"


def test_every_architecture_of_a_file_is_checked_or_the_one_that_is_named(run_vocseg: Vocseg, plugin: Path) -> None:
    plugin.write_text(BROKEN.format(stride=4))
    out, err = run_vocseg("check", "plugins/net.py", *QUICK, code=2)
    assert "fail  build          ValueError: no idea (plugins/net.py:32)\n" in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith((":23", ":30"))] == ["net", "broken"]
    assert "Traceback" not in err
    assert "\nnot tried: training-mode, weights, " in out
    assert "broken" not in run_vocseg("check", "plugins/net.py", "--architecture", "net", *QUICK)[0]


def test_an_architecture_is_found_by_name_and_built_with_what_set_gives(run_vocseg: Vocseg, plugin: Path) -> None:
    out, _ = run_vocseg("check", "--architecture", "net", "--set", "width=8", *QUICK)
    assert "Net for 21 classes, width = 8" in out
    bare = run_vocseg("check", "--architecture", "smp", "--set", "encoder=tu-resnet10", *QUICK, code=2)[0]
    assert "neither smp nor timm" in bare  # text needs no quotes, as in a recipe's --set


def test_json_is_the_rows_and_nothing_else(run_vocseg: Vocseg, plugin: Path) -> None:
    rows = json.loads(run_vocseg("check", "plugins/net.py", "--json", *QUICK)[0])
    assert {tuple(row) for row in rows} == {("architecture", "name", "verdict", "found", "remedy", "value")}
    assert [row["name"] for row in rows] == [name for name in CHECK_NAMES if name not in QUICK]
    # Convolutions 3*4*9 + 4 and 4*21 + 21.
    assert [row["value"] for row in rows if row["name"] == "parameters"] == [217]


def test_debug_shows_where_a_plugin_failed(run_vocseg: Vocseg, plugin: Path) -> None:
    plugin.write_text(BROKEN.format(stride=4))
    _, err = run_vocseg("--debug", "check", "plugins/net.py", "--architecture", "broken", *QUICK, code=2)
    assert "broken: build\nTraceback" in err
    assert 'raise ValueError("no idea")' in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "vocseg check takes a RECIPE, a FILE.py, or --architecture NAME"),
        (("plugins/nett.py",), "plugins/nett.py: no such file; did you mean 'net.py'?"),
        (("plugins/net.py", "--architecture", "nett"), "no architecture is named 'nett' there; did you mean 'net'?"),
        (("--architecture", "nett"), "no architecture is named 'nett'; did you mean 'net'?"),
        (("plugins/net.py", "--set", "widht=8"), "widht: architecture 'net' has no such parameter; did you mean 'wid"),
        (("plugins/net.py", "--set", "width=wide"), "width: input should be a valid integer, found 'wide'"),
        (("plugins/net.py", "--set", "width=nan"), "--set width=nan: expected a finite number"),
        (("plugins/net.py", "--set", "width"), "expected key=value"),
        (("plugins/net.py", "--without", "compiling"), "no check is named 'compiling'; did you mean 'compile'?"),
        (("plugins/net.py", "--seed", "1"), "--data and --seed are for recipes"),
        (("plugins/net.py", "--plugins", "plugins"), "--plugins is for recipes and --architecture"),
        (("quickstart", "--without", "compile"), "--without is for architectures"),
        (("quickstart", "--architecture", "net"), "--architecture goes without a RECIPE"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    run_vocseg: Vocseg, plugin: Path, arguments: tuple[str, ...], message: str
) -> None:
    out, err = run_vocseg("check", *arguments, code=2)
    assert out == ""
    lines = [line for line in err.splitlines() if line != "imported"]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_rows_are_coloured_and_keep_within_its_width(
    plugin: Path, width: int, on_terminal: Callable[..., str]
) -> None:
    plugin.write_text(SOURCE.format(stride=2).replace('print("imported")', "").replace('print("built")', ""))
    shown = on_terminal(plugin.parents[1], width, "check", "plugins/net.py", *QUICK, code=2)
    text = shown.replace("\r", "")
    assert "\x1b[32mpass\x1b[0m  signature" in text
    assert "\x1b[1;31mfail\x1b[0m  stride" in text
    assert "\x1b[1;31m-> set stride = 4" in text
    plain = text
    for code in ("\x1b[1m", "\x1b[0m", "\x1b[32m", "\x1b[1;31m", "\x1b[36m", "\x1b[33m"):
        plain = plain.replace(code, "")
    assert "\x1b" not in plain
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= width
