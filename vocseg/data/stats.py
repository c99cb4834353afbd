"""Counting a data set: how many pixels and images each class has, and how large the images are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vocseg.data.dataset import VOID, Dataset
from vocseg.data.parallel import Progress, in_threads
from vocseg.data.threads import read
from vocseg.errors import DataError, Problem


class Spread(NamedTuple):
    """The least, middle and greatest of a set of numbers."""

    min: int
    median: float
    max: int


@dataclass(frozen=True)
class Stats:
    """What is in one split.

    Attributes:
        class_images: for each class, the images that hold a pixel of it.
        class_pixels: for each class, its pixels.
        heights: of the images, in pixels; widths likewise.
    """

    classes: tuple[str, ...]
    images: int
    class_images: tuple[int, ...]
    class_pixels: tuple[int, ...]
    void_pixels: int
    heights: Spread
    widths: Spread

    @property
    def labelled_pixels(self) -> int:
        """All pixels that have a class."""
        return sum(self.class_pixels)

    @property
    def pixel_shares(self) -> tuple[float, ...]:
        """Each class's share of the labelled pixels, 0 to 1; 0 where nothing is labelled."""
        return tuple(pixels / max(self.labelled_pixels, 1) for pixels in self.class_pixels)

    @property
    def image_shares(self) -> tuple[float, ...]:
        """The share of the images that hold each class, 0 to 1."""
        return tuple(images / max(self.images, 1) for images in self.class_images)

    @property
    def void_share(self) -> float:
        """The share of all pixels that is void, 0 to 1."""
        return self.void_pixels / max(self.labelled_pixels + self.void_pixels, 1)


def stats(dataset: Dataset, progress: Progress | None = None) -> Stats:
    """Reads every image and mask and counts.

    Raises:
        DataError: images or masks cannot be read; all of them are named.
    """
    classes = len(dataset.classes)
    class_images = np.zeros(classes, np.int64)
    class_pixels = np.zeros(classes, np.int64)
    void_pixels = 0
    sizes = []
    for counts, size in _counts(dataset, progress):
        class_images += counts[:classes] > 0
        class_pixels += counts[:classes]
        void_pixels += int(counts[VOID])
        sizes.append(size)
    return Stats(
        classes=dataset.classes,
        images=len(dataset),
        class_images=tuple(class_images.tolist()),
        class_pixels=tuple(class_pixels.tolist()),
        void_pixels=void_pixels,
        heights=_spread([height for height, _ in sizes]),
        widths=_spread([width for _, width in sizes]),
    )


def class_pixels(dataset: Dataset, progress: Progress | None = None) -> NDArray[np.int64]:
    """The pixels of each class in all masks, (num_classes,) int64; void is left out.

    Raises:
        DataError: images or masks cannot be read; all of them are named.
    """
    total = np.zeros(len(dataset.classes), np.int64)
    for counts, _ in _counts(dataset, progress):
        total += counts[: len(total)]
    return total


def _counts(dataset: Dataset, progress: Progress | None) -> Iterator[tuple[NDArray[np.int64], tuple[int, int]]]:
    """For each image the pixels of each of the 256 ids, and its height and width."""

    def count(index: int) -> tuple[NDArray[np.int64], tuple[int, int]] | DataError:
        try:
            mask = read(dataset, index)[1]
        except DataError as error:
            return error
        return np.bincount(mask.ravel(), minlength=256), (mask.shape[0], mask.shape[1])

    problems: list[Problem] = []
    for found in in_threads(count, range(len(dataset)), progress, timeout=dataset.timeout):
        if isinstance(found, DataError):
            problems.extend(found.problems)
        else:
            yield found
    if problems:
        raise DataError(*problems)


def _spread(numbers: list[int]) -> Spread:
    return Spread(min(numbers), float(np.median(numbers)), max(numbers)) if numbers else Spread(0, 0.0, 0)
