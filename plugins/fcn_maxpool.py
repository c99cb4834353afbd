"""The max-pool FCN: two poolings of stride 1, dropout after every layer, and maps of half the image's size throughout.

Report 002 §3.3 (5a) and Table 2, after Long, Shelhamer and Darrell 2015, arXiv:1411.4038. What the report leaves open
or contradicts is settled like this:

- The table lists "Conv2 32→64" twice, the second time after 64 channels; it is one layer.
- Every layer but the last has a batch norm, before the activation: the table does not list it, but the network is the
  baseline with what §3.3 changes.
- The last transposed convolution has no activation, as in the table, and so no batch norm. It has its dropout ("at
  every single layer"), which turns off single values, and the baseline's 1x1 classifier follows it.
- The poolings' padding of 1 is the table's: each makes the map one place larger than it was. The logits lose that
  border of one place before bilinear interpolation to the image's size, so that they lie where their pixels are.

Its authors' GPU ran out of memory. One training step on 8 images of 224x224 with Adam, on a CPU with channels_last,
peaks at this much resident memory, of which Python and the libraries are 0.55 GiB:

    checkpoint      bf16        fp32
    false           2.5 GiB     4.0 GiB
    true            1.5 GiB     2.3 GiB

In eval mode, one image of 500x375 adds 0.2 GiB in bf16 and 0.3 GiB in fp32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vocseg import architecture

ENCODER = (3, 32, 64, 128, 256, 512)
DECODER = (512, 512, 256, 128, 64, 32)


@contextmanager
def buffers_kept(layer: nn.Module) -> Iterator[None]:
    """Puts a layer's buffers back, so that its batch norm does not count a batch twice that is computed twice."""
    before = [buffer.clone() for buffer in layer.buffers()]
    try:
        yield
    finally:  # recomputing ends with an exception once it has all that was asked for
        for buffer, value in zip(layer.buffers(), before, strict=True):
            buffer.copy_(value)


def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, of which only x is kept for the backward pass, which computes the rest again with equal dropout."""

    if torch.compiler.is_compiling():  # torch.compile takes no contexts, and lets a buffer change once in any case
        return checkpoint(layer, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), buffers_kept(layer)

    return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


class MaxPoolFCN(nn.Module):
    stride = 1  # nothing to pad: any size fits

    def __init__(self, num_classes: int, dropout: float, negative_slope: float, saving: bool):
        super().__init__()
        self.saving = saving

        def layer(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
            norm, relu = nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU(negative_slope, inplace=True)
            return nn.Sequential(conv, norm, relu, nn.Dropout(dropout))

        strides = (2, 1, 1, 1, 1)
        encoder = [layer(nn.Conv2d(a, b, 3, s, 1)) for (a, b), s in zip(pairwise(ENCODER), strides, strict=True)]
        for down in encoder[:2]:
            down.append(nn.MaxPool2d(2, stride=1, padding=1))
        self.encoder = nn.Sequential(*encoder)
        *decoder, last = (nn.ConvTranspose2d(a, b, 3, stride=1, padding=1) for a, b in pairwise(DECODER))
        self.decoder = nn.Sequential(*map(layer, decoder), nn.Sequential(last, nn.Dropout(dropout)))
        self.classifier = nn.Conv2d(DECODER[-1], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        saving = self.saving and self.training and torch.is_grad_enabled()
        for layer in (*self.encoder, *self.decoder):
            x = recomputed(layer, x) if saving else layer(x)
        logits = self.classifier(x)[..., 1:-1, 1:-1]
        return F.interpolate(logits, size, mode="bilinear")


@architecture
def fcn_maxpool(
    num_classes: int,
    *,
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.3,
    negative_slope: Annotated[float, Interval(ge=0, lt=1)] = 0.01,
    checkpoint: bool = False,
) -> nn.Module:
    """An FCN at half the image's size, with max-pooling and dropout everywhere (report 002, Table 2).

    Args:
        dropout: share of each layer's values that training turns off.
        negative_slope: of the LeakyReLU, for inputs below zero.
        checkpoint: whether training keeps only what each layer was given and computes the rest again in the backward
            pass: a third more work, with the same gradients.
    """
    return MaxPoolFCN(num_classes, dropout, negative_slope, checkpoint)
