"""U-Net: its layers, its sizes with and without padding, and what the mirrored border does and does not do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vocseg.components.initializers import initialize, kaiming
from vocseg.plugins import bundled, discover, import_file

plugin = import_file(Path(bundled("plugins"), "unet.py"))
PADDINGS = ("same", "valid")


def build(num_classes: int = 5, **params: object) -> nn.Module:
    """A narrow network, initialised so that its deepest maps reach the logits: with torch's own start they fade."""
    torch.manual_seed(0)
    network = discover().get("architecture", "unet").build({"num_classes": num_classes}, {"width": 4, **params})
    initialize(network, kaiming())
    return network


def on_meta(**params: object) -> nn.Module:
    """The network at full width, without memory for its weights."""
    with torch.device("meta"):
        return build(21, width=64, **params)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def apart(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the expected logits' deviation."""
    return ((logits.float() - expected).abs().max() / expected.std()).item()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_parameters_are_those_of_the_reports(padding: str) -> None:
    # A block a -> b has 9ab + b + 9bb + b: down 38,720 + 221,440 + 885,248 + 3,539,968 + 14,157,824 = 18,843,200.
    # Up 2x2, 4ab + b: 2,097,664 + 524,544 + 131,200 + 32,832 = 2,786,240.
    # Merging blocks 2b -> b, 27bb + 2b: 7,078,912 + 1,769,984 + 442,624 + 110,720 = 9,402,240.
    # Classifier 64 x 21 + 21 = 1,365.
    plain = on_meta(padding=padding)
    assert [count(m) for m in (plain.down, plain.up, plain.merge)] == [18_843_200, 2_786_240, 9_402_240]
    assert count(plain) == 31_033_045
    # Batch norms, two a block: 2 x (64 + 128 + 256 + 512 + 1024) = 3,968 channels down, 2 x (512 + 256 + 128 + 64)
    # = 1,920 up; two parameters each.
    assert count(on_meta(padding=padding, batch_norm=True)) == 31_033_045 + 11_776 == 31_044_821


def test_the_layers_are_those_of_the_tables() -> None:
    network = on_meta(batch_norm=True)
    widths = [64, 128, 256, 512, 1024]
    convolutions = [[m for m in block if isinstance(m, nn.Conv2d)] for block in (*network.down, *network.merge)]
    assert [[m.in_channels for m in pair] for pair in convolutions] == [
        [3, 64], [64, 128], [128, 256], [256, 512], [512, 1024], [1024, 512], [512, 256], [256, 128], [128, 64]
    ]  # fmt: skip
    assert [m.out_channels for pair in convolutions for m in pair] == [w for w in widths for _ in "ab"] + [
        w for w in widths[-2::-1] for _ in "ab"
    ]
    for m in (m for pair in convolutions for m in pair):
        assert (m.kernel_size, m.stride, m.dilation, m.padding) == ((3, 3), (1, 1), (1, 1), (1, 1))
    for block in (*network.down, *network.merge):
        assert [type(m) for m in block] == 2 * [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in network.up] == [
        (2 * w, w, (2, 2), (2, 2)) for w in widths[-2::-1]
    ]
    assert (network.pool.kernel_size, network.pool.stride) == (2, 2)
    assert network.classifier.kernel_size == (1, 1)
    assert [type(m) for m in on_meta().down[0]] == 2 * [nn.Conv2d, nn.ReLU]


def test_unpadded_convolutions_make_388_of_572_as_in_the_paper() -> None:
    network = on_meta(padding="valid")
    assert {m.padding for m in network.modules() if isinstance(m, nn.Conv2d)} == {(0, 0)}
    maps: list[int] = []
    for block in (*network.down, *network.merge):
        block.register_forward_hook(lambda _module, _args, out: maps.append(out.shape[-1]))
    assert network.scores(torch.empty(1, 3, 572, 572, device="meta")).shape == (1, 21, 388, 388)
    assert maps == [568, 280, 136, 64, 28, 52, 100, 196, 388]  # Figure 1 of the paper
    assert network.stride == 1
    assert network(torch.empty(1, 3, 388, 388, device="meta")).shape == (1, 21, 388, 388)
    assert plugin.tile(388) == 572


@given(size=st.integers(1, 2000))
def test_a_tile_leaves_the_images_size_and_less_than_sixteen_more(size: int) -> None:
    length = plugin.tile(size)
    for _ in range(4):  # down
        assert length % 2 == 0
        length = (length - 4) // 2
    length -= 4
    for _ in range(4):  # up
        length = 2 * length - 4
    assert 0 <= length - size < 16


@settings(deadline=None)
@given(size=st.integers(1, 40), more=st.integers(0, 130))
def test_mirroring_is_that_of_numpy(size: int, more: int) -> None:
    x = torch.arange(3.0 * size).reshape(3, size)
    before = more // 2
    expected = np.pad(x.numpy(), ((0, 0), (before, more - before)), mode="reflect")
    assert torch.equal(plugin.mirrored(x, -1, size + more), torch.from_numpy(expected))
    assert torch.equal(plugin.mirrored(x.T, -2, size + more), torch.from_numpy(expected.T.copy()))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (63, 101), (48, 80), (7, 1)])
