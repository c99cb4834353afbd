"""The figures of an evaluation as plain data, the way result.json and `--json` hold them."""

from collections.abc import Sequence
from typing import Any

from vocseg.evaluate.inference import Evaluation
from vocseg.evaluate.scores import bootstrap_interval, null_models, scores


def figures(evaluation: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """mIoU with its interval, pixel accuracy, loss, IoU by class and the null models' scores.

    The IoU of a class that is neither in the truth nor predicted is NaN (null in JSON).
    """
    found = scores(evaluation.matrix)
    return {
        "miou": found.miou,
        "miou_interval": list(bootstrap_interval(evaluation.per_image)),
        "pixel_accuracy": found.pixel_accuracy,
        "loss": evaluation.loss,
        "iou": dict(zip(classes, found.iou.tolist(), strict=True)),
        "null_models": {
            name: {"miou": null.miou, "pixel_accuracy": null.pixel_accuracy}
            for name, null in null_models(evaluation.matrix, classes).items()
        },
        "images": len(evaluation.per_image),
    }
