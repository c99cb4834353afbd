"""Batches on their way to the device: the next one travels while the network trains on the one before it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vocseg.data.loader import Batch
from vocseg.data.render import Views
from vocseg.device import Placement


def on_device(batches: Iterator[Batch], placement: Placement) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches as images (b, h, w, 3) uint8 and labels (b, h, w) uint8, on the device.

    To CUDA each is copied one batch ahead, on a stream of its own: beside the kernels of the step before, where the
    batch lies in pinned memory, and without the host waiting for anything. The stream that takes a batch waits for its
    copy. To other devices a batch is sent when it is asked for, and on the CPU it is already.
    """
    if placement.device.type == "cuda":
        batches = _one_ahead(batches, placement.device)
    elif placement.device.type != "cpu":
        batches = (_map(placement.send, batch) for batch in batches)
    for batch in batches:
        yield batch.render() if isinstance(batch, Views) else batch


def _one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    copying = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            sent = _map(lambda tensor: tensor.to(device, non_blocking=True), batch)
        coming = sent, copying.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = coming
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(sent: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, to be used by the current stream."""
    using = torch.cuda.current_stream(sent[0].device)
    using.wait_event(copied)  # not the copying stream as a whole, where the next batch is on its way already
    for tensor in sent:
        tensor.record_stream(using)  # its memory, which is the copying stream's, is not given away before it is used
    return sent


def _map(send: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    if isinstance(batch, Views):
        return Views(*map(send, batch))
    images, labels = batch
    return send(images), send(labels)
