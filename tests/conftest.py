"""Small data sets on disk, for the tests of everything that reads files."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vocseg.report.palette import save_palette_mask

# The tests run in several processes; a thread for every core in each of them would be in the others' way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever starts the tests in the background, or by `nohup`, has them ignore these, and so would all that they start.
for _number, _default in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
    if hasattr(signal, _number) and signal.getsignal(getattr(signal, _number)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _number), _default)

# VOC's ids of aeroplane, cat and person, and a colour for each that tells it from the rest.
COLOURS = {0: (90, 90, 90), 1: (210, 60, 50), 8: (60, 190, 70), 15: (60, 80, 220)}


def _scene(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image of its own size with two coloured boxes, and its mask with a void border around each."""
    rng = np.random.default_rng(number)
    h, w = 40 + number % 11 * 4, 44 + number * 7 % 37
    mask = np.zeros((h, w), np.uint8)
    for i in range(2):  # three classes in turn, so that any three scenes in a row show all of them
        label = (1, 8, 15)[(number + i) % 3]
        top, left = rng.integers(2, h // 3), rng.integers(2, w // 6) + i * w // 2
        bottom, right = top + rng.integers(h // 3, h // 2), left + rng.integers(w // 5, w // 3)
        mask[top - 1 : bottom + 1, left - 1 : right + 1] = 255
        mask[top:bottom, left:right] = label
    colours = np.zeros((256, 3), np.uint8)
    for label, colour in COLOURS.items():
        colours[label] = colour
    image = colours[mask] + rng.integers(0, 30, (h, w, 3)).astype(np.uint8)
    return image, mask


def _write_pair(image_path: Path, mask_path: Path, number: int) -> None:
    image, mask = _scene(number)
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(image_path, quality=95)
    save_palette_mask(mask, mask_path)


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    """A folder that holds VOCdevkit with VOC2007 and VOC2012: 6 train and 4 val images each, of different sizes.

    The masks hold aeroplane (1), cat (8), person (15), background and void.
    """
    root = tmp_path / "data"
    for year in (2007, 2012):
        folder = root / "VOCdevkit" / f"VOC{year}"
        ids = [f"{year}_{i:06d}" for i in range(1, 11)]
        for i, name in enumerate(ids):
            number = 10 * (year - 2007) + i
            _write_pair(folder / f"JPEGImages/{name}.jpg", folder / f"SegmentationClass/{name}.png", number)
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        for split, members in (("train", ids[:6]), ("val", ids[6:]), ("trainval", ids)):
            (lists / f"{split}.txt").write_text("\n".join(members) + "\n")
    return root


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    """A folder of ten pairs: images/ as JPEG, masks/ as palette PNG, two of the pairs in a subfolder `more`.

    Classes 0 to 3 and void; the colours are those of `voc_root`.
    """
    root = tmp_path / "own"
    for i in range(10):
        name = f"more/photo_{i}" if i >= 8 else f"photo_{i}"
        _write_pair(root / f"images/{name}.jpg", root / f"masks/{name}.png", i)
        mask = np.array(Image.open(root / f"masks/{name}.png"))
        for new, old in enumerate((0, 1, 8, 15)):
            mask[mask == old] = new
        save_palette_mask(mask, root / f"masks/{name}.png")
    return root
