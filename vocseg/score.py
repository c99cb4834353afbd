"""Using a run's weights: scoring them on any split, and segmenting images."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vocseg.build import build_loss, build_network, choose_placement, open_readable
from vocseg.data.dataset import Dataset
from vocseg.data.images import read_image
from vocseg.data.parallel import in_threads
from vocseg.errors import DataError, Problem, UsageError
from vocseg.evaluate.confusion import class_map
from vocseg.evaluate.faster import Say, silent
from vocseg.evaluate.figures import figures
from vocseg.evaluate.inference import Predictor
from vocseg.evaluate.validation import Scored, evaluate
from vocseg.recipe.reader import Recipe
from vocseg.recipe.toml import write_value
from vocseg.report.overlays import overlay
from vocseg.report.palette import save_palette_mask
from vocseg.run import run_recipe
from vocseg.runs.checkpoint import differing_tensors, load_tensors
from vocseg.runs.folder import RunFolder

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def score(
    path: Path,
    *,
    data: Path | None = None,
    split: str | None = None,
    device: str = "auto",
    compiled: bool = False,
    say: Say = silent,
) -> Generator[Scored, None, dict[str, Any]]:
    """Scores a run's weights on a split; yields after each image and returns the figures.

    Args:
        split: any split of the run's data set; None for the one it validated on.
        compiled: compile the network first.
        say: gets what the user should know, such as that it cannot be compiled.
    """
    folder = RunFolder.open(path)
    place = data or os.environ.get("VOCSEG_DATA")
    root = Path(place).expanduser().absolute() if place else None
    recipe = run_recipe(folder, [f"data.root={write_value(str(root))}"] if root else [])
    split = split or recipe.data.settings.val
    left_out = folder.read_bad_images()

    def opened(split: str) -> Dataset:
        seen = split in (recipe.data.settings.train, recipe.data.settings.val)
        return open_readable(recipe, split, known=left_out.get(split, {}) if seen else None)[0]

    dataset = opened(split)
    classes, _ = folder.read_classes()
    if list(dataset.classes) != classes:
        raise DataError(
            f"{path}: the run knows the classes {', '.join(classes)}; the data has {', '.join(dataset.classes)}"
        )
    loss = build_loss(recipe, len(dataset.classes), lambda: opened(recipe.data.settings.train))
    predictor = _predictor(folder, recipe, len(dataset.classes), device, compiled, say)
    evaluation = yield from evaluate(predictor, dataset, loss)
    return {
        "recipe": recipe.name,
        "run": str(folder.path),
        "split": split,
        **figures(evaluation, dataset.classes),
        "device": predictor.placement.device.type,
        "precision": predictor.placement.precision,
    }


@dataclass(frozen=True)
class Predicted:
    """One image is segmented: its source, and the files written."""

    source: Path
    mask: Path
    overlay: Path
    done: int
    total: int


def predict(
    path: Path,
    images: Sequence[Path],
    *,
    out: Path | None = None,
    device: str = "auto",
    compiled: bool = False,
    say: Say = silent,
) -> Iterator[Predicted]:
    """Segments image files, and those in folders, with a run's weights.

    Writes `<name>.png`, a palette mask of class ids, and `<name>_overlay.png` for each, under `out` (default: the
    run's `predictions/`); images of a folder keep their place below it.

    Raises:
        DataError: images are missing, or would be written over each other or over a source; all are named, and
            nothing is written. Or images cannot be read; all others are written first.
    """
    folder = RunFolder.open(path)
    if out is None and folder.predictions.is_symlink():  # a stranger's folder could have one to files of yours
        raise UsageError(Problem(str(folder.predictions), "is a link; name a folder with --out"))
    recipe = run_recipe(folder)
    targets = find_images(images, out or folder.predictions)
    classes, palette = folder.read_classes()
    predictor = _predictor(folder, recipe, len(classes), device, compiled, say)

    def write(source: Path, target: Path, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> tuple[Path, Path, Path]:
        target.parent.mkdir(parents=True, exist_ok=True)
        mask_file, overlay_file = files_of(target)
        save_palette_mask(mask, mask_file, palette)
        # PIL's own level, 6, takes nearly three times as long for files of the same size.
        Image.fromarray(overlay(image, mask, palette)).save(overlay_file, compress_level=3)
        return source, mask_file, overlay_file

    problems: list[Problem] = []

    def segmented() -> Iterator[Callable[[], tuple[Path, Path, Path]]]:
        """What is left to do for each image once its classes are known."""
        read = in_threads(_readable, [source for source, _ in targets], ahead=4)
        for (source, target), image in zip(targets, read, strict=True):
            if isinstance(image, DataError):
                problems.extend(image.problems)
            else:
                mask = class_map(*predictor.look(image))[0].cpu().numpy()
                yield partial(write, source, target, image, mask)

    for done, files in enumerate(in_threads(lambda call: call(), segmented(), ahead=4), 1):
        yield Predicted(*files, done, len(targets))
    if problems:
        raise DataError(*problems)


def _readable(source: Path) -> NDArray[np.uint8] | DataError:
    try:
        return read_image(source)
    except DataError as error:
        return error


def files_of(target: Path) -> tuple[Path, Path]:
    """The mask's and the overlay's file of a prediction."""
    return target.with_name(f"{target.name}.png"), target.with_name(f"{target.name}_overlay.png")


def find_images(images: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Each image file with the path, less its ending, that its prediction is written to.

    Raises:
        DataError: with all that is missing, is no image, or would be written to the same place.
    """
    found: list[tuple[Path, Path]] = []
    problems = []
    for path in images:
        if path.is_dir():
            files = (p for p in path.rglob("*") if not p.name.startswith("."))  # such as macOS's ._photo.jpg
            inside = sorted(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES)
            found += [(p, out / p.relative_to(path).with_suffix("")) for p in inside]
            if not inside:
                problems.append(Problem(str(path), f"no image in this folder; expected {' or '.join(IMAGE_SUFFIXES)}"))
        elif path.is_file():
            found.append((path, out / path.stem))
        else:
            problems.append(Problem(str(path), "no such image or folder"))
    sources = {os.path.realpath(source) for source, _ in found}  # which a link to itself does not upset
    written: dict[Path, Path] = {}
    for source, target in found:
        for file in files_of(target):
            first = written.setdefault(file, source)
            if first != source:
                same = f"would be written to the same place as {first}; predict them apart with --out"
                problems.append(Problem(str(source), same))
                break
            if os.path.realpath(file) in sources:
                problems.append(Problem(str(source), f"its prediction would overwrite {file}; choose another --out"))
                break
    if problems:
        raise DataError(*problems)
    return found


def _predictor(folder: RunFolder, recipe: Recipe, num_classes: int, device: str, compiled: bool, say: Say) -> Predictor:
    """The run's network with its kept weights, ready to predict as the run did: in bf16 only where that did."""
    placement = choose_placement(recipe, device, "fp32" if folder.precision == "fp32" else None)
    kept = load_tensors(folder.weights)
    network = build_network(recipe, num_classes, pretrained=False)
    differing = differing_tensors(kept, network.module.state_dict())
    if differing:
        changed = f"the architecture '{recipe.model.name}' is not the one of the run any more; see '{differing[0]}'"
        raise UsageError(Problem(str(folder.weights), changed))
    network.module.load_state_dict(kept)
    placement.place(network.module).eval()
    return network.predictor(placement, compiled=compiled, say=say)
