"""Augmentations: what happens to a training image and its mask on the way to a batch.

Each is f(sample, rng), which changes a `vocseg.data.sample.Sample` in place and draws from `rng` alone. Those that move
pixels only compose the sample's geometry, so that image and mask go together, the mask is void wherever the image is
invented, and pixels are computed once, for the last view. Two things follow. Colour and blur compute the pixels of the
view they find, so they belong after the crop. And a step after a crop that looks past its edge, a rotation say, finds
the image's own pixels there as long as none of those has come between.

Not here: augmentations that take a second sample (`mixing.py`).
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
from annotated_types import Interval

from vocseg import augmentation
from vocseg.data.dataset import VOID
from vocseg.data.opencv import cv2
from vocseg.data.sample import Matrix, Sample
from vocseg.errors import Problem, UsageError

Augment = Callable[[Sample, np.random.Generator], None]
Probability = Annotated[float, Interval(ge=0, le=1)]
Side = Annotated[int, Interval(ge=1, le=8192)]
Factor = Annotated[float, Interval(gt=0, le=16)]
Deviation = Annotated[float, Interval(gt=0, le=64)]

_CROP_TRIES = 10
_CROP_FOREGROUND = 0.05


@augmentation
def random_scale(
    *, scale: tuple[Factor, Factor] = (0.5, 2.0), aspect: Annotated[float, Interval(ge=1, le=4)] = 1.0
) -> Augment:
    """Enlarges or shrinks the image by a random factor (report 003 scaled by 0.5 to 1.3).

    Args:
        scale: least and largest factor; drawn uniformly, as is usual.
        aspect: width over height changes by up to this factor either way, at the same area.

    Raises:
        UsageError: the range is upside down.
    """
    low, high = ordered("random_scale.scale", scale)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        factor = rng.uniform(low, high)
        stretch = aspect ** (rng.uniform(-1, 1) / 2)
        height, width = sample.size
        _resize(sample, max(1, round(height * factor / stretch)), max(1, round(width * factor * stretch)))

    return augment


@augmentation
def resize(*, size: Side | tuple[Side, Side]) -> Augment:
    """Resizes the image to one fixed size, whatever its shape.

    Args:
        size: side of a square, or [height, width].
    """
    height, width = _pair(size)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        _resize(sample, height, width)

    return augment


@augmentation
def crop(*, size: Side | tuple[Side, Side], foreground: Probability = 0.0) -> Augment:
    """Cuts out a window at a random position (report 002 took 224).

    Where the image is the smaller of the two it lies at a random position in the window, with void around it.

    Args:
        size: side of a square, or [height, width].
        foreground: how often the window is sought, in ten tries, so that 5 % of it is some class other than the
            background; where no try has that much, the one with the most is taken.
    """
    window = _pair(size)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if foreground and rng.random() < foreground:
            y, x = _foreground_corner(sample, window, rng)
        else:
            y, x = _corner(sample.size, window, rng)
        sample.crop(y, x, window)

    return augment


@augmentation
def class_balanced_crop(*, size: Side | tuple[Side, Side], p: Probability = 1.0) -> Augment:
    """Cuts out a window that holds a class drawn at random, so that small ones are seen as often as large ones.

    A class is drawn from those that the image holds, the background among them, then a pixel of it, then one of the
    windows `crop` could have cut out that hold this pixel. What is narrower than a fortieth of the window may be
    overlooked.

    Args:
        size: side of a square, or [height, width].
        p: how often; otherwise the window is that of `crop`.
    """
    window = _pair(size)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if p and rng.random() < p:
            y, x = _class_corner(sample, window, rng)
        else:
            y, x = _corner(sample.size, window, rng)
        sample.crop(y, x, window)

    return augment


@augmentation
def pad(*, size: Side | tuple[Side, Side]) -> Augment:
    """Adds void to the right and below until the image is at least this large.

    Args:
        size: side of a square, or [height, width].
    """
    least = _pair(size)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        height, width = sample.size
        sample.transform(np.eye(3), (max(height, least[0]), max(width, least[1])))

    return augment


@augmentation
def horizontal_flip(*, p: Probability = 0.5) -> Augment:
    """Mirrors left and right (all four reports)."""

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() < p:
            sample.transform(_about_centre(sample, np.diag([-1.0, 1.0, 1.0])))

    return augment


@augmentation
def vertical_flip(*, p: Probability = 0.5) -> Augment:
    """Mirrors top and bottom (report 004)."""

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() < p:
            sample.transform(_about_centre(sample, np.diag([1.0, -1.0, 1.0])))

    return augment


@augmentation
def rotation(*, degrees: Annotated[float, Interval(ge=0, le=180)] = 10.0, p: Probability = 1.0) -> Augment:
    """Turns the image about its centre; the corners that come in are void (report 002 took 180 degrees).

    Args:
        degrees: largest angle either way.
    """

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() < p:
            sample.transform(_about_centre(sample, _turn(rng.uniform(-degrees, degrees))))

    return augment


@augmentation
def affine(
    *,
    degrees: Annotated[float, Interval(ge=0, le=180)] = 10.0,
    translate: Annotated[float, Interval(ge=0, le=1)] = 0.1,
    scale: tuple[Factor, Factor] = (0.9, 1.1),
    shear: Annotated[float, Interval(ge=0, lt=90)] = 5.0,
    p: Probability = 1.0,
) -> Augment:
    """Shears, scales, turns and moves the image about its centre at one size (report 004).

    Args:
        degrees: largest angle of the turn either way.
        translate: largest shift either way, as a share of height and width.
        scale: least and largest factor.
        shear: largest angle, in degrees, by which upright lines lean either way.

    Raises:
        UsageError: the range of `scale` is upside down.
    """
    low, high = ordered("affine.scale", scale)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() >= p:
            return
        height, width = sample.size
        factor = rng.uniform(low, high)
        lean = np.array([[1.0, np.tan(np.deg2rad(rng.uniform(-shear, shear))), 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        linear = _turn(rng.uniform(-degrees, degrees)) @ np.diag([factor, factor, 1.0]) @ lean
        move = _shift(rng.uniform(-translate, translate) * width, rng.uniform(-translate, translate) * height)
        sample.transform(move @ _about_centre(sample, linear))

    return augment


@augmentation
def color_jitter(
    *,
    brightness: Annotated[float, Interval(ge=0, le=1)] = 0.3,
    contrast: Annotated[float, Interval(ge=0, le=1)] = 0.3,
    saturation: Annotated[float, Interval(ge=0, le=1)] = 0.3,
    hue: Annotated[float, Interval(ge=0, le=0.5)] = 0.02,
    p: Probability = 1.0,
) -> Augment:
    """Changes brightness, contrast, saturation and hue at random.

    The four are applied in this order as one colour matrix, so that values are clipped once. Hue turns the plane of
    colours of YIQ, which leaves the luma as it is, rather than the H of HSV.

    Args:
        brightness: the factor on brightness is drawn from 1 - brightness to 1 + brightness; so for the next two.
        contrast: the factor on the distance from the image's mean grey.
        saturation: the factor on the distance from each pixel's own grey.
        hue: largest turn either way, as a share of the colour circle.
    """

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() >= p:
            return
        bright, steep, vivid = (1 + rng.uniform(-x, x) for x in (brightness, contrast, saturation))
        turn = 2 * np.pi * rng.uniform(-hue, hue)
        chroma = vivid * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        colours = _RGB_FROM_YIQ[:, :1] @ _YIQ_FROM_RGB[:1] + _RGB_FROM_YIQ[:, 1:] @ chroma @ _YIQ_FROM_RGB[1:]
        # Greys stay grey under saturation and hue, so contrast's share of the mean grey is the same in each channel.
        grey = np.tile(_YIQ_FROM_RGB[:1], (3, 1))
        sample.recolour(bright * steep * colours, (1 - steep) * bright * grey)

    return augment


@augmentation
def blur(*, sigma: tuple[Deviation, Deviation] = (0.1, 2.0), p: Probability = 0.5) -> Augment:
    """Blurs the image with a Gaussian of random width.

    Args:
        sigma: least and largest deviation, in pixels.

    Raises:
        UsageError: the range is upside down.
    """
    low, high = ordered("blur.sigma", sigma)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() < p:
            blurred = cv2.GaussianBlur(sample.image, (0, 0), rng.uniform(low, high))
            sample.image = blurred.astype(np.uint8, copy=False)

    return augment


_YIQ_FROM_RGB = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB_FROM_YIQ = np.linalg.inv(_YIQ_FROM_RGB)


def _resize(sample: Sample, height: int, width: int) -> None:
    # Not by the factor asked for but by that of the rounded sizes: the image then fills the view to its last pixel.
    sample.transform(np.diag([width / sample.size[1], height / sample.size[0], 1.0]), (height, width))


def _corner(size: tuple[int, int], window: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Upper left corner (y, x) of a random window: within the image, or around it where the image is smaller."""
    y, x = (int(rng.integers(min(0, s - w), max(0, s - w), endpoint=True)) for s, w in zip(size, window, strict=True))
    return y, x


