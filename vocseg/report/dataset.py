"""The figure of a data set: how its pixels and its images are shared out among the classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vocseg.data.stats import Stats
from vocseg.report.style import BLUE, FULL_WIDTH, GREEN, GREY, ORANGE, label, new_figure, paper_style, save

_COLOURS = (BLUE, ORANGE, GREEN, GREY)


def draw_stats(splits: Mapping[str, Stats], path: Path) -> None:
    """Draws each class's share of the labelled pixels and of the images, the class with the most pixels on top.

    Args:
        splits: name to counts, all of the same classes; the first one decides the order.
        path: ends in .png, .svg or .pdf.
    """
    with paper_style():
        save(_figure(splits), path)


def _figure(splits: Mapping[str, Stats]) -> Figure:
    first = next(iter(splits.values()))
    order = sorted(range(len(first.classes)), key=lambda c: -first.class_pixels[c])
    row = 0.07 + 0.07 * len(splits)  # inches
    figure = new_figure(FULL_WIDTH, 0.9 + row * len(order))
    pixels, images = figure.subplots(1, 2, sharey=True)
    _shares(pixels, [[counts.pixel_shares[c] for c in order] for counts in splits.values()])
    _shares(images, [[counts.image_shares[c] for c in order] for counts in splits.values()])
    pixels.set_yticks(range(len(order)), [label(first.classes[c]) for c in order])
    pixels.set_ylim(len(order) - 0.4, -0.6)
    for axes, what in ((pixels, "labelled pixels"), (images, "images")):
        axes.set_xlabel(f"share of the {what}" + ", log scale" * (axes.get_xscale() == "log"))
    described = [f"{name}: {counts.images:,} images, {counts.void_share:.1%} void" for name, counts in splits.items()]
    handles = [bars[0] for bars in pixels.containers]
    figure.legend(handles, described, loc="outside upper center", ncols=2)
    return figure


def _shares(axes: Axes, splits: Sequence[Sequence[float]]) -> None:
    """One bar a class and split, with its value; on a log scale where a linear one would hide most of them."""
    percent = 100 * np.array(splits)
    some = percent[percent > 0]
    top = float(percent.max(initial=1e-9))
    logarithmic = some.size > 0 and float(np.median(some)) < top / 30
    height = 0.8 / len(percent)
    for split, values in enumerate(percent):
        at = np.arange(len(values)) + (split - (len(percent) - 1) / 2) * height
        bars = axes.barh(at, values, height * 0.9, color=_COLOURS[split % len(_COLOURS)])
        axes.bar_label(bars, [_digits(value) for value in values], padding=2, fontsize=5)
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xlim(10 ** np.floor(np.log10(some.min() / 1.5)), 300)
    else:
        axes.set_xlim(0, top * 1.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _digits(percent: float) -> str:
    return "0" if percent == 0 else f"{percent:.0f}" if percent >= 10 else f"{percent:#.2g}"
