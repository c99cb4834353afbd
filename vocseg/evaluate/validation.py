"""Scoring a network on a data set, one image at a time."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocseg.data.dataset import Dataset
from vocseg.errors import UsageError
from vocseg.evaluate.confusion import class_map, count_pixels, marginals
from vocseg.evaluate.inference import Predictor
from vocseg.evaluate.scores import Counts


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
