"""From counts of pixels to figures: IoU, pixel accuracy, an interval over images, and null models.

The mIoU of vocseg: one confusion matrix over the whole set, at the images' own sizes, void left out, averaged
over the classes whose union is not empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.integer[Any]]

BY_COUNTS = 10_000  # images; from here on, drawing each is faster than drawing how often each comes up
DRAWN = 2_000_000  # images that are redrawn at a time, over all draws


@dataclass(frozen=True)
class Scores:
    """Figures of one set of images.

    Attributes:
        miou: mean over classes whose union is not empty; NaN when no pixel is labelled.
        pixel_accuracy: share of labelled pixels with the right class; NaN when none is labelled.
        iou: by class, NaN where the class is neither in the truth nor predicted.
    """

    miou: float
    pixel_accuracy: float
    iou: NDArray[np.float64]


def iou_of(counts: Counts | NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU by class from (…, r, c) marginals, whose first rows are pixels hit, true and predicted; NaN without any."""
    hits, truth, predicted = (counts[..., i, :].astype(np.float64) for i in range(3))
    union = truth + predicted - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def scores(matrix: Counts) -> Scores:
    """Figures of a (c, c) confusion matrix, rows truth and columns prediction."""
    iou = iou_of(np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]))
    total = int(matrix.sum())
    return Scores(
        miou=float(_mean(iou)),
        pixel_accuracy=int(matrix.trace()) / total if total else float("nan"),
        iou=iou,
    )


def bootstrap_interval(
    per_image: Counts, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """An interval of the mIoU under redrawing the images with replacement (percentile bootstrap).

    It speaks of other images of the same kind, not of other training runs.

    Args:
        per_image: (n, r, c) marginals, one image a row.

    Returns:
        Lower and upper bound, of the draws that hold a labelled pixel; both NaN where none can.
    """
    n = len(per_image)
    if not per_image[:, 1].any():
        return float("nan"), float("nan")
    # Nothing else is part of an IoU. Products of float64 are those of whole numbers up to 2^53, and 60 times as fast.
    marginals = per_image[:, :3].reshape(n, -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN // n)
    drawn = [
        _redrawn(n, rng, min(at_once, draws - first)).astype(np.float64) @ marginals
        for first in range(0, draws, at_once)
    ]
    miou = _mean(iou_of(np.concatenate(drawn).reshape(draws, 3, -1)))
    low, high = np.nanquantile(miou, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _redrawn(n: int, rng: np.random.Generator, draws: int) -> Counts:
    """How often each of n images comes up in n draws with replacement, (draws, n)."""
    if n <= BY_COUNTS:
        return rng.multinomial(n, np.full(n, 1 / n), size=draws)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)])


def image_miou(per_image: Counts) -> NDArray[np.float64]:
    """The mIoU of each image by itself, (n,), from (n, r, c) marginals; for ranking images, not for reporting."""
    return _mean(iou_of(per_image))


def null_models(matrix: Counts, classes: Sequence[str]) -> dict[str, int]:
    """Predictors that never look at the image, by name, and the class that each answers everywhere.

    `all background` answers class 0; `best constant` the one class with the highest mIoU.
    """
    best = int(matrix.sum(1).argmax())  # IoU of a constant class is its share of pixels, and the others' are 0
    return {"all background": 0, f"best constant ({classes[best]})": best}


def constant_scores(matrix: Counts, answer: int) -> Scores:
    """What a predictor that answers one class everywhere would score on the same pixels."""
    constant = np.zeros_like(matrix)
    constant[:, answer] = matrix.sum(1)
    return scores(constant)


def _mean(iou: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over classes, which come last, without those that have none; NaN where no class has any."""
    present = (~np.isnan(iou)).sum(-1)
    return np.divide(np.nansum(iou, -1), present, out=np.full(present.shape, np.nan), where=present > 0)
