"""The baseline FCN: five strided convolutions down, five transposed convolutions up, one 1x1 classifier.

Reports 001 §3.1, 002 §3.1 and 004 "Baseline", after Long, Shelhamer and Darrell 2015, arXiv:1411.4038. What they
leave open or contradict is settled like this:

- The decoder's widths are 512-512-256-128-64-32: 001 has it end in 3 channels yet classifies 32, 004 names five
  layers and four widths.
- What comes after the classifier is left out: 004's softmax is the loss's, 002's "fully connected layer" a reshaping.
- Each transposed convolution restores the size that its mirror image in the encoder was given, so that images of any
  size, odd ones too, come back in full; the reports ran fixed sizes only.
"""

from itertools import pairwise
from typing import Literal

from torch import Size, Tensor, nn

from vocseg import architecture

ENCODER = (3, 32, 64, 128, 256, 512)
DECODER = (512, 512, 256, 128, 64, 32)


def activate(channels: int, norm_order: str) -> nn.Sequential:
    relu, norm = nn.ReLU(inplace=True), nn.BatchNorm2d(channels)
    return nn.Sequential(relu, norm) if norm_order == "relu_bn" else nn.Sequential(norm, relu)


class Up(nn.Module):
    """One decoder layer: (b, channels, h, w) to (b, width, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, channels: int, width: int, norm_order: str):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1)
        self.activate = activate(width, norm_order)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.activate(self.deconv(x, output_size=size))


class FCN(nn.Module):
    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, norm_order: str):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), activate(b, norm_order)) for a, b in pairwise(ENCODER))
        )
        self.decoder = nn.ModuleList(Up(a, b, norm_order) for a, b in pairwise(DECODER))
        self.classifier = nn.Conv2d(DECODER[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for down in self.encoder:
            sizes.append(x.shape[-2:])
            x = down(x)
        for up in self.decoder:
            x = up(x, sizes.pop())
        return self.classifier(x)


@architecture
def fcn_baseline(num_classes: int, *, norm_order: Literal["relu_bn", "bn_relu"] = "relu_bn") -> nn.Module:
    """The reports' baseline FCN (after Long et al. 2015, arXiv:1411.4038).

    Args:
        norm_order: whether the activation (report 001) or the batch norm (report 002) comes first.
    """
    return FCN(num_classes, norm_order)
