"""Hostile archives, through `vocseg data fetch`: refused in a line, nothing outside, nothing half-moved, little memory.

Each archive has the SHA-256 that is asked for, as if whoever published it had turned against us, and holds a genuine
data set before what is hostile in it.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vocseg.data.unpack import unpack, unpack_sbd
from vocseg.errors import DataError

BASE = "VOCdevkit/VOC2007"
IMAGE = f"{BASE}/JPEGImages/000032.jpg"
END = bytes(1024)
MEMORY = 200 * 2**20
SECONDS = 10

# What `vocseg data fetch` is run as: with one archive, put into its folder by hand, and room for 200 MB more.
PROGRAM = """
import resource, sys
from pathlib import Path
from vocseg.cli import main
from vocseg.data import fetch, unpack
folder, sha256, members = sys.argv[1:]
archive = fetch.Archive("voc.tar", 1, sha256, ("https://localhost/voc.tar",), "VOC2007", ("train", "val"), 1)
fetch.ARCHIVES["voc2007"] = (archive,)
unpack.MAX_MEMBERS = int(members)
if sys.platform == "linux":
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
sys.argv[1:] = ["data", "fetch", "voc2007", "--data", folder]
main()
""".replace("MEMORY", str(MEMORY))


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")


def member(name: str, content: bytes = b"evil", kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> bytes:
    return header(name, 0, kind, target)


def pax(*fields: str, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header: each field with its own length in front."""
    records = []
    for field in fields:
        length = len(field) + 3
        while len(f"{length} {field}\n") != length:
            length += 1
        records.append(f"{length} {field}\n".encode())
    return member("pax", b"".join(records), kind)


def picture(mode: str, form: str) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (8, 6)).save(content, form)
    return content.getvalue()


def genuine() -> bytes:
    names = {"train": ["000032"], "val": ["000042"]}
    parts = [header("VOCdevkit", kind=tarfile.DIRTYPE), header(BASE, kind=tarfile.DIRTYPE)]
    for split, (name,) in names.items():
        parts.append(member(f"{BASE}/JPEGImages/{name}.jpg", picture("RGB", "JPEG")))
        parts.append(member(f"{BASE}/SegmentationClass/{name}.png", picture("P", "PNG")))
        parts.append(member(f"{BASE}/ImageSets/Segmentation/{split}.txt", f"{name}\n".encode()))
    return b"".join(parts)


def bomb(*parts: bytes | int) -> bytes:
    """What gzip makes of the parts, of which a number stands for as many mebibytes of zeros."""
    mebibyte = gzip.compress(bytes(2**20), mtime=0)
    return b"".join(mebibyte * part if isinstance(part, int) else gzip.compress(part, 1, mtime=0) for part in parts)


def by_way_of_long_links(outside: Path) -> bytes:
    """CVE-2025-4517: links through a path so long that it is not resolved to its end, and a file behind them."""
    long, path, parts = "d" * 247, BASE, []
    steps = "abcdefghijklmnop"
    for step in steps:
        parts += [header(f"{path}/{long}", kind=tarfile.DIRTYPE), link(f"{path}/{step}", long)]
        path += f"/{long}"
    end = f"{'/'.join(steps)}/{'l' * 254}"
    parts.append(link(f"{BASE}/{end}", "../" * len(steps)))
    parts.append(link(f"{BASE}/JPEGImages", f"{end}{'/..' * 20}{outside}"))
    parts.append(link(f"{BASE}/hard", f"{BASE}/JPEGImages/canary", tarfile.LNKTYPE))
    return b"".join([*parts, member(f"{BASE}/hard"), member(f"{BASE}/JPEGImages/000033.jpg")])


