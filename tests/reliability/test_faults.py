"""What goes wrong while images are read: a plugin that raises, a read that never returns, a process that dies of it.

Each ends the run within 15 s, in one line that names the image, and costs nothing that was saved.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vocseg import witness
from vocseg.data.dataset import Dataset
from vocseg.data.loader import TrainingBatches
from vocseg.data.parallel import in_threads
from vocseg.data.threads import HangError, Readers, read
from vocseg.errors import DataError, EnvironmentFault, TrainingError, VocsegError
from vocseg.evaluate.validation import read_ahead
from vocseg.recipe.prepare import load_recipe
from vocseg.run import start
from vocseg.runs.checkpoint import load_state

PROMPTLY = 15.0  # seconds

PLUGIN = '''"""A data set and an augmentation with something wrong, for as long as a file is there."""

import ctypes
import os
import signal
import threading
from pathlib import Path

import numpy as np

from vocseg import augmentation, dataset
from vocseg.data.dataset import Dataset


def go_wrong(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "crash":
        ctypes.string_at(0)
    elif how == "hang":
        threading.Event().wait()
    elif how == "exit":
        raise SystemExit(0)
    elif how == "stop":
        raise StopIteration
    else:
        raise ValueError("of all things")


@dataset
def faulty(root: Path, split: str, *, how: str, armed: str, bad_split: str = "train") -> Dataset:
    """Twelve small images, of which the fourth goes wrong."""

    def read(index: int):
        if index == 3 and split == bad_split and os.path.exists(armed):
            go_wrong(how)
        rng = np.random.default_rng(index)
        return rng.integers(0, 256, (24, 24, 3)).astype(np.uint8), rng.integers(0, 3, (24, 24)).astype(np.uint8)

    return Dataset(("a", "b", "c"), tuple(f"{split}/photo_{i}" for i in range(12)), read)


@augmentation
def brittle(*, how: str):
    """Goes wrong with every image."""

    def augment(sample, rng):
        go_wrong(how)

    return augment
'''

RECIPE = """
seed = 3
[model]
name = "tiny"
[data]
name = "faulty"
how = "{how}"
armed = "{armed}"
batch_size = 3
workers = 2
cache = "off"
[optimizer]
name = "adamw"
[train]
epochs = 2
precision = "fp32"
checkpoint_minutes = 0.0
"""


@pytest.fixture
def armed(project: Path) -> Path:
    """The project has a recipe `tiny` whose fourth image goes wrong while this file is there."""
    (project / "plugins" / "faulty.py").write_text(PLUGIN)
    return project / "armed"


def write_recipe(project: Path, how: str, more: str = "") -> Path:
    path = project / "tiny.toml"
    path.write_text(RECIPE.format(how=how, armed=project / "armed") + more)
    return path


def exits(path: Path, *overrides: str) -> VocsegError:
    with pytest.raises(VocsegError) as caught:
        list(start(load_recipe(str(path), overrides=overrides)[0], out=path.parent / "runs", device="cpu"))
    return caught.value


@pytest.mark.parametrize("how", ["raise", "exit", "stop"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_data_set_that_raises_anything_ends_the_run_with_the_image(project, armed, how, split):
    armed.touch()
    error = exits(write_recipe(project, how), f'data.bad_split="{split}"')
    assert isinstance(error, DataError)
    assert error.problems[0].where == f"{split}/photo_3"
    kind = {"raise": "ValueError: of all things", "exit": "SystemExit", "stop": "StopIteration"}[how]
    assert f"the data set failed to read it with {kind}" in str(error)
    assert "\n" not in str(error.problems[0])


@pytest.mark.parametrize("how", ["raise", "exit", "stop"])
def test_an_augmentation_that_raises_anything_ends_the_run_with_its_name_and_the_image(project, armed, how):
    more = f'[[augmentation]]\nname = "horizontal_flip"\n[[augmentation]]\nname = "brittle"\nhow = "{how}"\n'
    error = exits(write_recipe(project, how, more))
    assert isinstance(error, TrainingError)
    assert error.exit_code == 5
    assert error.problems[0].where.startswith("train/photo_")
    assert error.problems[0].message.startswith("augmentation 'brittle' failed on it with ")


def numbered(count: int, function=lambda index: None, timeout: float = 300.0) -> Dataset:
    def pixels(index):
        function(index)
        return np.full((4, 4, 3), index, np.uint8), np.zeros((4, 4), np.uint8)

    return Dataset(("a", "b"), tuple(f"number {i}" for i in range(count)), pixels, timeout=timeout)


@pytest.fixture
def never():
    """An event that nobody sets before the test has ended."""
    event = threading.Event()
    yield event
    event.set()


def from_the_third(data: Dataset) -> Dataset:
    return replace(data, names=data.names[3:], read=lambda index: data.read(index + 3))


CONSUMERS = {
    "training": lambda data: [*TrainingBatches(data, [], batch_size=2, seed=0, workers=2).epoch(0)],
    "one sample": lambda data: TrainingBatches(from_the_third(data), [], batch_size=1, seed=0).first_sample(),
    "validation": lambda data: [*read_ahead(data, range(5))],
    "counting": lambda data: [*in_threads(lambda i: read(data, i), range(5), timeout=data.timeout)],
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_read_that_never_returns_is_given_up_with_the_name_of_its_image(consumer, never):
    data = numbered(5, lambda index: never.wait() if index == 3 else None, timeout=0.2)
    begun = time.monotonic()
    with pytest.raises(HangError, match=r"number 3: reading or augmenting it has taken more than 0\.2 s") as caught:
        CONSUMERS[consumer](data)
    assert len(caught.value.problems) == 1
    assert "data.timeout_seconds" in str(caught.value)
    assert time.monotonic() - begun < 10


def test_every_image_that_hangs_is_named(never):
    data = numbered(8, lambda index: never.wait(), timeout=0.2)
    with pytest.raises(HangError) as caught:
        next(TrainingBatches(data, [], batch_size=8, seed=0, workers=3).epoch(0))
    assert len(caught.value.problems) == 3


def test_images_that_are_slow_but_done_in_time_are_waited_for():
    data = numbered(12, lambda index: time.sleep(0.15), timeout=1.0)  # 1.8 seconds for all, on one thread
    assert len([*TrainingBatches(data, [], batch_size=12, seed=0, workers=1).epoch(0)]) == 1


def test_without_a_time_limit_there_is_none(never):
    timer = threading.Timer(0.5, never.set)
    timer.start()
    data = numbered(2, lambda index: never.wait(), timeout=0.0)
    assert len([*TrainingBatches(data, [], batch_size=2, seed=0).epoch(0)]) == 1


def test_an_error_of_its_own_that_is_a_timeout_is_no_hang():
    def fail():
        raise TimeoutError("the database did not answer")

    readers = Readers(1, timeout=0.2)
    with pytest.raises(TimeoutError, match="database"):
        readers.result(readers.submit(fail))
    readers.close()


def test_stopping_while_a_thread_is_busy_waits_for_it_and_drops_the_rest():
    done, begun = [], threading.Event()
    readers = Readers(1, timeout=0)

    def work(i):
        begun.set()
        time.sleep(0.3)
        done.append(i)

    dropped = [readers.submit(work, i) for i in range(3)][1:]
    begun.wait()
    readers.close()
    assert done == [0]
    assert all(future.cancelled() for future in dropped)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vocseg-reader")]


def test_the_program_itself_ends_though_a_thread_of_it_hangs(forks, project, armed):
    # In the real program, for at its end the interpreter waits for threads. What hangs is the first validation.
    armed.touch()
    settings = ('data.bad_split="val"', "data.timeout_seconds=1.0")
    command = [sys.executable, "-m", "vocseg", "run", str(write_recipe(project, "hang"))]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    now = time.time()
    assert ended.returncode == EnvironmentFault.exit_code, ended.stderr
    first, second = ended.stderr.splitlines()
    assert first.startswith("val/photo_3: reading or augmenting it has taken more than 1 s")
    folder = forks.folder()
    assert second.endswith(f"vocseg run --resume {folder.relative_to(project)}")
    assert now - (folder / "state.json").stat().st_mtime < PROMPTLY
    assert load_state(folder)[0]["training"]["step"] == 4
    armed.unlink()
    assert forks.resume(folder, "data.timeout_seconds=300.0").code == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("kill", -signal.SIGKILL, "vocseg: the process was killed"),
        ("crash", -signal.SIGSEGV, "vocseg: a library crashed in"),
    ],
)
def test_a_run_that_dies_while_it_reads_is_spoken_for(forks, project, armed, how, code, said):
    write_recipe(project, how)
    whole = forks.start(out="whole")
    assert whole.code == 0, whole.said
    armed.touch()
    ended = forks.start('data.bad_split="val"')
    assert ended.code == code
    assert ended.seconds < PROMPTLY
    (line,) = [line for line in ended.said.splitlines() if line.startswith("vocseg: ")]
    assert line.startswith(said)
    assert "images being read: val/photo_3;" in line
    folder = forks.folder()
    assert line.endswith(f"go on with: vocseg run --resume {folder}")
    armed.unlink()
    assert forks.resume(folder).code == 0
    left, wanted = (forks.left(f) for f in (folder, forks.folder("whole")))
    assert left["model.safetensors"] == wanted["model.safetensors"]
    assert left["state.optimizer"] == wanted["state.optimizer"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
def test_a_run_that_dies_before_it_saved_anything_is_told_so(forks, project, armed):
    write_recipe(project, "kill")
    armed.touch()
    ended = forks.start("train.checkpoint_minutes=60.0", 'data.bad_split="val"')
    assert ended.code == -signal.SIGKILL
    assert "no state was saved yet in " in ended.said
    refused = forks.start("model.width=-1")
    assert refused.code > 0
    assert "vocseg: " not in refused.said  # it ended in good order, with an error of its own


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
def test_what_threads_are_at_can_be_read_in_the_shared_memory():
    with witness.witnessed():
        memory = witness._shared
        assert "no image was being read" in witness._account(memory, "")
        busy, free = threading.Barrier(4), threading.Barrier(4)

        def work(name):
            witness.at(name)
            busy.wait()
            free.wait()
            witness.at("")

        threads = [threading.Thread(target=work, args=(name,)) for name in ("a\x1b[31m", "ä" * 300, "c")]
        for thread in threads:
            thread.start()
        busy.wait()
        account = witness._account(memory, "")
        assert "a\x1b[31m, c, ääää" in account
        free.wait()
        for thread in threads:
            thread.join()
        assert "no image was being read" in witness._account(memory, "")
        assert len(witness._free) == witness._SLOTS


def test_to_say_what_a_thread_is_at_takes_a_few_microseconds():
    def cost() -> float:
        begun = time.perf_counter()
        for _ in range(2000):
            witness.at("2007_000032")
        return (time.perf_counter() - begun) / 2000

    with witness.witnessed():
        assert min(cost() for _ in range(5)) < 2e-5
    witness.at("")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
@pytest.mark.parametrize("end", ["good", "killed", "left behind"])
def test_a_witness_ends_with_its_run_and_holds_nothing_open(end, tmp_path):
    # In a program of its own: no torch, no threads.
    script = f"""
