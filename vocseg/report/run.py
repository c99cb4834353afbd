"""All pictures of a run folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vocseg.data.dataset import Dataset
from vocseg.evaluate.confusion import class_map
from vocseg.evaluate.inference import Predictor
from vocseg.evaluate.scores import image_miou
from vocseg.evaluate.validation import Evaluation
from vocseg.report.figures import draw_confusion, draw_curves, draw_iou_bars
from vocseg.report.overlays import Example, draw_comparison

EXAMPLES_PER_GROUP = 2


def write_pictures(
    folder: Path,
    result: Mapping[str, Any],
    evaluation: Evaluation,
    epochs: Sequence[Mapping[str, Any]],
    predictor: Predictor,
    dataset: Dataset,
) -> None:
    """Draws curves, IoU bars, the confusion matrix and example images into a run folder."""
    draw_curves(epochs, folder / "curves.png", best_epoch=result["best_epoch"])
    draw_iou_bars(result["iou"], folder / "iou.png", miou=result["miou"], interval=tuple(result["miou_interval"]))
    draw_confusion(evaluation.matrix, dataset.classes, folder / "confusion.png")
    examples = list(choose_examples(predictor, dataset, evaluation))
    draw_comparison(examples, dataset.classes, folder / "examples.png", palette=dataset.palette)


def choose_examples(predictor: Predictor, dataset: Dataset, evaluation: Evaluation) -> Iterator[Example]:
    """The images with the best, the median and the worst mIoU of their own, each shown once."""
    predictor.network.eval()
    miou = image_miou(evaluation.per_image)
    # Where all truth is background, the image's mIoU says little: a stray pixel halves it. Prefer images with objects.
    objects = evaluation.per_image[:, 1, 1:].sum(1) > 0
    ranked = [int(i) for i in np.argsort(miou, kind="stable") if miou[i] == miou[i] and objects[i]]
    ranked = ranked or [int(i) for i in np.argsort(miou, kind="stable") if miou[i] == miou[i]]
    n = min(EXAMPLES_PER_GROUP, len(ranked) // 3)
    middle = (len(ranked) - n) // 2
    groups = {"best": ranked[::-1][:n], "median": ranked[middle : middle + n], "worst": ranked[:n]}
    if n == 0:
        groups = {"all": ranked}
    for group, indices in groups.items():
        for index in indices:
            image, truth = dataset.read(index)
            prediction = class_map(*predictor.look(image))[0].cpu().numpy()
            yield Example(group, dataset.names[index], image, truth, prediction, float(miou[index]))
