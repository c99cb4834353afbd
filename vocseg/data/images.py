"""Reading images and masks from their files: every defect is a DataError that names the file.

Files are told apart by their content, never by their suffix. EXIF orientation is ignored for images and
masks alike: pixels are taken as they are stored, which is what VOC's masks were drawn on. An image whose
mask was drawn on the rotated view has to be stored rotated; `read_pair` says so where the sizes show it.

A file may be made to cost more than it is worth. So its header is read here, and judged, before a decoder sees it; and
the decoder gets the parts that make pixels and nothing else, no profiles, texts, thumbnails or animations.
"""

import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from vocseg.data.dataset import VOID
from vocseg.data.lists import first_ten
from vocseg.errors import DataError, Problem, one_line

MAX_PIXELS = 100_000_000

_BYTES_PER_PIXEL = 8  # of RGBA with 16 bits, which nothing larger compresses to
_SPARE_BYTES = 2**24  # what else a file may hold
_MAX_SEGMENTS = 10_000  # of a JPEG file before its pixels
_MAX_SCANS = 100  # passes over a JPEG's pixels; encoders make about ten

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_SCAN_OR_END = re.compile(b"\xff[\xda\xd9]")  # within compressed pixels 0xff comes with 0 or the number of a restart
_JPEG_EXTRAS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # applications' data but for JFIF's and Adobe's, and comments


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of a JPEG or PNG file, (h, w, 3) uint8 RGB. Transparency is dropped, 16 bits lose the lower eight.

    Args:
        max_pixels: larger images are refused before anything is decoded.

    Raises:
        DataError: there is no such file, it is damaged or truncated, neither JPEG nor PNG, or too large.
    """
    image = _decode(path, _read(path, max_pixels))
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
    stored = _read(path, MAX_PIXELS, pixels=False)
    return stored.height, stored.width


def read_mask(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The class ids in a PNG file, (h, w) uint8: palette indices, or the grey values where there is no palette.

    One-bit masks hold ids 0 and 1. 16-bit masks are read where every id fits eight bits.

    Raises:
        DataError: as `read_image`, or the file holds colours rather than ids.
    """
    stored = _read(path, max_pixels)
    ids = _unfiltered_ids(stored)
    if ids is not None:
        return ids
    image = _decode(path, stored)
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
    if image.mode == "L" and stored.data[24] < 8:
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


class _Stored(NamedTuple):
    """What a file holds of an image: as many pixels as its header says, and the bytes that make them."""

    width: int
    height: int
    data: bytes


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong inside into a DataError that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        raise _problem(path, "no such file") from None
    except Exception as error:  # a decoder on damaged bytes raises OSError, SyntaxError, ValueError, zlib.error, …
        raise _problem(path, f"cannot be read: {one_line(error) or type(error).__name__}") from error


def _read(path: Path, max_pixels: int, *, pixels: bool = True) -> _Stored:
    """Judges a file by its header and, with `pixels`, reads what makes them, in memory that the header allows."""
    with _naming(path):
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe is to wait for whoever writes into it
            raise _problem(path, "expected a JPEG or PNG file, found a folder, a pipe or a device")
        with path.open("rb") as file:
            magic = file.read(8)
            file.seek(0)
            if magic == _PNG:
                width, height, head = _png_header(file)
            elif magic.startswith(_JPEG):
                width, height, head = _jpeg_header(file)
            else:
                raise _problem(
                    path, f"expected a JPEG or PNG file, found {'something else' if magic else 'an empty one'}"
                )
            if not width * height:
                raise _problem(path, f"expected an image with pixels, found one of {width} x {height}")
            if width * height > max_pixels:
                raise _problem(path, f"{width} x {height} pixels are more than the limit of {max_pixels:,}")
            size = os.fstat(file.fileno()).st_size
            if size > _BYTES_PER_PIXEL * width * height + _SPARE_BYTES:
                raise _problem(path, f"{size:,} bytes are more than {width} x {height} pixels can take; save it anew")
            if not pixels:
                return _Stored(width, height, b"")
            rest = file.read()
        if magic == _PNG:
            return _Stored(width, height, head + b"".join(_png_pixels(rest)))
        scans = 1
        for marker in _SCAN_OR_END.finditer(rest):
            if marker[0] == _END:
                rest = rest[: marker.end()]
                break
            scans += 1
            if scans > _MAX_SCANS:
                raise _problem(path, f"expected at most {_MAX_SCANS} scans of its pixels, found more; save it anew")
        return _Stored(width, height, head + rest)


