"""A fault at every call that a run's writing makes to the system: it is said in a line, and nothing is lost."""

import builtins
import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import vocseg.run
from vocseg.errors import EnvironmentFault
from vocseg.recipe.prepare import load_recipe
from vocseg.runs.checkpoint import load_state, remove_leftover_states, save_state
from vocseg.runs.files import remove_unfinished, write_bytes

CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "ftruncate")
ERRORS = {"full": errno.ENOSPC, "forbidden": errno.EACCES, "broken": errno.EIO}
FAULTS = (*ERRORS, "short", "killed")
SHORT = ("train.epochs=2", "schedule.warmup_epochs=0.0", "train.checkpoint_minutes=60.0")  # a state an epoch


class Calls:
    """The calls that change what is below a folder, by number from 0; one of them may go wrong."""

    def __init__(self, root: Path):
        self.root = str(root)
        self.made: list[str] = []
        self.number: int | None = None
        self.fault = ""
        self._open: set[int] = set()
        self._real = {name: getattr(os, name) for name in CALLS}

    def call(self, name: str, first: Any, *more: Any, **options: Any) -> Any:
        real = self._real[name]
        ours = first in self._open if isinstance(first, int) else os.fspath(first).startswith(self.root)
        if not ours:
            return real(first, *more, **options)
        here = len(self.made) == self.number
        self.made.append(name)
        if here and name == "write" and self.fault in ("short", "killed"):
            written = real(first, more[0][: (len(more[0]) + 1) // 2])
            if self.fault == "short":
                return written
        if here and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), str(first))
        result = real(first, *more, **options)
        if name == "open":
            self._open.add(result)
        return result


