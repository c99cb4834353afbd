"""What a data set is to the rest of vocseg. The data sets themselves are components beside this file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VOID = 255
"""The label of pixels that are never trained on and never counted."""


@dataclass(frozen=True)
class Dataset:
    """One split: its classes, and a way to read each image with its mask.

    Attributes:
        classes: class names; the index is the id in the masks. The first is the background.
        names: one name an image, unique within the split and the same on every machine.
        read: index -> image (h, w, 3) uint8 RGB and mask (h, w) uint8 of class ids or `VOID`.
            Raises DataError, naming the file, for what cannot be read or holds an unknown id.
        files: the image's and the mask's file for each image; empty where images are drawn, not read.
        palette: one RGB colour a class, for masks and overlays; empty for the VOC colour map.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    read: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    files: Sequence[tuple[Path, Path]] = ()
    palette: tuple[tuple[int, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.names)
