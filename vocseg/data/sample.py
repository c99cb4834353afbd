"""A training sample: an image with its mask, and the geometry that is still to be applied to both.

Geometric augmentations only compose a matrix. Image and mask are then warped once, by the same matrix, so
they cannot come apart; what lies outside the source is void in the mask by construction; and only the
pixels of the final crop are ever computed.
"""

from collections.abc import Callable
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vocseg.data.dataset import VOID
from vocseg.data.opencv import cv2
from vocseg.errors import Problem, UsageError

Matrix = NDArray[np.float64]

_SHRINKING = 0.6


class Unrendered(NamedTuple):
    """A view whose image is still to be computed.

    Attributes:
        pixels: (h', w', 3) uint8 RGB of the source, as far as the view can show it.
        matrix: from their coordinates to those of the view.
        colours: (2, 3, 3), what `Sample.recolour` was given; None where colours stay as they are.
        labels: (h, w) uint8, of the view.
    """

    pixels: NDArray[np.uint8]
    matrix: Matrix
    colours: NDArray[np.float64] | None
    labels: NDArray[np.uint8]


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
        self._colours: NDArray[np.float64] | None = None  # pending too, and to be done after the geometry
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
        if self._colours is not None:
            self._render()
        self._matrix = matrix if self._matrix is None else matrix @ self._matrix
        self._size = self._size if size is None else size

    def crop(self, y: int, x: int, size: tuple[int, int]) -> None:
        """Moves the view to a window of it, or beyond: its upper left corner, its (height, width)."""
        self.transform(np.array([[1.0, 0.0, -x], [0.0, 1.0, -y], [0.0, 0.0, 1.0]]), size)

    def recolour(self, own: Matrix, mean: Matrix) -> None:
        """Changes the colours of the view: each becomes own @ itself + mean @ the view's mean colour (both 3x3)."""
        if self._colours is not None:
            self._render()
        self._colours = np.stack([own, mean])

    def labels_every(self, step: int) -> NDArray[np.uint8]:
        """The labels at the middle of each cell of `step` by `step` pixels; cells cut off before theirs are left out.

        For looking for a place: it computes no pixel of the image, and the geometry stays pending.
        """
        coarse = np.diag([1 / step, 1 / step, 1.0])
        matrix = coarse if self._matrix is None else coarse @ self._matrix
        height, width = (max(1, (s + (step - 1) // 2) // step) for s in self._size)
        return _warp_labels(self._mask, matrix, (height, width))

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

    def unrendered(self) -> Unrendered:
        """The view with its image left to be computed elsewhere, unless it shrinks: then it is averaged here."""
        if self._matrix is None:
            return Unrendered(self._image, np.eye(3), self._colours, self._mask)
        pixels, matrix = self._image, self._matrix
        top, bottom, left, right = _shown(matrix, self._size, pixels.shape[:2])
        if top >= bottom or left >= right or _scale(matrix) < _SHRINKING:
            pixels, matrix = _warp_image(pixels, matrix, self._size, self.fill), np.eye(3)
        else:
            pixels = pixels[top:bottom, left:right]
            matrix = matrix @ np.array([[1.0, 0.0, left], [0.0, 1.0, top], [0.0, 0.0, 1.0]])
        return Unrendered(pixels, matrix, self._colours, _warp_labels(self._mask, self._matrix, self._size))

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
        if self._matrix is not None:
            self._image = _warp_image(self._image, self._matrix, self._size, self.fill)
            self._mask = _warp_labels(self._mask, self._matrix, self._size)
            self._matrix = None
        if self._colours is not None:
            own, mean = self._colours
            matrix = np.column_stack([own, mean @ cv2.mean(self._image)[:3]])
            self._image = cv2.transform(self._image, matrix).astype(np.uint8, copy=False)
            self._colours = None


def _warp_image(
    pixels: NDArray[np.uint8], matrix: Matrix, size: tuple[int, int], fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    # Bilinear sampling skips pixels below half size: shrink first by area, which averages them.
    scale = _scale(matrix)
    if scale < _SHRINKING:
        height, width = pixels.shape[:2]
        smaller = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        matrix = matrix @ np.diag([width / smaller[0], height / smaller[1], 1.0])
    if _by_whole_pixels(matrix):
        return _move(pixels, matrix, size, fill)
    top, bottom, left, right = _shown(matrix, size, pixels.shape[:2])
    if top >= bottom or left >= right:
        return np.full((*size, 3), fill, np.uint8)
    # OpenCV warps four channels in half the time of three, and converts what is shown in next to none.
    four = cv2.cvtColor(pixels[top:bottom, left:right], cv2.COLOR_RGB2RGBA)
    matrix = matrix @ np.array([[1.0, 0.0, left], [0.0, 1.0, top], [0.0, 0.0, 1.0]])
    warped = _warp(four, matrix, size, cv2.INTER_LINEAR, (*fill, 0))
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB).astype(np.uint8, copy=False)


def _scale(matrix: Matrix) -> float:
    """By how much a matrix enlarges, in the mean of all directions."""
    (a, b, _), (c, d, _) = matrix[:2].tolist()
    return abs(a * d - b * c) ** 0.5


def _warp_labels(labels: NDArray[np.uint8], matrix: Matrix, size: tuple[int, int]) -> NDArray[np.uint8]:
    if matrix[0, 1] or matrix[1, 0]:
        return _warp(labels, matrix, size, cv2.INTER_NEAREST, VOID)
    rows, above, below = _pick(matrix[1, 1], matrix[1, 2], size[0], labels.shape[0])
    columns, before, after = _pick(matrix[0, 0], matrix[0, 2], size[1], labels.shape[1])
    if not rows.size or not columns.size:
        return np.full(size, VOID, np.uint8)
    # numpy copies whole rows many times faster than it picks single labels: columns are picked as rows, too.
    first = rows.min()
    columns_picked = cv2.transpose(cv2.transpose(labels[first : rows.max() + 1])[columns])
    picked = columns_picked[rows - first].astype(np.uint8, copy=False)
    return _frame(picked, (above, below, before, after), VOID) if picked.shape != size else picked


def _by_whole_pixels(matrix: Matrix) -> bool:
    """Whether pixels are only moved and mirrored, but for what rounding left of a scale that was undone."""
    (a, b, x), (c, d, y) = matrix[:2].tolist()
    return b == 0 == c and max(abs(abs(a) - 1), abs(abs(d) - 1)) < 1e-9 and abs(x - round(x)) + abs(y - round(y)) < 1e-6


def _move(
    pixels: NDArray[np.uint8], matrix: Matrix, size: tuple[int, int], fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """What a matrix by whole pixels shows."""
    rows, above, below = _pick(matrix[1, 1], matrix[1, 2], size[0], pixels.shape[0])
    columns, before, after = _pick(matrix[0, 0], matrix[0, 2], size[1], pixels.shape[1])
    if not rows.size or not columns.size:
        return np.full((*size, 3), fill, np.uint8)
    shown: NDArray[Any] = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    mirrored = (matrix[0, 0] < 0, matrix[1, 1] < 0)
    if any(mirrored):
        shown = cv2.flip(shown, {(True, False): 1, (False, True): 0, (True, True): -1}[mirrored])
    return _frame(shown, (above, below, before, after), fill)


def _pick(factor: float, shift: float, length: int, extent: int) -> tuple[NDArray[np.intp], int, int]:
    """Along one axis the source pixel under the middle of each of the view's, and how many at both ends lie outside."""
    source = np.rint((np.arange(0.5, length) - shift) / factor - 0.5).astype(np.intp)
    if 0 <= source[0] < extent and 0 <= source[-1] < extent:
        return source, 0, 0
    (inside,) = np.nonzero((source >= 0) & (source < extent))
    if not inside.size:
        return source[:0], length, 0
    first, end = int(inside[0]), int(inside[-1]) + 1
    return source[first:end], first, length - end


def _frame(pixels: NDArray[Any], sides: tuple[int, int, int, int], outside: Any) -> NDArray[np.uint8]:
    """A copy with so many pixels more above, below, to the left and to the right."""
    return cv2.copyMakeBorder(pixels, *sides, cv2.BORDER_CONSTANT, value=outside).astype(np.uint8, copy=False)


def _shown(matrix: Matrix, size: tuple[int, int], extent: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of the source that the view can show: top, bottom, left, right, with what sampling needs around it."""
    (a, b, x), (c, d, y) = matrix[:2].tolist()
    det = a * d - b * c
    corners = [(u - x, v - y) for u in (0, size[1]) for v in (0, size[0])]
    across = [(d * u - b * v) / det for u, v in corners]
    down = [(a * v - c * u) / det for u, v in corners]
    return (
        max(0, floor(min(down)) - 2),
        min(extent[0], ceil(max(down)) + 2),
        max(0, floor(min(across)) - 2),
        min(extent[1], ceil(max(across)) + 2),
    )


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
