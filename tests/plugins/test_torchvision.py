"""torchvision's networks: layers, sizes, what is frozen, and files with the names that torchvision publishes."""

import re
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, segmentation

from vocseg.build import Network, build_network
from vocseg.data.weights import load_weights
from vocseg.errors import EnvironmentFault, UsageError
from vocseg.network import outputs, set_training
from vocseg.plugins import discover
from vocseg.recipe.prepare import load_recipe

COMPONENT = discover().get("architecture", "torchvision")
NETWORKS = list_models(module=segmentation)
SMALLEST = "lraspp_mobilenet_v3_large"


def build(network: str, num_classes: int = 21, *, auxiliary: bool = False) -> nn.Module:
    return COMPONENT.build({"num_classes": num_classes}, {"network": network, "auxiliary": auxiliary})


def shapes(network: str, num_classes: int = 21, *, auxiliary: bool = False) -> nn.Module:
    """The network without memory for its weights, which is quick."""
    with torch.device("meta"):
        return build(network, num_classes, auxiliary=auxiliary)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def made_up(module: nn.Module) -> dict[str, Tensor]:
    """A state dict of the module's names and shapes, each tensor full of a number of its own, in a few bytes."""
    state = module.state_dict()
    return {k: torch.tensor(i / 64).to(t.dtype).expand(t.shape) for i, (k, t) in enumerate(state.items())}


def holds(module: nn.Module, file: dict[str, Tensor], before: str = "") -> bool:
    return all(torch.equal(tensor, file[before + key]) for key, tensor in module.state_dict().items())


def recipe_network(tmp_path: Path, weights: str, num_classes: int = 21, network: str = SMALLEST) -> Network:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\nname = "torchvision"\nnetwork = "{network}"\nweights = "{weights}"\n'
        '[data]\nname = "synthetic"\n[train]\nepochs = 1\n'
    )
    return build_network(load_recipe(str(path))[0], num_classes)


def test_every_segmentation_network_of_torchvision_is_offered() -> None:
    (network, _) = COMPONENT.parameters
    assert sorted(network.annotation.__args__) == NETWORKS
    assert len(NETWORKS) >= 6


@pytest.mark.parametrize("network", NETWORKS)
def test_each_has_the_parameters_that_torchvision_counts(network: str) -> None:
    # Its published weights have an auxiliary head, where there can be one.
    published = get_model_weights(network)["COCO_WITH_VOC_LABELS_V1"]
    assert count(shapes(network, auxiliary=network != SMALLEST)) == published.meta["num_params"]


def test_the_reports_network_has_its_parameters_and_layers() -> None:
    network = shapes("fcn_resnet101").eval()
    # ResNet101 without its last layer 44,549,160 - 2,049,000 = 42,500,160; the head 9 * 2048 * 512 = 9,437,184, its
    # norm 2 * 512 and its classifier 512 * 21 + 21.
    assert count(network) == 42_500_160 + 9_437_184 + 1_024 + 10_773 == 51_949_141

    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, module in network.named_modules():
        if re.fullmatch(r"backbone\.(conv1|bn1|maxpool|layer\d\.\d+)|classifier\.\d", name):
            module.register_forward_hook(lambda _, __, y, name=name: seen.append((name, tuple(y.shape))))
    network(torch.zeros(16, 3, 224, 224, device="meta"))
    # Report 002, Table 3, with the bottlenecks that it leaves out.
    expected: list[tuple[str, tuple[int, ...]]] = [
        ("backbone.conv1", (16, 64, 112, 112)),
        ("backbone.bn1", (16, 64, 112, 112)),
        ("backbone.maxpool", (16, 64, 56, 56)),
    ]
    for stage, (blocks, width, side) in enumerate([(3, 256, 56), (4, 512, 28), (23, 1024, 28), (3, 2048, 28)], start=1):
        expected += [(f"backbone.layer{stage}.{i}", (16, width, side, side)) for i in range(blocks)]
    expected += [(f"classifier.{i}", (16, 512, 28, 28)) for i in range(4)]  # convolution, norm, ReLU, dropout
    expected.append(("classifier.4", (16, 21, 28, 28)))
    assert seen == expected
    # Layers 3 and 4 keep 1/8 by dilation, whose first block still has that of the layer before.
    dilations = {b: network.get_submodule(f"backbone.{b}.conv2").dilation for b in ("layer3.1", "layer4.0", "layer4.1")}
    assert dilations == {"layer3.1": (2, 2), "layer4.0": (2, 2), "layer4.1": (4, 4)}


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 101), (1, 7)])
def test_logits_have_the_size_of_the_image_whatever_that_is(size: tuple[int, int]) -> None:
    network = build(SMALLEST, 5).eval()
    assert outputs(network, torch.zeros(1, 3, *size), network.stride)["out"].shape == (1, 5, *size)


