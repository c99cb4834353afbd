"""Whether a disk has room for a run."""

import shutil
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from vocseg.runs.checkpoint import KEPT

_REST = 5_000_000  # bytes: mostly pictures, which take 2 MB or so


def short_of_room(run: Path, network: nn.Module, optimizer: Optimizer, average: bool) -> tuple[str, ...]:
    """A note where the disk has less room than the run will take.

    Args:
        run: its folder.
        average: of the weights, which is kept beside them.
    """
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    state = weights * (2 if average else 1) + optimizer_bytes(optimizer)
    needed = (KEPT + 1) * state + 2 * weights + _REST  # what is replaced stays until the new is whole
    try:
        needed -= sum(path.stat().st_size for path in run.iterdir())
        free = shutil.disk_usage(run).free
    except OSError:
        return ()
    if free >= needed:
        return ()
    room = f"the run may take {needed / 1e6:,.0f} MB more, and {free / 1e6:,.0f} MB are free"
    return (f"{run}: {room}; free space, or choose another --out",)


def optimizer_bytes(optimizer: Optimizer) -> int:
    """About what its state takes once it has made a step: by its settings, a tensor or more for each parameter."""
    size = 0
    for group in optimizer.param_groups:
        tensors = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum", True)))
        size += tensors * sum(parameter.nbytes for parameter in group["params"])
    return size
