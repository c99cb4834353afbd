"""How many images a training step takes (`data.batch_size = "auto"`): as many as fit, counted and, on CUDA, tried.

Learning rates are not touched: what suits one batch size need not suit another, and `vocseg lr` tries.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vocseg.device import Placement, out_of_memory
from vocseg.errors import Problem, TrainingError, one_line
from vocseg.network import Normalization, kept_for_backward, outputs, set_training
from vocseg.train.loop import combined_loss

STEPS = 8
"""An epoch keeps so many steps, whatever would fit."""

CPU_LIMIT = 16
"""With twice as many images a step, a CPU is at most a fifth faster, and the weights change half as often."""

_MEASURED = (2, 4)  # images; of one alone some networks' batch norms can make nothing
_CPU_SHARE = 0.25  # of the machine's memory, which others use too; counted bytes are the least that a step takes
_CUDA_SHARE = 0.9  # of the free memory: validation, and the gaps between blocks, want some of it


def most_images(positions: int, accumulate: int, processes: int, device: torch.device) -> tuple[int, str]:
    """The most images that a process takes in a batch, and why no more.

    Args:
        positions: images that an epoch shows, of all processes together.
    """
    eighth = max(positions // (STEPS * accumulate * processes), min(2, positions // processes))
    if device.type == "cpu" and eighth >= CPU_LIMIT:
        return CPU_LIMIT, "more does not pay on a CPU"
    return eighth, f"an epoch of {positions:,} images keeps {STEPS} steps"


@dataclass(frozen=True)
class Trial:
    """Training steps with copies of one sample, by a copy of the network: nothing of the run is changed.

    Attributes:
        network: on its device.
        sample: an image (h, w, 3) uint8 and its mask (h, w) uint8, as large as in training.
        optimizer: makes an optimizer for a network and its pretrained part.
        average: an average of the weights is kept.
        frozen: the pretrained part is never trained.
    """

    network: nn.Module
    backbone: nn.Module | None
    loss: Callable[[Tensor, Tensor], Tensor]
    sample: tuple[Tensor, Tensor]
    optimizer: Callable[[nn.Module, nn.Module | None], torch.optim.Optimizer]
    placement: Placement
    stride: int
    normalization: Normalization
    average: bool = False
    frozen: bool = False

    def largest(self, most: int, why: str, memory: int) -> tuple[int, str]:
        """The largest power of two of images, at most `most`, with which a training step fits, and what limits it.

        Args:
            why: what limits it where `most` does.
            memory: bytes of the machine that are this process's; on CUDA what is free there counts instead.

        Raises:
            TrainingError: a step fails, for want of memory or for another reason.
        """
        device = self.placement.device
        if device.type != "cuda":
            with torch.random.fork_rng(devices=[]):
                return self._largest(most, why, _CPU_SHARE * memory, "a quarter of the memory")
        with torch.random.fork_rng(devices=[device]):
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            try:
                of_what = f"{_CUDA_SHARE:.0%} of what is free on {torch.cuda.get_device_name(device)}"
                return self._largest(most, why, _CUDA_SHARE * free, of_what)
            finally:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)  # what the run reports is to be its own

    def _largest(self, most: int, why: str, budget: float, of_what: str) -> tuple[int, str]:
        small, large = _MEASURED
        taken = {images: self._taken(images) for images in _MEASURED}
        size, each = min(small, most), ""
        if taken[small] and taken[large]:
            slope = (taken[large] - taken[small]) / (large - small)
            while 2 * size <= most and taken[small] + (2 * size - small) * slope <= budget:
                size *= 2
            each = f"{_size(slope)} an image"
        # Counting leaves out what a step needs for moments. CUDA says when memory runs out, so that it is tried.
        if self.placement.device.type == "cuda" or not each:
            while size and not self._fits(size, budget):
                size //= 2
        if not size:
            message = f"not one image fits {_size(budget)}, {of_what}; lower the crop or take a smaller network"
            raise TrainingError(Problem("data.batch_size", message))
        limit = why if 2 * size > most else f"largest that fits {_size(budget)}, {of_what}"
        return size, "; ".join(filter(None, (limit, each)))

    def _fits(self, images: int, budget: float) -> bool:
        device = self.placement.device
        if device.type != "cuda":
            return self._taken(images) > 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return self._taken(images) > 0 and torch.cuda.max_memory_allocated(device) <= budget

    def _taken(self, images: int) -> int:
        """The bytes that a step with so many images holds, as far as they can be counted; 0 if memory ran out."""
        try:
            return self._step(images)
        except Exception as error:
            if out_of_memory(error):
                return 0
            failed = f"a trial step of {images} images failed with {type(error).__name__}: {one_line(error)}"
            raise TrainingError(Problem("data.batch_size", failed)) from error

    def _step(self, images: int) -> int:
        placement = self.placement
        network, backbone = copy.deepcopy((self.network, self.backbone))
        optimizer = self.optimizer(network, backbone)
        set_training(network, backbone, self.frozen)
        pixels, labels = (placement.send(tensor) for tensor in self.sample)
        target = labels.long().expand(images, *labels.shape)
        batch = placement.lay_out(self.normalization(pixels.expand(images, *pixels.shape)))
        # Only in a second step are there gradients and an optimizer's state all the while: that is the one to fit.
        for _ in range(2 if placement.device.type == "cuda" else 1):
            with placement.kernels_tried(images > 1), kept_for_backward(network) as kept:
                with placement.autocast():
                    named = outputs(network, batch, self.stride)
                loss = combined_loss(self.loss, named, target)
            loss.backward()
            optimizer.step()
        weights = [*network.parameters(), *network.buffers()]
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        return kept.bytes + sum(t.nbytes for t in (*weights * (1 + self.average), *gradients, *state))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
