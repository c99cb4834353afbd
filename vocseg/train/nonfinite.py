"""Losses that are not finite: found at the step they come from, without waiting for a GPU at each.

On the CPU a loss is read in a microsecond, before the step's update is made. From CUDA the running sum of the losses is
copied to the host now and then, beside the kernels, and looked at once it has arrived: a few steps late, which is when
the steps since the look before are gone through.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vocseg.data.lists import first_few
from vocseg.errors import Problem, TrainingError

IN_A_ROW = 10
"""So many steps that are left out one after the other end the run."""

REMEDY = 'lower optimizer.lr, set train.clip, or use train.precision = "fp32"'

_SHOWN = 8  # images that a message names
_EVERY = 50  # steps between two looks, where a device cannot copy beside its work


@dataclass(frozen=True)
class NonFinite:
    """A step whose loss or gradient is not finite.

    Attributes:
        epoch, step: from 1.
        loss: its mean over the images of one process.
        names: of the step's images, without the partners that were mixed in.
        names_before: of the step before. It is what broke the weights, where `weights_finite` is False.
        weights_finite: before the step; None where that cannot be told any more.
        skipped: the step was left out, and the run went on.
    """

    epoch: int
    step: int
    lr: float
    loss: float
    names: tuple[str, ...]
    names_before: tuple[str, ...]
    weights_finite: bool | None
    skipped: bool

    def __str__(self) -> str:
        said = f"epoch {self.epoch}, step {self.step}: the training loss is {self.loss:g}"
        if math.isfinite(self.loss):
            said = f"epoch {self.epoch}, step {self.step}: the gradient is not finite (training loss {self.loss:g})"
        if self.weights_finite is False:
            return (
                f"{said}, since the step before broke the weights; its images: {first_few(self.names_before, _SHOWN)}"
            )
        return f"{said}; images: {first_few(self.names, _SHOWN)}"


class NonFiniteError(TrainingError):
    """Training stops at a step that is not finite.

    Args:
        why: it stops, where such steps are left out.
    """

    def __init__(self, found: NonFinite, why: str = ""):
        more = "" if found.skipped else ', or leave such steps out by train.on_nonfinite = "skip"'
        super().__init__(Problem("", f"{found}{why}; {REMEDY}{more}"))
        self.found = found


class Taken(NamedTuple):
    """A step that was taken; its loss is on the device."""

    epoch: int
    step: int
    lr: float
    loss: Tensor


class Watch:
    """Sees to the losses of a device that is not to be waited for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._unseen: deque[Taken] = deque()
        self._sent: tuple[int, Tensor, torch.cuda.Event] | None = None  # how many of them, and the sum on its way

    def first_bad(self, taken: Taken, loss_sum: Tensor) -> Taken | None:
        """The first step that was not finite, if by now one is known.

        Args:
            loss_sum: of all steps up to this one.
        """
        self._unseen.append(taken)
        if self._device.type != "cuda":
            return self.look() if len(self._unseen) >= _EVERY else None
        if self._sent is None:
            self._send(loss_sum, torch.empty((), pin_memory=True))
            return None
        count, arrived, event = self._sent
        if not event.query():
            return None
        if not math.isfinite(float(arrived)):
            return self.look()
        for _ in range(count):
            self._unseen.popleft()
        self._send(loss_sum, arrived)
        return None

    def look(self) -> Taken | None:
        """The first step that was not finite, of those not looked at; waits for the device."""
        unseen, self._unseen, self._sent = self._unseen, deque(), None
        return next((taken for taken in unseen if not math.isfinite(float(taken.loss))), None)

    def _send(self, loss_sum: Tensor, into: Tensor) -> None:
        into.copy_(loss_sum, non_blocking=True)
        self._sent = len(self._unseen), into, torch.cuda.current_stream(self._device).record_event()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in them is infinite or NaN; waits for the device."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return not floating or math.isfinite(float(torch.nn.utils.get_total_norm(floating, math.inf)))


def gradients_finite(network: nn.Module) -> bool:
    return all_finite(p.grad for p in network.parameters() if p.grad is not None)


def state_finite(network: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether training can go on from a state of this network, on the CPU.

    Buffers may be infinite, which masks of attention are, and not NaN.
    """
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    saved = [*state["network"].items(), *(state["ema"] or {}).items()]
    sound = all(not np.isnan(_array(tensor)).any() for name, tensor in saved if name not in weights)
    moments = (v for entry in state["optimizer"]["state"].values() for v in entry.values() if isinstance(v, Tensor))
    tensors = [tensor for name, tensor in saved if name in weights]
    return sound and all(np.isfinite(_array(tensor)).all() for tensor in [*tensors, *moments, state["loss_sum"]])


def _array(tensor: Tensor) -> NDArray[Any]:
    """A tensor of the CPU for NumPy, which computes on the thread that asks.

    States are looked at on a thread of their own. There torch would start a second team of OpenMP's threads, and where
    those are more than cores, none of them spins any more: a small network's steps then took 1.6 times as long.
    """
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
