"""Reading images and masks from their files: every defect is a DataError that names the file.

Files are told apart by their content, never by their suffix. EXIF orientation is ignored for images and
masks alike: pixels are taken as they are stored, which is what VOC's masks were drawn on. An image whose
mask was drawn on the rotated view has to be stored rotated; `read_pair` says so where the sizes show it.
"""

import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from vocseg.data.dataset import VOID
from vocseg.data.lists import first_ten
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
    colours = image if image.mode == "RGB" else image.convert("RGB")
    # Four bytes a pixel is how PIL holds colours. OpenCV takes one of them off in half the time PIL needs.
    four = np.frombuffer(colours.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)
    return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB).astype(np.uint8, copy=False)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a JPEG or PNG file by its header; nothing is decoded.

    Raises:
        DataError: there is no such file, or it does not begin as a JPEG or PNG does.
    """
    image = _decode(path, MAX_PIXELS, pixels=False)
    return image.height, image.width


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The class ids in a PNG file, (h, w) uint8: palette indices, or the grey values where there is no palette.

    One-bit masks hold ids 0 and 1. 16-bit masks are read where every id fits eight bits.

    Raises:
        DataError: as `read_image`, or the file holds colours rather than ids.
    """
    ids = _unfiltered_ids(path, max_pixels)
    if ids is not None:
        return ids
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
    return np.array(image).astype(np.uint8, copy=False)


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


def _decode(path: Path, max_pixels: int, *, pixels: bool = True) -> ImageFile:
    """The decoded file, or without `pixels` what its header says."""
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
            if pixels:
                image.load()
            return image
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file") from None
    except Exception as error:  # a decoder on damaged bytes raises OSError, SyntaxError, ValueError, zlib.error, …
        raise _problem(path, f"cannot be read: {error}") from error


def _unfiltered_ids(path: Path, max_pixels: int) -> NDArray[np.uint8] | None:
    """The pixels of a PNG file as masks are written: eight bits, a palette or grey, rows that follow each other as is.

    It takes two thirds of the decoder's time. None for any other file, and for one with anything wrong in it, which
    the decoder then judges.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    # After the signature come length and name of the first chunk; after the size depth, colours and how rows are kept.
    plain = data[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and data[24:29] in (b"\x08\3\0\0\0", b"\x08\0\0\0\0")
    if not plain or not 0 < width * height <= max_pixels:
        return None
    compressed, at, name = [], 8, b""
    while name != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if len(data) < end + 4 or zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return None
        if name == b"IDAT":
            compressed.append(data[at + 8 : end])
        elif name not in (b"IHDR", b"PLTE", b"IEND") and (name[:1].isupper() or name == b"acTL"):
            return None
        at = end + 4
    stream = zlib.decompressobj()
    size = height * (width + 1)
    try:
        first = stream.decompress(b"".join(compressed), 1)
        if first != b"\0":  # each row begins with the number of its filter: do not unpack all for nothing
            return None
        rest = stream.decompress(stream.unconsumed_tail, size)
    except zlib.error:
        return None
    if len(rest) != size - 1 or not stream.eof:
        return None
    rows = np.frombuffer(first + rest, np.uint8).reshape(height, width + 1)
    return None if rows[:, 0].any() else rows[:, 1:].copy()


def _bit_depth(path: Path) -> int:
    """Bits a channel of a PNG file, which stand at a fixed place in its header."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _problem(path: Path, message: str) -> DataError:
    return DataError(Problem(str(path), message))
