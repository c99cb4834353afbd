"""Many runs at once: each has a folder of its own, and a folder has one run at most."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vocseg.errors import EnvironmentFault
from vocseg.lock import take_lock
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Started, resume, start
from vocseg.runs.folder import RunFolder
from vocseg.train.loop import Epoch

MAKE = """
import sys, time
from pathlib import Path
from vocseg.recipe.prepare import load_recipe
from vocseg.runs.folder import RunFolder

recipe, _ = load_recipe("quickstart")
print("ready", flush=True)
sys.stdin.readline()
begun = time.monotonic()
for _ in range(20):
    print(RunFolder.create(Path(sys.argv[1]), recipe).path)
print(time.monotonic() - begun)
"""

# Reads that the lock of a folder is held for as long as its standard input is open.
HOLD = """
import sys
from pathlib import Path
from vocseg.runs.folder import RunFolder

with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def python(code: str, argument: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(argument)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def run_folder(project: Path) -> Path:
    """A run that was left after its first epoch."""
    recipe, _ = load_recipe(str(project / "tiny.toml"), overrides=("train.epochs=2", "train.checkpoint_minutes=60.0"))
    events = start(recipe, out=project / "runs", device="cpu")
    for event in events:
        if isinstance(event, Started):
            folder = event.run
        if isinstance(event, Epoch):
            next(events)  # its state is saved
            break
    events.close()
    return folder


def test_8_processes_that_start_20_runs_each_at_once_make_160_folders(tmp_path):
    processes = [python(MAKE, tmp_path) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert max(float(answer[-1]) for answer in answers) < 10
    folders = {Path(path) for answer in answers for path in answer[:-1]}
    assert len(folders) == 160
    assert all({path.name for path in folder.iterdir()} == {"recipe.toml", "resolved.toml"} for folder in folders)


def test_runs_that_draw_the_same_id_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    drawn = iter(["aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(drawn) if size == 2 else "0" * 2 * size)
    monkeypatch.setattr("time.strftime", lambda *given: "20260102-030405")
    recipe, _ = load_recipe("quickstart")
    names = [RunFolder.create(tmp_path, recipe).path.name for _ in range(2)]
    assert names == ["20260102-030405-aaaa", "20260102-030405-bbbb"]


def test_a_second_resume_is_refused_at_once_and_told_who_trains(run_folder):
    first = resume(run_folder, device="cpu")
    next(first)
    begun = time.monotonic()
    with pytest.raises(EnvironmentFault) as error:
        next(resume(run_folder, device="cpu"))
    assert time.monotonic() - begun < 5
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{run_folder}: process {os.getpid()} on ")
    assert "trains in this folder; wait for its end, or stop it" in line
    assert [type(event).__name__ for event in first][-1] == "Finished"  # which it did not disturb


def test_a_resume_is_refused_while_the_run_still_trains_in_another_process(run_folder):
    with python(HOLD, run_folder) as holder:
        assert holder.stdout.readline() == "held\n"
        command = [sys.executable, "-m", "vocseg", "run", "--resume", str(run_folder)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        holder.stdin.close()
    assert ended.returncode == 4
    (line,) = ended.stderr.splitlines()
    assert f"process {holder.pid} on " in line


def test_the_lock_of_a_process_that_was_killed_blocks_nobody(run_folder):
    with python(HOLD, run_folder) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        assert str(holder.pid) in (run_folder / "lock").read_text()
        *_, finished = resume(run_folder, device="cpu")
    assert json.loads((run_folder / "result.json").read_text())["epochs"] == 2
    assert finished.run == run_folder


def test_a_run_is_locked_from_its_start_to_its_end(project):
    recipe, _ = load_recipe(str(project / "tiny.toml"), overrides=("train.epochs=1", "schedule.warmup_epochs=0.0"))
    events = start(recipe, out=project / "runs", device="cpu")
    folder = next(events).run
    for _ in events:
        with pytest.raises(EnvironmentFault, match="trains in this folder"), RunFolder(folder).lock():
            pass
    with RunFolder(folder).lock():
        pass


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none_here(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with (tmp_path / "lock").open("w") as file:
        assert take_lock(file.fileno())


def test_what_a_killed_writer_left_is_gone_once_the_run_goes_on(run_folder):
    (state,) = run_folder.glob("state-*.pt")
    unnamed = run_folder / "state-00000099-0123abcd.pt"
    unnamed.write_bytes(state.read_bytes())
    unfinished = run_folder / ".model.safetensors.0123abcd.tmp"
    unfinished.write_bytes(b"half")
    own = run_folder / ".notes"
    own.write_text("not ours")
    next(resume(run_folder, device="cpu"))
    assert not unnamed.exists()
    assert not unfinished.exists()
    assert own.exists()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system cannot refuse links")
def test_a_lock_that_is_a_link_is_not_followed(run_folder, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("a chapter")
    (run_folder / "lock").unlink(missing_ok=True)
    (run_folder / "lock").symlink_to(mine)
    with pytest.raises(EnvironmentFault, match="lock"):
        next(resume(run_folder, device="cpu"))
    assert mine.read_text() == "a chapter"
