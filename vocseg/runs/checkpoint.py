"""The state a run goes on from, and the weights it leaves: tensors and plain data, checked before they are read.

A state is a file of its own, `state-<step>-<id>.pt`, and `state.json` names it with its SHA-256 and the one before it.
`state.json` is replaced last, so that it always names a whole file.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vocseg.errors import EnvironmentFault, Problem
from vocseg.runs.files import write_bytes, write_json

KEPT = 2  # states: the last, and one more should the last be damaged


class StateSaver:
    """Saves states while training goes on: each is copied at once, and written by a thread."""

    def __init__(self, folder: Path, thread: ThreadPoolExecutor):
        self._folder = folder
        self._thread = thread
        self._writing: Future[None] | None = None

    def save(self, state: dict[str, Any], step: int, *, if_finite: Tensor | None = None) -> None:
        """Returns once the state is copied, and may be changed.

        Args:
            if_finite: else nothing is written; a GPU is not waited for to see it.

        Raises:
            EnvironmentFault: the state before this one could not be written.
        """
        self.wait()
        copied, condition = _copied((state, if_finite))
        # Copies from a GPU are under way still, and done when all is that was asked of it before this.
        arrived = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if arrived is not None:
            arrived.record()

        def write() -> None:
            if arrived is not None:
                arrived.synchronize()
            if condition is None or condition.isfinite().all():
                save_state(self._folder, copied, step)

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
def state_saver(folder: Path) -> Iterator[StateSaver]:
    """A saver of states, which has written its last when this ends.

    Raises:
        EnvironmentFault: the last state could not be written.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="vocseg-saver") as thread:
        saver = StateSaver(folder, thread)
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


def save_state(folder: Path, state: dict[str, Any], step: int) -> None:
    """Saves a state and forgets all but the last two.

    Raises:
        EnvironmentFault: the disk is full or the folder cannot be written; earlier states are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    name = f"state-{step:08d}-{digest[:8]}.pt"  # never the name of another state that state.json still points to
    write_bytes(folder / name, data)
    entry = {"file": name, "sha256": digest, "step": step}
    entries = [entry, *(e for e in _entries(folder) if e["file"] != name)]
    write_json(folder / "state.json", {"states": entries[:KEPT]})
    for old in entries[KEPT:]:
        (folder / old["file"]).unlink(missing_ok=True)


def load_state(folder: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The newest state that is whole, on the CPU, and what was wrong with newer ones.

    Raises:
        EnvironmentFault: there is no state, or none is whole.
    """
    problems = []
    for entry in _entries(folder):
        path = folder / entry["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            problems.append(Problem(str(path), f"cannot be read: {error.strerror}"))
            continue
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            problems.append(Problem(str(path), "damaged: its SHA-256 is not the one in state.json"))
            continue
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), problems
    raise EnvironmentFault(
        *problems, Problem(str(folder), "no state to resume from; start the recipe again without --resume")
    )


def _entries(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / "state.json").read_bytes())["states"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes weights or counts as safetensors, with plain data to go along."""
    # Tied weights share memory, which the format refuses; contiguous clones are what a reader expects anyway.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    # One key: the format keeps several in no order, and equal runs should leave equal files.
    write_bytes(path, save_safetensors(plain, metadata={"vocseg": json.dumps(metadata)}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        EnvironmentFault: the file is missing or damaged.
    """
    try:
        return load_safetensors(path.read_bytes())
    except OSError as error:
        raise EnvironmentFault(Problem(str(path), f"cannot be read: {error.strerror}; did the run end?")) from None
    except Exception as error:  # safetensors raises its own type for anything wrong inside
        raise EnvironmentFault(Problem(str(path), f"damaged: {error}")) from None
