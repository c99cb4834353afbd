"""FCN-8s: its layers, where its crops put the logits, its bilinear start, and VGG16's weights as its own.

No test needs the weights of the whole network, half a gigabyte: they take a narrow one of the same layers, or none.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from vocseg.components.initializers import initialize, kaiming, xavier_uniform
from vocseg.data.published import imagenet_weights, normalization
from vocseg.data.weights import load_weights
from vocseg.errors import UsageError
from vocseg.plugins import bundled, discover, import_file

plugin = import_file(Path(bundled("plugins"), "fcn8s.py"))


def narrow(num_classes: int = 3, widths: tuple[int, ...] = (4, 4, 6, 8, 8), hidden: int = 16) -> nn.Module:
    """The same layers with few channels, whose skips are as loud as fc7 in spite of their small factors."""
    torch.manual_seed(0)
    network = plugin.FCN8s(num_classes, plugin.VGG16(0.5, widths, hidden))
    initialize(network, kaiming())
    with torch.no_grad():
        network.score_pool4.weight.mul_(1e2)
        network.score_pool3.weight.mul_(1e4)
    return network


def whole(**params: object) -> nn.Module:
    """The network that a recipe builds, without memory for its weights."""
    with torch.device("meta"):
        return discover().get("architecture", "fcn8s").build({"num_classes": 21}, params)


@pytest.fixture(scope="module")
def on_meta() -> nn.Module:
    return whole()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def apart(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the expected logits' deviation."""
    return ((logits.float() - expected).abs().max() / expected.std()).item()


def test_the_parameters_are_those_of_vgg16_and_the_paper(on_meta: nn.Module) -> None:
    # VGG16's convolutions: 14,714,688. fc6 512 x 49 x 4096 + 4096 = 102,764,544, fc7 4096 x 4096 + 4096 = 16,781,312.
    # Scores (4096 + 512 + 256 + 3) x 21 = 102,207; upsampling 21 x 21 x (16 + 16 + 256) = 127,008, without biases.
    assert count(on_meta.encoder.features) == 14_714_688
    assert count(on_meta.encoder) == 14_714_688 + 102_764_544 + 16_781_312
    assert count(on_meta) == count(on_meta.encoder) + 102_207 + 127_008 == 134_489_759


def test_the_layers_are_those_of_the_table(on_meta: nn.Module) -> None:
    features = on_meta.encoder.features
    found = [m.out_channels if isinstance(m, nn.Conv2d) else "pool" for m in features if not isinstance(m, nn.ReLU)]
    assert found == [
        64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"
    ]  # fmt: skip
    for before, after in pairwise(features):
        assert not isinstance(before, nn.Conv2d) or isinstance(after, nn.ReLU)
    convolutions = [m for m in features if isinstance(m, nn.Conv2d)]
    assert [m.padding for m in convolutions] == [(100, 100)] + 12 * [(1, 1)]
    assert {(m.kernel_size, m.stride, m.dilation) for m in convolutions} == {((3, 3), (1, 1), (1, 1))}
    pools = [m for m in features if isinstance(m, nn.MaxPool2d)]
    assert {(m.kernel_size, m.stride, m.ceil_mode) for m in pools} == {(2, 2, True)}
    fc6, fc7 = on_meta.encoder.fc6, on_meta.encoder.fc7
    assert (fc6.in_channels, fc6.out_channels, fc6.kernel_size, fc6.padding) == (512, 4096, (7, 7), (0, 0))
    assert (fc7.in_channels, fc7.out_channels, fc7.kernel_size) == (4096, 4096, (1, 1))
    assert (on_meta.encoder.dropout.p, whole(dropout=0.25).encoder.dropout.p) == (0.5, 0.25)
    ups = [on_meta.upsample_fc7, on_meta.upsample_pool4, on_meta.upsample_pool3]
    assert [(m.weight.shape[-1], m.factor) for m in ups] == [(4, 2), (4, 2), (16, 8)]


