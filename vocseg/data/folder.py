"""The data set `folder`: a folder of images and a folder of masks with the same names.

root/
    images/kitchen/0001.jpg     JPEG or PNG, in subfolders or not
    masks/kitchen/0001.png      PNG; the pixel values are class ids, 255 is void
    splits/train.txt            optional: kitchen/0001, one a line
"""

import os
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Interval, Len
from numpy.typing import NDArray

from vocseg import dataset
from vocseg.data.dataset import Dataset, FilePairs
from vocseg.data.lists import first_few, read_lines
from vocseg.errors import DataError, IncompleteError, Problem, UsageError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_MASK_SUFFIXES = (".png",)


@dataset
def folder(
    root: Path,
    split: str,
    *,
    classes: Annotated[tuple[str, ...], Len(2, 255)],
    images: str = "images",
    masks: str = "masks",
    splits: str = "",
    val_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.2,
    split_seed: Annotated[int, Ge(0)] = 0,
) -> Dataset:
    """Your own images and masks: two folders whose files have the same names.

    Without lists the splits are `train`, `val` and `all`. Who is in `val` depends on the names and the seed
    alone, so that every machine splits alike and few images change sides when more are added.

    Args:
        classes: names, the background first; a name's position is its id in the masks.
        images: folder of the images, from the root.
        masks: folder of the masks, from the root.
        splits: folder of the lists, from the root; <split>.txt holds names without suffix, one a line. Images
            and masks that no list names may then be without the other.
        val_fraction: share of the images in `val`, but one image at least, where there are no lists.
        split_seed: another seed gives another split.

    Raises:
        DataError: a folder or list is missing, or names are not unique.
        IncompleteError: an image has no mask, or a mask no image.
    """
    root = Path(root)
    if len(set(classes)) < len(classes):
        raise UsageError(Problem("data.classes", f"a class is named twice in {', '.join(classes)}"))
    absent = [home for home in (root / images, root / masks) if not home.is_dir()]
    if absent:
        remedy = (
            "--data DIR or VOCSEG_DATA names the folder that holds it, data.images and data.masks the folder itself"
        )
        raise DataError(*(Problem(str(home), f"no such folder; {remedy}") for home in absent))
    image_files, image_twice = _find(root / images, root / masks, _IMAGE_SUFFIXES)
    mask_files, mask_twice = _find(root / masks, root / images, _MASK_SUFFIXES)
    if splits:
        list_file = root / splits / f"{split}.txt"
        names = _read_list(list_file)
        where = f"named by {list_file}"
    else:
        names = sorted(image_files.keys() | mask_files.keys())
        where = f"in {root}"
    problems = []
    for kind, found, twice, home, suffixes in (
        ("image", image_files, image_twice, root / images, _IMAGE_SUFFIXES),
        ("mask", mask_files, mask_twice, root / masks, _MASK_SUFFIXES),
    ):
        double = [name for name in names if name in twice]
        if double:
            problems.append(Problem(str(home), f"more than one {kind} is named {first_few(double)}; keep one of each"))
        unpaired = [name for name in names if name not in found]
        if unpaired:
            problems.append(
                Problem(
                    str(home),
                    f"no {kind} ({', '.join(suffixes)}) for {len(unpaired)} of {len(names)} names {where}: "
                    f"{first_few(unpaired)}",
                )
            )
    if not splits:
        names = _seeded_split(names, split, val_fraction, split_seed, root)
    expected = os.path.join(root, images, ""), os.path.join(root, masks, "")
    files = FilePairs(
        Path(),
        [
            (image_files.get(name, f"{expected[0]}{name}.jpg"), mask_files.get(name, f"{expected[1]}{name}.png"))
            for name in names
        ],
    )
    from vocseg.data.images import read_pair  # wanted, with its decoders, once all is found

    def read(index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        for path, found in zip(files[index], (image_files, mask_files), strict=True):
            if names[index] not in found:  # be there a file or not: the name may lead out of the folder
                raise DataError(Problem(str(path), "no such file"))
        for path, twice in zip(files[index], (image_twice, mask_twice), strict=True):
            if names[index] in twice:
                raise DataError(Problem(str(path), "not the only file of this name"))
        return read_pair(*files[index], len(classes))

    opened = Dataset(classes, tuple(names), read, files)
    if problems:
        raise IncompleteError(*problems, rest=opened)
    return opened


def _find(home: Path, other: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, str], set[str]]:
    """Files below `home` by name: the path from there without suffix, with / on every system; and names given twice.

    `other` is left out where it lies inside, so that images may stand in the root itself.
    """
    found: dict[str, str] = {}
    twice = set()
    for parent, subfolders, files in os.walk(home):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and Path(parent, s) != other]
        inside = Path(parent).relative_to(home).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in suffixes and not file.startswith("."):
                # macOS may list "é" as two code points where another system has one.
                name = unicodedata.normalize("NFC", prefix + stem)
                if name in found:
                    twice.add(name)
                found[name] = os.path.join(parent, file)
    return found, twice


def _read_list(path: Path) -> list[str]:
    known = sorted(file.stem for file in path.parent.glob("*.txt"))
    if path.stem not in known:
        have = f"there are {', '.join(known)}" if known else "there is no list at all"
        raise DataError(Problem(str(path), f"no such split; {have}"))
    names = [unicodedata.normalize("NFC", line.strip()) for line in read_lines(path) if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(Problem(str(path), f"named more than once: {first_few(repeated)}"))
    if not names:
        raise DataError(Problem(str(path), "the list is empty"))
    return names


def _seeded_split(names: list[str], split: str, val_fraction: float, seed: int, root: Path) -> list[str]:
    if split not in ("train", "val", "all"):
        raise DataError(Problem(str(root), f"no split '{split}'; without data.splits there are train, val and all"))
    least = 1 if split == "all" else 2
    if len(names) < least:
        raise DataError(
            Problem(str(root), f"split '{split}' takes at least {least} pair{'s' * (least > 1)}, found {len(names)}")
        )
    if split == "all":
        return names
    # By hash and not by a seeded shuffle: a shuffle of one name more is another shuffle altogether.
    order = sorted(names, key=lambda name: sha256(f"{seed}/{name}".encode()).digest())
    val = set(order[: min(max(1, round(len(names) * val_fraction)), len(names) - 1)])
    return [name for name in names if (name in val) == (split == "val")]
