"""What a JPEG or PNG file holds of an image, judged by its header before a decoder sees it.

A file may be made to cost more than it is worth. So a decoder gets the parts that make pixels and nothing else, no
profiles, texts, thumbnails or animations, of a file that is no larger than its pixels can be.
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

from vocseg.errors import DataError, Problem, one_line

MAX_PIXELS = 100_000_000
_MAX_SIDE = 65_535  # a JPEG's; PIL holds rows apart, and takes many times the memory for very many or very long ones

_BYTES_PER_PIXEL = 8  # of RGBA with 16 bits, which nothing larger compresses to
_SPARE_BYTES = 2**24  # what else a file may hold
_MAX_SEGMENTS = 10_000  # of a JPEG file before its pixels
_MAX_CHUNKS = 200_000  # of a PNG file; of 100 million pixels libpng makes 20,000
_MAX_SCANS = 100  # passes over a JPEG's pixels; encoders make about ten

PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_SCAN_OR_END = re.compile(b"\xff[\xda\xd9]")  # within compressed pixels 0xff comes with 0 or the number of a restart
_JPEG_EXTRAS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # applications' data but for JFIF's and Adobe's, and comments


class Stored(NamedTuple):
    """What a file holds of an image: as many pixels as its header says, and the bytes that make them."""

    width: int
    height: int
    data: bytes


def read_stored(path: Path, max_pixels: int, *, pixels: bool = True) -> Stored:
    """Judges a file by its header and, with `pixels`, reads what makes them, in memory that the header allows."""
    with naming(path):
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe is to wait for whoever writes into it
            raise problem(path, "expected a JPEG or PNG file, found a folder, a pipe or a device")
        with path.open("rb") as file:
            magic = file.read(8)
            file.seek(0)
            if magic == PNG:
                width, height, head = _png_header(file)
            elif magic.startswith(_JPEG):
                width, height, head = _jpeg_header(file)
            else:
                raise problem(
                    path, f"expected a JPEG or PNG file, found {'something else' if magic else 'an empty one'}"
                )
            if not width * height:
                raise problem(path, f"expected an image with pixels, found one of {width} x {height}")
            if width * height > max_pixels:
                raise problem(path, f"{width} x {height} pixels are more than the limit of {max_pixels:,}")
            if max(width, height) > _MAX_SIDE:
                raise problem(path, f"{width} x {height} pixels: a side has more than {_MAX_SIDE:,}")
            size = os.fstat(file.fileno()).st_size
            if size > _BYTES_PER_PIXEL * width * height + _SPARE_BYTES:
                raise problem(path, f"{size:,} bytes are more than {width} x {height} pixels can take; save it anew")
            if not pixels:
                return Stored(width, height, b"")
            rest = file.read()
        if magic == PNG:
            return Stored(width, height, head + b"".join(_png_pixels(rest)))
        scans = 1
        for marker in _SCAN_OR_END.finditer(rest):
            if marker[0] == _END:
                rest = rest[: marker.end()]
                break
            scans += 1
            if scans > _MAX_SCANS:
                raise problem(path, f"expected at most {_MAX_SCANS} scans of its pixels, found more; save it anew")
        return Stored(width, height, head + rest)


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
    at, name, chunks = 0, b"", 0
    while at + 8 <= len(data) and name != b"IEND":
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if name in (b"PLTE", b"IDAT", b"IEND"):
            chunks += 1
            if chunks > _MAX_CHUNKS:
                raise ValueError("its pixels are in more pieces than any encoder makes")
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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong inside into a DataError that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        raise problem(path, "no such file") from None
    except Exception as error:  # a decoder on damaged bytes raises OSError, SyntaxError, ValueError, zlib.error, …
        raise problem(path, f"cannot be read: {one_line(error) or type(error).__name__}") from error


def problem(path: Path, message: str) -> DataError:
    return DataError(Problem(str(path), message))
