"""What the peers of whole_run.py have in common: the setting they are given, the network, and what they print last.

Everything else of theirs is what their own users write, and stands in one file each.
"""

import argparse
import json
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, VOID = 21, 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONG, SHORT = 500, 375  # VOC's usual size, for peers that scale to a size


def setting() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path)
    for name, kind in {"crop": int, "batch": int, "workers": int, "lr": float, "decay": float}.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--val-loss", action="store_true", help="also where the peer's own users do not compute it")
    return parser.parse_args()


def pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    folder = root / "VOCdevkit" / "VOC2007"
    names = (folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
    return [(folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png") for name in names]


class Unet(nn.Module):
    """smp's U-Net on ResNet34 from scratch, for images of any size: padded to a multiple of 32, logits cropped back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return self.network(F.pad(images, (0, -width % 32, 0, -height % 32)))[..., :height, :width]


def finish(miou: float, val_loss: float | None) -> None:
    print("\n" + json.dumps({"miou": miou, "val_loss": val_loss}), flush=True)
