import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vocseg.data.fetch import ARCHIVES, Archive, fetch
from vocseg.data.images import read_mask
from vocseg.data.unpack import unpack, unpack_sbd, unpack_voc
from vocseg.data.voc import voc
from vocseg.errors import DataError, EnvironmentFault, Interrupted, UsageError

PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


def jpeg(shade: int, size: tuple[int, int] = (8, 6)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(content, "JPEG")
    return content.getvalue()


def png(label: int, size: tuple[int, int] = (8, 6)) -> bytes:
    mask = Image.new("P", size, label)
    mask.putpalette(PALETTE)
    content = io.BytesIO()
    mask.save(content, "PNG")
    return content.getvalue()


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def plain(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def voc_members(folder: str, splits: dict[str, list[str]]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A VOC archive as the genuine ones are, with what is not kept of them."""
    base = f"VOCdevkit/{folder}"
    members = [special("VOCdevkit", tarfile.DIRTYPE), special(base, tarfile.DIRTYPE)]
    for split, names in splits.items():
        members.append(plain(f"{base}/ImageSets/Segmentation/{split}.txt", "".join(f"{n}\n" for n in names).encode()))
        members.append(plain(f"{base}/ImageSets/Main/{split}.txt", b"not wanted"))
        for shade, name in enumerate(names):
            members.append(plain(f"{base}/JPEGImages/{name}.jpg", jpeg(shade)))
            members.append(plain(f"{base}/SegmentationClass/{name}.png", png(1)))
            members.append(plain(f"{base}/Annotations/{name}.xml", b"<not/>"))
            members.append(plain(f"{base}/SegmentationObject/{name}.png", png(2)))
    return members


def noise(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


@dataclass
class Server:
    """A server of one machine: what it holds and how it behaves."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)  # bytes of the answer after which each next request is cut off
    etag: str = '"one"'
    tells_length: bool = True
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, If-Range
    on_request: Callable[[], None] = lambda: None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
            state.requests.append((self.path, wanted, condition))
            state.on_request()
            if self.path in state.redirects:
                self.send_response(302)
                self.send_header("Location", state.redirects[self.path])
                self.end_headers()
                return
            if self.path not in state.files:
                self.send_error(404)
                return
            content = state.files[self.path]
            start = 0
            if wanted and state.ranges and condition in (None, state.etag):
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", state.etag)
            if state.tells_length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = start + state.break_after.pop(0) if state.break_after else len(content)
            self.wfile.write(content[start:end])

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def serve(server: Server, content: bytes, path: str = "/voc.tar", **changes: object) -> Archive:
    """The archive with this content, put on the server."""
    server.files[path] = content
    archive = Archive(
        file=path.removeprefix("/"),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        urls=(server.url + path,),
        folder="VOC2007",
        splits=("train", "val"),
        unpacked=len(content),
    )
    return replace(archive, **changes)


@pytest.fixture
def archive(server: Server) -> Archive:
    members = voc_members("VOC2007", {"train": ["000032", "000033"], "val": ["000042"]})
    # What follows makes the archive a megabyte, four of the downloader's chunks.
    members.append(plain("VOCdevkit/VOC2007/Annotations/filler.xml", noise(1_000_000)))
    return serve(server, tar_of(members))


def get(archive: Archive, root: Path, **options: object) -> tuple[str, ...]:
    return fetch("it", root, archives={"it": [archive]}, local_http=True, **options)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_fetched_data_set_holds_images_masks_and_lists_and_opens(archive, tmp_path):
    assert get(archive, tmp_path) == ("voc.tar",)
    assert files_below(tmp_path) == [
        "VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt",
        "VOCdevkit/VOC2007/ImageSets/Segmentation/val.txt",
        "VOCdevkit/VOC2007/JPEGImages/000032.jpg",
        "VOCdevkit/VOC2007/JPEGImages/000033.jpg",
        "VOCdevkit/VOC2007/JPEGImages/000042.jpg",
        "VOCdevkit/VOC2007/SegmentationClass/000032.png",
        "VOCdevkit/VOC2007/SegmentationClass/000033.png",
        "VOCdevkit/VOC2007/SegmentationClass/000042.png",
    ]
    train = voc(tmp_path, "train", year=2007)
    assert list(train.names) == ["000032", "000033"]
    assert train.read(0)[1].tolist() == [[1] * 8] * 6


def test_data_that_is_there_is_not_downloaded_again(archive, server, tmp_path):
    get(archive, tmp_path)
    before = len(server.requests)
    assert get(archive, tmp_path) == ()
    assert get(archive, tmp_path / "VOCdevkit") == ()
    assert len(server.requests) == before


def test_a_data_set_that_lost_a_file_is_fetched_again(archive, tmp_path):
    get(archive, tmp_path)
    lost = tmp_path / "VOCdevkit/VOC2007/SegmentationClass/000033.png"
    lost.unlink()
    assert get(archive, tmp_path) == ("voc.tar",)
    assert lost.is_file()


def test_progress_runs_over_all_archives_to_their_sum(server, tmp_path):
    first = serve(server, tar_of(voc_members("VOC2007", {"train": ["000001"], "val": ["000002"]})), "/first.tar")
    second = serve(server, tar_of(voc_members("VOC2007", {"test": ["000003"]})), "/second.tar", splits=("test",))
    seen: list[tuple[int, int]] = []
    done = fetch("both", tmp_path, lambda *p: seen.append(p), archives={"both": [first, second]}, local_http=True)
    assert done == ("first.tar", "second.tar")
    total = first.size + second.size
    assert seen[-1] == (total, total)
    assert {t for _, t in seen} == {total}
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    for split in ("train", "val", "test"):
        assert len(voc(tmp_path, split, year=2007)) == 1


def test_a_broken_connection_is_gone_on_with_from_the_byte_where_it_broke(archive, server, tmp_path):
    server.break_after = [300_000, 200_000]
    get(archive, tmp_path)
    assert server.requests == [
        ("/voc.tar", None, None),
        ("/voc.tar", "bytes=300000-", '"one"'),
        ("/voc.tar", "bytes=500000-", '"one"'),
    ]


def test_what_was_downloaded_before_the_network_went_is_kept_and_used(archive, server, tmp_path):
    # 300,000 bytes come; then the host sends nothing more.
    server.break_after = [300_000, 0]
    with pytest.raises(EnvironmentFault) as caught:
        get(archive, tmp_path)
    part = tmp_path / "voc.tar.part"
    assert part.read_bytes() == server.files["/voc.tar"][:300_000]
    assert f"0 MB are kept in {part}" in str(caught.value)
    server.requests.clear()
    seen: list[int] = []
    get(archive, tmp_path, progress=lambda done, total: seen.append(done))
    assert server.requests == [("/voc.tar", "bytes=300000-", '"one"')]
    assert seen[0] > 300_000
    assert not part.exists()
    assert not (tmp_path / "voc.tar.part.json").exists()


def test_ctrl_c_keeps_the_part_and_says_so(archive, tmp_path):
    def stop(done: int, total: int) -> None:
        if done > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"MB are kept in .*voc\.tar\.part and the same command goes on") as caught:
        get(archive, tmp_path, progress=stop)
    assert caught.value.exit_code == 128 + signal.SIGINT
    assert (tmp_path / "voc.tar.part").stat().st_size > 500_000
    get(archive, tmp_path)
    assert len(voc(tmp_path, "train", year=2007)) == 2


def test_a_server_that_ignores_ranges_starts_the_file_anew(archive, server, tmp_path):
    (tmp_path / "voc.tar.part").write_bytes(b"x" * 300_000)
    server.ranges = False
    get(archive, tmp_path)
    assert server.requests == [("/voc.tar", "bytes=300000-", None)]
    assert len(voc(tmp_path, "train", year=2007)) == 2


def test_a_file_that_changed_on_the_server_is_not_pieced_together(archive, server, tmp_path):
    server.break_after = [300_000, 0]
    with pytest.raises(EnvironmentFault):
        get(archive, tmp_path)
    part = tmp_path / "voc.tar.part"
    part.write_bytes(b"x" * 300_000)  # the beginning of the older version
    server.etag = '"two"'
    server.requests.clear()
    get(archive, tmp_path)
    # If-Range names the older version, so the server sends the whole of the newer one: a single request.
    assert server.requests == [("/voc.tar", "bytes=300000-", '"one"')]


def test_a_weak_tag_is_not_used_to_go_on(archive, server, tmp_path):
    server.etag = 'W/"one"'
    server.break_after = [300_000]
    get(archive, tmp_path)
    assert server.requests[1] == ("/voc.tar", "bytes=300000-", None)


def test_a_damaged_part_costs_one_more_download_and_no_error(archive, server, tmp_path):
    (tmp_path / "voc.tar.part").write_bytes(b"x" * 300_000)
    get(archive, tmp_path)
    assert [wanted for _, wanted, _ in server.requests] == ["bytes=300000-", None]


def test_a_wrong_hash_is_a_data_error_that_names_both_and_leaves_nothing(archive, server, tmp_path):
    wrong = replace(archive, sha256="0" * 64)
    with pytest.raises(DataError) as caught:
        get(wrong, tmp_path)
    assert f"expected SHA-256 {'0' * 64}, found {archive.sha256}" in str(caught.value)
    assert files_below(tmp_path) == []
    assert len(server.requests) == 1


def test_a_copy_elsewhere_is_used_where_the_first_host_fails(archive, server, tmp_path):
    server.files["/other.tar"] = noise(archive.size)
    server.files["/short.tar"] = b"<html>log in to the hotel's network</html>"
    urls = (
        "http://127.0.0.1:9/voc.tar",  # nobody listens
        f"{server.url}/missing.tar",
        f"{server.url}/short.tar",
        f"{server.url}/other.tar",
        f"{server.url}/voc.tar",
    )
    get(replace(archive, urls=urls), tmp_path)
    assert [path for path, _, _ in server.requests] == ["/missing.tar", "/short.tar", "/other.tar", "/voc.tar"]


def test_offline_is_one_line_that_says_where_to_put_what(archive, tmp_path):
    urls = ("http://127.0.0.1:9/pascal/voc.tar", "http://localhost:9/voc.tar")
    with pytest.raises(EnvironmentFault) as caught:
        get(replace(archive, urls=urls), tmp_path)
    message = str(caught.value)
    assert re.search(r"could not download voc\.tar \(127\.0\.0\.1, localhost: Connection refused\); without", message)
    assert f"put {urls[0]}, or an unpacked VOCdevkit, into {tmp_path}" in message
    assert "\n" not in message
    assert caught.value.exit_code == 4


def test_http_is_refused_at_the_start_and_after_a_redirect(archive, server, tmp_path):
    with pytest.raises(EnvironmentFault, match="is not https"):
        fetch("it", tmp_path, archives={"it": [archive]})
    assert server.requests == []
    server.redirects = {"/moved.tar": "http://example.org/voc.tar"}
    with pytest.raises(EnvironmentFault, match=r"http://example\.org/voc\.tar is not https"):
        get(replace(archive, urls=(f"{server.url}/moved.tar",)), tmp_path)


def test_a_file_of_another_size_is_refused_before_a_byte_is_kept(archive, tmp_path):
    with pytest.raises(EnvironmentFault, match=f"expected a file of 1000 bytes, found one of {archive.size}"):
        get(replace(archive, size=1000), tmp_path)
    assert not (tmp_path / "voc.tar.part").exists()


def test_a_server_that_does_not_tell_the_size_is_cut_off_where_the_file_should_end(archive, server, tmp_path):
    server.tells_length = server.ranges = False
    with pytest.raises(EnvironmentFault, match="the server sends more than 500000 bytes"):
        get(replace(archive, size=500_000), tmp_path)
    assert (tmp_path / "voc.tar.part").stat().st_size <= 500_000
    get(archive, tmp_path)
    assert len(voc(tmp_path, "train", year=2007)) == 2


def test_an_archive_put_there_by_hand_is_used_and_stays(archive, server, tmp_path):
    placed = tmp_path / "voc.tar"
    placed.write_bytes(server.files["/voc.tar"])
    assert get(archive, tmp_path) == ("voc.tar",)
    assert server.requests == []
    assert placed.is_file()


def test_a_wrong_archive_put_there_by_hand_is_named_and_stays(archive, tmp_path):
    placed = tmp_path / "voc.tar"
    placed.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(DataError, match=f"expected SHA-256 {archive.sha256}, found {found}; delete it") as caught:
        get(archive, tmp_path)
    assert caught.value.problems[0].where == str(placed)
    assert placed.is_file()


def test_a_full_disk_is_said_before_anything_is_downloaded(archive, server, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(EnvironmentFault, match="MB of disk space are needed"):
        get(replace(archive, unpacked=2 * free), tmp_path)
    assert server.requests == []


def test_two_fetches_into_one_folder_do_not_meet(archive, server, tmp_path):
    pytest.importorskip("fcntl")
    refused: list[str] = []

    def second() -> None:
        server.on_request = lambda: None
        with pytest.raises(EnvironmentFault) as caught:
            get(archive, tmp_path)
        refused.append(str(caught.value))

    server.on_request = second
    get(archive, tmp_path)
    assert refused == [f"{tmp_path}: another fetch into this folder is running; wait for it"]


def test_an_unwritable_folder_is_an_environment_fault(archive, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"file.*cannot be written"):
        get(archive, tmp_path / "file" / "data")


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="'voc2008' cannot be fetched; did you mean 'voc2007'"):
        fetch("voc2008", tmp_path)


IMAGE = "VOCdevkit/VOC2007/JPEGImages/000032.jpg"

MALICIOUS = {
    "parent": (plain("VOCdevkit/VOC2007/JPEGImages/../../../../evil", b"x"), "leads out of the archive"),
    "parent first": (plain("../evil", b"x"), "leads out of the archive"),
    "absolute": (plain("/tmp/evil", b"x"), "leads out of the archive"),
    "symlink": (special(IMAGE, tarfile.SYMTYPE, "/etc/passwd"), "found a folder, a link or a device"),
    "hard link": (special(IMAGE, tarfile.LNKTYPE, "/etc/passwd"), "found a folder, a link or a device"),
    "device": (special(IMAGE, tarfile.CHRTYPE), "found a folder, a link or a device"),
    "pipe": (special(IMAGE, tarfile.FIFOTYPE), "found a folder, a link or a device"),
    "folder": (special(IMAGE, tarfile.DIRTYPE), "found a folder, a link or a device"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_a_malicious_archive_is_refused_and_writes_nothing(case, server, tmp_path):
    member, message = MALICIOUS[case]
    members = [member, *voc_members("VOC2007", {"train": ["000033"], "val": ["000042"]})]
    with pytest.raises(DataError, match=f"{message}; nothing was unpacked") as caught:
        get(serve(server, tar_of(members)), tmp_path / "data")
    assert caught.value.problems[0].where == f"voc.tar: {member[0].name}"
    assert [f for f in files_below(tmp_path) if not f.startswith("data/voc.tar.part")] == []


def test_a_name_that_is_twice_in_the_archive_is_refused(server, tmp_path):
    members = voc_members("VOC2007", {"train": ["000032"], "val": ["000042"]})
    with pytest.raises(DataError, match=r"000032\.jpg: is in the archive twice"):
        get(serve(server, tar_of([*members, plain(IMAGE, jpeg(9))])), tmp_path)


def test_a_header_that_claims_a_huge_file_is_refused_before_a_byte_of_it_is_written(tmp_path):
    info = tarfile.TarInfo(IMAGE)
    info.size = 8 * 2**30
    archive = tmp_path / "voc.tar"
    archive.write_bytes(info.tobuf() + b"\0" * 512)
    with pytest.raises(DataError, match=r"expected at most 67,108,864 bytes, found 8,589,934,592"):
        unpack(archive, "voc.tar", tmp_path / "VOC2007", unpack_voc)
    assert list((tmp_path / "VOC2007").iterdir()) == []


def test_files_that_are_not_kept_count_towards_the_size_of_the_whole(tmp_path):
    info = tarfile.TarInfo("VOCdevkit/VOC2007/Annotations/bomb.xml")
    info.size = 17 * 2**30
    archive = tmp_path / "voc.tar"
    archive.write_bytes(info.tobuf() + b"\0" * 512)
    with pytest.raises(DataError, match=r"expected at most 17,179,869,184 bytes in 200,000 files up to here"):
        unpack(archive, "voc.tar", tmp_path / "VOC2007", unpack_voc)


@pytest.mark.parametrize("name", ["VOCdevkit", "VOCdevkit/VOC2007", "VOCdevkit/VOC2007/JPEGImages"])
def test_a_link_in_place_of_a_folder_leads_nowhere(name, server, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    members = voc_members("VOC2007", {"train": ["000032"], "val": ["000042"]})
    content = tar_of([special(name, tarfile.SYMTYPE, str(outside)), *members[2:]])
    with pytest.raises(DataError, match=f"{name}: is a link that leads out of the archive; nothing was unpacked"):
        get(serve(server, content), tmp_path / "data")
    content = tar_of([special(name, tarfile.SYMTYPE, "elsewhere"), *members[2:]])
    get(serve(server, content), tmp_path / "other")
    assert list(outside.iterdir()) == []
    assert [p for p in tmp_path.rglob("*") if p.is_symlink()] == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_archive_is_a_data_error_and_moves_nothing(mode, tmp_path):
    members = [*voc_members("VOC2007", {"train": ["000032"]}), plain(IMAGE.replace("32", "33"), noise(100_000))]
    content = tar_of(members, mode)
    archive = tmp_path / "voc.tar"
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"voc\.tar: cannot be unpacked"):
        unpack(archive, "voc.tar", tmp_path / "VOC2007", unpack_voc)
    assert list((tmp_path / "VOC2007").iterdir()) == []


def test_an_archive_without_what_it_should_bring_is_named(server, tmp_path):
    archive = serve(server, tar_of(voc_members("VOC2007", {"train": ["000032"]})))
    with pytest.raises(DataError, match=r"voc\.tar was unpacked, but a split list, image or mask of train or val"):
        get(archive, tmp_path)


def test_what_an_unpacking_that_was_killed_left_behind_goes(archive, tmp_path):
    left = tmp_path / "VOCdevkit/VOC2007/.unpacking-killed/JPEGImages"
    left.mkdir(parents=True)
    get(archive, tmp_path)
    assert not left.exists()
    assert sorted(p.name for p in (tmp_path / "VOCdevkit/VOC2007").iterdir()) == [
        "ImageSets",
        "JPEGImages",
        "SegmentationClass",
    ]


def sbd_members(splits: dict[str, list[str]], label: int = 20) -> list[tuple[tarfile.TarInfo, bytes]]:
    savemat = pytest.importorskip("scipy.io").savemat
    base = "benchmark_RELEASE/dataset"
    members = []
    for split, names in splits.items():
        for name in names:
            content = io.BytesIO()
            ids = np.full((6, 8), label, np.uint8)
            ids[0] = 0
            savemat(content, {"GTcls": {"Segmentation": ids, "Boundaries": np.zeros((20, 1))}})
            members.append(plain(f"{base}/cls/{name}.mat", content.getvalue()))
            members.append(plain(f"{base}/inst/{name}.mat", b"not wanted"))
        members.append(plain(f"{base}/{split}.txt", "".join(f"{n}\n" for n in names).encode()))
    return members


@pytest.fixture
def voc2012(tmp_path: Path) -> Path:
    """VOC 2012 with 01, 02 in train, 03 in val, and images 04, 05 that it has no masks for."""
    members = voc_members("VOC2012", {"train": ["2008_000001", "2008_000002"], "val": ["2008_000003"]})
    for name in ("2008_000004", "2008_000005"):
        members.append(plain(f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", jpeg(7)))
    archive = tmp_path / "voc2012.tar"
    archive.write_bytes(tar_of(members))
    unpack(archive, "voc2012.tar", tmp_path / "data/VOCdevkit/VOC2012", unpack_voc)
    archive.unlink()
    return tmp_path / "data"


def test_sbd_becomes_trainaug_without_voc_val_and_with_vocs_own_masks(voc2012, server):
    # SBD train {1, 3, 4} + SBD val {5} + VOC train {1, 2} - VOC val {3} = {1, 2, 4, 5}
    splits = {"train": ["2008_000001", "2008_000003", "2008_000004"], "val": ["2008_000005"]}
    archive = serve(
        server,
        tar_of(sbd_members(splits), "w:gz"),
        "/benchmark.tgz",
        folder="VOC2012",
        splits=("trainaug",),
        masks="SegmentationClassAug",
        unpacker=unpack_sbd,
    )
    get(archive, voc2012)
    trainaug = voc(voc2012, "trainaug", year=2012)
    assert list(trainaug.names) == ["2008_000001", "2008_000002", "2008_000004", "2008_000005"]
    # VOC's masks are full of ones; SBD's are 20 under a row of background.
    assert [trainaug.read(i)[1][:2, 0].tolist() for i in range(4)] == [[1, 1], [1, 1], [0, 20], [0, 20]]
    masks = voc2012 / "VOCdevkit/VOC2012/SegmentationClassAug"
    assert not (masks / "2008_000003.png").exists()
    with Image.open(masks / "2008_000004.png") as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:9] == PALETTE
    assert read_mask(masks / "2008_000004.png").max() == 20


def test_sbd_without_all_of_vocs_images_says_how_many_are_missing(voc2012, tmp_path):
    (voc2012 / "VOCdevkit/VOC2012/JPEGImages/2008_000005.jpg").unlink()
    archive = tmp_path / "benchmark.tgz"
    archive.write_bytes(tar_of(sbd_members({"train": ["2008_000004"], "val": ["2008_000005"]}), "w:gz"))
    with pytest.raises(DataError, match=r"lacks 1 of trainaug's 4 images, among them 2008_000005\.jpg; move"):
        unpack(archive, "benchmark.tgz", voc2012 / "VOCdevkit/VOC2012", unpack_sbd)


def test_sbd_names_that_have_no_mask_are_each_reported(voc2012, tmp_path):
    members = sbd_members({"train": ["2008_000004"], "val": ["2008_000005"]})
    lists = [plain("benchmark_RELEASE/dataset/train.txt", b"2008_000009\n../evil\n")]
    archive = tmp_path / "benchmark.tgz"
    archive.write_bytes(tar_of([*lists, *members[:2], *members[3:]], "w:gz"))
    with pytest.raises(DataError) as caught:
        unpack(archive, "benchmark.tgz", voc2012 / "VOCdevkit/VOC2012", unpack_sbd)
    assert [str(p) for p in caught.value.problems] == [
        "benchmark.tgz: ../evil: is in a split list but has no mask",
        "benchmark.tgz: 2008_000009: is in a split list but has no mask",
    ]


@pytest.mark.parametrize("content", [b"", b"no MATLAB file", noise(2000)])
def test_an_sbd_mask_that_cannot_be_read_is_named(content, voc2012, tmp_path):
    pytest.importorskip("scipy")
    archive = tmp_path / "benchmark.tgz"
    archive.write_bytes(tar_of([plain("benchmark_RELEASE/dataset/cls/2008_000004.mat", content)], "w:gz"))
    with pytest.raises(DataError, match=r"cls/2008_000004\.mat: cannot be read"):
        unpack(archive, "benchmark.tgz", voc2012 / "VOCdevkit/VOC2012", unpack_sbd)


def test_an_sbd_mask_with_unknown_ids_is_named(voc2012, tmp_path):
    archive = tmp_path / "benchmark.tgz"
    archive.write_bytes(tar_of(sbd_members({"train": ["2008_000004"]}, label=21), "w:gz"))
    with pytest.raises(DataError, match=r"expected a uint8 mask of ids 0 to 20, found uint8 \(6, 8\) up to 21"):
        unpack(archive, "benchmark.tgz", voc2012 / "VOCdevkit/VOC2012", unpack_sbd)


def test_sbd_without_scipy_is_refused_before_the_download(tmp_path):
    program = (
        "import sys; sys.modules['scipy'] = sys.modules['scipy.io'] = None\n"
        "from pathlib import Path; from vocseg.data.fetch import fetch; from vocseg.errors import EnvironmentFault\n"
        "try: fetch('sbd', Path(sys.argv[1]))\n"
        "except EnvironmentFault as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "SBD's masks are MATLAB files and need scipy: pip install 'vocseg[sbd]'\n"
    assert list(tmp_path.iterdir()) == []


def test_every_published_archive_has_an_https_address_and_a_hash():
    archives = [archive for group in ARCHIVES.values() for archive in group]
    assert len(archives) == 5
    for archive in archives:
        assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
        assert archive.urls
        for url in archive.urls:
            assert url.startswith("https://")
            assert url.endswith("/" + archive.file)


def test_the_command_offers_exactly_what_can_be_fetched():
    from vocseg.cli.data import command

    (name, *_) = command.commands["fetch"].params
    assert list(name.type.choices) == list(ARCHIVES)


def test_the_command_says_when_nothing_is_missing(tmp_path, monkeypatch):
    from vocseg.cli.data import command

    splits = {"train": ["2008_000001"], "val": ["2008_000002"]}
    archive = tmp_path / "voc2012.tar"
    archive.write_bytes(tar_of(voc_members("VOC2012", splits)))
    unpack(archive, "voc2012.tar", tmp_path / "VOCdevkit/VOC2012", unpack_voc)
    monkeypatch.setenv("VOCSEG_DATA", str(tmp_path))
    result = CliRunner().invoke(command, ["fetch", "voc2012"], catch_exceptions=False)
    assert result.stdout == f"voc2012 is complete in {tmp_path}: nothing was missing\n"


def test_help_imports_neither_torch_nor_numpy():
    program = (
        "import json, sys; from vocseg.cli.data import command\n"
        "for arguments in ([], ['fetch'], ['verify'], ['stats']):\n"
        "    try: command.main([*arguments, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print(json.dumps([m for m in ('torch', 'numpy', 'rich', 'cv2', 'urllib.request') if m in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
