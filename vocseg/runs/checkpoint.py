"""The state a run goes on from, and the weights it leaves: tensors and plain data, checked before they are read.

A state is a file of its own, `state-<step>-<id>.pt`, and `state.json` names it with its SHA-256 and the one before it.
`state.json` is replaced last, so that it always names a whole file. The id is where the SHA-256 begins, so that states
are found, and known to be whole, without `state.json` too.
"""

import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vocseg.data.tensors import is_plain, load_pickled, load_safetensors
from vocseg.errors import EnvironmentFault, Problem, VocsegError, one_line
from vocseg.runs.files import read_bytes, write_bytes, write_json

KEPT = 2  # states: the last, and one more should the last be damaged
_NAME = re.compile(r"state-(\d{8,18})-([0-9a-f]{8})\.pt")
_OF_ONE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step")  # in torch's optimizers


class StateSaver:
    """Saves states while training goes on: each is copied at once, and written by a thread."""

    def __init__(self, folder: Path, run: str, thread: ThreadPoolExecutor):
        self._folder = folder
        self._run = run
        self._thread = thread
        self._writing: Future[None] | None = None

    def save(
        self, state: dict[str, Any], step: int, *, only_if: Callable[[dict[str, Any]], bool] | None = None
    ) -> None:
        """Returns once the state is copied, and may be changed.

        Args:
            only_if: asked on the thread, with the copy on the CPU, whether it is to be written.

        Raises:
            EnvironmentFault: the state before this one could not be written.
        """
        self.wait()
        copied = _copied(state)
        # Copies from a GPU are under way still, and done when all is that was asked of it before this.
        arrived = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if arrived is not None:
            arrived.record()

        def write() -> None:
            if arrived is not None:
                arrived.synchronize()
            if only_if is None or only_if(copied):
                save_state(self._folder, copied, step, self._run)

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Returns once the last state is on disk.

        Raises:
            EnvironmentFault: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


@contextmanager
def state_saver(folder: Path, run: str = "") -> Iterator[StateSaver]:
    """A saver of states, which has written its last when this ends.

    Args:
        run: whose states they are, `RunFolder.id`.

    Raises:
        EnvironmentFault: the last state could not be written.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="vocseg-saver") as thread:
        saver = StateSaver(folder, run, thread)
        yield saver
        saver.wait()


def _copied(value: Any) -> Any:
    """Tensors and plain data, on the CPU and in memory of their own."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.device.type == "cuda":
            return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
        return value.clone() if value.device.type == "cpu" else value.cpu()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value


class _Entry(NamedTuple):
    """A state on disk, and where its SHA-256 begins."""

    file: str
    sha256: str
    step: int


def save_state(folder: Path, state: dict[str, Any], step: int, run: str = "") -> None:
    """Saves a state and forgets all but the last two.

    Raises:
        EnvironmentFault: the disk is full or the folder cannot be written; earlier states are untouched.
    """
    buffer = io.BytesIO()
    torch.save({**state, "run": run}, buffer)
    data = buffer.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    new = _Entry(f"state-{step:08d}-{digest[:8]}.pt", digest, step)  # never the name of a state with other content
    write_bytes(folder / new.file, data)
    named, unnamed, _ = _states(folder)
    # One from further on was damaged: the run went back behind it.
    before = [entry for entry in (*named, *unnamed) if entry.file != new.file and entry.step <= step]
    kept = [new, *before][:KEPT]
    write_json(folder / "state.json", {"states": [entry._asdict() for entry in kept]})
    _remove_others(folder, kept)


def load_state(folder: Path, run: str | None = None) -> tuple[dict[str, Any], list[Problem]]:
    """The newest state that is whole, on the CPU, and what was wrong with newer ones.

    Args:
        run: whose state it has to be; None takes anyone's.

    Raises:
        EnvironmentFault: there is no state, or none is whole.
    """
    named, unnamed, problems = _states(folder)
    for entry in (*named, *unnamed):
        path = folder / entry.file
        try:
            data = read_bytes(path)
            if not hashlib.sha256(data).hexdigest().startswith(entry.sha256):
                raise EnvironmentFault(Problem(str(path), "damaged: its SHA-256 is not the one it was saved with"))
            return _unpickled(path, data, run), problems
        except EnvironmentFault as error:
            problems.extend(error.problems)
    raise EnvironmentFault(
        *problems, Problem(str(folder), "no state to resume from; start the recipe again without --resume")
    )


