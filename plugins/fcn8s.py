"""FCN-8s: VGG16 as a fully convolutional network, whose scores at 1/32, 1/16 and 1/8 are fused and upsampled.

Report 003 §3.1 and its Table 1, column D, after Long, Shelhamer and Darrell 2015, arXiv:1411.4038, and Simonyan and
Zisserman 2015, arXiv:1409.1556. What the report leaves open is settled by the paper's own code ("FCN-8s at once"):

- The first convolution is padded by 100. Maps are cropped to the places that lie where the other map's do (`CROPS`).
  The report takes the middle of the last one, which for most sizes is up to 15 pixels beside that.
- Poolings round odd sizes up, as Caffe's do and torchvision's VGG16 does not.
- The "small scaling factors" of the skips are 0.01 on pool4 and 0.0001 on pool3, before their scores.
- The transposed convolutions have no bias and begin as bilinear interpolation. Here all three are learned; the paper
  learns the first two and its code none. No initializer of a recipe fills them.
- Dropout turns off single values, after fc6 and fc7.
- The score layers begin as the recipe's initializer has it; Caffe's begin at zero.

The encoder is VGG16 with its two hidden fully connected layers, for weights, freezing and learning rate.
Any size comes back in full: the padding makes room for the 7x7 layer and for all crops.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from vocseg import architecture

PADDING = 100
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
HIDDEN = 4096

# Place i of a map lies at step * i + offset of the image, in pixels:
#     first convolution  i - 99        pool3  8i - 95.5     pool4  16i - 91.5     pool5, fc6, fc7  32i + 12.5
# and upsampling by f (kernel 2f) puts what lay at step * i + offset to (step / f) * (j - f + 0.5) + offset:
#     fc7, doubled  16j - 11.5         fused with pool4, doubled  8j - 23.5        fused with pool3, 8 times  j - 31
# so that place j of one is place j + 5 of pool4, j + 9 of pool3, and the image's pixel j - 31.
CROPS = (5, 9, 31)

PRETRAINED = {
    "architecture": "vgg16",
    "tag": "tv_in1k",
    "hf_hub_id": "timm/vgg16.tv_in1k",
    "url": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
# What a classifier's layers are called in torchvision's and timm's files, and here.
CONVOLVED = {"classifier.0": "fc6", "classifier.3": "fc7", "pre_logits.fc1": "fc6", "pre_logits.fc2": "fc7"}
DROPPED = ("classifier.6", "head.fc")


class VGG16(nn.Module):
    """(b, 3, h, w) to pool3, pool4 and fc7, whose channels are the last three of `channels`."""

    def __init__(self, dropout: float, widths: tuple[int, ...] = WIDTHS, hidden: int = HIDDEN):
        super().__init__()
        self.pretrained_cfg = PRETRAINED
        self.channels = (widths[2], widths[3], hidden)
        layers: list[nn.Module] = []
        inside = 3
        for width, depth in zip(widths, DEPTHS, strict=True):
            for _ in range(depth):
                conv = nn.Conv2d(inside, width, 3, padding=1 if layers else PADDING)
                layers += [conv, nn.ReLU(inplace=True)]
                inside = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)  # numbered as torchvision's
        self.fc6 = nn.Conv2d(inside, hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pools = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        _, _, pool3, pool4, pool5 = pools
        x = self.dropout(F.relu(self.fc6(pool5)))
        x = self.dropout(F.relu(self.fc7(x)))
        return pool3, pool4, x

    def adapt_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file of a VGG16 classifier, torchvision's or timm's, as this network's: its linear layers convolve."""
        adapted = {}
        for key, tensor in tensors.items():
            layer, _, leaf = key.rpartition(".")
            if layer.endswith(DROPPED):
                continue
            for theirs, ours in CONVOLVED.items():
                if layer.endswith(theirs):
                    key = f"{layer.removesuffix(theirs)}{ours}.{leaf}"
                    mine = self.get_submodule(ours).get_parameter(leaf)
                    # Another network's tensor stays as it is, for the loader to name.
                    tensor = tensor.reshape(mine.shape) if tensor.numel() == mine.numel() else tensor
            adapted[key] = tensor
        return adapted


class Upsample(nn.Module):
    """A transposed convolution that begins as bilinear interpolation: (b, c, h, w) to (b, c, f(h + 1), f(w + 1)).

    Not an nn.ConvTranspose2d, whose weights an initializer would fill.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        ramp = 1 - (torch.arange(2 * factor) - factor + 0.5).abs() / factor
        self.weight = nn.Parameter(torch.eye(channels)[:, :, None, None] * ramp[:, None] * ramp)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, stride=self.factor)


class FCN8s(nn.Module):
    """The network of `fcn8s`: (b, 3, h, w) to (b, num_classes, h, w)."""

    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, encoder: VGG16):
        super().__init__()
        self.encoder = encoder
        pool3, pool4, fc7 = encoder.channels
        self.score_fc7 = nn.Conv2d(fc7, num_classes, 1)
        self.score_pool4 = nn.Conv2d(pool4, num_classes, 1)
        self.score_pool3 = nn.Conv2d(pool3, num_classes, 1)
        self.upsample_fc7 = Upsample(num_classes, 2)
        self.upsample_pool4 = Upsample(num_classes, 2)
        self.upsample_pool3 = Upsample(num_classes, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        pool3, pool4, fc7 = self.encoder(x)
        to_pool4, to_pool3, to_image = CROPS
        x = self.upsample_fc7(self.score_fc7(fc7))
        x = self.upsample_pool4(x + cropped(self.score_pool4(0.01 * pool4), to_pool4, *x.shape[-2:]))
        x = self.upsample_pool3(x + cropped(self.score_pool3(0.0001 * pool3), to_pool3, *x.shape[-2:]))
        return cropped(x, to_image, h, w)


def cropped(x: Tensor, offset: int, h: int, w: int) -> Tensor:
    return x[..., offset : offset + h, offset : offset + w]


@architecture(backbone="encoder")
def fcn8s(num_classes: int, *, dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.5) -> nn.Module:
    """FCN-8s on VGG16, with skips from pool3 and pool4 (Long et al. 2015, arXiv:1411.4038).

    Args:
        dropout: share of the values after fc6 and fc7 that training turns off.
    """
    return FCN8s(num_classes, VGG16(dropout))
