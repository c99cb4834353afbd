"""A whole run with Lightning's Trainer as it is by default and torchmetrics, at whole_run.py's setting."""

from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from peer_albumentations import Voc
from peer_setting import CLASSES, VOID, Unet, finish, pairs, setting
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex


class Module(lightning.LightningModule):
    def __init__(self, lr: float, decay: float):
        super().__init__()
        self.network = Unet()
        self.iou = MulticlassJaccardIndex(CLASSES, ignore_index=VOID)
        self.lr, self.decay = lr, decay

    def training_step(self, batch: Any, index: int) -> Tensor:
        image, mask = batch
        loss = nn.functional.cross_entropy(self.network(image), mask, ignore_index=VOID)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        image, mask = batch
        logits = self.network(image)
        self.log("val_loss", nn.functional.cross_entropy(logits, mask, ignore_index=VOID), prog_bar=True)
        self.iou(logits, mask)
        self.log("val_miou", self.iou, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    asked = setting()
    train, val = Voc(pairs(asked.root, "train"), asked.crop), Voc(pairs(asked.root, "val"), None)
    loader = DataLoader(train, asked.batch, shuffle=True, num_workers=asked.workers, drop_last=True)
    val_loader = DataLoader(val, 1, num_workers=asked.workers)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(asked.out), default_root_dir=asked.out
    )
    trainer.fit(Module(asked.lr, asked.decay), loader, val_loader)
    finish(float(trainer.callback_metrics["val_miou"]), float(trainer.callback_metrics["val_loss"]))


if __name__ == "__main__":
    main()
