"""The reports' own FCNs: with dropout, with max-pooling, dilated, dilated with context."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vocseg.plugins import discover
from vocseg.registry import Registry

NAMES = ["fcn_dropout", "fcn_maxpool", "fcn_dilated", "fcn_dilated_context"]
Layer = tuple[str, int, int, int, int, int]  # kind, channels in and out, stride, padding, dilation; all kernels are 3x3


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.fixture(scope="module")
def network(registry: Registry) -> Callable[[str], nn.Module]:
    """Each network with its defaults for 21 classes, built once and in eval mode; not to be changed."""
    built: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in built:
            torch.manual_seed(0)
            built[name] = registry.get("architecture", name).build({"num_classes": 21}, {}).eval()
        return built[name]

    return get


@pytest.fixture
def build(registry: Registry) -> Callable[..., nn.Module]:
    def fresh(name: str, num_classes: int = 5, **params: object) -> nn.Module:
        torch.manual_seed(0)
        return registry.get("architecture", name).build({"num_classes": num_classes}, params)

    return fresh


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def called(network: nn.Module) -> list[nn.Module]:
    """The network's layers in the order in which an image meets them."""
    order: list[nn.Module] = []
    leaves = [m for m in network.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(lambda module, *_: order.append(module)) for m in leaves]
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return order


def kinds(layers: list[nn.Module]) -> list[str]:
    short = {"ConvTranspose2d": "Deconv", "Conv2d": "Conv", "BatchNorm2d": "BN", "MaxPool2d": "Pool"}
    return [short.get(type(m).__name__, type(m).__name__) for m in layers if not isinstance(m, nn.Identity)]


def rows(layers: list[nn.Module]) -> list[Layer]:
    """The 3x3 convolutions as rows of the reports' tables."""
    found = []
    for m in layers:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m.kernel_size == (3, 3):
            row = (kinds([m])[0], m.in_channels, m.out_channels, m.stride[0], m.padding[0], m.dilation[0])
            assert (m.stride, m.padding, m.dilation) == tuple((v, v) for v in row[3:])
            assert m.bias is not None
            found.append(row)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (96, 35)])
def test_an_image_of_any_size_comes_back_in_full(network: Callable, name: str, size: tuple[int, int]) -> None:
    module = network(name)
    assert module.stride == 1
    with torch.no_grad():
        assert module(torch.zeros(1, 3, *size)).shape == (1, 21, *size)


