"""The data set `synthetic`: scenes of six shapes over camouflage, drawn when they are read; no file, no download.

The outline alone decides the class: every class has the same textures and colours. Objects are brighter than the
background on average only, they overlap and leave the image, and strokes, shadows and uneven light disturb them.
A scene is a function of (seed, split, index), computed in integers or rounded to them, so that every machine
draws the same pixels; OpenCV is asked only for what it computes exactly.
"""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Interval
from numpy.random import Generator
from numpy.typing import NDArray

from vocseg import dataset
from vocseg.data.dataset import VOID, Dataset
from vocseg.data.opencv import cv2
from vocseg.errors import DataError, Problem

SYNTHETIC_CLASSES = ("background", "disc", "square", "triangle", "star", "ring", "cross")

Pixels = NDArray[np.uint8]

# The darkest a colour's channels get. With equal values, perfect camouflage, a small network was at mIoU 0.35
# when with these it was at 0.55.
_BACKGROUND, _STROKE, _OBJECT = 20, 40, 80


@dataset
def synthetic(
    split: str,
    *,
    size: Annotated[int, Interval(ge=32, le=1024)] = 96,
    images: Annotated[int, Interval(ge=1, le=1_000_000)] = 1000,
    val_images: Annotated[int, Interval(ge=1, le=1_000_000)] = 100,
    seed: Annotated[int, Ge(0)] = 0,
) -> Dataset:
    """Scenes of six overlapping shapes, drawn on the fly: needs no files.

    The splits `train` and `val` share no scene, and a scene stays the same when their lengths change.

    Args:
        size: mean height and width in pixels; a scene's differ from it by up to an eighth.
        images: scenes in `train`.
        val_images: scenes in `val`.
        seed: another seed gives other scenes, in both splits.

    Raises:
        DataError: there is no such split.
    """
    lengths = {"train": images, "val": val_images}
    if split not in lengths:
        raise DataError(Problem("data", f"synthetic has no split '{split}'; there are train and val"))
    stream = list(lengths).index(split)

    def read(index: int) -> tuple[Pixels, Pixels]:
        return draw_scene(np.random.default_rng((seed, stream, index)), size)

    return Dataset(SYNTHETIC_CLASSES, tuple(f"{split}_{i:06d}" for i in range(lengths[split])), read)


