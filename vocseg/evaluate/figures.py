"""The figures of an evaluation as plain data, the way result.json and `--json` hold them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vocseg.evaluate.dialect import constant_counts, dialect_scores, perfect_counts
from vocseg.evaluate.scores import bootstrap_interval, constant_scores, null_models, scores
from vocseg.evaluate.validation import Evaluation


def figures(evaluation: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """mIoU with its interval, pixel accuracy, loss, IoU by class and the null models' scores.

    `reports_dialect` holds the same predictions and null models under the metric of `vocseg.evaluate.dialect`, and
    the `ceiling` of its mIoU, which is what a perfect prediction scores.

    The IoU of a class that is neither in the truth nor predicted is NaN (null in JSON).
    """
    matrix, per_image = evaluation.matrix, evaluation.per_image
    found = scores(matrix)
    nulls = null_models(matrix, classes)
    constants = {name: constant_scores(matrix, answer) for name, answer in nulls.items()}
    return {
        "miou": found.miou,
        "miou_interval": list(bootstrap_interval(per_image)),
        "pixel_accuracy": found.pixel_accuracy,
        "loss": evaluation.loss,
        "iou": dict(zip(classes, found.iou.tolist(), strict=True)),
        "null_models": {
            name: {"miou": null.miou, "pixel_accuracy": null.pixel_accuracy} for name, null in constants.items()
        },
        "reports_dialect": {
            **asdict(dialect_scores(per_image)),
            "ceiling": dialect_scores(perfect_counts(per_image)).miou,
            "null_models": {
                name: asdict(dialect_scores(constant_counts(per_image, answer))) for name, answer in nulls.items()
            },
        },
        "images": len(per_image),
    }