@pytest.mark.parametrize("name", NAMES)
def test_memory_format_changes_nothing_and_bf16_little(network: Callable, name: str) -> None:
    module = network(name)
    image = torch.randn(1, 3, 41, 58)
    with torch.no_grad():
        logits = module(image)
        other = copy.deepcopy(module).to(memory_format=torch.channels_last)
        laid_out = other(image.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            coarse = module(image).float()
    torch.testing.assert_close(laid_out, logits, rtol=1e-4, atol=1e-5)
    assert (coarse - logits).abs().max() < 0.1 * logits.std()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(build: Callable, name: str) -> None:
    module = build(name)
    # fcn_dropout's innermost map has 1/128 of the sides: 2x2 places here, so that batch norm has some variance.
    size = (129, 160) if name == "fcn_dropout" else (33, 64)
    logits = module(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, *size)
    logits.square().mean().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # A bias before batch norm is subtracted again, but no convolution's weight is.
    assert [n for n, p in module.named_parameters() if p.ndim > 1 and not p.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_dropout_acts_in_training_only(build: Callable, name: str) -> None:
    image = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        module = build(name, dropout=0.2)
        assert not torch.equal(module(image), module(image))
        module.eval()
        assert torch.equal(module(image), module(image))
        still = build(name, dropout=0.0)
        assert torch.equal(still(image), still(image))


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_chooses_dropout_and_slope(network: Callable, build: Callable, name: str) -> None:
    defaults = {"fcn_maxpool": 0.3}
    slope = {} if name == "fcn_dropout" else {"negative_slope": 0.2}
    dropouts = [m for m in build(name, dropout=0.1, **slope).modules() if isinstance(m, nn.Dropout)]
    assert {m.p for m in dropouts} == {0.1}
    assert {m.p for m in network(name).modules() if isinstance(m, nn.Dropout)} == {defaults.get(name, 0.5)}
    for module, expected in ((build(name, **slope), 0.2), (network(name), 0.01)):
        slopes = {m.negative_slope for m in module.modules() if isinstance(m, nn.LeakyReLU)}
        assert slopes == ({expected} if slope else set())
        assert any(isinstance(m, nn.ReLU) for m in module.modules()) is (name == "fcn_dropout")


@pytest.mark.parametrize("name", ["fcn_dropout", "fcn_dilated"])
def test_the_recipe_chooses_whether_activation_or_norm_comes_first(build: Callable, name: str) -> None:
    relu = "ReLU" if name == "fcn_dropout" else "LeakyReLU"
    for order, expected in (("relu_bn", [relu, "BN"]), ("bn_relu", ["BN", relu])):
        module = build(name, norm_order=order)
        after = kinds(called(module.eval()))
        starts = [i for i, kind in enumerate(after) if kind in ("Conv", "Deconv")][:-1]  # the last gives the logits
        assert [after[i + 1 : i + 3] for i in starts] == [expected] * len(starts)


@pytest.mark.parametrize(("name", "size"), [("fcn_dropout", 128), ("fcn_dilated", 32), ("fcn_dilated_context", 32)])
def test_batch_norm_trains_on_one_image_once_the_innermost_map_has_two_places(
    build: Callable, name: str, size: int
) -> None:
    module = build(name)
    with torch.no_grad():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(torch.zeros(1, 3, size, size))
        assert module(torch.zeros(1, 3, size, size + 1)).isfinite().all()


def test_fcn_dropout_has_the_layers_of_table_1(network: Callable) -> None:
    module = network("fcn_dropout")
    layers = called(module)
    down = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    up = [(512, 512), (512, 512), (512, 512), (512, 256), (256, 128), (128, 64), (64, 21)]
    assert rows(layers) == [("Conv", a, b, 2, 1, 1) for a, b in down] + [("Deconv", a, b, 2, 1, 1) for a, b in up]
    assert kinds(layers) == ["Conv", "BN", "ReLU"] * 7 + ["Dropout"] + ["Deconv", "BN", "ReLU"] * 6 + ["Deconv"]
    # Convolutions, 9ab + b each: 1,792 + 73,856 + 295,168 + 1,180,160 + 3 x 2,359,808 = 8,630,400 down,
    # 3 x 2,359,808 + 1,179,904 + 295,040 + 73,792 + 12,117 = 8,640,277 up; batch norms 2 x (2,496 + 1,984) = 8,960.
    assert count(module) == 8_630_400 + 8_640_277 + 8_960 == 17_279_637


def test_fcn_dilated_has_the_layers_of_table_1(network: Callable) -> None:
    module = network("fcn_dilated")
    layers = called(module)
    down = [(3, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    up = [(1024, 1024), (1024, 512), (512, 256), (256, 128), (128, 64)]
    assert rows(layers) == [
        *(("Conv", a, b, 2, 1, 1) for a, b in down),
        ("Conv", 512, 1024, 1, 1, 1),
        *(("Conv", 1024, 1024, 1, d, d) for d in (2, 4, 6)),
        *(("Deconv", a, b, 2, 1, 1) for a, b in up),
    ]
    assert kinds(layers) == ["Conv", "LeakyReLU", "BN"] * 9 + ["Deconv", "LeakyReLU", "BN"] * 5 + ["Dropout", "Conv"]
    # Encoder as the baseline's: 1,570,560. Bottleneck 4,719,616 + 3 x 9,438,208 = 33,034,240, batch norms 8,192.
    # Decoder 9,438,208 + 4,719,104 + 1,179,904 + 295,040 + 73,792 = 15,706,048, batch norms 2 x 1,984 = 3,968.
    # Classifier 64 x 21 + 21 = 1,365.
    assert count(module) == 1_570_560 + 33_034_240 + 8_192 + 15_706_048 + 3_968 + 1_365 == 50_324_373


def test_fcn_dilated_context_has_the_layers_that_the_report_tells_of(network: Callable) -> None:
    module = network("fcn_dilated_context")
    layers = called(module)
    down = [(3, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
    up = [(512, 512), (512 + 256, 256), (256 + 128, 128), (128 + 64, 64), (64 + 32, 32)]  # with the encoder's maps
    assert rows(layers) == [
        *(("Conv", a, b, 2, 1, 1) for a, b in down),
        *(("Conv", 512, 512, 1, d, d) for d in (2, 4, 6)),
        *(("Deconv", a, b, 2, 1, 1) for a, b in up),
    ]
    triple = ["LeakyReLU", "BN"]
    context = ["Conv", "LeakyReLU"]
    assert kinds(layers) == ["Conv", *triple] * 8 + context + ["Deconv", *triple] * 5 + ["Dropout", "Conv"]
    # Encoder as the baseline's: 1,570,560. Dilated 3 x (2,359,808 + 1,024) = 7,082,496. Context 512 x 512 + 512.
    # Decoder 2,359,808 + 1,769,728 + 442,496 + 110,656 + 27,680 = 4,710,368, batch norms 2 x 992 = 1,984.
    # Classifier 32 x 21 + 21 = 693.
    assert count(module) == 1_570_560 + 7_082_496 + 262_656 + 4_710_368 + 1_984 + 693 == 13_628_757


def test_the_context_tells_every_place_the_same_about_the_whole_map(network: Callable) -> None:
    context = network("fcn_dilated_context").context
    x = torch.randn(2, 512, 3, 5)
    with torch.no_grad():
        added = context(x) - x
        elsewhere = x.clone()
        elsewhere[0, :, 2, 4] += 10.0
        moved = context(elsewhere)[:, :, 0, 0] - context(x)[:, :, 0, 0]
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    assert moved[0].abs().max() > 0.1
    assert not moved[1].any()


def test_the_decoder_is_given_the_encoders_map_of_its_size(network: Callable) -> None:
    module = network("fcn_dilated_context")
    maps: list[Tensor] = []
    given: list[Tensor] = []
    hooks = [down.register_forward_hook(lambda _module, _inputs, out: maps.append(out)) for down in module.encoder]
    hooks += [up.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0])) for up in module.decoder]
    with torch.no_grad():
        module(torch.randn(1, 3, 75, 64))
    for hook in hooks:
        hook.remove()
    for below, skip in zip(given[1:], maps[-2::-1], strict=True):
        assert torch.equal(below[:, -skip.shape[1] :], skip)
        assert below.shape[1] > skip.shape[1]


def test_fcn_maxpool_has_the_layers_of_table_2(network: Callable) -> None:
    module = network("fcn_maxpool")
    layers = called(module)
    assert rows(layers) == [
        ("Conv", 3, 32, 2, 1, 1),
        *(("Conv", a, b, 1, 1, 1) for a, b in [(32, 64), (64, 128), (128, 256), (256, 512)]),
        *(("Deconv", a, b, 1, 1, 1) for a, b in [(512, 512), (512, 256), (256, 128), (128, 64), (64, 32)]),
    ]
    after = ["BN", "LeakyReLU", "Dropout"]
    pooled = ["Conv", *after, "Pool"]
    assert kinds(layers) == pooled * 2 + ["Conv", *after] * 3 + ["Deconv", *after] * 4 + ["Deconv", "Dropout", "Conv"]
    pools = [m for m in layers if isinstance(m, nn.MaxPool2d)]
    assert [(m.kernel_size, m.stride, m.padding, m.dilation) for m in pools] == [(2, 1, 1, 1)] * 2
    # The baseline's convolutions in another order, 5,496,277, and its batch norms but for the last layer's 2 x 32.
    assert count(module) == 5_500_245 - 64


def test_the_logits_of_fcn_maxpool_lie_where_their_pixels_are(build: Callable) -> None:
    # Convolutions that hand on their first channel. A bright pixel at (8, 24) is at (4, 12) of the map of half size,
    # the poolings make 3x3 places of it, whose centre (4.5, 12.5) x 2 - 0.5 is (8.5, 24.5) at full size.
    module = build("fcn_maxpool").eval()
    for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    image = torch.zeros(1, 3, 32, 48)
    image[0, 0, 8, 24] = 1.0
    with torch.no_grad():
        bright = module(image)[0, 0]
    total = bright.sum()
    assert float((bright.sum(1) * torch.arange(32)).sum() / total) == pytest.approx(8.5)
    assert float((bright.sum(0) * torch.arange(48)).sum() / total) == pytest.approx(24.5)


def trained_once(module: nn.Module, forward: Callable[[Tensor], Tensor], image: Tensor) -> list[Tensor]:
    """All that a training step leaves behind: logits, gradients, buffers, and the state of the random generator."""
    torch.manual_seed(1)
    logits = forward(image)
    logits.square().mean().backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [logits.detach(), *gradients, *module.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_nothing_but_memory(build: Callable, precision: str) -> None:
    image = torch.randn(2, 3, 33, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        plain, saving = (build("fcn_maxpool", checkpoint=checkpoint) for checkpoint in (False, True))
        expected, found = (trained_once(module, module, image) for module in (plain, saving))
    assert len(found) == len(expected)
    assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)] == []
    assert all(int(m.num_batches_tracked) == 1 for m in saving.modules() if isinstance(m, nn.BatchNorm2d))


def test_checkpointing_compiles(build: Callable) -> None:
    image = torch.randn(2, 3, 33, 40)
    plain, saving = (build("fcn_maxpool", checkpoint=checkpoint) for checkpoint in (False, True))
    compiled = torch.compile(saving, backend="aot_eager", fullgraph=True)
    for a, b in zip(trained_once(saving, compiled, image), trained_once(plain, plain, image), strict=True):
        torch.testing.assert_close(a, b)


def kept_by(layers: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """What layers make of x, and the bytes that autograd keeps for their backward pass, weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = layers(x)
    own = {t.untyped_storage().data_ptr() for t in (*layers.parameters(), *layers.buffers())}
    return result, sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16", 2), ("fp32", 4)])
def test_fcn_maxpool_trains_eight_images_of_224_within_12_gib(build: Callable, precision: str, bytes_each: int) -> None:
    module = build("fcn_maxpool", 21, checkpoint=True).to(memory_format=torch.channels_last)
    image = torch.randn(1, 48, 48, 3).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        _, kept = kept_by(module, image)
        # What recomputing a layer keeps, the largest at a time, and as much again for gradients on their way.
        segments, x = [], image
        for layer in (*module.encoder, *module.decoder):
            x, segment = kept_by(layer, x)
            segments.append(segment)
    # One map a layer: 32 channels on 25x25 places after the first pooling, then 26x26 of
    # 64 + 128 + 256 + 512 + 512 + 256 + 128 + 64 + 32 = 1,952 channels; and the image, 3 x 48 x 48 values of 4 bytes.
    maps = bytes_each * (32 * 25 * 25 + 1_952 * 26 * 26) + 27_648
    assert maps <= kept < 1.05 * maps
    assert sum(segments) > 3 * kept  # without checkpointing it would keep all of this
    weights = 4 * count(module) * 4  # weights, gradients and Adam's two averages
    total = weights + 8 * (224 / 48) ** 2 * (kept + 2 * max(segments))
    assert total < 12 * 2**30
    assert weights + 8 * (224 / 48) ** 2 * 2 * sum(segments) < 12 * 2**30  # and so does keeping everything
