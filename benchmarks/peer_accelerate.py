"""A whole run with accelerate's loop (examples/cv_example.py) and torchmetrics, at whole_run.py's setting."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peer_albumentations import Voc
from peer_setting import CLASSES, VOID, Unet, finish, pairs, setting
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm import tqdm


def main() -> None:
    asked = setting()
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    train, val = Voc(pairs(asked.root, "train"), asked.crop), Voc(pairs(asked.root, "val"), None)
    loader = DataLoader(train, asked.batch, shuffle=True, num_workers=asked.workers, drop_last=True)
    val_loader = DataLoader(val, 1, num_workers=asked.workers)
    network = Unet()
    optimizer = torch.optim.AdamW(network.parameters(), asked.lr, weight_decay=asked.decay)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=len(loader), power=0.9)
    network, optimizer, loader, val_loader, scheduler = accelerator.prepare(
        network, optimizer, loader, val_loader, scheduler
    )

    network.train()
    for image, mask in tqdm(loader):
        loss = nn.functional.cross_entropy(network(image), mask, ignore_index=VOID)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    network.eval()
    iou, losses = MulticlassJaccardIndex(CLASSES, ignore_index=VOID), []
    for image, mask in val_loader:
        with torch.no_grad():
            logits = network(image)
        prediction, truth = accelerator.gather_for_metrics((logits.argmax(1), mask))
        iou.update(prediction, truth)
        if asked.val_loss:
            losses.append(nn.functional.cross_entropy(logits, mask, ignore_index=VOID).item())
    accelerator.save_state(str(asked.out / "checkpoint"))
    finish(iou.compute().item(), sum(losses) / len(losses) if losses else None)


if __name__ == "__main__":
    main()
