"""The dilated FCN: the baseline's encoder, a wider bottleneck of dilated convolutions, and a decoder twice as wide.

Report 001 §3.3.1 and Table 1, after Long, Shelhamer and Darrell 2015, arXiv:1411.4038, with the dilated convolutions of
Yu and Koltun 2016, arXiv:1511.07122. What the report leaves open or contradicts is settled like this:

- Every layer has a batch norm, which the table does not list: the network is the baseline with what §3.3.1 adds.
- The table ends with dropout 0.5 on 64 channels; the baseline's 1x1 classifier follows it. The dropout turns off single
  values, and the LeakyReLU in its row is that of the layer before, not a second one.
- §3.3.1 leaves the slope of the LeakyReLU open; 0.01 is PyTorch's.
- Each transposed convolution restores the size that its mirror image in the encoder was given, so that images of any
  size, odd ones too, come back in full.

The bottleneck's map has 1/32 of the image's height and width, rounded up. Where that is a single place, at 32x32, batch
norm cannot train on a batch of one image.
"""

from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Interval
from torch import Size, Tensor, nn

from vocseg import architecture

ENCODER = (3, 32, 64, 128, 256, 512)
BOTTLENECK = 1024
DILATIONS = (2, 4, 6)
DECODER = (1024, 1024, 512, 256, 128, 64)


def activate(channels: int, negative_slope: float, norm_order: str) -> nn.Sequential:
    relu, norm = nn.LeakyReLU(negative_slope, inplace=True), nn.BatchNorm2d(channels)
    return nn.Sequential(relu, norm) if norm_order == "relu_bn" else nn.Sequential(norm, relu)


class Up(nn.Module):
    """One decoder layer: (b, channels, h, w) to (b, width, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, channels: int, width: int, negative_slope: float, norm_order: str):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1)
        self.activate = activate(width, negative_slope, norm_order)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.activate(self.deconv(x, output_size=size))


class DilatedFCN(nn.Module):
    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, dropout: float, negative_slope: float, norm_order: str):
        super().__init__()

        def layer(conv: nn.Conv2d) -> nn.Sequential:
            return nn.Sequential(conv, activate(conv.out_channels, negative_slope, norm_order))

        self.encoder = nn.Sequential(*(layer(nn.Conv2d(a, b, 3, stride=2, padding=1)) for a, b in pairwise(ENCODER)))
        self.bottleneck = nn.Sequential(
            layer(nn.Conv2d(ENCODER[-1], BOTTLENECK, 3, padding=1)),
            *(layer(nn.Conv2d(BOTTLENECK, BOTTLENECK, 3, padding=d, dilation=d)) for d in DILATIONS),
        )
        self.decoder = nn.ModuleList(Up(a, b, negative_slope, norm_order) for a, b in pairwise(DECODER))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(DECODER[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for down in self.encoder:
            sizes.append(x.shape[-2:])
            x = down(x)
        x = self.bottleneck(x)
        for up in self.decoder:
            x = up(x, sizes.pop())
        return self.classifier(self.dropout(x))


@architecture
def fcn_dilated(
    num_classes: int,
    *,
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
    negative_slope: Annotated[float, Interval(ge=0, lt=1)] = 0.01,
    norm_order: Literal["relu_bn", "bn_relu"] = "relu_bn",
) -> nn.Module:
    """A wide FCN with dilated convolutions after the encoder (report 001, Table 1).

    Args:
        dropout: share of the values before the classifier that training turns off.
        negative_slope: of the LeakyReLU, for inputs below zero.
        norm_order: whether the activation (report 001) or the batch norm (report 002) comes first.
    """
    return DilatedFCN(num_classes, dropout, negative_slope, norm_order)
