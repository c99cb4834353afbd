"""Whether a network trains faster in bf16 than in fp32 on this machine, which is tried rather than guessed.

Not here: whether a device computes in bf16 at all (`vocseg/device.py`).
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from vocseg.device import Placement
from vocseg.errors import one_line
from vocseg.network import Normalization, outputs, set_training
from vocseg.train.loop import combined_loss

WORTH = 1.05  # bf16 has to be this many times as fast to be chosen
CLEAR = 1.3  # no more rounds after two in a row that were this many times as fast


def try_bf16(
    network: nn.Module,
    backbone: nn.Module | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    *,
    placement: Placement,
    stride: int,
    normalization: Normalization,
    infer: Callable[[nn.Module, str], Callable[[], object]],
    frozen: bool = False,
    clock: Callable[[], float] = time.process_time,
) -> tuple[str, str]:
    """Trains a copy of a network for a few steps in each precision, and leaves everything as it was.

    Args:
        network: on its device.
        batch: images (b, h, w, 3) uint8 and masks (b, h, w) uint8, of the size that is trained on.
        infer: from a network in eval mode and a precision to what lets one image through; tried where training is
            faster in fp32, which it is for convolutions that look at few channels, in their backward pass alone.
        frozen: the encoder is not trained.

    Returns:
        The precision, as in `Placement`, and what was measured, for the user.
    """
    pixels, target = placement.send(batch[0]), placement.send(batch[1]).long()

    def step(precision: str) -> None:
        with replace(placement, precision=precision).autocast():
            named = outputs(network, placement.lay_out(normalization(pixels)), stride)
        combined_loss(loss, named, target).backward()
        network.zero_grad(set_to_none=True)

    try:
        network, backbone = copy.deepcopy((network, backbone))
        with torch.random.fork_rng(devices=[]):
            set_training(network, backbone, frozen)
            ratio, rounds = times_faster(lambda: step("bf16"), lambda: step("fp32"), clock=clock)
        train_bf16, inference = ratio >= WORTH, 0.0
        if not train_bf16:
            network.eval()
            sides = infer(network, "bf16"), infer(network, "fp32")
            inference, _ = times_faster(*sides, limit_seconds=3.0, clock=clock)
    except Exception as error:  # what fails in fp32 too will say so once it is trained
        reason = one_line(error, 200)
        return "fp32", f"fp32: a trial of bf16 failed with {type(error).__name__}: {reason}"
    measured = f"{ratio:.2f}x as fast as fp32 in a trial of {rounds} step{'' if rounds == 1 else 's'}"
    if train_bf16:
        return "bf16", f"bf16: {measured}"
    if inference < WORTH:
        return "fp32", f"fp32: bf16 was {measured}"
    return "fp32+bf16", f"fp32 in training, where bf16 was {measured}; bf16 in inference, {inference:.2f}x as fast"


def times_faster(
    one: Callable[[], object],
    other: Callable[[], object],
    *,
    rounds: int = 6,
    limit_seconds: float = 10.0,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, int]:
    """How many times as fast `one` is as `other`, and how many rounds of both say so: their median.

    CPU time tells, for by the clock on the wall other work on the machine would decide. The first round, in which `one`
    pays for what is done once, only counts if there is no other. There are no more after two in a row that agree: that
    `one` is clearly faster, or that it is not faster at all; nor after the limit.
    """
    ratios: list[float] = []
    begun = clock()
    while len(ratios) < rounds and (not ratios or clock() - begun < limit_seconds):
        moments = [clock()]
        for run in (one, other):
            run()
            moments.append(clock())
        ratios.append((moments[2] - moments[1]) / max(moments[1] - moments[0], 1e-9))
        clearly_faster = len(ratios) >= 2 and min(ratios[-2:]) > CLEAR
        not_faster = len(ratios) >= 3 and max(ratios[-2:]) < 1
        if clearly_faster or not_faster:
            break
    counted = ratios[1:] or ratios
    return statistics.median(counted), len(counted)