def sparse() -> bytes:
    info = tarfile.TarInfo(f"{BASE}/JPEGImages/000033.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf()


LEADS_OUT, NOT_PLAIN, TWICE = "leads out of the archive", "found a folder, a link or a device", "in the archive twice"
BROKEN, TOO_MUCH = "cannot be unpacked", "expected at most"
STILL_MISSING = "a split list, image or mask of train or val is still missing"

# Each case: what follows the genuine data set, or the whole archive, and what is said of it.
Case = tuple[Callable[[Path], bytes], str]
CASES: dict[str, Case] = {
    "parent": (lambda out: genuine() + member(f"{BASE}/JPEGImages/../../../../outside/evil"), LEADS_OUT),
    "absolute": (lambda out: genuine() + member(f"{out}/evil"), LEADS_OUT),
    "symlink in place of an image": (lambda out: link(IMAGE, f"{out}/canary") + genuine(), NOT_PLAIN),
    "hard link in place of an image": (lambda out: link(IMAGE, f"{out}/canary", tarfile.LNKTYPE) + END, NOT_PLAIN),
    "symlink in place of a folder": (lambda out: link(f"{BASE}/JPEGImages", str(out)) + genuine(), LEADS_OUT),
    "symlink to a parent": (lambda out: link(BASE, "../../outside") + genuine(), LEADS_OUT),
    "links by a long path": (by_way_of_long_links, LEADS_OUT),
    "character device": (lambda out: genuine() + header("zero", kind=tarfile.CHRTYPE), NOT_PLAIN),
    "block device": (lambda out: genuine() + header("disk", kind=tarfile.BLKTYPE), NOT_PLAIN),
    "pipe": (lambda out: genuine() + header(IMAGE, kind=tarfile.FIFOTYPE), NOT_PLAIN),
    "folder in place of an image": (lambda out: header(IMAGE, kind=tarfile.DIRTYPE) + genuine(), NOT_PLAIN),
    "the same name twice": (lambda out: genuine() + member(IMAGE), TWICE),
    "the same name in two spellings": (lambda out: genuine() + member(f"./{IMAGE}"), TWICE),
    "an image of 65 MiB": (lambda out: bomb(genuine() + header(f"{BASE}/JPEGImages/1.jpg", 65 << 20), 65), TOO_MUCH),
    "a list of 2 MiB": (lambda out: member(f"{BASE}/ImageSets/Segmentation/all.txt", bytes(2 << 20)), TOO_MUCH),
    "a size that is a lie": (lambda out: genuine() + header(f"{BASE}/JPEGImages/1.jpg", 9000) + bytes(99), BROKEN),
    "a size below zero": (lambda out: genuine() + pax("size=-5120") + member("again"), TOO_MUCH),
    "a size that has no end": (lambda out: genuine() + pax(f"size={'9' * 4000}") + member("vast"), TOO_MUCH),
    "gzip bomb": (lambda out: bomb(genuine() + header("zeros", 4000 << 20), 4000), TOO_MUCH),
    "gzip bomb of wanted files": (
        lambda out: bomb(genuine(), *(p for i in range(9) for p in (header(f"{BASE}/JPEGImages/{i}.jpg", 9 << 20), 9))),
        TOO_MUCH,
    ),
    "gzip bomb of a pax header": (lambda out: bomb(genuine() + header("p", 2000 << 20, b"x"), 2000), BROKEN),
    "gzip bomb of defaults": (lambda out: bomb(genuine() + header("p", 2000 << 20, b"g"), 2000), BROKEN),
    "gzip bomb of a long name": (lambda out: bomb(genuine() + header("n", 2000 << 20, b"L"), 2000), BROKEN),
    "gzip bomb of a long link": (lambda out: bomb(genuine() + header("n", 2000 << 20, b"K"), 2000), BROKEN),
    "headers of headers": (lambda out: genuine() + pax("comment=x") * 5000 + member("deep"), BROKEN),
    "digits that take a regular expression long": (
        lambda out: genuine() + (member("p", b"1" * 8000, b"x") + member("slow")) * 20,
        "",
    ),
    "ever more defaults": (
        lambda out: genuine() + b"".join(pax(f"k{i}={'v' * 4000}", kind=b"g") + member("m") for i in range(300)),
        BROKEN,
    ),
    "sparse file": (lambda out: genuine() + sparse(), BROKEN),
    "sparse file of pax": (
        lambda out: (
            genuine()
            + pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=9")
            + member("s", b"99999999\n" + b"1\n" * 9000)
        ),
        BROKEN,
    ),
    "too many members": (lambda out: genuine() + header("empty") * 3000, TOO_MUCH),
    "truncated within a file": (lambda out: genuine()[:-3000], BROKEN),
    "truncated between files": (lambda out: header("VOCdevkit", kind=tarfile.DIRTYPE), STILL_MISSING),
    "truncated gzip": (lambda out: gzip.compress(genuine() + END)[:-200], BROKEN),
    "noise": (lambda out: bytes(i * i % 251 for i in range(20_000)), BROKEN),
    "empty": (lambda out: b"", BROKEN),
    "zeros": (lambda out: bytes(10_240), STILL_MISSING),
    "another compression": (lambda out: lzma.compress(genuine() + END), BROKEN),
    "a third compression": (lambda out: bz2.compress(genuine() + END), BROKEN),
    "a name of more than one line": (lambda out: genuine() + member("/one\ntwo\x1b[31m\udcff"), LEADS_OUT),
    "lists that name what is elsewhere": (
        lambda out: member(f"{BASE}/ImageSets/Segmentation/train.txt", f"{'n' * 5000} ../../../outside".encode()),
        STILL_MISSING,
    ),
}


def fetch(archive: bytes, folder: Path, members: int = 2000) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs `vocseg data fetch voc2007` on an archive that lies in the folder; with the seconds it took."""
    folder.mkdir()
    (folder / "voc.tar").write_bytes(archive)
    arguments = [str(folder), hashlib.sha256(archive).hexdigest(), str(members)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder.parent)},
        timeout=60,
    )
    return done, time.monotonic() - start


def below(folder: Path) -> list[str]:
    """Everything that is not a folder, links too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no process's memory")


@needs_limits
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_archive_is_refused_in_a_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    make, message = CASES[case]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text("untouched")
    done, seconds = fetch(make(outside), tmp_path / "data")
    if message:
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        problems = [line for line in done.stderr.splitlines() if not line.startswith(("checking ", "unpacking "))]
        assert len(problems) == 1, done.stderr
        assert message in problems[0]
        assert "voc.tar" in problems[0]
        assert len(problems[0]) < 1000
        assert problems[0].isprintable()
    allowed = ["voc.tar"]
    if message == STILL_MISSING or not message:  # what was unpacked is whole, as far as it goes
        allowed += [name for name in below(tmp_path / "data") if name.startswith(BASE)]
    assert below(tmp_path / "data") == sorted(allowed)
    assert below(tmp_path) == sorted(["outside/canary", *(f"data/{name}" for name in allowed)])
    assert (outside / "canary").read_text() == "untouched"
    assert seconds < SECONDS


@needs_limits
def test_the_genuine_part_of_the_hostile_archives_is_taken(tmp_path: Path) -> None:
    # Else they might all be refused for what is wrong with it.
    for name, archive in (("plain", genuine() + END), ("compressed", gzip.compress(genuine() + END))):
        done, _ = fetch(archive, tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert len(below(tmp_path / name)) == 7


@needs_limits
def test_a_name_that_only_begins_or_ends_as_a_wanted_one_stays_in_the_archive(tmp_path: Path) -> None:
    others = [
        f"{BASE}/JPEGImages", f"{IMAGE}.exe", f"{IMAGE}/inner.jpg", f"{BASE}/JPEGImages/.jpg", f"x/{IMAGE}",
        f"{BASE}/JPEGImages/000032.jpg ", f"{BASE}/JPEGImages/\u0660.jpg", f"{BASE.replace('2007', '2012')}/a.jpg",
        f"{BASE}/ImageSets/Segmentation/Train.txt", f"{BASE}/JPEGImages/..jpg", f"{BASE}/JPEGImages\\..\\evil.jpg",
    ]  # fmt: skip
    done, _ = fetch(genuine() + b"".join(map(member, others)) + END, tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert len(below(tmp_path / "data")) == 7
    assert b"evil" not in b"".join(p.read_bytes() for p in (tmp_path / "data/VOCdevkit").rglob("*") if p.is_file())


@needs_limits
@pytest.mark.long
def test_two_hundred_thousand_members_are_the_most(tmp_path: Path) -> None:
    thousand = gzip.compress(header("empty") * 1000, mtime=0)
    done, seconds = fetch(gzip.compress(genuine()) + thousand * 199 + gzip.compress(END), tmp_path / "fewer", 200_000)
    assert done.returncode == 0, done.stderr
    done, seconds = fetch(gzip.compress(genuine()) + thousand * 201 + gzip.compress(END), tmp_path / "more", 200_000)
    assert done.returncode == 3
    assert "in 200,000 files up to here, found more; nothing was unpacked" in done.stderr
    assert seconds < 60


def test_matrices_of_sbd_that_inflate_without_end_are_refused(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    content = io.BytesIO()
    savemat(content, {"GTcls": bytes(40 << 20)}, do_compression=True)
    assert len(content.getvalue()) < 100_000
    archive = tmp_path / "benchmark.tgz"
    archive.write_bytes(
        gzip.compress(member("benchmark_RELEASE/dataset/cls/2008_000004.mat", content.getvalue()) + END)
    )
    voc = tmp_path / "VOC2012"
    for split, name in (("train", "2008_000001"), ("val", "2008_000002")):
        for file, data in (
            (f"ImageSets/Segmentation/{split}.txt", name.encode()),
            (f"SegmentationClass/{name}.png", picture("P", "PNG")),
        ):
            (voc / file).parent.mkdir(parents=True, exist_ok=True)
            (voc / file).write_bytes(data)
    with pytest.raises(DataError, match=re.escape("2008_000004.mat: expected matrices of at most 16,777,216 bytes")):
        unpack(archive, "benchmark.tgz", voc, unpack_sbd)
    assert not (voc / "SegmentationClassAug").exists()
