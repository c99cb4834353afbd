"""Optimizers step as torch's plain ones do, fused, and take groups with their own settings."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from vocseg.components.optimizers import adam, adamw, sgd
from vocseg.errors import UsageError
from vocseg.plugins import discover


def every_optimizer() -> list:
    components = [c for c in discover() if c.kind == "optimizer" and c.origin == "vocseg"]
    assert {c.name for c in components} == {"sgd", "adam", "adamw"}
    return [pytest.param(c, id=c.name) for c in components]


def network() -> nn.Module:
    torch.manual_seed(0)
    # No bias before a norm: its gradient is rounding noise, which Adam scales up to whole steps.
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    return net.to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("ours", "theirs", "params"),
    [
        (sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.01, "amsgrad": True}),
        (adamw, torch.optim.AdamW, {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}),
    ],
)
def test_it_steps_as_torch_does_one_parameter_at_a_time(ours: Any, theirs: Any, params: dict[str, Any]):
    one, other = network(), network()
    fused = ours([{"params": list(one.parameters())}], **params)
    plain = theirs([{"params": list(other.parameters())}], **params, foreach=False, fused=False)
    assert fused.param_groups[0]["fused"]
    torch.testing.assert_close(train(one, fused), train(other, plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("component", every_optimizer())
def test_a_group_keeps_its_own_learning_rate_and_decay(component):
    net = network()
    groups = [
        {"params": [net[0].weight], "lr": 1e-5},
        {"params": [net[3].weight]},
        {"params": [net[1].weight], "weight_decay": 0.0},
    ]
    optimizer = component.build({"params": groups}, {"lr": 0.5, "weight_decay": 0.25})
    assert [g["lr"] for g in optimizer.param_groups] == [1e-5, 0.5, 0.5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.25, 0.25, 0.0]


@pytest.mark.parametrize("component", every_optimizer())
def test_where_there_is_no_fused_kernel_torch_chooses(component):
    optimizer = component.build({"params": [{"params": list(network().to("meta").parameters())}]}, {})
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("component", every_optimizer())
def test_restored_state_goes_on_to_the_same_weights(component):
    net = network()
    optimizer = component.build({"params": [{"params": list(net.parameters())}]}, {})
    train(net, optimizer)
    again = copy.deepcopy(net)
    restored = component.build({"params": [{"params": list(again.parameters())}]}, {})
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(train(net, optimizer), train(again, restored), strict=True):
        assert torch.equal(a, b)


def test_nesterov_needs_momentum():
    with pytest.raises(UsageError, match="needs a momentum above 0"):
        sgd([{"params": list(network().parameters())}], momentum=0.0, nesterov=True)
