"""ERFNet: a small encoder of factorised residual blocks to an eighth of the size, and a light decoder; also DarrenNet.

Report 004 Tables 1-4, after Romera, Álvarez, Bergasa and Arroyo 2018, doi:10.1109/TITS.2017.2750080. What the report
leaves open or contradicts is settled by the paper and its authors' code, like this:

- The initial block is a downsampler, 3 -> 16 with stride 2. Table 1 prints stride 1, and the output would then have
  twice the image's size.
- Upsamplers are transposed convolutions of stride 2 (Table 4; Table 1 prints 1), and so is the last 2x2 layer.
- Paddings are those of Tables 2-4; Table 1 prints 0 throughout. The dilations, which no table prints, are 2, 4, 8, 16
  and again, in the eight blocks of 128 channels.
- A block is 3x1, ReLU, 1x3, norm, ReLU, dilated 3x1, ReLU, dilated 1x3, norm, dropout, plus its input, ReLU. Table 2
  names neither the order of norms and activations nor the residual.
- Dropout belongs to the encoder; the decoder's blocks have none.
- DarrenNet is a "modified erfnet structure" with "additional convolution layers" and "higher dropout", yet Table 1 is
  ERFNet layer by layer and prints no dropout. Here it is this network with `extra_blocks` and `dropout`: each of the
  four stages of blocks (64 and 128 channels down, 64 and 16 up) gets as many blocks more, at its end. Those at the end
  of the 128 channels go on with the dilations 2, 4, ...

The encoder is ERFNet's own whatever `extra_blocks` says, with the names of the authors' release, so that their
ImageNet weights fit a DarrenNet too ("we are also able to use pretrained erfnet encoders"). Extra blocks are not part
of it: they start afresh, and train where it is frozen.

Any size comes back in full: the downsamplers' poolings round up as their convolutions do, and the decoder restores the
size that each downsampler was given. The authors' poolings round down, which is the same for the even sizes they take.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from vocseg import architecture

Share = Annotated[float, Interval(ge=0, lt=1)]

DILATIONS = (2, 4, 8, 16)
COARSE = 6  # the place of the second downsampler in the encoder's layers
EPS = 1e-3  # of the batch norms


class Downsampler(nn.Module):
    """(b, inside, h, w) to (b, outside, h / 2, w / 2), rounded up: a convolution beside a pooling."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside - inside, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.bn = nn.BatchNorm2d(outside, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(torch.cat([self.conv(x), self.pool(x)], 1)))


class NonBottleneck1D(nn.Module):
    """A residual block whose 3x3 convolutions are factorised, the second dilated: (b, c, h, w) to the same."""

    def __init__(self, channels: int, dropout: float, dilation: int):
        super().__init__()
        d = dilation
        self.conv3x1_1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(channels, eps=EPS)
        self.conv3x1_2 = nn.Conv2d(channels, channels, (3, 1), padding=(d, 0), dilation=(d, 1))
        self.conv1x3_2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, d), dilation=(1, d))
        self.bn2 = nn.BatchNorm2d(channels, eps=EPS)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1x3_1(F.relu(self.conv3x1_1(x)))))
        y = self.bn2(self.conv1x3_2(F.relu(self.conv3x1_2(y))))
        return F.relu(self.dropout(y) + x)


class Encoder(nn.Module):
    """(b, 3, h, w) to (b, 128, h / 8, w / 8), rounded up."""

    def __init__(self, dropout: tuple[float, float]):
        super().__init__()
        fine, coarse = dropout
        self.initial_block = Downsampler(3, 16)
        self.layers = nn.ModuleList(
            [
                Downsampler(16, 64),
                *(NonBottleneck1D(64, fine, 1) for _ in range(5)),
                Downsampler(64, 128),
                *(NonBottleneck1D(128, coarse, d) for d in 2 * DILATIONS),
            ]
        )

    def forward(self, x: Tensor, between: nn.Module) -> Tensor:
        """Puts `between` where the stage of 64 channels ends."""
        x = self.initial_block(x)
        for i, layer in enumerate(self.layers):
            x = layer(between(x) if i == COARSE else x)
        return x


class Up(nn.Module):
    """An upsampler and its blocks: (b, inside, h, w) to (b, outside, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, inside: int, outside: int, blocks: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(inside, outside, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(outside, eps=EPS)
        self.blocks = nn.Sequential(*(NonBottleneck1D(outside, 0.0, 1) for _ in range(blocks)))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.blocks(F.relu(self.bn(self.conv(x, output_size=size))))


class ERFNet(nn.Module):
    """The network of `erfnet`: (b, 3, h, w) to (b, num_classes, h, w)."""

    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, dropout: tuple[float, float], extra_blocks: int):
        super().__init__()
        fine, coarse = dropout
        self.encoder = Encoder(dropout)
        self.extra_fine = nn.Sequential(*(NonBottleneck1D(64, fine, 1) for _ in range(extra_blocks)))
        self.extra_coarse = nn.Sequential(
            *(NonBottleneck1D(128, coarse, DILATIONS[i % len(DILATIONS)]) for i in range(extra_blocks))
        )
        self.decoder = nn.ModuleList([Up(128, 64, 2 + extra_blocks), Up(64, 16, 2 + extra_blocks)])
        self.classifier = nn.ConvTranspose2d(16, num_classes, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = self.extra_coarse(self.encoder(x, between=self.extra_fine))
        for up, scale in zip(self.decoder, (4, 2), strict=True):
            x = up(x, (-(-h // scale), -(-w // scale)))
        return self.classifier(x)[..., :h, :w]


@architecture(backbone="encoder")
def erfnet(
    num_classes: int,
    *,
    dropout: tuple[Share, Share] = (0.03, 0.3),
    extra_blocks: Annotated[int, Interval(ge=0, le=16)] = 0,
) -> nn.Module:
    """ERFNet, factorised residual blocks with dilations (Romera et al. 2018, doi:10.1109/TITS.2017.2750080).

    Args:
        dropout: share of the channels that training turns off in the encoder's blocks of 64 and of 128 channels.
        extra_blocks: blocks that each stage, down and up, has more than ERFNet's; DarrenNet has some.
    """
    return ERFNet(num_classes, dropout, extra_blocks)
