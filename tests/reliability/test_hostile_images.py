"""Hostile and damaged image files: refused before they are decoded, in a line that names them, at next to no cost."""

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vocseg.data.images import image_size, read_image, read_mask
from vocseg.errors import DataError

MEMORY = 200 * 2**20
SECONDS = 1.0

# Reads each file named, in room for 200 MB more, and prints what each reader said and the CPU time it took.
PROGRAM = """
import json, os, sys, time, warnings
from pathlib import Path
warnings.simplefilter("error")
from vocseg.data.images import image_size, read_image, read_mask
from vocseg.errors import DataError
if sys.platform == "linux":
    import resource
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
for file in sys.argv[1:]:
    for read in (read_image, read_mask, image_size):
        start = time.process_time()
        try:
            found = read(Path(file))
            said = f"{read.__name__} read it: {getattr(found, 'shape', found)}"
        except DataError as error:
            said = str(error)
        print(json.dumps([file, read.__name__, said, time.process_time() - start]))
""".replace("MEMORY", str(MEMORY))


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *between: bytes, bits: int = 8, colours: int = 0, body: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG with chunks before its pixels and after them."""
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + b"".join(between) + chunk(b"IDAT", body) + after + chunk(b"IEND")


def rows(width: int, height: int, channels: int = 1) -> bytes:
    return zlib.compress(bytes(height * (width * channels + 1)))


@cache
def inflating(mebibytes: int) -> bytes:
    """A zlib stream of so many mebibytes of zeros, made without that many."""
    deflate = zlib.compressobj()
    return b"".join([*(deflate.compress(bytes(2**20)) for _ in range(mebibytes)), deflate.flush()])


def jpeg(width: int = 16, height: int = 16, **options: object) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, "JPEG", **options)
    return content.getvalue()


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def segments(marker: int, content: bytes, count: int) -> bytes:
    """A JPEG with so many segments more in front."""
    data = jpeg()
    return data[:2] + (bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content) * count + data[2:]


def scans(count: int) -> bytes:
    """A progressive JPEG of a million pixels whose last scan is repeated."""
    content = io.BytesIO()
    Image.new("L", (1000, 1000)).save(content, "JPEG", progressive=True)
    data = content.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


TOO_LARGE, BEYOND = "pixels are more than the limit of 100,000,000", "bytes are more than"
DAMAGED, EMPTY, SIZELESS = "cannot be read", "found an empty one", "expected an image with pixels"
OTHER, NO_FILE = "found something else", "found a folder, a pipe or a device"

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG of a gigapixel": (lambda: png(40_000, 25_000, body=inflating(2)), TOO_LARGE),
    "PNG of a gigapixel in palette colours": (lambda: png(40_000, 25_000, colours=3, body=inflating(2)), TOO_LARGE),
    "PNG of a gigapixel in one row": (lambda: png(1_000_000_000, 1, bits=1, body=inflating(2)), TOO_LARGE),
    "PNG of one column": (lambda: png(1, 99_999_999, body=inflating(2)), "a side has more than 65,535"),
    "PNG of one row": (lambda: png(99_999_999, 1, body=inflating(2)), "a side has more than 65,535"),
    "PNG of the largest size": (lambda: png(2**32 - 1, 2**32 - 1, bits=16, colours=6), TOO_LARGE),
    "PNG without width": (lambda: png(0, 5, body=rows(0, 5)), SIZELESS),
    "PNG without height": (lambda: png(5, 0, body=rows(5, 0)), SIZELESS),
    "PNG without palette": (lambda: png(8, 8, colours=3, body=rows(8, 8)), DAMAGED),
    "PNG with no pixels": (lambda: png(8, 8), DAMAGED),
    "PNG of colours that are none": (lambda: png(8, 8, colours=5, body=rows(8, 8)), DAMAGED),
    "PNG of 3 bits": (lambda: png(8, 8, bits=3, body=rows(8, 8)), DAMAGED),
    "PNG without a header": (lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", rows(8, 8)) + chunk(b"IEND"), DAMAGED),
    "PNG that ends in its signature": (lambda: b"\x89PNG\r\n\x1a\n", DAMAGED),
    "JPEG of the largest size": (lambda: with_size(jpeg(), 65_535, 65_535), TOO_LARGE),
    "progressive JPEG of the largest size": (lambda: with_size(jpeg(progressive=True), 65_535, 65_535), TOO_LARGE),
    "JPEG without width": (lambda: with_size(jpeg(), 0, 16), SIZELESS),
    "JPEG without height": (lambda: with_size(jpeg(), 16, 0), SIZELESS),
    "JPEG of endless scans": (lambda: scans(20_000), "expected at most 100 scans"),
    "JPEG of 100,000 comments": (lambda: segments(0xFE, b"", 100_000), DAMAGED),
    "JPEG of 15 MB of EXIF": (lambda: segments(0xE1, b"Exif\0\0".ljust(65_000), 300), DAMAGED),
    "JPEG of 100,000 tables": (lambda: segments(0xDB, bytes(65), 100_000), DAMAGED),
    "JPEG of two sizes": (lambda: jpeg()[:-2].replace(b"\xff\xda", jpeg(32, 8)[2:600] + b"\xff\xda", 1), DAMAGED),
    "JPEG of fill bytes": (lambda: jpeg()[:2] + b"\xff" * 2_000_000 + jpeg()[2:], DAMAGED),
    "JPEG of junk": (lambda: jpeg()[:3] + bytes(2_000_000) + jpeg()[2:], DAMAGED),
    "JPEG that ends in its signature": (lambda: b"\xff\xd8\xff", DAMAGED),
    "an empty file": (lambda: b"", EMPTY),
    "a page of HTML": (lambda: b"<!doctype html><title>404</title>", OTHER),
    "a GIF": (lambda: b"GIF89a" + bytes(100), OTHER),
}  # fmt: skip

# What is beside the pixels is never looked at, whatever it holds: these are read, as cheaply as the rest is refused.
READ: dict[str, Callable[[], bytes]] = {
    "PNG with a profile of 250 MB": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + inflating(250)), body=rows(8, 8)),
    "PNG with a text of 250 MB": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + inflating(250)), body=rows(8, 8)),
    "PNG with an international text of 250 MB": lambda: png(
        8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + inflating(250)), body=rows(8, 8)
    ),
    "PNG with texts after its pixels": lambda: png(
        8, 8, body=rows(8, 8), after=chunk(b"zTXt", b"a\0\0" + inflating(60)) * 200
    ),
    "PNG with 500,000 empty chunks": lambda: png(8, 8, *[chunk(b"teXt")] * 500_000, body=rows(8, 8)),
    "PNG with pixels in 100,000 chunks": lambda: png(8, 8, *[chunk(b"IDAT")] * 100_000, body=rows(8, 8)),
    "PNG with more rows than it has": lambda: png(8, 8, body=inflating(250)),
    "PNG with transparency": lambda: png(8, 8, chunk(b"tRNS", b"\0\1"), body=rows(8, 8)),
    "PNG with two sizes": lambda: png(8, 8, png(9, 9)[8:33], body=rows(8, 8)),
    "animated PNG": lambda: png(
        8, 8, chunk(b"acTL", struct.pack(">II", 2**31, 0)), chunk(b"fcTL", bytes(26)), body=rows(8, 8)
    ),
    "animated PNG of no frames": lambda: png(8, 8, chunk(b"acTL", bytes(8)), chunk(b"acTL", bytes(8)), body=rows(8, 8)),
    "JPEG with EXIF": lambda: segments(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x1a\1\5\0\1\0\0\0\x88\x13\0\0", 1),
    "JPEG with 9,000 comments": lambda: segments(0xFE, b"", 9_000),
    "JPEG with 10 MB of EXIF": lambda: segments(0xE1, b"Exif\0\0".ljust(65_000), 150),
    "JPEG with 10 MB of profile": lambda: segments(0xE2, b"ICC_PROFILE\0\1\xff".ljust(65_000), 150),
    "JPEG with 100,000 restarts": lambda: jpeg()[:-2] + b"\xff\xd0" * 100_000 + b"\xff\xd9",
    "JPEG with another one behind it": lambda: jpeg() + jpeg(64, 64) * 1000,
}


def outcome(*files: Path) -> dict[str, dict[str, tuple[str, float]]]:
    """By file and reader, what is said in a process of its own, and the seconds it takes."""
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for file, reader, said, seconds in in_child(PROGRAM, *files):
        found.setdefault(file, {})[reader] = said, seconds
    return found


def in_child(program: str, *arguments: Path) -> list[list]:
    """The lines of JSON that a program prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write(folder: Path, makers: dict[str, Callable[[], bytes]]) -> dict[str, Path]:
    files = {}
    for i, (name, make) in enumerate(makers.items()):
        files[name] = folder / f"{i}.png"
        files[name].write_bytes(make())
    return files


needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither these limits nor these files")


@needs_limits
def test_hostile_images_are_refused_in_a_line_at_once_and_in_little_memory(tmp_path: Path) -> None:
    files = write(tmp_path, {name: make for name, (make, _) in REFUSED.items()})
    found = outcome(*files.values())
    for name, (_, message) in REFUSED.items():
        for reader, (said, seconds) in found[str(files[name])].items():
            if reader == "image_size" and " read it: " in said:
                assert message in (DAMAGED, "expected at most 100 scans")  # which its header does not show
                continue
            assert said.startswith(f"{files[name]}: "), (name, reader, said)
            assert message in said or (reader == "read_mask" and "must be a PNG file" in said), (name, reader, said)
            assert len(said.splitlines()) == 1
            assert seconds < SECONDS, (name, reader)


@needs_limits
def test_what_is_beside_the_pixels_costs_nothing(tmp_path: Path) -> None:
    files = write(tmp_path, READ)
    found = outcome(*files.values())
    for name, file in files.items():
        for reader, (said, seconds) in found[str(file)].items():
            of_jpeg = reader == "read_mask" and "JPEG" in name
            assert ("must be a PNG file" if of_jpeg else f"{reader} read it") in said, (name, said)
            assert seconds < SECONDS, (name, reader)


