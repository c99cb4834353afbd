"""The transfer FCN: a pretrained classifier without its head, then five transposed convolutions.

Report 001 Table 2, 002 Table 6 and 004 Table 5, after Long, Shelhamer and Darrell 2015, arXiv:1411.4038. What they
leave open or contradict is settled like this:

- "ResNet34 without its last two layers" is all that comes before the global pooling: 512 channels at 1/32.
- The decoder's widths are 512-512-256-128-64-32: 004 lists 512-256 twice, 002 shows two of the five layers.
- 002 captions its table ResNet-101 and begins the decoder with a ResNet34's 512 channels; here with the encoder's.
- The classifier is a 1x1 convolution of stride 1 without padding (001 prints padding 1, 002 3x3, 004 3x3 and stride 2)
  from 32 channels, without a softmax.

Any timm encoder will do whose last map is 1/2, 1/4, ... 1/64 of the image. The decoder has as many layers as the map
must be doubled, with the last of those widths (and 512 before them for a sixth); its first layer takes what channels
the encoder has. A vision transformer with 768 channels at 1/16 gets 768-256-128-64-32.
"""

from itertools import pairwise
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from vocseg import architecture
from vocseg.errors import Problem, UsageError, did_you_mean

WIDTHS = (512, 512, 256, 128, 64, 32)
PROBE = 128


class Up(nn.Module):
    """One decoder layer: (b, channels, h, w) to (b, width, H, W) with H = 2h or 2h - 1, W = 2w or 2w - 1."""

    def __init__(self, channels: int, width: int, norm_order: str):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, width, 3, stride=2, padding=1)
        relu, norm = nn.ReLU(inplace=True), nn.BatchNorm2d(width)
        self.activate = nn.Sequential(*((relu, norm) if norm_order == "relu_bn" else (norm, relu)))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.activate(self.deconv(x, output_size=size))


class TransferFCN(nn.Module):
    def __init__(self, num_classes: int, encoder: nn.Module, channels: int, doublings: int, norm_order: str):
        super().__init__()
        self.stride = 2**doublings  # most encoders round odd sizes up, as forward does, but some round them down
        self.encoder = encoder
        widths = (channels, *WIDTHS[-doublings:])
        self.decoder = nn.ModuleList(Up(a, b, norm_order) for a, b in pairwise(widths))
        self.classifier = nn.Conv2d(widths[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = last_map(self.encoder, x)
        for i, up in enumerate(self.decoder, start=1):
            scale = self.stride // 2**i
            x = up(x, (-(-h // scale), -(-w // scale)))
        return self.classifier(x)


@architecture(backbone="encoder")
def transfer_fcn(
    num_classes: int,
    *,
    encoder: str = "resnet34",
    norm_order: Literal["relu_bn", "bn_relu"] = "relu_bn",
) -> nn.Module:
    """The reports' transfer FCN: a pretrained encoder and five transposed convolutions.

    Args:
        encoder: any of timm's names, with or without the tag of its weights: `resnet34`, `resnet34.tv_in1k`.
        norm_order: whether the decoder's activation (report 001) or its batch norm (report 002) comes first.
    """
    if not timm.is_model(encoder):
        near = did_you_mean(encoder, timm.list_models())
        raise UsageError(Problem("model.encoder", f"timm has no model named '{encoder}'{near}"))
    try:
        body = timm_encoder(encoder)
        with torch.no_grad():  # some take one size only; better told now than at the first image of another size
            _, channels, h, w = last_map(body.eval(), torch.zeros(1, 3, PROBE, PROBE)).shape
        doublings = (PROBE // h).bit_length() - 1
        if h != w or h * 2**doublings != PROBE or not 1 <= doublings <= len(WIDTHS):
            raise ValueError(f"its last map of a {PROBE}x{PROBE} image is {h}x{w}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        message = f"timm's '{encoder}' cannot be the encoder: {reason}; name a network for images of any size"
        raise UsageError(Problem("model.encoder", message)) from error
    return TransferFCN(num_classes, body.train(), channels, doublings, norm_order)


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
