"""Counting pixels of an image by true and predicted class, in whole numbers."""

import numpy as np
import torch
from torch import Tensor

from vocseg.data.dataset import VOID


def class_map(logits: Tensor) -> Tensor:
    """The most likely class of each pixel: (b, c, h, w) logits to (b, h, w) uint8."""
    # On CPUs max(1) is vectorised over channels and several times faster than argmax(1), with equal indices.
    return logits.max(dim=1).indices.to(torch.uint8)


def count_pixels(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by true and predicted class: a confusion matrix, and under it a row for void.

    Args:
        truth: uint8 class ids or 255, any shape.
        prediction: uint8 class ids of the same shape.

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
    void = truth == VOID
    bins = (num_classes + 1) * num_classes
    pairs = torch.where(void, num_classes, truth.to(torch.int32)) * num_classes + prediction
    # What should not be there gets a bin of its own, the last.
    outside = ((truth >= num_classes) & ~void) | (prediction >= num_classes)
    pairs = torch.where(outside, bins, pairs).flatten()
    if truth.device.type == "cpu":
        counts = np.bincount(pairs.numpy(), minlength=bins + 1)
        if counts[-1]:
            raise ValueError(f"labels outside 0…{num_classes - 1} that are not {VOID}")
        return torch.from_numpy(counts[:-1].astype(np.int64)).reshape(-1, num_classes)
    # bincount synchronises with an accelerator; adding in place does not. Labels were checked when they were read.
    counted = torch.zeros(bins + 1, dtype=torch.int64, device=truth.device)
    counted.scatter_add_(0, pairs.long(), torch.ones_like(pairs, dtype=torch.int64))
    return counted[:-1].reshape(-1, num_classes)


def marginals(counts: Tensor) -> Tensor:
    """What the figures need of an image's (c + 1, c) counts, as (4, c) by class.

    The rows are pixels that were hit, true and predicted, all without void, and those predicted on void.
    """
    matrix = counts[:-1]
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0), counts[-1]])
