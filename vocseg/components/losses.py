"""Losses that are means over pixels, the weights of classes in them, and the sum of several losses.

Not here: losses of the overlap of classes (`overlap_losses.py`).

Every loss, here and there, is f(logits (b, c, h, w) float32, target (b, h, w) int64 of class ids or 255) -> scalar.
Void pixels (255) never count, in value or gradient; a batch of nothing but void gives exactly 0 with a graph and
gradients of 0. With a single class, whose probability is always 1, the gradient is 0 and the value 0 or next to it.
None of them makes the host wait for the device: they divide by clamped sums where others index with a mask or ask
`if any`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from vocseg import loss
from vocseg.data.dataset import VOID
from vocseg.errors import Problem, UsageError

LossFunction = Callable[[Tensor, Tensor], Tensor]
Scheme = Literal["none", "inverse", "log", "median"]
Weight = Annotated[float, Ge(0)]


@loss
def cross_entropy(
    num_classes: int,
    class_pixels: Callable[[], Tensor],
    *,
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    class_weights: Literal["none", "inverse", "log", "median"] | tuple[Weight, ...] = "none",
    background_multiplier: Annotated[float, Gt(0)] = 1.0,
) -> LossFunction:
    """Cross-entropy, with label smoothing and class weights.

    The mean over labelled pixels, each weighted by its class: what torch's `cross_entropy` gives wherever that is
    defined, and 0 where it is not because no labelled pixel has a weight.

    Args:
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
        class_weights: how classes are weighted from the pixels they have in the training masks: "inverse" frequency
            (reports 001 and 004), "log" frequency (report 002, eq. 3), "median" frequency (Badrinarayanan et al. 2017,
            arXiv:1511.00561), or one number a class.
        background_multiplier: a further factor on the weight of class 0 (report 001 used 80 on "inverse").

    Raises:
        UsageError: a list of weights has not one entry a class, or holds nothing above 0.
    """
    weight = _weight(num_classes, class_pixels, class_weights, background_multiplier)
    weight_on = None if weight is None else _on_device(weight)

    def function(logits: Tensor, target: Tensor) -> Tensor:
        pixels, labels = rows(logits, target)
        weight = None if weight_on is None else weight_on(pixels.device)
        # reduction="none": on CUDA the reduced kernel for rows runs in a single block, and with label smoothing and
        # weights the mean waits for the device.
        losses = F.cross_entropy(
            pixels, labels, weight, ignore_index=VOID, reduction="none", label_smoothing=label_smoothing
        )
        labelled = labels != VOID
        if weight is None:
            return losses.sum() / labelled.sum().clamp(min=1)
        weights = torch.where(labelled, weight[torch.where(labelled, labels, 0)], 0.0)
        return losses.sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    return function


@loss
def focal(*, gamma: Annotated[float, Ge(0)] = 2.0) -> LossFunction:
    """Focal loss: cross-entropy that fades where the network is already sure (Lin et al. 2017, arXiv:1708.02002).

    The mean over labelled pixels of (1 - p)^gamma · -log p, with p the probability of the true class (report 002).

    Args:
        gamma: how fast sure pixels fade; 0 is plain cross-entropy.
    """

    def function(logits: Tensor, target: Tensor) -> Tensor:
        pixels, labels = rows(logits, target)
        negative_log = F.cross_entropy(pixels, labels, ignore_index=VOID, reduction="none")
        # At 1 - p = 0 the slope of a power below 1 is infinite; the clamp makes it 0.
        doubt = (-torch.expm1(-negative_log)).clamp(min=torch.finfo(pixels.dtype).tiny)
        return (doubt**gamma * negative_log).sum() / (labels != VOID).sum().clamp(min=1)

    return function


@loss
def ohem(
    *,
    threshold: Annotated[float, Interval(gt=0, le=1)] = 0.7,
    min_kept: Annotated[float, Interval(ge=0, le=1)] = 0.0625,
) -> LossFunction:
    """Cross-entropy of the hardest pixels only, mined online (Shrivastava et al. 2016, arXiv:1604.03540).

    The mean of -log p over the labelled pixels of the batch whose true class has a probability p of at most
    `threshold`, and over the hardest ones where those are too few. The paper mines regions of interest; this is the
    form that is usual for pixels.

    Args:
        threshold: a pixel with at most this probability for its class is hard; 1 keeps all, as cross-entropy does.
        min_kept: least share of the labelled pixels that is kept, whatever their probability; pixels as hard as the
            last of them are kept too. A share, where others count pixels, so that it fits any batch and crop.
    """
    hard = -math.log(threshold)

    def function(logits: Tensor, target: Tensor) -> Tensor:
        pixels, labels = rows(logits, target)
        losses = F.cross_entropy(pixels, labels, ignore_index=VOID, reduction="none")
        labelled = labels != VOID
        # Void sorts behind every labelled pixel. The rank stays on the device, where `topk` would ask the host for it.
        hardest_first = losses.detach().where(labelled, -1.0).sort(descending=True).values
        rank = (min_kept * labelled.sum()).ceil().long()
        # float32 counts in steps of 2 from 2^24 pixels on, and may rank one that is not there.
        hardest_kept = hardest_first.gather(0, (rank - 1).clamp(0, len(losses) - 1).reshape(1))
        kept = labelled & ((losses >= hard) | ((losses >= hardest_kept) & (rank > 0)))
        return losses.where(kept, 0.0).sum() / kept.sum().clamp(min=1)

    return function


def rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One row a pixel: logits (n, c), labels (n,). No copy where logits are channels_last, and 1.8 times as fast."""
    return logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]), target.reshape(-1)


