"""The figures of a run: learning curves, the IoU of each class, and the confusion matrix.

Each `draw_*` writes one file, in the format of the path's suffix: .png, .svg or .pdf.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from vocseg.report.style import (
    BLUE,
    COLUMN_WIDTH,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    SHADES,
    label,
    legend_above,
    new_figure,
    paper_style,
    save,
)


def draw_curves(epochs: Sequence[Mapping[str, Any]], path: Path, *, best_epoch: int | None = None) -> None:
    """Draws losses and learning rate, and the metrics, over the epochs.

    Args:
        epochs: one record an epoch with `epoch`, `train_loss`, `val_loss`, `miou`, `pixel_accuracy` and `lr`. What is
            None or left out was not measured: the line runs on to the next value. NaN and infinity break it.
        best_epoch: the epoch whose weights were kept; None for the one with the highest mIoU.
    """
    with paper_style():
        save(_curves(epochs, best_epoch), path)


def draw_iou_bars(
    iou: Mapping[str, float | None],
    path: Path,
    *,
    miou: float | None = None,
    interval: tuple[float, float] | None = None,
) -> None:
    """Draws one bar a class, the best on top, with the mean as a line in the band of its 95 % interval.

    Args:
        iou: class name to IoU, 0 to 1; None or NaN for a class that occurs in neither truth nor prediction.
        miou: the mean, 0 to 1; without one there is no line.
        interval: lower and upper end of the interval of the mean.
    """
    with paper_style():
        save(_iou_bars(iou, miou, interval), path)


def draw_confusion(matrix: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Draws which class the pixels of each class were taken for, as shares of the true class.

    Args:
        matrix: (c, c) pixel counts, rows truth, columns prediction.
        classes: the c names.
    """
    with paper_style():
        save(_confusion(np.asarray(matrix), classes), path, crop=True)


def _curves(epochs: Sequence[Mapping[str, Any]], best_epoch: int | None) -> Figure:
    figure = new_figure(FULL_WIDTH, 2.6)
    panels = figure.subplot_mosaic([["loss", "metrics"], ["lr", "metrics"]], height_ratios=[4, 1])
    loss, metrics, lr = panels["loss"], panels["metrics"], panels["lr"]
    lr.sharex(loss)
    metrics.sharex(loss)

    losses = [
        *_curve(loss, epochs, "train_loss", "training", BLUE, "-"),
        *_curve(loss, epochs, "val_loss", "validation", ORANGE, "--"),
    ]
    loss.set_ylabel("loss")
    loss.tick_params(labelbottom=False)
    positive = [v for v in losses if v > 0]
    if losses and len(positive) == len(losses) and max(positive) > 10 * min(positive):
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_locator(NullLocator())

    rates = _curve(lr, epochs, "lr", "learning rate", GREY, "-", markers=False)
    lr.set_title("learning rate", loc="left", fontsize=7, pad=3)
    lr.set_ylim(0, 1.1 * max(rates, default=0) or None)
    lr.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    lr.yaxis.set_major_formatter("{x:g}")

    _curve(metrics, epochs, "miou", "mIoU", BLUE, "-")
    _curve(metrics, epochs, "pixel_accuracy", "pixel accuracy", GREEN, "--")
    metrics.set_ylim(0, 1)

    scores = {r["epoch"]: r["miou"] for r in epochs if r.get("miou") is not None and math.isfinite(r["miou"])}
    if best_epoch is None and scores:
        best_epoch = max(scores, key=scores.__getitem__)
    if best_epoch is not None:
        for axes in (loss, metrics, lr):
            axes.axvline(best_epoch, color=GREY, linewidth=0.7, linestyle=":", zorder=1)
        if best_epoch in scores:
            name = f"best epoch {best_epoch}: {scores[best_epoch]:.3f}"
            metrics.plot(
                best_epoch, scores[best_epoch], "o", label=name, color=BLUE, fillstyle="none", markersize=6, zorder=4
            )
    for axes in (lr, metrics):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    low, high = loss.get_xlim()
    loss.set_xlim(max(low, 0.5), high)  # there is no epoch 0 to have a tick
    for axes in (loss, metrics):
        if axes.get_legend_handles_labels()[0]:
            legend_above(axes, columns=3, handle=1.6)
        else:
            axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center", color=GREY)
    return figure


