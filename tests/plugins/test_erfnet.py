"""ERFNet and its decoder on another encoder: layers, sizes, and the checkpoints of ERFNet's authors."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vocseg.components.initializers import initialize, kaiming
from vocseg.data.published import normalization
from vocseg.data.weights import load_weights
from vocseg.errors import UsageError
from vocseg.network import outputs
from vocseg.plugins import bundled, discover, import_file

plugin = import_file(Path(bundled("plugins"), "erfnet.py"))
NETWORKS = [
    pytest.param("erfnet", {}, id="erfnet"),
    pytest.param("erfnet", {"extra_blocks": 1, "dropout": (0.3, 0.3)}, id="darrennet"),
    pytest.param("darrennet_transfer", {"encoder": "resnet10t"}, id="darrennet_transfer"),
]
NB = ("conv3x1_1", "conv1x3_1", "bn1", "conv3x1_2", "conv1x3_2", "bn2")


def build(name: str = "erfnet", num_classes: int = 21, **params: object) -> nn.Module:
    torch.manual_seed(0)
    network = discover().get("architecture", name).build({"num_classes": num_classes}, params)
    initialize(network, kaiming())
    return network


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def apart(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the expected logits' deviation."""
    return ((logits.float() - expected).abs().max() / expected.std()).item()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_parameters_are_those_of_the_table() -> None:
    # A block of c channels: four factorised convolutions 3cc + c, two norms 2c: 12cc + 8c = 49,664 for 64, 197,632 for
    # 128, 3,200 for 16. A downsampler a -> b: 9a(b - a) + (b - a) and a norm 2b: 396, 7,088, 37,184.
    encoder = 396 + 7_088 + 5 * 49_664 + 37_184 + 8 * 197_632
    # An upsampler a -> b: 9ab + b and a norm 2b: 73,920 and 9,264. The last layer: 4 x 16 x 21 + 21 = 1,365.
    decoder = 73_920 + 2 * 49_664 + 9_264 + 2 * 3_200 + 1_365
    network = build()
    assert count(network.encoder) == encoder == 1_874_044
    assert count(network) == encoder + decoder == 2_064_321


def test_extra_blocks_join_every_stage_and_leave_the_encoder_as_it_is() -> None:
    network = build(extra_blocks=2)
    assert count(network.encoder) == count(build().encoder)
    assert count(network) == 2_064_321 + 2 * (49_664 + 197_632 + 49_664 + 3_200)
    assert [b.conv3x1_2.dilation for b in network.extra_fine] == [(1, 1), (1, 1)]
    assert [b.conv3x1_2.dilation for b in network.extra_coarse] == [(2, 1), (4, 1)]
    assert [len(up.blocks) for up in network.decoder] == [4, 4]


def test_the_layers_are_those_of_the_table() -> None:
    network = build()
    layers = [network.encoder.initial_block, *network.encoder.layers]
    assert [type(m).__name__ for m in layers] == [
        *("Downsampler", "Downsampler"), *5 * ["NonBottleneck1D"], "Downsampler", *8 * ["NonBottleneck1D"]
    ]  # fmt: skip
    downs = [layers[i] for i in (0, 1, 7)]
    assert [(d.conv.in_channels, d.conv.out_channels, d.bn.num_features) for d in downs] == [
        (3, 13, 16), (16, 48, 64), (64, 64, 128)
    ]  # fmt: skip
    assert {d.conv.stride for d in downs} == {(2, 2)}
    blocks = [m for m in network.modules() if isinstance(m, plugin.NonBottleneck1D)]
    assert [b.bn1.num_features for b in blocks] == 5 * [64] + 8 * [128] + 2 * [64] + 2 * [16]
    dilations = 5 * [1] + 2 * [2, 4, 8, 16] + 4 * [1]
    assert [b.conv3x1_2.dilation for b in blocks] == [(d, 1) for d in dilations]
    assert [b.conv1x3_2.dilation for b in blocks] == [(1, d) for d in dilations]
    assert {b.conv3x1_1.dilation + b.conv1x3_1.dilation for b in blocks} == {(1, 1, 1, 1)}
    assert [b.dropout.p for b in blocks] == 5 * [0.03] + 8 * [0.3] + 4 * [0.0]
    assert all(isinstance(b.dropout, nn.Dropout2d) for b in blocks)
    ups = [m for m in network.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in ups] == [
        (128, 64, (3, 3), (2, 2)), (64, 16, (3, 3), (2, 2)), (16, 21, (2, 2), (2, 2))
    ]  # fmt: skip


