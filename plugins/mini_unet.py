"""A U-Net small enough to learn on a laptop's CPU in a minute."""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from vocseg import architecture


@architecture
def mini_unet(num_classes: int, *, width: Annotated[int, Interval(ge=4, le=256)] = 16) -> nn.Module:
    """A small residual U-Net with added skips, from scratch (after Ronneberger et al. 2015, arXiv:1505.04597).

    Four strided convolutions to a sixteenth of the size, residual blocks (He et al. 2016, arXiv:1512.03385), and a
    decoder that adds the encoder's maps and ends at half the size; 0.5 million parameters at the default width.

    Args:
        width: channels of the first map; the deeper ones have 2, 4 and 6 times as many.
    """
    return MiniUNet(num_classes, width)


class MiniUNet(nn.Module):
    """The network of `mini_unet`: (b, 3, h, w) to (b, num_classes, h, w), sides multiples of 16."""

    stride = 16

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width)
        inside = (3, *widths[:-1])
        depths = (0, 1, 1, 2)  # residual blocks; none where the map is largest
        self.down = nn.ModuleList(
            nn.Sequential(convolution(i, o, stride=2), *(Residual(o) for _ in range(depth)))
            for i, o, depth in zip(inside, widths, depths, strict=True)
        )
        self.skip = nn.ModuleList(nn.Conv2d(w, 2 * width, 1) for w in widths)
        self.up = nn.ModuleList(convolution(2 * width, 2 * width) for _ in widths[:-1])
        self.classify = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for down in self.down:
            x = down(x)
            maps.append(x)
        x = self.skip[-1](maps[-1])
        for i in reversed(range(len(self.up))):
            x = self.up[i](F.interpolate(x, scale_factor=2, mode="bilinear") + self.skip[i](maps[i]))
        return F.interpolate(self.classify(x), scale_factor=2, mode="bilinear")


class Residual(nn.Module):
    """Two convolutions and the input added: (b, c, h, w) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.first = convolution(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))