def weighted_sum(terms: Sequence[tuple[float, LossFunction]], num_classes: int) -> LossFunction:
    """The sum of several losses, each with its factor, for logits of so many classes.

    Raises:
        ValueError: when it is given logits of another number, of which some losses make sense without a word.
    """

    def function(logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[1] != num_classes:
            message = f"expected logits of {num_classes} classes, found {logits.shape[1]}"
            raise ValueError(f"{message}; the architecture has to give num_classes of them")
        return torch.stack([factor * term(logits, target) for factor, term in terms]).sum()

    return function


def class_weights(counts: Tensor, scheme: Scheme, background_multiplier: float = 1.0) -> Tensor:
    """Weights of the classes from the pixels they have in the training masks.

    With n the pixels of a class, and only classes that have any taken into account:

        none      1
        inverse   1 / n, scaled so that the mean over classes is 1
        log       log(Σn / n), scaled so that the largest is 1
        median    median(n) / n

    A class without pixels weighs 1 under every scheme, and so does everything where "log" knows one class only.
    The median is that of SegNet, over the whole set; Eigen and Fergus (2015, arXiv:1411.4734), whom it follows, relate
    n to the pixels of those images that hold the class.

    Args:
        counts: (c,) int64, without void.
        background_multiplier: a factor on class 0, put on last.

    Returns:
        (c,) float32, on the CPU.
    """
    pixels = counts.to("cpu", torch.float64)
    present = pixels > 0
    weights = torch.ones_like(pixels)
    if present.any():
        known = pixels[present]
        if scheme == "inverse":
            weights[present] = (1 / known) / (1 / known).mean()
        elif scheme == "log" and len(known) > 1:
            rarity = (known.sum() / known).log()
            weights[present] = rarity / rarity.max()
        elif scheme == "median":
            weights[present] = known.quantile(0.5) / known
    weights[0] *= background_multiplier
    return weights.float()


def _weight(
    num_classes: int,
    class_pixels: Callable[[], Tensor],
    scheme: Scheme | tuple[float, ...],
    background_multiplier: float,
) -> Tensor | None:
    """What cross-entropy weighs classes by; None where all weigh the same. Counts pixels only if it has to."""
    if scheme == "none":
        if background_multiplier == 1.0:
            return None
        return class_weights(torch.ones(num_classes), "none", background_multiplier)
    if isinstance(scheme, str):
        return class_weights(class_pixels(), scheme, background_multiplier)
    problems = []
    if len(scheme) != num_classes:
        problems.append(
            Problem(
                "cross_entropy.class_weights",
                f"expected one weight for each of the {num_classes} classes, found {len(scheme)}; "
                "list them in the order of the data set's classes",
            )
        )
    if scheme and not any(scheme):
        problems.append(Problem("cross_entropy.class_weights", "every weight is 0; give at least one above 0"))
    if problems:
        raise UsageError(*problems)
    weights = torch.tensor(scheme, dtype=torch.float32)
    weights[0] *= background_multiplier
    return weights


def _on_device(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """The tensor on a device, moved there once."""
    moved: dict[torch.device, Tensor] = {}

    def on(device: torch.device) -> Tensor:
        if device not in moved:
            # A tensor made in inference mode, should validation come first, could not be trained with afterwards.
            with torch.inference_mode(False):
                moved[device] = tensor.to(device, non_blocking=True)
        return moved[device]

    return on
