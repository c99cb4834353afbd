"""Reading images and masks from their files: every defect is a DataError that names the file.

Files are told apart by their content, never by their suffix. EXIF orientation is ignored for images and
masks alike: pixels are taken as they are stored, which is what VOC's masks were drawn on. An image whose
mask was drawn on the rotated view has to be stored rotated; `read_pair` says so where the sizes show it.

Not here: which bytes of a file a decoder gets to see (`stored.py`).
"""

import io
from pathlib import Path

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from simplejpeg import decode_jpeg, decode_jpeg_header

from vocseg.data.dataset import VOID
from vocseg.data.lists import first_few
from vocseg.data.opencv import cv2
from vocseg.data.stored import MAX_PIXELS, PNG, Stored, naming, problem, read_stored


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of a JPEG or PNG file, (h, w, 3) uint8 RGB. Transparency is dropped, 16 bits lose the lower eight.

    Args:
        max_pixels: larger images are refused before anything is decoded.

    Raises:
        DataError: there is no such file, it is damaged or truncated, neither JPEG nor PNG, or too large.
    """
    stored = read_stored(path, max_pixels)
    pixels = _colours(stored)
    if pixels is not None:
        return pixels
    image = _decode(path, stored)
    if image.mode.startswith("I"):  # greyscale of 16 bits, which PIL would clip at 255
        grey = (np.array(image) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    colours = image if image.mode == "RGB" else image.convert("RGB")
    # Four bytes a pixel is how PIL holds colours. OpenCV takes one of them off in half the time PIL needs.
    four = np.frombuffer(colours.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)
    return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB).astype(np.uint8, copy=False)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a JPEG or PNG file by its header; nothing is decoded.

    Raises:
        DataError: there is no such file, or it does not begin as a JPEG or PNG does.
    """
    stored = read_stored(path, MAX_PIXELS, pixels=False)
    return stored.height, stored.width


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The class ids in a PNG file, (h, w) uint8: palette indices, or the grey values where there is no palette.

    One-bit masks hold ids 0 and 1. 16-bit masks are read where every id fits eight bits.

    Raises:
        DataError: as `read_image`, or the file holds colours rather than ids.
    """
    stored = read_stored(path, max_pixels)
    ids = _ids(stored)
    if ids is not None:
        return ids
    image = _decode(path, stored)
    if not isinstance(image, PngImageFile):
        raise problem(path, "a mask must be a PNG file, found JPEG, which changes ids; write the ids as PNG")
    if image.mode.startswith("I"):
        ids = np.array(image)
        if ids.max(initial=0) > 255:
            raise problem(path, f"class ids go up to 255, found {ids.max()} in a 16-bit mask; write ids with 8 bits")
        return ids.astype(np.uint8)
    if image.mode not in ("P", "L", "1"):
        raise problem(
            path,
            f"a mask must hold class ids (a palette or greyscale PNG), found {image.mode} colours; "
            "replace each colour by the id of its class and save one channel",
        )
    # PNG stretches two or four bits of grey to 0..255 on reading: whether 17 means 17 or 1 cannot be known.
    if image.mode == "L" and stored.data[24] < 8:
        raise problem(path, "greyscale of two or four bits does not keep class ids; write ids with 8 bits")
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
        raise problem(mask_path, message)
    # uint8 wraps: void becomes 0 and id i becomes i + 1, so that one maximum tells.
    if (mask + 1).max() > num_classes:
        unknown = sorted(set(np.unique(mask).tolist()) - {*range(num_classes), VOID})
        raise problem(
            mask_path,
            f"unknown ids {first_few(unknown)}; {num_classes} classes have ids 0 to {num_classes - 1}, void is {VOID}",
        )
    return image, mask


def _decode(path: Path, stored: Stored) -> ImageFile:
    with naming(path):
        decoder = PngImageFile if stored.data.startswith(PNG) else JpegImageFile
        image = decoder(io.BytesIO(stored.data), str(path))
        if image.size != (stored.width, stored.height):
            raise ValueError("the header tells two sizes")
        if image.mode == "P" and image.palette is None:
            raise ValueError("it has no palette")
        image.load()
        return image


def _colours(stored: Stored) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG file as PIL decodes them, in five sixths of its time and without holding the interpreter.

    None for a PNG file, for a JPEG of four colours, and for one with anything wrong in it, which PIL then judges.
    """
    if stored.data.startswith(PNG):
        return None
    try:
        if decode_jpeg_header(stored.data)[2] in ("CMYK", "YCCK"):
            return None
        pixels = decode_jpeg(stored.data, "RGB")
    except ValueError:
        return None
    return pixels if pixels.shape == (stored.height, stored.width, 3) else None


def _ids(stored: Stored) -> NDArray[np.uint8] | None:
    """The pixels of a PNG file as masks are written: eight bits, a palette or grey, rows that follow each other as is.

    It takes half of the decoder's time. None for any other file, and for one with anything wrong in it, which
    the decoder then judges.
    """
    width, height, data = stored
    # After the size come depth, colours and how rows are kept.
    if not data.startswith(PNG) or data[24:29] not in (b"\x08\3\0\0\0", b"\x08\0\0\0\0"):
        return None
    compressed, names, at = [], set(), 8
    while b"IEND" not in names:
        end = at + 8 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if len(data) < end + 4 or isal_zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return None
        if name == b"IDAT":
            compressed.append(data[at + 8 : end])
        names.add(name)
        at = end + 4
    if data[25] == 3 and b"PLTE" not in names:
        return None
    stream = isal_zlib.decompressobj()
    size = height * (width + 1)
    try:
        first = stream.decompress(b"".join(compressed), 1)
        if first != b"\0":  # each row begins with the number of its filter: do not unpack all for nothing
            return None
        rest = stream.decompress(stream.unconsumed_tail, size)
    except isal_zlib.error:  # type: ignore[misc]  # its stub declares an instance
        return None
    if len(rest) != size - 1 or not stream.eof:
        return None
    rows = np.frombuffer(first + rest, np.uint8).reshape(height, width + 1)
    return None if rows[:, 0].any() else rows[:, 1:].copy()


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
