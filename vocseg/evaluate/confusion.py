"""Counting pixels: one confusion matrix an image, in whole numbers."""

import numpy as np
import torch
from torch import Tensor

from vocseg.data.dataset import VOID


def class_map(logits: Tensor) -> Tensor:
    """The most likely class of each pixel: (b, c, h, w) logits to (b, h, w) uint8."""
    # On CPUs max(1) is vectorised over channels and several times faster than argmax(1), with equal indices.
    return logits.max(dim=1).indices.to(torch.uint8)


def confusion_matrix(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Counts pixels by true and predicted class, leaving void out.

    Args:
        truth: uint8 class ids or 255, any shape.
        prediction: uint8 class ids of the same shape.

    Returns:
        (c, c) int64 on the CPU or the tensors' device; rows are the truth, columns the prediction.

    Raises:
        ValueError: the shapes differ, or a label is neither void nor below `num_classes`.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {tuple(truth.shape)} and prediction {tuple(prediction.shape)} differ in shape")
    if truth.device.type == "mps":  # its int64 scatter_add_ is not to be relied on
        truth, prediction = truth.cpu(), prediction.cpu()
    # Void and anything else outside gets a bin of its own, the last, which must hold void alone.
    pairs = truth.to(torch.int32) * num_classes + prediction.to(torch.int32)
    outside = (truth >= num_classes) | (prediction >= num_classes)
    pairs = torch.where(outside, num_classes * num_classes, pairs).flatten()
    if truth.device.type == "cpu":
        if bool((outside & (truth != VOID)).any()):
            raise ValueError(f"labels outside 0…{num_classes - 1} that are not {VOID}")
        counts = np.bincount(pairs.numpy(), minlength=num_classes * num_classes + 1)
        return torch.from_numpy(counts[:-1].astype(np.int64)).reshape(num_classes, num_classes)
    # bincount synchronises with an accelerator; adding in place does not. Labels were checked when they were read.
    bins = torch.zeros(num_classes * num_classes + 1, dtype=torch.int64, device=truth.device)
    bins.scatter_add_(0, pairs.long(), torch.ones_like(pairs, dtype=torch.int64))
    return bins[:-1].reshape(num_classes, num_classes)
