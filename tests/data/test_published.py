"""Published weights: where their file is looked for, and how it is downloaded."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vocseg.data import published
from vocseg.data.published import imagenet_weights, normalization, published_weights
from vocseg.errors import DataError, EnvironmentFault, UsageError, VocsegError


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def with_published(**cfg: object) -> nn.Module:
    module = nn.Linear(1, 1)
    module.pretrained_cfg = {"architecture": "little_net", **cfg}
    return module


def one_line_of(error: VocsegError) -> str:
    (line,) = str(error).splitlines()
    return line


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, and a network on which no name but this machine's is known."""
    look_up = socket.getaddrinfo

    def unknown(host: str, *args: object, **kwargs: object) -> list:
        if host != "127.0.0.1":
            raise socket.gaierror("name not known")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def test_a_named_folder_comes_before_the_next_and_the_tag_before_the_plain_name(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    backbone = with_published(tag="in1k", hf_hub_id="timm/little_net.in1k")
    wanted = [
        second / "little_net.safetensors",
        first / "little_net.safetensors",
        first / "little_net.in1k.safetensors",
    ]
    for path in wanted:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert imagenet_weights(backbone, [tmp_path / "nowhere", first, second]) == path


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("hub_id", "repository", "revision"),
    [
        ("timm/little_net.in1k", "timm--little_net.in1k", "main"),
        ("timm/", "timm--little_net.in1k", "main"),  # timm's placeholder
        ("smp-hub/little@" + "a" * 40, "smp-hub--little", "a" * 40),
    ],
)
def test_the_hubs_cache_is_looked_through(
    tmp_path: Path, hub_id: str, repository: str, revision: str, file: str
) -> None:
    commit = "a" * 40
    folder = tmp_path / "hub" / f"models--{repository}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    if revision == "main":
        (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / file).touch()
    found = imagenet_weights(with_published(tag="in1k", hf_hub_id=hub_id), [tmp_path])
    assert found == folder / "snapshots" / commit / file


def test_torchs_cache_is_looked_through(tmp_path: Path) -> None:
    path = tmp_path / "torch" / "hub" / "checkpoints" / "little-0123.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    assert imagenet_weights(with_published(url="https://example.org/a/little-0123.pth"), []) == path


@pytest.mark.parametrize("hangs", [False, True], ids=["unknown-name", "no-answer"])
def test_without_network_the_error_comes_in_a_second_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    done = threading.Event()

    def hang(*_: object, **__: object) -> None:
        done.wait(30)
        raise socket.gaierror("no answer")

    if hangs:
        monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    with pytest.raises(EnvironmentFault) as raised:
        imagenet_weights(with_published(hf_hub_id="timm/little_net"), [])
    assert time.monotonic() - start < 5
    done.set()
    line = one_line_of(raised.value)
    for part in (
        "little_net",
        "--set model.weights='\"none\"'",
        "VOCSEG_WEIGHTS",
        "little_net.safetensors",
        "run once",
    ):
        assert part in line


@dataclass
class Server:
    """A host on this machine: what it holds, and what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    tells_length: bool = True


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            wanted, content = self.headers.get("Range"), state.files.get(self.path)
            state.requests.append((self.command, self.path, wanted))
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and content else 0
            self.send_response(404 if content is None else 206 if start else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            if content and start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "a" * 40)
            if state.tells_length:
                self.send_header("Content-Length", str(len(content or b"") - start))
            self.end_headers()
            return (content or b"")[start:]

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,)).start()
        state.url = f"http://127.0.0.1:{httpd.server_port}"
        yield state
        httpd.shutdown()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A hub on this machine: path -> content, to be filled by the test."""
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = server.url + template.removeprefix(huggingface_hub.constants.ENDPOINT)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    return server.files


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_is_downloaded_once(hub: dict[str, bytes], name: str) -> None:
    hub[f"/timm/little_net/resolve/main/{name}"] = b"the weights"
    backbone = with_published(hf_hub_id="timm/little_net")
    path = imagenet_weights(backbone, [])
    assert path.name == name
    assert path.read_bytes() == b"the weights"
    hub.clear()
    assert imagenet_weights(backbone, []) == path


