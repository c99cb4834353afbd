"""The faster copy of a network: what it may change, what it must leave, and that it computes the same."""

from functools import partial
from threading import Lock

import pytest
import torch
from torch import nn

from vocseg.evaluate.faster import InferenceCopy
from vocseg.plugins import discover

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class ConvNorm(nn.Module):
    """A convolution and a batch norm; what connects them is for a subclass to say."""

    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, **options)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def settled(network):
    """The network in eval mode, with statistics as if it were trained."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 2),
                (module.bias.data, -1, 1),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network.eval()


def called(network, images=IMAGES):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return network(images)


def folded(network):
    """Whether the copy does without the network's batch norm, once an image has gone through."""
    copied = InferenceCopy(network)
    called(copied)
    return not any(isinstance(module, nn.BatchNorm2d) for module in copied.modules())


def as_close_as_bf16_allows(found, network):
    """No further from float32 than three times what autocast is; both are off by rounding."""
    with torch.inference_mode():
        exact = network(IMAGES)
    error, usual = ((logits.float() - exact).abs().mean() for logits in (found, called(network)))
    return error <= 3 * usual + 1e-6


def test_a_batch_norm_that_takes_all_of_one_convolution_is_put_into_it():
    network = settled(ConvNorm())
    assert folded(network)
    assert as_close_as_bf16_allows(called(InferenceCopy(network)), network)


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.Conv2d, 4, 4, 3, padding=1, groups=2, bias=False),
        partial(nn.ConvTranspose2d, 4, 6, 2, stride=2),
        partial(nn.ConvTranspose2d, 4, 8, 2, stride=2, groups=2),
    ],
)
def test_every_kind_of_convolution_computes_the_same(layer):
    inner = layer()
    network = settled(nn.Sequential(nn.Conv2d(3, 4, 1), inner, nn.BatchNorm2d(inner.out_channels), nn.ReLU()))
    assert as_close_as_bf16_allows(called(InferenceCopy(network)), network)


class UsedTwice(ConvNorm):
    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class GivenBack(ConvNorm):
    def forward(self, x):
        x = self.conv(x)
        return {"out": self.norm(x), "aux": x}


class ChangedBetween(ConvNorm):
    def forward(self, x):
        return self.norm(self.conv(x).relu_())


class CalledTwice(ConvNorm):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x.flip(-1))


class NormCalledTwice(ConvNorm):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(x.repeat(1, 2, 1, 1)[:, :4])


class InFloat32(ConvNorm):
    """As an author writes who knows that bf16 is too coarse here."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.norm(self.conv(x.float()))


class StatisticsOfTheBatch(ConvNorm):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)


class WithAHook(ConvNorm):
    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda module, given, found: found * 2)


class OwnConvolution(ConvNorm):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.conv = self.Doubled(3, 4, 3, padding=1)


class OverChannelsLast(ConvNorm):
    """A linear layer's output whose second dimension is no channel to it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Linear(16, 5), nn.BatchNorm2d(3)


@pytest.mark.parametrize(
    "kind",
    [
        UsedTwice,
        GivenBack,
        ChangedBetween,
        CalledTwice,
        NormCalledTwice,
        InFloat32,
        StatisticsOfTheBatch,
        WithAHook,
        OwnConvolution,
        OverChannelsLast,
    ],
)
def test_any_other_batch_norm_is_left_as_it_is(kind):
    network = kind().eval() if kind is StatisticsOfTheBatch else settled(kind())
    assert not folded(network)
    expected, found = called(network), called(InferenceCopy(network))
    if not isinstance(found, dict):
        expected, found = {"out": expected}, {"out": found}
    # Weights that are converted once are those that autocast converts each time: no bit differs.
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_are_converted_once_where_autocast_would():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.careful = nn.Conv2d(4, 4, 1)
            self.tied = nn.Conv2d(4, 4, 1, bias=False)
            self.embedding = nn.Embedding(4, 4)
            self.embedding.weight = nn.Parameter(torch.randn(4, 4))
            self.line = nn.Linear(4, 4, bias=False)
            self.line.weight = self.embedding.weight
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x):
            x = self.tied(self.conv(x))
            with torch.autocast("cpu", enabled=False):
                x = self.careful(x.float())
            x = self.norm(x) + self.embedding(torch.zeros(1, dtype=torch.long))[0, :, None, None]
            return self.line(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    network = Mixed().eval()
    copied = InferenceCopy(network)
    assert torch.equal(called(copied), called(network))
    converted = {name for name, p in copied.network.named_parameters() if p.dtype == torch.bfloat16}
    assert converted == {"conv.weight", "conv.bias", "tied.weight"}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())


def test_a_copy_keeps_the_weights_it_was_made_with():
    network = settled(ConvNorm()).train()
    copied = InferenceCopy(network)
    before = called(copied)
    nn.init.zeros_(network.conv.weight)
    network.norm.running_mean.zero_()
    assert torch.equal(called(copied), before)
    assert (network.training, copied.network.training) == (True, False)


def test_the_first_image_gets_what_any_later_one_does():
    copied = InferenceCopy(settled(ConvNorm()))
    assert torch.equal(called(copied), called(copied))


def test_a_batch_norm_in_a_list_of_its_own_is_not_done_twice():
    class Listed(ConvNorm):
        def __init__(self):
            super().__init__()
            self.layers = [self.conv, self.norm]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    network = settled(Listed())
    assert folded(network)
    assert as_close_as_bf16_allows(called(InferenceCopy(network)), network)


def test_a_network_that_cannot_be_copied_is_called_as_it_is():
    network = settled(ConvNorm())
    network.lock = Lock()
    assert torch.equal(called(InferenceCopy(network)), called(network))


def test_in_float32_nothing_changes():
    network = settled(ConvNorm())
    copied = InferenceCopy(network)
    with torch.inference_mode():
        assert torch.equal(copied(IMAGES), network(IMAGES))
        assert torch.equal(copied(IMAGES), network(IMAGES))


@pytest.mark.parametrize(
    ("name", "parameters", "batch_norms_left"),
    [
        ("mini_unet", {"width": 4}, 0),
        # EfficientNets of TensorFlow pad strided convolutions in a class of their own: five of them.
        ("smp", {"decoder": "FPN", "encoder": "tu-tf_efficientnet_lite0"}, 5),
    ],
)
def test_networks_that_are_shipped_lose_their_batch_norms_and_compute_the_same(name, parameters, batch_norms_left):
    torch.manual_seed(0)
    network = settled(discover().get("architecture", name).build({"num_classes": 5}, parameters))
    copied = InferenceCopy(network)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        exact = network(images)
    error, usual = (
        (logits.float() - exact).abs().mean() for logits in (called(copied, images), called(network, images))
    )
    assert error <= 1.5 * usual
    assert sum(isinstance(module, nn.BatchNorm2d) for module in copied.modules()) == batch_norms_left


def test_what_cannot_be_compiled_is_said_and_called_uncompiled():
    def refuse(module, images):
        raise RuntimeError("no compiler\nhere")

    said = []
    network = settled(ConvNorm())
    expected = called(InferenceCopy(network))
    torch._dynamo.reset()
    copied = InferenceCopy(network, compiled=True, say=said.append)
    copied._compiled = torch.compile(copied.network, backend=refuse)
    assert torch.equal(called(copied), expected)
    assert torch.equal(called(copied), expected)
    assert len(said) == 1
    assert said[0].startswith("the network runs uncompiled: ")
    assert "no compiler here" in said[0]
