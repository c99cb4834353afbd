"""The metric that the low figures of reports 001, 002 and 004 are likely to be in, to set ours beside theirs.

Each image is scored by itself: void is background, and the IoU of all c classes is averaged, those that are neither in
the image nor predicted counting 0. The figure is the mean over images. Even a perfect prediction scores no more than
the number of an image's classes over c: on VOC 2007 val that is 0.125, and all background scores 0.036 with a pixel
accuracy of 0.751. `vocseg.evaluate.scores` has the usual metric.

None of the reports gives its code. The dialect is that of a public solution of the assignment they answer; what they
print above its ceiling (0.15, 0.33, 0.46) was averaged in some other way, over batches for instance.
"""

from dataclasses import dataclass

import numpy as np

from vocseg.errors import DataError
from vocseg.evaluate.scores import Counts, iou_of


@dataclass(frozen=True)
class DialectScores:
    """Figures in the reports' dialect, both means over images."""

    miou: float
    pixel_accuracy: float


def dialect_scores(per_image: Counts) -> DialectScores:
    """Figures of images from their (n, 4, c) marginals: pixels hit, true and predicted, and those predicted on void.

    Raises:
        DataError: the counts were written before the fourth row was.
    """
    if per_image.shape[1] < 4:
        raise DataError(
            "these counts do not say what was predicted on void pixels, as the reports' metric needs; they are of an "
            "older run, which `vocseg eval RUN` scores anew"
        )
    on_void = per_image[:, 3]
    counts = per_image[:, :3].copy()
    counts[:, 0, 0] += on_void[:, 0]
    counts[:, 1, 0] += on_void.sum(1)
    counts[:, 2] += on_void
    iou = np.nan_to_num(iou_of(counts), nan=0.0)
    return DialectScores(
        miou=float(iou.mean()),
        pixel_accuracy=float((counts[:, 0].sum(1) / counts[:, 1].sum(1)).mean()),
    )


def constant_counts(per_image: Counts, answer: int) -> Counts:
    """The (n, 4, c) marginals of a predictor that answers one class everywhere, on the same images."""
    counts = np.zeros_like(per_image)
    counts[:, 1] = per_image[:, 1]
    counts[:, 0, answer] = per_image[:, 1, answer]
    counts[:, 2, answer] = per_image[:, 1].sum(1)
    counts[:, 3, answer] = per_image[:, 3].sum(1)
    return counts


def perfect_counts(per_image: Counts) -> Counts:
    """The (n, 4, c) marginals of the predictor that scores most in this dialect: the truth, and background for void."""
    counts = np.zeros_like(per_image)
    counts[:, :3] = per_image[:, 1:2]
    counts[:, 3, 0] = per_image[:, 3].sum(1)
    return counts
