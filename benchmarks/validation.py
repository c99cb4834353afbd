"""What a validation pass costs beyond the forward passes in it, and the memory it takes for many images.

    python benchmarks/validation.py [--images 6] [--rounds 3] [--data DIR] > validation.json

Time: `evaluate`, from files to loss and counts, over the sum of its forward passes, for smp's U-Net on ResNet34 and
`classifier_fpn` on EfficientNet-Lite0, 21 classes, images of VOC's size, fp32 and bf16, one and two threads. Images are
read from files, which a thread does beside the network, or lie in memory, as in the cache. A forward pass is

- `logits`: pixels are normalised, the network runs, its logits are upsampled; which is what a peer's network does;
- `network`: the network alone, on tensors that are ready, to logits of its own size.

`--data` is a folder with VOCdevkit/VOC2007; without it photographs are drawn.

Memory: what the process holds more at most after a pass and the figures of 100,000 images than of 100, for a network of
one layer on images of 16 x 16.

Checked first: the matrix of a pass is that of the logits' argmax, image by image, counted in numpy over int64, and the
loss is the mean of the images'.
"""

# ruff: noqa: E402 - settings of the process come before torch

import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import arguments, draw_voc, environment, report

from vocseg.process import prepare_process

prepare_process()  # as `vocseg run` does, before torch is imported

import numpy as np
import torch
from torch import nn

from vocseg.components.losses import cross_entropy
from vocseg.data.dataset import Dataset
from vocseg.data.voc import voc
from vocseg.device import Placement
from vocseg.evaluate.figures import figures
from vocseg.evaluate.inference import Predictor
from vocseg.evaluate.validation import Evaluation, evaluate
from vocseg.network import Normalization, stride_of
from vocseg.plugins import discover

CLASSES, VOID = 21, 255
HALF = Normalization(torch.full((3,), 127.5), torch.full((3,), 127.5))
NETWORKS = {
    "U-Net/ResNet34": ("smp", {"decoder": "Unet", "encoder": "resnet34"}, "segmentation_head.0"),
    "classifier_fpn/Lite0": ("classifier_fpn", {"encoder": "tf_efficientnet_lite0"}, "classify"),
}


def main() -> None:
    given = arguments(__doc__, rounds=3, images=6, data=None)
    loss = cross_entropy(CLASSES, lambda: torch.ones(CLASSES))
    memory_of_many = many_images(loss)  # first: what larger networks leave behind would be used again
    with tempfile.TemporaryDirectory() as folder:
        root = given.data or draw_voc(Path(folder), images=given.images)
        files = first(voc(root, "val", year=2007), given.images)
        pairs = [files.read(index) for index in range(len(files))]
        memory = Dataset(files.classes, files.names, pairs.__getitem__)
        found = {}
        for name, precision in itertools.product(NETWORKS, ("bf16", "fp32")):
            predictor = build(name, precision, pairs[0][0])
            check(predictor, memory, loss)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found[f"{name}, {precision}, {threads} threads"] = times(predictor, files, memory, loss, given.rounds)
    report(
        environment=environment("segmentation-models-pytorch", "timm", "numpy"),
        checked="matrix and loss equal to those of the logits, image by image",
        images=len(files),
        times=found,
        memory=memory_of_many,
    )


def first(dataset: Dataset, count: int) -> Dataset:
    return Dataset(dataset.classes, dataset.names[:count], dataset.read)


def build(name: str, precision: str, image: np.ndarray) -> Predictor:
    torch.manual_seed(0)
    architecture, params, last = NETWORKS[name]
    network = discover().get("architecture", architecture).build({"num_classes": CLASSES}, params)
    placement = Placement(torch.device("cpu"), precision)
    placement.place(network).eval()
    predictor = Predictor(network, placement, stride_of(network), HALF)
    # An untrained network's logits may be in the hundreds, and exponentials that underflow take twice as long.
    scale = 10 / float(predictor.logits(image).abs().max())
    with torch.no_grad():
        for parameter in network.get_submodule(last).parameters():
            parameter *= scale
    return predictor


