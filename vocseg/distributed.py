"""Several processes that train one network: who is who, and what they tell each other.

`torchrun` starts the processes and says who each is; they meet in `join`. A process that trains by itself is a world of
one, in which every exchange gives back what it got. All processes have to make the same exchanges in the same order.
"""

import gc
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vocseg.errors import EnvironmentFault, Problem, one_line

_PATIENCE = timedelta(minutes=30)  # for the others: as long as the longest that one does alone, such as a download


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this process, from 0. The first one writes the run folder and speaks.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network as all processes train it: the same start, and the mean of their gradients in every step.

        It has to be made anew when other parameters than before are trained.
        """
        if self.size == 1:
            return network
        return DistributedDataParallel(network, gradient_as_bucket_view=True)

    def without_exchange(self, network: nn.Module, wanted: bool = True) -> AbstractContextManager:
        """Backward passes inside keep their gradients to themselves, to be exchanged with those of a later one."""
        return network.no_sync() if wanted and isinstance(network, DistributedDataParallel) else nullcontext()

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return [*values]
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def total(self, counts: NDArray) -> NDArray:
        """The sums over all processes of an array of the same shape and type in each."""
        if self.size == 1:
            return counts
        shared = torch.from_numpy(np.ascontiguousarray(counts))
        dist.all_reduce(shared)
        return shared.numpy()

    def every(self, value: Tensor) -> Tensor:
        """A scalar of each process by rank, (size,) on its device, which is not waited for."""
        if self.size == 1:
            return value.reshape(1)
        own = value.new_zeros(self.size)
        own[self.rank] = value
        dist.all_reduce(own)
        return own

    def follow_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors by those of the first process."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    plain = tensor.contiguous()  # which channels_last is not, and broadcast asks for
                    dist.broadcast(plain, 0)
                    tensor.copy_(plain)

    def text_of_first(self, text: str) -> str:
        """What the first process says; what the others pass is ignored."""
        if self.size == 1:
            return text
        said = [text]
        dist.broadcast_object_list(said, 0)
        return said[0]


ALONE = World()


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The processes that `torchrun` started; a world of one without it.

    Args:
        device: of this process.

    Raises:
        EnvironmentFault: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    # Numbers on the CPU, such as counts and stop requests, are exchanged by gloo without waiting for a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # On one machine torchrun's store lives through a restart, with the addresses of the processes before.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except Exception as error:
        address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
        reason = one_line(error, 200)
        raise EnvironmentFault(
            Problem(
                f"torchrun {address}", f"process {os.environ.get('RANK')} of {size} cannot join the others: {reason}"
            )
        ) from error
    try:
        yield World(dist.get_rank(), size)
    finally:
        gc.collect()  # what trained in parallel is in cycles, and holds on to the group
        dist.destroy_process_group()


def end_process() -> None:
    """Ends a process of `torchrun` that is done; any other goes on.

    It is not taken apart: now and then that finds one of the group's threads at work, and aborts.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def launched() -> str:
    """What tells one start of `torchrun` from another, its restarts of failed processes included; empty without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {os.getppid()}"


def restarted() -> bool:
    """Whether `torchrun --max-restarts` started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
