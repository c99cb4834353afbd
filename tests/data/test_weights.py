"""Weights files: what is read, what fits which network, and where a published file is looked for."""

import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vocseg.data import weights
from vocseg.data.weights import imagenet_weights, load_weights, normalization, read_weights
from vocseg.errors import EnvironmentFault, UsageError, VocsegError

ARRAYS_OF_A_LINEAR = (("weight", (1, 1)), ("bias", (1,)))


class Encoder(nn.Module):
    """A small network with the names of a ResNet: a convolution, a batch norm, a layer of `depth` convolutions."""

    def __init__(self, depth: int = 2, width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(nn.Conv2d(width, width, 3) for _ in range(depth)))


class Classifier(Encoder):
    def __init__(self, depth: int = 2):
        super().__init__(depth)
        self.fc = nn.Linear(4, 10)


def wrapped(module: nn.Module, names: str) -> nn.Module:
    """The module below the dotted names."""
    for name in reversed(names.split(".")):
        module = nn.Sequential(OrderedDict([(name, module)]))
    return module


def same(module: nn.Module, other: nn.Module) -> bool:
    mine, theirs = module.state_dict(), other.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


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


# Reading


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_what_was_saved_is_read(tmp_path: Path, suffix: str) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}
    read = read_weights(saved(tmp_path / f"w{suffix}", tensors))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_is_taken_for_its_network(tmp_path: Path, key: str) -> None:
    torch.save({key: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["a"]


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"state_dict": {"a": torch.ones(2)}, "args": Trap()}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w\.pth.*Python objects.*safetensors"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_file_that_was_cut_short_is_named_as_damaged(tmp_path: Path, suffix: str, share: float) -> None:
    path = saved(tmp_path / f"w{suffix}", {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(EnvironmentFault, match="damaged") as raised:
        read_weights(path)
    assert one_line_of(raised.value).startswith(f"{path}: ")


def test_a_file_of_noise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(bytes(range(256)) * 8)
    with pytest.raises(VocsegError, match="damaged") as raised:
        read_weights(tmp_path / "w.pth")
    assert one_line_of(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(2), "epoch": 3}, "holds int 'epoch' among its tensors"),
        (torch.ones(2), "holds Tensor where named tensors were expected"),
        ({}, "holds dict where named tensors were expected"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(("name", "message"), [("w.npz", "end in .safetensors"), ("w.pth", "no such weights file")])
def test_a_path_that_cannot_be_weights_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path / name)


# Loading


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_classifiers_file_fills_its_encoder(tmp_path: Path, suffix: str) -> None:
    source, target = Classifier(), Encoder()
    load_weights(target, saved(tmp_path / f"w{suffix}", source.state_dict()), name="it")
    assert same(target, source)


@pytest.mark.parametrize("around_file", ["", "module", "model", "backbone", "encoder", "module.encoder.model"])
@pytest.mark.parametrize("around_module", ["", "model", "model.model"])
def test_what_wraps_a_network_does_not_matter(tmp_path: Path, around_file: str, around_module: str) -> None:
    source, target = Encoder(), Encoder()
    outer = wrapped(source, around_file) if around_file else source
    path = saved(tmp_path / "w.safetensors", outer.state_dict())
    load_weights(wrapped(target, around_module) if around_module else target, path, name="it")
    assert same(target, source)


def test_the_file_of_a_whole_segmentation_network_fills_its_encoder(tmp_path: Path) -> None:
    source, target = Encoder(), Encoder()
    whole = nn.ModuleDict({"encoder": source, "decoder": nn.Conv2d(4, 4, 1), "classifier": nn.Conv2d(4, 2, 1)})
    load_weights(target, saved(tmp_path / "w.safetensors", whole.state_dict()), name="it")
    assert same(target, source)


def test_batch_norms_without_their_counter_are_complete(tmp_path: Path) -> None:
    source, target = Encoder(), Encoder()
    old = {k: t for k, t in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_weights(target, saved(tmp_path / "w.pth", old), name="it")
    assert same(target, source)


def test_a_deeper_networks_file_is_refused_although_it_fills_everything(tmp_path: Path) -> None:
    target = Encoder(depth=2)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    path = saved(tmp_path / "w.pth", Classifier(depth=3).state_dict())
    # 9 keys: conv1 1, bn1 4 and a counter that is not needed, layer1 2 x 2. Surplus: layer1.2 and fc, 2 each.
    message = r"resnetling: of 9 keys, 0 missing, 4 unexpected, 0 of another shape; e\.g\. 'layer1\.2\.weight'"
    with pytest.raises(UsageError, match=message) as raised:
        load_weights(target, path, name="resnetling")
    assert one_line_of(raised.value).startswith(f"{path}: ")
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_a_shallower_networks_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", Encoder(depth=1).state_dict())
    with pytest.raises(UsageError, match=r"of 9 keys, 2 missing, 0 unexpected, 0 of another shape; e\.g\. 'layer1\.1"):
        load_weights(Encoder(depth=2), path, name="it")


def test_a_wider_networks_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", Encoder(width=5).state_dict())
    message = (
        r"0 missing, 0 unexpected, 9 of another shape; e\.g\. 'conv1\.weight' is \(5, 3, 3, 3\) in the file and \(4"
    )
    with pytest.raises(UsageError, match=message):
        load_weights(Encoder(width=4), path, name="it")


def test_a_strangers_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"features.0.weight": torch.ones(2), "features.0.bias": torch.ones(2)})
    with pytest.raises(UsageError, match="of 9 keys, 9 missing, 2 unexpected"):
        load_weights(Encoder(), path, name="it")


def test_an_encoder_that_was_cut_short_takes_the_whole_file_but_no_deeper_one(tmp_path: Path) -> None:
    # As timm's feature extractors: the classifier's `stages.0`, a sequence, is `stages_0` in the encoder.
    target = nn.ModuleDict({"stages_0": nn.Sequential(nn.Linear(1, 1))})
    file = {f"stages.{i}.0.{key}": torch.full(shape, 3.0) for i in (0, 1) for key, shape in ARRAYS_OF_A_LINEAR}
    load_weights(target, saved(tmp_path / "w.pth", file), name="it")
    assert target["stages_0"][0].bias.tolist() == [3.0]

    file |= {f"stages.0.1.{key}": torch.full(shape, 3.0) for key, shape in ARRAYS_OF_A_LINEAR}
    with pytest.raises(UsageError, match=r"e\.g\. 'stages\.0\.1\.weight' is unexpected"):
        load_weights(target, saved(tmp_path / "w.pth", file), name="it")


def test_buffers_that_are_no_longer_saved_are_no_surplus(tmp_path: Path) -> None:
    source, target = Encoder(), Encoder()
    target.layer1.register_buffer("index", torch.zeros(3), persistent=False)
    path = saved(tmp_path / "w.pth", {**source.state_dict(), "layer1.index": torch.ones(3)})
    load_weights(target, path, name="it")
    assert same(source, target)


def test_the_first_densenet_files_fit(tmp_path: Path) -> None:
    target = nn.Sequential(OrderedDict([("denselayer1", nn.Sequential(OrderedDict([("norm1", nn.BatchNorm2d(2))])))]))
    source = {f"denselayer1.norm.1.{key}": torch.full((2,), 3.0) for key in ("weight", "bias")}
    source |= {f"denselayer1.norm.1.running_{key}": torch.full((2,), 3.0) for key in ("mean", "var")}
    load_weights(target, saved(tmp_path / "w.pth", source), name="it")
    assert target.denselayer1.norm1.weight.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",  # keys as in the classifier
        "convnext_atto",  # `stages_0.` for `stages.0.`
        "vit_tiny_patch16_224",  # `model.` before them
    ],
)
def test_timms_files_fill_timms_feature_extractors(tmp_path: Path, name: str) -> None:
    classifier = timm.create_model(name).eval()
    features = timm.create_model(name, features_only=True, out_indices=(-1,)).eval()
    load_weights(features, saved(tmp_path / "w.safetensors", classifier.state_dict()), name=name)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = classifier.forward_intermediates(image, indices=(-1,), intermediates_only=True)
        assert torch.equal(features(image)[0], expected[0])