def test_any_size_comes_back(padding: str, size: tuple[int, int]) -> None:
    network = build(padding=padding, batch_norm=True).eval()
    with torch.no_grad():
        logits = network(noise(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_parameter_gets_a_gradient(padding: str, batch_norm: bool) -> None:
    network = build(padding=padding, batch_norm=batch_norm)
    network(noise(2, 3, 33, 47)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("padding", PADDINGS)
def test_bf16_and_channels_last_give_the_same(padding: str) -> None:
    network = build(padding=padding, batch_norm=True).eval()
    x = noise(2, 3, 45, 64)
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert apart(network(x), expected) < 0.1
        network.to(memory_format=torch.channels_last)
        assert apart(network(x.to(memory_format=torch.channels_last)), expected) < 1e-4


def test_the_mirrored_border_changes_nothing_inside() -> None:
    # 572 pixels are continued to tile(572) = 764, 96 on each side. 96 is a multiple of 16, so that the poolings pair
    # the same pixels as without; logits 92 pixels and more from the border are those of the bare, unpadded network.
    network = build(2, padding="valid")
    image = noise(1, 3, 572, 572)
    with torch.no_grad():
        bare, whole = network.scores(image), network(image)
    assert bare.shape[-2:] == (388, 388)
    assert apart(whole[..., 92:-92, 92:-92], bare) < 1e-4


def test_a_pixel_far_inside_does_not_see_how_the_border_is_continued() -> None:
    # A height of 304 is continued by 94 on each side, a width of 252 by 96.
    network = build(2, padding="valid")
    image = noise(1, 3, 304, 252)
    with torch.no_grad():
        mirrored = network(image)
        zeros = nn.functional.pad(image, (96, 96, 94, 94))
        assert zeros.shape[-2:] == (plugin.tile(304), plugin.tile(252))
        zeroed = plugin.middle(network.scores(zeros), 304, 252)
    # A logit reads less than 92 + 16 pixels to each side: the poolings may reach up to 15 further.
    difference = (mirrored - zeroed).abs() / zeroed.std()
    assert difference[..., 108:-108, 108:-108].max() < 1e-4
    assert difference[..., :8, :8].max() > 0.5
    assert difference[..., 60:-60, 60:-60].max() > 0.01  # through the deepest maps, which see 92 pixels


@pytest.mark.parametrize("padding", PADDINGS)
def test_neither_side_is_treated_otherwise(padding: str) -> None:
    # The mirrored image through mirrored kernels gives the mirrored logits, where no side has a pixel more.
    network, other = build(padding=padding), build(padding=padding)
    with torch.no_grad():
        for p in other.parameters():
            if p.ndim == 4:
                p.copy_(p.flip(-2, -1))
        x = noise(1, 3, 48, 64)
        assert apart(other(x.flip(-2, -1)).flip(-2, -1), network(x)) < 1e-4


@pytest.mark.parametrize("padding", PADDINGS)
def test_each_skip_joins_the_map_at_its_own_place(padding: str) -> None:
    # With only the finest skip left, and kernels that pass on their middle, a bright pixel shows where it is.
    network = build(1, padding=padding, width=1)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        for block in (network.down[0], network.merge[-1]):
            for m in block:
                if isinstance(m, nn.Conv2d):
                    m.weight[0, 0, 1, 1] = 1
        network.classifier.weight.fill_(1)
        x = torch.zeros(1, 3, 50, 39)
        x[0, 0, 11, 30] = 1
        assert torch.equal(network(x)[0, 0], x[0, 0])
