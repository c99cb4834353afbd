"""A data set with albumentations, as users of Lightning and of Hugging Face's Trainer write it."""

import os
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its look at a package index is no part of a run

import albumentations
import cv2
import numpy as np
from albumentations.pytorch import ToTensorV2
from peer_setting import MEAN, STD, VOID
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class Voc(Dataset):
    """Images and masks; scaled by 0.5 to 2, cropped and mirrored where there is a crop."""

    def __init__(self, files: list[tuple[Path, Path]], crop: int | None):
        self.files = files
        steps = [albumentations.Normalize(MEAN, STD), ToTensorV2()]
        if crop:
            steps = [
                albumentations.RandomScale((-0.5, 1.0), p=1),
                albumentations.PadIfNeeded(crop, crop, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=VOID),
                albumentations.RandomCrop(crop, crop),
                albumentations.HorizontalFlip(p=0.5),
                *steps,
            ]
        self.steps = albumentations.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.files[index]
        pixels = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
        found = self.steps(image=pixels, mask=np.array(Image.open(mask)))
        return found["image"], found["mask"].long()
