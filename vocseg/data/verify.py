"""Verifying a data set: every image and mask is read, and no image may be in two splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from vocseg.data.dataset import VOID, Dataset
from vocseg.data.images import read_image, read_mask
from vocseg.data.lists import first_few
from vocseg.data.parallel import Progress, in_threads
from vocseg.data.threads import read
from vocseg.errors import DataError, Problem


@dataclass(frozen=True)
class Findings:
    """What is wrong with a data set, and what is only worth knowing."""

    problems: tuple[Problem, ...]
    remarks: tuple[Problem, ...]


@dataclass(frozen=True)
class _Image:
    """What reading an image and its mask showed. `where` is the image's file, or split and name if it has none."""

    split: str
    name: str
    where: str
    pixels: bytes | None  # a digest; None where the image cannot be read
    problems: tuple[Problem, ...]
    remarks: tuple[Problem, ...] = ()
    only_void: bool = False  # the mask holds background and void, and no other class


def verify(splits: Mapping[str, Dataset], progress: Progress | None = None) -> Findings:
    """Reads all images and masks of all splits, and reports everything that it finds.

    Problems: files that are missing or cannot be read, masks of another size than their image, unknown ids, names
    that a split has twice, and images that are in two splits, be it under one name or as the same decoded pixels
    under two. A copy that was scaled or compressed anew has other pixels and is not recognised.

    Remarks: masks that are void all over, masks of 0 and 255 alone, in which 255 may have been meant as a class, images
    that a split has twice, and names that two splits give to different images.
    """
    places = [(split, dataset, index) for split, dataset in splits.items() for index in range(len(dataset))]
    problems: list[Problem] = []
    remarks: list[Problem] = []
    by_name: dict[str, _Image] = {}
    by_pixels: dict[bytes, _Image] = {}
    only_void: dict[str, list[str]] = {split: [] for split in splits}
    timeout = max((dataset.timeout for dataset in splits.values()), default=0.0)
    for image in in_threads(lambda place: _read(*place), places, progress, timeout=timeout):
        problems += image.problems
        remarks += image.remarks
        only_void[image.split] += [image.name] * image.only_void
        namesake = by_name.setdefault(image.name, image)
        twin = by_pixels.setdefault(image.pixels, image) if image.pixels else image
        if namesake is not image and namesake.split == image.split:
            problems.append(Problem(image.where, f"the name '{image.name}' is twice in '{image.split}'"))
        elif namesake is not image and (namesake is twin or namesake.where == image.where):
            problems.append(Problem(image.where, f"is in '{namesake.split}' and in '{image.split}'"))
        elif twin is not image and twin.split != image.split:
            problems.append(
                Problem(image.where, f"in '{image.split}', has the same pixels as {twin.where} in '{twin.split}'")
            )
        elif twin is not image:
            remarks.append(Problem(image.where, f"has the same pixels as {twin.where}; both are in '{image.split}'"))
        elif namesake is not image:
            remarks.append(
                Problem(image.where, f"another image of this name, {namesake.where}, is in '{namesake.split}'")
            )
    for split, names in only_void.items():
        if names:
            what = f"{len(names)} of {len(splits[split])} masks hold 0 and {VOID} alone, and {VOID} is void"
            where = f"where it was meant as a class, write that class's id instead: {first_few(names)}"
            remarks.append(Problem(split, f"{what}; {where}"))
    # A file in two splits, or one that was looked at twice, has its problem once.
    return Findings(tuple(dict.fromkeys(problems)), tuple(remarks))


def _read(split: str, dataset: Dataset, index: int) -> _Image:
    name = dataset.names[index]
    image_file, mask_file = dataset.files[index] if dataset.files else (None, None)
    where, mask_where = str(image_file or f"{split}: {name}"), str(mask_file or f"{split}: {name}")
    try:
        image, mask = read(dataset, index)
    except DataError as error:
        # A reader stops at the first defect: each file is looked at by itself, so that both get their line.
        problems = [*error.problems, *(_defects(image_file, mask_file) if image_file and mask_file else ())]
        return _Image(split, name, where, None, tuple(problems))
    found = []
    if image.shape[:2] != mask.shape:
        found.append(f"the mask is {mask.shape} (h, w), its image {where} {image.shape[:2]}")
    ids = set(np.unique(mask).tolist())
    unknown = sorted(ids - {*range(len(dataset.classes)), VOID})
    if unknown:
        found.append(f"unknown ids {first_few(unknown)}; ids go up to {len(dataset.classes) - 1}, void is {VOID}")
    return _Image(
        split,
        name,
        where,
        pixels=sha256(repr(image.shape).encode() + image.tobytes()).digest(),
        problems=tuple(Problem(mask_where, message) for message in found),
        remarks=() if (mask != VOID).any() else (Problem(mask_where, "has no labelled pixel: all is void"),),
        only_void=ids == {0, VOID},
    )


def _defects(image: Path, mask: Path) -> list[Problem]:
    problems: list[Problem] = []
    for reader, path in ((read_image, image), (read_mask, mask)):
        try:
            reader(path)
        except DataError as error:
            problems += error.problems
    return problems
