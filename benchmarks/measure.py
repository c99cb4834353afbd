"""What the measurements here share: the machine in words, alternating medians, peers that may be missing, photographs.

A script beside this one imports it as `from measure import ...`, which works when it is run as a file.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def environment(*packages: str) -> dict[str, Any]:
    """The machine and the versions that figures belong to."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    if importlib.util.find_spec("torch"):
        import torch

        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if hasattr(torch.cpu, "get_capabilities"):
            units = torch.cpu.get_capabilities()
            found["bf16_units"] = [name for name in ("avx512_bf16", "amx_bf16") if units.get(name)]
    return found | {name: version(name) for name in packages}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peers(builders: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each builder returns, by name; and by name why another is missing: its package cannot be imported."""
    built, missing = {}, {}
    for name, build in builders.items():
        try:
            built[name] = build()
        except ImportError as error:
            missing[name] = f"not installed: {error}"
    return built, missing


def alternate(
    sides: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """The median seconds of each side, all of them called once a round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            begun = clock()
            run()
            if number:
                times[name].append(clock() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def times_faster(seconds: Mapping[str, float], ours: str) -> dict[str, float]:
    """How many times as long as ours each of the others takes."""
    return {name: round(value / seconds[ours], 2) for name, value in seconds.items() if name != ours}


def arguments(doc: str, rounds: int, **more: Any) -> argparse.Namespace:
    """The command line: --rounds, and each of `more` as an option with its default (and its default's type)."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    for name, default in more.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default) if default else Path}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **kind)
    return parser.parse_args()


def report(**figures: Any) -> None:
    """Prints the figures as one JSON object."""
    print(json.dumps(figures, indent=2, ensure_ascii=False, default=str))


def draw_voc(root: Path, images: int = 32, size: tuple[int, int] = (375, 500), seed: int = 0) -> Path:
    """Writes JPEGs and palette masks of VOC's size under root/VOCdevkit/VOC2007, and returns root.

    Their files are as large as VOC's own (about 100 kB an image), since most of decoding is reading bits.
    """
    rng = np.random.default_rng(seed)
    folder = root / "VOCdevkit" / "VOC2007"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    palette = [value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i * 151 % 256)]
    names = [f"{number:06d}" for number in range(images)]
    height, width = size
    for name in names:
        coarse = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.normal(0, 9, (height, width, 1)).astype(np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(
            folder / "JPEGImages" / f"{name}.jpg", quality=90
        )
        labels = np.zeros((height, width), np.uint8)
        for _ in range(4):
            top, left = int(rng.integers(0, height - 60)), int(rng.integers(0, width - 60))
            box = np.s_[top : top + int(rng.integers(50, 200)), left : left + int(rng.integers(50, 200))]
            labels[box] = 255
            inner = np.s_[box[0].start + 3 : box[0].stop - 3, box[1].start + 3 : box[1].stop - 3]
            labels[inner] = rng.integers(1, 21)
        mask = Image.fromarray(labels, "P")
        mask.putpalette(palette)
        mask.save(folder / "SegmentationClass" / f"{name}.png")
    for split in ("train", "val"):
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root
