"""Whole images at their own size through a network, one at a time."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vocseg.data.dataset import Dataset
from vocseg.device import Placement
from vocseg.errors import UsageError
from vocseg.evaluate.confusion import class_map, confusion_matrix
from vocseg.evaluate.scores import Counts, marginals
from vocseg.network import normalize, outputs


@dataclass(frozen=True)
class Predictor:
    """A network with all that turns an image into a class map.

    Attributes:
        stride: what image sides are padded to a multiple of.
        mean, std: (3,) float32 of 0…1, on the device.
        scales: sizes at which each image is looked at, as factors on its own.
        flip: look at the mirrored image too.
    """

    network: nn.Module
    placement: Placement
    stride: int
    mean: Tensor
    std: Tensor
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def logits(self, image: NDArray[np.uint8]) -> Tensor:
        """(h, w, 3) uint8 RGB to (1, c, h, w) float32 logits on the device. The network must be in eval mode.

        Where an image is looked at in several ways, their probabilities are averaged, and the logarithm is given.
        """
        height, width = image.shape[:2]
        with torch.inference_mode():
            pixels = normalize(self.placement.send(torch.tensor(image)[None]), self.mean, self.std)
            pixels = self.placement.lay_out(pixels)
            looks = []
            for scale in self.scales:
                size = max(1, round(height * scale)), max(1, round(width * scale))
                scaled = pixels if scale == 1 else F.interpolate(pixels, size, mode="bilinear", antialias=True)
                for mirrored in (False, True) if self.flip else (False,):
                    with self.placement.autocast():
                        found = outputs(self.network, scaled.flip(-1) if mirrored else scaled, self.stride)["out"]
                    found = found.flip(-1) if mirrored else found
                    looks.append(found if scale == 1 else F.interpolate(found, (height, width), mode="bilinear"))
            if len(looks) == 1:
                return looks[0]
            mean = torch.stack([look.softmax(1) for look in looks]).mean(0)
            return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


@dataclass(frozen=True)
class ImageResult:
    """What one image gave: its name, loss, (c, c) counts, and the (h, w) uint8 class map."""

    name: str
    loss: Tensor
    matrix: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Evaluation:
    """A whole set, scored.

    Attributes:
        loss: mean over images.
        matrix: (c, c) int64 over all images; rows truth, columns prediction.
        per_image: (n, 3, c) int64 marginals, in the order of the data set.
    """

    loss: float
    matrix: Counts
    per_image: Counts


def predict_dataset(
    predictor: Predictor, dataset: Dataset, loss: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[ImageResult]:
    """Runs each image of a data set, reading ahead of the network on a thread."""
    predictor.network.eval()
    device = predictor.placement.device
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(dataset.read, 0) if len(dataset) else None
        for index in range(len(dataset)):
            assert ahead is not None
            image, mask = ahead.result()
            if index + 1 < len(dataset):
                ahead = reader.submit(dataset.read, index + 1)
            logits = predictor.logits(image)
            if logits.shape[1] != len(dataset.classes):
                raise UsageError(
                    f"the network gives {logits.shape[1]} classes, and the data has {len(dataset.classes)}; "
                    "its architecture should use num_classes"
                )
            truth = torch.tensor(mask, device=device)
            with torch.inference_mode():
                prediction = class_map(logits)[0]
                matrix = confusion_matrix(truth, prediction, len(dataset.classes))
                value = loss(logits, truth[None].long())
            yield ImageResult(dataset.names[index], value, matrix, prediction)


def summarize(results: list[ImageResult]) -> Evaluation:
    """Adds images up. Reads the device once, at the end."""
    matrices = torch.stack([result.matrix for result in results]).cpu().numpy()
    losses = torch.stack([result.loss for result in results]).float().cpu()
    return Evaluation(
        loss=float(losses.mean()),
        matrix=matrices.sum(0),
        per_image=np.stack([marginals(matrix) for matrix in matrices]),
    )


@dataclass(frozen=True)
class Scored:
    """One more image of a validation is done."""

    done: int
    total: int


def evaluate(
    predictor: Predictor, dataset: Dataset, loss: Callable[[Tensor, Tensor], Tensor]
) -> Generator[Scored, None, Evaluation]:
    """Scores a network on a data set, whole images at their own size.

    A generator that yields after each image and returns the evaluation: `evaluation = yield from evaluate(...)`.
    """
    results = []
    for result in predict_dataset(predictor, dataset, loss):
        # The class map is let go: a set must not be held in memory to be counted.
        results.append(replace(result, prediction=result.prediction.new_empty(0)))
        yield Scored(len(results), len(dataset))
    return summarize(results)
