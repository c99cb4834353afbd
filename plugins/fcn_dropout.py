"""The dropout FCN: seven strided convolutions down, dropout, seven transposed convolutions up to the classes.

Report 002 §3.3 (5a) and Table 1, after Long, Shelhamer and Darrell 2015, arXiv:1411.4038. What the report leaves open
or contradicts is settled like this:

- Dropout stands once, between encoder and decoder, as §3.3 and §5.3 end up saying; §3.3 first has it "at each layer".
  It turns off single values ("nodes"), not whole channels.
- Every layer but the last has a batch norm, which the table does not list: the network is the baseline with dropout.
- The last transposed convolution gives the logits: no activation, as in the table, and so no batch norm.
- Each transposed convolution restores the size that its mirror image in the encoder was given, so that images of any
  size, odd ones too, come back in full; the report ran 224x224 only.

Its innermost map has 1/128 of the image's height and width, rounded up. Where that is a single place, up to 128x128,
batch norm cannot train on a batch of one image.
"""

from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Interval
from torch import Size, Tensor, nn

from vocseg import architecture

ENCODER = (3, 64, 128, 256, 512, 512, 512, 512)
DECODER = (512, 512, 512, 512, 256, 128, 64)  # and the classes


def activate(channels: int, norm_order: str) -> nn.Sequential:
    relu, norm = nn.ReLU(inplace=True), nn.BatchNorm2d(channels)
    return nn.Sequential(relu, norm) if norm_order == "relu_bn" else nn.Sequential(norm, relu)


class Up(nn.Module):
    """One decoder layer: (b, channels, h, w) to (b, width, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, channels: int, width: int, after: nn.Module):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1)
        self.after = after

    def forward(self, x: Tensor, size: Size) -> Tensor:
        return self.after(self.deconv(x, output_size=size))


class DropoutFCN(nn.Module):
    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, dropout: float, norm_order: str):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), activate(b, norm_order)) for a, b in pairwise(ENCODER))
        )
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.ModuleList(Up(a, b, activate(b, norm_order)) for a, b in pairwise(DECODER))
        self.decoder.append(Up(DECODER[-1], num_classes, nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for down in self.encoder:
            sizes.append(x.shape[-2:])
            x = down(x)
        x = self.dropout(x)
        for up in self.decoder:
            x = up(x, sizes.pop())
        return x


@architecture
def fcn_dropout(
    num_classes: int,
    *,
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
    norm_order: Literal["relu_bn", "bn_relu"] = "bn_relu",
) -> nn.Module:
    """A deeper baseline FCN with dropout between encoder and decoder (report 002, Table 1).

    Args:
        dropout: share of the values between encoder and decoder that training turns off.
        norm_order: whether the activation (report 001) or the batch norm (report 002) comes first.
    """
    return DropoutFCN(num_classes, dropout, norm_order)