def make_special(folder: Path) -> dict[Path, str]:
    """Files that are none, or larger than their pixels can be; with what is said of each."""
    for name, begin in (("sparse", b""), ("sparse_png", png(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"zTXt")):
        with (folder / f"{name}.png").open("wb") as file:
            file.write(begin)
            file.truncate(2 * 2**30)
    with (folder / "sparse_jpeg.png").open("wb") as file:
        file.write(jpeg()[:-2])
        file.truncate(2 * 2**30)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    said = {
        "sparse": OTHER, "sparse_png": BEYOND, "sparse_jpeg": BEYOND, "folder": NO_FILE, "pipe": NO_FILE,
        "zero": NO_FILE, "loop": DAMAGED, "dangling": "no such file",
    }  # fmt: skip
    return {folder / f"{name}.png": message for name, message in said.items()}


@needs_limits
def test_what_is_no_file_or_far_too_large_is_refused_at_once(tmp_path: Path) -> None:
    special = make_special(tmp_path)
    found = outcome(*special)
    for path, message in special.items():
        for reader, (said, seconds) in found[str(path)].items():
            assert said.startswith(f"{path}: "), (path, reader, said)
            assert message in said, (path, reader, said)
            assert len(said.splitlines()) == 1
            assert seconds < SECONDS, (path, reader)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with something wrong somewhere: bits, bytes, a piece lost, doubled, moved or cut off."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        length = len(damaged)
        # The headers, where most can go wrong, are hit as often as the rest.
        at = int(rng.integers(min(length, 700) if rng.random() < 0.5 else length))
        size = int(rng.integers(1, 40))
        match int(rng.integers(7)):
            case 0:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
            case 2:
                damaged[at : at + size] = rng.bytes(size)
            case 3:
                del damaged[at : at + size]
            case 4:
                damaged[at:at] = damaged[at : at + size] * int(rng.integers(1, 5))
            case 5:
                other = int(rng.integers(length))
                damaged[at : at + size] = damaged[other : other + size]
            case 6 if length > 100:
                del damaged[int(rng.integers(100, length)) :]
        if not damaged:
            break
    return bytes(damaged)


def mended(data: bytes) -> bytes:
    """A PNG with its chunks' checksums put right, so that the damage comes further than to their comparison."""
    at, parts = 8, [data[:8]]
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        parts += [data[at:end], struct.pack(">I", zlib.crc32(data[at + 4 : end]))]
        at = end + 4
    return b"".join(parts)


def sound() -> list[bytes]:
    """Small JPEG and PNG files of all kinds."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    files = [jpeg(32, 24, **options) for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 100})]
    forms: list[tuple[Image.Image, str, dict]] = [
        (colours.convert("L"), "JPEG", {"restart_marker_rows": 1}),
        (colours.convert("CMYK"), "JPEG", {"optimize": True}),
        (colours, "JPEG", {"exif": Image.Exif(), "comment": b"x", "dpi": (72, 72)}),
        *((colours.convert(mode), "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        (Image.fromarray(rng.integers(0, 2**16, (24, 32), dtype=np.uint16)), "PNG", {}),
        (colours.convert("P").quantize(4), "PNG", {"bits": 2, "transparency": 0}),
        (colours, "PNG", {"save_all": True, "append_images": [colours.rotate(90)]}),
    ]
    for image, form, options in forms:
        content = io.BytesIO()
        image.save(content, form, **options)
        files.append(content.getvalue())
    return files


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.long)])
def test_a_damaged_image_gives_pixels_or_one_line_that_names_it(count: int, tmp_path: Path) -> None:
    files = sound()
    path = tmp_path / "damaged.png"
    rng = np.random.default_rng(count)
    read = 0
    for i in range(count):
        data = mutated(files[i % len(files)], rng)
        path.write_bytes(mended(data) if data.startswith(b"\x89PNG") and i % 3 else data)
        for reader in (read_image, read_mask):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    pixels = reader(path)
                    size = image_size(path)
            except DataError as error:
                (problem,) = error.problems
                assert problem.where == str(path)
                assert len(str(problem).splitlines()) == 1, problem
                assert str(problem).isprintable(), problem
            else:
                read += 1
                assert pixels.dtype == np.uint8
                assert pixels.shape == (*size, 3)[: pixels.ndim]
    # As many of each as to tell something: damage that is noticed, and damage that only changes pixels.
    assert 0.1 * count < read < 1.5 * count


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a network that was hardly trained."""
    from vocseg.recipe.prepare import load_recipe
    from vocseg.run import start

    small = ("data.images=4", "data.val_images=2", "data.size=32", "data.batch_size=2", "train.epochs=1")
    recipe, _ = load_recipe("quickstart", overrides=small)
    *_, finished = start(recipe, out=tmp_path_factory.mktemp("runs"), device="cpu")
    return finished.run


HOSTILE = ("PNG of a gigapixel", "JPEG of the largest size", "JPEG of endless scans", "PNG without palette")


# In processes of their own too: a reader that waits for a pipe waits for ever.
PREDICT = """
import json, sys
from click.testing import CliRunner
from vocseg.cli.predict import command
run, out, *folders = sys.argv[1:]
for folder in folders:
    result = CliRunner().invoke(command, [run, folder, "--out", out])
    print(json.dumps([str(problem) for problem in getattr(result.exception, "problems", [repr(result.exception)])]))
"""
VERIFY = """
import json, sys
from pathlib import Path
from vocseg.data.folder import folder
from vocseg.data.verify import verify
dataset = folder(Path(sys.argv[1]), "all", classes=("background", "aeroplane", "cat", "person"))
for problem in verify({"all": dataset}).problems:
    print(json.dumps([problem.where, problem.message]))
"""


@needs_limits
def test_predict_names_hostile_images_and_keeps_what_it_segmented(trained: Path, tmp_path: Path) -> None:
    expected = []
    for i, hostile in enumerate((*make_special(tmp_path), *HOSTILE)):
        folder = tmp_path / f"images{i}"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(jpeg(40, 30))
        if isinstance(hostile, Path):
            special = make_special(folder)
            path = folder / hostile.name
            message = special.pop(path)
            for other in special:
                other.rmdir() if other.name == "folder.png" else other.unlink()
        else:
            path = folder / "hostile.png"
            path.write_bytes(REFUSED[hostile][0]())
            message = REFUSED[hostile][1]
        expected.append((path, message))
    kept = tmp_path / "kept"
    found = in_child(PREDICT, trained, kept, *(path.parent for path, _ in expected))
    assert len(found) == len(expected) == 12
    for (path, message), problems in zip(expected, found, strict=True):
        assert len(problems) == 1
        assert problems[0].startswith(f"{path}: "), problems
        assert message in problems[0], problems
    assert sorted(p.name for p in kept.iterdir()) == ["a.png", "a_overlay.png"]


@needs_limits
def test_verify_names_every_hostile_image_and_mask(folder_root: Path) -> None:
    expected = {}
    for home, other in (("images", "masks"), ("masks", "images")):
        hostile = make_special(folder_root / home)
        hostile.pop(folder_root / home / "folder.png")  # in which it would look for more
        hostile.pop(folder_root / home / "loop.png")  # which is none once it gets another name
        (folder_root / home / "loop.png").unlink()
        for name in HOSTILE:
            path = folder_root / home / f"{name.replace(' ', '_')}.png"
            path.write_bytes(REFUSED[name][0]())
            hostile[path] = REFUSED[name][1]
        for path, message in hostile.items():
            renamed = path.with_name(f"{home}_{path.name}")
            path.rename(renamed)
            Image.new("L", (8, 8)).save(folder_root / other / renamed.name)
            expected[str(renamed)] = message
    found = in_child(VERIFY, folder_root)
    assert sorted(where for where, _ in found) == sorted(expected)
    assert len(found) == 20
    for where, message in found:
        assert expected[where] in message or ("JPEG" in where and "must be a PNG file" in message), (where, message)


def test_a_png_of_a_million_empty_pieces_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pieces.png"
    Image.new("RGB", (8, 8)).save(path)
    data, empty = path.read_bytes(), b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4)
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + 1000 * empty + data[at:])
    assert read_image(path).shape == (8, 8, 3)
    path.write_bytes(data[:at] + 1_000_000 * empty + data[at:])
    with pytest.raises(DataError, match=r"pieces.png: cannot be read: its pixels are in more pieces"):
        read_image(path)
