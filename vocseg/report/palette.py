"""Class colours: the PASCAL VOC colour map, a data set's own colours on top of it, and palette PNGs.

Wherever a palette is asked for, `Dataset.palette` can be handed over as it is; empty means the VOC colour map.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Palette = Sequence[Sequence[int]] | NDArray[np.uint8]
"""One RGB colour a class, 0 to 255; empty for the VOC colour map."""


def voc_palette(n: int = 256) -> NDArray[np.uint8]:
    """The first n colours of the VOC colour map, (n, 3) uint8 RGB; id 255, void, is (224, 224, 192).

    The bits of an id go in turn to red, green and blue, the lowest three to each channel's highest bit and so on
    (VOC development kit, `VOClabelcolormap.m`).
    """
    ids = np.arange(n, dtype=np.uint8)[:, None]
    channels = np.arange(3, dtype=np.uint8)
    colours = np.zeros((n, 3), np.uint8)
    for level in range(3):
        colours |= (ids >> (3 * level + channels) & 1) << (7 - level)
    return colours


def id_colours(palette: Palette) -> NDArray[np.uint8]:
    """The colour of every id, (256, 3) uint8 RGB: the palette's, and the VOC colour map's where it has none."""
    colours = voc_palette()
    if len(palette):
        colours[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    return colours


def save_palette_mask(mask: NDArray[np.uint8], path: Path, palette: Palette = ()) -> None:
    """Writes a (h, w) mask as a P-mode PNG: the ids are the pixel values, as in VOC's own masks."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{path}: expected a uint8 mask (h, w), got {mask.dtype} {mask.shape}")
    picture = Image.fromarray(mask)
    picture.putpalette(id_colours(palette).tobytes())
    picture.save(path, format="PNG")
