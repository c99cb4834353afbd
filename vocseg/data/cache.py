"""Keeping decoded images, so that only the first epoch pays for decoding: in memory, else on disk.

On disk each pair has a file of its own, named after the pair's two files, their sizes and their times, so that a file
that has changed is decoded anew. It is written beside its place and then moved there, so that several runs may fill one
folder at once. It is read, not mapped into memory: faulting in the pages of a map costs more than copying them does,
and a map holds a file open for as long as its pixels are in use.

Not here: what is decoded (`images.py`, or a plugin).
"""

import contextlib
import os
import re
import secrets
import shutil
import struct
import time
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from vocseg.data.dataset import Dataset
from vocseg.data.images import image_size
from vocseg.errors import DataError, EnvironmentFault, Problem, shown_path

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]

IN_MEMORY = "decoded images are kept in memory"
"""How the note begins where that is so."""

_END = struct.Struct("<8sII")  # after the pixels of image and mask: the mark, height and width
_MARK = b"vocseg 1"
_LOOKS = 64  # images that are looked at to tell how large all are, and how many are on disk already
_WRITTEN = re.compile("[0-9a-f]{32}")
_ABANDONED = 3600  # seconds after which a file that is still being written belongs to a run that was killed


def cached(dataset: Dataset, setting: str, *, reader: str = "") -> tuple[Dataset, str]:
    """The same data set, which keeps what it has decoded; and a note where.

    Its images and masks are those of `dataset` to the byte, and cannot be written to.

    Args:
        setting: "off", a folder, or "auto". That is memory, if the whole split takes at most an eighth of it; else,
            for images that have files, the user's cache folder, if the disk has room; else nothing is kept. Processes
            of one machine share the eighth.
        reader: names what turns the files into pixels, where that is not `vocseg.data.images.read_pair`. Folders keep
            what different readers, or numbers of classes, make of one file apart.

    Raises:
        EnvironmentFault: the folder that `setting` names cannot be made.
    """
    without = "decoded images are not kept"
    if setting == "off":
        return dataset, without
    chosen = setting if setting != "auto" and dataset.files else ""
    size = _decoded_bytes(dataset)
    limit = memory_bytes() // 8 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if not chosen and size <= limit:
        return _in_memory(dataset, limit), f"{IN_MEMORY} ({_gigabytes(size)})"
    without += f": they take {_gigabytes(size)}, of memory they may have {_gigabytes(limit)}"
    if not dataset.files:
        return dataset, without
    home = Path(os.path.expanduser(chosen)) if chosen else _default_folder()
    folder = _Folder(home, f"{reader} {len(dataset.classes)}")
    if not chosen and not _has_room(folder, dataset, size):
        return dataset, f"{without}, and the disk of {shown_path(folder.home)} has no room"
    try:
        folder.open()
    except OSError as error:
        reason = f"cannot be made: {error.strerror or error}"
        if not chosen:
            return dataset, f"{without}, and {shown_path(folder.home)} {reason}"
        raise EnvironmentFault(
            Problem(str(folder.home), f'the folder of data.cache {reason}; name another, "auto" or "off"')
        ) from error
    note = f"decoded images are kept in {shown_path(folder.home)} ({_gigabytes(size)} when all are there)"
    return _on_disk(dataset, folder), note


