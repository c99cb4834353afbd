"""What a data set is to the rest of vocseg. The data sets themselves are components beside this file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

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
        timeout: seconds after which reading an image counts as hanging; 0: never.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    read: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    files: Sequence[tuple[Path, Path]] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    timeout: float = 300.0

    def __len__(self) -> int:
        return len(self.names)


class FilePairs(Sequence[tuple[Path, Path]]):
    """Each image's file and its mask's, as paths that are made when they are asked for.

    A list of paths takes twice the memory, and the longer it grows the longer Python's garbage collector looks at it.

    Args:
        folder: where all of them are.
        names: image and mask, as paths from there.
    """

    def __init__(self, folder: Path, names: Sequence[tuple[str, str]]):
        self._folder = folder
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> tuple[Path, Path]: ...
    @overload
    def __getitem__(self, index: slice) -> "FilePairs": ...
    def __getitem__(self, index: int | slice) -> "tuple[Path, Path] | FilePairs":
        if isinstance(index, slice):
            return FilePairs(self._folder, self._names[index])
        image, mask = self._names[index]
        return self._folder / image, self._folder / mask