def _unpickled(path: Path, data: bytes, run: str | None) -> dict[str, Any]:
    try:
        state = load_pickled(io.BytesIO(data))
    except pickle.UnpicklingError as error:
        reason = "refused: it holds more than tensors and plain data, which vocseg never saves"
        raise EnvironmentFault(Problem(str(path), reason)) from error
    except Exception as error:  # torch has many
        raise EnvironmentFault(Problem(str(path), f"damaged: {one_line(error)}")) from error
    if not isinstance(state, dict):
        raise EnvironmentFault(Problem(str(path), f"expected the state of a run, found {type(state).__name__}"))
    if run is not None and state.get("run") != run:
        raise EnvironmentFault(Problem(str(path), "refused: it is the state of another run"))
    return state


def remove_leftover_states(folder: Path) -> None:
    """Removes states that were written, but not named before the writer was killed.

    Nothing is removed where `state.json` names none: the others may be needed.
    """
    named, _, _ = _states(folder)
    if named:
        _remove_others(folder, named)


def _remove_others(folder: Path, kept: list[_Entry]) -> None:
    names = {entry.file for entry in kept}
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and path.name not in names:
            with suppress(OSError):  # the next save tries again
                path.unlink()


def _states(folder: Path) -> tuple[list[_Entry], list[_Entry], list[Problem]]:
    """The states that `state.json` names, newest first, then the others that are there, and what is wrong with it."""
    found = [match for path in folder.glob("state-*.pt") if (match := _NAME.fullmatch(path.name))]
    others = sorted((_Entry(m[0], m[2], int(m[1])) for m in found), key=lambda entry: entry.step, reverse=True)
    path = folder / "state.json"
    try:
        named = [_Entry(**entry) for entry in json.loads(read_bytes(path))["states"]]
        for file, sha256, step in named:  # a name is joined to the folder and may be removed: it must not lead out
            match = _NAME.fullmatch(file)
            if match is None or int(match[1]) != step or not sha256.startswith(match[2]):
                raise ValueError(f"'{file}' is no name of a state")
    except (VocsegError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "missing" if not path.exists() else f"damaged: {one_line(error, 100)}"
        return [], others, [Problem(str(path), reason)] if others else []
    names = {entry.file for entry in named}
    return named, [entry for entry in others if entry.file not in names], []


def check_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Looks at what `optimizer.load_state_dict` is to get, which looks at no shape.

    Raises:
        ValueError: it belongs to other parameters; fused kernels would then write beyond the end of the smaller tensor.
        KeyError, TypeError, AttributeError: it is no optimizer's state.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("its optimizer has other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in own for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    for number, kept in state["state"].items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and not is_plain(value):
                raise ValueError(f"its optimizer's {name} is not a plain tensor")
            if name not in _OF_ONE_PARAMETER or not isinstance(value, torch.Tensor):
                continue
            expected = torch.Size() if name == "step" else by_number[number].shape
            if value.shape != expected or not value.is_floating_point():
                found = f"{tuple(value.shape)} {value.dtype}"
                raise ValueError(f"its optimizer's {name} of parameter {number} is {found}, not {tuple(expected)}")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes weights or counts as safetensors, with plain data to go along."""
    # Tied weights share memory, which the format refuses; contiguous clones are what a reader expects anyway.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    # One key: the format keeps several in no order, and equal runs should leave equal files.
    write_bytes(path, save_safetensors(plain, metadata={"vocseg": json.dumps(metadata)}))


def differing_tensors(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one has, or that differ in shape or kind."""
    kinds, others = ({key: (t.shape, t.dtype) for key, t in tensors.items()} for tensors in (saved, own))
    return sorted({key for key, _ in kinds.items() ^ others.items()})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        EnvironmentFault: the file is missing or damaged.
    """
    data = read_bytes(path)
    try:
        return load_safetensors(data)
    except Exception as error:  # safetensors raises its own type for anything wrong inside
        raise EnvironmentFault(Problem(str(path), f"damaged: {one_line(error)}")) from None