def test_the_skips_are_scaled_as_in_the_paper() -> None:
    network = narrow().eval()
    heard: dict[str, Tensor] = {}
    for name in ("score_pool3", "score_pool4"):
        network.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: heard.update({name: args[0]}))
    with torch.no_grad():
        x = noise(1, 3, 32, 40)
        network(x)
        pool3, pool4, _ = network.encoder(x)
    assert torch.allclose(heard["score_pool3"], pool3 * 0.0001)
    assert torch.allclose(heard["score_pool4"], pool4 * 0.01)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 101), (48, 500), (7, 1)])
def test_any_size_comes_back(size: tuple[int, int]) -> None:
    network = narrow().eval()
    assert network.stride == 1
    with torch.no_grad():
        assert network(noise(1, 3, *size)).shape == (1, 3, *size)


def test_the_crops_never_run_out_of_a_map() -> None:
    # Only the sizes of the maps matter, and height goes as width does.
    network = narrow(1, (1, 1, 1, 1, 1), 1).to("meta")
    for size in range(32, 100):
        assert network(torch.empty(1, 3, size, size, device="meta")).shape == (1, 1, size, size)


def test_every_parameter_gets_a_gradient() -> None:
    network = narrow()
    network(noise(2, 3, 32, 33)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_and_channels_last_give_the_same() -> None:
    network = narrow().eval()
    x = noise(2, 3, 45, 64)
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert apart(network(x), expected) < 0.3
        network.to(memory_format=torch.channels_last)
        assert apart(network(x.to(memory_format=torch.channels_last)), expected) < 1e-4


# Where the logits lie


def only(network: nn.Module, score: str) -> nn.Module:
    """The network with one of its three score layers left."""
    for name in {"score_fc7", "score_pool4", "score_pool3"} - {score}:
        nn.init.zeros_(network.get_submodule(name).weight)
    return network


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize(
    # The largest of 32, 16 or 8 neighbouring pixels of a ramp lies 15.5, 7.5 or 3.5 above their mean, and everything
    # after the poolings is linear: the logits are the ramp itself, that much higher, if they lie where the pixels do.
    ("score", "factor", "above"),
    [("score_fc7", 1.0, 15.5), ("score_pool4", 100.0, 7.5), ("score_pool3", 10_000.0, 3.5)],
)
def test_the_logits_lie_on_the_images_pixels(score: str, factor: float, above: float, dim: int) -> None:
    network = narrow(1, (1, 1, 1, 1, 1), 1).eval()
    with torch.no_grad():
        for p in network.encoder.parameters():
            p.zero_()
        for m in network.encoder.modules():
            if isinstance(m, nn.Conv2d):
                m.weight[0, 0, m.kernel_size[0] // 2, m.kernel_size[1] // 2] = 1
        only(network, score).get_submodule(score).weight.fill_(factor)
        ramp = torch.arange(270.0).expand(1, 3, 250, 270)
        ramp = ramp if dim == -1 else ramp.transpose(-1, -2)
        inside = network(ramp)[0, 0, 80:180, 80:180]
    assert torch.allclose(inside, ramp[0, 0, 80:180, 80:180] + above, atol=1e-3)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize(("score", "shift"), [("score_pool3", 8), ("score_pool4", 16), ("score_fc7", 32)])
def test_what_moves_in_the_image_moves_as_far_in_the_logits(score: str, shift: int, dim: int) -> None:
    # A logit sees 250 pixels to each side. Along the other dimension the image may be as small as it likes.
    network = only(narrow(), score).eval()
    image = noise(1, 3, 640, 32) if dim == -2 else noise(1, 3, 32, 640)
    with torch.no_grad():
        before = network(image).narrow(dim, shift, 640 - shift)
        after = network(image.narrow(dim, shift, 640 - shift))
    middle = (640 - shift) // 2 - 40
    before, after = before.narrow(dim, middle, 80), after.narrow(dim, middle, 80)
    assert apart(after, before) < 1e-4
    assert apart(after.roll(1, dim), before) > 0.01


@pytest.mark.parametrize("factor", [2, 8])
def test_upsampling_starts_bilinear_whatever_the_initializer(factor: int) -> None:
    network = nn.Sequential(plugin.Upsample(3, factor))
    x = noise(1, 3, 5, 7)
    for fill in (xavier_uniform(), kaiming()):
        initialize(network, fill)
        y = network(x)
        assert y.shape == (1, 3, 6 * factor, 8 * factor)
        # half a place more on each side than interpolation, which repeats the border there
        expected = F.interpolate(x, scale_factor=factor, mode="bilinear")
        edge, inner = factor, slice(factor // 2, -factor // 2)
        assert torch.allclose(y[..., edge:-edge, edge:-edge], expected[..., inner, inner], atol=1e-6)


# VGG16's weights


def test_torchvisions_vgg16_becomes_the_encoder_without_its_last_layer(on_meta: nn.Module) -> None:
    with torch.device("meta"):
        published = torchvision.models.vgg16().state_dict()
    wanted = {key: tensor.shape for key, tensor in on_meta.encoder.state_dict().items()}
    assert {k: v.shape for k, v in on_meta.encoder.adapt_weights(published).items()} == wanted
    wrapped = on_meta.encoder.adapt_weights({f"module.{key}": tensor for key, tensor in published.items()})
    assert wrapped.keys() == {f"module.{key}" for key in wanted}


def test_timms_vgg16_and_our_own_encoder_are_taken_too() -> None:
    encoder = narrow().encoder
    own = encoder.state_dict()
    assert encoder.adapt_weights(own).keys() == own.keys()
    timms = {k.replace("fc6", "pre_logits.fc1").replace("fc7", "pre_logits.fc2"): v for k, v in own.items()}
    adapted = encoder.adapt_weights(timms | {"head.fc.weight": torch.zeros(10, 16)})
    assert adapted.keys() == own.keys()
    assert all(torch.equal(adapted[key], own[key]) for key in own)


def test_a_converted_layer_gives_at_a_place_what_the_linear_layer_gives(tmp_path: Path) -> None:
    network = narrow().eval()
    encoder = network.encoder
    first, second = nn.Linear(8 * 7 * 7, 16), nn.Linear(16, 16)
    made_up = {k: torch.randn_like(v) for k, v in encoder.state_dict().items() if k.startswith("features.")}
    for place, layer in (("classifier.0", first), ("classifier.3", second), ("classifier.6", nn.Linear(16, 10))):
        made_up |= {f"{place}.{k}": v for k, v in layer.state_dict().items()}
    torch.save(made_up, tmp_path / "vgg16.pth")
    assert load_weights(network, tmp_path / "vgg16.pth", name="fcn8s", backbone=encoder).part == "encoder"
    assert torch.equal(encoder.features[28].weight, made_up["features.28.weight"])
    map_ = noise(1, 8, 9, 7)  # of pool5: three places for a window of 7x7
    with torch.no_grad():
        convolved = F.relu(encoder.fc7(F.relu(encoder.fc6(map_))))
        for row in range(3):
            window = map_[:, :, row : row + 7].flatten(1)  # as VGG16 flattens it
            expected = F.relu(second(F.relu(first(window))))
            assert torch.allclose(convolved[0, :, row, 0], expected[0], atol=1e-5)


def test_a_classifier_of_another_width_is_refused(tmp_path: Path) -> None:
    network = narrow()
    made_up = {k.replace("fc6", "classifier.0"): v for k, v in network.encoder.state_dict().items()}
    torch.save(made_up | {"classifier.0.weight": torch.zeros(16, 50)}, tmp_path / "vgg.pth")
    with pytest.raises(UsageError, match=r"'fc6\.weight' is \(16, 50\) in the file and \(16, 8, 7, 7\)"):
        load_weights(network, tmp_path / "vgg.pth", name="fcn8s", backbone=network.encoder)


def test_the_published_file_is_found_by_its_name(on_meta: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "vgg16-397923af.pth"
    file.touch()
    assert imagenet_weights(on_meta.encoder, [tmp_path]) == file
    assert normalization(on_meta.encoder) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
