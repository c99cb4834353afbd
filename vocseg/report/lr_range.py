"""The figure of a learning-rate range test."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vocseg.report.style import BLUE, FULL_WIDTH, GREY, ORANGE, label, legend_above, new_figure, paper_style, save


def draw_lr_range(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    path: Path,
    *,
    suggestion: float | None = None,
    stops_falling: float | None = None,
    diverged: float | None = None,
    used: float | None = None,
    title: str = "",
) -> None:
    """Draws the losses over the rates, as they were and smoothed.

    Args:
        losses: those of the first rates; the last may be infinite or NaN.
        smoothed: the finite ones without their noise.
        used: the recipe's own rate, drawn where it is among the others.
    """
    with paper_style():
        save(_lr_range(rates, losses, smoothed, suggestion, stops_falling, diverged, used, title), path)


def _lr_range(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestion: float | None,
    stops_falling: float | None,
    diverged: float | None,
    used: float | None,
    title: str,
) -> Figure:
    figure = new_figure(FULL_WIDTH, 2.8)
    axes = figure.add_subplot()
    finite = losses[: len(smoothed)]

    def smoothed_at(rate: float) -> float:
        return smoothed[min(range(len(smoothed)), key=lambda i: abs(rates[i] - rate))]

    axes.plot(rates[: len(finite)], finite, "o", color=GREY, alpha=0.45, markersize=2, markeredgewidth=0, label="loss")
    axes.plot(rates[: len(smoothed)], smoothed, color=BLUE, label="smoothed")
    if used is not None and rates[0] <= used <= rates[-1]:
        axes.axvline(used, color=GREY, linewidth=0.8, linestyle=":", zorder=1, label=f"the recipe's {used:g}")
    if suggestion is not None:
        axes.axvline(suggestion, color=ORANGE, linewidth=1.0, zorder=1, label=f"steepest descent {suggestion:g}")
        axes.plot(suggestion, smoothed_at(suggestion), "o", color=ORANGE, fillstyle="none", markersize=6, zorder=4)
    if stops_falling is not None:
        name = f"stops falling {stops_falling:.2g}"
        axes.plot(stops_falling, smoothed_at(stops_falling), "v", color=BLUE, markersize=5, zorder=4, label=name)
    if diverged is not None:
        axes.axvspan(diverged, max(rates[-1], diverged), color=GREY, alpha=0.15, linewidth=0, zorder=0)
        axes.axvline(diverged, color=GREY, linewidth=0.8, zorder=1, label=f"diverges {diverged:.2g}")

    # Of what rises at the end only the beginning is of interest: it may rise by orders of magnitude.
    bottom = min(range(len(smoothed)), key=smoothed.__getitem__)
    falling = [*finite[: bottom + 1], *smoothed[: bottom + 1]]
    low, high = min(falling), max(falling)
    room = max(high - low, 0.05 * abs(high), 1e-9)
    axes.set_ylim(low - 0.08 * room, high + 0.5 * room)
    axes.set_xscale("log")
    axes.set_xlim(rates[0], rates[-1])
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    if title:
        axes.set_title(label(title, 60), loc="left", pad=30)  # above two rows of the legend
    legend_above(axes, columns=3, handle=1.4)
    return figure
