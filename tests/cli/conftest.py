"""The command line in this process: what it prints and the code it exits with."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vocseg.cli import main

Vocseg = Callable[..., tuple[str, str]]


@pytest.fixture
def run_vocseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Vocseg:
    """`run_vocseg("list", "--json", code=0)` gives stdout and stderr; the working directory is `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOCSEG_DATA", raising=False)

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["vocseg", *arguments])
        found = 0
        try:
            main()
        except SystemExit as done:
            found = int(done.code or 0)
        out, err = capsys.readouterr()
        assert found == code, err
        return out, err

    return run