@pytest.mark.parametrize("network", [SMALLEST, "deeplabv3_mobilenet_v3_large"])
def test_upsampled_its_logits_are_those_of_torchvision_to_the_last_bit(network: str) -> None:
    auxiliary = network != SMALLEST
    ours = build(network, 5, auxiliary=auxiliary).eval()
    whole = get_model(network, weights=None, weights_backbone=None, num_classes=5, aux_loss=auxiliary).eval()
    whole.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = whole(images), outputs(ours, images, ours.stride)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_each_gives_logits_of_odd_sizes_and_those_of_its_second_head(network: str) -> None:
    for auxiliary in (False, True) if network != SMALLEST else (False,):
        module = shapes(network, 5, auxiliary=auxiliary).eval()
        found = outputs(module, torch.zeros(2, 3, 101, 67, device="meta"), module.stride)
        assert sorted(found) == (["aux", "out"] if auxiliary else ["out"])
        assert {tuple(logits.shape) for logits in found.values()} == {(2, 5, 101, 67)}


@pytest.mark.parametrize(("network", "auxiliary"), [(SMALLEST, False), ("deeplabv3_mobilenet_v3_large", True)])
def test_every_parameter_gets_a_gradient(network: str, auxiliary: bool) -> None:
    module = build(network, 5, auxiliary=auxiliary)
    sum(logits.square().mean() for logits in module(torch.randn(2, 3, 64, 96)).values()).backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("network", NETWORKS)
def test_a_frozen_encoder_leaves_the_classifier_and_nothing_else_to_train(network: str) -> None:
    module = shapes(network)
    set_training(module, module.backbone, frozen=True)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in module.classifier.named_parameters(prefix="classifier")]
    assert [name for name, m in module.named_modules() if m.training and name.startswith("backbone")] == []


def test_lraspp_has_no_auxiliary_head() -> None:
    with pytest.raises(UsageError, match=f"auxiliary: {SMALLEST} has no auxiliary head; leave the key out"):
        build(SMALLEST, auxiliary=True)


# Files


def test_the_published_file_fills_the_reports_network_without_its_auxiliary_head(tmp_path: Path) -> None:
    file = made_up(shapes("fcn_resnet101", auxiliary=True))
    torch.save(file, tmp_path / "fcn_resnet101_coco-7ecb50ca.pth")
    module = shapes("fcn_resnet101").to_empty(device="cpu")
    filled = load_weights(module, tmp_path / "fcn_resnet101_coco-7ecb50ca.pth", name="it", backbone=module.backbone)
    assert holds(module, file)
    assert str(filled).startswith("whole network from ")
    assert str(filled).endswith("fcn_resnet101_coco-7ecb50ca.pth; not used of it: aux_classifier")


