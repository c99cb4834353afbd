"""A training sample: an image with its mask, and the geometry that is still to be applied to both.

Geometric augmentations only compose a matrix. Image and mask are then warped once, by the same matrix, so
they cannot come apart; what lies outside the source is void in the mask by construction; and only the
pixels of the final crop are ever computed.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vocseg.data.dataset import VOID
from vocseg.errors import Problem, UsageError

cv2.setNumThreads(0)  # the loader's threads are the parallelism; OpenCV's own would fight torch for the cores

Matrix = NDArray[np.float64]


class Sample:
    """An image and a mask, seen through a pending affine map.

    Args:
        image: (h, w, 3) uint8 RGB.
        mask: (h, w) uint8, class ids or 255.
        fill: the RGB colour of image pixels that lie outside the source.
        draw_partner: rng -> another sample that has been as far as this one; the loader gives it.
    """

    def __init__(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.uint8],
        fill: tuple[int, int, int] = (124, 116, 104),
        draw_partner: "Callable[[np.random.Generator], Sample] | None" = None,
    ):
        self._image = image
        self._mask = mask
        self._matrix: Matrix | None = None  # source pixel -> view pixel, homogeneous 3x3
        self._size = mask.shape[:2]
        self.fill = fill
        self.draw_partner = draw_partner

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view as it stands."""
        return self._size

    def transform(self, matrix: Matrix, size: tuple[int, int] | None = None) -> None:
        """Moves the view: `matrix` (3x3) takes its pixel coordinates (x, y, 1) to the new ones.

        Pixel coordinates have their origin at the upper left corner of the view, so that the centre of the
        first pixel is (0.5, 0.5) and scaling by s is diag(s, s, 1). `size` is the new (height, width).
        """
        self._matrix = matrix if self._matrix is None else matrix @ self._matrix
        self._size = self._size if size is None else size

    def crop(self, y: int, x: int, size: tuple[int, int]) -> None:
        """Moves the view to a window of it, or beyond: its upper left corner, its (height, width)."""
        self.transform(np.array([[1.0, 0.0, -x], [0.0, 1.0, -y], [0.0, 0.0, 1.0]]), size)

    def labels_every(self, step: int) -> NDArray[np.uint8]:
        """The labels at the middle of each cell of `step` by `step` pixels; cells cut off before theirs are left out.

        For looking for a place: it computes no pixel of the image, and the geometry stays pending.
        """
        coarse = np.diag([1 / step, 1 / step, 1.0])
        matrix = coarse if self._matrix is None else coarse @ self._matrix
        height, width = (max(1, (s + (step - 1) // 2) // step) for s in self._size)
        return _warp(self._mask, matrix, (height, width), cv2.INTER_NEAREST, VOID)

    def partner(self, rng: np.random.Generator) -> "Sample":
        """A second sample to mix with this one: a random image of the training split, which may be this one's own.

        It has been through all augmentations before the one that asks, with what they draw from `rng`, and is the
        caller's to change. Reading and augmenting it costs as much as the sample itself did.

        Raises:
            UsageError: this sample was made outside of a loader, without partners.
        """
        if self.draw_partner is None:
            raise UsageError(
                Problem(
                    "augmentation",
                    "it needs a second training sample to mix with, and this one has no partner; the loader provides "
                    "it, elsewhere pass Sample(image, mask, draw_partner=lambda rng: Sample(...))",
                )
            )
        return self.draw_partner(rng)

    @property
    def image(self) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB pixels of the view; applies the pending geometry."""
        self._render()
        return self._image

    @image.setter
    def image(self, pixels: NDArray[np.uint8]) -> None:
        self._render()
        if pixels.shape != self._image.shape or pixels.dtype != np.uint8:
            raise ValueError(f"expected uint8 pixels of shape {self._image.shape}, got {pixels.dtype} {pixels.shape}")
        self._image = pixels

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(h, w) uint8 labels of the view; applies the pending geometry."""
        self._render()
        return self._mask

    @mask.setter
    def mask(self, labels: NDArray[np.uint8]) -> None:
        self._render()
        if labels.shape != self._mask.shape or labels.dtype != np.uint8:
            raise ValueError(f"expected uint8 labels of shape {self._mask.shape}, got {labels.dtype} {labels.shape}")
        self._mask = labels

    def _render(self) -> None:
        if self._matrix is None:
            return
        # Bilinear sampling skips pixels below half size: shrink first by area, which averages them.
        source: NDArray[Any] = self._image
        to_source = np.eye(3)
        scale = float(np.sqrt(abs(np.linalg.det(self._matrix[:2, :2]))))
        if scale < 0.6:
            height, width = source.shape[:2]
            source = cv2.resize(
                source, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
            )
            to_source = np.diag([width / source.shape[1], height / source.shape[0], 1.0])
        self._image = _warp(source, self._matrix @ to_source, self._size, cv2.INTER_LINEAR, self.fill)
        self._mask = _warp(self._mask, self._matrix, self._size, cv2.INTER_NEAREST, VOID)
        self._matrix = None


def _warp(pixels: NDArray[Any], matrix: Matrix, size: tuple[int, int], interpolation: int, outside: Any) -> Any:
    return cv2.warpAffine(
        pixels,
        _centred(matrix),
        size[::-1],
        flags=interpolation,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=outside,
    )


def _centred(matrix: Matrix) -> Matrix:
    """From corner-origin coordinates to OpenCV's, in which the first pixel's centre is (0, 0)."""
    shift = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])
    back = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    return (shift @ matrix @ back)[:2]
