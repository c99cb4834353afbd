"""Masks over their images: one overlay, and the figure that sets image, truth and prediction side by side.

The photograph under a mask is shown in grey, so that every colour in an overlay is a class of the legend.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from vocseg.data.dataset import VOID
from vocseg.data.opencv import cv2
from vocseg.report.palette import Palette, id_colours
from vocseg.report.style import FULL_WIDTH, GREY, label, new_figure, paper_style, save

NOT_GREY = (120, 190, 255)  # a light blue, far from the VOC colour map's first colours
PHOTO_DPI = 300  # what journals ask of photographs
GUTTER, GAP, BLOCK_GAP, CAPTION = 64, 10, 50, 40  # pixels of a comparison: left margin, between panels, pairs, lines


@dataclass(frozen=True)
class Example:
    """One image of a comparison.

    Attributes:
        group: the heading it stands under, such as "best"; equal neighbours share one.
        name: the image's name.
        image: (h, w, 3) uint8 RGB.
        truth: (h, w) uint8, class ids or 255.
        prediction: (h, w) uint8, class ids or 255.
        miou: its mean IoU, 0 to 1; None or NaN where no pixel counts.
    """

    group: str
    name: str
    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    miou: float | None


def overlay(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], palette: Palette = (), alpha: float = 0.65
) -> NDArray[np.uint8]:
    """Lays the classes of a mask over a grey copy of its image.

    Background, id 0, is a faint photograph; void is striped; where two classes meet there is a dark line.

    Args:
        image: (h, w, 3) uint8 RGB.
        mask: (h, w) uint8, class ids or 255.
        palette: the classes' colours.
        alpha: how much of a class's colour covers the photograph, 0 to 1.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    if mask.ndim != 2 or image.shape != (*mask.shape, 3):
        raise ValueError(f"expected an image (h, w, 3) and its mask (h, w), got {image.shape} and {mask.shape}")
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    colours = id_colours(palette)
    greys = np.ptp(colours, axis=1) == 0  # such as VOC's car, which would pass for the photograph
    colours[greys] = colours[greys] // 2 + np.array(NOT_GREY, np.uint8) // 2  # several stay apart
    shown = np.asarray(cv2.addWeighted(grey, 1 - alpha, colours[mask], alpha, 0), np.uint8)
    faint = cv2.addWeighted(grey, 0.5, np.full_like(grey, 255), 0.5, 0)
    np.copyto(shown, faint, where=(mask == 0)[..., None])

    void = mask == VOID
    if void.any():
        width = max(2, round(min(mask.shape) / 80))
        diagonals = np.add.outer(np.arange(mask.shape[0]), np.arange(mask.shape[1]))
        stripes = np.where(diagonals // width % 2, np.uint8(250), np.uint8(165))
        np.copyto(shown, stripes[..., None], where=void[..., None])

    # An edge is where the ids around a pixel differ. Void counts as neither the lowest id nor the highest.
    thickness = max(1, round(min(mask.shape) / 400))
    window = np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8)
    edges = cv2.dilate(np.where(void, np.uint8(0), mask), window) != cv2.erode(mask, window)
    shown[edges & ~void] = (25, 25, 25)
    return shown


def draw_comparison(
    examples: Sequence[Example], classes: Sequence[str], path: Path, *, palette: Palette = (), title: str = ""
) -> None:
    """Draws image, truth and prediction of each example, with a legend of the classes that occur.

    Examples of one group stand in pairs side by side where any group has more than one.
    """
    with paper_style():
        save(_comparison(examples, classes, palette, title), path)


