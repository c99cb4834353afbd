"""A whole run with Hugging Face's Trainer, albumentations and `evaluate`'s way to count, at whole_run.py's setting.

The Trainer's defaults but for what the setting says, and for classes instead of logits being kept of the validation
images, of which each is counted by itself: with images of several sizes it does not go otherwise.
"""

from typing import Any

import numpy as np
import torch
import transformers
from peer_albumentations import Voc
from peer_setting import CLASSES, VOID, Unet, finish, pairs, setting
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Unet()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels, ignore_index=VOID), "logits": logits}


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, masks = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(masks)}


class MeanIou:
    """As `evaluate`'s mean_iou counts: three histograms an image."""

    def __init__(self) -> None:
        self.hit, self.true, self.predicted = np.zeros((3, CLASSES))

    def __call__(self, found: Any, compute_result: bool) -> dict[str, float]:
        predictions, labels = np.asarray(found.predictions), np.asarray(found.label_ids)
        for prediction, label in zip(predictions, labels, strict=True):
            valid = label != VOID
            prediction, label = prediction[valid], label[valid]
            self.hit += self._count(prediction[prediction == label])
            self.predicted += self._count(prediction)
            self.true += self._count(label)
        with np.errstate(invalid="ignore"):
            iou = self.hit / (self.true + self.predicted - self.hit)
        return {"miou": float(np.nanmean(iou))} if compute_result else {}

    def _count(self, labels: np.ndarray) -> np.ndarray:
        return np.histogram(labels, bins=CLASSES, range=(0, CLASSES - 1))[0]


def main() -> None:
    asked = setting()
    settings = transformers.TrainingArguments(
        str(asked.out),
        num_train_epochs=1,
        per_device_train_batch_size=asked.batch,
        per_device_eval_batch_size=1,
        dataloader_drop_last=True,
        learning_rate=asked.lr,
        weight_decay=asked.decay,
        max_grad_norm=0.0,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": 0.9, "lr_end": 0.0},
        eval_strategy="epoch",
        save_strategy="epoch",
        batch_eval_metrics=True,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        Model(),
        settings,
        data_collator=collate,
        train_dataset=Voc(pairs(asked.root, "train"), asked.crop),
        eval_dataset=Voc(pairs(asked.root, "val"), None),
        compute_metrics=MeanIou(),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(1),
    )
    trainer.train()
    figures = next(entry for entry in trainer.state.log_history if "eval_miou" in entry)
    finish(figures["eval_miou"], figures["eval_loss"])


if __name__ == "__main__":
    main()
