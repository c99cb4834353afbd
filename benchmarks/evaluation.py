"""From a network's logits at a quarter of the image's size to the confusion matrix: one image of 500 x 500, 21 classes.

    python benchmarks/evaluation.py [--rounds 15] > evaluation.json

CPU time of one thread, and wall time with two, of bilinear upsampling, the class of each pixel, and counting pixels
against a mask with void. The peers do what their own evaluation does:

- torchvision references: F.interpolate, which ends their networks; argmax(1); the ConfusionMatrix of their utils.py.
- mmsegmentation: resize (F.interpolate) and argmax(dim=0); IoUMetric.intersect_and_union, which is four histograms.
- Lightning + torchmetrics: F.interpolate and argmax(1) in a validation step; MulticlassConfusionMatrix, or
  MulticlassJaccardIndex, updated.

Logits lie as contiguous networks give them, which is how the peers' run; and as channels_last ones do, ours by default.

Checked first: the class maps differ in no pixel whose best class is ahead of the next by more than rounding, and all
matrices are that of a loop over int64 in numpy.
"""

# ruff: noqa: E402 - settings of the process come before torch

import sys
import time
import types
import warnings
from collections.abc import Callable

from measure import alternate, arguments, environment, peers, report, times_faster

from vocseg.process import prepare_process

prepare_process()  # as `vocseg run` does, before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vocseg.data.sample import Sample  # noqa: F401 - which keeps OpenCV to one thread, as everywhere in vocseg
from vocseg.evaluate.confusion import class_map, count_pixels

CLASSES, VOID, SIZE = 21, 255, (500, 500)

Side = Callable[[Tensor, Tensor], Tensor]
"""Logits (1, c, h / 4, w / 4) and a mask (1, h, w) of uint8 to what is counted; a matrix, or marginals."""


def ours() -> Side:
    return lambda logits, mask: count_pixels(mask, class_map(logits, SIZE), CLASSES)[:-1]


def upsampled(logits: Tensor) -> Tensor:
    return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)


def torchvision_references() -> Side:
    class ConfusionMatrix:  # references/segmentation/utils.py, which is not in the package
        def __init__(self, num_classes: int):
            self.num_classes = num_classes
            self.mat: Tensor | None = None

        def update(self, a: Tensor, b: Tensor) -> None:
            n = self.num_classes
            if self.mat is None:
                self.mat = torch.zeros((n, n), dtype=torch.int64, device=a.device)
            with torch.inference_mode():
                k = (a >= 0) & (a < n)
                inds = n * a[k].to(torch.int64) + b[k]
                self.mat += torch.bincount(inds, minlength=n**2).reshape(n, n)

    def evaluate(logits: Tensor, target: Tensor) -> Tensor:
        confmat = ConfusionMatrix(CLASSES)
        confmat.update(target.flatten(), upsampled(logits).argmax(1).flatten())
        assert confmat.mat is not None
        return confmat.mat

    return evaluate


def mmsegmentation() -> Side:
    import mmcv

    # mmcv-lite has no compiled operators, which this does not use, and mmseg 1.2.2 asks for mmcv < 2.2.
    mmcv.__version__ = min(mmcv.__version__, "2.1.0")
    sys.modules.setdefault("mmcv._ext", types.ModuleType("mmcv._ext"))
    from mmseg.evaluation.metrics import IoUMetric

    def evaluate(logits: Tensor, target: Tensor) -> Tensor:
        prediction = upsampled(logits)[0].argmax(dim=0, keepdim=True).squeeze()
        label = target.squeeze().to(prediction)
        intersect, _, predicted, true = IoUMetric.intersect_and_union(prediction, label, CLASSES, VOID)
        return torch.stack([intersect, true, predicted]).long()

    return evaluate


def torchmetrics_matrix() -> Side:
    from torchmetrics.classification import MulticlassConfusionMatrix

    metric = MulticlassConfusionMatrix(CLASSES, ignore_index=VOID)
    return lambda logits, target: updated(metric, logits, target)


def torchmetrics_jaccard() -> Side:
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(CLASSES, ignore_index=VOID)
    return lambda logits, target: updated(metric, logits, target)


def updated(metric: torch.nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    metric.reset()  # type: ignore[operator]
    metric.update(upsampled(logits).argmax(1), target)  # type: ignore[operator]
    return metric.confmat  # type: ignore[return-value]


PEERS = {
    "torchvision references": torchvision_references,
    "mmsegmentation": mmsegmentation,
    "Lightning + torchmetrics, confusion matrix": torchmetrics_matrix,
    "Lightning + torchmetrics, Jaccard index": torchmetrics_jaccard,
}


def main() -> None:
    given = arguments(__doc__, rounds=15)
    warnings.simplefilter("ignore")  # the peers'
    found, missing = peers(PEERS)
    sides = {"ours": ours(), **found}
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, CLASSES, SIZE[0] // 4, SIZE[1] // 4, generator=generator)
    mask = torch.randint(0, CLASSES, (1, *SIZE), dtype=torch.uint8, generator=generator)
    mask[:, :40] = VOID
    target = mask.long()  # which is what the peers' pipelines make of it
    layouts = {"contiguous": logits, "channels_last": logits.contiguous(memory_format=torch.channels_last)}
    truths = {name: mask if name == "ours" else target for name in sides}

    with torch.inference_mode():
        checked = check(sides, layouts, truths)
        figures = {}
        for threads, clock in ((1, time.thread_time), (2, time.perf_counter)):
            torch.set_num_threads(threads)
            for name, laid_out in layouts.items():
                runs = {side: (lambda s=side, x=laid_out: sides[s](x, truths[s])) for side in sides}
                seconds = alternate(runs, given.rounds, clock)
                kind = "ms of CPU, 1 thread" if threads == 1 else "ms, 2 threads"
                figures[f"{name}, {kind}"] = {side: round(1e3 * value, 3) for side, value in seconds.items()}
                figures[f"{name}, {kind}: times as fast as"] = times_faster(seconds, "ours")
    versions = environment("torchvision", "mmsegmentation", "mmcv-lite", "lightning", "torchmetrics", "numpy")
    report(environment=versions, missing=missing, checked=checked, **figures)


def check(sides: dict[str, Side], layouts: dict[str, Tensor], truths: dict[str, Tensor]) -> str:
    logits, mask = layouts["contiguous"], truths["ours"]
    best = upsampled(logits).topk(2, dim=1)
    clear = (best.values[:, 0] - best.values[:, 1]) > 1e-5
    prediction = best.indices[:, 0]
    for laid_out in layouts.values():
        assert torch.equal(class_map(laid_out, SIZE).long()[clear], prediction[clear]), "class maps differ"
    expected = np.zeros((CLASSES, CLASSES), np.int64)
    known = (mask != VOID) & clear  # what rounding decides is counted by nobody here
    np.add.at(expected, (mask[known].long().numpy(), prediction[known].numpy()), 1)
    matrix = torch.from_numpy(expected)
    marginals = torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])
    for name, side in sides.items():
        only_clear = torch.where(clear, truths[name], VOID)
        for laid_out in layouts.values():
            counts = side(laid_out, only_clear)
            want = marginals if len(counts) == 3 else matrix
            assert torch.equal(counts, want), f"{name}: counts differ from numpy's"
    return f"counts equal to numpy's; {int((~clear).sum())} pixels left out, which rounding decides"


if __name__ == "__main__":
    main()
