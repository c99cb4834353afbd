"""The cache of decoded images: always the bytes that decoding gives, and never in the way of a run."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from vocseg.data.cache import IN_MEMORY, cached
from vocseg.data.dataset import Dataset
from vocseg.data.images import read_pair
from vocseg.errors import DataError, EnvironmentFault
from vocseg.report.palette import save_palette_mask

SIZE = (24, 36)


def write_pair(folder: Path, number: int, ids: int = 3, size: tuple[int, int] = SIZE) -> tuple[Path, Path]:
    rng = np.random.default_rng(number)
    image, mask = folder / f"{number}.jpg", folder / f"{number}.png"
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image, quality=90)
    save_palette_mask(rng.integers(0, ids, size, dtype=np.uint8), mask)
    return image, mask


def dataset_of(files: Sequence[tuple[Path, Path]], classes: int = 3) -> Dataset:
    def read(index: int):
        return read_pair(*files[index], classes)

    return Dataset(tuple(map(str, range(classes))), range(len(files)), read, files)


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, Path]]:
    home = tmp_path / "images"
    home.mkdir()
    return [write_pair(home, number) for number in range(5)]


def counted(dataset: Dataset) -> tuple[Dataset, list[int]]:
    """The data set, and which images were decoded."""
    reads: list[int] = []
    read = lambda index: (reads.append(index), dataset.read(index))[1]  # noqa: E731
    return Dataset(dataset.classes, dataset.names, read, dataset.files), reads


def assert_same(found: Dataset, expected: Dataset) -> None:
    for index in range(len(expected)):
        for array, decoded in zip(found.read(index), expected.read(index), strict=True):
            assert array.dtype == np.uint8
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, decoded)


def entries(home: Path) -> list[Path]:
    return sorted(path for path in home.glob("*/*") if path.parent.name != "unfinished")


def crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many processes share the machine that no image has room in the memory of one; half of its disk is free."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**12))
    monkeypatch.setattr(
        "vocseg.data.cache.shutil.disk_usage", lambda _: Disk(total=10**12, used=5 * 10**11, free=5 * 10**11)
    )


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def need_room(folder: Path) -> None:
    disk = shutil.disk_usage(folder)
    if disk.free < disk.total / 10 + 10**9:
        pytest.skip("the disk of the temporary folder is nearly full: nothing would be put there")


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_is_read_is_what_decoding_gives_and_each_image_is_decoded_once(place, files, tmp_path):
    plain = dataset_of(files)
    counting, reads = counted(plain)
    kept, note = cached(counting, "auto" if place == "memory" else str(tmp_path / "kept"))
    for _ in range(2):
        assert_same(kept, plain)
    assert reads == [0, 1, 2, 3, 4]
    assert (kept.classes, kept.names, kept.files) == (plain.classes, plain.names, plain.files)
    # 5 pairs of 24 x 36 pixels of 4 bytes: 17 kB, which is 0 MB
    where = IN_MEMORY if place == "memory" else f"decoded images are kept in {tmp_path / 'kept'}"
    assert note == f"{where} (0 MB{'' if place == 'memory' else ' when all are there'})"


def test_off_leaves_the_data_set_as_it_is(files):
    plain = dataset_of(files)
    assert cached(plain, "off") == (plain, "decoded images are not kept")


def test_another_run_reads_what_one_has_decoded(files, tmp_path):
    assert_same(cached(dataset_of(files), str(tmp_path / "kept"))[0], dataset_of(files))
    counting, reads = counted(dataset_of(files))
    assert_same(cached(counting, str(tmp_path / "kept"))[0], dataset_of(files))
    assert reads == []


def test_a_file_that_changes_is_decoded_anew(files, tmp_path):
    kept, _ = cached(dataset_of(files), str(tmp_path / "kept"))
    image, mask = files[2]
    ids = read_pair(image, mask, 3)[1]
    Image.fromarray(ids).save(mask, compress_level=0)
    kept.read(2)

    ids, size = (ids + 1) % 3, mask.stat().st_size
    Image.fromarray(ids).save(mask, compress_level=0)
    assert mask.stat().st_size == size
    os.utime(mask, ns=(0, mask.stat().st_mtime_ns + 1))
    np.testing.assert_array_equal(kept.read(2)[1], ids)

    at = image.stat().st_mtime_ns
    image.write_bytes(image.read_bytes() + b"\0")  # another size at the same time
    os.utime(image, ns=(at, at))
    counting, reads = counted(dataset_of(files))
    assert_same(cached(counting, str(tmp_path / "kept"))[0], dataset_of(files))
    assert 2 in reads


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "shorter", "foreign", "a folder"])
def test_a_damaged_entry_is_made_anew(damage, files, tmp_path):
    plain = dataset_of(files)
    assert_same(cached(plain, str(tmp_path / "kept"))[0], plain)
    whole = {path: path.read_bytes() for path in entries(tmp_path / "kept")}
    assert len(whole) == 5
    for path, data in whole.items():
        if damage == "a folder":
            path.unlink()
            path.mkdir()
            continue
        bad = {
            "truncated": data[:-1],
            "empty": b"",
            "longer": b"\0" + data,
            "shorter": data[1:],
            "foreign": data[:-16] + b"another1" + data[-8:],
        }
        path.write_bytes(bad[damage])
    assert_same(cached(plain, str(tmp_path / "kept"))[0], plain)
    if damage != "a folder":  # which cannot be replaced: reading goes on without
        assert {path: path.read_bytes() for path in entries(tmp_path / "kept")} == whole


READ_ALL = """
import hashlib, sys
from pathlib import Path
from typing import NamedTuple
from vocseg.data.cache import cached
from vocseg.data.dataset import Dataset
from vocseg.data.images import read_pair
images, kept, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows beyond the limit is an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
files = [(image, image.with_suffix(".png")) for image in sorted(images.glob("*.jpg"))]
dataset, _ = cached(Dataset(("a", "b", "c"), range(len(files)), lambda i: read_pair(*files[i], 3), files), kept)
print("ready", flush=True)
sys.stdin.readline()
digest = hashlib.sha256()
for _ in range(3):
    for index in range(len(files)):
        for array in dataset.read(index):
            digest.update(array)
