"""Initialisers fill convolutions and linear layers, and nothing that was pretrained."""

import math

import pytest
import torch
from torch import nn

from vocseg.components.initializers import initialize, kaiming, none, xavier_normal, xavier_uniform
from vocseg.plugins import discover

NAMES = {"none", "xavier_uniform", "xavier_normal", "kaiming"}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False), nn.GroupNorm(1, 2)
        )
        self.attention = nn.Linear(4, 4)
        self.tied = nn.Conv2d(3, 4, 3)
        self.tied.weight = self.encoder[0].weight  # type: ignore[assignment]


def every_initializer() -> list:
    components = [c for c in discover() if c.kind == "initializer" and c.origin == "vocseg"]
    assert {c.name for c in components} == NAMES
    return [pytest.param(c, id=c.name) for c in components]


def changed(network: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize("component", every_initializer())
def test_pretrained_weights_and_norms_are_never_touched(component):
    network = Network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    initialize(network, component.build({}, {}), network.encoder)
    fresh = {"decoder.0.weight", "decoder.0.bias", "decoder.2.weight", "attention.weight", "attention.bias"}
    assert changed(network, before) == (set() if component.name == "none" else fresh)


def test_without_a_pretrained_part_every_layer_is_filled():
    network = Network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    initialize(network, xavier_uniform())
    assert changed(network, before) == {k for k in before if not k.startswith(("encoder.1", "decoder.1", "decoder.3"))}


@pytest.mark.parametrize("fill", [xavier_uniform(), xavier_normal(), kaiming()])
def test_biases_become_zero_and_gradients_stay_on(fill):
    layer = nn.Conv2d(8, 8, 3)
    fill(layer)
    assert not layer.bias.any()
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


def test_the_global_seed_decides_the_weights():
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    for layer in layers:
        torch.manual_seed(7)
        kaiming()(layer)
    assert torch.equal(layers[0].weight, layers[1].weight)


# fan_in = 16 · 9 = 144 and fan_out = 64 · 9 = 576 for Conv2d(16, 64, 3); 9216 draws put the deviation within 3 %.
@pytest.mark.parametrize(
    ("fill", "deviation"),
    [
        (xavier_uniform(), math.sqrt(2 / (144 + 576))),
        (xavier_normal(gain=2.0), 2 * math.sqrt(2 / (144 + 576))),
        (kaiming(), math.sqrt(2 / 144)),
        (kaiming(mode="fan_out"), math.sqrt(2 / 576)),
        (kaiming(negative_slope=1.0), math.sqrt(1 / 144)),
    ],
)
def test_the_spread_is_that_of_the_paper(fill, deviation: float):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 64, 3)
    fill(layer)
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert layer.weight.mean().item() == pytest.approx(0, abs=0.05 * deviation)


def test_uniform_xavier_stays_within_its_bound():
    torch.manual_seed(0)
    layer = nn.Linear(100, 50)
    xavier_uniform()(layer)
    # sqrt(6 / 150) = 0.2
    assert 0.199 < layer.weight.abs().max() <= 0.2


def test_none_leaves_a_layer_as_it_is():
    layer = nn.Linear(4, 4)
    before = layer.weight.clone()
    none()(layer)
    assert torch.equal(layer.weight, before)
