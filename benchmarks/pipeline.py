"""From files to a normalised float batch on one core: vocseg, from files and from its decoded cache, and its peers.

    python benchmarks/pipeline.py [--rounds 9] [--images 32] [--data ROOT]

Everybody turns the same JPEGs of 500 x 375 and palette PNGs into batches of 8: scaled by 0.5 to 2, cropped to 320 with
void around, mirrored half the time, normalised to float32. Peers normalise image by image, as their presets do; vocseg
stacks uint8 pixels and normalises the batch, as its training step does. Each side is a process of its own, with one
thread, which starts as its users' programs do: for vocseg that is with `vocseg.process.prepare_process`. The figures
are CPU milliseconds an image, medians of rounds in which the sides take turns.

ROOT holds VOCdevkit/VOC2007 (for the real images: `vocseg data fetch voc2007`); without it photographs are drawn.
Checked first: vocseg's crops are distributed as those of the plain recipe (scale the image, cut a window, mirror), the
masks hold no new label and are void outside the image, and the cache gives back the decoded bytes. The rest of the
peers' recipes is theirs: torchvision pads at the right and below only, mmsegmentation looks for a crop that is not
nearly all of one class.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, draw_voc, environment, report, times_faster
from PIL import Image

BATCH, CROP = 8, 320
LONG, SHORT = 500, 375  # VOC's usual size, which peers that scale to a size are told
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Files = Sequence[tuple[Path, Path]]
Batch = Callable[[Sequence[int]], Any]
"""Positions in the list of files to a normalised batch."""


def vocseg_side(files: Files, cache: str = "off", *, prepared: bool = True) -> Batch:
    if prepared:
        from vocseg.process import prepare_process

        prepare_process()
    import torch

    from vocseg.components.augmentations import crop, horizontal_flip, random_scale
    from vocseg.data.cache import cached
    from vocseg.data.dataset import Dataset
    from vocseg.data.images import read_pair
    from vocseg.data.sample import Sample
    from vocseg.network import choose_normalization

    names = [str(index) for index in range(len(files))]
    dataset = Dataset(("?",) * 21, names, lambda index: read_pair(*files[index], 21), files)
    dataset, _ = cached(dataset, cache)
    steps = [random_scale(scale=(0.5, 2.0)), crop(size=CROP), horizontal_flip()]
    normalization = choose_normalization("imagenet", (MEAN, STD))
    seed = 0

    def sample(index: int) -> tuple[Any, Any]:
        nonlocal seed
        seed += 1
        rng = np.random.default_rng((0, 0, seed))
        found = Sample(*dataset.read(index), fill=normalization.fill)
        for step in steps:
            step(found, rng)
        return found.image, found.mask

    def batch(indices: Sequence[int]) -> Any:
        images, masks = zip(*map(sample, indices), strict=True)
        return normalization(torch.from_numpy(np.stack(images))), torch.from_numpy(np.stack(masks))

    return batch


def torchvision_side(files: Files) -> Batch:
    """As references/segmentation of torchvision 0.25 trains: presets.py, transforms.py and the collate of utils.py."""
    import torch
    from torchvision.transforms import InterpolationMode, RandomCrop
    from torchvision.transforms import functional as F

    def sample(image: Any, target: Any) -> tuple[Any, Any]:
        size = random.randint(SHORT // 2, SHORT * 2)
        image, target = F.resize(image, size), F.resize(target, size, interpolation=InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, target = F.hflip(image), F.hflip(target)
        if min(image.size) < CROP:
            padding = [0, 0, max(0, CROP - image.width), max(0, CROP - image.height)]
            image, target = F.pad(image, padding, fill=0), F.pad(target, padding, fill=255)
        window = RandomCrop.get_params(image, (CROP, CROP))
        image, target = F.crop(image, *window), F.crop(target, *window)
        pixels = F.convert_image_dtype(F.pil_to_tensor(image), torch.float)
        return F.normalize(pixels, mean=MEAN, std=STD), torch.as_tensor(np.array(target), dtype=torch.int64)

    def collate(tensors: list[Any], fill: int) -> Any:
        batch = tensors[0].new(len(tensors), *tensors[0].shape).fill_(fill)
        for tensor, place in zip(tensors, batch, strict=True):
            place[..., : tensor.shape[-2], : tensor.shape[-1]].copy_(tensor)
        return batch

    def batch(indices: Sequence[int]) -> Any:
        pairs = [sample(Image.open(files[i][0]).convert("RGB"), Image.open(files[i][1])) for i in indices]
        return collate([image for image, _ in pairs], 0), collate([target for _, target in pairs], 255)

    return batch


def albumentations_side(files: Files) -> Batch:
    import albumentations
    import cv2
    import torch
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)
    steps = albumentations.Compose(
        [
            albumentations.RandomScale((-0.5, 1.0), p=1),
            albumentations.PadIfNeeded(CROP, CROP, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=255),
            albumentations.RandomCrop(CROP, CROP),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Normalize(MEAN, STD),
            ToTensorV2(),
        ]
    )

    def sample(image: Path, mask: Path) -> dict[str, Any]:
        pixels = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
        return steps(image=pixels, mask=np.array(Image.open(mask)))

    def batch(indices: Sequence[int]) -> Any:
        samples = [sample(*files[i]) for i in indices]
        return torch.stack([s["image"] for s in samples]), torch.stack([s["mask"] for s in samples])

    return batch


def mmsegmentation_side(files: Files, scale: tuple[int, int] = (LONG, SHORT), *, photometric: bool = True) -> Batch:
    """configs/_base_/datasets/pascal_voc12.py with another crop, and the data preprocessor of its models."""
    import mmcv

    # mmcv-lite has no compiled operators, which this pipeline does not use, and mmseg 1.2.2 asks for mmcv < 2.2.
    class Missing(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    sys.modules.setdefault("mmcv._ext", Missing("mmcv._ext"))
    mmcv.__version__ = min(mmcv.__version__, "2.1.0")
    import cv2
    import mmseg.datasets.transforms  # noqa: F401 - registers them
    from mmcv.transforms import Compose
    from mmengine.registry import DefaultScope
    from mmseg.models.data_preprocessor import SegDataPreProcessor

    cv2.setNumThreads(0)
    DefaultScope.get_instance("benchmark", scope_name="mmseg")
    steps = Compose(
        [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations"},
            {"type": "RandomResize", "scale": scale, "ratio_range": (0.5, 2.0), "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": (CROP, CROP), "cat_max_ratio": 0.75},
            {"type": "RandomFlip", "prob": 0.5},
            *([{"type": "PhotoMetricDistortion"}] if photometric else []),
            {"type": "PackSegInputs"},
        ]
    )
    preprocessor = SegDataPreProcessor(
        mean=[255 * m for m in MEAN], std=[255 * s for s in STD], bgr_to_rgb=True, size=(CROP, CROP)
    )

    def batch(indices: Sequence[int]) -> Any:
        samples = [
            steps(
                {
                    "img_path": str(files[i][0]),
                    "seg_map_path": str(files[i][1]),
                    "reduce_zero_label": False,
                    "seg_fields": [],
                }
            )
            for i in indices
        ]
        packed = {key: [s[key] for s in samples] for key in ("inputs", "data_samples")}
        return preprocessor(packed, training=True)

    return batch


SIDES: dict[str, Callable[[Files, str], Batch]] = {
    "vocseg": lambda files, cache: vocseg_side(files),
    "vocseg, without its process settings": lambda files, cache: vocseg_side(files, prepared=False),
    "vocseg, cache on disk": lambda files, cache: vocseg_side(files, cache),
    "vocseg, cache in memory": lambda files, cache: vocseg_side(files, "auto"),
    "torchvision references": lambda files, cache: torchvision_side(files),
    "albumentations": lambda files, cache: albumentations_side(files),
    "mmsegmentation": lambda files, cache: mmsegmentation_side(files),
    "mmsegmentation, scaled to 512 as in its configuration": lambda files, cache: mmsegmentation_side(
        files, (2048, 512)
    ),
    "mmsegmentation, without PhotoMetricDistortion": lambda files, cache: mmsegmentation_side(files, photometric=False),
}


def check(files: Files, cache: str) -> dict[str, Any]:
    """That vocseg's crops are those of the plain recipe, and its cache holds what decoding gives.

    Raises:
        SystemExit: they are not, or it does not.
    """
    import cv2

    from vocseg.components.augmentations import crop, horizontal_flip, random_scale
    from vocseg.data.cache import cached
    from vocseg.data.dataset import Dataset
    from vocseg.data.images import read_pair
    from vocseg.data.sample import Sample

    # In this image red and green tell x and y, so that where a crop looks can be read off it.
    side, draws = 128, 2000
    y, x = np.mgrid[:192, :240]
    image, mask = np.stack([x, y, x], axis=-1).astype(np.uint8), ((x // 6 + y // 6) % 20).astype(np.uint8)
    steps = [random_scale(scale=(0.5, 2.0)), crop(size=side), horizontal_flip()]
    ours, theirs = np.empty((draws, 3)), np.empty((draws, 3))
    mirrored = 0
    for draw in range(draws):
        sample, rng = Sample(image, mask), np.random.default_rng((1, draw))
        for step in steps:
            step(sample, rng)
        inside = sample.mask != 255
        if not np.isin(sample.mask, [*range(20), 255]).all():
            sys.exit("a mask holds a label that is not in the source")
        outside = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0  # the rim mixes image and fill
        if (sample.image[outside] != sample.fill).any():
            sys.exit("the image is not filled where the mask is void")
        lines = []
        for channel, along in ((0, inside[inside.sum(1).argmax()]), (1, inside[:, inside.sum(0).argmax()])):
            rows = sample.image[inside.sum(1).argmax()] if channel == 0 else sample.image[:, inside.sum(0).argmax()]
            at = np.flatnonzero(along)[3:-3]
            slope, start = np.polyfit(at + 0.5, rows[at, channel] + 0.5, 1)
            lines.append((slope, start + slope * side / 2))
        ours[draw] = 1 / abs(lines[0][0]), lines[0][1], lines[1][1]
        mirrored += lines[0][0] < 0
        # The plain recipe, in other random numbers.
        plain = np.random.default_rng((2, draw))
        factor = plain.uniform(0.5, 2.0)
        middles = []
        for extent in (240, 192):
            scaled = round(extent * factor)
            corner = plain.integers(min(0, scaled - side), max(0, scaled - side), endpoint=True)
            middles.append((corner + side / 2) * extent / scaled)
        theirs[draw] = factor, *middles
    distances = []
    for a, b in zip(ours.T, theirs.T, strict=True):
        values = np.sort(np.concatenate([a, b]))
        shares = [np.searchsorted(np.sort(found), values, side="right") / draws for found in (a, b)]
        distances.append(float(np.abs(shares[0] - shares[1]).max()))
    limit = 1.95 * (2 / draws) ** 0.5  # Kolmogorov and Smirnov at one in a thousand
    if max(distances) > limit or abs(mirrored - draws / 2) > 3.3 * (draws / 4) ** 0.5:
        sys.exit(f"the crops are distributed otherwise: {distances}, {mirrored} of {draws} mirrored")

    plain_reader = Dataset(
        ("?",) * 21, [str(i) for i in range(len(files))], lambda i: read_pair(*files[i], 21), list(files)
    )
    for setting in (cache, "auto"):
        kept, note = cached(plain_reader, setting)
        for index in [*range(len(files))] * 2:
            for found, decoded in zip(kept.read(index), plain_reader.read(index), strict=True):
                if not np.array_equal(found, decoded):
                    sys.exit(f"{note}: the pixels of {files[index][0]} are not those decoded")
    return {
        "furthest apart": {name: round(d, 4) for name, d in zip(("scale", "across", "down"), distances, strict=True)},
        "limit": round(limit, 4),
        "mirrored": mirrored / draws,
        "cache": "equal to decoding",
    }


def serve(side: str, files: Files, cache: str) -> None:
    """The process of one side: for each line of positions on standard input, the CPU seconds that these images took."""
    import torch

    torch.set_num_threads(1)
    try:
        batch = SIDES[side](files, cache)
    except ImportError as error:
        print(f"not installed: {error}", flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        positions = [int(word) for word in line.split()]
        begun = time.process_time()
        for start in range(0, len(positions), BATCH):
            batch(positions[start : start + BATCH])
        print(time.process_time() - begun, flush=True)


def measure(command: list[str], images: int, rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """CPU seconds an image of each side, in processes that take turns; and why a side is missing."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    running: dict[str, subprocess.Popen[str]] = {}
    missing: dict[str, str] = {}
    try:
        for side in SIDES:
            process = subprocess.Popen(
                [*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
            )
            said = _line(process)
            if said == "ready":
                running[side] = process
            else:
                process.communicate()
                missing[side] = said or "failed to start"
        times: dict[str, list[float]] = {side: [] for side in running}
        for number in range(rounds + 2):
            for side, process in running.items():
                assert process.stdin is not None
                print(*range(images), file=process.stdin, flush=True)
                seconds = float(_line(process))
                if number > 1:  # the first rounds fill caches
                    times[side].append(seconds / images)
    finally:
        for process in running.values():
            process.communicate()
    return {side: statistics.median(found) for side, found in times.items()}, missing


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def main() -> None:
    given = arguments(__doc__, 9, images=32, data=None, cache="auto", side="all")
    with tempfile.TemporaryDirectory() as temporary:
        root = given.data or draw_voc(Path(temporary), given.images)
        folder = root / "VOCdevkit" / "VOC2007"
        names = (folder / "ImageSets/Segmentation/train.txt").read_text().split()[: given.images]
        files = [(folder / f"JPEGImages/{n}.jpg", folder / f"SegmentationClass/{n}.png") for n in names]
        if given.side in SIDES:
            serve(given.side, files, given.cache)
            return
        cache = f"{temporary}/decoded"
        checked = check(files, cache)
        command = [sys.executable, "-W", "ignore", __file__, "--data", str(root), "--cache", cache]
        seconds, missing = measure([*command, "--images", str(len(files))], len(files), given.rounds)
    ours = [side for side in seconds if side.startswith("vocseg")]
    report(
        environment=environment(
            "simplejpeg", "isal", "pillow", "opencv-python-headless", "torchvision", "albumentations", "mmsegmentation"
        ),
        images="VOC 2007" if given.data else "drawn",
        checked=checked,
        missing=missing,
        milliseconds_an_image={side: round(1000 * value, 3) for side, value in seconds.items()},
        times_faster={
            side: times_faster({side: seconds[side]} | {s: v for s, v in seconds.items() if s not in ours}, side)
            for side in ours
        },
    )


if __name__ == "__main__":
    main()