print(digest.hexdigest())
"""


def readers(count: int, images: Path, kept: Path, limit: int = 0) -> list[str]:
    """What so many processes read, who begin at the same moment."""
    command = [sys.executable, "-c", READ_ALL, str(images), str(kept), str(limit)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * count
    return outputs


def digest_of(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for _ in range(3):
        for index in range(len(dataset)):
            for array in dataset.read(index):
                digest.update(array)
    return digest.hexdigest()


def test_two_processes_fill_one_folder_at_once(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    files = [write_pair(images, number, size=(100, 120)) for number in range(40)]
    expected = digest_of(dataset_of(sorted(files)))
    assert readers(2, images, tmp_path / "kept") == [expected] * 2
    assert len(entries(tmp_path / "kept")) == 40
    assert not list((tmp_path / "kept" / "unfinished").iterdir())
    counting, reads = counted(dataset_of(files))
    assert_same(cached(counting, str(tmp_path / "kept"))[0], dataset_of(files))
    assert reads == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits are set as on Unix")
def test_on_a_full_disk_reading_goes_on_from_the_files(files, tmp_path):
    # 3 kB have no room for 24 x 36 x 4 bytes.
    assert readers(1, files[0][0].parent, tmp_path / "kept", limit=3000) == [digest_of(dataset_of(files))]
    assert not entries(tmp_path / "kept")
    assert not list((tmp_path / "kept" / "unfinished").iterdir())


def test_where_nothing_can_be_written_what_is_there_is_still_read(files, tmp_path):
    home = tmp_path / "kept"
    cached(dataset_of(files), str(home))[0].read(0)
    (home / "unfinished").rmdir()
    (home / "unfinished").write_text("no folder")  # which stops root, too
    counting, reads = counted(dataset_of(files))
    assert_same(cached(counting, str(home))[0], dataset_of(files))
    assert reads == [1, 2, 3, 4]
    assert len(entries(home)) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_still_read(files, tmp_path):
    home = tmp_path / "kept"
    cached(dataset_of(files), str(home))[0].read(0)
    (home / "unfinished").chmod(0o500)
    home.chmod(0o500)
    counting, reads = counted(dataset_of(files))
    assert_same(cached(counting, str(home))[0], dataset_of(files))
    assert reads == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_made_is_named(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        EnvironmentFault, match=r"file/kept: the folder of data\.cache cannot be made: Not a directory; name"
    ):
        cached(dataset_of(files), str(tmp_path / "file" / "kept"))


def test_auto_takes_the_users_folder_where_memory_lacks(files, tmp_path, monkeypatch):
    need_room(tmp_path)
    crowd(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    kept, note = cached(dataset_of(files), "auto")
    assert note == f"decoded images are kept in {tmp_path}/caches/vocseg/decoded (0 MB when all are there)"
    assert_same(kept, dataset_of(files))
    assert len(entries(tmp_path / "caches/vocseg/decoded")) == 5

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert f"{tmp_path}/me/.cache/vocseg/decoded" in cached(dataset_of(files), "auto")[1]


def test_auto_keeps_nothing_where_the_users_folder_cannot_be_made(files, tmp_path, monkeypatch):
    need_room(tmp_path)
    crowd(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plain = dataset_of(files)
    kept, note = cached(plain, "auto")
    assert kept is plain
    assert note.endswith("file/vocseg/decoded cannot be made: Not a directory")


class Repeated(Sequence):
    """One thing, very many times."""

    def __init__(self, thing, times):
        self.thing, self.times = thing, times

    def __getitem__(self, index):
        return self.thing

    def __len__(self):
        return self.times


def test_auto_keeps_nothing_where_neither_memory_nor_disk_has_room(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    many = dataset_of(Repeated(files[0], 10**12))  # 24 x 36 x 4 bytes each: 3.5 PB
    kept, note = cached(many, "auto")
    assert kept is many
    assert note.startswith("decoded images are not kept: they take 3456000.0 GB, of memory they may have ")
    assert note.endswith("caches/vocseg/decoded has no room")
    assert not (tmp_path / "caches").exists()


def test_images_without_files_are_kept_in_memory_or_not_at_all(tmp_path, monkeypatch):
    def read(index: int):
        return np.full((4, 4, 3), index, np.uint8), np.full((4, 4), index % 2, np.uint8)

    drawn = Dataset(("a", "b"), range(3), read)
    for setting in ("auto", str(tmp_path / "kept")):
        counting, reads = counted(drawn)
        kept, note = cached(counting, setting)
        assert note.startswith(IN_MEMORY)
        looked_at = len(reads)  # to tell how large they are
        for _ in range(2):
            assert_same(kept, drawn)
        assert reads[looked_at:] == [0, 1, 2]
    crowd(monkeypatch)
    assert cached(drawn, str(tmp_path / "kept"))[0] is drawn
    assert not (tmp_path / "kept").exists()


def test_no_more_is_kept_in_memory_than_was_planned(files, monkeypatch):
    # The eight images that are looked at have one pixel; the others have 200 x 200.
    def read(index: int):
        size = (1, 1) if index in looked_at else (200, 200)
        return np.full((*size, 3), index, np.uint8), np.zeros(size, np.uint8)

    looked_at = set(np.linspace(0, 127, 8).round().astype(int).tolist())
    counting, reads = counted(Dataset(("a", "b"), range(128), read))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    kept, _ = cached(counting, "auto")
    del reads[:]
    for _ in range(2):
        for index in range(128):
            assert kept.read(index)[0].max() == index
    assert reads == list(range(128))  # an eighth of this machine's memory is far more than these take
    # An eighth of the memory shared by so many that some 1,500 bytes are left: the 4 of each small one, no large one.
    from vocseg.data.cache import memory_bytes

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(memory_bytes() // 8 // 1500))
    kept, _ = cached(counting, "auto")
    del reads[:]
    for _ in range(2):
        for index in range(128):
            kept.read(index)
    assert sorted(reads) == sorted([*range(128), *(set(range(128)) - looked_at)])


def test_ids_are_checked_against_the_classes_of_this_run(files, tmp_path):
    assert_same(cached(dataset_of(files, 3), str(tmp_path / "kept"))[0], dataset_of(files, 3))
    kept, _ = cached(dataset_of(files, 2), str(tmp_path / "kept"))
    with pytest.raises(DataError, match="unknown ids 2; 2 classes"):
        kept.read(0)


def test_what_readers_make_of_the_same_files_is_kept_apart(files, tmp_path):
    def swapped(index: int):
        image, mask = read_pair(*files[index], 3)
        return image[..., ::-1].copy(), 2 - mask

    plain = dataset_of(files)
    other = Dataset(plain.classes, plain.names, swapped, files)
    for _ in range(2):
        assert_same(cached(plain, str(tmp_path / "kept"))[0], plain)
        assert_same(cached(other, str(tmp_path / "kept"), reader="swapped")[0], other)


@pytest.mark.parametrize("setting", ["auto", "folder"])
def test_what_cannot_be_read_is_told_as_without_a_cache(setting, files, tmp_path):
    plain = dataset_of(files)
    kept, _ = cached(plain, "auto" if setting == "auto" else str(tmp_path / "kept"))
    files[0][0].unlink()
    files[1][1].write_bytes(files[1][1].read_bytes()[:80])
    for index in (0, 1):
        for _ in range(2):
            with pytest.raises(DataError) as expected:
                plain.read(index)
            with pytest.raises(DataError) as found:
                kept.read(index)
            assert found.value.problems == expected.value.problems
    assert kept.read(2)[1].shape == SIZE


def test_a_data_set_of_which_nothing_can_be_read_still_tells_so(tmp_path):
    nowhere = dataset_of([(tmp_path / "a.jpg", tmp_path / "a.png")])
    for setting in ("auto", str(tmp_path / "kept")):
        with pytest.raises(DataError, match=r"a\.jpg: no such file"):
            cached(nowhere, setting)[0].read(0)


def test_what_killed_runs_left_behind_is_cleared_up(files, tmp_path):
    home = tmp_path / "kept"
    (home / "unfinished").mkdir(parents=True)
    for name, age in (("0" * 32, 7200), ("1" * 32, 10), ("mine.txt", 7200)):
        (home / "unfinished" / name).write_bytes(b"half")
        os.utime(home / "unfinished" / name, (time.time() - age,) * 2)
    cached(dataset_of(files), str(home))
    assert sorted(path.name for path in (home / "unfinished").iterdir()) == ["1" * 32, "mine.txt"]


def test_arrays_of_another_type_are_passed_on_but_not_put_on_disk(files, tmp_path):
    odd = Dataset(("a", "b"), ("x",), lambda index: (np.zeros((2, 2, 3)), np.zeros((2, 2), np.int64)), files[:1])
    assert cached(odd, str(tmp_path / "kept"))[0].read(0)[1].dtype == np.int64
    assert not entries(tmp_path / "kept")


def test_reading_from_disk_is_at_least_three_times_as_fast_as_decoding(tmp_path):
    # Some twenty times, with images of VOC's size.
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((500, 375))
    smooth.save(tmp_path / "a.jpg", quality=90)
    save_palette_mask(
        np.random.default_rng(0).integers(0, 3, (375, 1), dtype=np.uint8).repeat(500, 1), tmp_path / "a.png"
    )
    plain = dataset_of([(tmp_path / "a.jpg", tmp_path / "a.png")])
    kept, _ = cached(plain, str(tmp_path / "kept"))

    def seconds(dataset: Dataset) -> float:
        times = []
        for _ in range(20):
            begun = time.thread_time()
            dataset.read(0)
            times.append(time.thread_time() - begun)
        return sorted(times)[10]

    kept.read(0)
    assert 3 * seconds(kept) < seconds(plain)
