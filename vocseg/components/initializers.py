"""Initialisers: how layers without pretrained weights start, and the walk that applies one to a network.

An initialiser is f(module), which fills the weight of one convolution, transposed convolution or linear layer and sets
its bias to 0. They draw from torch's global generator. Normalisation layers keep torch's own start.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Gt, Interval
from torch import nn

from vocseg import initializer

Fill = Callable[[nn.Module], None]
LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear
)  # fmt: skip


@initializer
def none() -> Fill:
    """Leaves every layer as its architecture made it."""
    return lambda module: None


@initializer
def xavier_uniform(*, gain: Annotated[float, Gt(0)] = 1.0) -> Fill:
    """Xavier, uniform in ±gain·sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010), of reports 001, 002 and 004."""
    return _filling(lambda weight: nn.init.xavier_uniform_(weight, gain))


@initializer
def xavier_normal(*, gain: Annotated[float, Gt(0)] = 1.0) -> Fill:
    """Xavier, normal with deviation gain·sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010), of report 004."""
    return _filling(lambda weight: nn.init.xavier_normal_(weight, gain))


@initializer
def kaiming(
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    negative_slope: Annotated[float, Interval(ge=0, le=1)] = 0.0,
) -> Fill:
    """Kaiming, normal with variance 2 / ((1 + slope²) · fan) (He et al. 2015, arXiv:1502.01852), of report 004.

    For transposed convolutions torch takes fan_in for fan_out and the other way round; so does this.

    Args:
        mode: keep the variance of activations (fan_in) or of gradients (fan_out).
        negative_slope: of the activation that follows: 0 for ReLU, 0.01 for LeakyReLU, 1 for none.
    """
    return _filling(
        lambda weight: nn.init.kaiming_normal_(weight, a=negative_slope, mode=mode, nonlinearity="leaky_relu")
    )


def initialize(network: nn.Module, fill: Fill, pretrained: nn.Module | None = None) -> None:
    """Fills every convolution and linear layer of a network but those of `pretrained`.

    Args:
        pretrained: the part whose weights were loaded, if any. A layer elsewhere that shares its weight with that part
            is left alone too.
    """
    kept = {id(p) for p in pretrained.parameters()} if pretrained is not None else set()
    for module in network.modules():
        if isinstance(module, LAYERS) and id(module.weight) not in kept:
            fill(module)


def _filling(fill_weight: Callable) -> Fill:
    def fill(module: nn.Module) -> None:
        fill_weight(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    return fill
