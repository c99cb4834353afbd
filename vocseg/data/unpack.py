"""Unpacking VOC's and SBD's archives: plain files of known names, and nothing else.

An archive is checked against its SHA-256 before it comes here; this is the second line. The standard library's own
`extractall(filter="data")` was left to write outside its folder (CVE-2025-4517), and to read a header takes it as much
memory and time as the archive asks for (CVE-2024-6232, CVE-2025-8194).
"""

import gzip
import io
import os
import re
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from vocseg.errors import DataError, EnvironmentFault, Problem, one_line

MAX_FILE = 64 * 2**20
MAX_TOTAL = 16 * 2**30
MAX_MEMBERS = 200_000
"""Bytes in a file that is kept, bytes in all files, and files. The genuine archives hold 1 MB, 3 GB and 50,000."""

_MAX_LIST = 2**20  # bytes of a split list
_MAX_MAT = 16 * 2**20  # bytes of SBD's matrices of one image, once inflated
_MAX_RATIO = 100  # bytes in all files for each of a compressed archive; images do not even halve
_MAX_HEADER = 8192  # bytes of what stands before a file's own header, such as a long name
_MAX_DEFAULTS = 100  # fields that hold for all files after them

Unpacker = Callable[[tarfile.TarFile, str, Path, Path], None]
"""f(tar, its name, an empty folder to fill, the folder whose files will join those): what an archive is made into."""


def unpack(archive: Path, name: str, target: Path, unpacker: Unpacker) -> None:
    """Fills `target` from an archive.

    The files are unpacked into a folder within `target` and then moved one by one, the split lists last. So a split
    list that is there names files that are there, whatever stopped an earlier attempt.

    Args:
        name: what to call the archive in messages.

    Raises:
        DataError: the archive is damaged, or holds what it should not; nothing was moved.
    """
    target.mkdir(parents=True, exist_ok=True)
    for left_over in target.glob(".unpacking-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=target) as folder:
        fresh = Path(folder)
        try:
            with archive.open("rb") as file:
                compressed = file.read(2) == b"\x1f\x8b"
            with tarfile.open(archive, "r:gz" if compressed else "r:", tarinfo=_Member) as tar:
                unpacker(tar, name, fresh, target)
        except (
            tarfile.TarError,
            EOFError,
            zlib.error,
            gzip.BadGzipFile,
            ValueError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise DataError(Problem(name, f"cannot be unpacked: {one_line(error)}")) from error
        files = [path for path in fresh.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.suffix == ".txt", path)):
            place = target / path.relative_to(fresh)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)


def unpack_voc(tar: tarfile.TarFile, name: str, fresh: Path, target: Path) -> None:
    """Takes VOC's images, class masks and segmentation lists."""
    wanted = (
        rf"VOCdevkit/{target.name}/"
        r"(JPEGImages/[0-9_]+\.jpg|SegmentationClass/[0-9_]+\.png|ImageSets/Segmentation/[a-z]+\.txt)"
    )
    for match, content in wanted_files(tar, name, wanted):
        path = fresh / match[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            shutil.copyfileobj(content, file)


def unpack_sbd(tar: tarfile.TarFile, name: str, fresh: Path, target: Path) -> None:
    """Makes VOC's form of SBD's class masks: `SegmentationClassAug`, palette PNGs, and the list `trainaug`.

    trainaug is (SBD train + SBD val + VOC train) - VOC val: SBD labels VOC's images and splits them in another way, so
    some of its train images are in VOC 2012 val. An image that VOC has a mask for keeps that one; SBD's masks have no
    void border. (Hariharan et al. 2011, Semantic contours from inverse detectors, ICCV.)
    """
    from PIL import Image

    train, val = (set(read_list(target, split)) for split in ("train", "val"))
    masks = fresh / "SegmentationClassAug"
    masks.mkdir()
    for voc in train:
        shutil.copyfile(target / "SegmentationClass" / f"{voc}.png", masks / f"{voc}.png")
    with Image.open(masks / f"{min(train)}.png") as voc_mask:
        palette = [*(voc_mask.getpalette() or []), *[0] * 768][:768]  # fewer colours would be saved in fewer bits
    ids = set(train)
    for match, content in wanted_files(
        tar, name, r"benchmark_RELEASE/dataset/(?:cls/([0-9]{4}_[0-9]{6})\.mat|(?:train|val)\.txt)"
    ):
        if match[1] is None:
            ids.update(content.read().decode("ascii", "replace").split())
        elif match[1] not in train | val:
            mask = Image.fromarray(_read_sbd_mask(content.read(), f"{name}: {match[0]}"))
            mask.putpalette(palette)
            mask.save(masks / f"{match[1]}.png")
    trainaug = sorted(ids - val)
    problems = [
        Problem(f"{name}: {i}", "is in a split list but has no mask")
        for i in trainaug
        if not re.fullmatch("[0-9_]+", i) or not (masks / f"{i}.png").is_file()
    ]
    no_image = [i for i in trainaug if not (target / "JPEGImages" / f"{i}.jpg").is_file()]
    if no_image and not problems:
        problems = [
            Problem(
                str(target / "JPEGImages"),
                f"lacks {len(no_image):,} of trainaug's {len(trainaug):,} images, among them {no_image[0]}.jpg; "
                f"move {target} out of the way and fetch again",
            )
        ]
    if problems:
        raise DataError(*problems)
    lists = fresh / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "trainaug.txt").write_text("".join(f"{i}\n" for i in trainaug), encoding="ascii")


