"""A whole run as torchvision's references/segmentation do it (train, presets, utils), at whole_run.py's setting.

What differs: AdamW, workers, crop and size as set, the network, and images validated at their own size.
"""

import datetime
import random
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from peer_setting import CLASSES, MEAN, SHORT, STD, VOID, Unet, finish, pairs, setting
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import InterpolationMode, RandomCrop
from torchvision.transforms import functional as F


class Voc(Dataset):
    def __init__(self, files: list[Any], crop: int | None):
        self.files, self.crop = files, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = Image.open(self.files[index][0]).convert("RGB"), Image.open(self.files[index][1])
        if self.crop:
            size = random.randint(int(0.5 * SHORT), 2 * SHORT)
            image, target = F.resize(image, size), F.resize(target, size, interpolation=InterpolationMode.NEAREST)
            if random.random() < 0.5:
                image, target = F.hflip(image), F.hflip(target)
            if min(image.size) < self.crop:
                padding = [0, 0, max(0, self.crop - image.width), max(0, self.crop - image.height)]
                image, target = F.pad(image, padding, fill=0), F.pad(target, padding, fill=VOID)
            window = RandomCrop.get_params(image, (self.crop, self.crop))
            image, target = F.crop(image, *window), F.crop(target, *window)
        pixels = F.convert_image_dtype(F.pil_to_tensor(image), torch.float)
        return F.normalize(pixels, mean=MEAN, std=STD), torch.as_tensor(np.array(target), dtype=torch.int64)


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*samples, strict=True)
    return in_one(images, 0), in_one(targets, VOID)


def in_one(tensors: tuple[Tensor, ...], fill: int) -> Tensor:
    size = [max(lengths) for lengths in zip(*(tensor.shape for tensor in tensors), strict=True)]
    batch = tensors[0].new(len(tensors), *size).fill_(fill)
    for tensor, place in zip(tensors, batch, strict=True):
        place[..., : tensor.shape[-2], : tensor.shape[-1]].copy_(tensor)
    return batch


class Smoothed:
    """A series of which the references' logger shows the median of the last 20 and the mean of all."""

    def __init__(self, window: int = 20, form: str = "{median:.4f} ({mean:.4f})"):
        self.last: deque[float] = deque(maxlen=window)
        self.total, self.count, self.form = 0.0, 0, form

    def update(self, value: float) -> None:
        self.last.append(value)
        self.total += value
        self.count += 1

    def __str__(self) -> str:
        last = torch.tensor(list(self.last))
        return self.form.format(median=last.median().item(), mean=self.total / self.count, value=self.last[-1])


def logged(loader: Collection[Any], every: int, header: str, meters: dict[str, Smoothed]) -> Iterator[Any]:
    step_time, data_time = Smoothed(form="{mean:.4f}"), Smoothed(form="{mean:.4f}")
    end = time.time()
    for step, batch in enumerate(loader):
        data_time.update(time.time() - end)
        yield batch
        step_time.update(time.time() - end)
        if step % every == 0:
            left = datetime.timedelta(seconds=int(step_time.total / step_time.count * (len(loader) - step)))
            shown = "  ".join(f"{name}: {meter}" for name, meter in meters.items())
            print(f"{header}  [{step}/{len(loader)}]  eta: {left}  {shown}  time: {step_time}  data: {data_time}")
        end = time.time()


class ConfusionMatrix:
    def __init__(self) -> None:
        self.matrix = torch.zeros((CLASSES, CLASSES), dtype=torch.int64)

    def update(self, truth: Tensor, prediction: Tensor) -> None:
        with torch.inference_mode():
            valid = (truth >= 0) & (truth < CLASSES)
            indices = CLASSES * truth[valid].to(torch.int64) + prediction[valid]
            self.matrix += torch.bincount(indices, minlength=CLASSES**2).reshape(CLASSES, CLASSES)

    def iou(self) -> Tensor:
        counts = self.matrix.float()
        return counts.diag() / (counts.sum(1) + counts.sum(0) - counts.diag())


def main() -> None:
    asked = setting()
    train, val = Voc(pairs(asked.root, "train"), asked.crop), Voc(pairs(asked.root, "val"), None)
    loader = DataLoader(
        train, asked.batch, sampler=RandomSampler(train), num_workers=asked.workers, collate_fn=collate, drop_last=True
    )
    val_loader = DataLoader(val, 1, sampler=SequentialSampler(val), num_workers=asked.workers, collate_fn=collate)
    device = torch.device("cpu")
    network = Unet().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), asked.lr, weight_decay=asked.decay)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=len(loader), power=0.9)

    network.train()
    meters: dict[str, Smoothed] = defaultdict(Smoothed)
    meters["lr"] = Smoothed(1, "{value}")
    for image, target in logged(loader, 10, "Epoch: [0]", meters):
        image, target = image.to(device), target.to(device)
        loss = nn.functional.cross_entropy(network(image), target, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        for name, value in {"loss": loss.item(), "lr": optimizer.param_groups[0]["lr"]}.items():
            meters[name].update(value)

    network.eval()
    counted, losses = ConfusionMatrix(), []
    with torch.inference_mode():
        for image, target in logged(val_loader, 100, "Test:", defaultdict(Smoothed)):
            image, target = image.to(device), target.to(device)
            output = network(image)
            counted.update(target.flatten(), output.argmax(1).flatten())
            if asked.val_loss:
                losses.append(nn.functional.cross_entropy(output, target, ignore_index=VOID).item())
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0}
    torch.save(state | {"lr_scheduler": scheduler.state_dict()}, asked.out / "checkpoint.pth")
    finish(counted.iou().nanmean().item(), sum(losses) / len(losses) if losses else None)


if __name__ == "__main__":
    main()