def passed(predictor: Predictor, dataset: Dataset, loss: Callable) -> Evaluation:
    scoring = evaluate(predictor, dataset, loss)
    while True:
        try:
            next(scoring)
        except StopIteration as end:
            return end.value


def check(predictor: Predictor, dataset: Dataset, loss: Callable) -> None:
    matrix, losses = np.zeros((CLASSES, CLASSES), np.int64), []
    undecided = 0
    for index in range(len(dataset)):
        image, mask = dataset.read(index)
        logits = predictor.logits(image)
        known = mask != VOID
        np.add.at(matrix, (mask[known], logits.argmax(1)[0].numpy()[known]), 1)
        best = logits.topk(2, dim=1).values
        undecided += int(((best[:, 0] - best[:, 1]) < 1e-5).sum())
        losses.append(float(loss(logits, torch.tensor(mask)[None].long())))
    found = passed(predictor, dataset, loss)
    assert np.abs(found.matrix - matrix).sum() <= 2 * undecided, "counts differ"
    assert abs(found.loss - np.mean(losses)) < 1e-4 * abs(np.mean(losses)), "losses differ"


def times(predictor: Predictor, files: Dataset, memory: Dataset, loss: Callable, rounds: int) -> dict[str, Any]:
    images = [memory.read(index)[0] for index in range(len(memory))]
    ready = [HALF(torch.tensor(image)[None]) for image in images]

    def network() -> None:
        with torch.inference_mode(), predictor.placement.autocast():
            for image in ready:
                sides = image.shape[-1] % predictor.stride, image.shape[-2] % predictor.stride
                padding = (0, -sides[0] % predictor.stride, 0, -sides[1] % predictor.stride)
                predictor.network(nn.functional.pad(image, padding))

    sides: dict[str, Callable[[], Any]] = {
        "network": network,
        "logits": lambda: [predictor.logits(image) for image in images],
        "pass, in memory": lambda: passed(predictor, memory, loss),
        "pass, from files": lambda: passed(predictor, files, loss),
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            begun, begun_cpu = time.perf_counter(), time.process_time()
            run()
            if number:
                wall[name].append((time.perf_counter() - begun) / len(images))
                cpu[name].append((time.process_time() - begun_cpu) / len(images))
    seconds = {
        kind: {n: statistics.median(v) for n, v in found.items()} for kind, found in (("wall", wall), ("cpu", cpu))
    }
    figures: dict[str, Any] = {
        f"ms an image, {kind}": {name: round(1e3 * value, 2) for name, value in found.items()}
        for kind, found in seconds.items()
    }
    for kind, found in seconds.items():
        for name in ("pass, in memory", "pass, from files"):
            over = {forward: round(found[name] / found[forward], 3) for forward in ("logits", "network")}
            figures[f"{name}, {kind}, over"] = over
    return figures


class OneLayer(nn.Module):
    stride = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images[..., ::4, ::4])


def many_images(loss: Callable) -> dict[str, Any]:
    predictor = Predictor(OneLayer(), Placement(torch.device("cpu"), "fp32"), 8, HALF)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = rng.integers(0, CLASSES, (16, 16), dtype=np.uint8)
    names = tuple(map(str, range(CLASSES)))
    found: dict[str, Any] = {}
    most = []
    for count in (100, 100_000):
        dataset = Dataset(names, [""] * count, lambda _: (image, mask))
        begun = time.perf_counter()
        evaluation = passed(predictor, dataset, loss)
        scored = time.perf_counter()
        figures(evaluation, names)
        found[f"{count} images"] = {
            "us an image": round(1e6 * (scored - begun) / count, 1),
            "s for the figures": round(time.perf_counter() - scored, 3),
        }
        most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
        assert evaluation.per_image.shape == (count, 4, CLASSES)
        assert evaluation.matrix.sum() == 256 * count
    return found | {
        "MB more for 100,000 than for 100": round((most[1] - most[0]) / 1e6, 1),
        "bytes an image": round((most[1] - most[0]) / 99_900),
    }


if __name__ == "__main__":
    main()
