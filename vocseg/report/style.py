"""What all figures share: type, lines, colours, and how a figure is made and written.

pyplot is never imported and no setting of matplotlib outlives `paper_style`, so figures may be drawn inside any
program. Build a figure and save it within one such block:

    with paper_style():
        figure = new_figure(FULL_WIDTH, 2.6)
        figure.add_subplot().plot(...)
        save(figure, path)
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from vocseg.runs.files import write_bytes

DPI = 200
COLUMN_WIDTH = 3.4
FULL_WIDTH = 7.0
"""Inches: one column, and the whole width, of a two-column paper."""

# Okabe and Ito's colours, which stay apart under every common colour blindness.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
GREY = "#6b6b6b"
PALE = "#dcdcdc"

SHADES = LinearSegmentedColormap.from_list(
    # White to dark blue in equal steps of OKLab lightness; a share of 0 leaves the paper white.
    "shades",
    ["#ffffff", "#bee6ff", "#89caff", "#5eabf3", "#3b8cdd", "#226ec1", "#15529e", "#113875", "#102245"],
)

# matplotlib brings DejaVu Sans along; the others are asked for letters it lacks, where they are installed.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Noto Sans Devanagari")

_STYLE = {
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a class or file name is a $
    "axes.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "hatch.linewidth": 0.5,
    "hatch.color": "#9a9a9a",
    "pdf.fonttype": 42,  # TrueType; many venues refuse matplotlib's Type 3
    "svg.hashsalt": "vocseg",  # equal figures give equal files
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Sets our type and lines for the block, whatever the user's own matplotlibrc says."""
    installed = font_manager.fontManager.get_font_names()
    fonts = [name for name in _FONTS if name in installed]
    with matplotlib.style.context({**_STYLE, "font.family": fonts}, after_reset=True), warnings.catch_warnings():
        # A letter that no installed font has becomes a box, which the reader sees.
        warnings.filterwarnings("ignore", message=r"(?s)(Glyph|Matplotlib currently does not support)")
        yield


def new_figure(width: float, height: float, *, dpi: int = DPI) -> Figure:
    """An empty figure, in inches, with a canvas of its own in place of pyplot's."""
    figure = Figure(figsize=(width, height), dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def legend_above(axes: Axes, *, columns: int, handle: float) -> None:
    """A legend in a row over the plot, from its left edge; `handle` is the length of a line in it, in letters."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=handle,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def save(figure: Figure, path: Path, *, crop: bool = False) -> None:
    """Writes the figure in the format of the suffix, .png, .svg or .pdf; `crop` cuts empty margins off."""
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    drawn = io.BytesIO()
    figure.savefig(
        drawn,
        format=path.suffix[1:] or None,
        metadata=undated.get(path.suffix.lower()),
        bbox_inches="tight" if crop else None,
        pad_inches=0.03,
    )
    write_bytes(path, drawn.getbuffer())


def label(text: str, limit: int = 40) -> str:
    """A class or file name as one printable line; the middle of a name longer than `limit` becomes an ellipsis."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(line) <= limit:
        return line
    head = limit // 2
    return f"{line[:head]}…{line[len(line) - (limit - head - 1) :]}"