def draw_scene(rng: Generator, size: int) -> tuple[Pixels, Pixels]:
    """An image (h, w, 3) uint8 RGB and its mask (h, w) uint8, with two pixels of void along every outline."""
    h, w = rng.integers(size - size // 8, size + size // 8 + 1, 2).tolist()
    image = _background(rng, h, w)
    instances = np.zeros((h, w), np.uint8)  # the object a pixel shows: neighbours of one class are parted, too
    labels = [0]
    for centre in _spread(rng, int(rng.integers(3, 7)), h, w, size // 8):
        labels.append(int(rng.integers(1, len(SYNTHETIC_CLASSES))))
        outlines = _place(rng, _OUTLINES[labels[-1]], centre, size)
        _paint(rng, image, instances, outlines, len(labels) - 1)
    _strokes(rng, image, count=int(rng.integers(0, 3)), thickest=1)
    mask = np.array(labels, np.uint8)[instances]
    kernel = np.ones((3, 3), np.uint8)
    mask[cv2.dilate(instances, kernel) != cv2.erode(instances, kernel)] = VOID
    return _lit(rng, image), mask


def _background(rng: Generator, h: int, w: int) -> Pixels:
    """Two or three textured regions with wavy borders, crossed by strokes."""
    image = _texture(rng, h, w, _BACKGROUND)
    for _ in range(rng.integers(1, 3)):
        wavy = _smooth(rng, 0, (int(rng.integers(3, 6)), int(rng.integers(3, 6))), h, w) > 135
        image[wavy] = _texture(rng, h, w, _BACKGROUND)[wavy]
    _strokes(rng, image, count=int(rng.integers(2, 6)), thickest=3)
    return image


def _smooth(rng: Generator, lowest: int, cells: tuple[int, int], h: int, w: int) -> Pixels:
    """(h, w) values from `lowest` to 255 that change smoothly between random ones on a coarse grid."""
    grid = rng.integers(lowest, 256, cells, dtype=np.uint8)
    return cv2.resize(grid, (w, h), interpolation=cv2.INTER_LINEAR_EXACT).astype(np.uint8)


def _colour(rng: Generator, darkest: int) -> NDArray[np.int64]:
    """A colour of middling saturation, its channels up to 140 above `darkest`."""
    colour = rng.integers(0, 256, 3)
    return darkest + (2 * colour + colour.sum()) * 140 // (5 * 255)


def _texture(rng: Generator, h: int, w: int, darkest: int) -> Pixels:
    """(h, w, 3) in two tones of a colour: plain, stripes, checks, dots or blotches."""
    first = _colour(rng, darkest)
    second = first + rng.integers(12, 36) * (2 * rng.integers(2) - 1) + rng.integers(-10, 11, 3)
    tones = np.clip((first, second), 0, 255).astype(np.uint8)
    period = int(rng.integers(3, 8))
    a, b = _DIRECTIONS[rng.integers(len(_DIRECTIONS))]
    y, x = np.ogrid[:h, :w]
    u, v = a * x + b * y, b * x - a * y
    match rng.integers(5):
        case 0:
            pattern = np.zeros((h, w), bool)
        case 1:
            pattern = u // period % 2 == 1
        case 2:
            pattern = (u // period + v // period) % 2 == 1
        case 3:
            pattern = (u % (2 * period) - period) ** 2 + (v % (2 * period) - period) ** 2 < period**2 // 2
        case _:
            pattern = _smooth(rng, 0, (h // 4 + 1, w // 4 + 1), h, w) > 140
    return tones[pattern.astype(np.intp)]


def _spread(rng: Generator, count: int, h: int, w: int, margin: int) -> list[NDArray[np.int64]]:
    """Points (x, y) in sixteenths of a pixel, each the farthest of a few from those before: they crowd but little."""
    points: list[NDArray[np.int64]] = []
    for _ in range(count):
        candidates = rng.integers(16 * margin, (16 * (w - margin), 16 * (h - margin)), (5, 2))
        nearest = [min(((c - p) ** 2).sum() for p in points) if points else 0 for c in candidates]
        points.append(candidates[np.argmax(nearest)])
    return points


def _place(
    rng: Generator, shape: tuple[NDArray[np.float64], ...], centre: NDArray[np.int64], size: int
) -> list[NDArray[np.int32]]:
    """A shape's outlines about a centre, in sixteenths of a pixel: turned, scaled and a little flattened."""
    radius = rng.integers(16 * size // 7, 16 * size // 4)
    cos, sin = _corners([1.0], rng.uniform(0, 2 * np.pi))[0]
    matrix = np.array(((cos, sin), (-sin, cos))) * ((1.0,), (rng.uniform(0.8, 1.0),))
    return [np.rint(outline @ matrix * radius + centre).astype(np.int32) for outline in shape]


def _paint(rng: Generator, image: Pixels, instances: Pixels, outlines: list[NDArray], number: int) -> None:
    """Draws an object with its shadow, and its number where it covers at least half a pixel."""
    corners = np.concatenate(outlines) // 16
    left, top = np.maximum(corners.min(axis=0) - 2, 0).tolist()
    right, bottom = (corners.max(axis=0) + 7).tolist()
    window = np.s_[top:bottom, left:right]
    h, w = instances[window].shape
    cover = np.zeros((h, w), np.uint8)
    cv2.fillPoly(cover, [outline - 16 * np.array((left, top), np.int32) for outline in outlines], 255, cv2.LINE_AA, 4)
    alpha = cover[..., None].astype(np.int32)
    shadow = np.zeros_like(alpha)
    for shift in (2, 3, 4, 5):  # down and to the right, fading
        shadow[shift:, shift:] += alpha[:-shift, :-shift]
    shaded = image[window] * (2550 - shadow) // 2550
    image[window] = (_texture(rng, h, w, _OBJECT) * alpha + shaded * (255 - alpha) + 127) // 255
    instances[window][cover > 127] = number


def _strokes(rng: Generator, image: Pixels, *, count: int, thickest: int) -> None:
    """Polylines in random colours; they belong to whatever they cross."""
    h, w = image.shape[:2]
    for _ in range(count):
        points = rng.integers(0, (w, h), (rng.integers(2, 5), 2)).astype(np.int32)
        colour, thickness = _colour(rng, _STROKE).tolist(), int(rng.integers(1, thickest + 1))
        cv2.polylines(image, [points], False, colour, thickness, cv2.LINE_AA)


def _lit(rng: Generator, image: Pixels) -> Pixels:
    """The image under light that changes from corner to corner, with grain."""
    h, w = image.shape[:2]
    light = _smooth(rng, 110, (2, 2), h, w)[..., None].astype(np.int32)
    grain = rng.integers(-12, 13, (h, w, 1))
    return np.clip(image * light // 190 + grain, 0, 255).astype(np.uint8)


def _corners(radii: list[float], turn: float = 0.0) -> NDArray[np.float64]:
    """A polygon about the origin with its corners at even angles."""
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii)) + turn
    return np.stack((np.cos(angles), np.sin(angles)), axis=1) * np.array(radii)[:, None]


_DIRECTIONS = ((1, 0), (1, 1), (2, 1), (1, 2), (0, 1), (-1, 1), (-2, 1), (-1, 2))
_CIRCLE = _corners([1.0] * 48)
_ARM = np.array(((0.95, -0.3), (0.95, 0.3), (0.3, 0.3)))
_QUARTER = np.array(((0, 1), (-1, 0)))
# By class: closed outlines in the unit circle; one inside another is a hole.
_OUTLINES: tuple[tuple[NDArray[np.float64], ...], ...] = (
    (),
    (_CIRCLE * 0.9,),
    (_corners([1.0] * 4),),
    (_corners([1.0] * 3),),
    (_corners([1.0, 0.42] * 5),),
    (_CIRCLE, _CIRCLE * 0.5),
    (np.concatenate([_ARM @ np.linalg.matrix_power(_QUARTER, n) for n in range(4)]),),
)
