"""The training loop. `train` is a generator: its caller's `for` body logs, saves and stops.

Everything random is a function of (seed, step) and everything that changes is in `Training`, so that a state
saved after any step goes on as if nothing had happened. Where several processes train together, each runs this loop
over its share of every batch, and all of them make the same steps.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vocseg.data.loader import TrainingBatches
from vocseg.device import Placement
from vocseg.distributed import ALONE, World
from vocseg.evaluate.scores import scores
from vocseg.evaluate.validation import Evaluation, Scored
from vocseg.network import AUXILIARY_WEIGHT, Normalization, outputs, set_training
from vocseg.train.ema import Ema
from vocseg.train.feed import on_device
from vocseg.train.nonfinite import (
    IN_A_ROW,
    NonFinite,
    NonFiniteError,
    Taken,
    Watch,
    all_finite,
    gradients_finite,
    state_finite,
)


@dataclass
class Training:
    """All that training needs, and all that it changes.

    Attributes:
        skip_nonfinite: leave out a step whose loss or gradient is not finite, which waits for the device at each step;
            else it ends the training.
        schedule: global step from 0 -> factor on each parameter group's first learning rate.
        epoch: the epoch that is under way, from 0.
        step: steps done in that epoch.
        left_out: those of them that were left out, since loss or gradient were not finite.
        loss_sum: sum of this process's step losses of that epoch, on the device.
        seconds: wall-clock time spent so far, validation included, earlier sittings too.
        seconds_training: the part of it that went into steps.
        images: images trained on so far, by all processes.
    """

    network: nn.Module
    backbone: nn.Module | None
    batches: TrainingBatches
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    placement: Placement
    stride: int
    normalization: Normalization
    epochs: int
    seed: int
    accumulate: int = 1
    clip: float | None = None
    ema: Ema | None = None
    frozen_epochs: int = 0  # epochs, from the first, in which the encoder does not train
    validate_every: int = 1
    compile: bool = False
    skip_nonfinite: bool = False
    limit_seconds: float | None = None
    world: World = ALONE
    base_lrs: list[float] = field(init=False)
    epoch: int = 0
    step: int = 0
    left_out: int = 0
    loss_sum: Tensor = field(init=False)
    seconds: float = 0.0
    seconds_training: float = 0.0
    images: int = 0

    def __post_init__(self) -> None:
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.loss_sum = torch.zeros((), device=self.placement.device)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.batches), self.accumulate)

    @property
    def batches_per_step(self) -> int:
        return min(self.accumulate, len(self.batches))

    @property
    def last_lr(self) -> float:
        """The learning rate of the step before, of the parameters that have no factor of their own."""
        return self.base_lrs[0] * self.schedule(self.epoch * self.steps_per_epoch + max(self.step - 1, 0))

    @property
    def out_of_time(self) -> bool:
        return self.limit_seconds is not None and self.seconds >= self.limit_seconds

    @property
    def ended(self) -> bool:
        """Whether no epoch is left to train: all are done, or the time was up before the next one began."""
        return self.epoch >= self.epochs or (self.epoch > 0 and self.step == 0 and self.out_of_time)

    @property
    def scored_network(self) -> nn.Module:
        """The network whose scores count: the average of the weights where one is kept."""
        return self.network if self.ema is None else self.ema.network

    def state(self) -> dict[str, Any]:
        """Tensors and plain data from which `load` goes on; all processes have to ask for it together."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.network.state_dict(),
            "ema_updates": 0 if self.ema is None else self.ema.updates,
            "epoch": self.epoch,
            "step": self.step,
            "left_out": self.left_out,
            "loss_sum": self.world.every(self.loss_sum),
            "seconds": self.seconds,
            "seconds_training": self.seconds_training,
            "images": self.images,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.network.load_state_dict(state["ema"])
            self.ema.updates = state["ema_updates"]
        self.epoch, self.step, self.left_out = state["epoch"], state["step"], state["left_out"]
        sums = state["loss_sum"]
        own = sums[self.world.rank] if len(sums) == self.world.size else sums.mean()
        self.loss_sum = own.to(self.placement.device, torch.float32)
        self.seconds, self.seconds_training = state["seconds"], state["seconds_training"]
        self.images = state["images"]

    def is_finite(self, state: dict[str, Any]) -> bool:
        """Whether a copy of a state, on the CPU, is one to go on from."""
        return state_finite(self.network, state)


@dataclass(frozen=True)
class Step:
    """One optimizer step is done, or left out. `loss` is on the device: reading it waits for the device."""

    epoch: int
    step: int
    loss: Tensor
    lr: float
    images: int
    left_out: NonFinite | None = None


