"""From counts of pixels to figures: IoU, pixel accuracy, an interval over images, and null models.

The mIoU of vocseg: one confusion matrix over the whole set, at the images' own sizes, void left out, averaged
over the classes whose union is not empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


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


def iou_of(counts: Counts) -> NDArray[np.float64]:
    """IoU by class from (…, r, c) marginals, whose first rows are pixels hit, true and predicted; NaN without any."""
    hits, truth, predicted = (counts[..., i, :].astype(np.float64) for i in range(3))
    union = truth + predicted - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def scores(matrix: Counts) -> Scores:
    """Figures of a (c, c) confusion matrix, rows truth and columns prediction."""
    iou = iou_of(np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]))
    total = int(matrix.sum())
    return Scores(
        miou=_mean(iou),
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
        Lower and upper bound; both NaN without images.
    """
    per_image = per_image[:, :3]  # nothing else is part of an IoU
    n = len(per_image)
    if n == 0:
        return float("nan"), float("nan")
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    drawn = (weights @ per_image.reshape(n, -1)).reshape(draws, *per_image.shape[1:])
    iou = iou_of(drawn)
    present = ~np.isnan(iou)
    miou = np.where(present, iou, 0).sum(1) / np.maximum(present.sum(1), 1)
    low, high = np.quantile(miou, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def image_miou(per_image: Counts) -> NDArray[np.float64]:
    """The mIoU of each image by itself, (n,), from (n, r, c) marginals; for ranking images, not for reporting."""
    return np.array([_mean(iou) for iou in iou_of(per_image)])


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


def _mean(iou: NDArray[np.float64]) -> float:
    present = iou[~np.isnan(iou)]
    return float(present.mean()) if len(present) else float("nan")
