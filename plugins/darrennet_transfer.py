"""DarrenNet with a pretrained encoder: a classifier without its head, then the decoder of ERFNet.

Report 004 Figures 8-10 and "Transfer Darrennet", after Romera et al. 2018, doi:10.1109/TITS.2017.2750080. The report
prints results only; what it leaves open is settled like this:

- "resnet34's encoder" is all that comes before the global pooling, 512 channels at 1/32, as in the report's other
  transfer network (Table 5).
- ERFNet's decoder begins at 1/8 with 128 channels. Above it there are as many upsamplers with two blocks each as the
  encoder's last map needs, 256 channels at 1/16 and 128 at 1/8 for a ResNet: 512-256-128-64-16 and the classes.
- DarrenNet's "additional convolution layers" and "higher dropout" go into the decoder, the only part that the report's
  authors built: one block more a stage, and dropout in its blocks. ERFNet's own decoder has neither: `dropout = 0.0`,
  `extra_blocks = 0`.
- No skips: ERFNet has none.

Any timm encoder will do whose last map is 1/2, 1/4, ... 1/64 of the image.
"""

from itertools import pairwise
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from vocseg import architecture
from vocseg.errors import Problem, UsageError, did_you_mean

WIDTHS = (512, 256, 128, 64, 16)  # of the maps at 1/32, 1/16, 1/8, 1/4 and 1/2
PROBE = 128
EPS = 1e-3  # of the batch norms


class NonBottleneck1D(nn.Module):
    """A residual block of two factorised 3x3 convolutions: (b, c, h, w) to the same."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.conv3x1_1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn1 = nn.BatchNorm2d(channels, eps=EPS)
        self.conv3x1_2 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.conv1x3_2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1))
        self.bn2 = nn.BatchNorm2d(channels, eps=EPS)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1x3_1(F.relu(self.conv3x1_1(x)))))
        y = self.bn2(self.conv1x3_2(F.relu(self.conv3x1_2(y))))
        return F.relu(self.dropout(y) + x)


class Up(nn.Module):
    """An upsampler and its blocks: (b, inside, h, w) to (b, outside, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, inside: int, outside: int, blocks: int, dropout: float):
        super().__init__()
        self.conv = nn.ConvTranspose2d(inside, outside, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(outside, eps=EPS)
        self.blocks = nn.Sequential(*(NonBottleneck1D(outside, dropout) for _ in range(blocks)))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.blocks(F.relu(self.bn(self.conv(x, output_size=size))))


class DarrenNetTransfer(nn.Module):
    """The network of `darrennet_transfer`: (b, 3, h, w) to (b, num_classes, h, w), sides multiples of `stride`."""

    def __init__(
        self, num_classes: int, encoder: nn.Module, channels: int, doublings: int, dropout: float, extra_blocks: int
    ):
        super().__init__()
        self.stride = 2**doublings  # most encoders round odd sizes up, as forward does, but some round them down
        self.encoder = encoder
        widths = (channels, *WIDTHS[len(WIDTHS) - doublings + 1 :])
        self.decoder = nn.ModuleList(Up(a, b, 2 + extra_blocks, dropout) for a, b in pairwise(widths))
        self.classifier = nn.ConvTranspose2d(widths[-1], num_classes, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = last_map(self.encoder, x)
        for i, up in enumerate(self.decoder, start=1):
            scale = self.stride // 2**i
            x = up(x, (-(-h // scale), -(-w // scale)))
        return self.classifier(x)[..., :h, :w]


@architecture(backbone="encoder")
def darrennet_transfer(
    num_classes: int,
    *,
    encoder: str = "resnet34",
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.3,
    extra_blocks: Annotated[int, Interval(ge=0, le=16)] = 1,
) -> nn.Module:
    """DarrenNet with a pretrained encoder: a timm network and ERFNet's decoder (report 004).

    Args:
        encoder: any of timm's names, with or without the tag of its weights: `resnet34`, `resnet34.tv_in1k`.
        dropout: share of the channels that training turns off in the decoder's blocks; ERFNet has 0 there.
        extra_blocks: blocks that each stage of the decoder has more than ERFNet's two.
    """
    if not timm.is_model(encoder):
        near = did_you_mean(encoder, timm.list_models())
        raise UsageError(Problem("model.encoder", f"timm has no model named '{encoder}'{near}"))
    try:
        body = timm_encoder(encoder)
        with torch.no_grad():  # some take one size only; better told now than at the first image of another size
            _, channels, h, w = last_map(body.eval(), torch.zeros(1, 3, PROBE, PROBE)).shape
        doublings = (PROBE // h).bit_length() - 1
        if h != w or h * 2**doublings != PROBE or not 1 <= doublings <= len(WIDTHS) + 1:
            raise ValueError(f"its last map of a {PROBE}x{PROBE} image is {h}x{w}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        message = f"timm's '{encoder}' cannot be the encoder: {reason}; name a network for images of any size"
        raise UsageError(Problem("model.encoder", message)) from error
    return DarrenNetTransfer(num_classes, body.train(), channels, doublings, dropout, extra_blocks)


def timm_encoder(name: str) -> Any:
    """timm's extractor of the last map, without its classifier; nothing is downloaded."""
    options: dict[str, Any] = {"features_only": True, "out_indices": (-1,), "pretrained": False}
    try:
        return timm.create_model(name, **options, dynamic_img_size=True)  # else vision transformers take one size
    except TypeError:  # the other networks do not know the word
        return timm.create_model(name, **options)


def last_map(encoder: nn.Module, x: Tensor) -> Tensor:
    """(b, 3, h, w) to (b, c, h / stride, w / stride), whichever way round the encoder lays out its maps."""
    x = encoder(x)[-1]
    return x.permute(0, 3, 1, 2) if getattr(encoder, "output_fmt", "NCHW") == "NHWC" else x