def read_list(folder: Path, split: str) -> list[str]:
    """The names in a split list of VOC's; none where it is missing."""
    path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    return path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []


def import_loadmat() -> Callable[..., Any]:
    """SciPy's reader of MATLAB files.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise EnvironmentFault("SBD's masks are MATLAB files and need scipy: pip install 'vocseg[sbd]'") from error
    return loadmat


def _read_sbd_mask(content: bytes, where: str) -> Any:
    """The (h, w) uint8 class ids, 0 to 20, in one of SBD's .mat files."""
    order = "<" if content[126:128] == b"IM" else ">"
    at = 128
    while at + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        inflate = zlib.decompressobj()
        if kind == 15:  # compressed; to SciPy, of any size
            with suppress(zlib.error):
                inflate.decompress(content[at + 8 : at + 8 + size], _MAX_MAT)
            if inflate.unconsumed_tail:
                raise DataError(Problem(where, f"expected matrices of at most {_MAX_MAT:,} bytes, found more"))
        at += 8 + size
    try:
        mask = import_loadmat()(io.BytesIO(content))["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # SciPy raises whatever the bytes lead it to
        raise DataError(Problem(where, f"cannot be read: {type(error).__name__}: {one_line(error)}")) from error
    if mask.ndim != 2 or mask.dtype != "uint8" or mask.max(initial=0) > 20:
        raise DataError(
            Problem(where, f"expected a uint8 mask of ids 0 to 20, found {mask.dtype} {mask.shape} up to {mask.max()}")
        )
    return mask


def wanted_files(tar: tarfile.TarFile, name: str, wanted: str) -> Iterator[tuple[re.Match[str], IO[bytes]]]:
    """The plain files whose whole name matches the pattern; the rest stays in the archive.

    Raises:
        DataError: a member leads out of the archive, or is a device; or it has a wanted name but is a link, too large,
            or in the archive twice; or the archive is too large.
    """
    seen = set()
    total = 0
    most = MAX_TOTAL
    if isinstance(tar.fileobj, gzip.GzipFile):
        most = min(most, max(MAX_FILE, _MAX_RATIO * os.path.getsize(tar.fileobj.name)))
    for count, member in enumerate(iter(tar.next, None), start=1):
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        total += member.size
        match = re.fullmatch(wanted, member.name.removeprefix("./"))
        most_here = _MAX_LIST if member.name.endswith(".txt") else MAX_FILE
        problem = ""
        if _leads_out(member.name):
            problem = "leads out of the archive"
        elif total > most or count > MAX_MEMBERS:
            problem = f"expected at most {most:,} bytes in {MAX_MEMBERS:,} files up to here, found more"
        elif member.isdev() or (match and not member.isreg()):
            problem = "expected a plain file, found a folder, a link or a device"
        elif (member.issym() or member.islnk()) and _leads_out(member.linkname):
            problem = "is a link that leads out of the archive"
        elif member.size < 0 or (match and member.size > most_here):
            problem = f"expected at most {most_here:,} bytes, found {member.size:,}"
        elif match and match[0] in seen:
            problem = "is in the archive twice"
        if problem:
            shown = ascii(member.name[:200])[1:-1]  # a name may hold anything, line breaks too
            raise DataError(Problem(f"{name}: {shown}", f"{problem}; nothing was unpacked"))
        if match:
            seen.add(match[0])
            content = tar.extractfile(member)
            assert content is not None  # it is a plain file
            yield match, content


def _leads_out(path: str) -> bool:
    return path.startswith("/") or ".." in path.split("/")


_PRECEDES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Member(tarfile.TarInfo):
    """A member whose header is refused before it takes much to read; tarfile calls these methods on each."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.size > _MAX_HEADER and self.type in _PRECEDES):
            raise tarfile.ReadError(f"expected headers of at most {_MAX_HEADER:,} bytes, found one of {self.size:,}")
        if len(tar.pax_headers) > _MAX_DEFAULTS:
            raise tarfile.ReadError(f"expected at most {_MAX_DEFAULTS} fields for all files, found more")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _refuse(self, *_: Any) -> NoReturn:
        raise tarfile.ReadError("expected plain files, found a sparse one")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse
