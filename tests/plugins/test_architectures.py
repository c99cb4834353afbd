"""All bundled architectures: shapes, parameter counts, layer order, and what they refuse."""

import socket
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from vocseg.errors import UsageError
from vocseg.network import outputs, stride_of
from vocseg.plugins import bundled, discover, import_file

SMALL = [
    ("mini_unet", {}),
    ("fcn_baseline", {}),
    ("transfer_fcn", {"encoder": "resnet10t"}),
    ("smp", {"encoder": "tu-mobilenetv3_small_050"}),
    ("classifier_fpn", {"encoder": "resnet10t", "width": 32}),
]
DECODERS = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet",
    "Segformer",
)  # fmt: skip


def build(name: str, num_classes: int = 21, **params: object) -> nn.Module:
    return discover().get("architecture", name).build({"num_classes": num_classes}, params)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "params"), SMALL)
def test_every_parameter_gets_a_gradient(name: str, params: dict) -> None:
    network = build(name, 5, **params)
    logits = outputs(network, torch.randn(2, 3, 64, 96), stride_of(network))["out"]
    assert logits.shape == (2, 5, 64, 96)
    logits.square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(("name", "params"), SMALL)
def test_building_needs_no_network_and_leaves_training_mode(
    name: str, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert all(module.training for module in build(name, **params).modules())


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 101), (7, 1)])
def test_the_baseline_returns_any_size(size: tuple[int, int]) -> None:
    network = build("fcn_baseline").eval()
    assert network.stride == 1
    assert network(torch.zeros(1, 3, *size)).shape == (1, 21, *size)


def test_the_baseline_has_the_layers_of_the_report() -> None:
    # Encoder, 9ab + b each: 896 + 18,496 + 73,856 + 295,168 + 1,180,160 = 1,568,576, batch norms 2 x 992 = 1,984.
    # Decoder: 2,359,808 + 1,179,904 + 295,040 + 73,792 + 18,464 = 3,927,008, batch norms 2 x 992 = 1,984.
    # Classifier: 32 x 21 + 21 = 693.
    network = build("fcn_baseline")
    assert count(network.encoder) == 1_570_560
    assert count(network) == 5_500_245

    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert [m.out_channels for m in convolutions] == [32, 64, 128, 256, 512, 512, 256, 128, 64, 32, 21]
    assert [m.stride for m in convolutions] == [(2, 2)] * 10 + [(1, 1)]
    assert [type(m) for m in convolutions] == [nn.Conv2d] * 5 + [nn.ConvTranspose2d] * 5 + [nn.Conv2d]


@pytest.mark.parametrize("name", ["fcn_baseline", "transfer_fcn"])
@pytest.mark.parametrize(
    ("norm_order", "layers"), [("relu_bn", [nn.ReLU, nn.BatchNorm2d]), ("bn_relu", [nn.BatchNorm2d, nn.ReLU])]
)
def test_the_recipe_chooses_whether_activation_or_norm_comes_first(name: str, norm_order: str, layers: list) -> None:
    encoder = {"encoder": "resnet10t"} if name == "transfer_fcn" else {}
    network = build(name, norm_order=norm_order, **encoder)
    for up in network.decoder:
        called = [m for m in up.modules() if not list(m.children())]
        assert [type(m) for m in called] == [nn.ConvTranspose2d, *layers]


def test_the_encoder_of_the_baseline_has_the_same_order_as_its_decoder() -> None:
    for norm_order, last in (("relu_bn", nn.BatchNorm2d), ("bn_relu", nn.ReLU)):
        for down in build("fcn_baseline", norm_order=norm_order).encoder:
            layers = [m for m in down.modules() if not list(m.children())]
            assert isinstance(layers[0], nn.Conv2d)
            assert isinstance(layers[2], last)


def test_the_transfer_network_is_resnet34_without_its_head_and_the_baseline_decoder() -> None:
    # Decoder as the baseline's: 3,927,008 + 1,984, and the classifier's 693.
    network = build("transfer_fcn")
    assert count(network.encoder) == 21_284_672
    assert count(network) - count(network.encoder) == 3_929_685
    assert network.stride == 32


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 101)])
def test_the_transfer_network_returns_any_size_that_its_encoder_rounds_up(size: tuple[int, int]) -> None:
    assert build("transfer_fcn", encoder="resnet10t").eval()(torch.zeros(1, 3, *size)).shape == (1, 21, *size)


@pytest.mark.parametrize(
    ("encoder", "widths"),
    [
        ("mobilenetv3_small_050", [288, 512, 256, 128, 64, 32]),
        ("vit_tiny_patch16_224", [192, 256, 128, 64, 32]),  # 1/16 only
        ("mambaout_femto", [288, 512, 256, 128, 64, 32]),  # channels last
    ],
)
def test_the_decoder_fits_the_encoder(encoder: str, widths: list[int]) -> None:
    network = build("transfer_fcn", encoder=encoder).eval()
    deconvolutions = [up.deconv for up in network.decoder]
    assert [deconvolutions[0].in_channels, *(d.out_channels for d in deconvolutions)] == widths
    assert network.stride == 2 ** len(deconvolutions)
    h, w = network.stride, 2 * network.stride
    assert network(torch.zeros(1, 3, h, w)).shape == (1, 21, h, w)


@pytest.mark.parametrize(
    ("name", "encoder", "message"),
    [
        ("transfer_fcn", "resnet43", "did you mean 'resnet34'?"),
        ("transfer_fcn", "resnet10t.unheard_of", "Invalid pretrained tag"),
        ("transfer_fcn", "hf-hub:timm/resnet10t", "timm has no model"),
        ("transfer_fcn", "cait_xxs24_224", "name a network for images of any size"),
        ("smp", "resnet43", "did you mean 'resnet34'?"),
        ("smp", "tu-resnet10", "did you mean 'tu-resnet10t'?"),
        ("smp", "resnet10t", "did you mean 'tu-resnet10t'?"),
        ("smp", "tu-vit_tiny_patch16_224", "smp cannot put Unet on 'tu-vit_tiny_patch16_224'"),
    ],
)
def test_an_encoder_that_will_not_do_is_refused_in_one_line(name: str, encoder: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build(name, encoder=encoder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_architecture_of_smp_is_offered() -> None:
    found = {n for n, c in vars(smp).items() if isinstance(c, type) and issubclass(c, smp.base.SegmentationModel)}
    offered = next(p for p in discover().get("architecture", "smp").parameters if p.name == "decoder")
    assert sorted(offered.annotation.__args__) == sorted(found) == sorted([*DECODERS, "DPT"])


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_smp_decoder_returns_logits_of_the_images_size(decoder: str) -> None:
    network = build("smp", 3, decoder=decoder, encoder="tu-mobilenetv3_small_050").eval()
    h, w = network.stride, 2 * network.stride
    assert network(torch.zeros(1, 3, h, w)).shape == (1, 3, h, w)


def test_dpt_takes_a_vision_transformer_at_other_sizes_than_its_own() -> None:
    network = build("smp", 3, decoder="DPT", encoder="tu-vit_tiny_patch16_224", decoder_channels=(16,)).eval()
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 3, 64, 96)


@pytest.mark.parametrize(
    ("params", "widths"),
    [
        ({"decoder": "Unet", "decoder_channels": (32, 16, 8), "encoder_depth": 3}, {32, 16, 8}),
        ({"decoder": "Unet", "encoder_depth": 4}, {256, 128, 64, 32}),
        ({"decoder": "FPN", "decoder_channels": (48, 32)}, {48, 32}),
        ({"decoder": "FPN", "decoder_channels": (48,)}, {48, 128}),
        ({"decoder": "FPN", "decoder_channels": (48, 32), "encoder_depth": 4}, {48, 32}),
        ({"decoder": "PSPNet", "decoder_channels": (40,), "encoder_depth": 4}, {40}),
    ],
)
def test_the_recipe_chooses_the_decoders_widths(params: dict, widths: set[int]) -> None:
    network = build("smp", 3, encoder="resnet18", **params).eval()
    found = {m.out_channels for m in network.decoder.modules() if isinstance(m, nn.Conv2d)}
    assert widths <= found
    assert network(torch.zeros(1, 3, 64, 32)).shape == (1, 3, 64, 32)


def test_the_recipe_chooses_the_decoders_dropout() -> None:
    network = build("smp", decoder="FPN", encoder="tu-mobilenetv3_small_050", decoder_dropout=0.4)
    assert 0.4 in [m.p for m in network.decoder.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]


def test_all_that_is_wrong_with_an_smp_network_is_said_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        build("smp", decoder="Linknet", encoder="resnet43", decoder_channels=(8,), decoder_dropout=0.1)
    assert [p.where for p in raised.value.problems] == [
        "model.encoder",
        "model.decoder_channels",
        "model.decoder_dropout",
    ]


def test_every_encoder_of_smp_says_where_its_weights_are() -> None:
    plugin = import_file(Path(bundled("plugins"), "smp.py"))
    names = plugin.segmentation_models_pytorch.encoders.get_encoder_names()
    assert len(names) > 50
    for name in names:
        cfg = plugin.published(name)
        assert cfg["architecture"] == name
        assert cfg["hf_hub_id"].startswith(f"smp-hub/{name}.")
        assert len(cfg["hf_hub_id"].partition("@")[2]) == 40  # a commit
    assert build("smp", encoder="resnet18").encoder.pretrained_cfg == plugin.published("resnet18")


def test_the_classifier_pyramid_scores_every_place_with_the_classifier_it_was_given() -> None:
    network = build("classifier_fpn", encoder="resnet10t", width=32).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = network(image)
        network.encoder.fc.bias[7] += 1.0  # one ImageNet class is likelier everywhere
        after = network(image)
    assert before.shape == (1, 21, 16, 16)  # of the finest map, at 1/4
    assert not torch.equal(before, after)


def test_the_classifier_pyramid_takes_lite0_whole() -> None:
    network = build("classifier_fpn", encoder="tf_efficientnet_lite0")
    # timm's count of the whole classifier, and a pyramid of 128 channels:
    # last 1280*128 + 256, scores 1000*128 + 256, pooled 1280*128 + 128, laterals (24+40+112+320)*128 + 4*128,
    # four smoothings of 9*128*128 + 256, classifier 128*21 + 21.
    assert count(network.encoder) == 4_652_008
    pyramid = 164_096 + 128_256 + 163_968 + 64_000 + 4 * 147_712 + 2_709
    assert count(network) == 4_652_008 + pyramid
    assert network.stride == 32


@pytest.mark.parametrize(
    ("encoder", "message"),
    [("mobilenetv3_small_050", "does not read its last map"), ("resnet_34", "did you mean 'resnet34'")],
)
def test_the_classifier_pyramid_refuses_what_has_no_such_classifier(encoder: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("classifier_fpn", encoder=encoder)


def test_the_mini_unet_has_the_layers_it_says() -> None:
    network = build("mini_unet", num_classes=7)
    assert network.stride == 16
    strides = [m.stride[0] for m in network.modules() if isinstance(m, nn.Conv2d) and m.stride[0] > 1]
    assert strides == [2, 2, 2, 2]
    # Widths w = 16: 16, 32, 64, 96. Strided convolutions 9*(3*16 + 16*32 + 32*64 + 64*96) = 78,768 and their norms
    # 2*208; residual blocks 2*(9*w*w + 2*w) for 32, 64, 96, 96 = 424,576; skips 32*(208) + 4*32 = 6,784;
    # three decoder convolutions 3*(9*32*32 + 2*32) = 27,840; classifier 32*7 + 7 = 231.
    assert count(network) == 78_768 + 416 + 18_560 + 73_984 + 2 * 166_272 + 6_784 + 27_840 + 231
