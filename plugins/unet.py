"""U-Net: two convolutions a level down to a sixteenth of the size and up again, with concatenating skips.

Reports 001 §3.3.3, §5.3.3 and Table 3, 002 §3.3 (5c) and Table 4, 004 Table 6, after Ronneberger, Fischer and Brox
2015, arXiv:1505.04597. What they leave open or contradict is settled like this:

- Convolutions are padded in 001 and 004 and not in 002, whose text says "without padding" and "with crop" against the
  padding 1 of its table: `padding`. Batch norm comes between convolution and activation, as in 002 and in 001 §5.3.3;
  the tables of 001 and 004 have none: `batch_norm`.
- Poolings halve: 001 prints stride 1 for them, which its decoder could not undo. There are four; 001 has a fifth that
  nothing reads.
- All convolutions are 3x3 with stride 1, also where 002 prints stride 0 or 2x2 with stride 2.
- The transposed convolutions have no activation (004 has one, 002 and the paper have none), and the classifier has
  none either (001 and 004 print a ReLU on the logits).
- The last block, 004's conv17 and conv18, takes the 128 channels of the concatenation, not 64.
- There is no dropout: the paper has it at the end of the way down, no report has.

Any size comes back in full. With padding "same" the poolings round up, and each map on the way up loses the row or
column that its skip does not have. With "valid", where 572x572 pixels give 388x388 logits, the image is first
continued by mirroring, as in the paper's overlap-tile strategy, to a size that leaves at least its own, and the middle
of the logits is returned. An image smaller than the margin is mirrored back and forth, as between two parallel mirrors.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from vocseg import architecture

LEVELS = 5
LOST = 184  # what unpadded convolutions take off each side's length: 572 -> 388


class UNet(nn.Module):
    """The network of `unet`: (b, 3, h, w) to (b, num_classes, h, w)."""

    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, width: int, batch_norm: bool, padding: str):
        super().__init__()
        self.valid = padding == "valid"
        widths = [width * 2**level for level in range(LEVELS)]

        def block(inside: int, outside: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for a, b in ((inside, outside), (outside, outside)):
                layers += [nn.Conv2d(a, b, 3, padding=0 if self.valid else 1)]
                layers += [nn.BatchNorm2d(b)] if batch_norm else []
                layers += [nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(block(a, b) for a, b in pairwise((3, *widths)))
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths[::-1]))
        self.merge = nn.ModuleList(block(2 * b, b) for b in widths[-2::-1])
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.valid:
            return self.scores(x)
        h, w = x.shape[-2:]
        return middle(self.scores(mirrored(mirrored(x, -2, tile(h)), -1, tile(w))), h, w)

    def scores(self, x: Tensor) -> Tensor:
        """The U itself: logits of the input's size, or of `LOST` less if its convolutions are not padded."""
        skips: list[Tensor] = []
        for down in self.down:
            x = down(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x, skip = up(x), skips.pop()
            if self.valid:
                skip = middle(skip, *x.shape[-2:])
            else:
                x = x[..., : skip.shape[-2], : skip.shape[-1]]
            x = merge(torch.cat([skip, x], 1))
        return self.classifier(x)


def tile(size: int) -> int:
    """The least length from which unpadded convolutions leave `size` or more, with nothing left over at a pooling."""
    # From a deepest map of n, the way up makes n -> 2n - 4 four times: 16n - 60. The way down began with 16n + 124.
    deepest = -(-(size + 60) // 16)
    return 16 * deepest - 60 + LOST


def mirrored(x: Tensor, dim: int, size: int) -> Tensor:
    """Continues a dimension to `size` on both sides alike, by reflection at its first and last place."""
    last = x.shape[dim] - 1
    before = (size - last - 1) // 2
    places = torch.arange(-before, size - before, device=x.device).remainder(max(2 * last, 1))
    return x.index_select(dim, last - (last - places).abs())


def middle(x: Tensor, h: int, w: int) -> Tensor:
    top, left = (x.shape[-2] - h) // 2, (x.shape[-1] - w) // 2
    return x[..., top : top + h, left : left + w]


@architecture
def unet(
    num_classes: int,
    *,
    width: Annotated[int, Interval(ge=1, le=256)] = 64,
    batch_norm: bool = False,
    padding: Literal["same", "valid"] = "same",
) -> nn.Module:
    """U-Net with concatenating skips (Ronneberger et al. 2015, arXiv:1505.04597).

    Args:
        width: channels at the image's own size; each of the four levels below has twice as many.
        batch_norm: normalise between convolution and activation.
        padding: pad the convolutions (reports 001 and 004), or crop the skips and mirror the image (002, the paper).
    """
    return UNet(num_classes, width, batch_norm, padding)
