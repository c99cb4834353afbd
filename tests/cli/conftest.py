"""The command line in this process: what it prints and the code it exits with."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vocseg.cli import main
from vocseg.plugins import PACKAGE

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


@pytest.fixture
def on_terminal() -> Callable[..., str]:
    """`on_terminal(folder, 80, "list", code=0)` gives what the command prints there on a terminal of that width."""

    def run(cwd: Path, width: int, *arguments: str, code: int = 0) -> str:
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": str(width), "TERM": "xterm"}
        command = [sys.executable, "-m", "vocseg", *arguments]
        ours, theirs = pty.openpty()
        with subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=environment, cwd=cwd) as process:
            os.close(theirs)
            shown = b""
            try:
                while chunk := os.read(ours, 65536):
                    shown += chunk
            except OSError:  # Linux ends a terminal that nobody holds with an error
                pass
        os.close(ours)
        assert process.returncode == code, shown
        return shown.decode()

    return run
