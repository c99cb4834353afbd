"""Scoring a network on a data set, one image at a time."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocseg.data.dataset import Dataset
from vocseg.data.parallel import in_threads
from vocseg.data.threads import read
from vocseg.device import out_of_memory
from vocseg.distributed import ALONE, World
from vocseg.errors import Problem, TrainingError, UsageError, one_line
from vocseg.evaluate.confusion import class_map, count_pixels, marginals
from vocseg.evaluate.inference import Predictor
from vocseg.evaluate.scores import Counts


@dataclass(frozen=True)
class Evaluation:
    """A whole set, scored.

    Attributes:
        loss: mean over images.
        matrix: (c, c) int64 over all images; rows truth, columns prediction; without void.
        per_image: (n, 4, c) int32, in the order of the data set: pixels hit, true and predicted, all without void, and
            those predicted on void.
    """

    loss: float
    matrix: NDArray[np.int64]
    per_image: Counts


@dataclass(frozen=True)
class Scored:
    """One more image of a validation is done."""

    done: int
    total: int


def evaluate(
    predictor: Predictor, dataset: Dataset, loss: Callable[[Tensor, Tensor], Tensor], world: World = ALONE
) -> Generator[Scored, None, Evaluation]:
    """Scores a network on a data set, whole images at their own size.

    A generator that yields after each image and returns the evaluation: `evaluation = yield from evaluate(...)`. Of
    each image it keeps the loss and four numbers a class. It waits for the device once, at the end.

    Of several processes each takes every so manieth image, and all return the evaluation of the whole set, equal to the
    last count to that of one process.

    Raises:
        UsageError: the network gives another number of classes than the data set has.
        DataError: an image cannot be read.
        HangError: reading one does not end.
        TrainingError: memory ran out.
    """
    predictor.network.eval()
    classes, images = len(dataset.classes), len(dataset)
    own = range(world.rank, images, world.size)
    device = predictor.placement.device
    counting = torch.device("cpu") if device.type == "mps" else device  # which is where count_pixels counts
    total = torch.zeros(classes + 1, classes, dtype=torch.int64, device=counting)
    counted = torch.zeros(len(own), 4, classes, dtype=torch.int32, device=counting)
    losses = torch.zeros(len(own), device=device)
    pairs = enumerate(read_ahead(dataset, own))
    for first in range(0, images, world.size):  # every process yields equally often, to be asked to stop together
        for at, (image, mask) in islice(pairs, 1):  # none, where images are fewer than processes in the last round
            try:
                counts, losses[at] = _score(predictor, image, mask, classes, loss)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                raise TrainingError(Problem(dataset.names[own[at]], _smaller(image, predictor, error))) from error
            total += counts
            counted[at] = marginals(counts)
        yield Scored(min(first + world.size, images), images)
    per_image, loss_by_image = np.zeros((images, 4, classes), np.int32), np.zeros(images)
    per_image[own.start :: own.step] = counted.cpu().numpy()
    loss_by_image[own.start :: own.step] = losses.cpu().numpy()
    return Evaluation(
        loss=float(world.total(loss_by_image).mean()),
        matrix=world.total(total[:-1].cpu().numpy()),
        per_image=world.total(per_image),
    )


def _score(
    predictor: Predictor,
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    classes: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The (c + 1, c) counts of one image, and its loss; nothing of it is waited for."""
    seen = predictor.look(image)
    if seen.raw.shape[1] != classes:
        raise UsageError(
            f"the network gives {seen.raw.shape[1]} classes, and the data has {classes}; "
            "its architecture should use num_classes"
        )
    truth = predictor.placement.send(torch.tensor(mask))
    with torch.inference_mode():
        logits = seen.full()
        # The class map enlarges faster by itself on CPUs; an accelerator had better not do so twice.
        prediction = class_map(*seen) if truth.device.type == "cpu" else class_map(logits)
        counts = count_pixels(truth, prediction[0], classes)
        return counts, loss(logits, truth[None].long())


def _smaller(image: NDArray[np.uint8], predictor: Predictor, error: Exception) -> str:
    """What was too large, and what to try instead."""
    height, width = image.shape[:2]
    window = (predictor.looks.window or max(height, width)) // 2 // 32 * 32
    tries = [f"evaluate.window = {max(32, window)}"]
    if max(predictor.looks.scales) > 1:
        tries.append("evaluate.scales up to 1.0")
    said = f"scoring its {width} x {height} pixels takes too much memory ({one_line(error, 150)})"
    return f"{said}; try {' and '.join(tries)}"


def read_ahead(dataset: Dataset, indices: Sequence[int]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Each image with its mask, the next being read on a thread meanwhile.

    Raises:
        DataError: one cannot be read.
        HangError: reading one does not end.
    """
    return in_threads(partial(read, dataset), indices, timeout=dataset.timeout, workers=1, ahead=1)
