"""A disk that is really full, or a limit on the size of files: a line with the figures, and the last state is whole."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vocseg.errors import EnvironmentFault
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Started, resume, start
from vocseg.runs.checkpoint import load_state

resource = pytest.importorskip("resource", reason="limits of a process are of Linux and macOS")

TINY = (
    "data.size=32", "data.images=12", "data.val_images=3", "data.batch_size=4", "data.workers=1", "model.width=4",
    "augmentation.0.size=32", "train.epochs=3", "train.precision=fp32", "train.ema=0.9", "evaluate.metric=last",
)  # fmt: skip
ROOM = re.compile(r"needed: ([\d,]+) bytes, free: ([\d,]+) bytes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "vocseg-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refused(out: Path, *more: str, kind: str = "", number: int = 0) -> str:
    """What a run ends with. From the event of that kind and number on no file may grow beyond 100 kB."""
    recipe, _ = load_recipe("quickstart", overrides=(*TINY, *more))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for event in start(recipe, out=out, device="cpu"):
            number -= type(event).__name__ == kind
            if kind and number == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    except EnvironmentFault as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pytest.fail("the run ended as if there were room")


def test_a_full_disk_ends_a_run_in_a_line_and_leaves_the_last_state_whole(small_disk, tmp_path):
    # A state without moments takes 0.3 MB, and the weights 0.15 MB: there is no room for a third beside two of them.
    (line,) = refused(small_disk, "optimizer.name=sgd", "optimizer.momentum=0.0").splitlines()
    (folder,) = small_disk.glob("*/*")
    assert line.startswith(f"{folder}/")
    assert f"No space left on device in {folder} (needed: " in line
    needed, free = (int(number.replace(",", "")) for number in ROOM.search(line).groups())
    assert free < needed
    assert free <= 1 << 20
    assert not list(folder.glob(".*"))
    _, problems = load_state(folder)
    assert problems == []
    room = shutil.copytree(folder, tmp_path / "with room")
    *_, finished = resume(room, device="cpu")
    assert finished.result["epochs"] == 3


def test_a_disk_that_is_full_from_the_start_keeps_no_empty_run(small_disk):
    (small_disk / "filler").write_bytes(bytes((1 << 20) - os.statvfs(small_disk).f_frsize))
    (line,) = refused(small_disk).splitlines()
    assert "No space left on device" in line
    assert not list(small_disk.glob("*/*"))


@pytest.mark.parametrize(("kind", "number"), [("Started", 1), ("Epoch", 3)])
def test_a_limit_on_the_size_of_files_ends_a_run_in_a_line_and_loses_nothing(tmp_path, kind, number):
    (line,) = refused(tmp_path, kind=kind, number=number).splitlines()
    (folder,) = tmp_path.glob("*/*")
    assert line.startswith(f"{folder}/")
    assert f"File too large in {folder} (needed: " in line
    assert not list(folder.glob(".*"))
    if kind == "Epoch":
        assert load_state(folder)[1] == []
        assert next(resume(folder, device="cpu")).first_epoch == 2


def started(out: Path, *more: str) -> Started:
    recipe, _ = load_recipe("quickstart", overrides=(*TINY, *more))
    events = start(recipe, out=out, device="cpu")
    event = next(events)
    events.close()
    return event


def test_a_run_that_will_not_fit_on_the_disk_is_told_before_it_trains(small_disk, tmp_path):
    (note,) = started(small_disk).notes
    assert re.fullmatch(
        r".*: the run may take \d+ MB more, and 1 MB are free; free space, or choose another --out", note
    )
    assert note.startswith(str(small_disk))
    assert started(tmp_path / "runs").notes == ()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_a_run_is_expected_to_write_is_what_it_writes(tmp_path, optimizer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    recipe, _ = load_recipe("quickstart", overrides=(*TINY, "model.width=48", f"optimizer.name={optimizer}"))
    for event in start(recipe, out=tmp_path, device="cpu"):
        if isinstance(event, Started):
            expected = 1e6 * int(re.search(r"may take (\d+) MB", event.notes[0])[1])
    sizes = [path.stat().st_size for path in event.run.iterdir()]
    states = [path.stat().st_size for path in event.run.glob("state-*.pt")]
    weights = (event.run / "model.safetensors").stat().st_size
    most = sum(sizes) + max(states) + weights  # while a state and the weights are replaced
    assert most <= expected <= most + 6e6
    assert json.loads((event.run / "result.json").read_text())["epochs"] == 3
