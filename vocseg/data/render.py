"""The pixels of a batch of views, computed on the device: what samples leave undone with `data.augment_on = "device"`.

Each sample comes as the source pixels that its view shows, the map from the one to the other, and what is to be done to
its colours. The images of the whole batch are then sampled bilinearly at once, as OpenCV does it for one on the CPU.
What costs little stays with the CPU, random numbers and labels, and so do images that shrink to less than 0.6 of their
size or that an augmentation has looked at.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vocseg.data.opencv import cv2
from vocseg.data.sample import Unrendered


class Views(NamedTuple):
    """A batch that is still to be rendered.

    Attributes:
        sources: (b, h', w', 3) uint8 RGB, each with a rim of the colour that lies outside.
        labels: (b, h, w) uint8, of the views.
        maps: (b, 2, 3) float32, from (x, y, 1) in pixels of the view to x and y of -1…1 across the source.
        colours: (b, 2, 3, 3) float32: a matrix for each pixel's colour and one for the mean colour of its view, whose
            products are added; (0, 2, 3, 3) where colours stay as they are.
    """

    sources: Tensor
    labels: Tensor
    maps: Tensor
    colours: Tensor

    def render(self) -> tuple[Tensor, Tensor]:
        """Images (b, h, w, 3) uint8 and labels (b, h, w) uint8, on the tensors' device, which is not waited for."""
        height, width = self.labels.shape[1:]
        x = torch.arange(width, device=self.maps.device) + 0.5
        y = torch.arange(height, device=self.maps.device)[:, None] + 0.5
        # Not by affine_grid: a matrix product in TF32, should someone have allowed it, misses by half a pixel.
        a, b, c = self.maps[..., None, None].unbind(2)
        grid = (a * x + b * y + c).permute(0, 2, 3, 1)
        sources = self.sources.permute(0, 3, 1, 2).float()
        # Whatever lies outside takes the colour of the rim.
        images = F.grid_sample(sources, grid, mode="bilinear", padding_mode="border", align_corners=False).round()
        if len(self.colours):
            own, mean = self.colours.unbind(1)
            constant = torch.einsum("bij,bj->bi", mean, images.mean((2, 3)))
            images = torch.einsum("bij,bjhw->bihw", own, images) + constant[..., None, None]
            images = images.round().clamp(0, 255)
        return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous(), self.labels


def stack_views(samples: Sequence[Unrendered], fill: tuple[int, int, int], pin: bool = False) -> Views:
    """A batch of samples whose views are of one size.

    Args:
        fill: the RGB colour outside the sources.
        pin: put it into pinned memory.
    """
    height, width = (2 + max(sample.pixels.shape[axis] for sample in samples) for axis in (0, 1))
    sources = torch.empty(len(samples), height, width, 3, dtype=torch.uint8, pin_memory=pin)
    labels = torch.empty(len(samples), *samples[0].labels.shape, dtype=torch.uint8, pin_memory=pin)
    maps = np.empty((len(samples), 2, 3))
    across = np.array([[2 / width, 0, 2 / width - 1], [0, 2 / height, 2 / height - 1]])  # the rim is one pixel wide
    for i, sample in enumerate(samples):
        right, below = width - 1 - sample.pixels.shape[1], height - 1 - sample.pixels.shape[0]
        cv2.copyMakeBorder(sample.pixels, 1, below, 1, right, cv2.BORDER_CONSTANT, sources[i].numpy(), fill)
        labels[i].numpy()[:] = sample.labels
        maps[i] = across @ np.linalg.inv(sample.matrix)
    colours = np.zeros((0, 2, 3, 3))
    if any(sample.colours is not None for sample in samples):
        same = np.stack([np.eye(3), np.zeros((3, 3))])
        colours = np.stack([same if sample.colours is None else sample.colours for sample in samples])
    small = (torch.from_numpy(array).float() for array in (maps, colours))
    return Views(sources, labels, *(tensor.pin_memory() if pin else tensor for tensor in small))
