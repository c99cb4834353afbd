"""The dilated FCN with context: dilated convolutions, a summary of the whole map, and skips into the decoder.

Report 001 §5.3.1 and §5.3.4, which tell of this network in words only and so differ from its Table 1 (`fcn_dilated`).
After Long, Shelhamer and Darrell 2015, arXiv:1411.4038. What the words leave open is settled like this:

- Encoder: the baseline's ("on top of our basic FCN") with LeakyReLU, and its order of activation before batch norm.
- Dilated convolutions "after the encoder": three of 512 channels, with Table 1's dilations 2, 4 and 6 (Yu and Koltun
  2016, arXiv:1511.07122), and without the layer that widens Table 1's map to 1024 channels, which the words leave out.
- "Global context processing": the map's mean, a 1x1 convolution and a LeakyReLU, added to every place of the map, much
  as in ParseNet (Liu et al. 2015, arXiv:1506.04579), which concatenates. It has no batch norm: its map is a single
  place, which a batch of one image gives no variance.
- "Skip connections inspired by U-Net" (Ronneberger et al. 2015, arXiv:1505.04597): after each of the decoder's first
  four transposed convolutions the encoder's map of that size is concatenated, and the next layer mixes the two. At
  full size there is only the image itself, and nothing is concatenated.
- Dropout before the classifier, as in Table 1; §5.3.1 does not name it. It turns off single values.
- The decoder restores the encoder's sizes, so that images of any size, odd ones too, come back in full.

The innermost map has 1/32 of the image's height and width, rounded up. Where that is a single place, at 32x32, batch
norm cannot train on a batch of one image.
"""

from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Size, Tensor, nn

from vocseg import architecture

ENCODER = (3, 32, 64, 128, 256, 512)
DILATIONS = (2, 4, 6)
DECODER = (512, 256, 128, 64, 32)


def activate(channels: int, negative_slope: float) -> nn.Sequential:
    return nn.Sequential(nn.LeakyReLU(negative_slope, inplace=True), nn.BatchNorm2d(channels))


class Context(nn.Module):
    """Adds to every place of a map (b, channels, h, w) what a 1x1 convolution makes of its mean."""

    def __init__(self, channels: int, negative_slope: float):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.activation = nn.LeakyReLU(negative_slope, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.conv(x.mean((2, 3), keepdim=True)))


class Up(nn.Module):
    """One decoder layer: (b, channels, h, w) to (b, width, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, channels: int, width: int, negative_slope: float):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1)
        self.activate = activate(width, negative_slope)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.activate(self.deconv(x, output_size=size))


class ContextFCN(nn.Module):
    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, dropout: float, negative_slope: float):
        super().__init__()

        def layer(conv: nn.Conv2d) -> nn.Sequential:
            return nn.Sequential(conv, activate(conv.out_channels, negative_slope))

        width = ENCODER[-1]
        self.encoder = nn.Sequential(*(layer(nn.Conv2d(a, b, 3, stride=2, padding=1)) for a, b in pairwise(ENCODER)))
        self.dilated = nn.Sequential(*(layer(nn.Conv2d(width, width, 3, padding=d, dilation=d)) for d in DILATIONS))
        self.context = Context(width, negative_slope)
        skips = (0, *ENCODER[-2:0:-1])  # channels that join each layer's input: 0, 256, 128, 64, 32
        inputs = (a + b for a, b in zip((width, *DECODER[:-1]), skips, strict=True))
        self.decoder = nn.ModuleList(Up(a, b, negative_slope) for a, b in zip(inputs, DECODER, strict=True))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(DECODER[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []  # what each encoder layer was given: the image, then the maps that skip to the decoder
        for down in self.encoder:
            seen.append(x)
            x = down(x)
        x = self.context(self.dilated(x))
        for up in self.decoder:
            skip = seen.pop()
            x = up(x, skip.shape[-2:])
            if seen:
                x = torch.cat((x, skip), 1)
        return self.classifier(self.dropout(x))


@architecture
def fcn_dilated_context(
    num_classes: int,
    *,
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
    negative_slope: Annotated[float, Interval(ge=0, lt=1)] = 0.01,
) -> nn.Module:
    """An FCN with dilated convolutions, global context and skips (report 001, section 5.3.1).

    Args:
        dropout: share of the values before the classifier that training turns off.
        negative_slope: of the LeakyReLU, for inputs below zero.
    """
    return ContextFCN(num_classes, dropout, negative_slope)