@dataclass(frozen=True)
class Epoch:
    """One epoch is done. The validation figures are None in epochs that were not validated."""

    epoch: int
    train_loss: float
    val_loss: float | None
    miou: float | None
    pixel_accuracy: float | None
    lr: float
    images_per_second: float
    seconds: float

    def metric(self, name: str) -> float | None:
        return getattr(self, name)


def steps_per_epoch(batches: int, accumulate: int) -> int:
    """Optimizer steps an epoch; an epoch of fewer batches than `accumulate` still makes one."""
    return max(1, batches // accumulate)


def combined_loss(loss: Callable[[Tensor, Tensor], Tensor], named: dict[str, Tensor], target: Tensor) -> Tensor:
    """The loss of the network's logits, its auxiliary ones with a smaller weight."""
    total = loss(named["out"], target)
    for name, logits in named.items():
        if name != "out":
            total = total + AUXILIARY_WEIGHT * loss(logits, target)
    return total


def train(
    training: Training, validate: Callable[[nn.Module], Generator[Scored, None, Evaluation]]
) -> Generator[Step | Scored | Epoch, None, None]:
    """Trains from where `training` stands to its last epoch, or until its time is up.

    Yields a `Step` after each optimizer step, a `Scored` after each validated image and an `Epoch` after each
    epoch; at each of them `training` is consistent and can be saved. Whoever stops iterating stops the training.

    Raises:
        NonFiniteError: the loss or the weights are not finite.
    """
    per_epoch = training.steps_per_epoch * training.batches_per_step
    skip = training.step * training.batches_per_step
    with closing(training.batches.epochs(training.epoch, training.epochs, skip=skip, per_epoch=per_epoch)) as batches:
        yield from _epochs(training, validate, on_device(batches, training.placement))


def _epochs(
    t: Training, validate: Callable[[nn.Module], Generator[Scored, None, Evaluation]], batches: Iterator
) -> Iterator[Step | Scored | Epoch]:
    network: nn.Module | None = None
    watch = Watch(t.placement.device)
    in_a_row = 0
    while not t.ended:  # where the time was up before this epoch began, the one before has been validated
        set_training(t.network, t.backbone, frozen=t.epoch < t.frozen_epochs)
        if network is None or t.epoch == t.frozen_epochs:  # from here on other parameters train
            network = t.world.parallel(t.network)
            forward: Callable[[Tensor], Any] = torch.compile(network) if t.compile else network
        images_before, seconds_before = t.images, t.seconds_training
        clock = time.perf_counter()
        steps = t.steps_per_epoch
        while t.step < steps and not t.out_of_time:
            global_step = t.epoch * steps + t.step
            factor = t.schedule(global_step)
            lr = t.base_lrs[0] * factor
            for group, base in zip(t.optimizer.param_groups, t.base_lrs, strict=True):
                group["lr"] = base * factor
            # Dropout draws from torch's generator: seeding each step makes it a function of the step (and the process).
            t.placement.seed((t.seed << 31) + (t.world.rank << 24) + global_step)
            loss, seen, left_out = _optimizer_step(t, network, forward, batches, lr)
            if left_out is None:
                t.loss_sum += loss
                in_a_row = 0
                if t.placement.device.type != "cpu" and not t.skip_nonfinite:
                    bad = watch.first_bad(Taken(t.epoch, t.step, lr, loss), t.loss_sum)
                    if bad is not None:
                        raise NonFiniteError(_found(t, bad))
            else:
                t.left_out += 1
                in_a_row += 1
                if in_a_row == IN_A_ROW:
                    raise NonFiniteError(left_out, f"; {IN_A_ROW} steps in a row were left out")
            t.step += 1
            t.images += seen
            elapsed = time.perf_counter() - clock
            t.seconds += elapsed
            t.seconds_training += elapsed
            if t.limit_seconds is not None:  # it is for all processes to stop after the same step
                (t.seconds,) = t.world.largest(t.seconds)
            yield Step(t.epoch, t.step, loss, lr, seen, left_out)
            clock = time.perf_counter()
        taken = t.step - t.left_out
        train_loss = float(t.world.every(t.loss_sum).mean()) / taken if taken else math.nan
        t.seconds_training += time.perf_counter() - clock  # the wait for steps that the device has yet to do
        _refuse_nonfinite(t, watch, train_loss)
        speed = (t.images - images_before) / max(t.seconds_training - seconds_before, 1e-9)
        done = t.epoch + 1
        val_loss = miou = accuracy = None
        now = time.perf_counter()
        (t.seconds,) = t.world.largest(t.seconds + now - clock)
        clock = now
        lr = t.last_lr
        if done % t.validate_every == 0 or done == t.epochs or t.out_of_time:
            evaluation = yield from validate(t.scored_network)
            figures = scores(evaluation.matrix)
            val_loss, miou, accuracy = evaluation.loss, figures.miou, figures.pixel_accuracy
            (t.seconds,) = t.world.largest(t.seconds + time.perf_counter() - clock)
        t.epoch, t.step, t.left_out = done, 0, 0
        t.loss_sum = torch.zeros_like(t.loss_sum)
        yield Epoch(done, train_loss, val_loss, miou, accuracy, lr, speed, t.seconds)


def _optimizer_step(
    t: Training, network: nn.Module, forward: Callable[[Tensor], Any], batches: Iterator, lr: float
) -> tuple[Tensor, int, NonFinite | None]:
    """Forward and backward over `accumulate` batches, then one step, unless it is to be left out.

    Returns:
        The mean loss, the images seen, and why there was no step.
    """
    buffers = [buffer.clone() for buffer in t.network.buffers()] if t.skip_nonfinite else []
    total: Tensor | None = None
    seen = 0
    parts = t.batches_per_step
    for part in range(parts):
        pixels, labels = next(batches)
        target = labels.long()
        images = t.placement.lay_out(t.normalization(pixels))
        last = part == parts - 1
        # The images of a batch are of one size, and so are batches then; of single images each may be of another.
        with t.world.without_exchange(network, not last), t.placement.kernels_tried(len(pixels) > 1):
            with t.placement.autocast():
                named = outputs(forward, images, t.stride)
            loss = combined_loss(t.loss, named, target)
            if parts > 1:
                loss = loss / parts
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
        seen += len(pixels) * t.world.size
    assert total is not None
    if t.skip_nonfinite:
        sound = math.isfinite(float(total)) and gradients_finite(t.network)
        if t.world.largest(not sound)[0]:
            with torch.no_grad():
                for buffer, before in zip(t.network.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            t.optimizer.zero_grad(set_to_none=True)
            losses = t.world.every(total)  # and the one to tell of may be another process's
            worst = next((loss for loss in losses if not loss.isfinite()), total)
            return total, seen, _found(t, Taken(t.epoch, t.step, lr, worst), skipped=True)
    # On the CPU nothing is waited for; as an array, so that a test may refuse what would wait for a GPU.
    elif total.device.type == "cpu" and not math.isfinite(float(total.float().numpy())):
        raise NonFiniteError(_found(t, Taken(t.epoch, t.step, lr, total)))
    if t.clip is not None:
        torch.nn.utils.clip_grad_norm_(t.network.parameters(), t.clip)
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    if t.ema is not None:
        t.ema.update(t.network)
    return total, seen, None


def _refuse_nonfinite(t: Training, watch: Watch, train_loss: float) -> None:
    """Ends the training where an epoch leaves a loss or weights that are not finite: those are neither scored nor kept.

    Raises:
        NonFiniteError: for the step it came from, as far as that is known.
    """
    last = Taken(t.epoch, max(t.step, 1) - 1, t.last_lr, torch.tensor(train_loss))
    if t.step and t.left_out == t.step:
        raise NonFiniteError(_found(t, last, skipped=True), "; all steps of the epoch were left out")
    bad = watch.look() if not math.isfinite(train_loss) else None
    networks = [t.network] if t.ema is None else [t.network, t.ema.network]
    weights = (p for network in networks for p in network.parameters())
    if math.isfinite(train_loss) and all_finite(weights):
        return
    raise NonFiniteError(_found(t, bad or last), "; the weights are not finite after it" if bad is None else "")


def _found(t: Training, at: Taken, *, skipped: bool = False) -> NonFinite:
    """What to tell of a step that is not finite; waits for the device."""

    def names(step: int) -> tuple[str, ...]:
        return tuple(t.batches.names(at.epoch, step * t.batches_per_step, t.batches_per_step)) if step >= 0 else ()

    now = (at.epoch, at.step) == (t.epoch, t.step)  # else the weights have changed since
    return NonFinite(
        epoch=at.epoch + 1,
        step=at.step + 1,
        lr=at.lr,
        loss=float(at.loss),
        names=names(at.step),
        names_before=names(at.step - 1),
        weights_finite=all_finite(t.network.parameters()) if now else None,
        skipped=skipped,
    )