@pytest.mark.parametrize(
    ("network", "classifier", "before", "unused"),
    [
        (SMALLEST, "mobilenet_v3_large", "features.", ("classifier",)),
        ("fcn_resnet50", "resnet50", "", ("fc",)),
    ],
)
def test_the_file_of_torchvisions_classifier_fills_the_encoder(
    tmp_path: Path, network: str, classifier: str, before: str, unused: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        published = getattr(torchvision.models, classifier)()
    file = made_up(published)
    torch.save(file, tmp_path / "w.pth")
    module = shapes(network).to_empty(device="cpu")
    filled = load_weights(module, tmp_path / "w.pth", name="it", backbone=module.backbone)
    assert holds(module.backbone, file, before)
    assert (filled.part, filled.unused) == ("encoder", unused)


@pytest.mark.parametrize(
    ("network", "other"),
    [
        ("fcn_resnet50", "fcn_resnet101"),  # all names are there, and more
        (SMALLEST, "fcn_resnet50"),
    ],
)
def test_the_file_of_another_encoder_is_refused(tmp_path: Path, network: str, other: str) -> None:
    torch.save(made_up(shapes(other)), tmp_path / "w.pth")
    module = shapes(network)
    with pytest.raises(UsageError, match=r"w\.pth: not the weights of .*name this network's file") as raised:
        load_weights(module, tmp_path / "w.pth", name="it", backbone=module.backbone)
    assert "\n" not in str(raised.value)


def test_a_deeplab_lends_its_encoder_to_an_fcn(tmp_path: Path) -> None:
    file = made_up(shapes("deeplabv3_resnet50"))
    torch.save(file, tmp_path / "w.pth")
    module = shapes("fcn_resnet50").to_empty(device="cpu")
    filled = load_weights(module, tmp_path / "w.pth", name="it", backbone=module.backbone)
    assert holds(module.backbone, file, "backbone.")
    assert (filled.part, filled.unused) == ("encoder", ("classifier",))


def test_a_recipe_takes_the_whole_network_from_a_file(tmp_path: Path) -> None:
    file = made_up(shapes(SMALLEST))
    torch.save(file, tmp_path / "w.pth")
    network = recipe_network(tmp_path, str(tmp_path / "w.pth"))
    assert holds(network.module, file)
    assert network.filled is not None
    assert network.filled.part == "whole network"


def test_a_recipe_of_other_classes_keeps_the_start_of_the_layers_of_classes(tmp_path: Path) -> None:
    file = made_up(shapes(SMALLEST))
    torch.save(file, tmp_path / "w.pth")
    started = recipe_network(tmp_path, "none", num_classes=3).module
    network = recipe_network(tmp_path, str(tmp_path / "w.pth"), num_classes=3)
    assert network.filled is not None
    assert network.filled.untouched == ("classifier.low_classifier", "classifier.high_classifier")
    for name, tensor in network.module.state_dict().items():
        of_classes = name.startswith(network.filled.untouched)
        assert torch.equal(tensor, started.state_dict()[name] if of_classes else file[name]), name


@pytest.mark.parametrize(
    ("weights", "name", "part"),
    [
        ("published", "lraspp_mobilenet_v3_large-d234d4ea.pth", "whole network"),
        ("imagenet", "mobilenet_v3_large-8738ca79.pth", "encoder"),
    ],
)
def test_published_weights_are_found_under_torchvisions_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, name: str, part: str
) -> None:
    with torch.device("meta"):
        module = build(SMALLEST) if weights == "published" else torchvision.models.mobilenet_v3_large()
    file = made_up(module)
    torch.save(file, tmp_path / name)
    monkeypatch.setenv("VOCSEG_WEIGHTS", str(tmp_path))
    network = recipe_network(tmp_path, weights)
    assert network.filled is not None
    assert (network.filled.path, network.filled.part) == (tmp_path / name, part)
    assert holds(network.module.backbone, file, "backbone." if weights == "published" else "features.")


def test_published_weights_are_the_whole_networks_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(made_up(shapes(SMALLEST).backbone), tmp_path / "lraspp_mobilenet_v3_large-d234d4ea.pth")
    monkeypatch.setenv("VOCSEG_WEIGHTS", str(tmp_path))
    with pytest.raises(UsageError, match=r"d234d4ea\.pth: not the weights of torchvision: of \d+ keys, \d+ missing"):
        recipe_network(tmp_path, "published")


@pytest.mark.parametrize(
    ("weights", "architecture", "name"),
    [
        ("published", SMALLEST, "lraspp_mobilenet_v3_large-d234d4ea.pth"),
        ("imagenet", "mobilenet_v3_large", "mobilenet_v3_large-8738ca79.pth"),
    ],
)
def test_without_network_one_line_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, architecture: str, name: str
) -> None:
    def unknown(*_: object, **__: object) -> list:
        raise socket.gaierror("name not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("VOCSEG_WEIGHTS", raising=False)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    start = time.monotonic()
    with pytest.raises(EnvironmentFault) as raised:
        recipe_network(tmp_path, weights)
    assert time.monotonic() - start < 5  # of which the most is building the network
    (line,) = str(raised.value).splitlines()
    assert f"weights of {architecture}: not on this machine, and download.pytorch.org does not answer" in line
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    assert f"put https://download.pytorch.org/models/{name} into {folder} or into a folder that VOCSEG_WEIGHTS" in line


@pytest.mark.parametrize("network", NETWORKS)
def test_each_says_where_its_weights_are_and_how_they_want_their_images(network: str) -> None:
    module = shapes(network)
    encoder = network.partition("_")[2]
    for cfg, name in ((module.pretrained_cfg, network), (module.backbone.pretrained_cfg, encoder)):
        assert cfg["architecture"] == name
        assert cfg["url"].startswith(f"https://download.pytorch.org/models/{name}")
        assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