def _foreground_corner(sample: Sample, window: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Upper left corner (y, x) of a window that holds foreground, if there is one to be found."""
    step = max(1, min(window) // 32)
    labels = sample.labels_every(step)
    foreground = (labels > 0) & (labels != VOID)
    cells = (window[0] // step) * (window[1] // step)
    best, most = (0, 0), -1
    for _ in range(_CROP_TRIES):
        y, x = _corner(sample.size, window, rng)
        inside = foreground[max(0, y) // step : (y + window[0]) // step, max(0, x) // step : (x + window[1]) // step]
        found = int(np.count_nonzero(inside))
        if found > most:
            best, most = (y, x), found
        if found >= _CROP_FOREGROUND * cells:
            break
    return best


def _class_corner(sample: Sample, window: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Upper left corner (y, x) of a window around a pixel of a random class; of any, where all is void."""
    step = max(1, min(*window, *sample.size) // 64) | 1  # odd, so that the middle of a cell is that of a pixel
    labels = sample.labels_every(step)
    present = np.unique(labels[labels != VOID])
    if not present.size:
        return _corner(sample.size, window, rng)
    cell = rng.choice(np.flatnonzero(labels == rng.choice(present)))
    pixel = (int(i) * step + step // 2 for i in divmod(cell, labels.shape[1]))
    y, x = (
        int(rng.integers(max(min(0, s - w), i - w + 1), min(max(0, s - w), i), endpoint=True))
        for s, w, i in zip(sample.size, window, pixel, strict=True)
    )
    return y, x


def _shift(x: float, y: float) -> Matrix:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _turn(degrees: float) -> Matrix:
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _about_centre(sample: Sample, matrix: Matrix) -> Matrix:
    height, width = sample.size
    return _shift(width / 2, height / 2) @ matrix @ _shift(-width / 2, -height / 2)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def ordered(key: str, limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    if low > high:
        raise UsageError(Problem(key, f"expected [least, largest], found [{low:g}, {high:g}]; swap the two"))
    return low, high
