"""The data set `voc`: PASCAL VOC segmentation as the development kit lays it out.

root/VOCdevkit/VOC2012/
    ImageSets/Segmentation/train.txt    one list a split
    JPEGImages/2007_000032.jpg
    SegmentationClass/2007_000032.png   palette indices; 255 is void
    SegmentationClassAug/               SBD's masks, for lists such as trainaug.txt
"""

import os
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vocseg import dataset
from vocseg.data.dataset import Dataset, FilePairs
from vocseg.data.lists import first_few, read_lines
from vocseg.errors import DataError, IncompleteError, Problem

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataset
def voc(root: Path, split: str, *, year: Literal[2007, 2008, 2009, 2010, 2011, 2012] = 2012) -> Dataset:
    """PASCAL VOC segmentation of one year, with SBD's masks for `trainaug`.

    A split is any list in ImageSets/Segmentation. A line of it is an image id, or an image and a mask as
    paths from the year's folder. Ids of a split whose name ends in `aug` have their masks in
    SegmentationClassAug, those of any other in SegmentationClass.

    Everingham et al. 2010, doi:10.1007/s11263-009-0275-4; SBD: Hariharan et al. 2011,
    doi:10.1109/ICCV.2011.6126343.

    Args:
        year: which VOCdevkit/VOC<year> to read.

    Raises:
        DataError: the folder or the list is missing.
        IncompleteError: files that the list names are missing.
    """
    folder = _year_folder(Path(root), year)
    pairs, missing = _read_list(folder, split, year)
    files = FilePairs(folder, list(pairs.values()))
    from vocseg.data.images import read_pair  # wanted, with its decoders, once all is found

    def read(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return read_pair(*files[index], len(VOC_CLASSES))

    found = Dataset(VOC_CLASSES, tuple(pairs), read, files)
    if missing:
        raise IncompleteError(*missing, rest=found)
    return found


def _year_folder(root: Path, year: int) -> Path:
    """`root` holds VOCdevkit or is it."""
    for devkit in (root / "VOCdevkit", root):
        if (devkit / f"VOC{year}").is_dir():
            return devkit / f"VOC{year}"
    devkit = root if root.name == "VOCdevkit" else root / "VOCdevkit"
    others = sorted(path.name for path in devkit.glob("VOC20[01][0-9]"))
    found = f", only {', '.join(others)} (data.year chooses)" if others else ""
    remedy = "--data DIR or VOCSEG_DATA names the folder that holds VOCdevkit"
    missing = devkit / f"VOC{year}"
    raise DataError(Problem(str(missing), f"no such folder{found}{_fetch(missing, year)}; {remedy}"))


def _fetch(folder: Path, year: int, aug: bool = False) -> str:
    """The command that provides what is missing from the year's folder, to append to a message."""
    if year not in (2007, 2012) or (aug and year == 2007):
        return ""
    what = "sbd" if aug else f"voc{year}"
    return f"; `vocseg data fetch {what} --data {quote(str(folder.parent.parent))}` fetches it"


def _read_list(folder: Path, split: str, year: int) -> tuple[dict[str, tuple[str, str]], list[Problem]]:
    """Image and mask, as paths from the year's folder, by image id in the list's order; and which are missing."""
    lists = folder / "ImageSets" / "Segmentation"
    path = lists / f"{split}.txt"
    splits = sorted(file.stem for file in lists.glob("*.txt"))
    aug = split.endswith("aug")
    remedy = _fetch(folder, year, aug)
    if split not in splits:
        known = f"VOC{year} has {', '.join(splits)}" if splits else "there is no list at all"
        raise DataError(Problem(str(path), f"no such split; {known}{remedy if aug or not splits else ''}"))
    lines = read_lines(path)

    masks = "SegmentationClassAug" if aug else "SegmentationClass"
    pairs: dict[str, tuple[str, str]] = {}
    malformed, repeated = [], []
    for number, line in enumerate(lines, 1):
        match line.split():
            case []:
                continue
            case [name] if "/" not in name:
                pair = f"JPEGImages/{name}.jpg", f"{masks}/{name}.png"
            case [image, mask] if "/" in image and "/" in mask and ".." not in f"{image}/{mask}".split("/"):
                name, pair = Path(image).stem, (image.lstrip("/"), mask.lstrip("/"))
            case _:
                malformed.append(number)
                continue
        if name in pairs:
            repeated.append(name)
        pairs[name] = pair

    problems = []
    if malformed:
        problems.append(
            Problem(str(path), f"expected one id, or an image and a mask path, in line {first_few(malformed)}")
        )
    if repeated:
        problems.append(Problem(str(path), f"named more than once: {first_few(repeated)}"))
    if not pairs and not malformed:
        problems.append(Problem(str(path), "the list is empty"))
    missing = _missing_files(folder, pairs, path.name, remedy)
    if problems:
        raise DataError(*problems, *missing)
    return pairs, missing


def _missing_files(folder: Path, pairs: dict[str, tuple[str, str]], name: str, remedy: str) -> list[Problem]:
    """One problem a folder that lacks files, from one look at each folder rather than at each file."""
    wanted: dict[str, list[str]] = {}
    for file in (file for pair in pairs.values() for file in pair):
        parent, _, base = file.rpartition("/")
        wanted.setdefault(parent, []).append(base)
    problems = []
    for parent, bases in wanted.items():
        try:
            there = set(os.listdir(folder / parent))
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        except OSError as error:
            problems.append(Problem(str(folder / parent), f"the folder cannot be listed: {error.strerror}"))
            continue
        absent = [base for base in bases if base not in there]
        if absent:
            problems.append(
                Problem(
                    str(folder / parent),
                    f"{len(absent)} of {len(bases)} files that {name} names are missing: {first_few(absent)}{remedy}",
                )
            )
    return problems