def memory_bytes() -> int:
    """The machine's memory, or the container's where that has less; 4 GiB where it cannot be asked."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 << 30
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
            total = min(total, int(Path(limit).read_text()))
    return total


def _in_memory(dataset: Dataset, limit: int) -> Dataset:
    """Keeps pairs until they take `limit` bytes, which they do only if the images looked at were small ones."""
    kept: dict[int, Pair] = {}
    size = 0
    lock = Lock()

    def read(index: int) -> Pair:
        nonlocal size
        found = kept.get(index)
        if found is not None:
            return found
        pair = _locked(dataset.read(index))
        with lock:
            if index not in kept and size + pair[0].nbytes + pair[1].nbytes <= limit:
                kept[index] = pair
                size += pair[0].nbytes + pair[1].nbytes
        return pair

    return replace(dataset, read=read)


def _on_disk(dataset: Dataset, folder: "_Folder") -> Dataset:
    def read(index: int) -> Pair:
        try:
            place = folder.place(*dataset.files[index])
        except OSError:  # a file is missing, which the reader says better
            return _locked(dataset.read(index))
        pair = folder.load(place)
        if pair is None:
            pair = _locked(dataset.read(index))
            folder.save(place, pair)
        return pair

    return replace(dataset, read=read)


class _Folder:
    """Decoded pairs in files, by the files that they were decoded from.

    home/
        3f/9b01…      3 h w bytes of the image, h w of the mask, then mark, height and width
        unfinished/   what is being written
    """

    def __init__(self, home: Path, reader: str):
        self.home = home.absolute()
        self.writing = True
        self._unfinished = self.home / "unfinished"
        self._reader = reader.encode()

    def open(self) -> None:
        """Makes the folder, and clears up after runs that were killed while they wrote.

        Raises:
            OSError: the folder is not there and cannot be made.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # read-only; what is there can still be read
            self._unfinished.mkdir(exist_ok=True)
            for file in self._unfinished.iterdir():
                # Only what `save` named: the recipe may have been given any folder that has one of this name.
                if _WRITTEN.fullmatch(file.name) and file.stat().st_mtime < time.time() - _ABANDONED:
                    file.unlink()

    def place(self, image: Path, mask: Path) -> Path:
        """Where the pair of these two files is, or would be.

        Raises:
            OSError: one of the two is missing.
        """
        name = blake2b(self._reader, digest_size=16)
        for path in (image, mask):
            found = os.stat(path)
            name.update(b"\0%b\0%d %d" % (os.fsencode(os.path.abspath(path)), found.st_size, found.st_mtime_ns))
        digest = name.hexdigest()
        return self.home / digest[:2] / digest[2:]

    def load(self, place: Path) -> Pair | None:
        """The pair in that file; None if it is missing, cut off or something else."""
        try:
            with open(place, "rb", buffering=0) as file:
                data = file.read()
        except OSError:
            return None
        if len(data) < _END.size:
            return None
        mark, height, width = _END.unpack_from(data, len(data) - _END.size)
        pixels = height * width
        if mark != _MARK or len(data) != 4 * pixels + _END.size:
            return None
        image = np.frombuffer(data, np.uint8, 3 * pixels).reshape(height, width, 3)
        return image, np.frombuffer(data, np.uint8, pixels, 3 * pixels).reshape(height, width)

    def save(self, place: Path, pair: Pair) -> None:
        """Puts the pair there, unless the disk does not take it: then nothing more is written in this run."""
        image, mask = pair
        height, width = mask.shape
        if not self.writing or (image.shape, image.dtype, mask.dtype) != ((height, width, 3), np.uint8, np.uint8):
            return
        unfinished = self._unfinished / secrets.token_hex(16)
        try:
            with open(unfinished, "xb") as file:
                for array in pair:
                    file.write(np.ascontiguousarray(array).data)
                file.write(_END.pack(_MARK, height, width))
            place.parent.mkdir(exist_ok=True)
            os.replace(unfinished, place)
        except OSError:  # full, over quota, read-only, not ours
            self.writing = False
            with contextlib.suppress(OSError):
                unfinished.unlink()


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vocseg" / "decoded"


def _looks(dataset: Dataset, most: int = _LOOKS) -> list[int]:
    """Some images spread over the data set."""
    return np.linspace(0, len(dataset) - 1, min(most, len(dataset))).round().astype(int).tolist()


def _decoded_bytes(dataset: Dataset) -> int:
    """About how much all pairs take, judged by some; 0 where none of those can be read."""
    sizes = []
    for index in _looks(dataset) if dataset.files else _looks(dataset, 8):
        with contextlib.suppress(DataError):  # it is told when the image's turn comes
            height, width = image_size(dataset.files[index][0]) if dataset.files else dataset.read(index)[1].shape
            sizes.append(4 * height * width)
    return round(len(dataset) * sum(sizes) / max(1, len(sizes)))


def _has_room(folder: _Folder, dataset: Dataset, size: int) -> bool:
    """Whether a tenth of the disk, and twice the size, stay free once everything is there that is not yet."""
    looks = _looks(dataset)
    missing = len(looks)
    for index in looks:
        with contextlib.suppress(OSError):
            missing -= folder.place(*dataset.files[index]).exists()
    home = folder.home
    while not home.exists():
        home = home.parent
    try:
        disk = shutil.disk_usage(home)
    except OSError:
        return False
    return disk.free - size * missing / len(looks) >= max(disk.total / 10, 2 * size)


def _locked(pair: Pair) -> Pair:
    for array in pair:
        array.setflags(write=False)
    return pair


def _gigabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e8 else f"{size / 1e9:.2g} GB" if size < 1e9 else f"{size / 1e9:.1f} GB"
