"""Whether time and memory an image stay the same however many images there are: lists, order, first batch, cache.

    python benchmarks/scale_data.py [--images 100000] [--rounds 5]

A hundredth of the images is set beside all of them. They are small
photographs and palette masks, of which a handful is linked to under as many names as it takes, in a temporary folder.
For each data set the figures are microseconds of CPU an image (medians) and bytes an image that stay in memory; for
batches, milliseconds of CPU until the first one of an epoch is there, all of reading included.

Checked first: every image is listed once, an epoch shows each once, and the cache gives back what decoding gives.
"""

import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, draw_voc, environment, report

from vocseg.components.augmentations import crop, horizontal_flip, random_scale
from vocseg.data.cache import cached
from vocseg.data.dataset import Dataset
from vocseg.data.folder import folder
from vocseg.data.loader import TrainingBatches
from vocseg.data.stats import class_pixels
from vocseg.data.synthetic import synthetic
from vocseg.data.voc import VOC_CLASSES, voc

_LINKS = 10_000  # names a file may have; file systems allow some ten thousand
_READ = 2_000  # images that are read where reading all would take too long


def tree(root: Path, drawn: Path, images: int) -> Path:
    """VOC's folders with so many images; they serve the data set `folder`, too."""
    source, kit = drawn / "VOCdevkit" / "VOC2007", root / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (kit / part).mkdir(parents=True)
    names = [f"{number:09d}" for number in range(images)]
    for part, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        for number, name in enumerate(names):
            file = kit / part / f"{name}.{suffix}"
            if number % _LINKS == 0:
                file.write_bytes((source / part / f"{number // _LINKS % 8:06d}.{suffix}").read_bytes())
                first = file
            else:
                os.link(first, file)
    (kit / "ImageSets/Segmentation/train.txt").write_text("\n".join(names) + "\n")
    return root


def an_image(run: Callable[[], Any], images: int, rounds: int) -> dict[str, float]:
    """CPU microseconds an image that a call takes, and bytes an image that its result does."""
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    tracemalloc.start()
    held = run()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del held
    return {"microseconds": round(1e6 * statistics.median(times) / images, 3), "bytes": round(kept / images, 1)}


def figures(root: Path, drawn: Path, images: int, rounds: int) -> dict[str, Any]:
    tree(root, drawn, images)
    kit = root / "VOCdevkit" / "VOC2012"
    opened: dict[str, Callable[[], Dataset]] = {
        "voc": lambda: voc(root, "train"),
        "folder": lambda: folder(kit, "all", classes=VOC_CLASSES, images="JPEGImages", masks="SegmentationClass"),
        "synthetic": lambda: synthetic("train", images=images),
    }
    for name, build in opened.items():
        names = build().names
        if len(set(names)) != len(names) or len(names) != images:
            sys.exit(f"{name} lists {len(names)} names of {images} images")
    found: dict[str, Any] = {f"list of {name}": an_image(build, images, rounds) for name, build in opened.items()}

    dataset = opened["voc"]()
    steps = [random_scale(scale=(0.5, 2.0)), crop(size=64), horizontal_flip()]
    batches = TrainingBatches(dataset, steps, batch_size=8, seed=0, workers=1)
    order = np.random.default_rng((0, 0)).permutation(images)
    if not np.array_equal(np.sort(order), np.arange(images)):
        sys.exit("an epoch does not show each image once")
    found["order"] = an_image(lambda: np.random.default_rng((0, 0)).permutation(images), images, rounds)
    first = []
    for epoch in range(rounds):
        begun = time.process_time()
        running = batches.epoch(epoch)
        next(running)
        first.append(time.process_time() - begun)
        running.close()
    found["first batch of an epoch"] = {"milliseconds": round(1000 * statistics.median(first), 2)}

    kept, _ = cached(dataset, str(root / "decoded"))
    for index in (0, images // 2, images - 1):
        for _ in range(2):
            if not all(map(np.array_equal, kept.read(index), dataset.read(index))):
                sys.exit("the cache gives back something else")
    some = np.linspace(0, images - 1, min(images, _READ)).astype(int).tolist()

    def read(source: Dataset) -> None:
        for index in some:
            source.read(index)

    found["opening the cache"] = an_image(lambda: cached(dataset, str(root / "decoded")), images, rounds)
    read(kept)  # fills it
    found["an image from the cache on disk"] = an_image(lambda: read(kept), len(some), rounds)
    found["an image from its files"] = an_image(lambda: read(dataset), len(some), rounds)

    # Going through a data set on threads, without the time that reading takes.
    pair = dataset.read(0)
    unread = Dataset(dataset.classes, dataset.names, lambda index: pair)
    found["counting classes"] = an_image(lambda: class_pixels(unread), images, 1)
    tracemalloc.start()
    class_pixels(unread)
    found["counting classes"]["peak bytes"] = round(tracemalloc.get_traced_memory()[1] / images, 1)
    tracemalloc.stop()
    return found


def main() -> None:
    given = arguments(__doc__, 5, images=100_000)
    measured = {}
    with tempfile.TemporaryDirectory() as temporary:
        drawn = draw_voc(Path(temporary, "drawn"), 8, size=(72, 96))
        for images in (given.images // 100, given.images):
            measured[images] = figures(Path(temporary, str(images)), drawn, images, given.rounds)
    few, many = measured.values()
    report(
        environment=environment("numpy", "pillow"),
        figures={f"{images:,} images": figures for images, figures in measured.items()},
        times_more={
            what: {unit: round(many[what][unit] / max(few[what][unit], 1e-9), 2) for unit in few[what]} for what in few
        },
        megabytes_of_lists={
            f"{images:,}": round(f["list of voc"]["bytes"] * images / 1e6, 1) for images, f in measured.items()
        },
    )


if __name__ == "__main__":
    main()