@pytest.mark.parametrize(("channels", "dilation"), [(16, 1), (8, 4)])
def test_a_block_calls_its_layers_in_the_papers_order(channels: int, dilation: int) -> None:
    block = plugin.NonBottleneck1D(channels, 0.5, dilation)
    called: list[str] = []
    for name, layer in block.named_children():
        layer.register_forward_hook(lambda _module, _args, _out, name=name: called.append(name))
    x = noise(2, channels, 9, 11)
    assert block(x).shape == x.shape
    assert called == [*NB, "dropout"]
    # Nothing but the input is left where the second norm gives zero: the residual comes after the dropout.
    nn.init.zeros_(block.bn2.weight)
    assert torch.equal(block(x), x.relu())


def test_the_recipe_chooses_the_dropout_of_each_stage() -> None:
    network = build(dropout=(0.1, 0.5), extra_blocks=1)
    blocks = [m for m in network.encoder.modules() if isinstance(m, plugin.NonBottleneck1D)]
    assert [b.dropout.p for b in blocks] == 5 * [0.1] + 8 * [0.5]
    assert (network.extra_fine[0].dropout.p, network.extra_coarse[0].dropout.p) == (0.1, 0.5)


@pytest.mark.parametrize("extra_blocks", [0, 1])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 101), (34, 36), (7, 1)])
def test_any_size_comes_back(extra_blocks: int, size: tuple[int, int]) -> None:
    network = build(num_classes=5, extra_blocks=extra_blocks).eval()
    assert network.stride == 1
    with torch.no_grad():
        assert network(noise(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize(("name", "params"), NETWORKS)
def test_every_parameter_gets_a_gradient(name: str, params: dict) -> None:
    network = build(name, 5, **params)
    network(noise(2, 3, 64, 65)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("name", "params"), NETWORKS)
def test_bf16_and_channels_last_give_the_same(name: str, params: dict) -> None:
    network = build(name, 5, **params).eval()
    x = noise(2, 3, 64, 96)
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert apart(network(x), expected) < 0.3
        network.to(memory_format=torch.channels_last)
        assert apart(network(x.to(memory_format=torch.channels_last)), expected) < 1e-4


# The checkpoints of ERFNet's authors


def official_encoder(prefix: str) -> dict[str, Tensor]:
    """Made-up tensors with the names that the authors' encoder has, below a prefix; as torch 0.3 saved them."""
    names = [(("conv", "bn"), "initial_block"), (("conv", "bn"), "layers.0"), (("conv", "bn"), "layers.6")]
    names += [(NB, f"layers.{i}") for i in (*range(1, 6), *range(7, 15))]
    shapes = {k: v.shape for k, v in build().encoder.state_dict().items()}
    tensors = {}
    for layers, place in names:
        for layer in layers:
            leaves = ["weight", "bias"] + ["running_mean", "running_var"] * layer.startswith("bn")
            for key in (f"{place}.{layer}.{leaf}" for leaf in leaves):
                tensors[prefix + key] = noise(*shapes.pop(key))
    assert all(key.endswith("num_batches_tracked") for key in shapes)  # the authors' torch had no such thing
    return tensors


@pytest.mark.parametrize(
    ("file", "prefix", "others"),
    [
        # their classifier for ImageNet, and their network for Cityscapes, with and without DataParallel
        ("erfnet_encoder_pretrained.pth.tar", "module.features.encoder.", ("module.classifier.linear.weight",)),
        ("erfnet_pretrained.pth", "module.encoder.", ("module.encoder.output_conv.weight",
                                                      "module.decoder.layers.0.conv.weight")),
        ("full.pth", "encoder.", ("encoder.output_conv.bias", "decoder.layers.1.bn1.weight")),
        ("encoder.pth", "", ("output_conv.weight", "predict.bias")),
    ],
)  # fmt: skip
def test_the_authors_checkpoints_fit_the_encoder_of_erfnet_and_of_darrennet(
    file: str, prefix: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    tensors = official_encoder(prefix)
    checkpoint = {"epoch": 3, "state_dict": tensors | {key: torch.zeros(21) for key in others}}
    torch.save(checkpoint, tmp_path / file)
    for network in (build(), build(extra_blocks=1)):
        rest = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("encoder.")}
        filled = load_weights(network, tmp_path / file, name="erfnet", backbone=network.encoder)
        assert filled.part == "encoder"
        state = network.state_dict()
        assert all(torch.equal(state[f"encoder.{k.removeprefix(prefix)}"], tensor) for k, tensor in tensors.items())
        assert all(torch.equal(state[key], tensor) for key, tensor in rest.items())


def test_an_encoder_with_more_layers_is_refused(tmp_path: Path) -> None:
    torch.save(official_encoder("") | {"layers.15.bn1.weight": torch.zeros(128)}, tmp_path / "deeper.pth")
    network = build()
    with pytest.raises(UsageError, match=r"'layers\.15\.bn1\.weight' is unexpected"):
        load_weights(network, tmp_path / "deeper.pth", name="erfnet", backbone=network.encoder)


def test_images_are_normalised_as_the_authors_did_on_imagenet() -> None:
    assert normalization(build().encoder) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# The decoder on another encoder


def test_the_transfer_network_is_resnet34_and_the_decoder_from_its_map_on() -> None:
    # Upsamplers 9ab + 3b: 512 -> 256 1,180,416, 256 -> 128 295,296, 128 -> 64 73,920, 64 -> 16 9,264. Blocks 12cc + 8c:
    # 788,480, 197,632, 49,664, 3,200. Last layer 1,365.
    ups, blocks = 1_180_416 + 295_296 + 73_920 + 9_264, 788_480 + 197_632 + 49_664 + 3_200
    network = build("darrennet_transfer")
    assert count(network.encoder) == 21_284_672
    assert count(network) - count(network.encoder) == ups + 3 * blocks + 1_365
    assert network.stride == 32
    plain = build("darrennet_transfer", extra_blocks=0, dropout=0.0)
    assert count(plain) - count(plain.encoder) == ups + 2 * blocks + 1_365
    assert [m.p for m in network.decoder.modules() if isinstance(m, nn.Dropout2d)] == 12 * [0.3]
    assert [m.p for m in plain.decoder.modules() if isinstance(m, nn.Dropout2d)] == 8 * [0.0]


def test_below_an_eighth_the_decoder_is_that_of_erfnet() -> None:
    def layers(module: nn.Module) -> list[str]:
        return [re.sub(r"p=[0-9.]+", "", repr(m)) for m in module.modules() if not list(m.children())]

    transfer, erfnet = build("darrennet_transfer", encoder="resnet10t", extra_blocks=0), build()
    assert layers(transfer.decoder[-2:]) == layers(erfnet.decoder)
    assert layers(transfer.classifier) == layers(erfnet.classifier)


@pytest.mark.parametrize(
    ("encoder", "widths"),
    [
        ("resnet10t", [512, 256, 128, 64, 16]),
        ("vit_tiny_patch16_224", [192, 128, 64, 16]),  # 1/16 only
        ("mambaout_femto", [288, 256, 128, 64, 16]),  # channels last
    ],
)
def test_the_decoder_fits_the_encoder(encoder: str, widths: list[int]) -> None:
    network = build("darrennet_transfer", 5, encoder=encoder).eval()
    assert [network.decoder[0].conv.in_channels, *(up.conv.out_channels for up in network.decoder)] == widths
    assert network.stride == 2 ** len(widths)
    with torch.no_grad():
        assert network(noise(1, 3, network.stride, 2 * network.stride)).shape == (
            1, 5, network.stride, 2 * network.stride
        )  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 101)])
def test_the_transfer_network_returns_any_size(size: tuple[int, int]) -> None:
    network = build("darrennet_transfer", 5, encoder="resnet10t").eval()
    with torch.no_grad():
        assert network(noise(1, 3, *size)).shape == (1, 5, *size)  # its encoder rounds up, as the decoder expects
        assert outputs(network, noise(1, 3, *size), network.stride)["out"].shape == (1, 5, *size)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("resnet43", "did you mean 'resnet34'?"),
        ("resnet10t.unheard_of", "Invalid pretrained tag"),
        ("cait_xxs24_224", "name a network for images of any size"),
    ],
)
def test_an_encoder_that_will_not_do_is_refused_in_one_line(encoder: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build("darrennet_transfer", encoder=encoder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
