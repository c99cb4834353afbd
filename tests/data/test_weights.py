"""Weights files: what is read, and what fits which network."""

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vocseg.data.weights import load_weights, read_weights
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


class Segmenter(nn.Module):
    """A whole segmentation network with the names of torchvision's."""

    def __init__(self, num_classes: int, *, auxiliary: bool = False, depth: int = 2, width: int = 4):
        super().__init__()
        self.backbone = Encoder(depth)
        self.classifier = nn.Sequential(nn.Conv2d(4, width, 1), nn.Conv2d(width, num_classes, 1))
        self.aux_classifier = nn.Conv2d(4, num_classes, 1) if auxiliary else None


def shapes_of(module: nn.Module) -> Callable[[], dict[str, torch.Size]]:
    return lambda: {key: tensor.shape for key, tensor in module.state_dict().items()}


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


def one_line_of(error: VocsegError) -> str:
    (line,) = str(error).splitlines()
    return line


# Reading


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".tar"])
def test_what_was_saved_is_read(tmp_path: Path, suffix: str) -> None:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}
    read = read_weights(saved(tmp_path / f"w{suffix}", tensors))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_is_taken_for_its_network(tmp_path: Path, key: str) -> None:
    torch.save({key: {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["a"]


def test_the_checkpoint_of_an_older_training_script_is_read(tmp_path: Path) -> None:
    content = {"epoch": 150, "arch": "erfnet", "state_dict": {"module.a": torch.ones(2)}, "best_acc": torch.tensor(7.0)}
    torch.save(content, tmp_path / "model_best.pth.tar", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "model_best.pth.tar")["module.a"].tolist() == [1, 1]


def test_an_archive_is_no_weights_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(__file__, "notes.txt")
    with pytest.raises(VocsegError, match=r"voc\.tar: ") as raised:
        read_weights(tmp_path / "voc.tar")
    assert one_line_of(raised.value)


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


# Loading a whole network


def test_the_file_of_the_whole_network_fills_the_whole_network(tmp_path: Path) -> None:
    source, target = Segmenter(3), Segmenter(3)
    path = saved(tmp_path / "w.pth", source.state_dict())
    filled = load_weights(target, path, name="it", backbone=target.backbone)
    assert same(target, source)
    assert str(filled) == f"whole network from {path}"


@pytest.mark.parametrize("around", ["module", "_orig_mod", "model"])
def test_what_wraps_a_whole_network_does_not_matter(tmp_path: Path, around: str) -> None:
    source, target = Segmenter(3), Segmenter(3)
    path = saved(tmp_path / "w.pth", wrapped(source, around).state_dict())
    filled = load_weights(target, path, name="it", backbone=target.backbone)
    assert same(target, source)
    assert (filled.part, filled.unused) == ("whole network", ())


def test_an_auxiliary_head_that_the_network_has_not_is_dropped_and_said(tmp_path: Path) -> None:
    source, target = Segmenter(3, auxiliary=True), Segmenter(3)
    path = saved(tmp_path / "w.pth", source.state_dict())
    filled = load_weights(target, path, name="it", backbone=target.backbone)
    assert same(target, source)
    assert str(filled) == f"whole network from {path}; not used of it: aux_classifier"


def test_another_networks_file_fills_the_encoder_alone_and_says_what_it_did_not_use(tmp_path: Path) -> None:
    source, target = Encoder(), Segmenter(3)
    head = {key: tensor.clone() for key, tensor in target.classifier.state_dict().items()}
    decoder = nn.Conv2d(4, 3, 1)
    path = saved(tmp_path / "w.pth", nn.ModuleDict({"encoder": source, "decoder": decoder}).state_dict())
    filled = load_weights(target, path, name="it", backbone=target.backbone)
    assert same(target.backbone, source)
    assert all(torch.equal(tensor, head[key]) for key, tensor in target.classifier.state_dict().items())
    assert str(filled) == f"encoder from {path}; not used of it: decoder"


def test_a_file_without_one_of_the_heads_tensors_fills_the_encoder_alone(tmp_path: Path) -> None:
    source, target = Segmenter(3), Segmenter(3, auxiliary=True)
    path = saved(tmp_path / "w.pth", source.state_dict())
    filled = load_weights(target, path, name="it", backbone=target.backbone)
    assert same(target.backbone, source.backbone)
    assert not torch.equal(target.classifier[0].weight, source.classifier[0].weight)
    assert (filled.part, filled.unused) == ("encoder", ("classifier",))


@pytest.mark.parametrize("with_backbone", [True, False])
def test_all_but_the_layers_of_classes_is_taken_from_a_network_of_other_classes(
    tmp_path: Path, with_backbone: bool
) -> None:
    source, target = Segmenter(21, auxiliary=True), Segmenter(3, auxiliary=True)
    own = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    path = saved(tmp_path / "w.pth", source.state_dict())
    filled = load_weights(
        target,
        path,
        name="it",
        backbone=target.backbone if with_backbone else None,
        other_classes=shapes_of(Segmenter(4, auxiliary=True)),
    )
    assert same(target.backbone, source.backbone)
    assert same(target.classifier[0], source.classifier[0])
    for key in ("classifier.1.weight", "classifier.1.bias", "aux_classifier.weight", "aux_classifier.bias"):
        assert torch.equal(target.state_dict()[key], own[key])
    assert filled.untouched == ("classifier.1", "aux_classifier")
    assert "but for classifier.1, aux_classifier, which it has for another number of classes" in str(filled)


def test_transposed_convolutions_of_classes_are_layers_of_classes_too(tmp_path: Path) -> None:
    def network(num_classes: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, num_classes, 2))

    source, target = network(21), network(3)
    path = saved(tmp_path / "w.pth", source.state_dict())
    filled = load_weights(target, path, name="it", other_classes=shapes_of(network(4)))
    assert same(target[0], source[0])
    assert filled.untouched == ("1",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # 13 keys: 9 of the encoder, as above, and 2 x 2 of the head.
        (
            lambda: Segmenter(3, depth=3),
            r"of 13 keys, 0 missing, 2 unexpected, 0 of .*'backbone\.layer1\.2\.weight' is",
        ),
        (lambda: Segmenter(3, width=5), r"0 missing, 0 unexpected, 3 of another shape; e\.g\. 'classifier\.0\.weight'"),
        # The layer of classes has another number of channels as well: that is no matter of classes.
        (lambda: Segmenter(21, width=5), r"3 of another shape; e\.g\. 'classifier\.0\.weight' is \(5, 4, 1, 1\)"),
        (lambda: Encoder(width=5), r"not the weights of the encoder of it: of 9 keys, .* 9 of another shape"),
        (lambda: nn.Linear(2, 2), r"of 9 keys, 9 missing"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, source: Callable[[], nn.Module], message: str
) -> None:
    target = Segmenter(3)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    path = saved(tmp_path / "w.pth", source().state_dict())
    with pytest.raises(UsageError, match=message) as raised:
        load_weights(target, path, name="it", backbone=target.backbone, other_classes=shapes_of(Segmenter(4)))
    assert one_line_of(raised.value).startswith(f"{path}: ")
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_a_layer_as_wide_as_there_are_classes_is_no_layer_of_classes(tmp_path: Path) -> None:
    # Width 4 beside 4 classes: only the network itself tells which 4 is which.
    target = Segmenter(4)
    path = saved(tmp_path / "w.pth", Segmenter(5, width=5).state_dict())
    with pytest.raises(UsageError, match=r"e\.g\. 'classifier\.0\.weight' is \(5, 4, 1, 1\) in the file"):
        load_weights(target, path, name="it", backbone=target.backbone, other_classes=shapes_of(Segmenter(5)))


def test_the_recipe_may_say_which_part_a_file_is_to_fill(tmp_path: Path) -> None:
    source, target = Segmenter(3), Segmenter(3)
    whole = saved(tmp_path / "whole.pth", source.state_dict())
    filled = load_weights(target, whole, name="it", backbone=target.backbone, part="encoder")
    assert filled.part == "encoder"
    assert same(target.backbone, source.backbone)
    assert not torch.equal(target.classifier[0].weight, source.classifier[0].weight)

    encoder = saved(tmp_path / "encoder.pth", source.backbone.state_dict())
    with pytest.raises(UsageError, match=r"not the weights of it: of 13 keys, 13 missing"):
        load_weights(target, encoder, name="it", backbone=target.backbone, part="whole network")


# A module's own way with a file


class Linears(Encoder):
    """An encoder whose published file keeps `conv1` as a matrix under another name."""

    def adapt_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        adapted = {key: tensor for key, tensor in tensors.items() if key != "fc.weight"}
        if "stem.weight" in adapted:
            adapted["conv1.weight"] = adapted.pop("stem.weight").reshape(self.conv1.weight.shape)
        return adapted


def test_a_backbone_adapts_a_file_to_itself(tmp_path: Path) -> None:
    source = Classifier()
    tensors = source.state_dict()
    tensors["stem.weight"] = tensors.pop("conv1.weight").flatten(1)
    path = saved(tmp_path / "w.pth", tensors)
    target = Segmenter(3)
    target.backbone = Linears()
    filled = load_weights(target, path, name="it", backbone=target.backbone)
    assert same(target.backbone, source)
    assert (filled.part, filled.unused) == ("encoder", ("fc",))  # its bias, which is not dropped

    own = saved(tmp_path / "own.pth", target.state_dict())
    assert load_weights(target, own, name="it", backbone=target.backbone).part == "whole network"


def test_a_network_adapts_a_file_to_itself(tmp_path: Path) -> None:
    class Renamed(Segmenter):
        def adapt_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {re.sub("^head", "classifier", key): tensor for key, tensor in tensors.items()}

    source, target = Segmenter(3), Renamed(3)
    path = saved(
        tmp_path / "w.pth", {re.sub("^classifier", "head", k): tensor for k, tensor in source.state_dict().items()}
    )
    assert load_weights(target, path, name="it", backbone=target.backbone).part == "whole network"
    assert same(target, source)


def test_a_file_that_a_module_cannot_adapt_is_named(tmp_path: Path) -> None:
    class Demanding(Encoder):
        def adapt_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"conv1.weight": tensors["stem.weight"]}

    path = saved(tmp_path / "w.pth", {"a": torch.ones(1)})
    with pytest.raises(UsageError, match=r"adapt_weights of it cannot take it \(KeyError: 'stem\.weight'\)") as raised:
        load_weights(Demanding(), path, name="it")
    assert one_line_of(raised.value).startswith(f"{path}: ")


def test_weights_that_were_cast_as_a_whole_are_taken_though_counts_of_batches_were_too(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(3)
    path = saved(tmp_path / "cast.pth", {key: tensor.double() for key, tensor in norm.state_dict().items()})
    load_weights(norm, path, name="norm")
    assert norm.num_batches_tracked.dtype == torch.int64
