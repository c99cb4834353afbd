"""From logits to the class of each pixel, and to counts of pixels by true and predicted class, in whole numbers."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vocseg.data.dataset import VOID
from vocseg.data.opencv import cv2
from vocseg.network import enlargement

Size = tuple[int, int]

# On the CPU, rows are looked at in blocks whose intermediate results stay in a core's second-level cache.
BLOCK = 50_000  # pixels
TURNED_BLOCK = 10_000  # pixels, where all classes of the block have to be copied first
MOST_TURNED = 64  # classes; beyond, that copy costs more than it gains
EXACT_IN_FLOAT32 = 1 << 24  # calcHist counts in float32


def class_map(logits: Tensor, padded: Size | None = None, size: Size | None = None) -> Tensor:
    """The most likely class of each pixel: of several that are equal the lowest, and NaN is more than any number.

    It is what `F.interpolate(logits.float(), padded, mode="bilinear")[..., :h, :w].argmax(1)` gives, but where classes
    are equal to the last bits of float32: enlarging rounds in another order. On CPUs it takes a tenth of the time.

    Args:
        logits: (b, c, h', w') of a floating type, in any memory format; c up to 256.
        padded: height and width to enlarge to; the logits' own by default.
        size: (h, w) that is then kept, from the upper left corner; all by default.

    Returns:
        (b, h, w) uint8, on the logits' device.
    """
    small = logits.shape[-2], logits.shape[-1]
    padded = padded or small
    height, width = size = size or padded
    factor = enlargement(small, padded)
    # By powers of two all weights are exact, so that blocks of rows give what the whole does. A product with 0 that is
    # not 0 is nothing to be relied on.
    if logits.device.type == "cpu" and (factor == 1 or (factor.bit_count() == 1 and bool(logits.sum().isfinite()))):
        found = [_running_maximum(image, factor, size) for image in logits.detach().float().numpy()]
        if all(known is not None for known in found):
            return torch.from_numpy(np.stack(found))  # type: ignore[arg-type]
    if factor != 1:
        logits = F.interpolate(logits.float(), padded, mode="bilinear")
    # max(1) is vectorised over channels and several times faster than argmax(1), with equal indices.
    return logits[..., :height, :width].max(dim=1).indices.to(torch.uint8)


def _running_maximum(logits: NDArray[np.float32], factor: int, size: Size) -> NDArray[np.uint8] | None:
    """The class map (h, w) of one image's logits (c, h', w'), `factor` times enlarged.

    None where a logit is NaN, or where this is not the faster way.
    """
    height, width = size
    rows, columns = logits.shape[1:]
    in_rows = logits.strides[2] == logits.itemsize  # else the classes of a pixel lie together, as in channels_last
    turned = factor == 1 and not in_rows
    if turned and len(logits) > MOST_TURNED:
        return None
    step = max((TURNED_BLOCK if turned else BLOCK) // (factor**2 * columns), 1)
    beyond = 1 if factor > 1 else 0  # the pixels at a block's edge are made of the row next to it too

    found = np.zeros((height, columns * factor), np.uint8)  # cropping at the end keeps the rows of a block together
    for top in range(0, -(-height // factor), step):
        first, last = max(top - beyond, 0), min(top + step + beyond, rows)
        here = found[top * factor : (top + step) * factor]
        above = (top - first) * factor
        block = logits[:, first:last]
        for number, values in enumerate(block if in_rows else np.ascontiguousarray(block)):
            if factor > 1:
                enlarged = (columns * factor, (last - first) * factor)
                values = cv2.resize(values, enlarged, interpolation=cv2.INTER_LINEAR)
            values = values[above : above + len(here)]
            if number == 0:
                best = values.copy()
                more, candidate = np.empty(here.shape, np.bool_), np.empty(here.shape, np.uint8)
                continue
            np.greater(values, best, out=more)
            np.maximum(values, best, out=best)
            # Numbers rise: the last class that was more than all before it is the largest number.
            np.multiply(more.view(np.uint8), np.uint8(number), out=candidate)
            np.maximum(candidate, here, out=here)
        if np.isnan(best.max(initial=-np.inf)):
            return None
    return found[:, :width]


def count_pixels(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by true and predicted class: a confusion matrix, and under it a row for void.

    Args:
        truth: uint8 class ids or 255, any shape.
        prediction: uint8 class ids of the same shape.
        num_classes: 1 to 255.

    Returns:
        (c + 1, c) int64 on the CPU or the tensors' device; rows are the truth, the last of them void, columns the
        prediction.

    Raises:
        ValueError: the shapes differ, or a label is neither void nor below `num_classes`.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} differ in shape")
    if truth.device.type == "mps":  # its int64 scatter_add_ is not to be relied on
        truth, prediction = truth.cpu(), prediction.cpu()
    if truth.device.type == "cpu":
        return torch.from_numpy(_histogram(truth.numpy(), prediction.numpy(), num_classes))
    void = truth == VOID
    bins = (num_classes + 1) * num_classes
    pairs = torch.where(void, num_classes, truth.to(torch.int32)) * num_classes + prediction
    # What should not be there gets a bin of its own, the last.
    outside = ((truth >= num_classes) & ~void) | (prediction >= num_classes)
    pairs = torch.where(outside, bins, pairs).flatten()
    # bincount synchronises with an accelerator; adding in place does not. Labels were checked when they were read.
    counted = torch.zeros(bins + 1, dtype=torch.int64, device=truth.device)
    counted.scatter_add_(0, pairs.long(), torch.ones_like(pairs, dtype=torch.int64))
    return counted[:-1].reshape(-1, num_classes)


def _histogram(truth: NDArray[np.uint8], prediction: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    maps = [np.ascontiguousarray(labels).reshape(-1) for labels in (truth, prediction)]
    counted = np.zeros((256, num_classes), np.int64)
    for start in range(0, truth.size, EXACT_IN_FLOAT32):
        part = [labels[start : start + EXACT_IN_FLOAT32] for labels in maps]
        counted += cv2.calcHist(part, [0, 1], None, counted.shape, [0, 256, 0, num_classes]).astype(np.int64)
    counts = np.concatenate([counted[:num_classes], counted[VOID:]])
    if counts.sum() != truth.size:
        raise ValueError(f"labels outside 0…{num_classes - 1} that are not {VOID}")
    return counts


def marginals(counts: Tensor) -> Tensor:
    """What the figures need of an image's (c + 1, c) counts, as (4, c) by class.

    The rows are pixels that were hit, true and predicted, all without void, and those predicted on void.
    """
    matrix = counts[:-1]
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0), counts[-1]])
