"""Whole images at their own size through a network, one at a time."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vocseg.data.dataset import Dataset
from vocseg.device import Placement
from vocseg.errors import UsageError
from vocseg.evaluate.confusion import class_map, count_pixels, marginals
from vocseg.evaluate.scores import Counts
from vocseg.network import Normalization, outputs


@dataclass(frozen=True)
class Looks:
    """How often, and in which pieces, each image is looked at.

    Attributes:
        scales: sizes, as factors on the image's own.
        flip: the mirrored image too.
        window: side in pixels of the square windows that a scaled image is seen through; None for all of it at once.
        overlap: share of a window's side that it has in common with the next.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    overlap: float = 0.5


@dataclass(frozen=True)
class Predictor:
    """A network with all that turns an image into a class map.

    Attributes:
        stride: what image sides are padded to a multiple of.
        normalization: on the device.
    """

    network: nn.Module
    placement: Placement
    stride: int
    normalization: Normalization
    looks: Looks = Looks()

    def logits(self, image: NDArray[np.uint8]) -> Tensor:
        """(h, w, 3) uint8 RGB to (1, c, h, w) float32 logits on the device. The network must be in eval mode.

        Where windows overlap, their logits are averaged: they are of one network at one scale, and what they agree
        on stays what the network said. Between scales and mirrored looks logits differ in range; there probabilities
        are averaged, and the logarithm is given.
        """
        with torch.inference_mode():
            pixels = self.placement.lay_out(self.normalization(self.placement.send(torch.tensor(image)[None])))
            count = len(self.looks.scales) * (2 if self.looks.flip else 1)
            if count == 1:
                return next(self._every_look(pixels))
            mean: Tensor | float = 0.0
            for look in self._every_look(pixels):
                mean = mean + look.softmax(1) / count
            assert isinstance(mean, Tensor)
            return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    def _every_look(self, pixels: Tensor) -> Iterator[Tensor]:
        """Logits of the image's own size for each scale, as it is and mirrored."""
        height, width = pixels.shape[-2:]
        for scale in self.looks.scales:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            scaled = pixels if scale == 1 else F.interpolate(pixels, size, mode="bilinear", antialias=True)
            for mirrored in (False, True) if self.looks.flip else (False,):
                found = self._through_windows(scaled.flip(-1) if mirrored else scaled)
                found = found.flip(-1) if mirrored else found
                yield found if scale == 1 else F.interpolate(found, (height, width), mode="bilinear")

    def _through_windows(self, images: Tensor) -> Tensor:
        """Logits of images, one window after the other, so that only one window's activations are in memory."""
        height, width = images.shape[-2:]
        side = self.looks.window or max(height, width)
        tops, lefts = (window_starts(length, side, self.looks.overlap) for length in (height, width))
        if len(tops) == len(lefts) == 1:
            return self._once(images)
        visits = images.new_zeros(1, 1, height, width)
        total: Tensor | None = None
        for top in tops:
            for left in lefts:
                window = (..., slice(top, top + side), slice(left, left + side))
                found = self._once(self.placement.lay_out(images[window]))
                if total is None:
                    total = found.new_zeros(len(found), found.shape[1], height, width)
                total[window] += found
                visits[window] += 1
        assert total is not None
        return total.div_(visits)

    def _once(self, images: Tensor) -> Tensor:
        with self.placement.autocast():
            return outputs(self.network, images, self.stride)["out"]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side, so that they cover it; the last is pushed back to end where the side does.

    A side that is no longer than the window is seen at once.
    """
    last = max(length - window, 0)
    return [*range(0, last, max(1, round(window * (1 - overlap)))), last]


@dataclass(frozen=True)
class Evaluation:
    """A whole set, scored.

    Attributes:
        loss: mean over images.
        matrix: (c, c) int64 over all images; rows truth, columns prediction; without void.
        per_image: (n, 4, c) int64, in the order of the data set: pixels hit, true and predicted, all without void, and
            those predicted on void.
    """

    loss: float
    matrix: Counts
    per_image: Counts


@dataclass(frozen=True)
class Scored:
    """One more image of a validation is done."""

    done: int
    total: int


def evaluate(
    predictor: Predictor, dataset: Dataset, loss: Callable[[Tensor, Tensor], Tensor]
) -> Generator[Scored, None, Evaluation]:
    """Scores a network on a data set, whole images at their own size.

    A generator that yields after each image and returns the evaluation: `evaluation = yield from evaluate(...)`. Of
    each image it keeps the loss and four numbers a class. It waits for the device once, at the end.

    Raises:
        UsageError: the network gives another number of classes than the data set has.
    """
    predictor.network.eval()
    classes = len(dataset.classes)
    total: Tensor | int = 0
    per_image, losses = [], []
    for image, mask in _read_ahead(dataset):
        logits = predictor.logits(image)
        if logits.shape[1] != classes:
            raise UsageError(
                f"the network gives {logits.shape[1]} classes, and the data has {classes}; "
                "its architecture should use num_classes"
            )
        truth = predictor.placement.send(torch.tensor(mask))
        with torch.inference_mode():
            counts = count_pixels(truth, class_map(logits)[0], classes)
            total = total + counts
            per_image.append(marginals(counts))
            losses.append(loss(logits, truth[None].long()))
        yield Scored(len(losses), len(dataset))
    assert isinstance(total, Tensor)  # a split without images is not opened
    return Evaluation(
        loss=float(torch.stack(losses).float().mean()),
        matrix=total[:-1].cpu().numpy(),
        per_image=torch.stack(per_image).cpu().numpy(),
    )


def _read_ahead(dataset: Dataset) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Each image with its mask, the next being read on a thread meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(dataset.read, 0)
        for index in range(1, len(dataset)):
            pair = ahead.result()
            ahead = reader.submit(dataset.read, index)
            yield pair
        yield ahead.result()
