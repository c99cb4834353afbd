"""Training batches: read, augmented and stacked on threads, ahead of the training step.

Threads, not processes: OpenCV and Pillow release the interpreter while they decode and warp, so threads run in
parallel without start-up, pickling or shared memory. What an epoch shows, and how it is augmented, is a function
of (seed, epoch, position) and does not depend on the number of threads.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocseg.data.dataset import Dataset
from vocseg.data.sample import Sample
from vocseg.errors import Problem, UsageError

Augment = Callable[[Sample, np.random.Generator], None]
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class TrainingBatches:
    """The batches of every epoch.

    An epoch shows each image `repeat` times in an order of its own. Images that do not fill the last batch are
    left out of that epoch, unless there is no other batch.

    Args:
        fill: RGB of 0…255 for image pixels that an augmentation invents.
        workers: threads; 0 for one a core.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentations: Sequence[Augment],
        *,
        batch_size: int,
        seed: int,
        repeat: int = 1,
        workers: int = 0,
        fill: tuple[int, int, int] = (124, 116, 104),
    ):
        self.dataset = dataset
        self.augmentations = tuple(augmentations)
        self.seed = seed
        self.fill = fill
        self.workers = workers or os.cpu_count() or 1
        self._positions = len(dataset) * repeat
        self.batch_size = min(batch_size, self._positions)

    def __len__(self) -> int:
        return self._positions // self.batch_size

    def epoch(self, epoch: int, skip: int = 0) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batches of one epoch, from 0: images (b, h, w, 3) uint8 and masks (b, h, w) uint8, on the CPU.

        `skip` leaves out that many batches at the front, for going on within an epoch.

        Raises:
            DataError: an image or mask cannot be read.
            UsageError: samples of one batch differ in size.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(self._positions)
        starts = iter(range(skip * self.batch_size, len(self) * self.batch_size, self.batch_size))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="vocseg-loader") as pool:
            ahead: deque[list[Future[Pair]]] = deque()

            def submit() -> None:
                start = next(starts, None)
                if start is not None:
                    batch = order[start : start + self.batch_size]
                    ahead.append([pool.submit(self.sample, epoch, int(position)) for position in batch])

            try:
                for _ in range(2 + self.workers // self.batch_size):
                    submit()
                while ahead:
                    pairs = [future.result() for future in ahead.popleft()]
                    submit()
                    yield self._stack(pairs)
            finally:  # the consumer stopped early: let no thread work on what nobody will see
                pool.shutdown(wait=True, cancel_futures=True)

    def sample(self, epoch: int, position: int) -> Pair:
        """One augmented sample: image (h, w, 3) uint8 and mask (h, w) uint8."""
        rng = np.random.default_rng((self.seed, epoch, position))
        sample = self._augmented(position % len(self.dataset), rng, len(self.augmentations))
        return sample.image, sample.mask

    def _augmented(self, index: int, rng: np.random.Generator, steps: int) -> Sample:
        """An image after the first so many augmentations. Each can draw partners that have been as far as it."""
        sample = Sample(*self.dataset.read(index), fill=self.fill)
        for step, augment in enumerate(self.augmentations[:steps]):
            sample.draw_partner = partial(self._partner, step)
            augment(sample, rng)
        return sample

    def _partner(self, steps: int, rng: np.random.Generator) -> Sample:
        return self._augmented(int(rng.integers(len(self.dataset))), rng, steps)

    def _stack(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        sizes = {mask.shape for _, mask in pairs}
        if len(sizes) > 1:
            shown = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:3])
            raise UsageError(
                Problem("augmentation", f"the samples of one batch differ in size ({shown}); add a 'crop' or 'resize'")
            )
        images = np.stack([image for image, _ in pairs])
        masks = np.stack([mask for _, mask in pairs])
        return torch.from_numpy(images), torch.from_numpy(masks)


def cached(dataset: Dataset, limit_bytes: int) -> Dataset:
    """The same data set, keeping decoded pairs in memory until they take `limit_bytes`."""
    kept: dict[int, Pair] = {}
    size = 0
    lock = Lock()

    def read(index: int) -> Pair:
        nonlocal size
        found = kept.get(index)
        if found is not None:
            return found
        pair = dataset.read(index)
        with lock:
            if index not in kept and size + pair[0].nbytes + pair[1].nbytes <= limit_bytes:
                for array in pair:
                    array.setflags(write=False)
                kept[index] = pair
                size += pair[0].nbytes + pair[1].nbytes
        return pair

    return Dataset(dataset.classes, dataset.names, read, dataset.files, dataset.palette)
