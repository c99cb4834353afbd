"""Using a run's weights: scoring them on any split, and segmenting images."""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vocseg.build import build_loss, build_network, choose_placement, open_split
from vocseg.data.images import read_image
from vocseg.errors import DataError, Problem
from vocseg.evaluate.confusion import class_map
from vocseg.evaluate.figures import figures
from vocseg.evaluate.inference import Predictor, Scored, evaluate
from vocseg.recipe.reader import Recipe
from vocseg.report.overlays import overlay
from vocseg.report.palette import save_palette_mask
from vocseg.run import run_recipe
from vocseg.runs.checkpoint import load_tensors
from vocseg.runs.folder import RunFolder

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def score(
    path: Path, *, data: Path | None = None, split: str | None = None, device: str = "auto"
) -> Generator[Scored, None, dict[str, Any]]:
    """Scores a run's weights on a split; yields after each image and returns the figures.

    Args:
        split: any split of the run's data set; None for the one it validated on.
    """
    folder = RunFolder.open(path)
    root = [f"data.root={json.dumps(str(data.absolute()))}"] if data else []
    recipe = run_recipe(folder, root)
    split = split or recipe.data.settings.val
    dataset = open_split(recipe, split)
    loss = build_loss(recipe, len(dataset.classes), lambda: open_split(recipe, recipe.data.settings.train))
    predictor = _predictor(folder, recipe, len(dataset.classes), device)
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
    path: Path, images: Sequence[Path], *, out: Path | None = None, device: str = "auto"
) -> Iterator[Predicted]:
    """Segments image files, and those in folders, with a run's weights.

    Writes `<name>.png`, a palette mask of class ids, and `<name>_overlay.png` for each, under `out` (default: the
    run's `predictions/`); images of a folder keep their place below it.

    Raises:
        DataError: an image is missing or unreadable, or two would be written to one name; all are named, and
            nothing is written.
    """
    folder = RunFolder.open(path)
    recipe = run_recipe(folder)
    targets = find_images(images, out or folder.predictions)
    classes, palette = folder.read_classes()
    predictor = _predictor(folder, recipe, len(classes), device)
    for done, (source, target) in enumerate(targets, 1):
        image = read_image(source)
        mask = class_map(predictor.logits(image))[0].cpu().numpy()
        target.parent.mkdir(parents=True, exist_ok=True)
        mask_file, overlay_file = target.with_name(f"{target.name}.png"), target.with_name(f"{target.name}_overlay.png")
        save_palette_mask(mask, mask_file, palette)
        Image.fromarray(overlay(image, mask, palette)).save(overlay_file)
        yield Predicted(source, mask_file, overlay_file, done, len(targets))


def find_images(images: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Each image file with the path, less its ending, that its prediction is written to.

    Raises:
        DataError: with all that is missing, is no image, or would be written to the same place.
    """
    found: list[tuple[Path, Path]] = []
    problems = []
    for path in images:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            found += [(p, out / p.relative_to(path).with_suffix("")) for p in inside]
            if not inside:
                problems.append(Problem(str(path), f"no image in this folder; expected {' or '.join(IMAGE_SUFFIXES)}"))
        elif path.is_file():
            found.append((path, out / path.stem))
        else:
            problems.append(Problem(str(path), "no such image or folder"))
    seen: dict[Path, Path] = {}
    for source, target in found:
        first = seen.setdefault(target, source)
        if first != source:
            same = f"would be written to the same place as {first}; predict them apart with --out"
            problems.append(Problem(str(source), same))
    if problems:
        raise DataError(*problems)
    return found


def _predictor(folder: RunFolder, recipe: Recipe, num_classes: int, device: str) -> Predictor:
    """The run's network with its kept weights, ready to predict."""
    placement = choose_placement(recipe, device)
    network = build_network(recipe, num_classes, pretrained=False)
    network.module.load_state_dict(load_tensors(folder.weights))
    placement.place(network.module).eval()
    return network.predictor(placement)
