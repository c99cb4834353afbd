"""Runs that can be killed at any moment, and what has to be the same about them in the end."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from vocseg.runs.checkpoint import load_state

PLUGIN = '''"""A tiny network with all that makes resuming hard: an encoder, batch norm, dropout."""

from torch import nn

from vocseg import architecture


@architecture(backbone="encoder")
def tiny(num_classes: int, *, width: int = 4, build_seconds: float = 0.0, fails: float = 0.0) -> nn.Module:
    """Two convolutions, for tests.

    Args:
        fails: share of the batches, picked by their pixels, whose loss is not a number.
    """
    __import__("time").sleep(build_seconds)
    network = nn.Sequential()
    encoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    network.add_module("encoder", encoder)
    network.add_module("dropout", nn.Dropout2d(0.2))
    network.add_module("head", nn.Conv2d(width, num_classes, 3, padding=1))
    network.stride = 1

    def fail(network, images, logits):
        return logits * float("nan") if network.training and abs(float(images[0].sum())) % 1 < fails else logits

    if fails:
        network.register_forward_hook(fail)
    return network
'''

RECIPE = """
description = "A tiny run."
seed = 3
[model]
name = "tiny"
[data]
name = "synthetic"
size = 32
images = 20
val_images = 3
batch_size = 3
workers = 1
[[augmentation]]
name = "crop"
size = 24
[[augmentation]]
name = "horizontal_flip"
[[augmentation]]
name = "color_jitter"
[optimizer]
name = "adamw"
lr = 1e-2
encoder_lr = 0.5
[schedule]
name = "cosine"
warmup_epochs = 1.0
[train]
epochs = 5
precision = "fp32"
accumulate = 2
clip = 1.0
ema = 0.9
checkpoint_minutes = 0.0
[early_stopping]
patience = 100
"""

BY_THE_CLOCK = {"seconds", "images_per_second", "seconds_training", "minutes", "peak_memory_bytes"}


@dataclass(frozen=True)
class Ended:
    """How a forked run ended.

    Attributes:
        code: its exit code; minus the number of a signal that killed it.
        since_signal: seconds from the last signal that was sent to the end.
    """

    code: int
    seconds: float
    since_signal: float
    said: str


@dataclass
class Forks:
    """Starts and resumes runs of the recipe in `home`, each in a forked process. Nobody of it may be left."""

    home: Path
    process: subprocess.Popen[str]
    sitting: int = field(default=0, init=False)

    def start(self, *overrides: str, out: str = "runs", **more: Any) -> Ended:
        return self.vocseg("run", str(self.home / "tiny.toml"), "--out", str(self.home / out), *_set(overrides), **more)

    def resume(self, run: Path, *overrides: str, data: Path | None = None, **more: Any) -> Ended:
        moved = ["--data", str(data)] if data else []
        return self.vocseg("run", "--resume", str(run), *moved, *_set(overrides), **more)

    def vocseg(
        self,
        *arguments: str,
        draw: bool = False,
        signals: Sequence[tuple[float, int]] = (),
        once: str = "",
        at: dict[str, Any] | None = None,
        forget: str = "",
    ) -> Ended:
        self.sitting += 1
        log = self.home / f"log-{self.sitting}"
        log.touch()  # the child may be killed before it does anything
        command = {
            "arguments": [*arguments, "--json"], "log": str(log), "draw": draw, "signals": [*signals], "once": once,
            "at": at, "forget": forget,
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        group = answer.pop("group")
        assert wait_until(lambda: not anyone_in(group), seconds=10), "a process of the run is left after 10 s"
        said = log.read_text()
        log.unlink()
        return Ended(**answer, said=said)

    def folder(self, out: str = "runs") -> Path | None:
        """The run folder that holds a state, all of which can be read; None where no run got as far."""
        found = sorted((self.home / out).glob("*/*/state.json"))
        if not found:
            return None
        assert load_state(found[-1].parent)[1] == []
        return found[-1].parent

    def left(self, folder: Path) -> dict[str, Any]:
        return what_is_left(folder)

    def files(self, folder: Path) -> dict[str, bytes]:
        """All files of a run but the one that says who holds it."""
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "lock"}


def _set(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def anyone_in(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, of a process that has ended and was not waited for
        return False
    return True


def write_project(home: Path) -> Path:
    (home / "plugins").mkdir(parents=True)
    (home / "plugins" / "tiny.py").write_text(PLUGIN)
    (home / "tiny.toml").write_text(RECIPE)
    return home


@pytest.fixture(scope="session")
def forking() -> Iterator[subprocess.Popen[str]]:
    """The process that forks runs."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a plugin and a recipe, as a user would have it."""
    return write_project(tmp_path / "project")


@pytest.fixture
def forks(project: Path, forking: subprocess.Popen[str]) -> Forks:
    return Forks(project, forking)


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its folder, what is in it, and the seconds it took."""

    folder: Path
    left: dict[str, Any]
    seconds: float


@pytest.fixture(scope="session")
def whole(forking: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Whole]:
    """`whole("train.ema=0.5", draw=True)`: an uninterrupted run, with its pictures or without."""
    found: dict[tuple[Any, ...], Whole] = {}

    def run(*overrides: str, draw: bool = False) -> Whole:
        if (overrides, draw) not in found:
            forks = Forks(write_project(tmp_path_factory.mktemp("whole") / "project"), forking)
            ended = forks.start(*overrides, draw=draw)
            assert ended.code == 0, ended.said
            folder = forks.folder()
            assert folder is not None
            found[overrides, draw] = Whole(folder, what_is_left(folder), ended.seconds)
        return found[overrides, draw]

    return run


@pytest.fixture(scope="session")
def stopped_once(forking: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a state of the middle of the third epoch."""
    forks = Forks(write_project(tmp_path_factory.mktemp("stopped") / "project"), forking)
    ended = forks.start(at={"event": "Step", "is": {"epoch": 2, "step": 2}, "signal": signal.SIGTERM})
    folder = forks.folder()
    assert folder is not None, ended.said
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def what_is_left(folder: Path) -> dict[str, Any]:
    """All of a finished run that the clock has no part in, by name; each file and tensor by its SHA-256."""
    state, problems = load_state(folder)
    assert not problems
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds), "time went backwards"
    states = [entry["file"] for entry in json.loads((folder / "state.json").read_text())["states"]]
    named = {path.name for path in folder.iterdir()}
    assert {name for name in named if name.endswith(".pt")} == set(states), "a state that nothing names"
    files = ("recipe.toml", "classes.json", "model.safetensors", "counts.safetensors")
    pictures = sorted(path.name for path in folder.glob("*.png"))
    result = json.loads((folder / "result.json").read_text())
    return {
        "names": sorted(named - set(states) - set(pictures)),
        **{name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        "metrics": [{k: v for k, v in record.items() if k not in BY_THE_CLOCK} for record in records],
        "result": {k: v for k, v in result.items() if k not in BY_THE_CLOCK},
        "csv": (folder / "metrics.csv").read_text().count("\n"),
        **{f"state.{name}": _digest(value) for name, value in state["training"].items() if name not in BY_THE_CLOCK},
        "scoreboard": state["scoreboard"],
    }


def _digest(value: Any) -> str:
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                found.update(repr(key).encode())
                add(inner)
        elif isinstance(value, list):
            for inner in value:
                add(inner)
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()
