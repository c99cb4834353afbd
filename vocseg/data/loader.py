"""Training batches: read, augmented and stacked on threads, ahead of the training step.

Threads, not processes: decoders and OpenCV release the interpreter while they decode and warp, so threads run in
parallel without start-up, pickling or shared memory. What an epoch shows, and how it is augmented, is a function
of (seed, epoch, position) and does not depend on the number of threads.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vocseg.data.dataset import Dataset
from vocseg.data.render import Views, stack_views
from vocseg.data.sample import Sample, Unrendered
from vocseg.data.threads import Readers, read
from vocseg.errors import Problem, TrainingError, UsageError, VocsegError, one_line

Augment = Callable[[Sample, np.random.Generator], None]
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Batch = tuple[Tensor, Tensor] | Views


class TrainingBatches:
    """The batches of every epoch.

    An epoch shows each image `repeat` times in an order of its own. Images that do not fill the last batch are
    left out of that epoch, unless there is no other batch.

    Args:
        batch_size: images that make a step, of all processes together.
        fill: RGB of 0…255 for image pixels that an augmentation invents.
        workers: threads; 0 for one a core.
        rank, size: which of how many equal parts of every batch is read here; the others are other processes'.
        pin: put batches into pinned memory, from which a GPU copies without being waited for.
        render: compute the images here; else batches are `Views`, to be rendered where they go.
        augmentation_names: what to call the augmentations where one fails.

    Raises:
        UsageError: a batch cannot be shared equally by the processes.
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
        rank: int = 0,
        size: int = 1,
        pin: bool = False,
        render: bool = True,
        augmentation_names: Sequence[str] = (),
    ):
        self.dataset = dataset
        self.augmentations = tuple(augmentations)
        self.augmentation_names = augmentation_names
        self.seed = seed
        self.fill = fill
        self.workers = workers or max(1, (os.cpu_count() or 1) // size)
        self.pin = pin
        self.render = render
        self._positions = len(dataset) * repeat
        self.batch_size = min(batch_size, self._positions - self._positions % size)
        if not self.batch_size or self.batch_size % size:
            raise UsageError(
                Problem(
                    "data.batch_size", f"{min(batch_size, self._positions)} images cannot be shared by {size} processes"
                )
            )
        share = self.batch_size // size
        self._own = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self._positions // self.batch_size

    def epoch(self, epoch: int, skip: int = 0) -> Generator[Batch, None, None]:
        """The batches of one epoch, from 0; see `epochs`."""
        return self.epochs(epoch, epoch + 1, skip=skip)

    def epochs(
        self, first: int, stop: int, *, skip: int = 0, per_epoch: int | None = None
    ) -> Generator[Batch, None, None]:
        """The batches of some epochs: images (b, h, w, 3) uint8 and masks (b, h, w) uint8, or `Views`, on the CPU.

        One epoch follows the other without a pause: while the last batches of one are trained on, or it is validated,
        the first of the next are read.

        Args:
            first, stop: the first epoch, and the one before which to end.
            skip: leave out that many batches at the front, for going on within an epoch.
            per_epoch: take the first so many batches of every epoch; None for all.

        Raises:
            DataError: an image or mask cannot be read.
            HangError: reading one does not end.
            TrainingError: an augmentation failed.
            UsageError: samples of one batch differ in size.
        """
        coming = self._positions_of(first, stop, skip, len(self) if per_epoch is None else per_epoch)
        # Where the consumer stops early, no thread goes on with what nobody will see.
        with closing(Readers(self.workers, self.dataset.timeout, "vocseg-loader")) as readers:
            ahead: deque[Future[Batch]] = deque()

            def submit() -> None:
                batch = next(coming, None)
                if batch is None:
                    return
                epoch, positions = batch[0], batch[1][self._own]
                parts = [  # one task a thread, for a task costs a tenth of what a sample from the cache does
                    readers.submit(self._samples, epoch, part.tolist())
                    for part in np.array_split(positions, min(self.workers, len(positions)))
                ]
                # What it waits for was submitted before it and has been begun, so that waiting ends.
                ahead.append(readers.submit(self._stack, parts))

            for _ in range(2 + self.workers // self.batch_size):
                submit()
            while ahead:
                batch = readers.result(ahead.popleft())
                submit()
                yield batch

    def names(self, epoch: int, first: int, batches: int = 1) -> list[str]:
        """The images of so many batches of an epoch, of all processes, without the partners that are mixed in."""
        shown = self._positions_of(epoch, epoch + 1, first, first + batches)
        return [self.dataset.names[i] for _, positions in shown for i in (positions % len(self.dataset)).tolist()]

    def _positions_of(
        self, first: int, stop: int, skip: int, per_epoch: int
    ) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """Epoch and positions of each batch, of all processes."""
        for epoch in range(first, stop):
            order = np.random.default_rng((self.seed, epoch)).permutation(self._positions)
            for batch in range(skip, per_epoch):
                yield epoch, order[batch * self.batch_size : (batch + 1) * self.batch_size]
            skip = 0

    def _samples(self, epoch: int, positions: Sequence[int]) -> list[Pair] | list[Unrendered]:
        if self.render:
            return [self.sample(epoch, position) for position in positions]
        return [self._sample(epoch, position).unrendered() for position in positions]

    def sample(self, epoch: int, position: int) -> Pair:
        """One augmented sample: image (h, w, 3) uint8 and mask (h, w) uint8."""
        sample = self._sample(epoch, position)
        return sample.image, sample.mask

    def first_sample(self) -> Pair:
        """The first sample of all, on a thread: its image is the first that is read, and may hang.

        Raises:
            HangError: it does.
        """
        with closing(Readers(1, self.dataset.timeout, "vocseg-loader")) as readers:
            return readers.result(readers.submit(self.sample, 0, 0))

    def _sample(self, epoch: int, position: int) -> Sample:
        rng = np.random.default_rng((self.seed, epoch, position))
        return self._augmented(position % len(self.dataset), rng, len(self.augmentations))

    def _augmented(self, index: int, rng: np.random.Generator, steps: int) -> Sample:
        """An image after the first so many augmentations. Each can draw partners that have been as far as it."""
        sample = Sample(*read(self.dataset, index), fill=self.fill)
        for step, augment in enumerate(self.augmentations[:steps]):
            sample.draw_partner = partial(self._partner, step)
            try:
                augment(sample, rng)
            except (VocsegError, MemoryError):
                raise
            except BaseException as error:  # of a plugin, which may even try to exit
                name = self.augmentation_names[step] if self.augmentation_names else f"number {step + 1}"
                failed = f"augmentation '{name}' failed on it with {type(error).__name__}: {one_line(error)}"
                raise TrainingError(Problem(self.dataset.names[index], f"{failed}; --debug shows where")) from error
        return sample

    def _partner(self, steps: int, rng: np.random.Generator) -> Sample:
        return self._augmented(int(rng.integers(len(self.dataset))), rng, steps)

    def _stack(self, parts: Sequence[Future[list]]) -> Batch:
        samples = [sample for part in parts for sample in part.result()]
        *_, masks = zip(*samples, strict=True)
        sizes = {mask.shape for mask in masks}
        if len(sizes) > 1:
            shown = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:3])
            raise UsageError(
                Problem("augmentation", f"the samples of one batch differ in size ({shown}); add a 'crop' or 'resize'")
            )
        if not self.render:
            return stack_views(samples, self.fill, self.pin)
        images = [image for image, _ in samples]
        return self._tensor(images), self._tensor(masks)

    def _tensor(self, arrays: Sequence[NDArray[np.uint8]]) -> Tensor:
        stacked = torch.empty(len(arrays), *arrays[0].shape, dtype=torch.uint8, pin_memory=self.pin)
        np.stack(arrays, out=stacked.numpy())
        return stacked