def _curve(
    axes: Axes,
    epochs: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    colour: str,
    line: str,
    *,
    markers: bool = True,
) -> list[float]:
    """Draws one line where anything was measured, and returns its finite values."""
    points = [(r["epoch"], float(r[key])) for r in epochs if r.get(key) is not None]
    points = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
    finite = [y for _, y in points if not math.isnan(y)]
    if finite:
        few = len(points) == 1 or (markers and len(points) <= 30)
        axes.plot(*zip(*points, strict=True), line, color=colour, label=name, marker="o" if few else "", markersize=2.5)
    return finite


def _iou_bars(iou: Mapping[str, float | None], miou: float | None, interval: tuple[float, float] | None) -> Figure:
    scored = {name: float(v) for name, v in iou.items() if v is not None and math.isfinite(v)}
    names = [*sorted(scored, key=scored.__getitem__, reverse=True), *(name for name in iou if name not in scored)]
    columns = max(1, math.ceil(len(names) / 52))
    rows = max(1, math.ceil(len(names) / columns))
    pitch, size = (0.17, 7.0) if rows <= 30 else (0.125, 5.5)
    width = COLUMN_WIDTH if columns == 1 else max(FULL_WIDTH, 2.3 * columns)
    figure = new_figure(width, rows * pitch + 0.75)
    panels = figure.subplots(1, columns, squeeze=False, gridspec_kw={"wspace": 0.08})[0]
    for column, axes in enumerate(panels):
        part = names[column * rows : (column + 1) * rows]
        axes.barh(range(len(part)), [scored.get(name, 0) for name in part], height=0.72, color=BLUE, zorder=2)
        for y, name in enumerate(part):
            value, colour = (f"{scored[name]:.2f}", "black") if name in scored else ("absent", GREY)
            axes.text(1.13, y, value, ha="right", va="center_baseline", fontsize=size, color=colour)
        axes.set_yticks(range(len(part)), [label(name, 24) for name in part], fontsize=size)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(0, 1.14)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1] if columns == 1 else [0, 0.5, 1])
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.set_xlabel("IoU")
    if miou is not None and math.isfinite(miou):
        title = f"mIoU {miou:.3f}"
        for axes in panels:
            axes.axvline(miou, color=ORANGE, linewidth=1.0, zorder=3)
        if interval is not None and all(map(math.isfinite, interval)):
            title += f" (95 % interval {interval[0]:.3f}\N{EN DASH}{interval[1]:.3f})"
            for axes in panels:
                axes.axvspan(*interval, color=ORANGE, alpha=0.18, linewidth=0, zorder=0)
        figure.suptitle(title, color=ORANGE, fontsize=8)
    return figure


def _confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    count = len(classes)
    if matrix.shape != (count, count):
        raise ValueError(f"expected a matrix ({count}, {count}) for {count} classes, got {matrix.shape}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.full(matrix.shape, np.nan)
    np.divide(matrix, totals, out=shares, where=totals > 0)

    numbers = count <= 25
    cell, size = (0.27, 7.0) if numbers else (0.12, 6.0) if count <= 64 else (0.085, 5.0)
    side = max(2.4, count * cell)
    figure = new_figure(side + 1.6, side + 1.1)
    axes = figure.add_subplot()
    axes.set_facecolor(PALE)
    shown = axes.imshow(shares, cmap=SHADES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if numbers:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.3 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
    names = [label(name, 24) for name in classes]
    axes.set_xticks(range(count), names, fontsize=size, rotation=90)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    bar = figure.colorbar(
        shown, cax=axes.inset_axes((1.02, 0, 0.16 / side, 1)), ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    )
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    bar.outline.set_linewidth(0.6)
    bar.set_label("% of the true class's pixels")
    if (totals == 0).any():
        axes.legend(
            handles=[Patch(facecolor=PALE, label="class absent from the truth")],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderaxespad=0.2,
        )
    return figure