# Finding


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
    assert time.monotonic() - start < 1
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub on this machine: path -> content, to be filled by the test."""
    files: dict[str, bytes] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        url = f"http://127.0.0.1:{server.server_port}"
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = url + template.removeprefix(huggingface_hub.constants.ENDPOINT)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        yield files
        server.shutdown()


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
    monkeypatch.setattr(weights, "HUB_SECONDS", 60)  # not even tried
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE"):
        imagenet_weights(with_published(hf_hub_id="timm/little_net"), [])


@pytest.mark.parametrize(
    ("cfg", "message"),
    [({}, "not published"), ({"url": "https://example.org/l.npz"}, r"published at https://example\.org/l\.npz only")],
)
def test_weights_that_the_hub_does_not_have_are_not_asked_for(cfg: dict, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=message):
        imagenet_weights(with_published(**cfg), [])


def test_an_encoder_that_nobody_published_is_refused() -> None:
    with pytest.raises(UsageError, match="no weights are known for this encoder"):
        imagenet_weights(nn.Linear(1, 1), [])


def test_images_are_normalised_as_the_encoder_was_pretrained() -> None:
    half = (0.5, 0.5, 0.5)
    assert normalization(with_published(mean=half, std=list(half))) == (half, half)
    assert normalization(wrapped(with_published(mean=half, std=half), "model")) == (half, half)
    assert normalization(nn.Linear(1, 1)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