def test_a_proxy_is_knocked_at_in_the_hubs_place(hub: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub["/timm/little_net/resolve/main/model.safetensors"] = b"the weights"
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")  # nobody listens there
    with pytest.raises(EnvironmentFault, match="does not answer"):
        imagenet_weights(with_published(hf_hub_id="timm/little_net"), [])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert imagenet_weights(with_published(hf_hub_id="timm/little_net"), []).is_file()


def test_a_download_that_fails_says_why_in_one_line(hub: dict[str, bytes]) -> None:
    with pytest.raises(EnvironmentFault, match=r"download from 127\.0\.0\.1 failed \(.*404") as raised:
        imagenet_weights(with_published(hf_hub_id="timm/little_net"), [])
    assert one_line_of(raised.value)


def test_a_user_who_forbade_downloads_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(published, "HUB_SECONDS", 60)  # not even tried
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE"):
        imagenet_weights(with_published(hf_hub_id="timm/little_net"), [])


@pytest.mark.parametrize(
    ("cfg", "message"),
    [({}, "not published"), ({"url": "https://example.org/l.npz"}, r"published at https://example\.org/l\.npz only")],
)
def test_weights_that_the_hub_does_not_have_are_not_asked_for(cfg: dict, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=message):
        imagenet_weights(with_published(**cfg), [])


CONTENT = b"the weights, some thousand bytes of them" * 100
NAME = f"little-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.mark.parametrize("find", [imagenet_weights, published_weights])
@pytest.mark.parametrize("name", [NAME, "little.pth"])
def test_weights_at_an_address_are_downloaded_once_into_torchs_cache(
    server: Server, tmp_path: Path, find: Callable, name: str
) -> None:
    server.files[f"/models/{name}"] = CONTENT
    module = with_published(url=f"{server.url}/models/{name}")
    path = find(module, [], local_http=True)
    assert path == tmp_path / "torch" / "hub" / "checkpoints" / name
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [name]
    server.requests.clear()
    assert find(module, [], local_http=True) == path
    assert server.requests == []


def test_two_runs_at_once_download_one_after_the_other(server: Server) -> None:
    server.files[f"/{NAME}"] = CONTENT
    module = with_published(url=f"{server.url}/{NAME}")
    runs = [threading.Thread(target=imagenet_weights, args=(module, []), kwargs={"local_http": True}) for _ in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert imagenet_weights(module, []).read_bytes() == CONTENT
    assert [method for method, _, _ in server.requests] == ["HEAD", "GET"]


def test_a_download_that_broke_off_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.files[f"/{NAME}"] = CONTENT
    part = tmp_path / "torch" / "hub" / "checkpoints" / f"{NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    assert imagenet_weights(with_published(url=f"{server.url}/{NAME}"), [], local_http=True).read_bytes() == CONTENT
    assert server.requests == [("HEAD", f"/{NAME}", None), ("GET", f"/{NAME}", "bytes=1000-")]


def test_a_download_with_another_hash_than_its_name_says_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    server.files["/little-01234567.pth"] = CONTENT
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DataError, match=f"expected SHA-256 01234567…, found {found}; the download was") as raised:
        imagenet_weights(with_published(url=f"{server.url}/little-01234567.pth"), [], local_http=True)
    assert one_line_of(raised.value)
    assert list((tmp_path / "torch" / "hub" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "tells_length", "message"),
    [("/gone.pth", True, "HTTP 404"), (f"/{NAME}", False, "does not say how large the file is")],
)
def test_a_download_that_the_host_refuses_says_why_and_what_to_do(
    server: Server, path: str, tells_length: bool, message: str
) -> None:
    server.files[f"/{NAME}"] = CONTENT
    server.tells_length = tells_length
    url = server.url + path
    with pytest.raises(EnvironmentFault, match=message) as raised:
        imagenet_weights(with_published(url=url), [], local_http=True)
    assert f"put {url} into " in one_line_of(raised.value)


def test_weights_come_over_https_alone(server: Server) -> None:
    server.files[f"/{NAME}"] = CONTENT
    with pytest.raises(EnvironmentFault, match="is not https"):
        imagenet_weights(with_published(url=f"{server.url}/{NAME}"), [])
    assert server.requests == []


def test_a_cache_that_cannot_be_written_is_one_line(server: Server, tmp_path: Path) -> None:
    server.files[f"/{NAME}"] = CONTENT
    (tmp_path / "torch").write_text("a file where a folder is wanted")
    with pytest.raises(EnvironmentFault, match=r"cannot be written: Not a directory") as raised:
        imagenet_weights(with_published(url=f"{server.url}/{NAME}"), [], local_http=True)
    assert one_line_of(raised.value)


@pytest.mark.parametrize("find", [imagenet_weights, published_weights])
def test_without_network_weights_at_an_address_are_missing_in_a_second_too(tmp_path: Path, find: Callable) -> None:
    url = f"https://download.example.org/models/{NAME}"
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"of little_net: .*download\.example\.org does not answer") as raised:
        find(with_published(url=url), [])
    assert time.monotonic() - start < 5
    assert f"put {url} into {tmp_path / 'torch' / 'hub' / 'checkpoints'} or" in one_line_of(raised.value)


def test_a_file_of_the_published_name_is_found_in_a_named_folder(tmp_path: Path) -> None:
    (tmp_path / NAME).touch()
    assert published_weights(with_published(url=f"https://example.org/{NAME}"), [tmp_path]) == tmp_path / NAME


def test_a_network_that_nobody_published_as_a_whole_is_refused() -> None:
    encoder_only = nn.Sequential(with_published(hf_hub_id="timm/little_net"))
    with pytest.raises(UsageError, match="no weights are known for the whole of this network"):
        published_weights(encoder_only, [])


def test_an_encoder_that_nobody_published_is_refused() -> None:
    with pytest.raises(UsageError, match="no weights are known for this encoder"):
        imagenet_weights(nn.Linear(1, 1), [])


def test_images_are_normalised_as_the_encoder_was_pretrained() -> None:
    half = (0.5, 0.5, 0.5)
    assert normalization(with_published(mean=half, std=list(half))) == (half, half)
    assert normalization(nn.Sequential(with_published(mean=half, std=half))) == (half, half)
    assert normalization(nn.Linear(1, 1)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