@contextmanager
def watched(root: Path, number: int | None = None, fault: str = "") -> Iterator[Calls]:
    """Counts the calls that write below `root`, and has the one of that number fail."""
    calls = Calls(root)
    calls.number, calls.fault = number, fault
    real_close, real_open = os.close, builtins.open

    def close(descriptor: int) -> None:
        calls._open.discard(descriptor)
        real_close(descriptor)

    def open_file(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if isinstance(file, str | Path) and set(mode) & set("wxa"):  # by other libraries, such as for a picture
            return calls_open_file(file, mode, *more, **options)
        return real_open(file, mode, *more, **options)

    def calls_open_file(file: Any, *more: Any, **options: Any) -> Any:
        here = len(calls.made) == calls.number
        if os.fspath(file).startswith(calls.root):
            calls.made.append("open")
            if here and calls.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if here and calls.fault in ERRORS:
                raise OSError(ERRORS[calls.fault], os.strerror(ERRORS[calls.fault]), str(file))
        return real_open(file, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, lambda *given, _name=name, **options: calls.call(_name, *given, **options))
        patch.setattr(os, "close", close)
        patch.setattr(builtins, "open", open_file)
        yield calls


def in_child(act: Callable[[], object]) -> int:
    """The exit code of a forked process that does that: minus the number of a signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the child uses none
        child = os.fork()
    if not child:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(step: int) -> dict[str, Any]:
    return {"training": {"step": step, "weight": torch.full((50, 50), float(step))}}


def save(folder: Path, step: int) -> None:
    save_state(folder, state(step), step, "this run")


def loaded(folder: Path) -> int:
    """The step of the state that a run would go on from; it is the state that was saved there."""
    found, problems = load_state(folder, "this run")
    step = found["training"]["step"]
    assert problems == []
    assert torch.equal(found["training"]["weight"], state(step)["training"]["weight"])
    return step


def calls_of(act: Callable[[], object], root: Path) -> list[str]:
    with watched(root) as calls:
        act()
    return calls.made


def one_line_naming(error: EnvironmentFault, folder: Path, fault: str) -> None:
    (line,) = str(error).splitlines()
    assert line.startswith(str(folder))
    assert os.strerror(ERRORS[fault]) in line
    assert ("needed: " in line and "free: " in line and str(folder) in line) or fault != "full"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the states of steps 10 and 20."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for step in (10, 20):
        save(folder, step)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_saving_a_state_leaves_a_state_and_the_next_save_is_as_ever(saved, tmp_path, fault):
    if fault == "killed" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    shutil.copytree(saved, tmp_path / "counted")
    made = calls_of(lambda: save(tmp_path / "counted", 30), tmp_path / "counted")
    # Two files of an open, write, fsync, rename and a folder's open and fsync each; then the oldest state goes.
    assert made == ["open", "write", "fsync", "replace", "open", "fsync"] * 2 + ["unlink"]
    for number, name in enumerate(made):
        if fault == "short" and name != "write":
            continue
        folder = tmp_path / f"{number}"
        shutil.copytree(saved, folder)
        if fault == "killed":
            with watched(folder, number, fault):
                assert in_child(lambda folder=folder: save(folder, 30)) == -signal.SIGKILL
        elif fault == "short" or name == "unlink":  # a state too many harms nobody
            with watched(folder, number, fault):
                save(folder, 30)
        else:
            with watched(folder, number, fault), pytest.raises(EnvironmentFault) as error:
                save(folder, 30)
            one_line_naming(error.value, folder, fault)
        assert loaded(folder) == (30 if number > 9 or fault == "short" else 20), (number, name)
        if fault != "killed":
            assert not list(folder.glob(".*")), "a file that nobody will read"
        remove_unfinished(folder)
        remove_leftover_states(folder)
        save(folder, 40)
        assert loaded(folder) == 40
        assert len(list(folder.iterdir())) == 3, "two states and state.json"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_writing_a_file_leaves_the_old_or_the_new(tmp_path, fault):
    if fault == "killed" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    old, new = b"old" * 1000, b"new" * 5000
    path = tmp_path / "file"
    made = calls_of(lambda: write_bytes(path, old), tmp_path)
    for number, name in enumerate(made):
        write_bytes(path, old)
        with watched(tmp_path, number, fault):
            if fault == "killed":
                assert in_child(lambda: write_bytes(path, new)) == -signal.SIGKILL
            elif fault == "short":
                write_bytes(path, new)
            else:
                with pytest.raises(EnvironmentFault) as error:
                    write_bytes(path, new)
                one_line_naming(error.value, tmp_path, fault)
        assert path.read_bytes() == (new if number > 3 or fault == "short" else old), name
        remove_unfinished(tmp_path)
        assert list(tmp_path.iterdir()) == [path]


def run(project: Path, out: Path, resumed: Path | None = None) -> None:
    if resumed is not None:
        events = vocseg.run.resume(resumed, device="cpu")
    else:
        recipe, _ = load_recipe(str(project / "tiny.toml"), overrides=SHORT)
        events = vocseg.run.start(recipe, out=out, device="cpu")
    for _ in events:
        pass


def run_with_a_fault(project: Path, out: Path, number: int, fault: str) -> None:
    with watched(out, number, fault) as calls:
        if fault == "killed":
            assert in_child(lambda: run(project, out)) == -signal.SIGKILL
            return
        error = fault_of(lambda: run(project, out))
    if error is None:  # all was written, or a state could not be removed
        assert fault == "short" or calls.made[number] == "unlink"
        return
    assert error.exit_code == 4
    lines = str(error).splitlines()
    assert any(os.strerror(ERRORS[fault]) in line for line in lines)
    assert all(line.startswith(str(out)) for line in lines)


def fault_of(act: Callable[[], object]) -> EnvironmentFault | None:
    try:
        act()
    except EnvironmentFault as error:
        return error
    return None


def go_on(project: Path, out: Path) -> Path:
    """Resumes what there is, or starts again where there is nothing that could be lost. Gives the run's folder."""
    found = next(iter(out.glob("*/*/state.json")), None)
    if found is None:
        shutil.rmtree(out, ignore_errors=True)
        run(project, out)
    elif not (found.parent / "result.json").is_file():
        assert load_state(found.parent)[1] == []
        run(project, out, resumed=found.parent)
    (folder,) = {path.parent for path in out.glob("*/*/state.json")}
    return folder


def faults_over_a_run(project, forks, whole, every: int) -> int:
    """Faults in turn at one call in so many of a run, all of them at each where that is one. Gives their number."""
    expected = whole(*SHORT).left
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocseg.run, "write_pictures", lambda *given: None)  # they take most of the time
        made = calls_of(lambda: run(project, project / "counted"), project / "counted")
        cases = [(number, fault) for number in range(len(made)) for fault in FAULTS]
        cases = [(number, fault) for number, fault in cases if fault != "short" or made[number] == "write"]
        chosen = cases[:: every * len(FAULTS) - 1] if every > 1 else cases  # another fault each time
        for number, fault in chosen:
            out = project / f"{number}-{fault}"
            try:
                run_with_a_fault(project, out, number, fault)
                assert forks.left(go_on(project, out)) == expected
            except BaseException as error:
                error.add_note(f"{fault} at call {number} of {len(made)}, {made[number]}")
                raise
            shutil.rmtree(out)
    return len(chosen)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fault_while_a_run_writes_costs_nothing_but_the_work_since_the_last_save(project, forks, whole):
    assert faults_over_a_run(project, forks, whole, every=8) >= 10


@pytest.mark.long
def test_each_fault_at_every_call_of_a_run_costs_nothing_but_the_work_since_the_last_save(project, forks, whole):
    assert faults_over_a_run(project, forks, whole, every=1) >= 300


def test_pictures_that_cannot_be_written_cost_neither_the_figures_nor_the_weights(project):
    recipe, _ = load_recipe(str(project / "tiny.toml"), overrides=SHORT)
    events = []

    def follow() -> None:
        for event in vocseg.run.start(recipe, out=project / "runs", device="cpu"):
            if isinstance(event, vocseg.run.Started):
                (event.run / "iou.png").mkdir()  # no file can take its place
            events.append(event)

    error = fault_of(follow)
    assert error is not None
    (line,) = str(error).splitlines()
    assert "not all pictures could be drawn" in line
    assert isinstance(events[-1], vocseg.run.Finished)
    folder = events[-1].run
    assert all((folder / name).is_file() for name in ("result.json", "model.safetensors", "curves.png"))
