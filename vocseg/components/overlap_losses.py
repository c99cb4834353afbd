"""Losses of how far each class, as predicted, overlaps with its truth: Dice, Tversky, Lovász.

They hold what `losses.py` says of every loss, and are averaged over the classes that have a labelled pixel in the
batch: what is predicted of an absent class costs something only by what it takes from those that are there.
"""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from vocseg import loss
from vocseg.components.losses import LossFunction, rows
from vocseg.data.dataset import VOID


@loss
def dice(*, smooth: Annotated[float, Ge(0)] = 1.0) -> LossFunction:
    """Soft Dice loss over the batch, averaged over the classes present (Milletari et al. 2016, arXiv:1606.04797).

    1 - (2 Σ p·y + smooth) / (Σ p + Σ y + smooth) for each class that has a labelled pixel in the batch, the sums taken
    over all labelled pixels of the batch; the denominator is linear, not squared as in the paper.

    Args:
        smooth: pixels added above and below, which calms classes with few pixels.
    """

    def function(logits: Tensor, target: Tensor) -> Tensor:
        # Tversky's index with both weights 1/2, above and below divided by 2.
        index, present = _tversky_index(logits, target, 0.5, 0.5, smooth / 2)
        return _mean_over(1 - index, present)

    return function


@loss
def tversky(
    *,
    alpha: Annotated[float, Ge(0)] = 0.3,
    beta: Annotated[float, Gt(0)] = 0.7,
    smooth: Annotated[float, Ge(0)] = 1.0,
) -> LossFunction:
    """Dice loss with weights on invented and on missed pixels (Salehi et al. 2017, arXiv:1706.05721).

    1 - (Σ p·y + smooth) / (Σ p·y + alpha Σ p·(1 - y) + beta Σ (1 - p)·y + smooth) for each class, averaged as `dice`
    is. With alpha = beta = 1/2 it is `dice` with twice the smooth, with alpha = beta = 1 the soft IoU loss. Report 002
    tried it without saying how; the defaults are the paper's best.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives; above alpha, it favours recall over precision.
        smooth: pixels added above and below, which calms classes with few pixels.
    """

    def function(logits: Tensor, target: Tensor) -> Tensor:
        index, present = _tversky_index(logits, target, alpha, beta, smooth)
        return _mean_over(1 - index, present)

    return function


@loss
def focal_tversky(
    *,
    alpha: Annotated[float, Ge(0)] = 0.3,
    beta: Annotated[float, Gt(0)] = 0.7,
    gamma: Annotated[float, Gt(0)] = 0.75,
    smooth: Annotated[float, Ge(0)] = 1.0,
) -> LossFunction:
    """Tversky loss of each class to a power (Abraham and Khan 2018, arXiv:1810.07842).

    (1 - index)^gamma, averaged over the classes present. The paper prints the exponent as 1/gamma, with gamma = 4/3,
    and its authors' code has 0.75 for the same; here gamma is the exponent itself, as in their code and as in `focal`.
    The paper also swaps alpha and beta; here they are those of `tversky`. Report 002 tried it without saying how.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: the exponent. 1 is `tversky`; below 1, the slope grows the better a class is found, so that learning
            does not stop at the last errors; above 1, classes that are found badly get the most.
        smooth: pixels added above and below, which calms classes with few pixels.
    """

    def function(logits: Tensor, target: Tensor) -> Tensor:
        index, present = _tversky_index(logits, target, alpha, beta, smooth)
        # At 0 the slope of a power below 1 is infinite, and below it, where rounding leads, there is none.
        return _mean_over((1 - index).clamp(min=torch.finfo(index.dtype).tiny) ** gamma, present)

    return function


@loss
def lovasz_softmax(*, stride: Annotated[int, Interval(ge=1, le=16)] = 1) -> LossFunction:
    """Lovász-softmax: a convex surrogate of the mean IoU of the classes present (Berman et al. 2018, arXiv:1705.08790).

    Taken over the labelled pixels of the whole batch. It sorts them once for every class, and is usually added to
    cross-entropy rather than used alone.

    Args:
        stride: keep only every n-th row and column; 2 sorts a quarter of the pixels.
    """

    def function(logits: Tensor, target: Tensor) -> Tensor:
        pixels, labels = rows(logits[..., ::stride, ::stride], target[..., ::stride, ::stride])
        labelled = labels != VOID
        truth = _truth(labels, pixels.shape[1])
        present = truth.any(0)
        errors = (truth.to(pixels.dtype) - pixels.softmax(1)).abs()
        classes = list(range(pixels.shape[1]))
        if pixels.device.type == "cpu":
            # Asking which classes are there costs nothing here and saves most of the sorting. Absent ones add 0.
            classes = present.nonzero().flatten().tolist()
        total = errors.sum() * 0
        for c in classes:
            descending, order = errors[:, c].sort(descending=True)
            slope = _jaccard_slope(truth[order, c], labelled[order])
            total = total + torch.where(present[c], descending @ slope.to(descending.dtype), 0.0)
        return total / present.sum().clamp(min=1)

    return function


def _tversky_index(logits: Tensor, target: Tensor, alpha: float, beta: float, smooth: float) -> tuple[Tensor, Tensor]:
    """Tversky's index of each class over all labelled pixels, and which classes have any: (c,) float, (c,) bool."""
    pixels, labels = rows(logits, target)
    truth = _truth(labels, pixels.shape[1])
    probabilities = pixels.softmax(1) * (labels != VOID)[:, None]
    count = truth.sum(0)
    found = (probabilities * truth).sum(0)
    invented = probabilities.sum(0) - found
    missed = count - found
    present = count > 0
    # Above 0 for any class that is present, as `beta` is: a pixel of it is found or missed.
    every = torch.where(present, found + alpha * invented + beta * missed + smooth, 1.0)
    return (found + smooth) / every, present


def _truth(labels: Tensor, num_classes: int) -> Tensor:
    """(n,) -> (n, num_classes) bool, one column a class; rows of void hold none. torch's own makes the host wait."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def _mean_over(values: Tensor, present: Tensor) -> Tensor:
    """Mean of the values of present classes; 0 where there is none."""
    return torch.where(present, values, 0.0).sum() / present.sum().clamp(min=1)


def _jaccard_slope(truth: Tensor, labelled: Tensor) -> Tensor:
    """By how much each pixel, added to those before it as an error, raises the Jaccard loss of a class.

    The differences of Berman's algorithm 1 in closed form, which in float32 do not cancel for millions of pixels.

    Args:
        truth: (n,) bool, whether the pixel is of the class, by descending error.
        labelled: (n,) bool, whether it is not void; void raises nothing.
    """
    other = labelled & ~truth
    intersection = truth.sum() - truth.cumsum(0)
    union = truth.sum() + other.cumsum(0)
    missed = truth / union.clamp(min=1)
    invented = other * intersection / (union * (union - 1)).clamp(min=1)
    return missed + invented