import os, signal, sys, subprocess
from vocseg.witness import witnessed
with witnessed():
    print("said", flush=True)
    if {end!r} == "left behind":  # a process that has all that this one has open, and lives on
        if not os.fork():
            import time
            os.close(1), os.close(2), time.sleep(3), os._exit(0)
    if {end!r} != "good":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    begun = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert ended.stdout == "said\n"  # capture_output waits until nobody holds the pipes open any more
    assert ended.returncode == (0 if end == "good" else -signal.SIGKILL)
    assert ("the process was killed" in ended.stderr) == (end != "good")
    assert ended.stderr.count("\n") == (end != "good")
    assert time.monotonic() - begun < 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
def test_a_run_ends_though_a_process_of_it_lives_on(tmp_path):
    script = """
import os, time
from vocseg.witness import witnessed
with witnessed():
    if not os.fork():  # it has all that this one has open
        os.close(1), os.close(2), time.sleep(20), os._exit(0)
print("through", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "through\n", "")
    assert time.monotonic() - begun < 10


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot suspend a process")
def test_a_process_that_was_suspended_has_no_image_that_hangs():
    script = """
import numpy as np
from vocseg.data.dataset import Dataset
from vocseg.data.threads import Readers, read
def pixels(index):
    print("reading", flush=True)
    input()
    return np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)
data = Dataset(("a", "b"), ("slow",), pixels, timeout=6.0)
readers = Readers(1, data.timeout)
print(readers.result(readers.submit(read, data, 0))[1].shape, flush=True)
readers.close()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    process.send_signal(signal.SIGCONT)
    time.sleep(2.5)  # it looks at its thread twice, which is still at the image
    assert process.communicate("\n", timeout=30)[0] == "(4, 4)\n"
    assert process.returncode == 0