def _png_header(file: BinaryIO) -> tuple[int, int, bytes]:
    """Width, height, and the bytes up to the end of the first chunk, which is the one that tells them."""
    head = file.read(33)
    if len(head) < 33 or head[8:16] != b"\0\0\0\rIHDR":
        raise ValueError("the header of the PNG is damaged")
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24]), head


def _png_pixels(data: bytes) -> Iterator[bytes]:
    """Those of a PNG's further chunks that make its pixels; whole ones as they were written, or cut off as they are.

    PIL does not look at the checksums of pixels: of 1,000 masks with one changed bit it took 69 with other ids.
    """
    at, name = 0, b""
    while at + 8 <= len(data) and name != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if name in (b"PLTE", b"IDAT", b"IEND"):
            if end <= len(data) and zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
                raise ValueError("a checksum is wrong, so that bits have changed")
            yield data[at:end]
        at = end


def _jpeg_header(file: BinaryIO) -> tuple[int, int, bytes]:
    """Width, height, and the bytes up to where the pixels begin, less the segments that the decoder does not need."""
    width = height = 0
    kept = [file.read(2)]
    for _ in range(_MAX_SEGMENTS):
        byte = file.read(1)
        if byte != b"\xff":  # between segments there should be nothing; decoders skip it
            if not byte:
                break
            continue
        marker = (file.read(1) or b"\0")[0]
        if marker == 0xFF:
            file.seek(-1, io.SEEK_CUR)
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            continue
        length = file.read(2)
        content = file.read(max(0, int.from_bytes(length) - 2))
        if len(content) != int.from_bytes(length) - 2 or file.tell() > _SPARE_BYTES:
            break
        if marker not in _JPEG_EXTRAS:
            kept += [b"\xff", bytes([marker]), length, content]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(content) >= 5:
            height, width = int.from_bytes(content[1:3]), int.from_bytes(content[3:5])
        if marker == _SCAN[1]:
            return width, height, b"".join(kept)
    raise ValueError("the file is cut off, or more than a header, before its pixels begin")


def _decode(path: Path, stored: _Stored) -> ImageFile:
    with _naming(path):
        decoder = PngImageFile if stored.data.startswith(_PNG) else JpegImageFile
        image = decoder(io.BytesIO(stored.data), str(path))
        if image.size != (stored.width, stored.height):
            raise ValueError("the header tells two sizes")
        if image.mode == "P" and image.palette is None:
            raise ValueError("it has no palette")
        image.load()
        return image


def _unfiltered_ids(stored: _Stored) -> NDArray[np.uint8] | None:
    """The pixels of a PNG file as masks are written: eight bits, a palette or grey, rows that follow each other as is.

    It takes two thirds of the decoder's time. None for any other file, and for one with anything wrong in it, which
    the decoder then judges.
    """
    width, height, data = stored
    # After the size come depth, colours and how rows are kept.
    if not data.startswith(_PNG) or data[24:29] not in (b"\x08\3\0\0\0", b"\x08\0\0\0\0"):
        return None
    compressed, names, at = [], set(), 8
    while b"IEND" not in names:
        end = at + 8 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if len(data) < end + 4 or zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4]):
            return None
        if name == b"IDAT":
            compressed.append(data[at + 8 : end])
        names.add(name)
        at = end + 4
    if data[25] == 3 and b"PLTE" not in names:
        return None
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


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _problem(path: Path, message: str) -> DataError:
    return DataError(Problem(str(path), message))