def _comparison(examples: Sequence[Example], classes: Sequence[str], palette: Palette, title: str) -> Figure:
    for e in examples:
        if not e.image.shape[:2] == e.truth.shape == e.prediction.shape:
            raise ValueError(
                f"{e.name}: the sizes of image {e.image.shape[:2]}, truth {e.truth.shape} and prediction "
                f"{e.prediction.shape} differ"
            )
    groups = [(name, list(members)) for name, members in groupby(examples, key=lambda e: e.group)]
    across = 2 if any(len(members) > 1 for _, members in groups) else 1

    # One set of axes covers the figure and counts in pixels from the upper left, so that a panel keeps its pixels.
    width = round(FULL_WIDTH * PHOTO_DPI)
    figure = new_figure(FULL_WIDTH, 1, dpi=PHOTO_DPI)
    figure.set_layout_engine("none")
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set_axis_off()

    panel = (width - GUTTER - (across - 1) * BLOCK_GAP - across * 2 * GAP) // (across * 3)
    lefts = [GUTTER + block * (3 * panel + 2 * GAP + BLOCK_GAP) for block in range(across)]
    y = 12
    if title:
        canvas.text(width / 2, y, label(title, 90), ha="center", va="top", fontsize=9)
        y += 60
    if not examples:
        canvas.text(width / 2, y + 40, "no images", ha="center", va="top", color=GREY)
        y += 110
    else:
        for left in lefts:
            for column, heading in enumerate(("image", "truth", "prediction")):
                canvas.text(left + column * (panel + GAP) + panel / 2, y, heading, ha="center", va="top", fontsize=8)
        y += 44
    for group, members in groups:
        top = y
        for start in range(0, len(members), across):
            line = members[start : start + across]
            height = max(_fit(e.truth.shape, panel)[0] for e in line)
            for left, e in zip(lefts, line, strict=False):
                _draw_example(canvas, e, palette, left, y, panel, height)
            y += height + CAPTION
        if group:
            bottom = y - CAPTION
            canvas.text(20, (top + bottom) / 2, label(group), rotation=90, ha="center", va="center", fontsize=8)
            canvas.add_line(Line2D([GUTTER - 16] * 2, [top, bottom], color=GREY, linewidth=0.6))
        y += 14
    y = _draw_legend(canvas, _occurring(examples), classes, palette, y + 10, width)

    canvas.set(xlim=(0, width), ylim=(y, 0))
    figure.set_size_inches(FULL_WIDTH, (y + 0.01) / PHOTO_DPI)
    return figure


def _draw_example(
    canvas: Axes, e: Example, palette: Palette, left: int, top: int, panel: int, line_height: int
) -> None:
    """Draws the three panels of one example, each in the middle of its place, and the caption under them."""
    height, width = _fit(e.truth.shape, panel)
    kernel = cv2.INTER_AREA if height < e.image.shape[0] else cv2.INTER_CUBIC
    image = _resized(e.image, width, height, kernel)
    masks = [_resized(m, width, height, cv2.INTER_NEAREST_EXACT) for m in (e.truth, e.prediction)]
    y = top + (line_height - height) // 2
    for column, pixels in enumerate((image, *(overlay(image, mask, palette) for mask in masks))):
        x = left + column * (panel + GAP) + (panel - width) // 2
        canvas.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", interpolation="nearest")
    below = top + line_height + 6
    score = "\N{EN DASH}" if e.miou is None or math.isnan(e.miou) else f"{e.miou:.3f}"
    canvas.text(left, below, label(e.name), va="top", fontsize=6, color=GREY)
    canvas.text(left + 3 * panel + 2 * GAP, below, f"mIoU {score}", ha="right", va="top", fontsize=6)


def _draw_legend(
    canvas: Axes, ids: Sequence[int], classes: Sequence[str], palette: Palette, top: int, width: int
) -> int:
    """Draws a swatch and a name for each id, in as many columns as fit; returns where it ends."""
    names = ["void" if i == VOID else label(classes[i], 24) for i in ids]
    texts = [canvas.text(0, 0, name, va="center", fontsize=7) for name in names]
    pitch = 52 + 36 + max((t.get_window_extent().width for t in texts), default=0)
    columns = max(1, int((width - GUTTER + 36) / pitch))
    for place, (i, text) in enumerate(zip(ids, texts, strict=True)):
        row, column = divmod(place, columns)
        x, y = GUTTER + column * pitch, top + 36 * row
        # A swatch is what `overlay` makes of a grey photograph.
        swatch = overlay(np.full((24, 40, 3), 170, np.uint8), np.full((24, 40), i, np.uint8), palette)
        canvas.imshow(swatch, extent=(x, x + 40, y + 24, y), aspect="auto", interpolation="nearest")
        canvas.add_patch(Rectangle((x, y), 40, 24, fill=False, edgecolor="#191919", linewidth=0.5))
        text.set_position((x + 52, y + 12))
    return top + 36 * math.ceil(len(ids) / columns) + 4


def _occurring(examples: Sequence[Example]) -> list[int]:
    """The ids in any truth or prediction, in order; void, the highest, comes last."""
    masks = [mask for e in examples for mask in (e.truth, e.prediction)]
    return np.flatnonzero(sum((np.bincount(m.ravel(), minlength=256) for m in masks), np.zeros(256, int))).tolist()


def _fit(shape: tuple[int, ...], panel: int) -> tuple[int, int]:
    """The largest (height, width) of the shape's proportions inside a panel of 4 to 3."""
    scale = min(0.75 * panel / shape[0], panel / shape[1])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _resized(pixels: NDArray[np.uint8], width: int, height: int, interpolation: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=interpolation), np.uint8)
