"""From an image to its logits: whole at its own size, at several scales, mirrored, or through windows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vocseg.device import Placement
from vocseg.network import Logits, Normalization, raw_outputs


@dataclass(frozen=True)
class Looks:
    """How often, and in which pieces, each image is looked at.

    Attributes:
        scales: sizes, as factors on the image's own.
        flip: the mirrored image too.
        window: side in pixels of the square windows that a scaled image is seen through; None for all of it at once.
        overlap: share of a window's side that it has in common with the next.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int | None = None
    overlap: float = 0.5


@dataclass(frozen=True)
class Predictor:
    """A network with all that turns an image into a class map.

    Attributes:
        stride: what image sides are padded to a multiple of.
        normalization: on the device.
    """

    network: nn.Module
    placement: Placement
    stride: int
    normalization: Normalization
    looks: Looks = Looks()

    def logits(self, image: NDArray[np.uint8]) -> Tensor:
        """(h, w, 3) uint8 RGB to (1, c, h, w) float32 logits on the device. The network must be in eval mode.

        Where windows overlap, their logits are averaged: they are of one network at one scale, and what they agree
        on stays what the network said. Between scales and mirrored looks logits differ in range; there probabilities
        are averaged, and the logarithm is given.
        """
        with torch.inference_mode():
            pixels = self.placement.lay_out(self.normalization(self.placement.send(torch.tensor(image)[None])))
            count = len(self.looks.scales) * (2 if self.looks.flip else 1)
            if count == 1:
                return next(self._every_look(pixels))
            mean: Tensor | float = 0.0
            for look in self._every_look(pixels):
                mean = mean + look.softmax(1) / count
            assert isinstance(mean, Tensor)
            return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    def look(self, image: NDArray[np.uint8]) -> Logits:
        """The same as `logits`, and where that is a single look in one piece, as the network gives it.

        For what is not in need of full-size logits, such as a class map.
        """
        size = image.shape[0], image.shape[1]
        once = self.looks.scales == (1.0,) and not self.looks.flip
        if not once or (self.looks.window or max(size)) < max(size):
            return Logits(self.logits(image), size, size)
        with torch.inference_mode():
            pixels = self.normalization(self.placement.send(torch.tensor(image)[None]))
            return self._raw(self.placement.lay_out(pixels))

    def _every_look(self, pixels: Tensor) -> Iterator[Tensor]:
        """Logits of the image's own size for each scale, as it is and mirrored."""
        height, width = pixels.shape[-2:]
        for scale in self.looks.scales:
            size = max(1, round(height * scale)), max(1, round(width * scale))
            scaled = pixels if scale == 1 else F.interpolate(pixels, size, mode="bilinear", antialias=True)
            for mirrored in (False, True) if self.looks.flip else (False,):
                found = self._through_windows(scaled.flip(-1) if mirrored else scaled)
                found = found.flip(-1) if mirrored else found
                yield found if scale == 1 else F.interpolate(found, (height, width), mode="bilinear")

    def _through_windows(self, images: Tensor) -> Tensor:
        """Logits of images, one window after the other, so that only one window's activations are in memory."""
        height, width = images.shape[-2:]
        side = self.looks.window or max(height, width)
        tops, lefts = (window_starts(length, side, self.looks.overlap) for length in (height, width))
        if len(tops) == len(lefts) == 1:
            return self._once(images)
        visits = images.new_zeros(1, 1, height, width)
        total: Tensor | None = None
        for top in tops:
            for left in lefts:
                window = (..., slice(top, top + side), slice(left, left + side))
                found = self._once(self.placement.lay_out(images[window]))
                if total is None:
                    total = found.new_zeros(len(found), found.shape[1], height, width)
                total[window] += found
                visits[window] += 1
        assert total is not None
        return total.div_(visits)

    def _once(self, images: Tensor) -> Tensor:
        return self._raw(images).full()

    def _raw(self, images: Tensor) -> Logits:
        with self.placement.autocast():
            return raw_outputs(self.network, images, self.stride)["out"]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side, so that they cover it; the last is pushed back to end where the side does.

    A side that is no longer than the window is seen at once.
    """
    last = max(length - window, 0)
    return [*range(0, last, max(1, round(window * (1 - overlap)))), last]
