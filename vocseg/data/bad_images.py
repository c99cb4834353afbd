"""Leaving out images that cannot be read, for `data.on_bad_image = "skip"`.

All of a split is read once before it is used, and not when an image's turn comes: so an epoch has the same images from
the first to the last, class weights and pictures are made of the same ones, and what was left out is known although
some image's turn never came. What is read is decoded, and kept where decoded images are.

An image is bad if its data set says so with a DataError: a file that is missing, empty, cut off, damaged where its
format shows it, or something else; too many pixels; a mask of another size, in colours, or with ids that no class has.
Sound are images in CMYK, with 16 bits, grey or transparent, which are converted, and those that EXIF would have
rotated, unless the mask was drawn on the rotated view. Changed bits among the pixels of a JPEG file cannot be seen.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vocseg.data.dataset import Dataset
from vocseg.data.parallel import in_threads
from vocseg.data.threads import read
from vocseg.distributed import ALONE, World
from vocseg.errors import DataError, Problem, one_line

Bad = Mapping[str, str]
"""Names of images, and what is wrong with each."""

_NOT_HERE = "another process could not read it"


def find_bad(dataset: Dataset, world: World = ALONE) -> dict[str, str]:
    """Reads all images, and says what is wrong with those that are bad.

    Of several processes each reads a part, and all of them get what all have found.

    Raises:
        HangError: reading one does not end.
    """
    own = range(world.rank, len(dataset), world.size)
    found = in_threads(partial(_reason, dataset), own, timeout=dataset.timeout)
    reasons = dict(zip(own, found, strict=True))
    bad = np.zeros(len(dataset), np.int32)
    bad[own.start :: own.step] = [bool(reasons[index]) for index in own]
    # Only that an image is bad is exchanged: at what another process found this one looks again.
    everywhere = np.flatnonzero(world.total(bad)).tolist()
    return {dataset.names[i]: reasons.get(i) or _reason(dataset, i) or _NOT_HERE for i in everywhere}


def without(dataset: Dataset, bad: Bad) -> Dataset:
    """The rest of a data set.

    Raises:
        DataError: nothing is left.
    """
    kept = [index for index, name in enumerate(dataset.names) if name not in bad]
    if len(kept) == len(dataset):
        return dataset
    if not kept:
        first = next(iter(bad.values()))
        raise DataError(Problem("data", f"none of {len(dataset)} images can be read; the first: {first}"))

    def read_kept(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return dataset.read(kept[index])

    files = [dataset.files[index] for index in kept] if dataset.files else ()
    return replace(dataset, names=tuple(dataset.names[index] for index in kept), read=read_kept, files=files)


def _reason(dataset: Dataset, index: int) -> str:
    """What is wrong with an image; nothing, if it can be read."""
    try:
        read(dataset, index)
    except DataError as error:
        return one_line(error, None)  # it names files, whose paths may be long
    return ""
