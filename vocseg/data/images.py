"""Reading images and masks from their files: every defect is a DataError that names the file.

Files are told apart by their content, never by their suffix. EXIF orientation is ignored for images and
masks alike: pixels are taken as they are stored, which is what VOC's masks were drawn on. An image whose
mask was drawn on the rotated view has to be stored rotated; `read_pair` says so where the sizes show it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from vocseg.data.dataset import VOID
from vocseg.errors import DataError, Problem

MAX_PIXELS = 100_000_000


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Does nothing: nobody asks for the resolution, and PIL warns about damaged EXIF while it looks for it."""


# PIL.Image.open would add a limit of its own, kept in a global and partly a warning.
_DECODERS: dict[bytes, type[ImageFile]] = {b"\xff\xd8\xff": _Jpeg, b"\x89PNG\r\n\x1a\n": PngImageFile}


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of a JPEG or PNG file, (h, w, 3) uint8 RGB. Transparency is dropped, 16 bits lose the lower eight.

    Args:
        max_pixels: larger images are refused before anything is decoded.

    Raises:
        DataError: there is no such file, it is damaged or truncated, neither JPEG nor PNG, or too large.
    """
    image = _decode(path, max_pixels)
    if image.mode.startswith("I"):  # greyscale of 16 bits, which PIL would clip at 255
        grey = (np.array(image) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    image.info.pop("transparency", None)  # PIL warns about transparent palette colours
    return np.array(image.convert("RGB"))


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The class ids in a PNG file, (h, w) uint8: palette indices, or the grey values where there is no palette.

    One-bit masks hold ids 0 and 1. 16-bit masks are read where every id fits eight bits.

    Raises:
        DataError: as `read_image`, or the file holds colours rather than ids.
    """
    image = _decode(path, max_pixels)
    if not isinstance(image, PngImageFile):
        raise _problem(path, "a mask must be a PNG file, found JPEG, which changes ids; write the ids as PNG")
    if image.mode.startswith("I"):
        ids = np.array(image)
        if ids.max(initial=0) > 255:
            raise _problem(path, f"class ids go up to 255, found {ids.max()} in a 16-bit mask; write ids with 8 bits")
        return ids.astype(np.uint8)
    if image.mode not in ("P", "L", "1"):
        raise _problem(
            path,
            f"a mask must hold class ids (a palette or greyscale PNG), found {image.mode} colours; "
            "replace each colour by the id of its class and save one channel",
        )
    # PNG stretches two or four bits of grey to 0..255 on reading: whether 17 means 17 or 1 cannot be known.
    if image.mode == "L" and _bit_depth(path) < 8:
        raise _problem(path, "greyscale of two or four bits does not keep class ids; write ids with 8 bits")
    return np.array(image).astype(np.uint8)


def read_pair(image_path: Path, mask_path: Path, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image (h, w, 3) uint8 RGB and its mask (h, w) uint8, whose ids are below `num_classes` or 255.

    Raises:
        DataError: either cannot be read, their sizes differ, or the mask holds other ids.
    """
    image, mask = read_image(image_path), read_mask(mask_path)
    if image.shape[:2] != mask.shape:
        message = f"the mask is {_size(mask)} and its image {image_path} is {_size(image)}"
        if image.shape[:2] == mask.shape[::-1]:
            message += "; if the image carries an EXIF rotation, store it rotated: EXIF is ignored"
        raise _problem(mask_path, message)
    # uint8 wraps: void becomes 0 and id i becomes i + 1, so that one maximum tells.
    if (mask + 1).max() > num_classes:
        unknown = sorted(set(np.unique(mask).tolist()) - {*range(num_classes), VOID})
        raise _problem(
            mask_path,
            f"unknown ids {first_ten(unknown)}; {num_classes} classes have ids 0 to {num_classes - 1}, void is {VOID}",
        )
    return image, mask


def read_lines(path: Path) -> list[str]:
    """The lines of a split list.

    Raises:
        DataError: the list cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), f"the list cannot be read: {error}")) from error


def first_ten(things: Sequence[object]) -> str:
    """The first ten of many, and how many more there are, for messages that name what is wrong."""
    text = ", ".join(map(str, things[:10]))
    return text if len(things) <= 10 else f"{text} and {len(things) - 10} more"


def _decode(path: Path, max_pixels: int) -> ImageFile:
    try:
        with path.open("rb") as file:
            head = file.read(8)
            decoder = next((d for magic, d in _DECODERS.items() if head.startswith(magic)), None)
            if decoder is None:
                raise _problem(path, "expected a JPEG or PNG file, found something else")
            file.seek(0)
            image = decoder(file, str(path))
            if image.width * image.height > max_pixels:
                raise _problem(path, f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}")
            image.load()
            return image
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file") from None
    except Exception as error:  # a decoder on damaged bytes raises OSError, SyntaxError, ValueError, zlib.error, …
        raise _problem(path, f"cannot be read: {error}") from error


def _bit_depth(path: Path) -> int:
    """Bits a channel of a PNG file, which stand at a fixed place in its header."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _problem(path: Path, message: str) -> DataError:
    return DataError(Problem(str(path), message))
